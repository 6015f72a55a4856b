r"""What the noise along one run says about every other batch: steps, examples and seconds. No torch.

A step of ``n`` examples goes ``1 / (1 + B / n)`` of the way that a step without noise would. Over the way ``s`` of a
run, in steps without noise, a fixed batch ``n`` therefore takes::

    S(n) = integral (1 + B(s) / n) ds = S_min (1 + B / n)          S_min = integral ds
    E(n) = n S(n)                     = E_min (1 + n / B)          E_min = integral B(s) ds

with one noise scale for the run, its mean over the way: ``B = E_min / S_min``. A window ``t`` that was measured went
``ds = 1 / (1 + B_t / n_t) = |G_t|^2 / E|g_t|^2``, so that both integrals are sums of unbiased moments, each over the
same length::

    B = sum_t tr(Sigma)_t / m_t  over  sum_t |G|^2_t / m_t,        m_t = E|g_t|^2 of a mean gradient near window t

A late stretch of tiny gradients counts as much as an early one; the last value of ``B`` would count for all.

Source:
    McCandlish et al. 2018, arXiv:1812.06162, sections 2.3 (the tradeoff) and D (noise that varies).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from adaptbatch.estimate import noise_scale, noise_scale_interval
from adaptbatch.estimate.typical import BOUND
from adaptbatch.records import NoiseEstimate
from adaptbatch.reporting.tables import table_of

#: What a table of windows must have.
NEEDED = ("examples_seen", "accumulation_steps", "global_batch", "grad_sq_norm", "noise_trace")
#: Measured windows below which a run is no evidence: as many as the default rule waits for.
LEAST_WINDOWS = 8
# Windows on each side whose median |g|^2 is the length of a gradient near this one.
NEIGHBOURS = 8
# Windows of one size, and standard errors of the seconds for each example, that make a time model.
TIMED_WINDOWS = 5
TIMED_ERRORS = 4.0

Floats = npt.NDArray[np.float64]


def read_windows(history: Any) -> pd.DataFrame:
    """A run's windows as a table: of a history, a DataFrame, or the place of a Parquet or CSV file.

    Raises:
        TypeError: If it is none of these.
        ValueError: If a column is missing, there is no row, or the rows are of several runs.

    Example:
        >>> read_windows(pd.DataFrame({"loss": [1.0]}))
        Traceback (most recent call last):
        ValueError: history must have the columns ['examples_seen', 'accumulation_steps', 'global_batch', \
'grad_sq_norm', 'noise_trace'], it lacks ['examples_seen', 'accumulation_steps', 'global_batch', 'grad_sq_norm', \
'noise_trace']; history.to_pandas() has them.
    """
    frame = table_of(history)
    if frame is None:
        raise TypeError(
            f"history must be a History, its DataFrame or the place of its Parquet or CSV file, got "
            f"{type(history).__name__}; controller.history is one."
        )
    missing = [name for name in NEEDED if name not in frame]
    if missing:
        raise ValueError(
            f"history must have the columns {list(NEEDED)}, it lacks {missing}; history.to_pandas() has them."
        )
    if frame.empty:
        raise ValueError("history must have at least one window, it has none; plan after some steps.")
    if (frame["examples_seen"].diff() < 0.0).any():
        raise ValueError(
            "history must be of one run, got rows in which examples_seen falls; select one run, in its order."
        )
    return frame.reset_index(drop=True)


def integrated_noise(windows: pd.DataFrame) -> NoiseEstimate:
    """Signal and noise over a whole run, each window on the scale of its neighbours' gradients.

    The sums of this module's head over the windows that were measured and stepped on; each stands for those without a
    measurement since the one before. ``m_t`` is the median of ``|g|^2`` over eight windows on each side *without* the
    window itself, so that no window is weighed by its own noise; one beyond ten times that is held there.

    The variances are those of independent windows with means that drift: half the squared differences of consecutive
    ones. Pooled columns of the history share their windows and would say nothing of it.

    Args:
        windows: With the columns of a history; ``noise_trace`` and ``grad_sq_norm`` are NaN where nothing was measured.

    Returns:
        ``noise_trace`` [example] over ``grad_sq_norm`` [1] is ``B``; ``effective_windows`` is one more than the degrees
        of freedom that the variances have.

    Raises:
        ValueError: If fewer than eight windows were measured.

    Source:
        Variance from successive differences: von Neumann et al. 1941, Ann. Math. Statist. 12:153.

    Example:
        >>> rows = pd.DataFrame({"noise_trace": [90.0, 110.0] * 8, "grad_sq_norm": [2.1, 1.9] * 8})
        >>> pair = integrated_noise(rows.assign(global_batch=64.0))
        >>> round(noise_scale(pair), 1), [round(limit, 1) for limit in noise_scale_interval(pair)]
        (50.0, [44.8, 55.6])
    """
    trace, signal, batch = (windows[name].to_numpy(float) for name in ("noise_trace", "grad_sq_norm", "global_batch"))
    measured = np.isfinite(trace) & np.isfinite(signal)
    if "skipped" in windows:
        measured &= ~windows["skipped"].to_numpy(bool)
    index = np.flatnonzero(measured)
    if len(index) < LEAST_WINDOWS:
        raise ValueError(
            f"history must have at least {LEAST_WINDOWS} windows with a measurement of their own, got {len(index)} of "
            f"{len(windows)}: a window of one micro-batch holds none. Take two micro-batches a window, or "
            f"BatchController(ghost=True), and train on."
        )
    trace, signal = trace[index], signal[index]
    length = signal + trace / batch[index]
    weight = np.diff(index, prepend=index[0] - 1) / np.maximum(_neighbours(length), length / BOUND)
    return _moments(weight * trace, weight * signal, float(weight.sum()))


def _neighbours(length: Floats) -> Floats:
    """The median of the values around each, without itself."""
    side = min(NEIGHBOURS, len(length) - 1)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(length, side, mode="reflect"), 2 * side + 1)
    return np.asarray(np.median(np.delete(around, side, axis=1), axis=1), dtype=float)


def _moments(trace: Floats, signal: Floats, total: float) -> NoiseEstimate:
    """Of weighted windows: their sums over ``total``, with variances from successive differences."""
    count = len(trace)
    d_trace, d_signal = np.diff(trace), np.diff(signal)
    share = 0.5 * count / (count - 1) / total**2
    contrast = (d_trace * signal.sum() - d_signal * trace.sum()) ** 2
    # For normal windows 2/3 of their number; an outlier that makes the variance leaves two.
    freedom = 2.0 * contrast.sum() ** 2 / (contrast**2).sum() if contrast.any() else float(count)
    return NoiseEstimate(
        grad_sq_norm=float(signal.sum() / total),
        noise_trace=float(trace.sum() / total),
        var_grad_sq_norm=float(share * (d_signal**2).sum()),
        var_noise_trace=float(share * (d_trace**2).sum()),
        covariance=float(share * (d_trace * d_signal).sum()),
        degrees_of_freedom=float(freedom),
        effective_windows=float(1.0 + freedom),
    )


@dataclass(frozen=True, slots=True)
class TimeModel:
    """Seconds of a window: ``fixed + sync + per_example n / devices``.

    Attributes:
        fixed: Of a window whatever its size: the optimizer's step [s].
        per_example: Of one example on one device [s].
        sync: Of a window on several devices, beside that [s].

    Example:
        >>> TimeModel(fixed=0.1, per_example=0.001, sync=0.05).seconds(1024, devices=8)
        0.278
    """

    fixed: float
    per_example: float
    sync: float = 0.0

    def seconds(self, batch: float, devices: int = 1) -> float:
        """Of a window of ``batch`` examples on so many devices [s]."""
        return self.fixed + (self.sync if devices > 1 else 0.0) + self.per_example * batch / devices


def measured_seconds(windows: pd.DataFrame, fixed: float | None = None, per_example: float | None = None) -> TimeModel:
    """The time model of a run on the devices it had, from ``wall_seconds``.

    Medians over windows of one size, to which evaluations and checkpoints between windows do not matter; through those
    of several sizes a line, weighted by their errors. A run of one size tells only the sum of both parts: then one of
    them has to be given.

    Args:
        windows: With ``wall_seconds`` and ``global_batch``.
        fixed: Seconds of a window whatever its size, where known [s].
        per_example: Seconds of an example, where known [s].

    Raises:
        ValueError: If the two parts cannot be told apart.

    Example:
        >>> rows = pd.DataFrame({"global_batch": [32.0] * 10 + [64.0] * 10})
        >>> rows["wall_seconds"] = (0.1 + rows["global_batch"] / 320).cumsum()
        >>> model = measured_seconds(rows)
        >>> round(model.fixed, 4), round(model.per_example * 320, 4)
        (0.1, 1.0)
    """
    if fixed is not None and per_example is not None:
        return TimeModel(fixed, per_example)
    sizes = _timed(windows)
    if sizes.empty:
        raise ValueError(
            f"seconds need a column wall_seconds with at least {TIMED_WINDOWS} windows of one size; give "
            f"seconds_per_step and seconds_per_example."
        )
    batch, seconds, error = (sizes[name].to_numpy(float) for name in ("batch", "seconds", "error"))
    if fixed is not None or per_example is not None:
        most = sizes["count"].to_numpy().argmax()
        if per_example is None:
            assert fixed is not None
            return TimeModel(fixed, max(float(seconds[most] - fixed), 0.0) / float(batch[most]))
        return TimeModel(max(float(seconds[most] - per_example * batch[most]), 0.0), per_example)
    if len(batch) < 2:
        raise ValueError(
            f"seconds need windows of at least two sizes to tell a step's from an example's, got {batch[0]:.0f} only; "
            f"give seconds_per_step or seconds_per_example, the other follows."
        )
    slope, intercept, slope_error = _line(batch, seconds, error)
    if slope < TIMED_ERRORS * slope_error or slope <= 0.0:
        raise ValueError(
            f"seconds of a window do not follow its size clearly enough, got {slope:.3g} +- {slope_error:.1g} s for an "
            f"example from sizes {batch.min():.0f} to {batch.max():.0f}; give seconds_per_step or seconds_per_example."
        )
    return TimeModel(max(intercept, 0.0), slope)


def _timed(windows: pd.DataFrame) -> pd.DataFrame:
    """For each size with enough windows: their number, the median of their seconds and its error."""
    columns = ["batch", "count", "seconds", "error"]
    if "wall_seconds" not in windows:
        return pd.DataFrame(columns=columns)
    rows = []
    seconds = windows["wall_seconds"].diff()
    for batch, own in seconds[seconds > 0.0].groupby(windows["global_batch"]):
        if len(own) >= TIMED_WINDOWS:
            spread = 1.4826 * (own - own.median()).abs().median()
            rows.append((batch, len(own), own.median(), 1.2533 * spread / math.sqrt(len(own))))
    return pd.DataFrame(rows, columns=columns)


def _line(x: Floats, y: Floats, error: Floats) -> tuple[float, float, float]:
    """Slope and intercept by weighted least squares, and the slope's error."""
    # Medians of clocks that tick alike have an error of zero.
    error = np.maximum(error, 1e-6 * np.abs(y).max())
    weight = error**-2
    x_mean, y_mean = np.average(x, weights=weight), np.average(y, weights=weight)
    spread = float((weight * (x - x_mean) ** 2).sum())
    slope = float((weight * (x - x_mean) * (y - y_mean)).sum() / spread)
    return slope, float(y_mean - slope * x_mean), spread**-0.5


