"""Why ``k`` is what it is, in three sentences for a person. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adaptbatch import estimate
from adaptbatch.records import Decision, Evidence, Progress
from adaptbatch.rules import Limits, Rule
from adaptbatch.state import State

if TYPE_CHECKING:
    import pandas as pd

# Windows that the third sentence looks back on.
RECENT = 100

_WHY = {
    "hold": "the error is within what the rule wants at this size, and a smaller one is not proven to be enough",
    "grow": "the evidence says that this size is too noisy, and the next one is enough",
    "shrink": "the evidence says that the next smaller size is still quiet enough",
    "at_max": "the rule wants more and max_steps does not allow it",
    "at_min": "the rule wants less and min_steps does not allow it",
    "growth_limited": "the target is farther than max_growth allows in one move",
    "undecided": "the evidence does not tell yet, or the dead time after a change is not over",
    "signal_lost": "the squared length of the gradient cannot be told from zero",
    "noise_floor": "the noise scale rises with the batch and no size is ever enough: lower the learning rate",
    "nonfinite": "the last window had no finite gradient",
    "guard": "gradients a hundred times longer than usual, or not finite, were seen at half this size or more",
}


# Of a rule that reads no evidence.
_WHY_OPEN = {
    "hold": "it keeps its size",
    "grow": "it goes up, whatever the noise",
    "shrink": "it goes down, whatever the noise",
}


def explain(
    rule: Rule,
    state: State,
    decision: Decision,
    limits: Limits,
    rows: pd.DataFrame,
    asks_metric: bool = False,
    unit: str = "examples",
) -> str:
    """Three sentences: what was measured, what was decided and why, what to be careful about.

    Args:
        rule: That decided.
        state: After its decision.
        decision: For the next window.
        limits: It kept within.
        rows: The history, for the share of windows at the limits.
        asks_metric: Whether the optimizer's metric was asked for.
        unit: What weights count.

    Example:
        >>> import pandas as pd
        >>> from adaptbatch import Fixed
        >>> state = State(Progress(accumulation_steps=2, micro_batch_examples=64.0))
        >>> text = explain(Fixed(2), state, Decision(2, 128.0, "hold"), Limits(1), pd.DataFrame())
        >>> print(text.split(". ")[0])
        No window has told anything about the noise yet
    """
    evidence, progress = state.evidence(), state.progress
    cold = asks_metric and state.metric.weight == 0.0
    parts = (
        _measured(evidence, progress, unit),
        _decided(rule, decision, progress, unit),
        _careful(evidence, limits, rows, state.shards, cold, unit),
    )
    return " ".join(parts)


def _measured(evidence: Evidence, progress: Progress, unit: str) -> str:
    pooled, typical = evidence.pooled, evidence.typical
    if not pooled.effective_windows > 0.0:
        return "No window has told anything about the noise yet."
    low, high = estimate.noise_scale_interval(pooled)
    text = (
        f"After {progress.examples_seen:,.0f} {unit} the noise scale is {_size(estimate.noise_scale(pooled))} "
        f"(95 %: {_size(low)} to {_size(high)})"
    )
    if typical.effective_windows > 0.0:
        text += f", that of an ordinary window {_size(estimate.noise_scale(typical))}"
    decisive = typical if typical.effective_windows > 0.0 else pooled
    error = estimate.relative_error(decisive, progress.global_batch, progress.population)
    return f"{text}, and a batch of {_size(progress.global_batch)} has a relative standard error of {error:.2f}."


def _decided(rule: Rule, decision: Decision, progress: Progress, unit: str) -> str:
    words = _WHY if rule.closed_loop else _WHY | _WHY_OPEN
    # A rule of one's own may have a word of its own.
    why = f": {words[decision.reason]}" if decision.reason in words else ""
    return (
        f"{type(rule).__name__} takes {progress.accumulation_steps} micro-batches (target "
        f"{_size(decision.target_batch)} {unit}, reason {decision.reason}){why}."
    )


def _careful(
    evidence: Evidence, limits: Limits, rows: pd.DataFrame, shards: estimate.ShardTracker, cold_metric: bool, unit: str
) -> str:
    cautions = []
    if cold_metric:
        cautions.append(
            "the decision is Euclidean as yet: some parameter's second moment is not warm, or never will be since it "
            "gets no gradient"
        )
    recent = rows.tail(RECENT)
    if len(recent):
        for name, bound in (("max_steps", limits.max_steps), ("min_steps", limits.lower)):
            share = float((recent["accumulation_steps"] == bound).mean())
            if share > 0.5:
                cautions.append(f"{share:.0%} of the last {len(recent)} windows stood at {name} = {bound}")
    if math.isinf(estimate.noise_scale_interval(evidence.pooled)[1]):
        cautions.append("the evidence does not tell the gradient's length from zero")
    if evidence.tail.share > 0.5:
        cautions.append(f"{evidence.tail.share:.0%} of the pooled variance sits in windows far above the usual one")
    if math.isfinite(evidence.tail.episode_examples):
        ago = evidence.tail.episode_examples
        cautions.append(f"the last gradient a hundred times longer than usual came {ago:,.0f} {unit} ago")
    if evidence.response.consecutive < -2.0:
        cautions.append("consecutive gradients point against each other, as at a noise floor")
    if shards.chance() < 0.01:
        cautions.append(
            f"the ranks' data differ: their means scatter {shards.ratio():.1f} times as much as one source's"
        )
    return f"Mind that {'; '.join(cautions)}." if cautions else "Nothing speaks against it."


def _size(examples: float) -> str:
    if math.isnan(examples):
        return "unknown"
    return "unbounded" if math.isinf(examples) else f"{examples:,.0f}"
