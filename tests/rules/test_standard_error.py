"""The absolute rule and the composition of rules: against the equation, on bursts, within limits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import adaptbatch as ab
from adaptbatch import estimate
from adaptbatch.records import Decision, Evidence, NoiseEstimate, Progress
from adaptbatch.rules import AnyOf, NoiseScale, decide

AT = Progress(accumulation_steps=4, micro_batch_examples=64, examples_since_change=1e6)
WIDE = ab.Limits(min_steps=2, max_steps=10_000, max_growth=1e6, max_shrink=1e-6)


def pooled(trace: float, windows: float = 20.0, variance: float = 0.0, level: float = math.nan) -> Evidence:
    pair = NoiseEstimate(1.0, trace, 0.1, variance, 0.0, 100.0, windows)
    return Evidence(pooled=pair, typical=NoiseEstimate(1.0, 50.0), level=level)


class TestStandardError:
    @given(trace=st.floats(1.0, 1e9), target=st.floats(1e-2, 1e3))
    @example(trace=32.0, target=0.5)  # a micro-batch less is exactly enough
    def test_the_batch_has_the_wanted_error_and_one_micro_batch_less_has_not(self, trace: float, target: float):
        decision = decide(ab.StandardError(target=target), pooled(trace), AT, WIDE)
        steps = decision.accumulation_steps
        if 2 < steps < WIDE.max_steps:
            assert math.sqrt(trace / (64 * steps)) <= target * (1 + 1e-6)
            assert math.sqrt(trace / (64 * (steps - 1))) > target * (1 - 1e-6)

    def test_a_reference_batch_is_what_it_takes_in_ordinary_windows(self):
        """The ordinary trace is 50 levels: pooled windows like it ask for the reference, a burst for its multiple."""
        rule = ab.StandardError(reference_batch=256)
        calm = decide(rule, pooled(50.0 * 3.0, level=3.0), AT, WIDE)
        burst = decide(rule, pooled(50.0 * 3.0 * 8, level=3.0), AT, WIDE)
        assert (calm.accumulation_steps, calm.target_batch) == (4, pytest.approx(256.0))
        assert (burst.accumulation_steps, burst.reason) == (32, "grow")

    def test_it_does_not_look_at_the_gradient(self):
        for length in (1e-9, 1.0, 1e9):
            evidence = pooled(6400.0)
            evidence = replace(evidence, pooled=replace(evidence.pooled, grad_sq_norm=length))
            assert decide(ab.StandardError(target=4.0), evidence, AT, WIDE).target_batch == pytest.approx(400.0)

    @pytest.mark.parametrize(("start", "steps", "reason"), [("max", 64, "at_max"), ("min", 4, "undecided")])
    def test_what_is_not_known_opens_with_the_largest_window(self, start, steps, reason):
        rule = ab.StandardError(reference_batch=256, start=start)
        for evidence in (Evidence(), pooled(100.0, windows=2.0, level=3.0), pooled(100.0)):
            decision = decide(rule, evidence, AT, ab.Limits())
            assert (decision.accumulation_steps, decision.reason) == (steps, reason)
            later = decide(rule, evidence, replace(AT, window=3), ab.Limits())
            assert (later.accumulation_steps, later.reason) == (4, "undecided")

    def test_a_move_needs_the_evidence_that_was_asked_for(self):
        rule = ab.StandardError(target=4.0, z_grow=2.33, z_shrink=3.0, dead_time=1e5)
        weak = pooled(6400.0, variance=6400.0**2)
        assert decide(rule, weak, AT, WIDE).reason == "undecided"
        assert decide(rule, pooled(6400.0, variance=1.0), AT, WIDE).reason == "grow"
        small = pooled(3000.0, variance=1.0)
        assert decide(rule, small, AT, WIDE).reason == "shrink"
        assert decide(rule, small, replace(AT, examples_since_change=1e3), WIDE).reason == "undecided"

    def test_no_noise_is_the_smallest_batch(self):
        for trace in (0.0, -5.0):
            assert decide(ab.StandardError(target=1.0), pooled(trace), AT, ab.Limits()).accumulation_steps == 3

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, r"exactly one of target and reference_batch must be given, got target = None, reference_batch = None"),
            ({"target": 1.0, "reference_batch": 2.0}, r"exactly one of target and reference_batch must be given"),
            ({"target": 0.0}, r"target must be positive and finite, got target = 0\.0"),
            ({"reference_batch": math.inf}, r"reference_batch must be positive and finite, got reference_batch = inf"),
            ({"target": 1.0, "memory": -1.0}, r"memory must be .* got memory = -1\.0"),
            ({"target": 1.0, "dead_time": -1.0}, r"dead_time must be finite and not negative, got dead_time = -1\.0"),
            ({"target": 1.0, "z_grow": math.nan}, r"z_grow must be finite and not negative, got z_grow = nan"),
            ({"target": 1.0, "start": "middle"}, r"start must be one of \('max', 'min'\), got start = 'middle'"),
        ],
        ids=str,
    )
    def test_a_wrong_argument_is_refused_by_name(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ab.StandardError(**arguments)


class TestAnyOf:
    def test_the_larger_batch_wins_and_says_why(self):
        both = ab.RelativeStandardError() | ab.StandardError(target=4.0)
        noisy = Evidence(
            pooled=NoiseEstimate(100.0, 6400.0, 0.1, 1.0, 0.0, 100.0, 20.0),
            typical=NoiseEstimate(100.0, 6400.0, 0.1, 1.0, 0.0, 100.0, 20.0),
        )
        assert decide(both, noisy, AT, WIDE) == Decision(7, 400.0, "grow")
        alone = decide(ab.RelativeStandardError(), noisy, AT, WIDE)
        assert alone.accumulation_steps < 4

    @given(trace=st.floats(1.0, 1e6), length=st.floats(1e-3, 1e3), target=st.floats(0.1, 100.0))
    def test_it_is_the_largest_of_its_parts(self, trace, length, target):
        rules = (NoiseScale(), ab.Pareto(300.0), ab.StandardError(target=target))
        pair = NoiseEstimate(length, trace, 0.1, 1.0, 0.0, 100.0, 20.0)
        evidence = Evidence(pooled=pair, typical=pair)
        parts = [decide(rule, evidence, AT, WIDE) for rule in rules]
        whole = decide(rules[0] | rules[1] | rules[2], evidence, AT, WIDE)
        assert whole.accumulation_steps == max(part.accumulation_steps for part in parts)
        assert whole.target_batch == max(part.target_batch for part in parts)

    def test_it_is_flat_and_keeps_gradients_if_one_of_them_does(self):
        three = NoiseScale() | ab.Pareto(300.0) | ab.StandardError(target=1.0)
        assert [type(rule).__name__ for rule in three.rules] == ["NoiseScale", "Pareto", "StandardError"]
        assert not three.keeps_gradients
        assert (NoiseScale() | ab.rules.InnerProductTest()).keeps_gradients

    @pytest.mark.parametrize(
        ("rules", "message"),
        [
            ((NoiseScale(),), r"rules must be at least two, got rules = \(NoiseScale"),
            ((NoiseScale(), ab.Fixed(2)), r"rules must be closed-loop rules, got Fixed.*Limits\(min_steps=\.\.\.\)"),
            ((NoiseScale(memory=1.0), NoiseScale()), r"rules must have the same memory, got \[1\.0, None\]"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, rules, message):
        with pytest.raises(ValueError, match=message):
            AnyOf(rules)

    def test_another_kind_is_no_rule(self):
        with pytest.raises(TypeError, match="unsupported operand"):
            NoiseScale() | 4  # type: ignore[operator]


@given(
    trace=st.floats(1e-300, 1e300),
    sq_error=st.floats(1e-300, 1e300),
    population=st.floats(1.0, 1e16) | st.just(math.inf),
)
@example(trace=1e300, sq_error=1e-300, population=1000.0)
def test_the_wanted_batch_is_within_the_population_and_has_the_error(trace, sq_error, population):
    n = estimate.batch_with_error(trace, sq_error, population)
    assert 0.0 <= n <= population
    if 1e-6 < n < 1e12 and math.isinf(population):
        assert trace / n == pytest.approx(sq_error, rel=1e-9)
