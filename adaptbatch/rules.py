r"""How many accumulation steps the next window takes: rules as frozen values, limits, and one ``decide``.

The CLT rule keeps the standard error of the batch gradient at a chosen fraction of its length::

    sqrt(tr(Sigma) / n) <= theta |G|      <=>      n >= B / theta^2,      B = tr(Sigma) / |G|^2

and tests that line, one-sided, before it moves. Baselines are values of the same type. A rule sees finished windows
only: stopping inside a window would condition the gradient on its own noise. Floats only, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, get_args, runtime_checkable

from adaptbatch import noise
from adaptbatch.records import Decision, NoiseEstimate, Progress, Reason

Shape = Literal["linear", "exponential", "staircase"]

# Fewer effective windows than this are no evidence, whatever their variance says.
MIN_EFFECTIVE_WINDOWS = 8.0
# A shrink waits this many dead times: too small a batch can cost the run, too large a one costs examples.
SHRINK_DWELL = 3.0


@dataclass(frozen=True)
class Limits:
    """Bounds on the accumulation steps and on how fast they move.

    Args:
        min_steps: Smallest ``k``; None is the smallest that can be measured: 2 for a closed-loop rule on one rank
            without ghost norms, else 1.
        max_steps: Largest ``k``.
        max_growth: Largest factor of one growth; at least one step is always allowed.
        max_shrink: Smallest factor of one shrink.

    ``max_growth`` and ``max_shrink`` bind closed-loop rules only; an open-loop rule says itself how fast it moves.

    Raises:
        ValueError: If a bound is out of range or ``min_steps > max_steps``.

    Example:
        >>> Limits(max_steps=128).resolve(RelativeStandardError(), world_size=1).min_steps
        2
    """

    min_steps: int | None = None
    max_steps: int = 64
    max_growth: float = 2.0
    max_shrink: float = 0.8

    def __post_init__(self) -> None:
        if self.min_steps is not None:
            _require_steps("min_steps", self.min_steps)
        _require_steps("max_steps", self.max_steps)
        if self.min_steps is not None and self.min_steps > self.max_steps:
            raise ValueError(
                f"min_steps must not exceed max_steps, got min_steps = {self.min_steps}, max_steps = {self.max_steps}."
            )
        if not (self.max_growth > 1.0 and math.isfinite(self.max_growth)):
            raise ValueError(
                f"max_growth must be finite and above 1, got max_growth = {self.max_growth!r}; 2.0 doubles."
            )
        if not 0.0 < self.max_shrink < 1.0:
            raise ValueError(f"max_shrink must be in (0, 1), got max_shrink = {self.max_shrink!r}; 0.8 is usual.")

    def resolve(self, rule: Rule, world_size: int, by_example: bool = False) -> Limits:
        """These limits with ``min_steps`` filled in for ``rule``.

        Raises:
            ValueError: If a closed-loop rule is given ``min_steps=1`` where one step holds no evidence of noise, or
                ``max_steps`` leaves it no room.
        """
        smallest = 2 if rule.closed_loop and world_size == 1 and not by_example else 1
        if self.max_steps < smallest or (self.min_steps is not None and self.min_steps < smallest):
            name = "max_steps" if self.max_steps < smallest else "min_steps"
            raise ValueError(
                f"{name} must be at least {smallest} for {type(rule).__name__} on one rank, got {name} = 1: a single "
                f"micro-batch says nothing about its noise. Use Limits(min_steps=None) with max_steps >= 2, split the "
                f"micro-batch in two, or measure its examples with ghost=True."
            )
        return self if self.min_steps is not None else replace(self, min_steps=smallest)

    @property
    def lower(self) -> int:
        """``min_steps``, or 1 while it is None."""
        return 1 if self.min_steps is None else self.min_steps

    def clamp(self, steps: float) -> int:
        """``steps`` within the bounds; infinity is the upper one."""
        return int(min(max(steps, self.lower), self.max_steps))


@runtime_checkable
class Rule(Protocol):
    """A pure, frozen value that turns evidence and progress into a decision.

    ``closed_loop`` says whether the rule reads the noise (and so needs windows that can be measured); ``memory`` is the
    half-life of the evidence it wants [examples], None for the default of :func:`adaptbatch.noise.memory_examples`.
    """

    @property
    def closed_loop(self) -> bool: ...

    @property
    def memory(self) -> float | None: ...

    def decide(self, evidence: NoiseEstimate, progress: Progress, limits: Limits) -> Decision:
        """The next window's size; ``limits`` are resolved."""
        ...


