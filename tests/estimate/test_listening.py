"""estimate/listening.py, and what the trackers make of windows of which only ``|g|^2`` is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptbatch import estimate
from adaptbatch.estimate.listening import AFTER_CHANGE, KNOWN, RAREST
from adaptbatch.estimate.moments import noise_scale_error
from adaptbatch.records import Measurement, NoiseEstimate, Progress

CELLS, SIZE, DIMENSIONS = 4, 16.0, 40
N = CELLS * SIZE
FOREVER = 1e12


def window(rng: np.random.Generator, mean: float, deviation: float) -> Measurement:
    """Gradients of ``DIMENSIONS`` entries of ``mean``, each example's with this standard deviation."""
    cells = mean + rng.standard_normal((CELLS, DIMENSIONS)) * deviation / math.sqrt(SIZE)
    g = cells.mean(axis=0)
    return Measurement(SIZE * float((cells**2).sum()), float(g @ g), N, CELLS)


def pooled(
    windows: list[Measurement], listens: Callable[[int], bool], out: frozenset[int] = frozenset()
) -> estimate.NoiseTracker:
    tracker = estimate.NoiseTracker()
    for index, one in enumerate(windows):
        if listens(index):
            tracker = tracker.update(estimate.estimate_window(one), N, FOREVER, index in out)
        else:
            trace = one.batch_sq_norm * 1.5**2 / (0.2**2 + 1.5**2 / N) if index in out else None
            tracker = tracker.update_length(one.batch_sq_norm, CELLS - 1.0, 1 / N, N, FOREVER, trace)
    return tracker


def one_in_four(index: int) -> bool:
    return index % 4 == 0


def within(values: list[float], truth: float) -> None:
    """Their mean is the truth, to four of its standard errors."""
    assert abs(np.mean(values) - truth) < 4.0 * np.std(values) / math.sqrt(len(values))


class TestPooled:
    def test_is_unbiased_and_its_interval_covers(self):
        rng, signal, trace = np.random.default_rng(1), DIMENSIONS * 0.2**2, DIMENSIONS * 1.5**2
        estimates = [pooled([window(rng, 0.2, 1.5) for _ in range(120)], one_in_four).estimate() for _ in range(600)]
        within([one.noise_trace for one in estimates], trace)
        within([one.grad_sq_norm for one in estimates], signal)
        for name, var in (("noise_trace", "var_noise_trace"), ("grad_sq_norm", "var_grad_sq_norm")):
            # Their spread is what each of them says of itself: a sample variance of 600 has a standard error of 6 %.
            spread = np.var([getattr(one, name) for one in estimates])
            assert np.mean([getattr(one, var) for one in estimates]) == pytest.approx(spread, rel=0.25)
        covariance = np.cov([one.noise_trace for one in estimates], [one.grad_sq_norm for one in estimates])[0, 1]
        assert np.mean([one.covariance for one in estimates]) == pytest.approx(covariance, rel=0.4)
        limits = [estimate.noise_scale_interval(one) for one in estimates]
        covered = np.mean([low <= trace / signal <= high for low, high in limits])
        # Of 600 at 95 %: a standard error of 0.9 %; thirty windows that were measured are a small sample.
        assert 0.92 <= covered <= 0.98

    def test_noise_that_changes_is_no_signal(self):
        """What is inferred of old windows follows what is known now: the mean of the noise, of them all."""
        rng, signals = np.random.default_rng(2), []
        for _ in range(300):
            windows = [window(rng, 0.2, 1.0 if index < 60 else 3.0) for index in range(120)]
            signals.append(pooled(windows, one_in_four).signal_mean)
        within(signals, DIMENSIONS * 0.2**2)

    def test_what_stands_out_counts_as_one_of_all_windows_measured_or_not(self):
        rng, out = np.random.default_rng(3), frozenset((40, 57, 83))
        found, truth = [], []
        for _ in range(300):
            windows = [window(rng, *((6.0, 45.0) if index in out else (0.2, 1.5))) for index in range(120)]
            found.append(pooled(windows, one_in_four, out))
            truth.append(pooled(windows, lambda index: True, out))
        share = 3 / 120 * 900.0 + 117 / 120
        # A window's usual proportions stand for its own, which the mean of three draws misses by little.
        for name, usual in (("trace_mean", DIMENSIONS * 1.5**2), ("signal_mean", DIMENSIONS * 0.2**2)):
            assert np.mean([getattr(one, name) for one in truth]) == pytest.approx(share * usual, rel=0.1)
            assert np.mean([getattr(one, name) for one in found]) == pytest.approx(share * usual, rel=0.2)

    def test_windows_of_one_cell_and_those_before_any_measurement_only_age(self):
        tracker = estimate.NoiseTracker()
        assert tracker.update_length(4.0, 3.0, 1 / N, N, FOREVER) == tracker
        known = tracker.update(NoiseEstimate(4.0, 100.0, degrees_of_freedom=3.0), N, memory=N)
        later = known.update_length(4.0, 0.0, 1 / N, N, memory=N)
        assert (later.weight, later.trace_mean, later.signal_mean) == (1.5, 100.0, 4.0)

    @given(st.lists(st.floats(0.0, 1e150), min_size=1, max_size=30), st.floats(1e-3, 1e3), st.booleans())
    def test_is_finite_for_any_lengths(self, lengths, memory, out):
        tracker = estimate.NoiseTracker().update(NoiseEstimate(1.0, 50.0, degrees_of_freedom=3.0), N, memory * N)
        for length in lengths:
            tracker = tracker.update_length(length, 3.0, 1 / N, N, memory * N, N * length if out else None)
            assert math.isfinite(tracker.signal_mean)
            assert 0.0 <= tracker.trace_mean <= max(50.0, N * max(lengths))


