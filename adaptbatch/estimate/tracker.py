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

    A window that nobody listened to still says ``|g|^2``, of which ``phi(n) tr(Sigma)`` is noise, as far as that is
    known by now: a share ``f`` of such windows adds ``(f phi)^2 Var(tr(Sigma))`` to the variance of ``|G|^2`` and takes
    ``f phi Var(tr(Sigma))`` from the covariance. One that stands out from the usual scale counts as one of *all*
    windows, in ``tr(Sigma)`` too: it is noticed by its length, so that it is no sample of the others.

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
    # Of the windows that were listened to.
    trace_weight: Sum = 0.0
    trace_weight_sq: Sum = 0.0
    # Sum of phi(n) over the others.
    inferred: Sum = 0.0
    trace_mean: Finite = 0.0
    # Without the windows that stood out.
    usual_trace: Finite = 0.0
    # Of |G|^2, and of |g|^2 where nobody listened.
    length_mean: Finite = 0.0
    # Weighted sums of products of deviations: of a window with itself, and with the window before.
    trace_trace: Square = 0.0
    trace_signal: Number = 0.0
    signal_signal: Square = 0.0
    lag_trace_trace: Number = 0.0
    lag_trace_signal: Number = 0.0
    lag_signal_signal: Number = 0.0
    last_trace: Number = math.nan
    last_signal: Number = math.nan

    @property
    def signal_mean(self) -> float:
        """The pooled ``|G|^2``."""
        return self.length_mean - self.inferred / self.weight * self.usual_trace if self.weight else 0.0

    def update(self, window: NoiseEstimate, batch: float, memory: float, stands_out: bool = False) -> NoiseTracker:
        """The tracker one window later; everything before it decays by ``2^(-batch / memory)``.

        Args:
            window: The window's own pair; with no degree of freedom it only ages what is known.
            batch: Examples of that window.
            memory: Half-life [examples].
            stands_out: Whether it is out of the usual scale; matters where some windows are not listened to.

        Raises:
            ValueError: If the pair is not finite: such a window must be left out, not averaged.
        """
        decay, gain = 2.0 ** (-batch / memory), window.degrees_of_freedom
        if gain == 0.0:
            return self._aged(decay)
        if not (math.isfinite(window.noise_trace) and math.isfinite(window.grad_sq_norm)):
            raise ValueError(f"window must be finite, got {window!r}; leave a non-finite window out.")
        return self._with(decay, gain, gain, window.noise_trace, window.grad_sq_norm, stands_out=stands_out)

    def update_length(
        self, sq_norm: float, degrees: float, phi: float, batch: float, memory: float, noise_trace: float | None = None
    ) -> NoiseTracker:
        """The tracker one window later of which only ``|g|^2`` is known.

        Args:
            sq_norm: ``|g|^2``.
            degrees: Of freedom, had somebody listened.
            phi: ``phi(n)`` of the window.
            batch, memory: As of :meth:`update`.
            noise_trace: Of a window that stands out what its noise must be, if it is as noisy as usual for its length.

        Example:
            >>> known = NoiseTracker().update(NoiseEstimate(4.0, 100.0, degrees_of_freedom=3.0), 50.0, memory=1e9)
            >>> later = known.update_length(8.0, degrees=3.0, phi=1 / 50, batch=50.0, memory=1e9)
            >>> round(later.signal_mean, 3), later.trace_mean, round(later.trace_weight, 3)
            (5.0, 100.0, 3.0)
        """
        decay = 2.0 ** (-batch / memory)
        if degrees == 0.0 or decay**2 * self.trace_weight_sq < FORGOTTEN:
            return self._aged(decay)
        if noise_trace is None:
            return self._with(decay, degrees, 0.0, self.trace_mean, sq_norm, phi)
        return self._with(decay, degrees, 0.0, noise_trace, sq_norm - phi * noise_trace, stands_out=True)

    def _with(
        self,
        decay: float,
        gain: float,
        trace_gain: float,
        trace: float,
        length: float,
        phi: float = 0.0,
        stands_out: bool = False,
    ) -> NoiseTracker:
        """What is known, aged, and a window of weight ``gain``, of which ``trace_gain`` was listened to."""
        known = self if decay**2 * self.weight_sq >= FORGOTTEN else NoiseTracker()
        old, old_trace = decay * known.weight, decay * known.trace_weight
        weight, trace_weight = old + gain, old_trace + trace_gain
        share = trace_weight / weight if stands_out else 1.0
        # West's update: deviations from the old mean times deviations from the new one.
        d_trace, d_length = trace - known.trace_mean, length - known.length_mean
        signal = length - phi * known.usual_trace if phi else length
        d_signal = signal - known.signal_mean if known.inferred or phi else d_length
        inner = gain * old / weight
        move = d_trace * gain / weight if stands_out else d_trace * trace_gain / trace_weight
        d_usual = 0.0 if stands_out and old_trace else (trace - known.usual_trace) * trace_gain / trace_weight
        inner_trace = share * (gain if stands_out else trace_gain) * old_trace / trace_weight
        # Each deviation before this window is zero for the first, whose "mean" is not one yet.
        first = old == 0.0
        p_trace = 0.0 if first else known.last_trace - known.trace_mean
        p_signal = 0.0 if first else known.last_signal - known.signal_mean
        return NoiseTracker(
            weight,
            decay**2 * known.weight_sq + gain**2,
            trace_weight,
            decay**2 * known.trace_weight_sq + trace_gain**2,
            decay * known.inferred + gain * phi,
            known.trace_mean + move,
            known.usual_trace + d_usual,
            known.length_mean + d_length * gain / weight,
            decay * known.trace_trace + inner_trace * share * d_trace * d_trace,
            decay * known.trace_signal + inner_trace * d_trace * d_signal,
            decay * known.signal_signal + inner * d_signal * d_signal,
            decay * known.lag_trace_trace + gain * d_trace * p_trace,
            decay * known.lag_trace_signal + gain * 0.5 * (d_trace * p_signal + d_signal * p_trace),
            decay * known.lag_signal_signal + gain * d_signal * p_signal,
            trace,
            signal,
        )

    def estimate(self) -> NoiseEstimate:
        """The pooled pair with its (co)variances; NaN where nothing was measured yet."""
        if self.weight == 0.0:
            return NoiseEstimate(grad_sq_norm=math.nan, noise_trace=math.nan)
        windows = self.weight**2 / self.weight_sq
        listened = self.trace_weight**2 / self.trace_weight_sq if self.trace_weight_sq > FORGOTTEN else 0.0
        var_trace = var_signal = covariance = math.nan
        if listened > 1.0 + 1e-9:
            r = self.autocorrelation()
            share = (1.0 + r) / (1.0 - r) / (self.weight * (windows - 1.0))
            trace_share = (1.0 + r) / (1.0 - r) / (self.trace_weight * (listened - 1.0))
            inferred = self.inferred / self.weight
            var_trace = trace_share * self.trace_trace
            var_signal = share * self.signal_signal + inferred**2 * var_trace
            own = self.trace_weight / self.weight
            covariance = own * trace_share * self.trace_signal - inferred * var_trace
        return NoiseEstimate(
            self.signal_mean, self.trace_mean, var_signal, var_trace, covariance, self.trace_weight, windows
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

    def _aged(self, decay: float) -> NoiseTracker:
        if decay**2 * self.weight_sq < FORGOTTEN:
            return NoiseTracker()
        return replace(
            self,
            weight=decay * self.weight,
            weight_sq=decay**2 * self.weight_sq,
            trace_weight=decay * self.trace_weight,
            trace_weight_sq=decay**2 * self.trace_weight_sq,
            inferred=decay * self.inferred,
            trace_trace=decay * self.trace_trace,
            trace_signal=decay * self.trace_signal,
            signal_signal=decay * self.signal_signal,
            lag_trace_trace=decay * self.lag_trace_trace,
            lag_trace_signal=decay * self.lag_trace_signal,
            lag_signal_signal=decay * self.lag_signal_signal,
        )

    @staticmethod
    def require_whole(name: str, saved: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless both weights are there, or none, and those listened to are some of all."""
        if (saved["weight"] > 0.0) != (saved["weight_sq"] > 0.0):
            refuse(f"{name}['weight_sq']", f"be above 0 where {name}['weight'] is", saved["weight_sq"])
        weight, listened = saved["weight"], saved["trace_weight"]
        if not listened <= weight:
            refuse(f"{name}['trace_weight']", f"be at most {name}['weight'] = {weight!r}", listened)