def decide(rule: Rule, evidence: NoiseEstimate, progress: Progress, limits: Limits) -> Decision:
    """The decision for the next window: the rule's, always inside the limits.

    Args:
        rule: Any :class:`Rule`.
        evidence: Pooled estimate from finished windows.
        progress: Where the training stands.
        limits: Bounds; ``min_steps=None`` is resolved for ``rule`` and ``progress.world_size``.

    Returns:
        A decision whose ``accumulation_steps`` lie in ``[min_steps, max_steps]``. After a window with non-finite
        gradients the reason is ``nonfinite`` and a closed-loop rule keeps its size.

    Example:
        >>> noisy = NoiseEstimate(1.0, 4096.0, 1e-4, 100.0, 0.0, effective_windows=30)
        >>> decide(RelativeStandardError(), noisy, Progress(accumulation_steps=4, cell_examples=64), Limits())
        Decision(accumulation_steps=8, target_batch=4096.0, reason='growth_limited')
    """
    limits = limits.resolve(rule, progress.world_size, progress.by_example)
    # Limits may have changed under way: the rule decides from a size that they allow.
    progress = replace(progress, accumulation_steps=limits.clamp(progress.accumulation_steps))
    if not progress.finite and rule.closed_loop:
        return Decision(progress.accumulation_steps, math.nan, "nonfinite")
    decision = rule.decide(evidence, progress, limits)
    steps = limits.clamp(decision.accumulation_steps)
    reason: Reason = decision.reason
    if steps != decision.accumulation_steps:
        reason = "at_max" if decision.accumulation_steps > limits.max_steps else "at_min"
    return replace(decision, accumulation_steps=steps, reason=reason if progress.finite else "nonfinite")


