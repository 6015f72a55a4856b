"""rules/: the promises of every rule, and the CLT rule's decisions one by one."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, note
from hypothesis import strategies as st

import adaptbatch as ab
from adaptbatch import Fixed, Guard, Limits, Pareto, Ramp, RelativeStandardError, Schedule, estimate
from adaptbatch.estimate import NoiseTracker
from adaptbatch.records import Decision, Evidence, Measurement, NoiseEstimate, Progress, Reason, Response, Tail
from adaptbatch.rules import (
    CABS,
    AnyOf,
    CosineSimilarity,
    DiveBatch,
    Goodput,
    InnerProductTest,
    NoiseScale,
    NormTest,
    Replay,
    Seesaw,
    StandardError,
    decide,
)
from adaptbatch.rules.base import growth

RULES = {
    "fixed": Fixed(4),
    "replay": Replay([2, 2, 4, 8]),
    "linear": Ramp(1, 16, 10_000),
    "exponential": Ramp(2, 32, 5e4, shape="exponential"),
    "staircase": Ramp(16, 2, 5e4, shape="staircase", stairs=3),
    "increments": Ramp(2, 20, 5e4, shape="increments", increment=6),
    "schedule": Schedule((0, 1e4, 5e4), (2, 8, 4)),
    "seesaw": Seesaw(3, (1e4, 5e4), decay=0.7),
    "clt": RelativeStandardError(),
    "clt tuned": RelativeStandardError(theta=0.5, memory=1e4, dead_time=0.0, z_grow=1.0, z_shrink=0.0),
    "clt pooled": RelativeStandardError(dead_time=0.0, channel="pooled", at_floor="hold"),
    "standard error": StandardError(target=2.0),
    "standard error of a batch": StandardError(reference_batch=256.0, z_grow=2.0, z_shrink=1.0, dead_time=1e4),
    "any of": AnyOf((RelativeStandardError(), StandardError(target=2.0, start="min"))),
    "norm test": NormTest(),
    "norm test, debiased": NormTest(theta=1.0, debiased=True, grow_only=False),
    "inner product": InnerProductTest(),
    "inner product alone": InnerProductTest(theta=0.5, nu=None),
    "cosine": CosineSimilarity(),
    "noise scale": NoiseScale(),
    "pareto": Pareto(price=1000.0),
    "goodput": Goodput(initial_batch=128.0),
    "goodput, given times": Goodput(64, step_seconds=0.5, example_seconds=0.001, improvement=1.0, memory=1e4),
    "cabs": CABS(scale=2.0, loss_floor=0.1),
    "divebatch": DiveBatch(delta=0.5, epoch_examples=1e4),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def told(rules: dict[str, ab.rules.Rule]) -> Iterator[ab.rules.Rule]:
    """One after the other, for one evidence, which takes longer to draw than all decide; the last named is at fault."""
    for name, rule in rules.items():
        note(name)
        yield rule


def known(pair: NoiseEstimate, **others) -> Evidence:
    """Evidence that says ``pair`` in both channels."""
    return Evidence(pooled=pair, typical=pair, **others)


def perhaps(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[float]:
    return st.just(math.nan) | numbers


pairs = st.builds(
    NoiseEstimate,
    grad_sq_norm=st.floats(-10, 100),
    noise_trace=st.floats(0, 1e6),
    var_grad_sq_norm=st.floats(0, 100),
    var_noise_trace=st.floats(0, 1e6),
    covariance=st.just(0.0),
    degrees_of_freedom=st.floats(1, 1e4),
    effective_windows=st.floats(1, 100),
)
no_tail = st.builds(Tail, excess=perhaps(st.floats(0, 1e6)), share=perhaps(st.floats(0, 1)))
tails = no_tail | st.builds(
    Tail,
    excess=st.floats(0, math.inf),
    share=perhaps(st.floats(0, 1)),
    episode_batch=st.floats(1, 1e5),
    episode_examples=st.floats(0, 1e7),
)
responses = st.builds(
    Response,
    elasticity=perhaps(st.floats(-2, math.inf)),
    least_error_sq=perhaps(st.floats(0, math.inf)),
    consecutive=perhaps(st.floats(-10, 10)),
)


@st.composite
def measured(draw: st.DrawFn) -> Measurement:
    """A window that gradients could have: ``n |g|^2 <= R <= Q``, with equality for a single cell."""
    n, length, cells = draw(st.floats(1, 1e5)), draw(st.floats(0, 100)), draw(st.integers(1, 64))
    radial, orthogonal = (draw(st.floats(0, 1e6)) if cells > 1 else 0.0 for _ in range(2))
    total = n * length + radial
    return Measurement(total + orthogonal, length, n, cells, draw(st.sampled_from([total, math.nan])))


evidence = st.builds(
    Evidence,
    pooled=st.just(NoiseEstimate(math.nan, math.nan)) | pairs,
    typical=st.just(NoiseEstimate(math.nan, math.nan)) | pairs,
    tail=tails,
    response=responses,
    window=st.none() | measured(),
    level=perhaps(st.floats(0, 1e6)),
    loss=perhaps(st.floats(-10, 100)),
    lr=perhaps(st.floats(0, 10)),
    step_seconds=perhaps(st.floats(0, 10)),
    example_seconds=perhaps(st.floats(0, 1)),
)
progress = st.builds(
    Progress,
    window=st.integers(0, 1000),
    examples_seen=st.floats(0, 1e6),
    accumulation_steps=st.integers(1, 200),
    micro_batch_examples=st.floats(1, 512),
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


def opens_wide(rule) -> bool:
    """Whether its first window, of which nothing is known, is the largest."""
    return getattr(rule, "start", None) == "max"


class TestEveryRule:
    """The battery: what any rule promises for any evidence."""

    @every_rule
    def test_is_a_value(self, rule):
        assert eval(repr(rule), vars(ab.rules)) == rule
        assert pickle.loads(pickle.dumps(rule)) == rule
        assert hash(rule) == hash(replace(rule))
        assert isinstance(rule, ab.rules.Rule)
        with pytest.raises(FrozenInstanceError):
            rule.theta = 2.0

    @every_rule
    def test_takes_the_scalars_of_numpy(self, rule):
        given = {item.name: in_numpy(getattr(rule, item.name)) for item in fields(rule)}
        same = type(rule)(**given)
        assert same == rule
        assert eval(repr(same), vars(ab.rules)) == rule

    @given(evidence=evidence, progress=progress, limits=limits)
    def test_stays_within_the_limits_and_is_pure(self, evidence, progress, limits):
        for rule in told(RULES):
            decision = decide(rule, evidence, progress, limits)
            resolved = limits.resolve(rule, progress.world_size)
            assert resolved.min_steps <= decision.accumulation_steps <= resolved.max_steps
            assert type(decision.accumulation_steps) is int
            assert type(decision.target_batch) is float
            assert decision.reason in get_args(Reason)
            assert not decision.target_batch > progress.population
            again = decide(rule, evidence, progress, limits)
            assert repr(again) == repr(decision), "NaN is not equal to itself, its text is"

    @given(evidence=evidence, progress=progress, limits=limits)
    def test_the_reason_tells_where_it_went(self, evidence, progress, limits):
        for rule in told(RULES):
            k = limits.resolve(rule, progress.world_size).clamp(progress.accumulation_steps)
            decision = decide(rule, evidence, replace(progress, accumulation_steps=k, finite=True), limits)
            moved = decision.accumulation_steps - k
            assert np.sign(moved) in MOVES[decision.reason]

    @given(evidence=evidence, progress=progress, limits=limits)
    def test_moves_no_faster_than_the_limits_in_a_closed_loop(self, evidence, progress, limits):
        for rule in told(RULES):
            resolved = limits.resolve(rule, progress.world_size)
            k = resolved.clamp(progress.accumulation_steps)
            after = decide(rule, evidence, replace(progress, accumulation_steps=k), limits)
            if not rule.closed_loop or (opens_wide(rule) and progress.window == 0):
                continue
            if after.reason != "guard":
                assert after.accumulation_steps <= max(k + 1, math.ceil(limits.max_growth * k))
            assert after.accumulation_steps >= min(k, max(resolved.min_steps, math.floor(limits.max_shrink * k)))

    @every_rule
    def test_begins_without_evidence(self, rule):
        for at in (Progress(accumulation_steps=2), Progress(accumulation_steps=2, micro_batch_examples=64)):
            first = decide(rule, Evidence(), at, Limits())
            assert 1 <= first.accumulation_steps <= 64
            if rule.closed_loop:
                expected = (64, "at_max") if opens_wide(rule) else (2, "undecided")
                assert (first.accumulation_steps, first.reason) == expected
                assert math.isnan(first.target_batch)

    @every_rule
    def test_keeps_its_size_after_a_window_without_a_degree_of_freedom(self, rule):
        alone = Evidence(window=Measurement(256.0, 4.0, 64.0, cells=1, radial_sq_norms=256.0), loss=1.0, lr=0.1)
        decision = decide(rule, alone, Progress(window=1, accumulation_steps=3, micro_batch_examples=64), Limits())
        if rule.closed_loop:
            assert (decision.accumulation_steps, decision.reason) == (3, "undecided")

    @every_rule
    def test_says_nonfinite(self, rule):
        after = Progress(accumulation_steps=4, micro_batch_examples=64, finite=False)
        decision = decide(rule, known(NoiseEstimate(1.0, 1e6, 0.0, 0.0, 0.0, 9.0, 90.0)), after, Limits())
        assert decision.reason == "nonfinite"
        if rule.closed_loop:
            assert decision.accumulation_steps == 4


# The signs of a move that each reason allows.
MOVES = {
    "hold": {0},
    "grow": {1},
    "shrink": {-1},
    "growth_limited": {1},
    "undecided": {0},
    "signal_lost": {1},
    "noise_floor": {0, 1},
    "at_max": {0, 1},
    "at_min": {0, -1},
    "guard": {0, 1, -1},
}


def in_numpy(value):
    """``value`` as numpy's scalar, or its entries as such."""
    if isinstance(value, tuple):
        return np.array(value)
    return {bool: np.bool_, int: np.int64, float: np.float64}.get(type(value), lambda same: same)(value)


