r"""Squared norms in; noise, signal and their uncertainty out. Floats only, no torch.

``n`` examples give a gradient ``g`` with ``E|g|^2 = |G|^2 + phi(n) tr(Sigma)``, where ``phi(n) = 1/n - 1/N`` for a
population of ``N`` examples (``1/n`` when it is unlimited). A window of ``K`` cells with weights ``w_c`` separates the
two terms by a one-way analysis of variance::

    SS = sum_c w_c |g_c|^2 - n |g|^2,      tr(Sigma)^ = SS / (K - 1),      |G|^2^ = |g|^2 - phi(n) tr(Sigma)^

Both are unbiased for any weights. They are pooled over windows and only then read: as a standard error
``sqrt(phi(n) tr(Sigma))``, a noise scale ``B = tr(Sigma) / |G|^2``, or the linear statistic a rule tests.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from scipy.special import fdtrc, stdtrit

from adaptbatch.records import Measurement, NoiseEstimate

# Above this the AR(1) inflation of a variance says only "the windows are one window".
MAX_AUTOCORRELATION = 0.95
# One-sided 10 % test. Were every positive r of independent windows believed, a 95 % interval would cover 96 %.
AUTOCORRELATION_Z = 1.28
# Pooled evidence of a smaller squared weight is forgotten: it would lose its digits, and then divide by zero.
FORGOTTEN = 1e-200


def inverse_size(batch: float, population: float = math.inf) -> float:
    """``phi(n) = 1/n - 1/N``, the factor between ``tr(Sigma)`` and the squared standard error; 0 once ``n >= N``.

    Source:
        Cochran 1977, Sampling Techniques (finite-population correction).

    Example:
        >>> inverse_size(100), inverse_size(100, population=400), inverse_size(500, population=400)
        (0.01, 0.0075, 0.0)
    """
    return max(1.0 / batch - 1.0 / population, 0.0)


def estimate(window: Measurement, population: float = math.inf) -> NoiseEstimate:
    """The unbiased pair of one window, by analysis of variance over its cells.

    ``tr(Sigma)^ = (Q - n |g|^2) / (K - 1)`` and ``|G|^2^ = |g|^2 - phi(n) tr(Sigma)^``.

    Args:
        window: Squared norms of one window.
        population: Examples the batch is drawn from without replacement; infinite for a stream.

    Returns:
        The pair, with ``K - 1`` degrees of freedom; NaN for both where ``K = 1``, which holds no evidence.

    Source:
        One-way analysis of variance with weights; for equal cells the estimator of Johnson et al. 2020
        (AdaScale, arXiv:2007.05105) and Qiao et al. 2021 (Pollux, arXiv:2008.12260).

    Example:
        Two cells of two examples each, gradients (3) and (1), mean (2):

        >>> pair = estimate(Measurement(weighted_sq_norms=2 * 9 + 2 * 1, batch_sq_norm=4.0, global_batch=4.0, cells=2))
        >>> pair.noise_trace, pair.grad_sq_norm, pair.degrees_of_freedom
        (4.0, 3.0, 1.0)
    """
    degrees = window.cells - 1
    if degrees == 0:
        return NoiseEstimate(grad_sq_norm=math.nan, noise_trace=math.nan)
    n = window.global_batch
    trace = (window.weighted_sq_norms - n * window.batch_sq_norm) / degrees
    signal = window.batch_sq_norm - inverse_size(n, population) * trace
    return NoiseEstimate(
        grad_sq_norm=signal, noise_trace=trace, degrees_of_freedom=float(degrees), effective_windows=1.0
    )


def standard_error(pair: NoiseEstimate, batch: float, population: float = math.inf) -> float:
    """``sqrt(phi(n) tr(Sigma))``: the CLT's ``sigma / sqrt(n)`` of a batch gradient [g].

    Example:
        >>> standard_error(NoiseEstimate(grad_sq_norm=4.0, noise_trace=100.0), batch=25)
        2.0
    """
    return math.sqrt(inverse_size(batch, population) * max(pair.noise_trace, 0.0))


def relative_error(pair: NoiseEstimate, batch: float, population: float = math.inf) -> float:
    """``sqrt(phi(n) tr(Sigma)) / |G|`` [1]; infinite when ``|G|^2`` is not above zero, 0 where there is no error.

    Example:
        >>> relative_error(NoiseEstimate(grad_sq_norm=4.0, noise_trace=100.0), batch=25)
        1.0
    """
    if math.isnan(pair.grad_sq_norm):
        return math.nan
    error = standard_error(pair, batch, population)
    if error == 0.0:
        return 0.0
    return error / math.sqrt(pair.grad_sq_norm) if pair.grad_sq_norm > 0.0 else math.inf


def noise_scale(pair: NoiseEstimate) -> float:
    """``B = tr(Sigma) / |G|^2`` [examples]: the batch whose standard error equals the gradient's length.

    Infinite when ``|G|^2`` is not above zero.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162 (the "simple" noise scale).

    Example:
        >>> noise_scale(NoiseEstimate(grad_sq_norm=4.0, noise_trace=100.0))
        25.0
    """
    if math.isnan(pair.grad_sq_norm):
        return math.nan
    return max(pair.noise_trace, 0.0) / pair.grad_sq_norm if pair.grad_sq_norm > 0.0 else math.inf


def required_batch(pair: NoiseEstimate, theta: float, population: float = math.inf) -> float:
    """Smallest batch whose gradient has relative standard error at most ``theta``.

    Solves ``phi(n) tr(Sigma) = theta^2 |G|^2``: with ``n0 = B / theta^2``, ``n = n0 / (1 + n0 / N)``.

    Args:
        pair: Unbiased moments.
        theta: Target relative standard error [1]; positive.
        population: Examples in the data set, or infinity.

    Returns:
        ``n`` [examples], not rounded, at most ``N``; ``N`` (infinity when unlimited) when ``|G|^2`` is not above zero.

    Raises:
        ValueError: If ``theta`` is not positive.

    Source:
        Byrd, Chin, Nocedal & Wu 2012 (norm test); Cochran 1977 (finite population).

    Example:
        >>> required_batch(NoiseEstimate(grad_sq_norm=4.0, noise_trace=100.0), theta=0.5)
        100.0
        >>> required_batch(NoiseEstimate(grad_sq_norm=4.0, noise_trace=100.0), theta=0.5, population=100)
        50.0
    """
    if not theta > 0.0:
        raise ValueError(f"theta must be positive, got theta = {theta!r}; 1.0 lets the error equal the gradient.")
    # The square of a tiny theta is zero: no batch is large enough.
    unlimited = noise_scale(pair) / theta**2 if theta**2 > 0.0 else math.inf
    # The quotient may round to just above the population.
    return population if math.isinf(unlimited) else min(unlimited / (1.0 + unlimited / population), population)


def batch_with_error(noise_trace: float, sq_error: float, population: float = math.inf) -> float:
    """Smallest batch whose gradient has a squared standard error of at most ``sq_error``.

    Solves ``phi(n) tr(Sigma) = sq_error``: ``n = 1 / (sq_error / tr(Sigma) + 1 / N)``.

    Args:
        noise_trace: ``tr(Sigma)`` [g^2 example]; below zero as an estimate may be, it is read as zero.
        sq_error: Wanted ``tr(Sigma) / n`` [g^2]; positive.
        population: Examples in the data set, or infinity.

    Returns:
        ``n`` [examples], not rounded, at most ``N``; 0 where there is no noise.

    Source:
        Cochran 1977 (finite population).

    Example:
        >>> batch_with_error(6400.0, sq_error=16.0), batch_with_error(6400.0, sq_error=16.0, population=400)
        (400.0, 200.0)
    """
    if not noise_trace > 0.0:
        return 0.0
    inverse = sq_error / noise_trace + 1.0 / population
    return min(1.0 / inverse, population) if inverse > 0.0 else population


def excess_error(pair: NoiseEstimate, batch: float, theta: float, population: float = math.inf) -> tuple[float, float]:
    """The linear statistic of the CLT rule and its standard error.

    ``D(n) = phi(n) tr(Sigma) - theta^2 |G|^2`` with ``SE^2 = phi^2 v_S - 2 theta^2 phi c + theta^4 v_g``. Unbiased for
    every ``n``, also where the ratio ``B`` is not; positive when the batch is too small for ``theta``.

    Returns:
        ``(D, SE)`` [g^2].

    Example:
        >>> pair = NoiseEstimate(4.0, 100.0, var_grad_sq_norm=1.0, var_noise_trace=400.0, covariance=0.0)
        >>> excess_error(pair, batch=10, theta=1.0)
        (6.0, 2.23606797749979)
    """
    phi = inverse_size(batch, population)
    value = phi * pair.noise_trace - theta**2 * pair.grad_sq_norm
    variance = _contrast_variance(pair, phi, theta**2)
    return value, math.sqrt(max(variance, 0.0))


def noise_scale_interval(pair: NoiseEstimate, confidence: float = 0.95) -> tuple[float, float]:
    """Fieller's confidence interval for ``B = tr(Sigma) / |G|^2``, unbounded when the data cannot exclude ``|G| = 0``.

    All ``R >= 0`` with ``(S - R g)^2 <= t^2 (v_S - 2 R c + R^2 v_g)``, ``t`` Student's quantile with
    ``effective_windows - 1`` degrees of freedom. A negative ``|G|^2`` is read as zero.

    Args:
        pair: Pooled moments with variances.
        confidence: Two-sided coverage, in (0, 1).

    Returns:
        ``(low, high)`` [examples]; ``high`` is infinite for an unbounded set, both are NaN without variances.

    Raises:
        ValueError: If ``confidence`` is outside (0, 1).

    Source:
        Fieller 1954, J. R. Statist. Soc. B 16:175.

    Example:
        >>> sure = NoiseEstimate(4.0, 100.0, 0.01, 25.0, 0.0, effective_windows=30)
        >>> [round(limit, 1) for limit in noise_scale_interval(sure)]
        [22.2, 27.9]
        >>> unsure = NoiseEstimate(4.0, 100.0, 9.0, 25.0, 0.0, effective_windows=30)
        >>> noise_scale_interval(unsure)[1]
        inf
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got confidence = {confidence!r}; 0.95 is usual.")
    if not pair.effective_windows > 1.0:
        return math.nan, math.nan
    t_sq = float(stdtrit(pair.effective_windows - 1.0, 0.5 + confidence / 2.0)) ** 2
    trace, signal = pair.noise_trace, max(pair.grad_sq_norm, 0.0)
    a = signal**2 - t_sq * pair.var_grad_sq_norm
    b = trace * signal - t_sq * pair.covariance
    c = trace**2 - t_sq * pair.var_noise_trace
    discriminant = b * b - a * c
    if not discriminant >= 0.0:
        # No real root: a >= 0 is rounding at a vanishing interval, a < 0 is the whole line.
        point = noise_scale(pair)
        return (point, point) if a > 0.0 else (0.0, math.inf)
    # q has the sign of b, so that neither root is a difference of nearly equal numbers.
    q = b + math.copysign(math.sqrt(discriminant), b)
    roots = sorted(_ratio(numerator, denominator) for numerator, denominator in ((q, a), (c, q)))
    if a > 0.0:
        return max(roots[0], 0.0), max(roots[1], 0.0)
    return (max(roots[1], 0.0) if c > 0.0 else 0.0), math.inf


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator != 0.0 else -math.inf


