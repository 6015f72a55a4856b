"""Rules that no evidence enters: the baselines and the controls of a study."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from adaptbatch.records import Decision, Evidence, Progress
from adaptbatch.rules.base import Limits, in_python, open_loop, require_fraction, require_positive, require_steps

Shape = Literal["linear", "exponential", "staircase", "increments"]


@dataclass(frozen=True)
class Fixed:
    """Always ``accumulation_steps``: the constant baseline.

    Args:
        accumulation_steps: ``k`` of every window.

    Raises:
        ValueError: If it is not a whole number of at least 1.

    Example:
        >>> from adaptbatch.rules import decide
        >>> decide(Fixed(4), Evidence(), Progress(accumulation_steps=4, micro_batch_examples=64), Limits())
        Decision(accumulation_steps=4, target_batch=256.0, reason='hold')
    """

    accumulation_steps: int
    closed_loop: ClassVar[bool] = False
    memory: ClassVar[None] = None

    def __post_init__(self) -> None:
        require_steps("accumulation_steps", self.accumulation_steps)
        in_python(self)

    def decide(self, evidence: Evidence, progress: Progress, limits: Limits) -> Decision:
        """Its number, within the limits."""
        return open_loop(self.accumulation_steps, progress, limits)


@dataclass(frozen=True)
class Replay:
    """Repeats a recorded run: entry ``t`` drives window ``t``, the last one holds.

    The control for feedback: the schedule that a closed loop found, on another seed.

    Args:
        accumulation_steps: One entry a window, such as ``history.to_pandas()["accumulation_steps"]``.

    Raises:
        ValueError: If it is empty or an entry is not a whole number of at least 1.

    Example:
        >>> from adaptbatch.rules import decide
        >>> rule = Replay([2, 2, 4])
        >>> [decide(rule, Evidence(), Progress(window=t), Limits()).accumulation_steps for t in range(5)]
        [2, 2, 4, 4, 4]
    """

    accumulation_steps: Sequence[int]
    closed_loop: ClassVar[bool] = False
    memory: ClassVar[None] = None

    def __post_init__(self) -> None:
        steps = tuple(self.accumulation_steps)
        if not steps:
            raise ValueError("accumulation_steps must hold at least one entry, got none; Fixed(k) needs no recording.")
        # Frozen and comparable needs a tuple, eval(repr) needs plain ints.
        object.__setattr__(self, "accumulation_steps", _whole("accumulation_steps", steps))

    def decide(self, evidence: Evidence, progress: Progress, limits: Limits) -> Decision:
        """The recorded entry, within the limits."""
        return open_loop(
            self.accumulation_steps[min(progress.window, len(self.accumulation_steps) - 1)], progress, limits
        )


@dataclass(frozen=True)
class Ramp:
    """Batch warm-up from ``start`` to ``stop`` accumulation steps over the first ``examples`` examples.

    With ``u = min(examples_seen / examples, 1)``::

        linear       k = start + (stop - start) u
        exponential  k = start (stop / start)^u
        staircase    k = start (stop / start)^(floor(stairs u) / stairs)
        increments   k = start + increment floor(u (stop - start) / increment)

    rounded to the nearest whole step. ``start > stop`` ramps down. The last shape is Megatron-LM's
    ``--rampup-batch-size start increment examples``, in steps instead of examples.

    Args:
        start: ``k`` of the first window.
        stop: ``k`` from ``examples`` on.
        examples: Length of the ramp [examples].
        shape: ``"linear"``, ``"exponential"``, ``"staircase"`` or ``"increments"``.
        stairs: Number of equal treads below ``stop``; for the staircase only, and needed there.
        increment: Steps between two treads, a divisor of ``stop - start``; for the increments only, and needed there.

    Raises:
        ValueError: If an argument is out of range, missing, or given for another shape.

    Source:
        Shoeybi et al. 2019, arXiv:1909.08053 (Megatron-LM), whose code has the increments.

    Example:
        >>> ramp = Ramp(start=2, stop=16, examples=300_000, shape="staircase", stairs=3)
        >>> [round(ramp.steps(seen)) for seen in (0, 99_999, 100_000, 200_000, 300_000, 10**9)]
        [2, 2, 4, 8, 16, 16]
        >>> ramp = Ramp(start=2, stop=8, examples=300_000, shape="increments", increment=2)
        >>> [round(ramp.steps(seen)) for seen in (0, 99_999, 100_000, 200_000, 300_000, 10**9)]
        [2, 2, 4, 6, 8, 8]
    """

    start: int
    stop: int
    examples: float
    shape: Shape = "linear"
    stairs: int | None = None
    increment: int | None = None
    closed_loop: ClassVar[bool] = False
    memory: ClassVar[None] = None

    def __post_init__(self) -> None:
        require_steps("start", self.start)
        require_steps("stop", self.stop)
        require_positive("examples", self.examples, "Fixed(stop) is the ramp of no length")
        if self.shape not in get_args(Shape):
            raise ValueError(f"shape must be one of {get_args(Shape)}, got shape = {self.shape!r}.")
        self._require_only("stairs", self.stairs, "staircase")
        self._require_only("increment", self.increment, "increments")
        if self.increment is not None and (self.stop - self.start) % self.increment:
            raise ValueError(
                f"increment must divide stop - start, got increment = {self.increment!r} with start = {self.start!r}, "
                f"stop = {self.stop!r}; shape 'staircase' takes any number of treads."
            )
        in_python(self)

    def _require_only(self, name: str, value: int | None, shape: Shape) -> None:
        if (value is not None) != (self.shape == shape):
            raise ValueError(
                f"{name} must be given for shape {shape!r} and only there, got {name} = {value!r} with "
                f"shape = {self.shape!r}."
            )
        if value is not None:
            require_steps(name, value)

    def steps(self, examples_seen: float) -> float:
        """Unrounded accumulation steps after ``examples_seen`` examples."""
        u = min(examples_seen / self.examples, 1.0)
        if self.stairs is not None:
            u = _tread(u, self.stairs)
        if self.increment is not None and self.start != self.stop:
            u = _tread(u, abs(self.stop - self.start) // self.increment)
        if self.shape in ("linear", "increments"):
            return self.start + (self.stop - self.start) * u
        return float(self.start * (self.stop / self.start) ** u)

    def decide(self, evidence: Evidence, progress: Progress, limits: Limits) -> Decision:
        """The ramp at this many examples, within the limits."""
        return open_loop(self.steps(progress.examples_seen), progress, limits)


@dataclass(frozen=True)
class Schedule:
    """A table of sizes: ``accumulation_steps[i]`` from ``examples[i]`` examples on, until the next entry.

    Args:
        examples: Where each size begins [examples]: 0 first, then increasing.
        accumulation_steps: ``k`` from there on, one for each entry of ``examples``.

    Raises:
        ValueError: If the columns are empty, of unequal length, not increasing from 0, or hold a size below 1.

    Source:
        Merrill et al. 2025, arXiv:2505.23971 (batch warm-up in OLMo: doublings at given numbers of tokens).

    Example:
        >>> from adaptbatch.rules import decide
        >>> rule = Schedule(examples=(0, 1000, 5000), accumulation_steps=(2, 4, 8))
        >>> seen = (0, 999, 1000, 4999, 10**9)
        >>> [decide(rule, Evidence(), Progress(examples_seen=n), Limits()).accumulation_steps for n in seen]
        [2, 2, 4, 4, 8]
    """

    examples: Sequence[float]
    accumulation_steps: Sequence[int]
    closed_loop: ClassVar[bool] = False
    memory: ClassVar[None] = None

    def __post_init__(self) -> None:
        examples, steps = tuple(self.examples), tuple(self.accumulation_steps)
        if not len(examples) == len(steps) > 0:
            raise ValueError(
                f"examples and accumulation_steps must have one length of at least 1, got {len(examples)} and "
                f"{len(steps)} entries; each size needs the examples from which it holds."
            )
        if examples[0] != 0:
            raise ValueError(
                f"examples must begin with 0, got examples[0] = {examples[0]!r}; the first size holds from the start."
            )
        object.__setattr__(self, "examples", _increasing("examples", examples))
        object.__setattr__(self, "accumulation_steps", _whole("accumulation_steps", steps))

    def decide(self, evidence: Evidence, progress: Progress, limits: Limits) -> Decision:
        """The table's entry at this many examples, within the limits."""
        row = bisect_right(self.examples, progress.examples_seen) - 1
        return open_loop(self.accumulation_steps[row], progress, limits)