def test_a_growth_is_at_least_one_step():
    """Where the test asks for one, also if the target rounds to the present size."""
    assert growth(4, 3.5, Limits()) == (5, "grow")
    assert growth(4, 3.5, Limits(max_steps=4)) == (4, "at_max")


class TestCLTRule:
    sure = NoiseEstimate(1.0, 1024.0, 1e-4, 1.0, 0.0, degrees_of_freedom=100, effective_windows=30)
    at = Progress(accumulation_steps=4, micro_batch_examples=64, window=100, examples_seen=1e6)

    def decide(self, target: float, k: int = 4, limits: Limits | None = None, **changes) -> Decision:
        """A decision where the evidence is sure and wants ``target`` examples."""
        pair = replace(self.sure, noise_trace=target, var_noise_trace=1e-6 * target**2)
        at = replace(self.at, accumulation_steps=k, **changes)
        return decide(RelativeStandardError(), known(pair), at, limits or Limits())

    @given(evidence=evidence, progress=progress, limits=limits, theta=st.floats(0.1, 4))
    def test_keeps_the_error_or_says_why_not(self, evidence, progress, limits, theta):
        decision = decide(RelativeStandardError(theta), evidence, progress, limits)
        n = decision.accumulation_steps * progress.step_examples
        reasons = {"undecided", "growth_limited", "signal_lost", "at_max", "nonfinite"}
        if math.isfinite(evidence.tail.episode_examples):
            reasons.add("guard")
        if evidence.response.elasticity > 0.7 and evidence.response.least_error_sq > theta**2:
            reasons.add("noise_floor")
        if estimate.relative_error(evidence.typical, n, progress.population) > theta * (1 + 1e-9):
            assert decision.reason in reasons

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
        assert decide(RelativeStandardError(), known(lost), self.at, Limits()) == Decision(8, math.inf, "signal_lost")
        finite = replace(self.at, population=60_000)
        assert decide(RelativeStandardError(), known(lost), finite, Limits()) == Decision(8, 60_000, "signal_lost")

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
        assert decide(RelativeStandardError(), known(few), self.at, Limits()).reason == "undecided"

    def test_weak_evidence_is_undecided(self):
        weak = replace(self.sure, var_noise_trace=400.0**2)
        excess, error = estimate.excess_error(weak, 256, 1.0)
        assert 0 < excess < 2.33 * error
        assert decide(RelativeStandardError(), known(weak), self.at, Limits()) == Decision(4, 1024.0, "undecided")

    def test_dead_time(self):
        # Half of max(500 b, 10 n) = 32,000 examples, three times that for a shrink.
        assert self.decide(target=5000, examples_since_change=15_999).reason == "undecided"
        assert self.decide(target=5000, examples_since_change=16_000).reason == "growth_limited"
        assert self.decide(target=130, k=20, examples_since_change=47_999).reason == "hold"
        assert self.decide(target=130, k=20, examples_since_change=48_000).reason == "shrink"

    def test_dead_time_and_memory_can_be_set(self):
        pair, at = replace(self.sure, noise_trace=5000.0), replace(self.at, examples_since_change=100)
        assert decide(RelativeStandardError(dead_time=101), known(pair), at, Limits()).reason == "undecided"
        assert decide(RelativeStandardError(dead_time=100), known(pair), at, Limits()).reason == "growth_limited"
        assert decide(RelativeStandardError(memory=200), known(pair), at, Limits()).reason == "growth_limited"

    def test_the_whole_population_is_enough(self):
        lost = replace(self.sure, grad_sq_norm=-0.5)
        decision = decide(RelativeStandardError(), known(lost), replace(self.at, population=200), Limits())
        assert decision == Decision(4, 200.0, "hold")

    def test_a_known_population_needs_less(self):
        pair = replace(self.sure, noise_trace=400.0)
        finite = decide(RelativeStandardError(), known(pair), replace(self.at, population=400), Limits())
        assert finite.target_batch == pytest.approx(200.0)

    def test_finds_a_constant_noise_scale_and_stays(self):
        """Gaussian windows with B = 400: k rises from 2 to about 13 and then hardly moves."""
        rng, dimension, cell, truth = np.random.default_rng(5), 20, 32, 400.0
        rule, limits, tracker = RelativeStandardError(), Limits(), NoiseTracker()
        mean, spread = np.zeros(dimension), np.full(dimension, math.sqrt(truth / dimension))
        mean[0] = 1.0
        at, changed, path = Progress(accumulation_steps=2, micro_batch_examples=cell), -math.inf, []
        for _ in range(4000):
            k = at.accumulation_steps
            cells = mean + spread * rng.standard_normal((k, dimension)) / math.sqrt(cell)
            window = Measurement(cell * float((cells**2).sum()), float((cells.mean(0) ** 2).sum()), k * cell, k)
            seen = at.examples_seen + k * cell
            at = replace(at, examples_seen=seen, examples_since_change=seen - changed)
            memory = estimate.memory_examples(None, cell, k * cell)
            tracker = tracker.update(estimate.estimate_window(window), k * cell, memory)
            decision = decide(rule, known(tracker.estimate()), at, limits)
            changed = seen if decision.accumulation_steps != k else changed
            at = replace(at, accumulation_steps=decision.accumulation_steps)
            path.append(decision.accumulation_steps)
        assert abs(math.log(path[-1] * cell / truth)) < 0.3
        changes = np.flatnonzero(np.diff(path))
        moves = np.sign(np.diff(path)[changes])
        assert len(changes) <= 6
        assert (np.diff(moves) != 0).sum() == 0, "a reversal at a constant noise scale"