def speed_table(
    scale: tuple[float, float, float],
    batches: Sequence[float],
    micro_batch: float,
    devices: int = 1,
    seconds: TimeModel | None = None,
) -> pd.DataFrame:
    """One row a batch: how many steps, examples and seconds it takes, over the least there can be.

    Args:
        scale: The critical batch with its interval, ``(B, low, high)`` [examples].
        batches: ``n`` [examples].
        micro_batch: Examples of one backward pass on one device.
        devices: That share a window.
        seconds: Of a window; None: ``seconds_factor`` and ``efficiency`` are NaN.

    Returns:
        ``batch``; ``accumulation_steps`` on each device; ``steps_factor = S / S_min = 1 + B / n`` and
        ``examples_factor = E / E_min = 1 + n / B`` with ``_low`` and ``_high``; ``seconds_factor``, time over the
        table's least; ``efficiency``, the share of the devices' time that would do with the fewest examples and nothing
        beside them.

    Example:
        >>> table = speed_table((64.0, 32.0, 128.0), [64, 128], 16, devices=2, seconds=TimeModel(0.064, 0.001))
        >>> table[["accumulation_steps", "steps_factor", "examples_factor", "examples_factor_high"]].values.tolist()
        [[2.0, 2.0, 2.0, 3.0], [4.0, 1.5, 3.0, 5.0]]
        >>> table["seconds_factor"].tolist(), table["efficiency"].round(3).tolist()
        ([1.0, 1.0], [0.167, 0.167])
    """
    n = np.asarray(batches, dtype=float)
    value, low, high = (_factors(n, one) for one in scale)
    table = pd.DataFrame(
        {
            "batch": n,
            "accumulation_steps": np.maximum(np.ceil(n / (micro_batch * devices) - 1e-9), 1.0).astype(int),
            "steps_factor": value[0],
            "steps_factor_low": low[0],
            "steps_factor_high": high[0],
            "examples_factor": value[1],
            "examples_factor_low": high[1],
            "examples_factor_high": low[1],
            "seconds_factor": math.nan,
            "efficiency": math.nan,
        }
    )
    if seconds is not None:
        each = np.array([seconds.seconds(float(one), devices) for one in n])
        # Without an upper end of B, time is that of the noise alone.
        total = each * (value[0] if math.isfinite(scale[0]) else 1.0 / n)
        table["seconds_factor"] = total / total.min()
        table["efficiency"] = n * seconds.per_example / (devices * each * value[1])
    return table


def _factors(n: Floats, scale: float) -> tuple[Floats, Floats]:
    """``1 + B / n`` and ``1 + n / B``."""
    return 1.0 + scale / n, (1.0 + n / scale if scale > 0.0 else np.full_like(n, math.inf))


def critical_scale(pair: NoiseEstimate, calibration: float, confidence: float) -> tuple[float, float, float]:
    """``calibration B`` with its interval [examples]; the calibration is taken as exact.

    Raises:
        ValueError: If the run cannot tell ``|G|`` from zero.
    """
    value = noise_scale(pair)
    low, high = noise_scale_interval(pair, confidence)
    if not math.isfinite(value):
        raise ValueError(
            f"history must tell the gradient's length from zero to plan by it, got |G|^2 = {pair.grad_sq_norm:.3g} +- "
            f"{math.sqrt(pair.var_grad_sq_norm):.1g} of a mean gradient's; measure more or larger windows."
        )
    # Where the mean is beside its own interval by rounding, or the interval is that of a vanishing signal.
    return calibration * value, calibration * min(low, value), calibration * max(high, value)
