"""noise.py against its slow twins, and its statistical promises against their own standard errors."""

from __future__ import annotations

import math
from dataclasses import asdict, astuple, replace

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from adaptbatch import estimate
from adaptbatch.estimate import NoiseTracker
from adaptbatch.records import Measurement, NoiseEstimate
from adaptbatch.schema import restored, saved
from tests import reference

SIZES = {"equal": [16.0] * 4, "partial last": [64.0, 64.0, 64.0, 17.0], "very unequal": [100.0, 10.0, 5.0]}
positive = st.floats(1e-3, 1e3)
gradients = st.integers(2, 6).flatmap(
    lambda cells: st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=cells, max_size=cells)
)


def draw_window(rng: np.random.Generator, sizes: list[float], mean: np.ndarray, spread: np.ndarray) -> Measurement:
    """Cells of Gaussian examples: means with covariance ``diag(spread^2) / w_c``."""
    return reference.measurement([(w, mean + spread * rng.standard_normal(len(mean)) / math.sqrt(w)) for w in sizes])


class TestEstimate:
    @given(gradients, st.data())
    def test_equals_the_sum_of_squared_deviations(self, rows, data):
        weights = data.draw(st.lists(positive, min_size=len(rows), max_size=len(rows)))
        cells = [(w, np.array(row)) for w, row in zip(weights, rows, strict=True)]
        trace, signal = reference.anova(cells, population=1e5)
        pair = estimate.estimate_window(reference.measurement(cells), population=1e5)
        scale = max(w * float(g @ g) for w, g in cells) + 1.0
        assert pair.noise_trace == pytest.approx(trace, abs=1e-11 * scale * len(cells))
        assert pair.grad_sq_norm == pytest.approx(signal, rel=1e-9, abs=1e-11 * scale * len(cells) / min(weights))

    def test_examples_as_cells_give_the_sample_moments(self):
        rows = np.random.default_rng(0).standard_normal((50, 7)) + 0.3
        trace, signal = reference.exact_moments(rows)
        pair = estimate.estimate_window(reference.measurement([(1.0, row) for row in rows]), population=50)
        assert pair.noise_trace == pytest.approx(trace, rel=1e-12)
        # The whole population has no standard error: |g|^2 is |G_N|^2 itself.
        assert pair.grad_sq_norm == pytest.approx(signal, rel=1e-12)

    @pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
    def test_unbiased_for_any_sizes(self, sizes):
        rng = np.random.default_rng(1)
        mean, spread = np.array([1.0, -0.5, 0.2, 0.0, 0.0]), np.array([3.0, 2.0, 1.0, 4.0, 0.5])
        pairs = [estimate.estimate_window(draw_window(rng, sizes, mean, spread)) for _ in range(20_000)]
        for found, truth in (
            ([pair.noise_trace for pair in pairs], float(spread @ spread)),
            ([pair.grad_sq_norm for pair in pairs], float(mean @ mean)),
        ):
            error = np.std(found, ddof=1) / math.sqrt(len(found))
            assert abs(np.mean(found) - truth) < 5 * error
            # A twin that treats unequal cells as equal must not pass: the tolerance is tight enough to tell.
            assert 5 * error < 0.2 * truth

    def test_unbiased_without_replacement(self):
        rng = np.random.default_rng(2)
        rows = rng.standard_normal((60, 4)) * [2.0, 1.0, 0.5, 3.0] + [0.5, 0.2, 0.0, 0.0]
        trace, signal = reference.exact_moments(rows)
        with_correction, without = [], []
        for _ in range(8_000):
            cells = [(float(len(part)), part.mean(axis=0)) for part in np.split(rng.permutation(rows)[:45], [20, 40])]
            window = reference.measurement(cells)
            with_correction.append(estimate.estimate_window(window, population=60))
            without.append(estimate.estimate_window(window).grad_sq_norm)
        for found, truth in (
            ([pair.noise_trace for pair in with_correction], trace),
            ([pair.grad_sq_norm for pair in with_correction], signal),
        ):
            error = np.std(found, ddof=1) / math.sqrt(len(found))
            assert abs(np.mean(found) - truth) < 5 * error
        error = np.std(without, ddof=1) / math.sqrt(len(without))
        assert np.mean(without) < signal - 5 * error

    @given(gradients, st.floats(0.1, 10))
    def test_scaling_and_order(self, rows, factor):
        cells = [(float(i + 1), np.array(row)) for i, row in enumerate(rows)]
        assume(max(float(np.abs(g).max()) for _, g in cells) > 1e-3)
        pair = estimate.estimate_window(reference.measurement(cells))
        scaled = estimate.estimate_window(reference.measurement([(w, factor * g) for w, g in cells]))
        shuffled = estimate.estimate_window(reference.measurement(cells[::-1]))
        size = sum(w * float(g @ g) for w, g in cells)
        for name in ("noise_trace", "grad_sq_norm"):
            assert getattr(scaled, name) == pytest.approx(factor**2 * getattr(pair, name), abs=1e-11 * factor**2 * size)
            assert getattr(shuffled, name) == pytest.approx(getattr(pair, name), abs=1e-11 * size)

    def test_one_cell_is_no_evidence(self):
        pair = estimate.estimate_window(Measurement(4.0, 2.0, 2.0, cells=1))
        assert math.isnan(pair.noise_trace)
        assert math.isnan(pair.grad_sq_norm)
        assert pair.degrees_of_freedom == 0


