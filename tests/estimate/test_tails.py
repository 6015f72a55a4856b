"""tails.py: the typical channel against an explicit twin, its bound, its account of what stands out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptbatch import estimate
from adaptbatch.estimate.typical import BOUND, EXCEEDANCE, HOLD_MEMORIES, LEVEL_LEAST, LEVEL_WINDOWS, TypicalTracker
from adaptbatch.records import Measurement, NoiseEstimate
from adaptbatch.schema import restored, saved

MEMORY = 20_000.0


def windows(scales: Sequence[float], seed: int = 0, cells: int = 4, batch: float = 64.0) -> list[Measurement]:
    """Gaussian windows with ``B = 100``, each gradient multiplied by the root of its scale."""
    rng, drawn = np.random.default_rng(seed), []
    for scale in scales:
        g = rng.normal(size=(cells, 20)) * math.sqrt(100 / 20 / (batch / cells))
        g[:, 0] += 1.0
        mean = g.mean(axis=0)
        drawn.append(Measurement(scale * float((g**2).sum()) * batch / cells, scale * float(mean @ mean), batch, cells))
    return drawn


def track(drawn: Sequence[Measurement]) -> TypicalTracker:
    tracker = TypicalTracker()
    for window in drawn:
        tracker = tracker.update(estimate.estimate_window(window), window, MEMORY)
    return tracker


def typical_twin(drawn: Sequence[Measurement]) -> tuple[float, float]:
    """Weighted means of the scaled and bounded pairs, from their definitions."""
    energies = [w.weighted_sq_norms / w.global_batch for w in drawn]
    total = trace = signal = 0.0
    for t, window in enumerate(drawn):
        before = energies[max(0, t - LEVEL_WINDOWS) : t]
        unit = max(statistics.median(before), energies[t] / BOUND) if len(before) >= LEVEL_LEAST else energies[t]
        pair = estimate.estimate_window(window)
        weight = 2.0 ** -(sum(w.global_batch for w in drawn[t + 1 :]) / MEMORY) * pair.degrees_of_freedom
        total, trace = total + weight, trace + weight * pair.noise_trace / unit
        signal += weight * pair.grad_sq_norm / unit
    return trace / total, signal / total


class TestTypicalChannel:
    @pytest.mark.parametrize("scales", [[1.0] * 90, [1e6 ** (t / 90) for t in range(90)], [1.0] * 60 + [1e5] * 30])
    def test_equals_its_twin(self, scales):
        drawn = windows(scales)
        pooled = track(drawn).estimate()
        assert (pooled.noise_trace, pooled.grad_sq_norm) == pytest.approx(typical_twin(drawn), rel=1e-9)

    def test_is_the_pooled_ratio_where_nothing_stands_out(self):
        """Gaussian windows: within two per cent, far less than its own standard error of ten."""
        drawn = windows([1.0] * 600)
        pooled = estimate.NoiseTracker()
        for window in drawn:
            pooled = pooled.update(estimate.estimate_window(window), window.global_batch, MEMORY)
        assert estimate.noise_scale(track(drawn).estimate()) == pytest.approx(
            estimate.noise_scale(pooled.estimate()), rel=0.02
        )
        assert track(drawn).tail().share == 0.0

    @given(exponent=st.integers(-60, 60))
    def test_does_not_depend_on_the_unit_of_the_gradient(self, exponent):
        drawn = windows([1.0, 3.0, 0.2, 500.0] * 10)
        scaled = [
            replace(
                w, weighted_sq_norms=w.weighted_sq_norms * 2.0**exponent, batch_sq_norm=w.batch_sq_norm * 2.0**exponent
            )
            for w in drawn
        ]
        assert track(scaled).estimate() == track(drawn).estimate()
        assert track(scaled).tail() == track(drawn).tail()

    def test_one_window_moves_it_by_no_more_than_its_bound(self):
        """A gradient of any length has at most the influence of one that is sqrt(10) times longer."""
        calm = windows([1.0] * 100)
        spiked = windows([1.0] * 99 + [1e12])
        bounded = windows([1.0] * 99 + [50.0])
        assert estimate.noise_scale(track(spiked).estimate()) == pytest.approx(
            estimate.noise_scale(track(bounded).estimate()), rel=1e-9
        )
        change = estimate.noise_scale(track(spiked).estimate()) / estimate.noise_scale(track(calm).estimate())
        assert 0.7 < change < 1.4

    def test_a_window_of_one_micro_batch_enters_the_level_only(self):
        tracker = track(windows([1.0] * 20))
        single = Measurement(640.0, 10.0, global_batch=64.0, cells=1)
        after = tracker.update(estimate.estimate_window(single), single, MEMORY)
        assert after.recent[-1] == 10.0
        assert after.estimate().noise_trace == tracker.estimate().noise_trace

    def test_a_gradient_of_zeros_is_no_scale(self):
        tracker = TypicalTracker()
        for _ in range(20):
            tracker = tracker.update(NoiseEstimate(0.0, 0.0, degrees_of_freedom=1.0), Measurement(0, 0, 8.0, 2), MEMORY)
        assert math.isnan(tracker.estimate().noise_trace)
        assert math.isnan(tracker.tail().excess)

    def test_the_level_is_the_median_of_sixty_four_windows(self):
        """After 71 windows 33 of the last 64 are ordinary ones, after 73 only 31."""
        pair, tracker, levels = NoiseEstimate(2.0, 50.0, degrees_of_freedom=3.0), TypicalTracker(), []
        for scale in [1.0] * 40 + [9.0] * 60:
            tracker = tracker.update(pair, Measurement(64.0 * scale, 1.0, global_batch=64.0, cells=4), memory=1e5)
            levels.append(tracker.level)
        assert (levels[70], levels[71], levels[72]) == (1.0, 5.0, 9.0)


class TestTailChannel:
    def test_the_share_is_what_the_bound_cut_off(self):
        drawn = windows([1.0] * 99 + [1e4])
        traces = [max(estimate.estimate_window(w).noise_trace, 0.0) for w in drawn]
        level = statistics.median(w.weighted_sq_norms / w.global_batch for w in drawn[99 - LEVEL_WINDOWS : 99])
        cut = 1.0 - level / (drawn[-1].weighted_sq_norms / drawn[-1].global_batch / BOUND)
        decays = [2.0 ** (-(99 - t) * 64.0 / MEMORY) for t in range(100)]
        expected = cut * traces[-1] / sum(d * trace for d, trace in zip(decays, traces, strict=True))
        assert track(drawn).tail().share == pytest.approx(expected, rel=1e-9)

    def test_an_exceedance_opens_an_episode(self):
        before, after = track(windows([1.0] * 50)), track(windows([1.0] * 50 + [10 * EXCEEDANCE]))
        assert before.tail().episode_examples == math.inf
        assert after.tail().excess > EXCEEDANCE
        assert (after.tail().episode_batch, after.tail().episode_examples) == (64.0, 0.0)

    def test_a_large_window_below_the_exceedance_opens_none(self):
        assert track(windows([1.0] * 50 + [0.1 * EXCEEDANCE])).tail().episode_examples == math.inf

    def test_later_exceedances_do_not_raise_the_batch_of_an_episode(self):
        """At whatever size they come: it is one doubling, not one for each."""
        tracker = track(windows([1.0] * 50 + [10 * EXCEEDANCE]))
        for window in windows([1.0] * 100 + [10 * EXCEEDANCE], batch=256.0, seed=1):
            tracker = tracker.update(estimate.estimate_window(window), window, MEMORY)
        assert (tracker.tail().episode_batch, tracker.tail().episode_examples) == (64.0, 0.0)

    def test_after_ten_quiet_memories_another_episode_begins(self):
        tracker = track(windows([1.0] * 50 + [10 * EXCEEDANCE]))
        for window in windows([1.0] * int(HOLD_MEMORIES * MEMORY / 1000.0) + [10 * EXCEEDANCE], batch=1000.0, seed=1):
            tracker = tracker.update(estimate.estimate_window(window), window, MEMORY)
        assert tracker.tail().episode_batch == 1000.0

    def test_a_non_finite_window_counts_where_a_guard_says_so(self):
        tail = track(windows([1.0] * 50)).exceeded(128.0, MEMORY).tail()
        assert (tail.excess, tail.episode_batch, tail.episode_examples) == (math.inf, 128.0, 0.0)

    def test_state_comes_back(self):
        tracker = track(windows([1.0] * 50 + [10 * EXCEEDANCE, 1.0]))
        assert restored(TypicalTracker, saved(tracker)) == tracker
