"""The one training loop: a task, an arm and a seed in; a table of the results schema out.

What is trained is a :class:`Problem`: deep autoencoders here, language models in :mod:`studies.engine.language`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn

import adaptbatch as ab
from studies import data
from studies.engine import ranks
from studies.engine.analysis import spike_flags
from studies.engine.arms import Arm
from studies.engine.networks import Autoencoder, Norm, Residual
from studies.engine.schema import conform


class Problem(Protocol):
    """A network and its data on a device."""

    @property
    def network(self) -> nn.Module:
        """Has ``loss(x, generator)``, the mean over what :meth:`weight` counts."""
        ...

    def micro_batches(self, seed: int) -> Iterator[Tensor]:
        """Until the budget is spent."""
        ...

    def weight(self, x: Tensor) -> float:
        """What a micro-batch counts towards the budget."""
        ...

    def evaluate(self) -> float:
        """Mean loss on the probe set."""
        ...

    def score(self) -> dict[str, float]:
        """What is said of the trained network: at least ``test_loss``."""
        ...


class Trainable(Protocol):
    """What every arm of a study shares: network, data and budget. A frozen dataclass: its fields are its identity."""

    @property
    def data(self) -> str: ...

    @property
    def examples(self) -> int: ...

    @property
    def probe_every(self) -> int: ...

    def problem(self, arm: Arm, device: str) -> Problem:
        """A new network, with what ``arm`` puts in place of the task's, and the data."""
        ...

    def collapsed_loss(self) -> float:
        """Loss on the validation set of a network that has learned nothing of its input."""
        ...


@dataclass(frozen=True)
class Task:
    """What every arm of a study shares: network, data and budget.

    Attributes:
        data: Name of a data set in :mod:`studies.data`.
        anomaly: The class that is not trained on and that the network is tested to tell apart; None: none.
        examples: Budget [examples].
        micro_batch: Examples of one backward pass.
        probe_examples: Size of the fixed probe set, the first rows of the validation set.
        probe_every: Examples between two evaluations.
        depth, widths, code, residual, norm, variational: Of :class:`studies.engine.networks.Autoencoder`.
    """

    data: str
    examples: int
    micro_batch: int
    probe_examples: int = 2_000
    probe_every: int = 5_000
    depth: int = 80
    widths: tuple[int, int] = (128, 32)
    code: int = 16
    residual: Residual = "scaled"
    norm: Norm = "none"
    variational: bool = True
    anomaly: int | None = None

    def network(self, arm: Arm, inputs: int) -> Autoencoder:
        """A new network, with what ``arm`` puts in place of the task's."""
        residual, norm = arm.residual or self.residual, arm.norm or self.norm
        return Autoencoder(self.depth, self.widths, self.code, residual, norm, self.variational, inputs)

    def problem(self, arm: Arm, device: str) -> Reconstruction:
        """A new autoencoder and its data."""
        parts = data.split(self.data, self.anomaly)
        inputs = torch.from_numpy(parts.train).to(device)
        probe = torch.from_numpy(parts.validation[: self.probe_examples]).to(device)
        return Reconstruction(self.network(arm, inputs.shape[1]).to(device), self, parts, inputs, probe)

    def collapsed_loss(self) -> float:
        """Squared error of the mean training input as the reconstruction of everything."""
        parts = data.split(self.data, self.anomaly)
        return float(((parts.validation - parts.train.mean(axis=0)) ** 2).sum(axis=1).mean())


@dataclass(frozen=True)
class Reconstruction:
    """An autoencoder and the data it reconstructs."""

    network: Autoencoder
    task: Task
    parts: data.Split
    inputs: Tensor
    probe: Tensor

    def micro_batches(self, seed: int) -> Iterator[Tensor]:
        """In a new random order each pass over the data."""
        return shuffled_passes(self.inputs, self.task, seed)

    def weight(self, x: Tensor) -> float:
        """Its examples."""
        return len(x)

    def evaluate(self) -> float:
        """Mean loss on the first rows of the validation set."""
        return evaluate(self.network, self.probe)

    def score(self) -> dict[str, float]:
        """:func:`score`."""
        return score(self.network, self.parts)


def shuffled_passes(inputs: Tensor, task: Task, seed: int) -> Iterator[Tensor]:
    """Micro-batches until the budget is spent, in a new random order each pass over the data."""
    generator, left = torch.Generator().manual_seed(seed), task.examples
    while left > 0:
        order = torch.randperm(len(inputs), generator=generator)[:left]
        yield from (inputs[index] for index in order.split(task.micro_batch))
        left -= len(order)


