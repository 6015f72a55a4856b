"""Whether the ranks draw from one population. Floats only, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adaptbatch.records import Measurement
from adaptbatch.schema import Finite, Sum


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

    between: Finite = 0.0
    between_df: Sum = 0.0
    within: Finite = 0.0
    within_df: Sum = 0.0

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
        from scipy.special import fdtrc

        ratio = self.ratio()
        return ratio if math.isnan(ratio) else float(fdtrc(self.between_df, self.within_df, max(ratio, 0.0)))