class TestChannels:
    """The CLT rule's typical and response channels, and the tail with a guard."""

    quiet = NoiseEstimate(1.0, 130.0, 1e-4, 1.0, 0.0, degrees_of_freedom=100, effective_windows=30)
    noisy = replace(quiet, noise_trace=5000.0)
    at = Progress(accumulation_steps=4, micro_batch_examples=64, window=100, examples_seen=1e6)

    def test_the_typical_channel_decides_unless_it_is_told_otherwise(self):
        told = Evidence(pooled=self.noisy, typical=self.quiet)
        assert decide(RelativeStandardError(), told, self.at, Limits()).reason == "shrink"
        assert decide(RelativeStandardError(channel="pooled"), told, self.at, Limits()).reason == "growth_limited"

    def test_after_an_episode_k_is_twice_the_size_that_saw_it(self):
        saw = known(self.quiet, tail=Tail(1.0, 0.5, episode_batch=320.0, episode_examples=500.0))
        assert decide(RelativeStandardError(), saw, self.at, Limits(), Guard()) == Decision(10, 130.0, "guard")
        assert decide(RelativeStandardError(), saw, self.at, Limits(max_steps=9), Guard()) == Decision(
            9, 130.0, "guard"
        )

    def test_it_waits_until_gradients_are_usual_again(self):
        during = known(self.quiet, tail=Tail(150.0, 0.5, episode_batch=320.0, episode_examples=0.0))
        assert decide(RelativeStandardError(), during, self.at, Limits(), Guard()) == Decision(4, 130.0, "guard")

    @pytest.mark.parametrize("channel", ["typical", "pooled"])
    def test_without_a_guard_the_tail_moves_nothing(self, channel):
        saw = known(self.quiet, tail=Tail(1.0, 0.5, episode_batch=320.0, episode_examples=500.0))
        assert decide(RelativeStandardError(channel=channel), saw, self.at, Limits()) == Decision(3, 130.0, "shrink")

    @pytest.mark.parametrize(("memory", "hold"), [(None, 320_000), (5000.0, 50_000)])
    def test_the_size_is_held_for_ten_memories(self, memory, hold):
        rule, at = RelativeStandardError(memory=memory), replace(self.at, accumulation_steps=10)
        tail = Tail(1.0, 0.5, episode_batch=320.0, episode_examples=hold - 1)
        assert decide(rule, known(self.quiet, tail=tail), at, Limits(), Guard()) == Decision(10, 130.0, "guard")
        released = replace(tail, episode_examples=hold)
        assert decide(rule, known(self.quiet, tail=released), at, Limits(), Guard()) == Decision(8, 130.0, "shrink")

    def test_a_shrink_stops_at_the_size_held(self):
        tail = Tail(1.0, 0.5, episode_batch=576.0, episode_examples=1000.0)
        at = replace(self.at, accumulation_steps=20)
        assert decide(RelativeStandardError(), known(self.quiet, tail=tail), at, Limits(), Guard()) == Decision(
            18, 130.0, "guard"
        )

    def test_the_size_held_can_be_grown_from(self):
        tail = Tail(1.0, 0.5, episode_batch=256.0, episode_examples=1000.0)
        at = replace(self.at, accumulation_steps=8)
        assert (
            decide(RelativeStandardError(), known(self.noisy, tail=tail), at, Limits(), Guard()).reason
            == "growth_limited"
        )

    def test_the_size_held_is_a_batch_not_a_number_of_steps(self):
        """Twice the batch, when micro-batches have become half as large, is four times the steps."""
        tail = Tail(1.0, 0.5, episode_batch=256.0, episode_examples=500.0)
        at = replace(self.at, micro_batch_examples=32)
        assert (
            decide(RelativeStandardError(), known(self.quiet, tail=tail), at, Limits(), Guard()).accumulation_steps
            == 16
        )

    floor = Response(elasticity=1.0, least_error_sq=6.0)

    def at_floor(self, response: Response, rule: RelativeStandardError | None = None, **changes) -> Decision:
        at = replace(self.at, **changes)
        return decide(rule or RelativeStandardError(), known(self.noisy, response=response), at, Limits())

    def test_at_the_noise_floor_it_grows_or_holds_as_told(self):
        assert self.at_floor(self.floor) == Decision(8, 5000.0, "noise_floor")
        hold = RelativeStandardError(at_floor="hold")
        assert self.at_floor(self.floor, hold) == Decision(4, 5000.0, "noise_floor")

    def test_a_growth_at_the_noise_floor_waits_like_any_other(self):
        waiting = self.at_floor(self.floor, examples_since_change=15_999)
        assert waiting == Decision(4, 5000.0, "noise_floor")

    @pytest.mark.parametrize(
        "response",
        [
            Response(elasticity=0.69, least_error_sq=6.0),
            Response(elasticity=1.0, least_error_sq=1.5),
            Response(elasticity=1.0, least_error_sq=6.0, consecutive=-1.9),
            Response(),
        ],
        ids=["B rises by itself", "a size was nearly enough", "the loss falls along G", "nothing known"],
    )
    def test_what_is_no_noise_floor(self, response):
        assert self.at_floor(response, RelativeStandardError(at_floor="hold")) == Decision(8, 5000.0, "growth_limited")

    def test_gradients_that_point_back_confirm_the_floor(self):
        assert self.at_floor(replace(self.floor, consecutive=-2.1)).reason == "noise_floor"

    def test_nearly_enough_is_in_units_of_theta(self):
        response = Response(elasticity=1.0, least_error_sq=2.0)
        assert self.at_floor(response, RelativeStandardError(theta=1.1)).reason == "noise_floor"
        assert self.at_floor(response, RelativeStandardError(theta=1.2)).reason == "growth_limited"

    def test_a_quiet_batch_is_at_no_floor(self):
        quiet = known(self.quiet, response=self.floor)
        assert decide(RelativeStandardError(at_floor="hold"), quiet, self.at, Limits()).reason == "shrink"


