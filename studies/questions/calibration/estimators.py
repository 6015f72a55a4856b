"""The controller's estimate and every peer's, behind one protocol, on a model whose gradients are known."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

import adaptbatch as ab

DIMENSION = 100


class Location(nn.Module):
    """Loss ``|theta - x|^2 / 2`` of each example: its gradient is ``theta - x``, whatever has been heard before."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta)

    def losses(self, x: Tensor) -> Tensor:
        """``[b]``."""
        return (self.theta - x).square().sum(dim=1) / 2


def location() -> Location:
    """The model with ``|G| = 1`` for examples of mean 0."""
    return Location(torch.full((DIMENSION,), DIMENSION**-0.5))


class Estimator(Protocol):
    """Hears windows of micro-batches; knows ``B`` afterwards."""

    def hear(self, window: Sequence[Tensor]) -> None:
        """Forward and backward passes of one window, and an optimizer step of length zero."""
        ...

    def noise_scale(self) -> float:
        """``B`` [examples], every window with the same weight as far as the package allows."""
        ...


def _still(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.0)


class Controller:
    """The controller; the ratio of the means of its history's columns."""

    def __init__(self, model: Location, sizes: Sequence[int]) -> None:
        self.model, k = model, len(sizes)
        limits = ab.Limits(max_steps=k)
        self.controller = ab.BatchController(model, _still(model), rule=ab.Fixed(k), limits=limits)

    def hear(self, window: Sequence[Tensor]) -> None:
        """The public loop."""
        for x in window:
            self.controller.backward(self.model.losses(x).mean(), weight=len(x))
        self.controller.step()

    def noise_scale(self) -> float:
        """Windows of one size have one weight."""
        history = self.controller.history.to_pandas()
        return ab.estimate.noise_scale(
            ab.records.NoiseEstimate(history["grad_sq_norm"].mean(), history["noise_trace"].mean())
        )


class ExampleCells:
    """The package's estimator where every example is a cell: what the controller hears of micro-batches of one."""

    def __init__(self, model: Location, sizes: Sequence[int]) -> None:
        self.model, self.pairs = model, list[tuple[float, float]]()

    def hear(self, window: Sequence[Tensor]) -> None:
        """One batched backward pass for all examples' own gradients."""
        losses = self.model.losses(torch.cat(list(window)))
        n = len(losses)
        (gradients,) = torch.autograd.grad(losses, [self.model.theta], torch.eye(n), is_grads_batched=True)
        rows = gradients.double()
        sq_norms, batch_sq_norm = float(rows.square().sum()), float(rows.mean(dim=0).square().sum())
        pair = ab.estimate.estimate_window(ab.records.Measurement(sq_norms, batch_sq_norm, float(n), n))
        self.pairs.append((pair.grad_sq_norm, pair.noise_trace))

    def noise_scale(self) -> float:
        """The ratio of means."""
        signal, trace = np.mean(self.pairs, axis=0).tolist()
        return ab.estimate.noise_scale(ab.records.NoiseEstimate(signal, trace))


# So near 1 that no window weighs more than another, and far enough for a double to tell it from 1.
EQUAL_WEIGHTS = 1.0 - 1e-9


class AdaScale:
    """fairscale's AdaScale: its public gain ``r = (v + s) / (v / K + s)`` is solved for ``B = b v / s``."""

    def __init__(self, model: Location, sizes: Sequence[int]) -> None:
        from fairscale.optim import AdaScale as Optimizer

        self.model, self.cells, self.micro_batch_examples = model, len(sizes), sum(sizes) / len(sizes)
        self.optimizer = Optimizer(
            _still(model), world_size=1, num_gradients_to_accumulate=self.cells, smoothing=EQUAL_WEIGHTS
        )

    def hear(self, window: Sequence[Tensor]) -> None:
        """Its documented loop: losses divided by their number."""
        for x in window:
            (self.model.losses(x).mean() / self.cells).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def noise_scale(self) -> float:
        """Infinite where the gain is at its limit."""
        gain = float(self.optimizer.gain())
        signal = 1.0 - gain / self.cells
        return self.micro_batch_examples * (gain - 1.0) / signal if signal > 0.0 else math.inf