class TestReadings:
    pair = NoiseEstimate(grad_sq_norm=4.0, noise_trace=100.0)

    @given(st.floats(1.0, 1e6), st.floats(0.05, 20), st.floats(1.0, 1e6))
    def test_required_batch_has_exactly_this_error(self, trace, theta, population):
        pair = NoiseEstimate(grad_sq_norm=4.0, noise_trace=trace)
        n = estimate.required_batch(pair, theta, population)
        assert 0 < n <= population
        assert (
            estimate.relative_error(pair, n, population) == pytest.approx(theta, rel=1e-6) or n > 0.999999 * population
        )

    @given(
        st.floats(5e-324, 1e308),
        st.floats(0.0, 1e308),
        st.floats(1e-320, 1e150),
        st.floats(1.0, 1e300) | st.just(math.inf),
    )
    @example(signal=1.0, trace=6.476385960836947e150, theta=1.0, population=1000.0)
    @example(signal=1e-3, trace=1.0, theta=1e-200, population=math.inf)
    @example(signal=5e-324, trace=1.0, theta=1.0, population=6704317697375217.0)
    def test_required_batch_keeps_its_bounds(self, signal, trace, theta, population):
        """Whatever the rounding: no more than there is, and no exception."""
        assert 0.0 <= estimate.required_batch(NoiseEstimate(signal, trace), theta, population) <= population

    @given(st.floats(0.1, 10), st.floats(1.01, 3))
    def test_required_batch_decreases_in_theta(self, theta, factor):
        assert estimate.required_batch(self.pair, theta * factor) < estimate.required_batch(self.pair, theta)

    @pytest.mark.parametrize("theta", [0.0, -1.0, math.nan])
    def test_required_batch_refuses(self, theta):
        with pytest.raises(ValueError, match=r"theta must be positive, got theta = "):
            estimate.required_batch(self.pair, theta)

    @pytest.mark.parametrize("signal", [0.0, -1.0])
    def test_lost_signal_reads_as_infinite(self, signal):
        lost = NoiseEstimate(grad_sq_norm=signal, noise_trace=100.0)
        assert estimate.noise_scale(lost) == estimate.relative_error(lost, 10.0) == math.inf
        assert estimate.required_batch(lost, 1.0) == math.inf
        assert estimate.required_batch(lost, 1.0, population=60_000) == 60_000

    def test_the_whole_population_has_no_error(self):
        for signal in (-1.0, 0.0, 4.0):
            whole = NoiseEstimate(grad_sq_norm=signal, noise_trace=100.0)
            assert estimate.relative_error(whole, batch=500, population=400) == 0.0

    def test_no_evidence_reads_as_nan(self):
        nothing = NoiseEstimate(math.nan, math.nan)
        readings = (
            estimate.noise_scale(nothing),
            estimate.relative_error(nothing, 10.0),
            estimate.required_batch(nothing, 1.0),
        )
        assert all(map(math.isnan, readings + estimate.noise_scale_interval(nothing)))

    def test_a_negative_trace_reads_as_no_noise(self):
        quiet = NoiseEstimate(grad_sq_norm=4.0, noise_trace=-1e-9)
        assert estimate.standard_error(quiet, 10.0) == estimate.noise_scale(quiet) == 0.0

    @given(st.floats(0.1, 1e4), st.floats(-10, 100), st.floats(0.1, 10), st.floats(1, 1e4), st.floats(-0.95, 0.95))
    def test_excess_error_is_the_linear_statistic(self, trace, signal, theta, n, r):
        pair = NoiseEstimate(signal, trace, 0.5, 9.0, r * math.sqrt(0.5 * 9.0), effective_windows=20.0)
        value, error = estimate.excess_error(pair, n, theta, population=1e5)
        a, b = 1 / n - 1 / 1e5, theta**2
        weights = np.array([a, -b])
        matrix = np.array([[9.0, pair.covariance], [pair.covariance, 0.5]])
        assert value == pytest.approx(a * trace - b * signal, rel=1e-9, abs=1e-9)
        assert error == pytest.approx(math.sqrt(weights @ matrix @ weights), rel=1e-6)


