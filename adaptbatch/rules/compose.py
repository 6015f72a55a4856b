"""Rules from rules."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from adaptbatch.records import Decision, Evidence, Progress
from adaptbatch.rules.base import Limits, Rule


class Composable:
    """``rule | other`` is :class:`AnyOf` of both."""

    def __or__(self, other: Rule) -> AnyOf:
        if not isinstance(other, Rule):
            return NotImplemented
        return AnyOf((*_parts(self), *_parts(other)))


@dataclass(frozen=True)
class AnyOf(Composable):
    """Takes the largest batch that any of its rules wants: each keeps the error that it watches.

    ``RelativeStandardError() | StandardError(reference_batch=64)`` is quiet where noise is small beside the gradient,
    and awake where both burst. A smaller batch needs all of them to agree.

    When it is wrong: where one of its rules is; a rule that runs to the limits takes the others along.

    Args:
        rules: At least two closed-loop rules, that agree on their ``memory``: they see the same evidence.

    Raises:
        ValueError: If there are fewer than two, one is open-loop, or their memories differ.

    Example:
        >>> from adaptbatch import Pareto
        >>> from adaptbatch.rules import NoiseScale
        >>> NoiseScale() | Pareto(price=900)
        AnyOf(rules=(NoiseScale(memory=None), Pareto(price=900, memory=None)))
    """

    rules: tuple[Rule, ...]
    closed_loop: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if len(self.rules) < 2:
            raise ValueError(f"rules must be at least two, got rules = {self.rules!r}; one rule needs no other.")
        for rule in self.rules:
            if not (isinstance(rule, Rule) and rule.closed_loop):
                raise ValueError(
                    f"rules must be closed-loop rules, got {rule!r} among them; Limits(min_steps=...) is a fixed floor."
                )
        if len({rule.memory for rule in self.rules}) > 1:
            memories = [rule.memory for rule in self.rules]
            raise ValueError(f"rules must have the same memory, got {memories}; give each memory=... alike.")

    @property
    def memory(self) -> float | None:
        """That of all of them [examples]."""
        return self.rules[0].memory

    @property
    def pools(self) -> bool:
        """Whether all decide on pooled evidence."""
        return all(getattr(rule, "pools", False) for rule in self.rules)

    @property
    def keeps_gradients(self) -> bool:
        """Whether one of them needs the gradients of the micro-batches."""
        return any(getattr(rule, "keeps_gradients", False) for rule in self.rules)

    def decide(self, evidence: Evidence, progress: Progress, limits: Limits) -> Decision:
        """The decision with the most accumulation steps; the first of equal ones, with the largest target."""
        decisions = [rule.decide(evidence, progress, limits) for rule in self.rules]
        largest = max(decisions, key=lambda decision: decision.accumulation_steps)
        targets = [decision.target_batch for decision in decisions if not math.isnan(decision.target_batch)]
        return replace(largest, target_batch=max(targets, default=math.nan))


def _parts(rule: object) -> tuple[Rule, ...]:
    return rule.rules if isinstance(rule, AnyOf) else (rule,)  # type: ignore[return-value]