class TestTypical:
    def test_a_scale_that_falls_by_decades_unheard_is_followed(self):
        rng, tracker = np.random.default_rng(4), estimate.TypicalTracker()
        for index in range(2000):
            scale = 10.0 ** (-3.0 * index / 2000)
            one = window(rng, 0.2 * scale, 1.5 * scale)
            pair = estimate.estimate_window(one)
            if not one_in_four(index):
                one = Measurement(math.nan, one.batch_sq_norm, N, CELLS)
                pair = estimate.estimate_window(one)
            tracker = tracker.update(pair, one, memory=100 * N)
        found = tracker.estimate()
        low, high = estimate.noise_scale_interval(found)
        assert low <= 1.5**2 / 0.2**2 <= high < 1.5 * low
        # A median of 64 windows is that of the 32nd last.
        ago = 1e-6 * 10.0 ** (6.0 * 32 / 2000)
        assert tracker.level == pytest.approx(DIMENSIONS * (0.2**2 + 1.5**2 / SIZE) * ago, rel=0.15)

    def test_an_exceedance_nobody_listened_to_is_one_all_the_same(self):
        rng, tracker = np.random.default_rng(5), estimate.TypicalTracker()
        usual = [window(rng, 0.2, 1.5) for _ in range(64)]
        for one in usual:
            tracker = tracker.update(estimate.estimate_window(one), one, memory=100 * N)
        loud = Measurement(math.nan, 1e6 * usual[0].batch_sq_norm, N, CELLS)
        assert tracker.stands_out(loud, 1 / N)
        after = tracker.update(estimate.estimate_window(loud), loud, memory=100 * N).tail()
        assert after.excess > 1e5
        assert after.share > 0.99
        assert (after.episode_batch, after.episode_examples) == (N, 0.0)


class TestPolicy:
    @staticmethod
    def known(error: float) -> NoiseEstimate:
        return NoiseEstimate(4.0, 400.0, (4.0 * error) ** 2, 0.0, 0.0, 90.0, 30.0)

    @pytest.mark.parametrize(
        ("error", "every"),
        [
            (math.inf, 1),
            (math.nan, 1),
            (1.01 * KNOWN, 1),
            (0.99 * KNOWN, 2),
            (0.49 * KNOWN, 4),
            (0.01, 4),
            (0.0, RAREST),
        ],
    )
    def test_listens_as_rarely_as_the_noise_scale_is_known(self, error, every):
        evidence = self.known(error)
        turns = [index for index in range(32) if estimate.listens("auto", evidence, Progress(index, 6400.0, 2, 32.0))]
        assert turns == list(range(0, 32, every))

    def test_listens_to_all_after_a_change_and_while_there_is_little_evidence(self):
        settled = Progress(5, 6400.0, 2, 32.0, examples_since_change=64.0 * AFTER_CHANGE)
        changed = Progress(5, 6400.0, 2, 32.0, examples_since_change=64.0 * AFTER_CHANGE - 1.0)
        young = NoiseEstimate(4.0, 400.0, 0.0, 0.0, 0.0, 90.0, effective_windows=15.0)
        assert not estimate.listens("auto", self.known(0.01), settled)
        assert estimate.listens("auto", self.known(0.01), changed)
        assert estimate.listens("auto", young, settled)

    @pytest.mark.parametrize("pair", [(-1.0, 400.0), (4.0, -1.0), (0.0, 400.0), (math.nan, math.nan)])
    def test_a_noise_scale_that_is_no_number_is_not_known(self, pair):
        assert noise_scale_error(NoiseEstimate(*pair, 0.1, 0.1, 0.0, 90.0, 30.0)) == math.inf

    @given(st.floats(0.01, 1.0), st.integers(1, 400))
    def test_a_share_is_kept_to_one_window(self, share, turns):
        heard = sum(estimate.listens(share, self.known(1.0), Progress(turn)) for turn in range(turns))
        assert abs(heard - share * turns) <= 1.0 + 1e-9