class TestInterval:
    def test_is_known_from_more_than_one_effective_window_on(self):
        sure = NoiseEstimate(4.0, 100.0, 1e-12, 1e-10, 0.0, effective_windows=1.5)
        assert estimate.noise_scale_interval(sure) == pytest.approx((25.0, 25.0), rel=0.1)
        assert all(map(math.isnan, estimate.noise_scale_interval(replace(sure, effective_windows=1.0))))

    @given(
        st.floats(0.0, 1e3),
        st.floats(-3, 30),
        positive,
        positive,
        st.floats(-0.99, 0.99),
        st.floats(2, 100),
        st.floats(0, 1e4),
    )
    def test_holds_exactly_the_ratios_a_t_test_accepts(self, trace, signal, v_s, v_t, r, windows, ratio):
        pair = NoiseEstimate(signal, trace, v_s, v_t, r * math.sqrt(v_s * v_t), effective_windows=windows)
        low, high = estimate.noise_scale_interval(pair)
        # Next to a limit the two sides differ by rounding only.
        assume(all(abs(ratio - limit) > 1e-6 * (1 + ratio) for limit in (low, high)))
        accepted = reference.in_fieller_set(pair, ratio, 0.95)
        if low <= ratio <= high:
            # An unbounded set may have a gap of rejected ratios below its lower limit only.
            assert accepted or low == 0.0
        else:
            assert not accepted or ratio < low

    def test_unbounded_when_the_signal_may_be_zero(self):
        low, high = estimate.noise_scale_interval(NoiseEstimate(1.0, 100.0, 1.0, 25.0, 0.0, effective_windows=20))
        assert high == math.inf
        assert 0.0 < low < 100.0

    def test_nothing_known_is_the_whole_line(self):
        assert estimate.noise_scale_interval(NoiseEstimate(0.1, 1.0, 1.0, 25.0, 0.0, effective_windows=20)) == (
            0,
            math.inf,
        )

    def test_an_exact_pair_is_a_point(self):
        low, high = estimate.noise_scale_interval(NoiseEstimate(4.0, 100.0, 0.0, 0.0, 0.0, effective_windows=20))
        assert low == pytest.approx(25.0)
        assert high == pytest.approx(25.0)

    @pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
    def test_refuses_a_confidence_outside(self, confidence):
        with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got confidence = "):
            estimate.noise_scale_interval(NoiseEstimate(1.0, 1.0), confidence)