@dataclass(frozen=True)
class RelativeStandardError:
    """Keeps the relative standard error of the batch gradient at ``theta`` (the CLT rule, a two-sided norm test).

    Tests the linear statistic ``D(n) = phi(n) tr(Sigma) - theta^2 |G|^2``, unbiased where the ratio ``B`` is not::

        grow    if D(n)  >  z_grow   SE(D(n))    at the present size n
        shrink  if D(n') < -z_shrink SE(D(n'))   at the smaller size n' it would go to

    A shrink therefore lands where the same data already say "still quiet enough", which is the hysteresis. After every
    change it waits ``dead_time`` examples, three times that before it shrinks; it moves at most by the factors of
    :class:`Limits`.

    When it is wrong: at the noise floor of a fixed learning rate ``B / n`` does not depend on ``n``, and the rule runs
    to ``max_steps``; where a few catastrophic steps carry the pooled variance, it stays ``undecided``; signal-to-noise
    is not stability.

    Args:
        theta: Wanted ``sqrt(tr(Sigma) / n) / |G|`` [1]; 1 is the knee where steps and examples both cost twice their
            minimum, 0.5 is four times the batch.
        memory: Half-life of the evidence [examples]; None: ``max(1000 b, 10 n)``.
        dead_time: Examples to wait after a change; None: half the memory.
        z_grow: Standard errors of evidence a growth needs.
        z_shrink: Standard errors of evidence a shrink needs.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Byrd, Chin, Nocedal & Wu 2012 (norm test); McCandlish et al. 2018, arXiv:1812.06162 (noise scale).

    Example:
        >>> RelativeStandardError(theta=0.5).memory is None
        True
    """

    theta: float = 1.0
    memory: float | None = None
    dead_time: float | None = None
    z_grow: float = 2.33
    z_shrink: float = 3.0
    closed_loop: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_positive("theta", self.theta, "1.0 lets the error equal the gradient's length")
        if self.memory is not None:
            _require_positive("memory", self.memory, "None takes max(1000 b, 10 n) examples")
        if self.dead_time is not None and not (self.dead_time >= 0.0 and math.isfinite(self.dead_time)):
            raise ValueError(
                f"dead_time must be finite and not negative, got dead_time = {self.dead_time!r}; None takes memory / 2."
            )
        for name, value in (("z_grow", self.z_grow), ("z_shrink", self.z_shrink)):
            if not (value >= 0.0 and math.isfinite(value)):
                raise ValueError(f"{name} must be finite and not negative, got {name} = {value!r}; 2.33 is one in 100.")

    def decide(self, evidence: NoiseEstimate, progress: Progress, limits: Limits) -> Decision:
        """See the class; the reason tells which test or bound decided."""
        k, batch = progress.accumulation_steps, progress.global_batch
        target = noise.required_batch(evidence, self.theta, progress.population)
        wait = self._dead_examples(progress)
        if not evidence.effective_windows >= MIN_EFFECTIVE_WINDOWS or progress.examples_since_change < wait:
            return Decision(k, target, "undecided")
        wanted = math.ceil(target / progress.step_examples) if math.isfinite(target) else math.inf
        if self._noisy(evidence, batch, progress.population):
            steps, reason = _growth(k, wanted, limits)
            lost = evidence.grad_sq_norm <= 0.0 and reason != "at_max"
            return Decision(steps, target, "signal_lost" if lost else reason)
        if wanted > k:
            return Decision(k, target, "undecided")
        if k <= limits.lower:
            return Decision(k, target, "at_min" if wanted < limits.lower else "hold")
        smaller = int(max(limits.lower, wanted, math.floor(limits.max_shrink * k)))
        ready = progress.examples_since_change >= SHRINK_DWELL * wait
        if smaller < k and ready and self._quiet(evidence, smaller * progress.step_examples, progress.population):
            return Decision(smaller, target, "at_min" if wanted < smaller == limits.lower else "shrink")
        return Decision(k, target, "hold")

    # The seam of the second channel: whatever says "too noisy" or "quiet enough" at a size stands in these two.
    def _noisy(self, evidence: NoiseEstimate, batch: float, population: float) -> bool:
        excess, error = noise.excess_error(evidence, batch, self.theta, population)
        # A batch of the whole population has no error left to halve.
        return excess > self.z_grow * error and batch < population

    def _quiet(self, evidence: NoiseEstimate, batch: float, population: float) -> bool:
        excess, error = noise.excess_error(evidence, batch, self.theta, population)
        return excess < -self.z_shrink * error

    def _dead_examples(self, progress: Progress) -> float:
        if self.dead_time is not None:
            return self.dead_time
        return 0.5 * noise.memory_examples(self.memory, progress.cell_examples, progress.global_batch)


@dataclass(frozen=True)
class Fixed:
    """Always ``accumulation_steps``: the constant baseline.

    Example:
        >>> decide(Fixed(4), NoiseEstimate(1.0, 1.0), Progress(accumulation_steps=4, cell_examples=64), Limits())
        Decision(accumulation_steps=4, target_batch=256.0, reason='hold')
    """

    accumulation_steps: int
    closed_loop: ClassVar[bool] = False
    memory: ClassVar[None] = None

    def __post_init__(self) -> None:
        _require_steps("accumulation_steps", self.accumulation_steps)

    def decide(self, evidence: NoiseEstimate, progress: Progress, limits: Limits) -> Decision:
        """Its number, within the limits."""
        return _open_loop(self.accumulation_steps, progress, limits)


@dataclass(frozen=True)
class Replay:
    """Repeats a recorded run: entry ``t`` drives window ``t``, the last one holds.

    The control for feedback: the schedule that a closed loop found, on another seed.

    Args:
        accumulation_steps: One entry a window, such as ``history.to_pandas()["accumulation_steps"]``.

    Example:
        >>> rule = Replay([2, 2, 4])
        >>> [decide(rule, NoiseEstimate(1.0, 1.0), Progress(window=t), Limits()).accumulation_steps for t in range(5)]
        [2, 2, 4, 4, 4]
    """

    accumulation_steps: Sequence[int]
    closed_loop: ClassVar[bool] = False
    memory: ClassVar[None] = None

    def __post_init__(self) -> None:
        steps = tuple(self.accumulation_steps)
        if not steps:
            raise ValueError("accumulation_steps must hold at least one entry, got none; Fixed(k) needs no recording.")
        for t, k in enumerate(steps):
            _require_steps(f"accumulation_steps[{t}]", k)
        # Frozen and comparable needs a tuple, eval(repr) needs plain ints.
        object.__setattr__(self, "accumulation_steps", tuple(int(k) for k in steps))

    def decide(self, evidence: NoiseEstimate, progress: Progress, limits: Limits) -> Decision:
        """The recorded entry, within the limits."""
        return _open_loop(
            self.accumulation_steps[min(progress.window, len(self.accumulation_steps) - 1)], progress, limits
        )


