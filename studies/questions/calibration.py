"""Do the intervals hold, and is anyone closer to the truth? Two simulations in which the truth is known.

*Coverage*: how often the 95 % interval of the noise scale contains it, for Gaussian and heavy-tailed examples,
independent and autocorrelated windows, and without any signal.

*Error*: the noise scale of a real torch model, estimated from the same gradients by the controller and by every peer
that is installed (they live in the ``peers`` extra). The parameters stand still, so that the truth does.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from typing import Any, Protocol

import joblib
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import adaptbatch as ab
from studies.questions.overhead import one_thread

Array = NDArray[np.float64]

# --- coverage -----------------------------------------------------------------------------------------------------

BATCH, DIRECTIONS, CONFIDENCE = 64, 35, 0.95

# An example's noise is Gaussian given its squared scale, whose mean is 1.
SCALES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Array]] = {
    "gaussian": lambda rng, shape: np.ones(shape),
    "student t, 5 df": lambda rng, shape: 3.0 / rng.chisquare(5, shape),
    "contaminated": lambda rng, shape: np.where(rng.random(shape) < 0.05, 25.0, 1.0) / 2.2,
}


@dataclass(frozen=True)
class Case:
    """What the intervals are asked to hold for.

    Attributes:
        theta_sq: ``B / n`` [1]; infinite for noise without a signal.
        examples: A name in :data:`SCALES`.
        cells: Micro-batches ``K`` of a window of ``BATCH`` examples.
        windows: Windows heard.
        half_life: Of a window's weight [windows]; infinite for equal weights.
        autocorrelation: ``r`` of the windows' errors, a stationary AR(1).
    """

    theta_sq: float
    examples: str = "gaussian"
    cells: int = 4
    windows: int = 30
    half_life: float = math.inf
    autocorrelation: float = 0.0

    @property
    def noise_scale(self) -> float:
        """The true ``B`` [examples]."""
        return self.theta_sq * BATCH


LEVELS = (0.25, 1.0, 4.0)
CASES = (
    *(Case(*how) for how in product(LEVELS, SCALES, (2, 4, 8))),
    *(Case(level, name, windows=windows) for windows, level, name in product((10, 100), LEVELS, SCALES)),
    # The tracker's own default: a half-life of ten windows, which are worth 29.
    *(Case(level, name, windows=80, half_life=10.0) for level, name in product(LEVELS, SCALES)),
    *(Case(level, autocorrelation=0.5) for level in LEVELS),
    *(Case(math.inf, name, cells) for name, cells in product(SCALES, (2, 4, 8))),
)


def draw_pairs(rng: np.random.Generator, case: Case, runs: int) -> tuple[Array, Array]:
    """The windows' own ``tr(Sigma)`` and ``|G|^2``, each ``[runs, windows]``.

    ``|G| = 1``, or 0 where ``B`` is infinite; the noise has ``DIRECTIONS`` equal directions.
    """
    lost = math.isinf(case.theta_sq)
    truth, length = (float(BATCH), 0.0) if lost else (case.noise_scale, 1.0)
    size = BATCH // case.cells
    scales = SCALES[case.examples](rng, (runs, case.windows, case.cells, size)).mean(axis=-1)
    gradients = rng.standard_normal((runs, case.windows, case.cells, DIRECTIONS))
    gradients *= np.sqrt(truth / DIRECTIONS / size * scales)[..., None]
    gradients[..., 0] += length
    mean_sq = (gradients.mean(axis=2) ** 2).sum(axis=-1)
    traces = (size * (gradients**2).sum(axis=(2, 3)) - BATCH * mean_sq) / (case.cells - 1)
    signals = mean_sq - traces / BATCH
    return correlate(traces, truth, case.autocorrelation), correlate(signals, length**2, case.autocorrelation)


def correlate(series: Array, mean: float, r: float) -> Array:
    """Independent ``series[:, t]`` made AR(1) around ``mean``, variance unchanged.

    Example:
        >>> correlate(np.array([[2.0, 1.0, 1.0]]), mean=1.0, r=0.5).tolist()
        [[2.0, 1.5, 1.25]]
    """
    errors = series - mean
    for t in range(1, errors.shape[1] if r else 0):
        errors[:, t] = r * errors[:, t - 1] + math.sqrt(1.0 - r * r) * errors[:, t]
    return mean + errors


def intervals(case: Case, traces: Array, signals: Array) -> Array:
    """Limits of the 95 % interval, ``[runs, 2]``."""
    limits = np.empty((len(traces), 2))
    for run, series in enumerate(zip(traces.tolist(), signals.tolist(), strict=True)):
        tracker = ab.estimate.NoiseTracker()
        for trace, signal in zip(*series, strict=True):
            window = ab.records.NoiseEstimate(signal, trace, degrees_of_freedom=case.cells - 1.0)
            tracker = tracker.update(window, BATCH, memory=case.half_life * BATCH)
        limits[run] = ab.estimate.noise_scale_interval(tracker.estimate(), CONFIDENCE)
    return limits


def measure_coverage(case: Case, runs: int, seed: int = 0) -> dict[str, Any]:
    """One row: the share of runs whose interval contains ``B``, its binomial standard error, the unbounded share.

    An infinite ``B`` is contained by the unbounded intervals.
    """
    rng, truth = np.random.default_rng(seed), case.noise_scale
    # A thousand runs at a time keep the gradients within some hundred megabytes.
    parts = [intervals(case, *draw_pairs(rng, case, min(1000, runs - done))) for done in range(0, runs, 1000)]
    low, high = np.concatenate(parts).T
    coverage = float(np.mean((low <= truth) & (truth <= high)))
    return {
        "B / n": case.theta_sq,
        "examples": case.examples,
        "cells": case.cells,
        "windows": case.windows,
        "half-life": case.half_life,
        "r": case.autocorrelation,
        "runs": runs,
        "coverage": coverage,
        "coverage SE": math.sqrt(coverage * (1.0 - coverage) / runs),
        "unbounded": float(np.mean(np.isinf(high))),
    }


# --- error --------------------------------------------------------------------------------------------------------

DIMENSION, MICRO_BATCHES = 100, 4


@dataclass(frozen=True)
class Setting:
    """A known truth and the micro-batches of every window.

    Attributes:
        name: In tables and figures.
        noise_scale: ``B`` [examples], with ``|G| = 1``.
        sizes: Examples of each micro-batch.
    """

    name: str
    noise_scale: float
    sizes: tuple[int, ...] = (32,) * MICRO_BATCHES

    @property
    def examples(self) -> int:
        """``n`` of one window."""
        return sum(self.sizes)

    def draw(self, rng: np.random.Generator) -> list[Tensor]:
        """One window's micro-batches ``[b, DIMENSION]`` of noise with ``tr(Sigma) = B``."""
        noise = rng.standard_normal((self.examples, DIMENSION)) * math.sqrt(self.noise_scale / DIMENSION)
        return list(torch.from_numpy(noise.astype(np.float32)).split(self.sizes))


