"""rules.py: the promises of every rule, and the CLT rule's decisions one by one."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import adaptbatch as ab
from adaptbatch import (
    Decision,
    Fixed,
    Limits,
    NoiseEstimate,
    NoiseTracker,
    Progress,
    Ramp,
    RelativeStandardError,
    Replay,
    decide,
    noise,
)
from adaptbatch.records import Measurement

RULES = {
    "fixed": Fixed(4),
    "replay": Replay([2, 2, 4, 8]),
    "linear": Ramp(1, 16, 10_000),
    "exponential": Ramp(2, 32, 5e4, shape="exponential"),
    "staircase": Ramp(16, 2, 5e4, shape="staircase", stairs=3),
    "clt": RelativeStandardError(),
    "clt tuned": RelativeStandardError(theta=0.5, memory=1e4, dead_time=0.0, z_grow=1.0, z_shrink=0.0),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)

evidence = st.builds(
    NoiseEstimate,
    grad_sq_norm=st.floats(-10, 100),
    noise_trace=st.floats(0, 1e6),
    var_grad_sq_norm=st.floats(0, 100),
    var_noise_trace=st.floats(0, 1e6),
    covariance=st.just(0.0),
    degrees_of_freedom=st.floats(1, 1e4),
    effective_windows=st.floats(1, 100),
)
progress = st.builds(
    Progress,
    window=st.integers(0, 1000),
    examples_seen=st.floats(0, 1e6),
    accumulation_steps=st.integers(1, 200),
    cell_examples=st.floats(1, 512),
    world_size=st.integers(1, 4),
    examples_since_change=st.floats(0, math.inf),
    population=st.floats(1e3, math.inf),
    finite=st.booleans(),
)
limits = st.builds(
    Limits,
    min_steps=st.none() | st.integers(2, 8),
    max_steps=st.integers(8, 128),
    max_growth=st.floats(1.1, 4),
    max_shrink=st.floats(0.1, 0.9),
)


class TestEveryRule:
    """The battery: what any rule promises for any evidence."""

    @every_rule
    def test_is_a_value(self, rule):
        assert eval(repr(rule), vars(ab)) == rule
        assert pickle.loads(pickle.dumps(rule)) == rule
        assert hash(rule) == hash(replace(rule))
        assert isinstance(rule, ab.Rule)
        with pytest.raises(FrozenInstanceError):
            rule.theta = 2.0

    @every_rule
    @given(evidence=evidence, progress=progress, limits=limits)
    def test_stays_within_the_limits_and_is_pure(self, rule, evidence, progress, limits):
        decision = decide(rule, evidence, progress, limits)
        resolved = limits.resolve(rule, progress.world_size)
        assert resolved.min_steps <= decision.accumulation_steps <= resolved.max_steps
        assert type(decision.accumulation_steps) is int
        assert type(decision.target_batch) is float
        assert decide(rule, evidence, progress, limits) == decision

    @every_rule
    def test_begins_without_evidence(self, rule):
        nothing = NoiseEstimate(math.nan, math.nan)
        first = decide(rule, nothing, Progress(accumulation_steps=2), Limits())
        assert 1 <= first.accumulation_steps <= 64

    @every_rule
    def test_says_nonfinite(self, rule):
        after = Progress(accumulation_steps=4, cell_examples=64, finite=False)
        decision = decide(rule, NoiseEstimate(1.0, 1e6, 0.0, 0.0, 0.0, 9.0, 90.0), after, Limits())
        assert decision.reason == "nonfinite"
        if rule.closed_loop:
            assert decision.accumulation_steps == 4


class TestCLTRule:
    sure = NoiseEstimate(1.0, 1024.0, 1e-4, 1.0, 0.0, degrees_of_freedom=100, effective_windows=30)
    at = Progress(accumulation_steps=4, cell_examples=64, window=100, examples_seen=1e6)

    def decide(self, target: float, k: int = 4, limits: Limits | None = None, **changes) -> Decision:
        """A decision where the evidence is sure and wants ``target`` examples."""
        pair = replace(self.sure, noise_trace=target, var_noise_trace=1e-6 * target**2)
        at = replace(self.at, accumulation_steps=k, **changes)
        return decide(RelativeStandardError(), pair, at, limits or Limits())

    @given(evidence=evidence, progress=progress, limits=limits, theta=st.floats(0.1, 4))
    def test_keeps_the_error_or_says_why_not(self, evidence, progress, limits, theta):
        decision = decide(RelativeStandardError(theta), evidence, progress, limits)
        n = decision.accumulation_steps * progress.step_examples
        if noise.relative_error(evidence, n, progress.population) > theta * (1 + 1e-9):
            assert decision.reason in ("undecided", "growth_limited", "signal_lost", "at_max", "nonfinite")

    @given(evidence=evidence, progress=progress, limits=limits)
    def test_never_moves_faster_than_the_limits(self, evidence, progress, limits):
        resolved = limits.resolve(RelativeStandardError(), progress.world_size)
        k = resolved.clamp(progress.accumulation_steps)
        after = decide(RelativeStandardError(), evidence, replace(progress, accumulation_steps=k), limits)
        assert after.accumulation_steps <= max(k + 1, math.ceil(limits.max_growth * k))
        assert after.accumulation_steps >= min(k, max(resolved.min_steps, math.floor(limits.max_shrink * k)))

    @given(evidence=evidence, progress=progress, limits=limits)
    def test_the_target_never_exceeds_the_population(self, evidence, progress, limits):
        decision = decide(RelativeStandardError(), evidence, progress, limits)
        assert not decision.target_batch > progress.population * (1 + 1e-12)

    def test_grow_to_the_target(self):
        assert self.decide(target=400) == Decision(7, 400.0, "grow")

    def test_growth_is_limited(self):
        assert self.decide(target=5000) == Decision(8, 5000.0, "growth_limited")

    def test_one_step_is_always_allowed(self):
        assert self.decide(target=5000, k=2, limits=Limits(max_growth=1.01)).accumulation_steps == 3

    def test_at_max(self):
        assert self.decide(target=5000, k=60) == Decision(64, 5000.0, "at_max")
        assert self.decide(target=5000, k=64) == Decision(64, 5000.0, "at_max")

    def test_signal_lost_grows_on(self):
        lost = replace(self.sure, grad_sq_norm=-0.5)
        assert decide(RelativeStandardError(), lost, self.at, Limits()) == Decision(8, math.inf, "signal_lost")
        known = replace(self.at, population=60_000)
        assert decide(RelativeStandardError(), lost, known, Limits()) == Decision(8, 60_000, "signal_lost")

    def test_hold_where_the_target_is_this_size(self):
        assert self.decide(target=250) == Decision(4, 250.0, "hold")

    def test_shrink_is_limited(self):
        assert self.decide(target=130, k=20) == Decision(16, 130.0, "shrink")

    def test_shrink_lands_where_the_test_passes(self):
        # At the target itself the statistic is zero, so one step above it is as far as the evidence carries.
        assert self.decide(target=192.0, k=4) == Decision(4, 192.0, "hold")
        assert self.decide(target=180.0, k=4) == Decision(3, 180.0, "shrink")

    def test_at_min(self):
        assert self.decide(target=30, k=2) == Decision(2, 30.0, "at_min")
        assert self.decide(target=30, k=3) == Decision(2, 30.0, "at_min")

    def test_too_few_windows_are_undecided(self):
        few = replace(self.sure, effective_windows=7.9)
        assert decide(RelativeStandardError(), few, self.at, Limits()).reason == "undecided"

    def test_weak_evidence_is_undecided(self):
        weak = replace(self.sure, var_noise_trace=400.0**2)
        excess, error = noise.excess_error(weak, 256, 1.0)
        assert 0 < excess < 2.33 * error
        assert decide(RelativeStandardError(), weak, self.at, Limits()) == Decision(4, 1024.0, "undecided")

    def test_dead_time(self):
        # Half of max(1000 b, 10 n) = 64,000 examples, three times that for a shrink.
        assert self.decide(target=5000, examples_since_change=31_999).reason == "undecided"
        assert self.decide(target=5000, examples_since_change=32_000).reason == "growth_limited"
        assert self.decide(target=130, k=20, examples_since_change=95_999).reason == "hold"
        assert self.decide(target=130, k=20, examples_since_change=96_000).reason == "shrink"

    def test_dead_time_and_memory_can_be_set(self):
        pair, at = replace(self.sure, noise_trace=5000.0), replace(self.at, examples_since_change=100)
        assert decide(RelativeStandardError(dead_time=101), pair, at, Limits()).reason == "undecided"
        assert decide(RelativeStandardError(dead_time=100), pair, at, Limits()).reason == "growth_limited"
        assert decide(RelativeStandardError(memory=200), pair, at, Limits()).reason == "growth_limited"

    def test_the_whole_population_is_enough(self):
        lost = replace(self.sure, grad_sq_norm=-0.5)
        decision = decide(RelativeStandardError(), lost, replace(self.at, population=200), Limits())
        assert decision == Decision(4, 200.0, "hold")

    def test_a_known_population_needs_less(self):
        pair = replace(self.sure, noise_trace=400.0)
        finite = decide(RelativeStandardError(), pair, replace(self.at, population=400), Limits())
        assert finite.target_batch == pytest.approx(200.0)

    def test_finds_a_constant_noise_scale_and_stays(self):
        """Gaussian windows with B = 400: k rises from 2 to about 13 and then hardly moves."""
        rng, dimension, cell, truth = np.random.default_rng(5), 20, 32, 400.0
        rule, limits, tracker = RelativeStandardError(), Limits(), NoiseTracker()
        mean, spread = np.zeros(dimension), np.full(dimension, math.sqrt(truth / dimension))
        mean[0] = 1.0
        at, changed, path = Progress(accumulation_steps=2, cell_examples=cell), -math.inf, []
        for _ in range(4000):
            k = at.accumulation_steps
            cells = mean + spread * rng.standard_normal((k, dimension)) / math.sqrt(cell)
            window = Measurement(cell * float((cells**2).sum()), float((cells.mean(0) ** 2).sum()), k * cell, k)
            seen = at.examples_seen + k * cell
            at = replace(at, examples_seen=seen, examples_since_change=seen - changed)
            memory = noise.memory_examples(None, cell, k * cell)
            tracker = tracker.update(noise.estimate(window), k * cell, memory)
            decision = decide(rule, tracker.estimate(), at, limits)
            changed = seen if decision.accumulation_steps != k else changed
            at = replace(at, accumulation_steps=decision.accumulation_steps)
            path.append(decision.accumulation_steps)
        assert abs(math.log(path[-1] * cell / truth)) < 0.3
        changes = np.flatnonzero(np.diff(path))
        moves = np.sign(np.diff(path)[changes])
        assert len(changes) <= 6
        assert (np.diff(moves) != 0).sum() == 0, "a reversal at a constant noise scale"


class TestOpenLoop:
    nothing = NoiseEstimate(math.nan, math.nan)

    def steps(self, rule: ab.Rule, *, window: int = 0, seen: float = 0.0, k: int = 1, limits: Limits | None = None):
        at = Progress(window=window, examples_seen=seen, accumulation_steps=k, cell_examples=64)
        return decide(rule, self.nothing, at, limits or Limits())

    def test_fixed(self):
        assert self.steps(Fixed(4), k=4) == Decision(4, 256.0, "hold")
        assert self.steps(Fixed(100), k=64) == Decision(64, 6400.0, "at_max")
        assert self.steps(Fixed(1), k=2, limits=Limits(min_steps=2)) == Decision(2, 64.0, "at_min")

    def test_replay_repeats_a_recorded_column(self):
        rule = Replay(np.array([2, 3, 5]))
        assert rule == Replay([2, 3, 5])
        found = [self.steps(rule, window=t).accumulation_steps for t in range(5)]
        assert found == [2, 3, 5, 5, 5]

    @pytest.mark.parametrize(
        ("shape", "expected"), [("linear", [2, 6, 9, 13, 16, 16]), ("exponential", [2, 3, 6, 10, 16, 16])]
    )
    def test_ramp_is_rounded_to_whole_steps(self, shape, expected):
        ramp = Ramp(2, 16, 1000, shape=shape)
        found = [self.steps(ramp, seen=seen).accumulation_steps for seen in (0, 250, 500, 750, 1000, 5000)]
        assert found == expected

    @given(st.integers(1, 64), st.integers(1, 64), st.sampled_from(["linear", "exponential", "staircase"]))
    def test_ramp_is_monotone_from_start_to_stop(self, start, stop, shape):
        ramp = Ramp(start, stop, 1000, shape=shape, stairs=4 if shape == "staircase" else None)
        found = [ramp.steps(seen) for seen in range(0, 1200, 10)]
        assert found[0] == pytest.approx(start)
        assert found[-1] == pytest.approx(stop)
        assert (np.diff(found) * np.sign(stop - start) >= -1e-12).all()
        if shape == "staircase":
            assert len(set(np.round(found, 9))) <= 5

    def test_open_loop_is_bound_by_size_not_by_speed(self):
        assert self.steps(Replay([1, 64]), window=1, k=1).accumulation_steps == 64


REFUSED = [
    (lambda: RelativeStandardError(theta=0), r"theta must be positive and finite, got theta = 0; 1.0 lets"),
    (lambda: RelativeStandardError(theta=math.inf), r"theta must be positive and finite, got theta = inf"),
    (lambda: RelativeStandardError(memory=-1), r"memory must be positive and finite, got memory = -1; None takes"),
    (lambda: RelativeStandardError(dead_time=-1), r"dead_time must be finite and not negative, got dead_time = -1"),
    (lambda: RelativeStandardError(z_grow=-1), r"z_grow must be finite and not negative, got z_grow = -1"),
    (lambda: RelativeStandardError(z_shrink=math.nan), r"z_shrink must be finite and not negative, got z_shrink = nan"),
    (lambda: Fixed(0), r"accumulation_steps must be a whole number of at least 1, got accumulation_steps = 0"),
    (lambda: Fixed(2.5), r"accumulation_steps must be a whole number of at least 1, got accumulation_steps = 2.5"),
    (lambda: Fixed(True), r"accumulation_steps must be a whole number"),
    (lambda: Replay([]), r"accumulation_steps must hold at least one entry, got none; Fixed\(k\)"),
    (lambda: Replay([2, 0]), r"accumulation_steps\[1\] must be a whole number of at least 1, got"),
    (lambda: Ramp(0, 4, 100), r"start must be a whole number of at least 1, got start = 0"),
    (lambda: Ramp(1, 4, 0), r"examples must be positive and finite, got examples = 0; Fixed\(stop\)"),
    (lambda: Ramp(1, 4, 10, shape="cosine"), r"shape must be one of \('linear', .*got shape = 'cosine'"),
    (lambda: Ramp(1, 4, 10, shape="staircase"), r"stairs must be given for shape 'staircase' and only there, got"),
    (lambda: Ramp(1, 4, 10, stairs=3), r"stairs must be given .* got stairs = 3 with shape = 'linear'"),
    (lambda: Limits(min_steps=0), r"min_steps must be a whole number of at least 1, got min_steps = 0"),
    (lambda: Limits(max_steps=0), r"max_steps must be a whole number of at least 1, got max_steps = 0"),
    (
        lambda: Limits(min_steps=5, max_steps=4),
        r"min_steps must not exceed max_steps, got min_steps = 5, max_steps = 4",
    ),
    (lambda: Limits(max_growth=1.0), r"max_growth must be finite and above 1, got max_growth = 1.0"),
    (lambda: Limits(max_shrink=1.0), r"max_shrink must be in \(0, 1\), got max_shrink = 1.0"),
    (
        lambda: Limits(min_steps=1).resolve(RelativeStandardError(), 1),
        r"min_steps must be at least 2 for RelativeStandardError on one rank, got min_steps = 1: .* Use Limits\(min",
    ),
    (
        lambda: Limits(max_steps=1).resolve(RelativeStandardError(), 1),
        r"max_steps must be at least 2 for RelativeStandardError on one rank",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refuses_by_name_value_and_bound(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_min_steps_is_the_smallest_that_can_be_measured():
    assert Limits().resolve(RelativeStandardError(), world_size=1).min_steps == 2
    assert Limits().resolve(RelativeStandardError(), world_size=2).min_steps == 1
    assert Limits().resolve(Fixed(1), world_size=1).min_steps == 1
    assert Limits(min_steps=4).resolve(Fixed(1), world_size=1).min_steps == 4
