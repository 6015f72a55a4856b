r"""Published tests of a single window's gradient: is it longer than its error, or do its parts agree?

They read the last window only, without memory and without a standard error, and so react to its luck. Sizes come from
the window's ``|g|^2``, whose expectation is ``|G|^2 + phi(n) tr(Sigma)``: what that does to each is said with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from adaptbatch import estimate
from adaptbatch.records import Decision, Evidence, Measurement, NoiseEstimate, Progress
from adaptbatch.rules.base import Limits, hold, in_python, require_fraction, require_positive, towards
from adaptbatch.rules.compose import Composable


@dataclass(frozen=True)
class NormTest(Composable):
    """Grows the batch where a window's gradient is shorter than its standard error allows.

    With the window's ``S = tr(Sigma)^``::

        if phi(n) S > theta^2 |g|^2:      n = S / (theta^2 |g|^2)

    and the finite-population form of the size where the population is known.

    When it is wrong: ``|g|^2`` contains the noise that it is compared to. With ``v = B / n`` the tested ratio
    ``S / (n |g|^2)`` tends to ``v / (1 + v)``, below 1 however small the batch: for ``theta >= 1`` the test never asks
    for growth in expectation, and ``theta = 0.9`` keeps the relative error at 2.06. ``debiased=True`` puts
    ``|G|^2^ = |g|^2 - phi(n) S`` in its place. Either way one unlucky window is enough to grow, and without
    ``grow_only`` to shrink.

    Args:
        theta: Wanted ``sqrt(S / n) / |g|`` [1].
        debiased: Whether to compare to the unbiased ``|G|^2^``; the published test does not.
        grow_only: False follows a smaller size too; the published test never shrinks.

    Raises:
        ValueError: If ``theta`` is not positive and finite.

    Source:
        Byrd, Chin, Nocedal & Wu 2012, Math. Program. 134:127; for deep networks Lau, Liu & Kolar 2024,
        arXiv:2402.11215.

    Example:
        >>> window = Measurement(weighted_sq_norms=2528.0, batch_sq_norm=4.0, global_batch=120.0, cells=3)
        >>> at = Progress(accumulation_steps=3, micro_batch_examples=40)
        >>> NormTest(theta=0.5).decide(Evidence(window=window), at, Limits(max_growth=9.0))
        Decision(accumulation_steps=26, target_batch=1024.0, reason='grow')
    """

    theta: float = 0.5
    debiased: bool = False
    grow_only: bool = True
    closed_loop: ClassVar[bool] = True
    memory: ClassVar[None] = None

    def __post_init__(self) -> None:
        require_positive("theta", self.theta, "0.5 wants an error of half the gradient's length")
        in_python(self)

    def decide(self, evidence: Evidence, progress: Progress, limits: Limits) -> Decision:
        """The size that passes the test; ``undecided`` where the window has no degree of freedom."""
        pair = _moments(evidence.window, progress.population)
        if evidence.window is not None and not self.debiased:
            pair = NoiseEstimate(evidence.window.batch_sq_norm, pair.noise_trace)
        target = _passing(pair, self.theta, progress.population)
        return towards(target, progress, limits, lost=pair.grad_sq_norm <= 0.0, shrinks=not self.grow_only)


@dataclass(frozen=True)
class InnerProductTest(Composable):
    """Grows the batch where the examples' gradients disagree about the step's direction, along it or across it.

    With ``Q``, ``|g|^2`` and the radial ``R = sum_c w_c <g_c, g>^2 / |g|^2`` of a window of ``K`` cells::

        n >= (R - n |g|^2) / ((K - 1) theta^2 |g|^2)      inner-product test
        n >= (Q - R) / ((K - 1) nu^2 |g|^2)               orthogonality test

    the published ``Var_i(<g_i, g>) / (theta^2 |g|^4)`` and ``Var_i(g_i - <g_i, g> g / |g|^2) / (nu^2 |g|^2)``, with
    cells in place of examples. The noise across the step, nearly all of it, is allowed ``nu / theta`` times the error.

    When it is wrong: ``|g|^2`` contains its own noise, as in :class:`NormTest`; where the noise dominates, ``g`` points
    anywhere, and the variance along it is not the one along ``G``. The paper's safeguard, the average of the last
    gradients where they are noisy, is left out. Ghost norms hold no inner products.

    Args:
        theta: Wanted error along ``g``, in units of ``|g|`` [1].
        nu: Wanted error across ``g``, in units of ``|g|`` [1]; 5.84 is tan(80 degrees). None switches it off.

    Raises:
        ValueError: If ``theta`` or ``nu`` is not positive and finite.

    Source:
        Bollapragada, Byrd & Nocedal 2018, arXiv:1710.11258.

    Example:
        >>> window = Measurement(2000.0, 1.0, global_batch=128.0, cells=4, radial_sq_norms=500.0)
        >>> at = Progress(accumulation_steps=4, micro_batch_examples=32)
        >>> InnerProductTest(theta=0.5).decide(Evidence(window=window), at, Limits(max_growth=9.0))
        Decision(accumulation_steps=16, target_batch=496.0, reason='grow')
    """

    theta: float = 0.9
    nu: float | None = 5.84
    closed_loop: ClassVar[bool] = True
    memory: ClassVar[None] = None
    keeps_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive("theta", self.theta, "0.9 is the paper's")
        if self.nu is not None:
            require_positive("nu", self.nu, "None switches the orthogonality test off")
        in_python(self)

    def decide(self, evidence: Evidence, progress: Progress, limits: Limits) -> Decision:
        """The size that passes both tests; ``undecided`` where the inner products were not measured."""
        window = evidence.window
        if window is None or window.cells < 2 or math.isnan(window.radial_sq_norms):
            return towards(math.nan, progress, limits)
        length, degrees = window.batch_sq_norm, window.cells - 1
        radial = NoiseEstimate(length, (window.radial_sq_norms - window.global_batch * length) / degrees)
        target = _passing(radial, self.theta, progress.population)
        if self.nu is not None:
            orthogonal = NoiseEstimate(length, (window.weighted_sq_norms - window.radial_sq_norms) / degrees)
            target = max(target, _passing(orthogonal, self.nu, progress.population))
        return towards(target, progress, limits, lost=length <= 0.0, shrinks=False)


@dataclass(frozen=True)
class CosineSimilarity(Composable):
    """Moves the batch by a tenth every window so that the gradients of its two halves agree to ``target``.

    Averaged over all ways to halve the window, numerator and denominator of the cosine between the halves are
    the window's unbiased pair (unlimited population)::

        c = <a, b> / |a|^2  ->  |G|^2^ / (|G|^2^ + 2 S / n)

    ``n`` is multiplied by ``factor`` below ``target``, by ``2 - factor`` above, and moves by at least one step.

    When it is wrong: it never rests, and one window's ``c`` has a wide spread; only the average of its path is near
    the batch it looks for, ``c = 1 / (1 + 2 theta^2)`` at a relative error ``theta``: 0.75 is ``theta = 0.41``. The
    published rule scales the learning rate with ``sqrt(n)``, which this one leaves to a coupling.

    Args:
        target: Wanted cosine, in (0, 1).
        factor: Growth of one move, in (1, 2).

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Qin et al. 2021 (SimiGrad), NeurIPS 34.

    Example:
        >>> window = Measurement(weighted_sq_norms=1020.0, batch_sq_norm=4.0, global_batch=160.0, cells=20)
        >>> at = Progress(accumulation_steps=20, micro_batch_examples=8)
        >>> round(CosineSimilarity().similarity(window), 3)
        0.939
        >>> CosineSimilarity().decide(Evidence(window=window), at, Limits())
        Decision(accumulation_steps=18, target_batch=144.0, reason='shrink')
    """

    target: float = 0.75
    factor: float = 1.1
    closed_loop: ClassVar[bool] = True
    memory: ClassVar[None] = None

    def __post_init__(self) -> None:
        require_fraction("target", self.target, "0.75 is a relative error of 0.41")
        if not 1.0 < self.factor < 2.0:
            raise ValueError(f"factor must be in (1, 2), got factor = {self.factor!r}; 1.1 moves by a tenth.")
        in_python(self)

    def similarity(self, window: Measurement) -> float:
        """The cosine of two halves of ``window``, in [-1, 1]; NaN without a degree of freedom."""
        pair = estimate.estimate_window(window)
        length = pair.grad_sq_norm + 2.0 * pair.noise_trace / window.global_batch
        return pair.grad_sq_norm / length if length > 0.0 else math.nan

    def decide(self, evidence: Evidence, progress: Progress, limits: Limits) -> Decision:
        """One move up or down; ``undecided`` where the window has no degree of freedom."""
        window, k = evidence.window, progress.accumulation_steps
        found = math.nan if window is None else self.similarity(window)
        if math.isnan(found):
            return towards(math.nan, progress, limits)
        if found == self.target:
            return hold(progress)
        # A tenth of a few steps is less than one.
        up = max(k + 1, round(self.factor * k))
        down = min(k - 1, round((2.0 - self.factor) * k))
        steps = up if found < self.target else down
        return towards(steps * progress.step_examples, progress, limits)


def _moments(window: Measurement | None, population: float) -> NoiseEstimate:
    return NoiseEstimate(math.nan, math.nan) if window is None else estimate.estimate_window(window, population)


def _passing(pair: NoiseEstimate, theta: float, population: float) -> float:
    """The size that passes; NaN while the noise is unknown, whatever the length."""
    return math.nan if math.isnan(pair.noise_trace) else estimate.required_batch(pair, theta, population)
