r"""Does the noise scale rise because the batch did? The response of the gradient to a growing batch. Floats only.

At the noise floor of a fixed learning rate the parameters jitter until ``tr(Sigma) / (n |G|^2)`` has the value that the
rate dictates: a larger batch quiets the gradient and shrinks it alike, and no size is ever large enough. Two signs
tell: the elasticity of ``B`` to ``n``, which costs nothing, and the inner product of consecutive gradients, which
turns negative there and costs a copy of the gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from adaptbatch.estimate.moments import noise_scale
from adaptbatch.records import NoiseEstimate
from adaptbatch.schema import ROW, Finite, Positive

# A size of the climb counts once it has this many windows, and the climb once the sizes span this factor.
RUNG_WINDOWS = 8
CLIMB_FACTOR = 4.0
# Sizes smaller than the present one by more than this factor are of another time.
KEPT_FACTOR = 16.0
# Windows of the running mean that stands beside each size's own.
RECENT_WINDOWS = 32.0


@dataclass(frozen=True, slots=True)
class Rung:
    """The windows of one number of accumulation steps: means of their moments, and running means of the last 32."""

    steps: Positive
    batch: Positive
    windows: Positive
    noise_trace: Finite
    grad_sq_norm: Finite
    recent_trace: Finite
    recent_signal: Finite

    def noise_scales(self) -> tuple[float, float]:
        """``B`` at this size, of all its windows and of the last; infinite where the signal is lost."""
        pairs = (self.noise_trace, self.grad_sq_norm), (self.recent_trace, self.recent_signal)
        whole, recent = (noise_scale(NoiseEstimate(signal, trace)) for trace, signal in pairs)
        return whole, recent

    def merged(self, pair: NoiseEstimate, batch: float) -> Rung:
        """With one more window."""
        n = self.windows + 1.0
        recent = min(n, RECENT_WINDOWS)
        return Rung(
            self.steps,
            self.batch + (batch - self.batch) / n,
            n,
            self.noise_trace + (pair.noise_trace - self.noise_trace) / n,
            self.grad_sq_norm + (pair.grad_sq_norm - self.grad_sq_norm) / n,
            self.recent_trace + (pair.noise_trace - self.recent_trace) / recent,
            self.recent_signal + (pair.grad_sq_norm - self.recent_signal) / recent,
        )


@dataclass(frozen=True, slots=True)
class Climb:
    """Follows the noise scale from size to size while the batch grows: does ``B`` rise *because* the batch did?

    At the noise floor of a fixed learning rate ``|G|^2`` falls as ``1/n`` and ``B / n`` stays: the *elasticity*
    ``d ln B / d ln n`` between the sizes of one climb is 1, and no size is ever large enough. A noise scale that rises
    by itself is caught up with: its ``B / n`` returns to ``theta^2`` at every size. One that jumps while a size is in
    use looks like a floor in that size's mean, one that rises as fast as the batch in the means of its last windows:
    what is read is the smaller of the two.

    Source:
        Mandt, Hoffman & Blei 2017, arXiv:1704.04289 (the stationary distribution of SGD at a fixed rate).

    Example:
        >>> climb = Climb()
        >>> for n in (64.0, 128.0, 256.0):
        ...     for _ in range(20):
        ...         climb = climb.update(NoiseEstimate(1.0 / n, 6.0, degrees_of_freedom=1.0), steps=n / 32, batch=n)
        >>> round(climb.elasticity(), 6), round(climb.least_error_sq(), 6)
        (1.0, 6.0)
    """

    rungs: tuple[Annotated[Rung, ROW], ...] = ()

    def update(self, pair: NoiseEstimate, steps: float, batch: float) -> Climb:
        """One finite, full window later; fewer ``steps`` than before begin another climb.

        Args:
            pair: The window's own estimate.
            steps: Its accumulation steps, as decided.
            batch: Its examples.
        """
        if pair.degrees_of_freedom == 0.0:
            return self
        top = self.rungs[-1] if self.rungs else None
        if top is None or steps != top.steps:
            below = self.rungs if top is not None and steps > top.steps else ()
            kept = tuple(rung for rung in below if rung.steps * KEPT_FACTOR >= steps)
            moments = (pair.noise_trace, pair.grad_sq_norm) * 2
            return Climb((*kept, Rung(float(steps), batch, 1.0, *moments)))
        return Climb((*self.rungs[:-1], top.merged(pair, batch)))

    def elasticity(self) -> float:
        """``ln(B_last / B_first) / ln(n_last / n_first)`` of the climb; NaN while it spans less than a factor of 4."""
        rungs = self._known()
        if len(rungs) < 3 or rungs[-1].batch < CLIMB_FACTOR * rungs[0].batch:
            return math.nan
        first, last = rungs[0], rungs[-1]
        growth = math.log(last.batch / first.batch)
        rises = [_log_ratio(*scales) for scales in zip(first.noise_scales(), last.noise_scales(), strict=True)]
        return math.nan if any(math.isnan(rise) for rise in rises) else min(rises) / growth

    def least_error_sq(self) -> float:
        """Smallest ``B / n`` of its sizes; NaN before there is one."""
        return min((min(rung.noise_scales()) / rung.batch for rung in self._known()), default=math.nan)

    def _known(self) -> list[Rung]:
        return [rung for rung in self.rungs if rung.windows >= RUNG_WINDOWS]


def _log_ratio(first: float, last: float) -> float:
    """``ln(last / first)``; infinite where only the last is, NaN where it says nothing."""
    if not (0.0 < first < math.inf and last > 0.0):
        return math.nan
    return math.inf if math.isinf(last) else math.log(last / first)