def _contrast_variance(pair: NoiseEstimate, trace_factor: float, signal_factor: float) -> float:
    """Variance of ``trace_factor * noise_trace - signal_factor * grad_sq_norm``."""
    return (
        trace_factor**2 * pair.var_noise_trace
        - 2.0 * trace_factor * signal_factor * pair.covariance
        + signal_factor**2 * pair.var_grad_sq_norm
    )


@dataclass(frozen=True, slots=True)
class ShardTracker:
    """Do the ranks draw from one population? Pooled scatter between the ranks' means against that within ranks.

    With ``SS_B = sum_r n_r |g_r|^2 - n |g|^2`` between the means of ``W`` ranks and ``SS_W = Q - sum_r n_r |g_r|^2``
    within them, each window's over its own ``Q / n``, ``F = (SS_B / (W - 1)) / (SS_W / (K - W))`` is near 1 where every
    rank's examples come from the same distribution, and larger where shards differ: both ``SS / df`` are then unbiased
    for another ``tr(Sigma)``. Half of what is known is of the last 16 windows measured.

    Example:
        Two ranks of two cells each; their own means are 1 and 5:

        >>> window = Measurement(54.75, batch_sq_norm=9.0, global_batch=4.0, cells=4, rank_sq_norms=52.0)
        >>> round(ShardTracker().update(window, ranks=2).ratio(), 2)
        11.64
    """

    between: float = 0.0
    between_df: float = 0.0
    within: float = 0.0
    within_df: float = 0.0

    def update(self, window: Measurement, ranks: int) -> ShardTracker:
        """The tracker with one window more; one without ``rank_sq_norms`` tells nothing."""
        if ranks < 2 or window.cells <= ranks or not math.isfinite(window.rank_sq_norms) or not window.mean_sq_norm > 0:
            return self
        between = window.rank_sq_norms - window.global_batch * window.batch_sq_norm
        within = window.weighted_sq_norms - window.rank_sq_norms
        new = (between / window.mean_sq_norm, ranks - 1, within / window.mean_sq_norm, window.cells - ranks)
        old = (self.between, self.between_df, self.within, self.within_df)
        return ShardTracker(*(2.0 ** (-1.0 / 16.0) * x + y for x, y in zip(old, new, strict=True)))

    def ratio(self) -> float:
        """``F``; NaN before the first measurement."""
        if self.between_df == 0.0 or self.within <= 0.0:
            return math.nan
        return (self.between / self.between_df) / (self.within / self.within_df)

    def chance(self) -> float:
        """The chance of a ratio as large from one population, from the F distribution with the pooled degrees.

        Gradients of many directions scatter less than that distribution allows: a small chance is conservative.
        """
        ratio = self.ratio()
        return ratio if math.isnan(ratio) else float(fdtrc(self.between_df, self.within_df, max(ratio, 0.0)))

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, float]) -> Self:
        """The tracker whose :meth:`state_dict` this is."""
        return cls(**state)


