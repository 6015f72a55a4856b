"""The relation that the idea started from: the standard error of the batch gradient itself, ``sigma / sqrt(n)``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from adaptbatch import estimate
from adaptbatch.records import Decision, Evidence, NoiseEstimate, Progress
from adaptbatch.rules.base import Limits, in_python, require_memory, require_positive, towards
from adaptbatch.rules.compose import Composable

Start = Literal["max", "min"]

# Fewer effective windows than this do not say what the trace is.
MIN_EFFECTIVE_WINDOWS = 4.0


@dataclass(frozen=True)
class StandardError(Composable):
    """Keeps the standard error of the batch gradient, ``sqrt(tr(Sigma) / n)``, at one level, however long the gradient.

    Tests the linear statistic ``D(n) = phi(n) tr(Sigma) - level^2`` on the pooled moments, of which no window is cut
    off, and takes::

        n = tr(Sigma) / level^2,     level^2 = target^2     or     tr(Sigma)_ordinary / reference_batch

    With ``reference_batch`` the level is the error that so many examples have in an ordinary window: the median of the
    last windows' gradients. The batch is then ``reference_batch`` while training is calm, and grows with the noise
    where it bursts. Noise and signal that grow together leave :class:`~adaptbatch.RelativeStandardError` where it is,
    and move this rule. The two compose: ``RelativeStandardError() | StandardError(reference_batch=64)``.

    Nothing is known of the first windows: they are as large as the limits allow, which is the safe side, and the size
    is held until something is.

    When it is wrong: as the gradients' scale falls over training an absolute ``target`` stops binding, and where it
    rises the rule runs to ``max_steps``; an optimizer that divides by the gradient's own scale, as Adam does, feels
    bursts against its second moment only. Averaging a burst makes its step shorter; it does not make it right.

    Args:
        target: Wanted ``sqrt(tr(Sigma) / n)`` [g].
        reference_batch: Batch whose error in an ordinary window is the level [examples]. One of the two is given.
        memory: Half-life of the evidence [examples]; None: ``max(500 b, 10 n)``.
        dead_time: Examples to wait after a change before a shrink; a growth waits for nothing.
        z_grow: Standard errors of evidence a growth needs.
        z_shrink: Standard errors of evidence a shrink needs.
        start: ``"max"`` opens with the largest window, ``"min"`` with the smallest.

    Raises:
        ValueError: If an argument is out of range, or not exactly one of ``target`` and ``reference_batch`` is given.

    Source:
        The central limit theorem; an absolute error as a rule for the size of a sample: Chow & Robbins 1965, Annals of
        Mathematical Statistics 36.

    Example:
        >>> known = Evidence(pooled=NoiseEstimate(1.0, 6400.0, 0.1, 100.0, 0.0, effective_windows=20.0))
        >>> at = Progress(accumulation_steps=4, micro_batch_examples=64)
        >>> StandardError(target=4.0).decide(known, at, Limits())
        Decision(accumulation_steps=7, target_batch=400.0, reason='grow')
        >>> StandardError(target=4.0).decide(Evidence(), at, Limits())
        Decision(accumulation_steps=64, target_batch=nan, reason='at_max')
    """

    target: float | None = None
    reference_batch: float | None = None
    memory: float | None = None
    dead_time: float = 0.0
    z_grow: float = 0.0
    z_shrink: float = 0.0
    start: Start = "max"
    closed_loop: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.target is None) == (self.reference_batch is None):
            raise ValueError(
                f"exactly one of target and reference_batch must be given, got target = {self.target!r}, "
                f"reference_batch = {self.reference_batch!r}; reference_batch needs no unit."
            )
        if self.target is not None:
            require_positive("target", self.target, "it is a length of gradients; reference_batch needs no unit")
        if self.reference_batch is not None:
            require_positive("reference_batch", self.reference_batch, "the batch that is enough in ordinary windows")
        require_memory(self.memory)
        for name, value in (("dead_time", self.dead_time), ("z_grow", self.z_grow), ("z_shrink", self.z_shrink)):
            if not (value >= 0.0 and math.isfinite(value)):
                raise ValueError(f"{name} must be finite and not negative, got {name} = {value!r}; 0.0 is the default.")
        if self.start not in get_args(Start):
            raise ValueError(f"start must be one of {get_args(Start)}, got start = {self.start!r}.")
        in_python(self)

    def decide(self, evidence: Evidence, progress: Progress, limits: Limits) -> Decision:
        """See the class; the first window is the largest, unless ``start="min"``."""
        pair, level = evidence.pooled, self._sq_level(evidence)
        if not (pair.effective_windows >= MIN_EFFECTIVE_WINDOWS and level > 0.0):
            if self.start == "max" and progress.window == 0:
                return Decision(limits.max_steps, math.nan, "at_max")
            return Decision(progress.accumulation_steps, math.nan, "undecided")
        target = estimate.batch_with_error(pair.noise_trace, level, progress.population)
        move = towards(target, progress, limits)
        if move.accumulation_steps > progress.accumulation_steps:
            excess, error = _excess(pair, level, progress.global_batch, progress)
            sure = excess > self.z_grow * error
        elif move.accumulation_steps < progress.accumulation_steps:
            after = move.accumulation_steps * progress.step_examples
            excess, error = _excess(pair, level, after, progress)
            # Exactly enough is enough.
            sure = progress.examples_since_change >= self.dead_time and excess <= -self.z_shrink * error
        else:
            sure = True
        return move if sure else Decision(progress.accumulation_steps, target, "undecided")

    def _sq_level(self, evidence: Evidence) -> float:
        """``level^2`` [g^2]; NaN while an ordinary window is not known."""
        if self.target is not None:
            return self.target**2
        assert self.reference_batch is not None
        return evidence.typical.noise_trace * evidence.level / self.reference_batch


def _excess(pair: NoiseEstimate, level: float, batch: float, progress: Progress) -> tuple[float, float]:
    """``D(batch) = phi tr(Sigma) - level^2`` and its standard error, zero where that is not known."""
    share = estimate.inverse_size(batch, progress.population)
    variance = pair.var_noise_trace
    return share * pair.noise_trace - level, share * math.sqrt(variance) if variance > 0.0 else 0.0