BATCH, CELLS, DIMENSION, WINDOWS = 64, 4, 35, 30
# Each example's squared scale, mean 1: its noise is Gaussian given the scale.
SCALES = {
    "gaussian": lambda rng, shape: np.ones(shape),
    "student t, 5 df": lambda rng, shape: 3.0 / rng.chisquare(5, shape),
    "contaminated": lambda rng, shape: np.where(rng.random(shape) < 0.05, 25.0, 1.0) / 2.2,
}


def draw_pairs(rng: np.random.Generator, runs: int, windows: int, theta_sq: float, scales, length: float = 1.0):
    """Estimates of ``tr(Sigma) = n theta_sq`` and ``|G|^2 = length^2``, each ``[runs, windows]``."""
    size = BATCH // CELLS
    spread = np.sqrt(theta_sq * BATCH / DIMENSION / size * scales(rng, (runs, windows, CELLS, size)).mean(axis=-1))
    cells = rng.standard_normal((runs, windows, CELLS, DIMENSION)) * spread[..., None]
    cells[..., 0] += length
    sq_norms, mean_sq = size * (cells**2).sum(axis=(2, 3)), (cells.mean(axis=2) ** 2).sum(axis=-1)
    traces = (sq_norms - BATCH * mean_sq) / (CELLS - 1)
    return traces, mean_sq - traces / BATCH


def pooled(traces: np.ndarray, signals: np.ndarray, memory: float = math.inf) -> list[NoiseTracker]:
    """One tracker a run."""
    trackers = [NoiseTracker()] * len(traces)
    for run, series in enumerate(zip(traces.tolist(), signals.tolist(), strict=True)):
        for trace, signal in zip(*series, strict=True):
            window = NoiseEstimate(signal, trace, degrees_of_freedom=CELLS - 1.0)
            trackers[run] = trackers[run].update(window, BATCH, memory)
    return trackers


def share_covering(trackers: list[NoiseTracker], truth: float) -> float:
    intervals = [estimate.noise_scale_interval(tracker.estimate()) for tracker in trackers]
    return float(np.mean([low <= truth <= high for low, high in intervals]))


class TestCoverage:
    """What 95 % means. Tolerances are three binomial standard errors of the count."""

    @pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
    @pytest.mark.parametrize("theta_sq", [0.25, 1.0, 4.0])
    def test_of_the_truth(self, theta_sq, scales):
        runs = 1000
        trackers = pooled(*draw_pairs(np.random.default_rng(3), runs, WINDOWS, theta_sq, scales))
        error = math.sqrt(0.95 * 0.05 / runs)
        assert 0.94 - 3 * error < share_covering(trackers, theta_sq * BATCH) < 0.96 + 3 * error

    def test_of_the_truth_under_decay(self):
        runs = 1000
        pairs = draw_pairs(np.random.default_rng(4), runs, 80, 1.0, SCALES["gaussian"])
        error = math.sqrt(0.95 * 0.05 / runs)
        assert 0.94 - 3 * error < share_covering(pooled(*pairs, memory=10.0 * BATCH), BATCH) < 0.96 + 3 * error

    def test_of_the_truth_by_autocorrelated_windows(self):
        """Windows whose errors are AR(1) with ``r = 0.5``: thrice the variance, and only 30 windows to find it."""
        runs, r = 2000, 0.5
        traces, signals = draw_pairs(np.random.default_rng(5), runs, WINDOWS, 1.0, SCALES["gaussian"])
        for series, mean in ((traces, float(BATCH)), (signals, 1.0)):
            for t in range(1, WINDOWS):
                series[:, t] = mean + r * (series[:, t - 1] - mean) + math.sqrt(1 - r * r) * (series[:, t] - mean)
        error = math.sqrt(0.9 * 0.1 / runs)
        assert share_covering(pooled(traces, signals), BATCH) > 0.9 - 3 * error

    def test_is_unbounded_without_a_signal(self):
        runs = 1000
        trackers = pooled(*draw_pairs(np.random.default_rng(6), runs, WINDOWS, 1.0, SCALES["gaussian"], length=0.0))
        unbounded = [math.isinf(estimate.noise_scale_interval(tracker.estimate())[1]) for tracker in trackers]
        assert np.mean(unbounded) > 0.95 - 3 * math.sqrt(0.95 * 0.05 / runs)

    def test_independent_windows_are_found_autocorrelated_at_the_level_of_the_test(self):
        runs = 2000
        trackers = pooled(*draw_pairs(np.random.default_rng(7), runs, 60, 1.0, SCALES["gaussian"]))
        found = np.mean([tracker.autocorrelation() > 0.0 for tracker in trackers])
        # A correlation of 60 windows is nearly normal with the error 1 / sqrt(60): 2 % are left for "nearly".
        assert found == pytest.approx(0.1, abs=0.02 + 3 * math.sqrt(0.1 * 0.9 / runs))


