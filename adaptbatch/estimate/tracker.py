"""Windows pooled with a decay in examples, and what the pooled moments are worth. Floats only, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adaptbatch.records import NoiseEstimate
from adaptbatch.schema import Finite, Number, Square, Sum, refuse

# Above this the AR(1) inflation of a variance says only "the windows are one window".
MAX_AUTOCORRELATION = 0.95
# One-sided 10 % test. Were every positive r of independent windows believed, a 95 % interval would cover 96 %.
AUTOCORRELATION_Z = 1.28
# Pooled evidence of a smaller squared weight is forgotten: it would lose its digits, and then divide by zero.
FORGOTTEN = 1e-200


def memory_examples(memory: float | None, micro_batch_examples: float, batch: float) -> float:
    """Half-life of the evidence [examples]: ``memory``, or by default ``max(500 b, 10 n)``.

    At least 10 windows keep the effective number of windows near 29 however large the batch grows. The floor of five
    hundred micro-batches is half of what AdaScale and Pollux take: a noise scale that jumps is followed in time.

    Example:
        >>> memory_examples(None, 64.0, batch=128.0), memory_examples(5000.0, 64.0, batch=128.0)
        (32000.0, 5000.0)
    """
    return max(500.0 * micro_batch_examples, 10.0 * batch) if memory is None else memory


@dataclass(frozen=True, slots=True)
class NoiseTracker:
    """Pools windows: sums of squares and degrees of freedom, with a decay in *examples*.

    A window enters with the weight of its degrees of freedom, so that ``tr(Sigma)`` is the ratio of the pooled sums
    and a window of one cell contributes nothing. Variances are the weighted sample variances of the windows' own
    pairs, divided by ``effective_windows - 1`` and, where the contrast ``tr(Sigma) - B |G|^2`` has a lag-1
    :meth:`autocorrelation` ``r``, inflated by ``(1 + r) / (1 - r)``. Nothing is clipped here.

    A value: :meth:`update` returns the next one.

    Example:
        >>> tracker = NoiseTracker()
        >>> for trace in (90.0, 110.0, 100.0):
        ...     pair = NoiseEstimate(4.0, trace, degrees_of_freedom=3.0)
        ...     tracker = tracker.update(pair, batch=64.0, memory=1e9)
        >>> pooled = tracker.estimate()
        >>> round(pooled.noise_trace, 3), round(pooled.effective_windows, 3), round(pooled.degrees_of_freedom, 3)
        (100.0, 3.0, 9.0)
    """

    weight: Sum = 0.0
    weight_sq: Sum = 0.0
    trace_mean: Finite = 0.0
    signal_mean: Finite = 0.0
    # Weighted sums of products of deviations: of a window with itself, and with the window before.
    trace_trace: Square = 0.0
    trace_signal: Number = 0.0
    signal_signal: Square = 0.0
    lag_trace_trace: Number = 0.0
    lag_trace_signal: Number = 0.0
    lag_signal_signal: Number = 0.0
    last_trace: Number = math.nan
    last_signal: Number = math.nan

    def update(self, window: NoiseEstimate, batch: float, memory: float) -> NoiseTracker:
        """The tracker one window later; everything before it decays by ``2^(-batch / memory)``.

        Args:
            window: The window's own pair; with no degree of freedom it only ages what is known.
            batch: Examples of that window.
            memory: Half-life [examples].

        Raises:
            ValueError: If the pair is not finite: such a window must be left out, not averaged.
        """
        decay = 2.0 ** (-batch / memory)
        if window.degrees_of_freedom == 0.0:
            return self._scaled(decay)
        if not (math.isfinite(window.noise_trace) and math.isfinite(window.grad_sq_norm)):
            raise ValueError(f"window must be finite, got {window!r}; leave a non-finite window out.")
        old, gain = self._scaled(decay), window.degrees_of_freedom
        weight = old.weight + gain
        d_trace, d_signal = window.noise_trace - old.trace_mean, window.grad_sq_norm - old.signal_mean
        # West's update: deviations from the old mean times deviations from the new one.
        inner = gain * old.weight / weight
        # Each deviation before this window is zero for the first, whose "mean" is not one yet.
        first = old.weight == 0.0
        p_trace = 0.0 if first else old.last_trace - old.trace_mean
        p_signal = 0.0 if first else old.last_signal - old.signal_mean
        return NoiseTracker(
            weight=weight,
            weight_sq=old.weight_sq + gain**2,
            trace_mean=old.trace_mean + d_trace * gain / weight,
            signal_mean=old.signal_mean + d_signal * gain / weight,
            trace_trace=old.trace_trace + inner * d_trace**2,
            trace_signal=old.trace_signal + inner * d_trace * d_signal,
            signal_signal=old.signal_signal + inner * d_signal**2,
            lag_trace_trace=old.lag_trace_trace + gain * d_trace * p_trace,
            lag_trace_signal=old.lag_trace_signal + gain * 0.5 * (d_trace * p_signal + d_signal * p_trace),
            lag_signal_signal=old.lag_signal_signal + gain * d_signal * p_signal,
            last_trace=window.noise_trace,
            last_signal=window.grad_sq_norm,
        )

    def estimate(self) -> NoiseEstimate:
        """The pooled pair with its (co)variances; NaN where nothing was measured yet."""
        if self.weight == 0.0:
            return NoiseEstimate(grad_sq_norm=math.nan, noise_trace=math.nan)
        windows = self.weight**2 / self.weight_sq
        pair = NoiseEstimate(
            grad_sq_norm=self.signal_mean,
            noise_trace=self.trace_mean,
            degrees_of_freedom=self.weight,
            effective_windows=windows,
        )
        if windows <= 1.0 + 1e-9:
            return pair
        r = self.autocorrelation()
        share = (1.0 + r) / (1.0 - r) / (self.weight * (windows - 1.0))
        return replace(
            pair,
            var_grad_sq_norm=share * self.signal_signal,
            var_noise_trace=share * self.trace_trace,
            covariance=share * self.trace_signal,
        )

    def autocorrelation(self) -> float:
        """Lag-1 autocorrelation ``r`` of the contrast ``tr(Sigma) - B |G|^2``, in [0, 0.95]; 0 unless a test finds it.

        Found above ``1.28 / sqrt(N)``, the 10 % point of ``N`` independent windows; then corrected for the bias
        ``-(1 + 3 r) / N`` that estimating the mean brings.

        Source:
            Bartlett 1946, J. R. Statist. Soc. Suppl. 8:27 (standard error); Marriott & Pope 1954, Biometrika 41:390
            (bias).
        """
        trace, signal = max(self.trace_mean, 0.0), max(self.signal_mean, 0.0)
        own = signal**2 * self.trace_trace - 2 * signal * trace * self.trace_signal + trace**2 * self.signal_signal
        lag = (
            signal**2 * self.lag_trace_trace
            - 2 * signal * trace * self.lag_trace_signal
            + trace**2 * self.lag_signal_signal
        )
        if not own > 0.0:
            return 0.0
        r, windows = lag / own, self.weight**2 / self.weight_sq
        found = r > AUTOCORRELATION_Z / math.sqrt(windows)
        return min(r + (1.0 + 3.0 * r) / windows, MAX_AUTOCORRELATION) if found else 0.0

    def _scaled(self, decay: float) -> NoiseTracker:
        if decay**2 * self.weight_sq < FORGOTTEN:
            return NoiseTracker()
        return replace(
            self,
            weight=decay * self.weight,
            weight_sq=decay**2 * self.weight_sq,
            trace_trace=decay * self.trace_trace,
            trace_signal=decay * self.trace_signal,
            signal_signal=decay * self.signal_signal,
            lag_trace_trace=decay * self.lag_trace_trace,
            lag_trace_signal=decay * self.lag_trace_signal,
            lag_signal_signal=decay * self.lag_signal_signal,
        )

    @staticmethod
    def require_whole(name: str, saved: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless both weights are there, or none."""
        if (saved["weight"] > 0.0) != (saved["weight_sq"] > 0.0):
            refuse(f"{name}['weight_sq']", f"be above 0 where {name}['weight'] is", saved["weight_sq"])
