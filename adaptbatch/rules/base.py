"""What every rule is and obeys: the protocol, the limits, and one ``decide`` that no rule gets around."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from adaptbatch.estimate.listening import Listen
from adaptbatch.records import Decision, Evidence, Progress, Reason


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
        >>> from adaptbatch import RelativeStandardError
        >>> Limits(max_steps=128).resolve(RelativeStandardError(), world_size=1).min_steps
        2
    """

    min_steps: int | None = None
    max_steps: int = 64
    max_growth: float = 2.0
    max_shrink: float = 0.8

    def __post_init__(self) -> None:
        if self.min_steps is not None:
            require_steps("min_steps", self.min_steps)
        require_steps("max_steps", self.max_steps)
        if self.min_steps is not None and self.min_steps > self.max_steps:
            raise ValueError(
                f"min_steps must not exceed max_steps, got min_steps = {self.min_steps}, max_steps = {self.max_steps}; "
                f"min_steps=None is the smallest that can be measured."
            )
        if not (isinstance(self.max_growth, Real) and self.max_growth > 1.0 and math.isfinite(self.max_growth)):
            raise ValueError(
                f"max_growth must be finite and above 1, got max_growth = {self.max_growth!r}; 2.0 doubles."
            )
        require_fraction("max_shrink", self.max_shrink, "0.8 is usual")

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
    half-life of the evidence it wants [examples], None for the default of :func:`adaptbatch.estimate.memory_examples`.

    A rule may also have ``pools = True``: it decides on pooled moments, so that some windows may go unmeasured; and
    ``keeps_gradients = True``: it needs ``radial_sq_norms`` of a
    :class:`~adaptbatch.records.Measurement`.
    """

    @property
    def closed_loop(self) -> bool: ...

    @property
    def memory(self) -> float | None: ...

    def decide(self, evidence: Evidence, progress: Progress, limits: Limits) -> Decision:
        """The next window's size; ``limits`` are resolved."""
        ...


class Reaction(Protocol):
    """What may overrule a decision upwards: :class:`adaptbatch.rules.guard.Guard`."""

    def react(
        self, decision: Decision, evidence: Evidence, progress: Progress, limits: Limits, memory: float | None
    ) -> Decision: ...


def resolve_listen(listen: Listen, rule: Rule, whole: str = "") -> Listen:
    """How many windows are measured for ``rule``: with ``"auto"`` all, where it does not decide on pooled moments.

    Args:
        listen: As the user gave it.
        rule: That decides.
        whole: What else wants every window, as ``"guard"``.

    Raises:
        ValueError: If ``listen`` is no share, or leaves out windows that are asked for.

    Example:
        >>> from adaptbatch.rules import Fixed, Pareto
        >>> resolve_listen("auto", Pareto(price=100.0)), resolve_listen("auto", Fixed(2)), resolve_listen(0.5, Fixed(2))
        ('auto', 1.0, 0.5)
    """
    pools = bool(getattr(rule, "pools", False))
    if listen == "auto":
        return "auto" if pools and not whole else 1.0
    known = isinstance(listen, Real) and not isinstance(listen, bool)
    if not (known and 0.0 < listen <= 1.0):
        raise ValueError(f"listen must be 'auto' or a share of windows in (0, 1], got listen = {listen!r}.")
    asks = whole or ("" if pools or not rule.closed_loop else type(rule).__name__)
    if asks and listen < 1.0:
        raise ValueError(
            f"listen must be 'auto' or 1.0 with {asks}, which looks at single windows, got listen = {listen!r}."
        )
    return float(listen)


def decide(
    rule: Rule, evidence: Evidence, progress: Progress, limits: Limits, guard: Reaction | None = None
) -> Decision:
    """The decision for the next window: the rule's, always inside the limits.

    Args:
        rule: Any :class:`Rule`.
        evidence: What finished windows tell.
        progress: Where the training stands.
        limits: Bounds; ``min_steps=None`` is resolved for ``rule`` and ``progress.world_size``.
        guard: Overrules the rule upwards, after exceedances and non-finite gradients.

    Returns:
        A decision whose ``accumulation_steps`` lie in ``[min_steps, max_steps]``. After a window with non-finite
        gradients the reason is ``nonfinite`` and a closed-loop rule keeps its size.

    Example:
        >>> from adaptbatch import RelativeStandardError
        >>> from adaptbatch.records import NoiseEstimate
        >>> noisy = Evidence(typical=NoiseEstimate(1.0, 4096.0, 1e-4, 100.0, 0.0, effective_windows=30))
        >>> decide(RelativeStandardError(), noisy, Progress(accumulation_steps=4, micro_batch_examples=64), Limits())
        Decision(accumulation_steps=8, target_batch=4096.0, reason='growth_limited')
    """
    limits = limits.resolve(rule, progress.world_size, progress.by_example)
    # Limits may have changed under way: the rule decides from a size that they allow.
    allowed = limits.clamp(progress.accumulation_steps)
    if allowed != progress.accumulation_steps:
        progress = replace(progress, accumulation_steps=allowed)
    if not progress.finite and rule.closed_loop:
        decision = Decision(progress.accumulation_steps, math.nan, "nonfinite")
    else:
        decision = rule.decide(evidence, progress, limits)
        _require_decision(rule, decision)
    if guard is not None:
        decision = guard.react(decision, evidence, progress, limits, rule.memory)
    steps = limits.clamp(decision.accumulation_steps)
    reason: Reason = decision.reason
    if steps != decision.accumulation_steps:
        reason = "at_max" if decision.accumulation_steps > limits.max_steps else "at_min"
    if not progress.finite and reason != "guard":
        reason = "nonfinite"
    return Decision(steps, decision.target_batch, reason)


