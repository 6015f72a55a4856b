"""The one training loop: a task, an arm and a seed in; a table of the results schema out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

import adaptbatch as ab
from studies import data, ranks
from studies.analysis import spike_flags
from studies.networks import Autoencoder, Norm, Residual
from studies.schema import conform


@dataclass(frozen=True)
class Task:
    """What every arm of a study shares: network, data and budget.

    Attributes:
        data: Name of a data set in :mod:`studies.data`.
        examples: Budget [examples].
        micro_batch: Examples of one backward pass.
        probe_examples: Size of the fixed probe set, the first rows of the test set.
        probe_every: Examples between two evaluations.
        depth, widths, code, residual, norm, variational: Of :class:`studies.networks.Autoencoder`.
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


@dataclass(frozen=True)
class Arm:
    """What the arms of a study differ in.

    Attributes:
        name: Its name in tables and figures.
        rule: How it chooses the accumulation steps.
        lr: Adam's learning rate, after the warm-up.
        warmup_examples: Length of a linear learning-rate warm-up [examples]; 0 for none.
        max_steps: Largest number of accumulation steps.
    """

    name: str
    rule: ab.Rule
    lr: float
    warmup_examples: float = 0.0
    max_steps: int = 64

    def learning_rate(self, examples_seen: float) -> float:
        """Learning rate of a step that ends after ``examples_seen`` examples."""
        return self.lr * min(examples_seen / self.warmup_examples, 1.0) if self.warmup_examples else self.lr


def shuffled_passes(inputs: Tensor, task: Task, seed: int) -> Iterator[Tensor]:
    """Micro-batches until the budget is spent, in a new random order each pass over the data."""
    generator, left = torch.Generator().manual_seed(seed), task.examples
    while left > 0:
        order = torch.randperm(len(inputs), generator=generator)[:left]
        yield from (inputs[index] for index in order.split(task.micro_batch))
        left -= len(order)


def train(
    task: Task,
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
        A table of :mod:`studies.schema`.
    """
    torch.manual_seed(seed)
    dataset = data.load(task.data)
    inputs = torch.from_numpy(dataset.train_inputs).to(device)
    probe = torch.from_numpy(dataset.test_inputs[: task.probe_examples]).to(device)
    model = Autoencoder(
        task.depth, task.widths, task.code, task.residual, task.norm, task.variational, inputs.shape[1]
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=arm.lr, fused=True)
    # Every rank samples codes of its own.
    codes = torch.Generator(device).manual_seed(seed + 1_000_003 * ranks.rank())
    trained, loss_of = ranks.synchronised(model)
    losses: list[Tensor] = []
    extra: list[dict[str, float]] = []
    seen, next_probe = 0.0, 0.0
    limits = ab.Limits(max_steps=arm.max_steps)
    with ab.BatchController(trained, optimizer, rule=arm.rule, limits=limits) as controller:
        bounds = (controller.limits.min_steps, controller.limits.max_steps)
        for x in controller.micro_batches(shuffled_passes(inputs, task, seed)):
            own = ranks.share(x)
            loss = loss_of(own, codes)
            controller.backward(loss, weight=len(own))
            losses.append(loss.detach())
            seen += len(x)
            if controller.step_due:
                optimizer.param_groups[0]["lr"] = arm.learning_rate(seen)
                at_limit = arm.rule.closed_loop and controller.accumulation_steps in bounds
                controller.step()
                due = seen >= next_probe
                next_probe += task.probe_every * math.ceil((seen - next_probe) / task.probe_every) if due else 0.0
                extra.append({"at_limit": at_limit, "validation_loss": evaluate(model, probe) if due else math.nan})
                report(seen)
    table = controller.history.to_pandas()
    micro = pd.Series(torch.stack(losses).cpu().double().numpy())
    window = table.index.repeat(table["accumulation_steps"])
    table = table.assign(
        study=study,
        arm=arm.name,
        seed=seed,
        micro_batch_loss_max=micro.groupby(window).max(),
        spikes=spike_flags(micro).groupby(window).sum(),
    ).join(pd.DataFrame(extra))
    return conform(table)


@torch.no_grad()
def evaluate(model: Autoencoder, probe: Tensor) -> float:
    """Mean loss on the probe set, with the same sampled codes at every call."""
    codes = torch.Generator(probe.device).manual_seed(0)
    return float(model.loss(probe, codes))