@dataclass(frozen=True)
class Ramp:
    """Batch warm-up from ``start`` to ``stop`` accumulation steps over the first ``examples`` examples.

    With ``u = min(examples_seen / examples, 1)``::

        linear       k = start + (stop - start) u
        exponential  k = start (stop / start)^u
        staircase    k = start (stop / start)^(floor(stairs u) / stairs)

    rounded to the nearest whole step. ``start > stop`` ramps down.

    Args:
        start: ``k`` of the first window.
        stop: ``k`` from ``examples`` on.
        examples: Length of the ramp [examples].
        shape: ``"linear"``, ``"exponential"`` or ``"staircase"``.
        stairs: Number of equal treads below ``stop``; for the staircase only, and needed there.

    Raises:
        ValueError: If an argument is out of range or missing.

    Example:
        >>> ramp = Ramp(start=2, stop=16, examples=300_000, shape="staircase", stairs=3)
        >>> [round(ramp.steps(seen)) for seen in (0, 99_999, 100_000, 200_000, 300_000, 10**9)]
        [2, 2, 4, 8, 16, 16]
    """

    start: int
    stop: int
    examples: float
    shape: Shape = "linear"
    stairs: int | None = None
    closed_loop: ClassVar[bool] = False
    memory: ClassVar[None] = None

    def __post_init__(self) -> None:
        _require_steps("start", self.start)
        _require_steps("stop", self.stop)
        _require_positive("examples", self.examples, "Fixed(stop) is the ramp of no length")
        if self.shape not in get_args(Shape):
            raise ValueError(f"shape must be one of {get_args(Shape)}, got shape = {self.shape!r}.")
        if (self.stairs is not None) != (self.shape == "staircase"):
            raise ValueError(
                f"stairs must be given for shape 'staircase' and only there, got stairs = {self.stairs!r} with "
                f"shape = {self.shape!r}."
            )
        if self.stairs is not None:
            _require_steps("stairs", self.stairs)

    def steps(self, examples_seen: float) -> float:
        """Unrounded accumulation steps after ``examples_seen`` examples."""
        u = min(examples_seen / self.examples, 1.0)
        if self.shape == "linear":
            return self.start + (self.stop - self.start) * u
        if self.stairs is not None:
            # floor() of a rounded-down product would be one tread late at the exact edge.
            u = math.floor(self.stairs * u + 1e-9) / self.stairs
        return float(self.start * (self.stop / self.start) ** u)

    def decide(self, evidence: NoiseEstimate, progress: Progress, limits: Limits) -> Decision:
        """The ramp at this many examples, within the limits."""
        return _open_loop(self.steps(progress.examples_seen), progress, limits)


def _growth(k: int, wanted: float, limits: Limits) -> tuple[int, Reason]:
    """The size on the way to ``wanted`` that the limits allow in one move, at least one step up."""
    steps = max(k + 1, min(wanted, math.ceil(limits.max_growth * k)))
    if steps > limits.max_steps:
        return limits.max_steps, "at_max"
    return int(steps), "growth_limited" if wanted > steps else "grow"


def _open_loop(steps: float, progress: Progress, limits: Limits) -> Decision:
    """A decision that no evidence enters: bounded by the limits' sizes, not by their speeds."""
    wanted, k = math.floor(steps + 0.5), progress.accumulation_steps
    target = float(steps * progress.step_examples)
    if wanted != limits.clamp(wanted):
        return Decision(limits.clamp(wanted), target, "at_max" if wanted > limits.max_steps else "at_min")
    return Decision(wanted, target, "hold" if wanted == k else "grow" if wanted > k else "shrink")


def _require_steps(name: str, value: object) -> None:
    # numpy's integers have __index__, floats and bools are refused.
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value.__index__()) < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {name} = {value!r}.")


def _require_positive(name: str, value: float, way_out: str) -> None:
    if not (value > 0.0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {name} = {value!r}; {way_out}.")
