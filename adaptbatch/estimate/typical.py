r"""The two channels beside the pooled moments: what an ordinary window says, and how far the others stand out.

Where a gradient's scale wanders over decades, a few windows hold nearly all of the pooled sum of squares, and with it
the decision. So each window's pair is divided by a *level* that was known before it, the running median of
``Q / n = |G|^2 + tr(Sigma) / b``, whose expectation does not depend on the number of micro-batches, and bounded::

    (s_t, g_t) = (tr(Sigma)_t, |G|^2_t) / max(m_t, (Q/n)_t / BOUND)

Pooled, these are the *typical* channel. Both parts take the same factor, so their ratio remains a noise scale, and no
window weighs more than ``BOUND`` ordinary ones. What is cut off is the *tail* channel. Floats only, no torch.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field, replace

from adaptbatch.estimate.tracker import NoiseTracker
from adaptbatch.records import Measurement, NoiseEstimate, Tail
from adaptbatch.schema import Extent, PositiveOrNan, Square, Sum

# Windows whose median is the level; fewer than LEVEL_LEAST of them are none.
LEVEL_WINDOWS = 64
LEVEL_LEAST = 8
#: A chi-square of four degrees of freedom is this far above its median once in a million draws; noise is not cut.
BOUND = 10.0
#: A gradient a hundred times longer than usual; no sampling error does that. In the two-networks study windows a
#: hundred times beyond the level came and went without harm; catastrophes were beyond ten thousand.
EXCEEDANCE = 1e4
# Half-lives of the evidence after the last exceedance for which an episode is remembered.
HOLD_MEMORIES = 10.0


@dataclass(frozen=True, slots=True)
class TypicalTracker:
    """Pools windows on the scale of the usual gradient, and keeps account of those that leave it.

    A value: :meth:`update` returns the next one.

    Example:
        Thirty windows alike, then one whose gradients are a thousand times longer:

        >>> tracker = TypicalTracker()
        >>> for scale in [1.0] * 30 + [1e6]:
        ...     pair = NoiseEstimate(scale * 2.0, scale * 50.0, degrees_of_freedom=3.0)
        ...     window = Measurement(scale * 640.0, scale * 4.0, global_batch=128.0, cells=4)
        ...     tracker = tracker.update(pair, window, memory=1e5)
        >>> pooled, tail = tracker.estimate(), tracker.tail()
        >>> round(pooled.noise_trace / pooled.grad_sq_norm, 6), round(tail.excess), round(tail.share, 3)
        (25.0, 1000000, 1.0)
        >>> tail.episode_batch, tail.episode_examples
        (128.0, 0.0)
    """

    pooled: NoiseTracker = field(default_factory=NoiseTracker)
    recent: tuple[Sum, ...] = ()
    trace_sum: Square = 0.0
    cut_sum: Square = 0.0
    excess: Square = math.nan
    episode_batch: PositiveOrNan = math.nan
    episode_examples: Extent = math.inf

    @property
    def level(self) -> float:
        """Median of the last windows' ``Q / n`` [g^2]; NaN while there are fewer than eight."""
        return statistics.median(self.recent) if len(self.recent) >= LEVEL_LEAST else math.nan

    def update(
        self, pair: NoiseEstimate, window: Measurement, memory: float, phi: float | None = None
    ) -> TypicalTracker:
        """The tracker one finite window later.

        Args:
            pair: The window's own estimate; without a degree of freedom it enters the level only.
            window: Its squared norms; one that nobody listened to is as noisy as usual for its length.
            memory: Half-life [examples].
            phi: ``phi(n)`` of the window; None: ``1 / n``.
        """
        phi = 1.0 / window.global_batch if phi is None else phi
        own = self._own(window, phi)
        if math.isnan(own):
            return self
        level = self.level
        excess = own / level if level > 0.0 else math.nan
        aged = replace(
            self,
            recent=(*self.recent, own)[-LEVEL_WINDOWS:],
            excess=excess,
            episode_examples=self.episode_examples + window.global_batch,
        )
        if excess > EXCEEDANCE:
            aged = aged._exceeded(window.global_batch, memory)
        return aged._pooled(pair, window, own, level, phi, memory)

    def exceeded(self, batch: float, memory: float) -> TypicalTracker:
        """The tracker after a window of ``batch`` examples that had no finite gradient: an exceedance of its own."""
        return replace(self, excess=math.inf)._exceeded(batch, memory)

    def estimate(self) -> NoiseEstimate:
        """The typical pair, in units of the level."""
        return self.pooled.estimate()

    def tail(self) -> Tail:
        """What stood out."""
        share = self.cut_sum / self.trace_sum if self.trace_sum > 0.0 else math.nan
        return Tail(self.excess, share, self.episode_batch, self.episode_examples)

    def _exceeded(self, batch: float, memory: float) -> TypicalTracker:
        # The batch of the first one stays: where another comes at twice that batch, averaging is not the cure, and an
        # answer to each would run to the limit.
        over = not self.episode_examples < HOLD_MEMORIES * memory
        return replace(self, episode_batch=batch if over else self.episode_batch, episode_examples=0.0)

    def stands_out(self, window: Measurement, phi: float) -> bool:
        """Whether the typical channel would cut the window."""
        own, level = self._own(window, phi), self.level
        return level > 0.0 and own > BOUND * level

    def usual_trace(self, window: Measurement, phi: float) -> float:
        """``tr(Sigma)`` of a window of which ``|g|^2`` is known, in the usual proportion of the two; NaN: not known."""
        signal, trace = max(self.pooled.signal_mean, 0.0), max(self.pooled.trace_mean, 0.0)
        length = signal + phi * trace
        return window.batch_sq_norm * trace / length if length > 0.0 else math.nan

    def _own(self, window: Measurement, phi: float) -> float:
        """``Q / n = |g|^2 + (K - 1) tr(Sigma) / n``, its noise as usual where nobody listened."""
        if window.listened:
            return window.mean_sq_norm
        return window.batch_sq_norm + (window.cells - 1.0) * self.usual_trace(window, phi) / window.global_batch

    def _pooled(
        self, pair: NoiseEstimate, window: Measurement, own: float, level: float, phi: float, memory: float
    ) -> TypicalTracker:
        batch = window.global_batch
        decay = 2.0 ** (-batch / memory)
        # The first windows are their own level: bounded to what one window may weigh, whatever its scale.
        unit = max(level, own / BOUND) if level > 0.0 else own
        if not unit > 0.0:
            return self
        cut = 1.0 - level / unit if level > 0.0 else 0.0
        if window.listened:
            scaled = replace(pair, noise_trace=pair.noise_trace / unit, grad_sq_norm=pair.grad_sq_norm / unit)
            sums = pair.degrees_of_freedom * max(pair.noise_trace, 0.0) if pair.degrees_of_freedom else 0.0
            pooled = self.pooled.update(scaled, batch, memory, cut > 0.0)
        else:
            degrees, trace = window.cells - 1.0, self.usual_trace(window, phi)
            sums, imputed = degrees * trace, trace / unit if cut > 0.0 else None
            pooled = self.pooled.update_length(window.batch_sq_norm / unit, degrees, phi, batch, memory, imputed)
        return replace(
            self,
            pooled=pooled,
            trace_sum=decay * self.trace_sum + sums,
            cut_sum=decay * self.cut_sum + cut * sums,
        )
