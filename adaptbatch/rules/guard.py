"""The answer to what no sampling error explains: exceedances of the usual gradient, and non-finite ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from adaptbatch import estimate
from adaptbatch.estimate.typical import BOUND, HOLD_MEMORIES
from adaptbatch.records import Decision, Evidence, Measurement, Progress, Tail
from adaptbatch.rules.base import Limits, in_python, require_positive

# The next size up after an exceedance.
STEP_UP = 2.0


def tail_floor(tail: Tail, progress: Progress, limits: Limits, hold: float) -> int:
    """The smallest ``k`` that the tail channel allows: twice the batch at which the present episode began.

    For ``hold`` examples after the last exceedance; ``min_steps`` before the first and after that. One doubling an
    episode: where exceedances go on at twice the batch, averaging is not the cure.

    Example:
        >>> at = Progress(accumulation_steps=4, micro_batch_examples=64)
        >>> tail_floor(Tail(episode_batch=256.0, episode_examples=1000.0), at, Limits(), hold=1e6)
        8
    """
    known = tail.episode_batch > 0.0 and progress.step_examples > 0.0
    if not known or not tail.episode_examples < hold:
        return limits.lower
    return limits.clamp(math.ceil(STEP_UP * tail.episode_batch / progress.step_examples - 1e-9))


def hold_examples(memory: float | None, progress: Progress) -> float:
    """How long the floor of :func:`tail_floor` stands: ten half-lives of the evidence [examples]."""
    return HOLD_MEMORIES * estimate.memory_examples(memory, progress.micro_batch_examples, progress.global_batch)


@dataclass(frozen=True)
class Guard:
    """Leaves out the step of an exceedance or a gradient that is not finite, grows the batch, and holds it there.

    A step is skipped when its window's ``Q / n`` is more than ``skip_ratio`` times the median of the windows before it,
    at most ``max_skips`` in a row: parameters that went astray need steps to come back, and Adam's second moment, which
    a long gradient raises, is what slows them down. After an exceedance
    (:data:`~adaptbatch.estimate.typical.EXCEEDANCE`) or a non-finite gradient, and once gradients are usual again,
    ``k`` is at least twice the batch that saw the first of them, for ``hold`` examples. Composes with any rule, also an
    open-loop one: ``BatchController(..., guard=Guard())``.

    When it is wrong: where the gradient's scale really jumps tenfold, as at a change of task, it skips good steps; and
    where instability is not noise. On the noisy network of the two-networks study neither skipping nor growing kept a
    run whole for sure, and both ruined some that were whole without (``studies/results/two-networks/pilots.parquet``).

    Args:
        skip_ratio: Squared norm of a step to skip, in units of the usual one [1]; 100 is a gradient ten times longer.
        max_skips: Steps left out in a row; 0 grows without skipping.
        hold: Examples after the last exceedance before the batch may shrink again; None: ten half-lives.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Child 2020 (VDVAE), arXiv:2011.10650 (skipped updates).

    Example:
        >>> calm = Decision(4, 256.0, "hold")
        >>> at = Progress(accumulation_steps=4, micro_batch_examples=64)
        >>> Guard().react(calm, Evidence(tail=Tail(1.0, 0.9, 256.0, episode_examples=500.0)), at, Limits())
        Decision(accumulation_steps=8, target_batch=256.0, reason='guard')
    """

    skip_ratio: float = 100.0
    max_skips: int = 1
    hold: float | None = None

    def __post_init__(self) -> None:
        if not (self.skip_ratio > 1.0 and math.isfinite(self.skip_ratio)):
            raise ValueError(
                f"skip_ratio must be finite and above 1, got skip_ratio = {self.skip_ratio!r}; 100 is ten times longer."
            )
        if isinstance(self.max_skips, bool) or not hasattr(self.max_skips, "__index__") or self.max_skips < 0:
            raise ValueError(f"max_skips must be a whole number of at least 0, got max_skips = {self.max_skips!r}.")
        if self.hold is not None:
            require_positive("hold", self.hold, "None takes ten half-lives of the evidence")
        in_python(self)

    def skips(self, window: Measurement, level: float, skipped: int) -> bool:
        """Whether to leave out the step of ``window``, after ``skipped`` in a row.

        Args:
            window: The window that is about to be stepped.
            level: Median ``Q / n`` of the windows before it [g^2]; NaN while unknown.
            skipped: Steps left out directly before this one.
        """
        return skipped < self.max_skips and window.mean_sq_norm > self.skip_ratio * level

    def react(
        self, decision: Decision, evidence: Evidence, progress: Progress, limits: Limits, memory: float | None = None
    ) -> Decision:
        """``decision``, or the smallest size that the tail channel allows, once gradients are usual again."""
        hold = hold_examples(memory, progress) if self.hold is None else self.hold
        floor = tail_floor(evidence.tail, progress, limits, hold)
        if floor <= decision.accumulation_steps:
            return decision
        # While gradients are still far from usual the parameters have to come back: that takes steps, not examples.
        settled = not evidence.tail.excess > BOUND
        steps = floor if settled else max(decision.accumulation_steps, progress.accumulation_steps)
        return replace(decision, accumulation_steps=steps, reason="guard")