def memory_examples(memory: float | None, cell_examples: float, batch: float) -> float:
    """Half-life of the evidence [examples]: ``memory``, or by default ``max(500 b, 10 n)``.

    At least 10 windows keep the effective number of windows near 29 however large the batch grows. The floor of five
    hundred micro-batches is half of what AdaScale and Pollux take: a noise scale that jumps is followed in time.

    Example:
        >>> memory_examples(None, cell_examples=64, batch=128), memory_examples(5000.0, cell_examples=64, batch=128)
        (32000.0, 5000.0)
    """
    return max(500.0 * cell_examples, 10.0 * batch) if memory is None else memory


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

    weight: float = 0.0
    weight_sq: float = 0.0
    trace_mean: float = 0.0
    signal_mean: float = 0.0
    # Weighted sums of products of deviations: of a window with itself, and with the window before.
    trace_trace: float = 0.0
    trace_signal: float = 0.0
    signal_signal: float = 0.0
    lag_trace_trace: float = 0.0
    lag_trace_signal: float = 0.0
    lag_signal_signal: float = 0.0
    last_trace: float = math.nan
    last_signal: float = math.nan

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

    def state_dict(self) -> dict[str, float]:
        """Its twelve floats by name."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """The tracker whose :meth:`state_dict` this is; unknown or missing names raise ``TypeError``."""
        return cls(**{name: float(value) for name, value in state.items()})
