"""How well the noise scale is known: Fieller's interval for a ratio of two noisy moments. Floats only, no torch."""

from __future__ import annotations

import math

from adaptbatch.estimate.moments import noise_scale
from adaptbatch.records import NoiseEstimate


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
    # Half a second of import, for whoever asks for an interval.
    from scipy.special import stdtrit

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
