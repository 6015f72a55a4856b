"""How often the 95 % interval of the noise scale contains it, on windows that are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

import adaptbatch as ab

Array = NDArray[np.float64]

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