class TestGuard:
    at = Progress(accumulation_steps=4, micro_batch_examples=64)
    saw = Evidence(tail=Tail(1.0, 0.9, episode_batch=256.0, episode_examples=500.0))

    def test_is_a_value(self):
        guard = Guard(skip_ratio=25.0, max_skips=0, hold=1e6)
        assert eval(repr(guard), vars(ab.rules)) == guard
        assert pickle.loads(pickle.dumps(guard)) == guard
        assert hash(guard) == hash(replace(guard))

    def test_skips_a_step_ten_times_longer_than_usual_but_not_for_ever(self):
        """``Q / n`` is 101 or 100 times the level of 3."""
        far, near = (Measurement(3.0 * ratio * 128.0, 1.0, 128.0, 2) for ratio in (101, 100))
        assert Guard().skips(far, level=3.0, skipped=0)
        assert not Guard().skips(near, level=3.0, skipped=0)
        assert Guard(max_skips=3).skips(far, level=3.0, skipped=2)
        assert not Guard(max_skips=3).skips(far, level=3.0, skipped=3)
        assert not Guard(max_skips=0).skips(far, level=3.0, skipped=0)
        assert Guard(skip_ratio=25.0).skips(near, level=3.0, skipped=0)

    def test_skips_nothing_while_the_usual_is_unknown(self):
        assert not Guard().skips(Measurement(1e30, 1.0, 128.0, 2), level=math.nan, skipped=0)

    def test_reacts_upwards_only(self):
        small, large = Decision(7, 448.0, "hold"), Decision(8, 512.0, "grow")
        assert Guard().react(small, self.saw, self.at, Limits()) == Decision(8, 448.0, "guard")
        assert Guard().react(large, self.saw, self.at, Limits()) == large
        assert Guard().react(small, Evidence(), self.at, Limits()) == small

    def test_holds_as_long_as_told(self):
        small = Decision(4, 256.0, "hold")
        for guard, memory, hold in ((Guard(), None, 320_000), (Guard(), 1000.0, 10_000), (Guard(hold=77.0), 1.0, 77)):
            for examples, reason in ((hold - 1, "guard"), (hold, "hold")):
                saw = Evidence(tail=replace(self.saw.tail, episode_examples=examples))
                assert guard.react(small, saw, self.at, Limits(), memory).reason == reason

    def test_composes_with_an_open_loop_rule(self):
        assert decide(Fixed(4), self.saw, self.at, Limits()) == Decision(4, 256.0, "hold")
        assert decide(Fixed(4), self.saw, self.at, Limits(), Guard()) == Decision(8, 256.0, "guard")
        assert decide(Fixed(4), self.saw, self.at, Limits(max_steps=6), Guard()) == Decision(6, 256.0, "guard")

    def test_reacts_to_a_gradient_that_is_not_finite(self):
        during = Evidence(tail=Tail(math.inf, 0.0, episode_batch=256.0, episode_examples=0.0))
        waits = decide(NoiseScale(), during, replace(self.at, finite=False), Limits(), Guard())
        assert (waits.accumulation_steps, waits.reason) == (4, "guard")
        grows = decide(NoiseScale(), self.saw, self.at, Limits(), Guard())
        assert (grows.accumulation_steps, grows.reason) == (8, "guard")
        alone = decide(NoiseScale(), during, replace(self.at, finite=False), Limits())
        assert (alone.accumulation_steps, alone.reason) == (4, "nonfinite")

    @given(evidence=evidence, progress=progress, limits=limits)
    def test_never_lowers_a_size_and_keeps_the_limits(self, evidence, progress, limits):
        for rule in told(RULES):
            alone = decide(rule, evidence, progress, limits)
            guarded = decide(rule, evidence, progress, limits, Guard())
            assert alone.accumulation_steps <= guarded.accumulation_steps <= limits.max_steps
            if guarded.reason == "guard" != alone.reason:
                assert math.isfinite(evidence.tail.episode_examples)