windows = st.lists(
    st.tuples(st.floats(0, 100), st.floats(-5, 50), st.integers(0, 8), st.floats(8, 512)), min_size=3, max_size=25
)


class TestTracker:
    @given(windows, st.floats(100, 1e5))
    def test_equals_explicit_decayed_weights(self, rows, memory):
        pairs = [NoiseEstimate(g, s, degrees_of_freedom=df) for s, g, df, _ in rows]
        batches = [n for *_, n in rows]
        assume(sum(pair.degrees_of_freedom > 0 for pair in pairs) >= 2)
        tracker = NoiseTracker()
        for pair, batch in zip(pairs, batches, strict=True):
            tracker = tracker.update(pair, batch, memory)
        found, expected = tracker.estimate(), reference.pooled(pairs, batches, [memory] * len(rows))
        assume(expected["effective_windows"] > 1.01)
        r = tracker.autocorrelation()
        for name, value in expected.items():
            inflated = value * (1 + r) / (1 - r) if name.startswith(("var", "cov")) else value
            assert getattr(found, name) == pytest.approx(inflated, rel=1e-6, abs=1e-6)

    @given(st.integers(0, 10**6), st.integers(3, 40), st.floats(100, 1e5))
    def test_autocorrelation_equals_its_twin(self, seed, count, memory):
        rng = np.random.default_rng(seed)
        # Random walks of both, so that every second series has an autocorrelation to be found.
        errors = rng.standard_normal((count, 2))
        traces, signals = (np.cumsum(errors, axis=0) if seed % 2 else errors).T
        pairs = [
            NoiseEstimate(2.0 + g, 100.0 + 5.0 * s, degrees_of_freedom=df)
            for s, g, df in zip(traces, signals, rng.integers(1, 9, count).astype(float), strict=True)
        ]
        batches, tracker = rng.uniform(8, 512, count).tolist(), NoiseTracker()
        for pair, batch in zip(pairs, batches, strict=True):
            tracker = tracker.update(pair, batch, memory)
        expected = reference.autocorrelation(pairs, batches, [memory] * count)
        assert tracker.autocorrelation() == pytest.approx(expected, rel=1e-6)

    def test_a_window_without_a_degree_of_freedom_only_ages(self):
        known = NoiseTracker().update(NoiseEstimate(1.0, 10.0, degrees_of_freedom=3), 64, 1000)
        known = known.update(NoiseEstimate(1.5, 12.0, degrees_of_freedom=3), 64, 1000)
        aged = known.update(NoiseEstimate(math.nan, math.nan), batch=1000.0, memory=1000.0)
        assert aged.weight == pytest.approx(known.weight / 2)
        assert aged.estimate().noise_trace == known.estimate().noise_trace
        assert aged.estimate().effective_windows == pytest.approx(known.estimate().effective_windows)

    def test_what_aged_for_long_is_forgotten(self):
        """Not divided by: windows of one micro-batch age what is known, as many as there are."""
        pair, tracker = NoiseEstimate(1.0, 10.0, degrees_of_freedom=3.0), NoiseTracker()
        for window in [pair] * 2 + [NoiseEstimate(math.nan, math.nan)] * 2000:
            tracker = tracker.update(window, batch=64.0, memory=100.0)
            assert tracker.estimate().noise_trace == pytest.approx(10.0) or tracker == NoiseTracker()
        assert tracker.update(pair, 64.0, 100.0).estimate() == NoiseTracker().update(pair, 64.0, 100.0).estimate()

    def test_follows_a_change_with_its_half_life(self):
        tracker = NoiseTracker()
        for trace in [10.0] * 500 + [20.0] * 100:
            tracker = tracker.update(NoiseEstimate(1.0, trace, degrees_of_freedom=1), batch=10, memory=1000)
        assert tracker.estimate().noise_trace == pytest.approx(15.0, rel=0.01)

    def test_autocorrelation_of_an_ar1_series(self):
        """The estimate of r = 0.5 over 4000 windows, within five of its own standard errors sqrt((1 - r^2) / T)."""
        rng, r, windows = np.random.default_rng(4), 0.5, 4000
        tracker, e = NoiseTracker(), 0.0
        for _ in range(windows):
            e = r * e + math.sqrt(1 - r * r) * rng.standard_normal()
            tracker = tracker.update(NoiseEstimate(4.0, 100.0 + 5.0 * e, degrees_of_freedom=3), 64, 1e12)
        assert tracker.autocorrelation() == pytest.approx(r, abs=5 * math.sqrt((1 - r * r) / windows))
        white = NoiseTracker()
        for _ in range(windows):
            white = white.update(NoiseEstimate(4.0, 100.0 + rng.standard_normal(), degrees_of_freedom=3), 64, 1e12)
        assert white.autocorrelation() < 5 / math.sqrt(windows)

    def test_nothing_is_clipped_before_averaging(self):
        tracker = NoiseTracker()
        for signal in (-3.0, 1.0):
            tracker = tracker.update(NoiseEstimate(signal, 10.0, degrees_of_freedom=1), 64, 1e12)
        assert tracker.estimate().grad_sq_norm == pytest.approx(-1.0)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_refuses_a_nonfinite_window(self, bad):
        with pytest.raises(ValueError, match="window must be finite, got NoiseEstimate"):
            NoiseTracker().update(NoiseEstimate(bad, 1.0, degrees_of_freedom=1), 64, 1000)

    def test_state_round_trips_and_is_a_value(self):
        tracker = NoiseTracker().update(NoiseEstimate(1.0, 2.0, degrees_of_freedom=3), 64, 1000)
        assert restored(NoiseTracker, saved(tracker)) == tracker
        assert all(type(value) is float for value in saved(tracker).values())
        with pytest.raises(ValueError, match=r"got unknown \['surplus'\] and missing \[\]"):
            restored(NoiseTracker, saved(tracker) | {"surplus": 1.0})

    def test_no_evidence(self):
        pair = NoiseTracker().estimate()
        assert math.isnan(pair.noise_trace)
        assert pair.effective_windows == 0.0
        single = NoiseTracker().update(NoiseEstimate(1.0, 2.0, degrees_of_freedom=3), 64, 1000).estimate()
        assert (single.grad_sq_norm, single.noise_trace) == (1.0, 2.0)
        assert math.isnan(single.var_noise_trace)