class _Losses:
    """Losses of micro-batches, read from the device at the end.

    In blocks: a tensor of its own for each loss, kept between the large ones that come and go, would leave the heap no
    hole that they fit in, and a long run would take all memory.
    """

    def __init__(self, device: str, block: int = 4096) -> None:
        self._device, self._block, self._count = device, block, 0
        self._blocks: list[Tensor] = []

    def append(self, loss: Tensor) -> None:
        place = self._count % self._block
        if place == 0:
            self._blocks.append(torch.empty(self._block, device=self._device))
        self._blocks[-1][place].copy_(loss.detach())
        self._count += 1

    def values(self) -> np.ndarray:
        return torch.cat(self._blocks)[: self._count].cpu().double().numpy()


def train(
    task: Trainable,
    arm: Arm,
    seed: int,
    *,
    study: str,
    device: str = "cpu",
    report: Callable[[float], None] = lambda examples: None,
) -> pd.DataFrame:
    """Train one arm on one seed.

    The seed fixes the initial weights, the order of the data and the sampled codes, alike for every arm.

    Args:
        task: Shared by the study's arms.
        arm: This one.
        seed: Its seed.
        study: Name for the ``study`` column.
        device: Where to train.
        report: Called after every step with the examples seen, for a progress bar.

    Returns:
        A table of :mod:`studies.engine.schema`, whose ``attrs["test"]`` is what the problem's ``score`` says of the
        trained network. It ends early where the loss on the probe set is no longer finite.
    """
    torch.manual_seed(seed)
    problem = task.problem(arm, device)
    optimizer = arm.build_optimizer(problem.network.parameters())
    # Every rank samples codes of its own.
    codes = torch.Generator(device).manual_seed(seed + 1_000_003 * ranks.rank())
    trained, loss_of = ranks.synchronised(problem.network)
    losses = _Losses(device)
    extra: list[dict[str, float]] = []
    seen, next_probe = 0.0, 0.0
    with ab.BatchController(
        trained,
        optimizer,
        rule=arm.rule,
        limits=ab.Limits(max_steps=arm.max_steps),
        ghost=arm.ghost,
        guard=arm.guard,
        learning_rate=arm.coupling,
        # A plain loop does not skip: what breaks an arm is its own.
        skip_nonfinite=False,
        # Rows are the product; and runs that were made before there was a choice are named without it.
        listen=1.0,
    ) as controller:
        bounds = (controller.limits.min_steps, controller.limits.max_steps)
        for x in controller.micro_batches(problem.micro_batches(seed)):
            own = ranks.share(x)
            loss = loss_of(own, codes)
            controller.backward(loss, weight=problem.weight(own))
            losses.append(loss)
            seen += problem.weight(x)
            if controller.step_due:
                optimizer.param_groups[0]["lr"] = arm.learning_rate(seen)
                at_limit = arm.rule.closed_loop and controller.accumulation_steps in bounds
                if arm.clip is not None:
                    torch.nn.utils.clip_grad_norm_(problem.network.parameters(), arm.clip)
                controller.step()
                due = seen >= next_probe
                next_probe += (
                    task.probe_every * (math.floor((seen - next_probe) / task.probe_every) + 1) if due else 0.0
                )
                validation = problem.evaluate() if due else math.nan
                extra.append({"at_limit": at_limit, "validation_loss": validation})
                report(seen)
                if due and not math.isfinite(validation):
                    # Parameters that are not finite stay so.
                    break
    table = controller.history.to_pandas()
    micro = pd.Series(losses.values())
    window = table.index.repeat(table["accumulation_steps"])
    table = table.assign(
        study=study,
        arm=arm.name,
        seed=seed,
        micro_batch_loss_max=micro.groupby(window).max(),
        spikes=spike_flags(micro).groupby(window).sum(),
    ).join(pd.DataFrame(extra))
    table = conform(table)
    table.attrs["test"] = problem.score()
    return table


@torch.no_grad()
def score(model: Autoencoder, parts: data.Split) -> dict[str, float]:
    """Mean loss of the normal test rows, and how well the reconstruction error tells the anomalies from them.

    ``auroc`` and ``auprc`` (average precision) are NaN where there are no anomalies, or where errors are not finite.
    """
    device = next(model.parameters()).device
    codes = torch.Generator(device).manual_seed(0)
    test = torch.from_numpy(parts.test).to(device)
    losses, errors = [], []
    for x in test.split(2_048):
        losses.append(model.example_losses(x, codes).cpu())
        errors.append(model.reconstruction_errors(x).cpu())
    loss, error = torch.cat(losses).double().numpy(), torch.cat(errors).double().numpy()
    found = {"test_loss": float(loss[~parts.anomalous].mean()), "auroc": math.nan, "auprc": math.nan}
    if parts.anomalous.any() and np.isfinite(error).all():
        found["auroc"] = float(roc_auc_score(parts.anomalous, error))
        found["auprc"] = float(average_precision_score(parts.anomalous, error))
    return found


@torch.no_grad()
def evaluate(model: Autoencoder, probe: Tensor) -> float:
    """Mean loss on the probe set, with the same sampled codes at every call."""
    codes = torch.Generator(probe.device).manual_seed(0)
    return float(model.loss(probe, codes))