class TestOpenLoop:
    def steps(
        self, rule: ab.rules.Rule, *, window: int = 0, seen: float = 0.0, k: int = 1, limits: Limits | None = None
    ):
        at = Progress(window=window, examples_seen=seen, accumulation_steps=k, micro_batch_examples=64)
        return decide(rule, Evidence(), at, limits or Limits())

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

    def test_a_schedule_holds_each_size_until_the_next(self):
        rule = Schedule([0, 1000, 5000], np.array([2, 8, 4]))
        found = [self.steps(rule, seen=seen).accumulation_steps for seen in (0, 999.5, 1000, 4999, 5000, 1e9)]
        assert found == [2, 2, 8, 8, 4, 4]
        assert rule == Schedule((0.0, 1000.0, 5000.0), (2, 8, 4))

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
    (lambda: Ramp(2, 8, 10, shape="increments"), r"increment must be given for shape 'increments' and only there, got"),
    (lambda: Ramp(2, 8, 10, increment=2), r"increment must be given .* got increment = 2 with shape = 'linear'"),
    (
        lambda: Ramp(2, 8, 10, shape="increments", increment=4),
        r"increment must divide stop - start, got increment = 4 with start = 2, stop = 8; shape 'staircase' takes",
    ),
    (lambda: Ramp(2, 8, 10, shape="increments", increment=0), r"increment must be a whole number of at least 1, got"),
    (lambda: Schedule([0, 5], [2]), r"examples and accumulation_steps must have one length of at least 1, got 2 and 1"),
    (lambda: Schedule([], []), r"one length of at least 1, got 0 and 0 entries; each size needs the examples"),
    (lambda: Schedule([1], [2]), r"examples must begin with 0, got examples\[0\] = 1; the first size holds from"),
    (lambda: Schedule([0, 5, 5], [1, 2, 3]), r"examples must increase and be finite, got examples\[2\] = 5 after 5"),
    (lambda: Schedule([0, math.nan], [1, 2]), r"examples must increase and be finite, got examples\[1\] = nan after 0"),
    (lambda: Schedule([0, 5], [1, 0]), r"accumulation_steps\[1\] must be a whole number of at least 1, got"),
    (lambda: Seesaw(2, []), r"milestones must hold at least one entry, got none; Fixed\(start\)"),
    (lambda: Seesaw(2, [0, 5]), r"milestones\[0\] must be positive and finite, got milestones\[0\] = 0; start holds"),
    (lambda: Seesaw(2, [5, 3]), r"milestones must increase and be finite, got milestones\[1\] = 3 after 5"),
    (lambda: Seesaw(2, [5], decay=1.0), r"decay must be in \(0, 1\), got decay = 1.0; 0.5 halves the rate"),
    (lambda: Seesaw(0, [5]), r"start must be a whole number of at least 1, got start = 0"),
    (lambda: NormTest(theta=0.0), r"theta must be positive and finite, got theta = 0.0; 0.5 wants an error of half"),
    (lambda: InnerProductTest(theta=-1.0), r"theta must be positive and finite, got theta = -1.0; 0.9 is the paper's"),
    (lambda: InnerProductTest(nu=0.0), r"nu must be positive and finite, got nu = 0.0; None switches the orthogonal"),
    (lambda: CosineSimilarity(target=1.0), r"target must be in \(0, 1\), got target = 1.0; 0.75 is a relative error"),
    (lambda: CosineSimilarity(factor=2.0), r"factor must be in \(1, 2\), got factor = 2.0; 1.1 moves by a tenth"),
    (lambda: NoiseScale(memory=0.0), r"memory must be positive and finite, got memory = 0.0; None takes max"),
    (lambda: Pareto(price=-1.0), r"price must be positive and finite, got price = -1.0; c0 / c1 for a window"),
    (lambda: Pareto(1.0, memory=math.inf), r"memory must be positive and finite, got memory = inf; None takes"),
    (lambda: Goodput(0), r"initial_batch must be positive and finite, got initial_batch = 0; the batch that"),
    (lambda: Goodput(8, step_seconds=-1.0), r"step_seconds must be positive and finite, got step_seconds = -1.0; None"),
    (lambda: Goodput(8, example_seconds=0.0), r"example_seconds must be positive and finite, got example_seconds = 0"),
    (lambda: Goodput(8, improvement=0.9), r"improvement must be finite and at least 1, got improvement = 0.9; 1.05 is"),
    (lambda: CABS(scale=0.0), r"scale must be positive and finite, got scale = 0.0; 1.0 is the paper's"),
    (lambda: CABS(loss_floor=math.inf), r"loss_floor must be finite, got loss_floor = inf; 0.0 for cross-entropy"),
    (lambda: DiveBatch(0.0, 100), r"delta must be positive and finite, got delta = 0.0; 1.0 takes the diversity"),
    (lambda: DiveBatch(1.0, math.inf), r"epoch_examples must be positive and finite, got epoch_examples = inf; len"),
    (
        lambda: RelativeStandardError(channel="mean"),
        r"channel must be one of \('typical', 'pooled'\), got channel = 'm",
    ),
    (lambda: RelativeStandardError(at_floor="stop"), r"at_floor must be one of \('grow', 'hold'\), got at_floor = 'st"),
    (lambda: Guard(skip_ratio=1.0), r"skip_ratio must be finite and above 1, got skip_ratio = 1.0; 100 is ten times"),
    (lambda: Guard(max_skips=-1), r"max_skips must be a whole number of at least 0, got max_skips = -1"),
    (lambda: Guard(max_skips=True), r"max_skips must be a whole number of at least 0, got max_skips = True"),
    (lambda: Guard(hold=0.0), r"hold must be positive and finite, got hold = 0.0; None takes ten half-lives"),
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