@dataclass(frozen=True)
class Seesaw:
    """Turns a decay of the learning rate into growth of the batch, half and half.

    Where a step schedule would multiply the rate by ``decay``, the rate is multiplied by ``sqrt(decay)`` and the batch
    by ``1 / decay``; with ``m`` milestones behind::

        k = start / decay^m,      lr = lr_start decay^(m / 2),      lr^2 k = lr_start^2 start

    Adam then lowers the loss with the examples as under the step schedule, in fewer steps. The rate is the caller's to
    apply: :meth:`lr_factor` of the examples that the loop has seen, in place of the step schedule.

    When it is wrong: above the critical batch size, where more examples no longer make up for fewer steps; where
    ``max_steps`` cuts the batch, which the rate does not know; for SGD without normalisation.

    Args:
        start: ``k`` before the first milestone.
        milestones: Where the step schedule would decay [examples]; increasing.
        decay: Its factor of the learning rate, in (0, 1).

    Raises:
        ValueError: If an argument is out of range, or there is no milestone.

    Source:
        Meterez et al. 2025, arXiv:2510.14717 (the form for Adam).

    Example:
        >>> rule = Seesaw(start=4, milestones=(1000, 2000), decay=0.25)
        >>> [(rule.steps(seen), rule.lr_factor(seen)) for seen in (0, 1000, 2000)]
        [(4.0, 1.0), (16.0, 0.5), (64.0, 0.25)]
    """

    start: int
    milestones: Sequence[float]
    decay: float = 0.5
    closed_loop: ClassVar[bool] = False
    memory: ClassVar[None] = None

    def __post_init__(self) -> None:
        require_steps("start", self.start)
        milestones = tuple(self.milestones)
        if not milestones:
            raise ValueError("milestones must hold at least one entry, got none; Fixed(start) has no milestones.")
        require_positive("milestones[0]", milestones[0], "start holds before it")
        require_fraction("decay", self.decay, "0.5 halves the rate and doubles the batch, as a pair")
        object.__setattr__(self, "milestones", _increasing("milestones", milestones))
        in_python(self)

    def steps(self, examples_seen: float) -> float:
        """Unrounded accumulation steps after ``examples_seen`` examples."""
        return float(self.start * self.decay ** -self._passed(examples_seen))

    def lr_factor(self, examples_seen: float) -> float:
        """What to multiply the first learning rate by after ``examples_seen`` examples."""
        return float(self.decay ** (0.5 * self._passed(examples_seen)))

    def _passed(self, examples_seen: float) -> int:
        return bisect_right(self.milestones, examples_seen)

    def decide(self, evidence: Evidence, progress: Progress, limits: Limits) -> Decision:
        """Its batch at this many examples, within the limits."""
        return open_loop(self.steps(progress.examples_seen), progress, limits)


def _tread(u: float, treads: int) -> float:
    # floor() of a rounded-down product would be one tread late at the exact edge.
    return math.floor(treads * u + 1e-9) / treads


def _whole(name: str, steps: Sequence[int]) -> tuple[int, ...]:
    for i, k in enumerate(steps):
        require_steps(f"{name}[{i}]", k)
    return tuple(int(k) for k in steps)


def _increasing(name: str, examples: Sequence[float]) -> tuple[float, ...]:
    for i in range(1, len(examples)):
        if not (examples[i - 1] < examples[i] < math.inf):
            raise ValueError(
                f"{name} must increase and be finite, got {name}[{i}] = {examples[i]!r} after {examples[i - 1]!r}."
            )
    return tuple(float(value) for value in examples)