def _require_decision(rule: Rule, decision: object) -> None:
    """Refuse what a rule of one's own may have decided in error."""
    steps = decision.accumulation_steps if isinstance(decision, Decision) else math.nan
    if not (isinstance(steps, Real) and not math.isnan(steps)):
        raise TypeError(
            f"{type(rule).__name__}.decide() must return a Decision with a number of accumulation steps, got "
            f"{decision!r}; Decision(4, target_batch, 'hold')."
        )


def growth(k: int, wanted: float, limits: Limits) -> tuple[int, Reason]:
    """The size on the way to ``wanted`` that the limits allow in one move, at least one step up."""
    steps = max(k + 1, min(wanted, math.ceil(limits.max_growth * k)))
    if steps > limits.max_steps:
        return limits.max_steps, "at_max"
    return int(steps), "growth_limited" if wanted > steps else "grow"


def towards(target: float, progress: Progress, limits: Limits, *, lost: bool = False, shrinks: bool = True) -> Decision:
    """One move within the limits towards a batch of ``target`` examples, rounded up to whole steps.

    Args:
        target: Wanted batch [examples]; infinite for as many as there are, NaN for unknown, which is ``undecided``.
        progress: Where the training stands.
        limits: Resolved limits.
        lost: Whether the target rests on a gradient that is not above zero: such a growth is ``signal_lost``.
        shrinks: Whether a smaller target is followed; else it is ``hold``.

    Example:
        >>> at = Progress(accumulation_steps=10, micro_batch_examples=64)
        >>> for batch in (5000, 700, 640, 600, 100):
        ...     print(towards(batch, at, Limits(max_steps=128)))
        Decision(accumulation_steps=20, target_batch=5000.0, reason='growth_limited')
        Decision(accumulation_steps=11, target_batch=700.0, reason='grow')
        Decision(accumulation_steps=10, target_batch=640.0, reason='hold')
        Decision(accumulation_steps=10, target_batch=600.0, reason='hold')
        Decision(accumulation_steps=8, target_batch=100.0, reason='shrink')
    """
    k, target = progress.accumulation_steps, float(min(target, progress.population))
    if math.isnan(target) or not progress.step_examples > 0.0:
        return Decision(k, target, "undecided")
    # Whole steps, written as examples, must come back as the same steps.
    wanted = math.ceil(target / progress.step_examples - 1e-9) if math.isfinite(target) else math.inf
    if wanted > k:
        steps, reason = growth(k, wanted, limits)
        return Decision(steps, target, "signal_lost" if lost and reason != "at_max" else reason)
    if wanted == k or not shrinks:
        return Decision(k, target, "hold")
    smaller = int(max(limits.lower, wanted, math.floor(limits.max_shrink * k)))
    return Decision(smaller, target, "at_min" if wanted < smaller == limits.lower else "shrink")


def hold(progress: Progress) -> Decision:
    """A decision to stay, of a rule that wants the present batch."""
    return Decision(progress.accumulation_steps, float(min(progress.global_batch, progress.population)), "hold")


def open_loop(steps: float, progress: Progress, limits: Limits) -> Decision:
    """A decision that no evidence enters: bounded by the limits' sizes, not by their speeds."""
    wanted, k = math.floor(steps + 0.5), progress.accumulation_steps
    target = float(min(steps * progress.step_examples, progress.population))
    if wanted != limits.clamp(wanted):
        return Decision(limits.clamp(wanted), target, "at_max" if wanted > limits.max_steps else "at_min")
    return Decision(wanted, target, "hold" if wanted == k else "grow" if wanted > k else "shrink")


def require_steps(name: str, value: object) -> None:
    """Refuse what is no number of accumulation steps."""
    # numpy's integers have __index__, floats and bools are refused.
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value.__index__()) < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {name} = {value!r}; 1 is the plain loop.")


def require_positive(name: str, value: float, way_out: str) -> None:
    """Refuse what is no positive, finite number."""
    if not (isinstance(value, Real) and value > 0.0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {name} = {value!r}; {way_out}.")


def require_fraction(name: str, value: float, way_out: str) -> None:
    """Refuse what is no number between 0 and 1."""
    if not (isinstance(value, Real) and 0.0 < value < 1.0):
        raise ValueError(f"{name} must be in (0, 1), got {name} = {value!r}; {way_out}.")


def require_memory(value: float | None) -> None:
    """Refuse what is no half-life in examples; None is the default's."""
    if value is not None:
        require_positive("memory", value, "None takes max(500 b, 10 n) examples")


def in_python(rule: Any) -> None:
    """Replace numpy's scalars in a frozen rule by Python's, whose ``repr`` evaluates and whose results are floats."""
    for item in fields(rule):
        value = getattr(rule, item.name)
        if hasattr(value, "item"):
            object.__setattr__(rule, item.name, value.item())
