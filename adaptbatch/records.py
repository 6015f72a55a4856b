"""What the modules pass on: plain frozen records of floats and ints.

``measure --WindowResult--> state, with its estimates --Evidence--> rules (with Progress) --Decision--> controller``
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from adaptbatch.schema import (
    ROW,
    Count,
    Extent,
    Flag,
    Natural,
    Number,
    Population,
    Positive,
    PositiveOrNan,
    Square,
    Sum,
    instance,
)

#: Why a window has its size.
Reason = Literal[
    "hold",
    "grow",
    "shrink",
    "at_max",
    "at_min",
    "growth_limited",
    "undecided",
    "signal_lost",
    "noise_floor",
    "nonfinite",
    "guard",
]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured in one window: ``K`` cells with weights ``w_c`` and mean gradients ``g_c``.

    A cell is a micro-batch, or with ghost norms an example of weight 1.

    Attributes:
        weighted_sq_norms: ``Q = sum_c w_c |g_c|^2`` [g^2 example]; NaN: nobody listened, only ``|g|^2`` was measured.
        batch_sq_norm: ``|g|^2`` of the weighted mean gradient ``g = sum_c w_c g_c / n`` [g^2].
        global_batch: ``n = sum_c w_c`` [examples, or tokens].
        cells: ``K``.
        radial_sq_norms: ``sum_c w_c <g_c, g>^2 / |g|^2`` [g^2 example], the part of ``Q`` along ``g``; NaN unless a
            rule asks for it, since it needs the window's gradients to be kept.
        consecutive_product: ``<g, g'>`` with the window before [g^2]; NaN unless it was asked for.
        rank_sq_norms: ``sum_r n_r |g_r|^2`` over the means of ranks [g^2 example]; NaN unless it was measured.
    """

    weighted_sq_norms: Square
    batch_sq_norm: Square
    global_batch: Positive
    cells: Natural
    radial_sq_norms: Square = math.nan
    consecutive_product: Number = math.nan
    rank_sq_norms: Square = math.nan

    @property
    def mean_sq_norm(self) -> float:
        """``Q / n``, mean squared norm of the cells' gradients, ``|G|^2 + tr(Sigma) / b`` in expectation [g^2]."""
        return self.weighted_sq_norms / self.global_batch

    @property
    def listened(self) -> bool:
        """Whether its cells were measured; where gradients are NaN, so is ``|g|^2``."""
        return not (math.isnan(self.weighted_sq_norms) and math.isfinite(self.batch_sq_norm))

    @property
    def finite(self) -> bool:
        """Whether what was measured of squared norms is finite; where it is not, the window is evidence of nothing."""
        return math.isfinite(self.batch_sq_norm) and not math.isinf(self.weighted_sq_norms)


@dataclass(frozen=True, slots=True)
class WindowCounts:
    """What is known of a finished window without its measurements.

    Attributes:
        global_batch: ``n``, its weights' sum on all ranks [examples].
        micro_batches: On all ranks; fewer than were decided where the data ended.
        largest: Weight of the largest of them, over ranks the mean; NaN: not known.
        ended: Whether the data ended with it, so that its last micro-batch may be a short one.
        step_seconds: Time of the optimizer's step [s].
        seconds: Time of the rest [s].
    """

    global_batch: float
    micro_batches: int
    largest: float = math.nan
    ended: bool = False
    step_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class WindowResult:
    """What was measured in one finished window.

    Attributes:
        measurement: Squared norms, Euclidean.
        in_metric: The same in the optimizer's metric; None without one, or while it is not warm.
        loss: Weighted mean loss.
        lr: Learning rate as applied.
        steps: Its accumulation steps, 0 for a window that the end of the data cut short; None: its cells.
        applied_sq_norm: ``|g|^2`` as the optimizer got it, after clipping [g^2].
    """

    measurement: Annotated[Measurement, ROW]
    in_metric: Annotated[Measurement | None, ROW] = None
    loss: Number = math.nan
    lr: Number = math.nan
    steps: Count | None = None
    applied_sq_norm: Number = math.nan


@dataclass(frozen=True, slots=True)
class NoiseEstimate:
    """Signal and noise of the gradient, unbiased and never clipped: either may be negative.

    Attributes:
        grad_sq_norm: Estimate of ``|G|^2`` [g^2].
        noise_trace: Estimate of ``tr(Sigma)``, per example [g^2 example].
        var_grad_sq_norm: Variance of ``grad_sq_norm`` [g^4]; NaN where a single window cannot tell.
        var_noise_trace: Variance of ``noise_trace`` [g^4 example^2].
        covariance: Covariance of the two [g^4 example].
        degrees_of_freedom: ``K - 1`` of one window, or their decayed sum.
        effective_windows: ``(sum w)^2 / sum w^2``: how many equal windows the pooled evidence is worth.
    """

    grad_sq_norm: float
    noise_trace: float
    var_grad_sq_norm: float = math.nan
    var_noise_trace: float = math.nan
    covariance: float = math.nan
    degrees_of_freedom: float = 0.0
    effective_windows: float = 0.0


