"""state.py: what is known between two windows; the controller and the simulator hold the same value."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptbatch import Fixed, Limits, RelativeStandardError, estimate, schema
from adaptbatch.estimate import NoiseTracker
from adaptbatch.records import Decision, Measurement, Progress, WindowCounts, WindowResult
from adaptbatch.rules import CABS, Rule, decide
from adaptbatch.schema import restored, saved
from adaptbatch.state import State

MEMORY = 5_000.0


def window(rng: np.random.Generator, cells: int = 4, batch: float = 32.0, scale: float = 1.0) -> Measurement:
    g = 1.0 + rng.normal(size=(cells, 10))
    mean = g.mean(axis=0)
    return Measurement(scale * float((g**2).sum()) * batch / cells, scale * float(mean @ mean), batch, cells)


def filled(windows: int = 40, metric_from: int | None = None) -> State:
    rng, state = np.random.default_rng(0), State(Progress(accumulation_steps=4))
    for t in range(windows):
        euclidean = window(rng)
        inside = window(rng, scale=1e3) if metric_from is not None and t >= metric_from else None
        state = state.counted(WindowCounts(32.0, 4)).measured(
            WindowResult(euclidean, inside, loss=1.0 / (t + 1), lr=0.1), MEMORY
        )
    return state


def decided(state: State, rule: Rule) -> tuple[State, Decision]:
    decision = decide(rule, state.evidence(), state.progress, Limits())
    return state.sized(decision.accumulation_steps), decision


class TestCounting:
    def test_unequal_micro_batches_are_their_mean(self):
        state = State(Progress(accumulation_steps=2)).counted(WindowCounts(10.0 + 20.0, 2, largest=20.0))
        assert (state.progress.micro_batch_examples, state.unequal) == (15.0, 1)
        # Once may have been the end of the data; from the second time on every window counts.
        state = state.counted(WindowCounts(12.0 + 30.0, 2, largest=30.0))
        assert (state.progress.micro_batch_examples, state.unequal) == (pytest.approx(18.0, rel=0.01), 2)
        # Two that happen to be equal are two of many now.
        state = state.counted(WindowCounts(6.0 + 6.0, 2, largest=6.0))
        assert state.progress.micro_batch_examples == pytest.approx(14.0, rel=0.01)

    def test_one_window_unlike_the_others_was_the_end_of_the_data(self):
        state = State(Progress(accumulation_steps=1)).counted(WindowCounts(32.0, 1, largest=32.0))
        state = state.counted(WindowCounts(5.0, 1, largest=5.0))
        assert (state.progress.micro_batch_examples, state.unequal) == (32.0, 1)
        state = state.counted(WindowCounts(32.0, 1, largest=32.0))
        assert (state.progress.micro_batch_examples, state.unequal) == (32.0, 0)

    def test_a_window_that_ended_the_data_says_nothing_of_unequal_ones(self):
        state = State(Progress(accumulation_steps=2)).counted(WindowCounts(32.0, 2, largest=16.0))
        assert state.counted(WindowCounts(20.0 + 5.0, 2, largest=20.0, ended=True)).unequal == 0

    def test_a_window_is_counted(self):
        state = State(Progress(accumulation_steps=4)).counted(WindowCounts(64.0, 4))
        assert (state.progress.window, state.progress.examples_seen, state.progress.micro_batch_examples) == (
            1,
            64.0,
            16.0,
        )

    def test_a_partial_window_does_not_shrink_the_micro_batch(self):
        state = State(Progress(accumulation_steps=4)).counted(WindowCounts(64.0, 4)).counted(WindowCounts(20.0, 2))
        assert state.progress.micro_batch_examples == 16.0

    def test_nor_does_a_short_micro_batch_inside_a_full_one(self):
        """The last of an epoch, in the middle of a window."""
        state = State(Progress(accumulation_steps=4)).counted(WindowCounts(64.0, 4, largest=16.0))
        assert state.counted(WindowCounts(16.0 * 3 + 5.0, 4, largest=16.0)).progress.micro_batch_examples == 16.0
        assert state.counted(WindowCounts(4 * 8.0, 4, largest=8.0)).progress.micro_batch_examples == 8.0
        for _ in range(3):
            state = state.counted(WindowCounts(16.0 * 3 + 5.0, 4, largest=16.0))
        assert (state.progress.micro_batch_examples, state.unequal) == (16.0, 0)

    def test_another_size_of_equal_micro_batches_is_known_of_its_own_only(self):
        state = State(Progress(accumulation_steps=4))
        for size in (16.0, 16.0, 8.0):
            state = state.counted(WindowCounts(4 * size, 4, largest=size))
        assert (state.progress.micro_batch_examples, state.micro_batches_known) == (8.0, 4.0)

    def test_the_clock_of_a_change_starts_with_it(self):
        rule, state = Fixed(8), State(Progress(accumulation_steps=4)).counted(WindowCounts(64.0, 4))
        state, decision = decided(state, rule)
        assert (decision.accumulation_steps, state.changed_at) == (8, 64.0)
        assert state.counted(WindowCounts(128.0, 8)).progress.examples_since_change == 128.0

    def test_seconds_are_split_into_the_step_and_the_rest(self):
        state = State(Progress(accumulation_steps=2))
        for _ in range(50):
            state = state.counted(WindowCounts(64.0, 2, step_seconds=0.5, seconds=3.2))
        evidence = state.evidence()
        assert evidence.step_seconds == pytest.approx(0.5)
        assert evidence.example_seconds == pytest.approx(3.2 / 64)


class TestEvidence:
    def test_pooled_moments_are_those_of_the_tracker(self):
        rng, tracker = np.random.default_rng(0), NoiseTracker()
        for _ in range(40):
            tracker = tracker.update(estimate.estimate_window(window(rng)), 32.0, MEMORY)
        assert filled().evidence().pooled == tracker.estimate()

    def test_the_optimizers_metric_takes_over_when_it_is_warm(self):
        state = filled(windows=40, metric_from=25)
        assert state.evidence().pooled == state.metric.estimate()
        assert state.evidence().pooled.effective_windows == pytest.approx(15, rel=0.01)
        assert state.pooled.estimate().effective_windows > 35
        # What was known in the other unit is gone from the channels too.
        assert len(state.typical.recent) == 15
        assert max(state.typical.recent) / min(state.typical.recent) < 10

    def test_without_its_metric_nothing_of_its_unit_is_left(self):
        state = filled(40, metric_from=20).euclidean()
        fresh = State(Progress())
        assert (state.metric, state.typical, state.climb) == (fresh.metric, fresh.typical, fresh.climb)
        assert state.window is None

    def test_new_limits_say_which_of_them_binds(self):
        wanted = Decision(8, 256.0, "hold")
        for limits, steps, reason in ((Limits(max_steps=4), 4, "at_max"), (Limits(min_steps=16), 16, "at_min")):
            state, decision = filled().limited(wanted, limits)
            assert (state.progress.accumulation_steps, decision.accumulation_steps, decision.reason) == (
                steps,
                steps,
                reason,
            )

    def test_what_was_climbed_in_another_unit_is_forgotten(self):
        rng = np.random.default_rng(1)
        first = WindowResult(window(rng), window(rng, scale=1e3))
        fresh = State(Progress(accumulation_steps=4)).counted(WindowCounts(32.0, 4)).measured(first, MEMORY)
        assert filled().counted(WindowCounts(32.0, 4)).measured(first, MEMORY).climb == fresh.climb

    def test_the_loss_is_a_decayed_mean(self):
        losses = [1.0 / (t + 1) for t in range(40)]
        weights = [2.0 ** (-(39 - t) * 32.0 / MEMORY) for t in range(40)]
        assert filled().evidence().loss == pytest.approx(np.average(losses, weights=weights))

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_the_phase_has_the_sign_of_the_products(self, sign):
        rng, state = np.random.default_rng(0), State(Progress(accumulation_steps=4))
        for _ in range(60):
            result = replace(window(rng), consecutive_product=sign * (1.0 + 0.5 * rng.standard_normal()))
            state = state.counted(WindowCounts(32.0, 4)).measured(WindowResult(result), MEMORY)
        assert sign * state.consecutive() > 5.0

    def test_a_window_cut_short_is_no_size_of_the_climb(self):
        state = filled()
        short = replace(window(np.random.default_rng(1)), global_batch=8.0)
        assert state.counted(WindowCounts(8.0, 1)).measured(WindowResult(short, steps=0), MEMORY).climb == state.climb
        assert (
            state.counted(WindowCounts(32.0, 4)).measured(WindowResult(window(np.random.default_rng(1))), MEMORY).climb
            != state.climb
        )

    def test_no_phase_without_products(self):
        assert math.isnan(filled().consecutive())


class TestMemories:
    """Numbers of the design that a reader is told."""

    def test_half_of_a_windows_seconds_is_of_the_last_hundred(self):
        state = State(Progress(accumulation_steps=2))
        for seconds in [0.0] * 3000 + [1.0] * 100:
            state = state.counted(WindowCounts(8.0, 2, step_seconds=seconds))
        assert state.evidence().step_seconds == pytest.approx(0.5, rel=1e-6)

    def test_half_of_the_size_of_unequal_micro_batches_is_of_the_last_two_hundred(self):
        state = State(Progress(accumulation_steps=4))
        for scale in [10.0] * 1000 + [30.0] * 50:
            state = state.counted(WindowCounts(4 * scale, 4, largest=1.5 * scale))
        assert state.progress.micro_batch_examples == pytest.approx(20.0, rel=0.01)

    def test_the_phase_is_known_from_eight_windows_on(self):
        state = State(Progress(accumulation_steps=2))
        for index in range(9):
            assert math.isnan(state.consecutive())
            one = Measurement(64.0, 4.0, global_batch=8.0, cells=2, consecutive_product=1.0 + index % 2)
            state = state.counted(WindowCounts(8.0, 2)).measured(WindowResult(one), memory=1e9)
        assert state.consecutive() > 0.0

    def test_a_window_that_is_short_on_one_rank_says_nothing_of_the_micro_batches(self):
        whole = State(Progress(accumulation_steps=2, world_size=2)).counted(WindowCounts(16.0, 4, largest=4.0))
        short = whole.counted(WindowCounts(9.0, 3, largest=4.5))
        assert (short.progress.micro_batch_examples, short.micro_batches_known, short.unequal) == (
            4.0,
            whole.micro_batches_known,
            0,
        )

    def test_the_first_size_is_no_change_of_one(self):
        state, _ = decided(State(Progress(accumulation_steps=2, micro_batch_examples=4.0)), Fixed(4))
        assert state.changed_at == -math.inf
        state, _ = decided(state.counted(WindowCounts(16.0, 4)), Fixed(8))
        assert state.changed_at == 16.0


class TestWhatDoesNotEnter:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_loss_that_is_no_number_is_left_out(self, bad: float):
        """All labels of a window ignored: its gradient is finite, its loss is not."""
        rng, with_it, without = np.random.default_rng(0), State(Progress()), State(Progress())
        for t in range(20):
            own = window(rng)
            with_it = with_it.measured(WindowResult(own, loss=bad if t == 7 else 2.0 + t), MEMORY)
            if t == 7:
                without = replace(without, loss_sum=without.loss_sum * 2.0 ** (-32.0 / MEMORY))
                without = replace(without, loss_weight=without.loss_weight * 2.0 ** (-32.0 / MEMORY))
            else:
                without = without.measured(WindowResult(own, loss=2.0 + t), MEMORY)
        assert with_it.evidence().loss == pytest.approx(without.evidence().loss, rel=1e-12)
        assert 2.0 <= with_it.evidence().loss <= 21.0

    def test_cabs_goes_on_after_labels_that_were_all_ignored(self):
        rng, state = np.random.default_rng(0), State(Progress(accumulation_steps=4))
        for t in range(40):
            loss = math.nan if t == 20 else 1.0
            state = state.counted(WindowCounts(32.0, 4)).measured(WindowResult(window(rng), loss=loss, lr=0.1), MEMORY)
            state, decision = decided(state, CABS())
        assert math.isfinite(decision.target_batch)
        assert decision.reason != "undecided"

    @pytest.mark.parametrize("lost", ["absent", "overflowed"])
    def test_a_window_without_the_metric_is_of_another_unit(self, lost: str):
        """A parameter that was thawed has a cold second moment: for a hundred windows there is no metric."""
        state, rng = filled(300, metric_from=20), np.random.default_rng(1)
        before, level = state.typical.estimate(), state.typical.level
        overflow = Measurement(math.inf, 1.0, 32.0, 4)
        for _ in range(100):
            result = WindowResult(window(rng), None if lost == "absent" else overflow, loss=1.0, lr=0.1)
            assert state.comparable(result) is None
            state = state.counted(WindowCounts(32.0, 4)).measured(result, MEMORY)
        assert state.typical.estimate() == before
        assert state.typical.level == level
        assert estimate.noise_scale(state.pooled.estimate()) == pytest.approx(10.0, rel=0.5)

    def test_until_the_metric_is_warm_the_euclidean_window_is_compared(self):
        cold, rng = filled(30), np.random.default_rng(1)
        first = WindowResult(window(rng), window(rng, scale=1e3))
        assert cold.comparable(first) is first.measurement
        assert cold.measured(first, MEMORY).comparable(first) is first.in_metric


class TestState:
    @given(windows=st.integers(0, 30), metric_from=st.none() | st.integers(0, 30))
    def test_comes_back_equal(self, windows, metric_from):
        state = filled(windows, metric_from)
        assert repr(restored(State, saved(state))) == repr(state)

    def test_holds_plain_values_only(self):
        def plain(value: object) -> bool:
            if isinstance(value, dict):
                return all(type(k) is str and plain(v) for k, v in value.items())
            if isinstance(value, list):
                return all(plain(v) for v in value)
            return value is None or type(value) in (int, float, str, bool)

        assert plain(saved(filled(40, 20)))

    @pytest.mark.parametrize("name", ["pooled", "typical", "climb", "progress"])
    def test_refuses_other_keys_at_any_depth(self, name):
        state = saved(filled())
        with pytest.raises(
            ValueError, match=rf"state\['{name}'\] must have exactly the known keys, got unknown \['x'\]"
        ):
            restored(State, state | {name: state[name] | {"x": 1.0}})

    def test_refuses_other_keys_further_down(self):
        state = saved(filled())
        changed = state["typical"] | {"pooled": state["typical"]["pooled"] | {"x": 1.0}}
        expected = r"state\['typical'\]\['pooled'\] must have exactly the known keys, got unknown \['x'\]"
        with pytest.raises(ValueError, match=expected):
            restored(State, state | {"typical": changed})

    @pytest.mark.parametrize("index", [0, 1])
    def test_refuses_a_window_that_is_not_finite(self, index):
        state = saved(filled())
        state["window"][index] = math.inf
        with pytest.raises(ValueError, match=rf"state\['window'\]\[{index}\] must be a finite number, got inf"):
            restored(State, state)

    def test_refuses_a_window_that_is_none(self):
        with pytest.raises(ValueError, match=r"state\['window'\] must hold the 7 numbers of a Measurement or none"):
            restored(State, saved(filled()) | {"window": [1.0, 2.0]})


def test_a_decision_changes_nothing_that_was_measured():
    state = filled()
    after, _ = decided(state, RelativeStandardError())
    assert after.evidence() == state.evidence()


def test_one_window_of_two_that_is_not_finite_is_told():
    """As after a load, where two arrive at once."""
    good, bad = (WindowResult(replace(window(np.random.default_rng(0)), batch_sq_norm=x)) for x in (4.0, math.nan))
    for results in ([good, bad], [bad, good]):
        state, _, decision = filled().advance(WindowCounts(32.0, 4), results, RelativeStandardError(), Limits())
        assert not state.progress.finite
        assert decision.reason == "nonfinite"


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (schema.Number, [-1.0, 0, math.nan, math.inf, -math.inf], [True, "1", None]),
        (schema.Finite, [-1.0, 0], [math.nan, math.inf, -math.inf]),
        (schema.Positive, [1e-9, 1], [0.0, -1.0, math.nan, math.inf]),
        (schema.PositiveOrNan, [1.0, math.nan], [0.0, -1.0, math.inf]),
        (schema.Sum, [0.0, 1], [-1e-9, math.nan, math.inf]),
        (schema.Square, [0.0, math.nan, math.inf], [-1.0, -math.inf]),
        (schema.Extent, [0.0, math.inf], [-1.0, math.nan]),
        (schema.Population, [1.0, math.inf], [0.5, math.nan]),
        (schema.Moment, [-math.inf, 0.0, 5.0], [math.inf, math.nan]),
        (schema.Count, [0, 2**62 - 1], [-1, 2**62, 1.0, True]),
        (schema.Natural, [1], [0, 1.5]),
        (schema.Flag, [True, False], [0, 1, None]),
    ],
)
def test_a_value_that_is_saved_has_its_range(kind, good, bad):
    check = get_args(kind)[1]
    for value in good:
        check("state['x']", value)
    for value in bad:
        with pytest.raises(ValueError, match=r"state\['x'\] must be "):
            check("state['x']", value)
