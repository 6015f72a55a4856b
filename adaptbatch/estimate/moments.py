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

from adaptbatch.records import Measurement, NoiseEstimate


def inverse_size(batch: float, population: float = math.inf) -> float:
    """``phi(n) = 1/n - 1/N``, the factor between ``tr(Sigma)`` and the squared standard error; 0 once ``n >= N``.

    Source:
        Cochran 1977, Sampling Techniques (finite-population correction).

    Example:
        >>> inverse_size(100), inverse_size(100, population=400), inverse_size(500, population=400)
        (0.01, 0.0075, 0.0)
    """
    return max(1.0 / batch - 1.0 / population, 0.0)


def estimate_window(window: Measurement, population: float = math.inf) -> NoiseEstimate:
    """The unbiased pair of one window, by analysis of variance over its cells.

    ``tr(Sigma)^ = (Q - n |g|^2) / (K - 1)`` and ``|G|^2^ = |g|^2 - phi(n) tr(Sigma)^``.

    Args:
        window: Squared norms of one window.
        population: Examples the batch is drawn from without replacement; infinite for a stream.

    Returns:
        The pair, with ``K - 1`` degrees of freedom; NaN for both, with none, where ``K = 1`` or nobody listened.

    Source:
        One-way analysis of variance with weights; for equal cells the estimator of Johnson et al. 2020
        (AdaScale, arXiv:2007.05105) and Qiao et al. 2021 (Pollux, arXiv:2008.12260).

    Example:
        Two cells of two examples each, gradients (3) and (1), mean (2):

        >>> window = Measurement(weighted_sq_norms=2 * 9 + 2 * 1, batch_sq_norm=4.0, global_batch=4.0, cells=2)
        >>> pair = estimate_window(window)
        >>> pair.noise_trace, pair.grad_sq_norm, pair.degrees_of_freedom
        (4.0, 3.0, 1.0)
    """
    degrees = window.cells - 1
    if degrees == 0 or not window.listened:
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


def noise_scale_error(pair: NoiseEstimate) -> float:
    """Relative standard error of ``B = tr(Sigma) / |G|^2``, that of ``tr(Sigma) / B - |G|^2`` over ``|G|^2``.

    By the first order (delta method); infinite where either moment is not positive, or its variance is not known.

    Example:
        >>> round(noise_scale_error(NoiseEstimate(4.0, 400.0, 0.04, 1600.0, 0.0, 90.0, 30.0)), 4)
        0.1118
    """
    signal, trace = pair.grad_sq_norm, pair.noise_trace
    if not (signal > 0.0 and trace > 0.0):
        return math.inf
    square = _contrast_variance(pair, signal / trace, 1.0)
    return math.sqrt(square) / signal if square >= 0.0 else math.inf


def _contrast_variance(pair: NoiseEstimate, trace_factor: float, signal_factor: float) -> float:
    """Variance of ``trace_factor * noise_trace - signal_factor * grad_sq_norm``."""
    return (
        trace_factor * trace_factor * pair.var_noise_trace
        - 2.0 * trace_factor * signal_factor * pair.covariance
        + signal_factor * signal_factor * pair.var_grad_sq_norm
    )