@dataclass(frozen=True, slots=True)
class Tail:
    """Whether ``sigma / sqrt(n)`` can be believed: how far single windows stand out from the usual.

    Attributes:
        excess: The last window's ``Q / n`` over the median of the windows before it [1]; NaN while there are too few.
        share: Share of the pooled sum of squares that windows hold beyond the bound of the typical channel [1].
        episode_batch: ``n`` when the present episode of exceedances began [examples]; NaN before the first.
        episode_examples: Examples since the last exceedance; infinite before the first.
    """

    excess: float = math.nan
    share: float = math.nan
    episode_batch: float = math.nan
    episode_examples: float = math.inf


@dataclass(frozen=True, slots=True)
class Response:
    """How the noise answered when the batch grew: what tells a noise floor from a noise scale that rises by itself.

    Attributes:
        elasticity: ``d ln B / d ln n`` over the present climb [1]: 0 where ``B`` does not care, 1 at a noise floor.
        least_error_sq: The smallest ``B / n`` among the sizes of the climb [1].
        consecutive: Mean of ``<g_t, g_{t-1}>`` in its standard errors: positive while the loss still falls along ``G``,
            negative at a floor; NaN unless it is measured.
    """

    elasticity: float = math.nan
    least_error_sq: float = math.nan
    consecutive: float = math.nan


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that finished windows tell a rule.

    Attributes:
        pooled: Unbiased moments, decayed in examples.
        typical: The same of windows that are scaled by the usual gradient and bounded: of an ordinary step [1].
        level: The unit of ``typical``: the median of the last windows' ``Q / n`` [g^2].
        tail: What the bound cut off.
        response: What growing did so far.
        window: The last finite window; None before the first.
        loss: Decayed mean of the loss.
        lr: Learning rate of the last step; NaN before the first.
        step_seconds: Decayed mean of the seconds that a window takes whatever its size.
        example_seconds: Decayed mean of the seconds for each example beside that.
    """

    pooled: NoiseEstimate = NoiseEstimate(math.nan, math.nan)
    typical: NoiseEstimate = NoiseEstimate(math.nan, math.nan)
    level: float = math.nan
    tail: Tail = Tail()
    response: Response = Response()
    window: Measurement | None = None
    loss: float = math.nan
    lr: float = math.nan
    step_seconds: float = math.nan
    example_seconds: float = math.nan


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the training stands when the next window's size is decided.

    Attributes:
        window: Finished windows, skipped ones included; the index of the window to come.
        examples_seen: Sum of all weights so far [examples].
        accumulation_steps: ``k`` of the window that just ended.
        micro_batch_examples: ``b``, the examples of one micro-batch on one rank; NaN before the first window.
        world_size: ``W``, the ranks; a window holds ``n = k b W`` examples.
        examples_since_change: Examples since ``k`` last changed; infinite if it never did.
        population: Examples in the data set, or infinity.
        finite: Whether the last window's gradients were finite.
        by_example: Whether single examples are measured (ghost norms): one micro-batch then holds evidence.
        listens: Whether the window to come is measured, and not only its mean.
    """

    window: Count = 0
    examples_seen: Sum = 0.0
    accumulation_steps: Natural = 1
    micro_batch_examples: PositiveOrNan = math.nan
    world_size: Natural = 1
    examples_since_change: Extent = math.inf
    population: Population = math.inf
    finite: Flag = True
    by_example: Flag = False
    listens: Flag = True

    @property
    def step_examples(self) -> float:
        """``b W``, the examples that one more accumulation step adds."""
        return self.micro_batch_examples * self.world_size

    @property
    def global_batch(self) -> float:
        """``n = k b W`` of the window that just ended, had it been a full one [examples]."""
        return self.accumulation_steps * self.step_examples


@dataclass(frozen=True, slots=True)
class Decision:
    """The next window's size and why.

    Attributes:
        accumulation_steps: ``k`` of the next window.
        target_batch: The batch the rule wants, unrounded and unlimited [examples]; may be infinite, NaN if unknown.
        reason: One of the words of :data:`.Reason`.
    """

    accumulation_steps: Natural
    target_batch: Number
    reason: Annotated[Reason, instance(str, "be a text")]
