"""Slow, obvious twins: what the package computes in one pass, written out from the definitions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from adaptbatch.records import Measurement, NoiseEstimate

Array = NDArray[np.float64]


def measurement(cells: Sequence[tuple[float, Array]]) -> Measurement:
    """What a probe hears of cells ``(weight, mean gradient)``."""
    total = sum(weight for weight, _ in cells)
    mean = sum(weight * gradient for weight, gradient in cells) / total
    weighted = sum(weight * float(gradient @ gradient) for weight, gradient in cells)
    return Measurement(weighted, float(mean @ mean), total, len(cells))


def anova(cells: Sequence[tuple[float, Array]], population: float = math.inf) -> tuple[float, float]:
    """``(tr(Sigma), |G|^2)`` from deviations of the cells' gradients from their weighted mean."""
    total = sum(weight for weight, _ in cells)
    mean = sum(weight * gradient for weight, gradient in cells) / total
    deviations = sum(weight * float(np.sum((gradient - mean) ** 2)) for weight, gradient in cells)
    trace = deviations / (len(cells) - 1)
    return trace, float(mean @ mean) - trace * (1 / total - 1 / population)


def exact_moments(gradients: Array) -> tuple[float, float]:
    """``(tr(Sigma), |G|^2)`` of a finite population of per-example gradients ``[N, D]``, divisor ``N - 1``."""
    mean = gradients.mean(axis=0)
    return float(np.sum((gradients - mean) ** 2)) / (len(gradients) - 1), float(mean @ mean)


def pooled(windows: Sequence[NoiseEstimate], batches: Sequence[float], memories: Sequence[float]) -> dict[str, float]:
    """The tracker's estimate from explicit decayed weights (no autocorrelation)."""
    ages = [sum(b / m for b, m in zip(batches[i + 1 :], memories[i + 1 :], strict=True)) for i in range(len(windows))]
    w = np.array([2.0**-age * pair.degrees_of_freedom for age, pair in zip(ages, windows, strict=True)])
    keep = w > 0
    w = w[keep]
    trace = np.array([pair.noise_trace for pair in windows])[keep]
    signal = np.array([pair.grad_sq_norm for pair in windows])[keep]
    windows_eff = w.sum() ** 2 / (w**2).sum()
    mean_t, mean_s = np.average(trace, weights=w), np.average(signal, weights=w)
    share = 1.0 / (w.sum() * (windows_eff - 1.0))
    return {
        "noise_trace": float(mean_t),
        "grad_sq_norm": float(mean_s),
        "degrees_of_freedom": float(w.sum()),
        "effective_windows": float(windows_eff),
        "var_noise_trace": float(share * np.sum(w * (trace - mean_t) ** 2)),
        "var_grad_sq_norm": float(share * np.sum(w * (signal - mean_s) ** 2)),
        "covariance": float(share * np.sum(w * (trace - mean_t) * (signal - mean_s))),
    }


def in_fieller_set(pair: NoiseEstimate, ratio: float, confidence: float) -> bool:
    """Whether a t-test of ``tr(Sigma) - ratio |G|^2 = 0`` accepts, with a negative ``|G|^2`` read as zero."""
    contrast = pair.noise_trace - ratio * max(pair.grad_sq_norm, 0.0)
    variance = pair.var_noise_trace - 2 * ratio * pair.covariance + ratio**2 * pair.var_grad_sq_norm
    quantile = stats.t.ppf(0.5 + confidence / 2, pair.effective_windows - 1)
    return bool(contrast**2 <= quantile**2 * variance)


def per_example_gradients(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], inputs: Tensor) -> Array:
    """``[N, D]``: one backward pass for each example."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for x in inputs:
        gradients = torch.autograd.grad(loss(model, x[None]), parameters)
        rows.append(torch.cat([g.reshape(-1) for g in gradients]).double().numpy())
    return np.stack(rows)


def hand_written_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[nn.Module, Tensor], Tensor],
    windows: Sequence[Sequence[Tensor]],
) -> None:
    """One optimizer step a window, on the mean over all its examples in a single batch."""
    for window in windows:
        optimizer.zero_grad()
        loss(model, torch.cat(list(window))).backward()
        optimizer.step()


def autocorrelation(windows: Sequence[NoiseEstimate], batches: Sequence[float], memories: Sequence[float]) -> float:
    """The tracker's lag-1 autocorrelation of ``|G|^2 S_t - tr(Sigma) g_t``; every window has a degree of freedom.

    Deviations are from the mean of the windows before.
    """
    ages = [sum(b / m for b, m in zip(batches[i + 1 :], memories[i + 1 :], strict=True)) for i in range(len(windows))]
    w = np.array([2.0**-age * pair.degrees_of_freedom for age, pair in zip(ages, windows, strict=True)])
    trace, signal = np.array([(pair.noise_trace, pair.grad_sq_norm) for pair in windows]).T
    contrast = max(np.average(signal, weights=w), 0.0) * trace - max(np.average(trace, weights=w), 0.0) * signal
    own = np.sum(w * (contrast - np.average(contrast, weights=w)) ** 2)
    before = [np.average(contrast[:i], weights=w[:i]) for i in range(1, len(w))]
    r = float(np.sum(w[1:] * (contrast[1:] - before) * (contrast[:-1] - before)) / own)
    windows_eff = w.sum() ** 2 / (w**2).sum()
    return min(r + (1 + 3 * r) / windows_eff, 0.95) if r > 1.28 / math.sqrt(windows_eff) else 0.0