class AdaptDL:
    """The formula of adaptdl (Pollux), whose package does not import here: two unclipped averages, a ratio on read.

    With the mean ``l`` of the micro-batches' squared norms and the squared norm ``t`` of their mean, ``v = K (l - t) /
    (K - 1)`` for one micro-batch and ``s = (K t - l) / (K - 1)``, each in a debiased moving average.

    Args:
        smoothing: Weight of the past after one micro-batch; 0.999 as published, here as near 1 as it goes.
    """

    def __init__(self, model: Location, sizes: Sequence[int], smoothing: float = EQUAL_WEIGHTS) -> None:
        self.model, self.cells, self.micro_batch_examples = model, len(sizes), sum(sizes) / len(sizes)
        self.decay, self.averages = smoothing**self.cells, np.zeros(2)

    def hear(self, window: Sequence[Tensor]) -> None:
        """Gradients by autograd; the mean over micro-batches whatever their sizes, as in its loop."""
        rows = [torch.autograd.grad(self.model.losses(x).mean(), [self.model.theta])[0].double() for x in window]
        gradients = torch.stack(rows)
        k, local = self.cells, float(gradients.square().sum(dim=1).mean())
        total = float(gradients.mean(dim=0).square().sum())
        new = np.array([k * (local - total), k * total - local]) / (k - 1)
        self.averages = self.decay * self.averages + (1.0 - self.decay) * new

    def noise_scale(self) -> float:
        """Debiasing cancels from the ratio."""
        variance, signal = self.averages.tolist()
        return self.micro_batch_examples * max(variance, 0.0) / signal if signal > 0.0 else math.inf


class GnsPytorch:
    """gns-pytorch on all parameters and all examples of a window; it returns a ratio, so that ratios are averaged."""

    def __init__(self, model: Location, sizes: Sequence[int]) -> None:
        from gns_pytorch import compute_gns

        self.model, self.ratios = model, list[float]()
        self.compute = partial(compute_gns, param_percentage=1.0, batch_percentage=1.0, use_vmap=True)

    def hear(self, window: Sequence[Tensor]) -> None:
        """One call on the losses of the whole window."""
        self.ratios.append(self.compute(self.model.losses(torch.cat(list(window))), self.model))

    def noise_scale(self) -> float:
        """The mean over calls, which is what its smoothed log shows."""
        return float(np.mean(self.ratios))


class GqcNoiseScale:
    """torch-gqc's noise scale, which it compares with the number of draws: ``b`` times it stands for ``B``.

    A tolerance never met makes it draw on and on, so that its statistic is over all windows.
    """

    def __init__(self, model: Location, sizes: Sequence[int]) -> None:
        import gradient_quality_control as gqc

        self.model, self.micro_batch_examples = model, sum(sizes) / len(sizes)
        self.optimizer = gqc.OptimizerWrapperGNS(_still(model), max_batch_draws=10**9)
        for group in self.optimizer.param_groups:
            group["noise_tolerance"] = -1.0

    def hear(self, window: Sequence[Tensor]) -> None:
        """Its loop: a step after every backward pass, taken or not."""
        with warnings.catch_warnings():
            # The variance of the first norm alone; the wrapper goes on.
            warnings.filterwarnings("ignore", message="var\\(\\): degrees of freedom")
            for x in window:
                self.model.losses(x).mean().backward()
                self.optimizer.step()

    def noise_scale(self) -> float:
        """Its public statistic of the norms so far."""
        return self.micro_batch_examples * float(self.optimizer.compute_approximate_gns())


OURS = "adaptbatch"
ESTIMATORS: dict[str, tuple[Callable[[Location, Sequence[int]], Estimator], str | None, str]] = {
    OURS: (Controller, None, "history, ratio of means"),
    "adaptbatch, one example a cell": (ExampleCells, None, "noise.estimate on examples' own gradients"),
    "adaptdl formula": (AdaptDL, None, "equal weights, which its package does not offer"),
    "fairscale AdaScale": (AdaScale, "fairscale", "equal weights; a window's |G|^2 is clipped at 0"),
    "gns-pytorch": (GnsPytorch, "gns_pytorch", "examples' own gradients; mean of a window's ratios, clipped at 0"),
    "torch-gqc GNS": (GqcNoiseScale, "gradient_quality_control", "spread of the norms of all micro-batches"),
}


def available() -> list[str]:
    """The estimators whose package is installed."""
    return [name for name, (_, module, _) in ESTIMATORS.items() if not module or importlib.util.find_spec(module)]