def test_records_are_plain_values():
    window = Measurement(1.0, 2.0, 3.0, 4)
    assert replace(window) == window
    assert hash(window) == hash(replace(window))
    assert asdict(window) == dict(zip(Measurement.__dataclass_fields__, astuple(window), strict=True))
    assert not Measurement(math.inf, 2.0, 3.0, 4).finite
    with pytest.raises(AttributeError):
        window.cells = 5  # type: ignore[misc]


class TestShards:
    @staticmethod
    def window(rng: np.random.Generator, shift: float) -> Measurement:
        """Three ranks of four unequal cells; the third one's examples are shifted."""
        sizes = (8.0, 8.0, 5.0, 11.0)
        ranks = [
            [(w, rng.normal(size=6) / math.sqrt(w) + 1.0 + shift * (rank == 2)) for w in sizes] for rank in range(3)
        ]
        return TestShards.whole(ranks)

    @staticmethod
    def whole(ranks: list[list[tuple[float, np.ndarray]]]) -> Measurement:
        parts = [reference.measurement(rank) for rank in ranks]
        own = sum(part.global_batch * part.batch_sq_norm for part in parts)
        return replace(reference.measurement([c for r in ranks for c in r]), rank_sq_norms=own)

    def test_is_the_ratio_of_the_two_scatters(self):
        rng = np.random.default_rng(0)
        sizes, values = [4.0, 6.0, 3.0, 3.0], rng.normal(size=(4, 5))
        ranks = [list(zip(sizes[:2], values[:2], strict=True)), list(zip(sizes[2:], values[2:], strict=True))]
        means = [sum(w * g for w, g in rank) / sum(w for w, _ in rank) for rank in ranks]
        mean = sum(w * g for w, g in ranks[0] + ranks[1]) / 16.0
        within = sum(w * np.sum((g - m) ** 2) for rank, m in zip(ranks, means, strict=True) for w, g in rank) / 2
        between = sum(n * np.sum((m - mean) ** 2) for n, m in zip((10.0, 6.0), means, strict=True)) / 1
        found = estimate.ShardTracker().update(self.whole(ranks), 2)
        assert found.ratio() == pytest.approx(between / within)

    def test_one_population_is_not_called_two(self):
        rng = np.random.default_rng(0)
        trackers = [estimate.ShardTracker().update(self.window(rng, 0.0), 3) for _ in range(400)]
        ratios = np.array([tracker.ratio() for tracker in trackers])
        assert abs(ratios.mean() - 1.0) < 5 * ratios.std() / 20 + 0.05
        assert np.mean([tracker.chance() < 0.05 for tracker in trackers]) <= 0.05

    def test_a_shifted_shard_is_found_and_the_sooner_the_more_windows(self):
        rng = np.random.default_rng(0)
        found = []
        for _ in range(50):
            tracker = estimate.ShardTracker()
            for _ in range(4):
                tracker = tracker.update(self.window(rng, 0.6), 3)
            single = estimate.ShardTracker().update(self.window(rng, 0.6), 3)
            found.append((tracker.chance() < 0.05, single.chance() < 0.05))
        pooled, single = np.mean(found, axis=0)
        assert pooled > 0.9
        assert pooled > single

    @pytest.mark.parametrize(
        ("window", "ranks"),
        [
            (Measurement(1.0, 1.0, 1.0, 2, rank_sq_norms=1.0), 2),
            (Measurement(1.0, 1.0, 1.0, 4, rank_sq_norms=1.0), 1),
            (Measurement(1.0, 1.0, 1.0, 4), 2),
        ],
        ids=["no scatter within", "one rank", "not measured"],
    )
    def test_what_tells_nothing_changes_nothing(self, window, ranks):
        tracker = estimate.ShardTracker().update(window, ranks)
        assert tracker == estimate.ShardTracker()
        assert math.isnan(tracker.ratio())
        assert math.isnan(tracker.chance())