SETTINGS = (
    Setting("B / n = 0.25", 32),
    Setting("B / n = 1", 128),
    Setting("B / n = 4", 512),
    Setting("B / n = 20 (2500 by 4 x 32)", 2500),
    # No peer promises these; a data set's end and batches of tokens bring them.
    Setting("B / n = 1, unequal (56, 40, 22, 10)", 128, sizes=(56, 40, 22, 10)),
)


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


@contextmanager
def _short_collections() -> Iterator[None]:
    """gns-pytorch collects garbage at each call; what already lives need not be looked at thousands of times."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def estimates(setting: Setting, windows: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """One repeat: every estimator on the same windows, read each time that one of ``windows`` has been heard.

    Returns:
        A row for each reading, with ``log(estimate / B)``; infinite where no signal is left.
    """
    rng, rows = np.random.default_rng(seed), []
    estimators = {name: ESTIMATORS[name][0](location(), setting.sizes) for name in available()}
    with one_thread(), _short_collections():
        for heard in range(1, max(windows) + 1):
            window = setting.draw(rng)
            for name, estimator in estimators.items():
                estimator.hear(window)
                if heard in windows:
                    ratio = estimator.noise_scale() / setting.noise_scale
                    log = math.log(ratio) if ratio > 0.0 else -math.inf
                    rows.append({"setting": setting.name, "windows": heard, "estimator": name, "log error": log})
    return [row | {"repeat": seed} for row in rows]


def error_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Bias and root mean square of ``log(estimate / B)``, with standard errors, of each estimator in each setting.

    ``further by`` compares with the controller on the same windows, in standard errors: below about -2 an estimator is
    closer to the truth than the controller. ``infinite`` is the share of repeats in which an estimate is 0 or infinite;
    then so is the root mean square.
    """
    table = []
    for (setting, windows), part in rows.groupby(["setting", "windows"], sort=False):
        wide = part.pivot_table(index="repeat", columns="estimator", values="log error")
        for name in part["estimator"].unique():
            row = {"setting": setting, "windows": windows, "estimator": name, "repeats": len(wide)}
            row |= _summary(wide[name].to_numpy(), wide[OURS].to_numpy())
            table.append(row | {"note": ESTIMATORS[name][2]})
    return pd.DataFrame(table)


def _summary(errors: Array, ours: Array) -> dict[str, float]:
    with np.errstate(invalid="ignore"):
        rms = math.sqrt(np.mean(errors**2))
        return {
            "bias": float(errors.mean()),
            "bias SE": _standard_error(errors),
            "rms": rms,
            # Of a square root: that of the mean square over twice the root.
            "rms SE": _standard_error(errors**2) / (2.0 * rms),
            "infinite": float(np.mean(np.isinf(errors))),
            "further by": further_by(errors, ours),
        }


def further_by(errors: Array, reference: Array) -> float:
    """Mean of ``errors^2 - reference^2`` over its standard error.

    0 where the two differ by single precision only; NaN where one is infinite.

    Example:
        >>> further_by(np.array([2.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0])).__round__(2)
        2.8
    """
    if np.allclose(errors, reference, rtol=0.0, atol=1e-4):
        return 0.0
    excess = errors**2 - reference**2
    return float(excess.mean()) / _standard_error(excess)


def _standard_error(values: Array) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def run(
    windows: Sequence[int] = (30, 200), repeats: int = 40, runs: int = 4000, workers: int = 2
) -> dict[str, pd.DataFrame]:
    """Both studies, some minutes.

    Args:
        windows: After which the estimators are read.
        repeats: Of each setting of the error study.
        runs: Intervals of each case of the coverage study.
        workers: Processes.

    Returns:
        ``"coverage"``, a row for each of :data:`CASES`, and ``"error"``, see :func:`error_table`.
    """
    parallel = joblib.Parallel(n_jobs=workers)
    coverage = parallel(joblib.delayed(measure_coverage)(case, runs, seed) for seed, case in enumerate(CASES))
    jobs = product(SETTINGS, [tuple(windows)], range(repeats))
    found = parallel(joblib.delayed(estimates)(*job) for job in jobs)
    return {"coverage": pd.DataFrame(coverage), "error": error_table(pd.DataFrame(chain.from_iterable(found)))}
