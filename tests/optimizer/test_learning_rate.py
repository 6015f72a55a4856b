"""learning_rate.py: closed forms and their limits, and the cap and slew that no input may break."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptbatch.optimizer.learning_rate import UNTOUCHED, Adjustment, LearningRate, half_life_beta2, sq_norm_ratio
from adaptbatch.records import NoiseEstimate

N0 = 256.0
UNKNOWN = NoiseEstimate(math.nan, math.nan)
batches = st.floats(1.0, 1e6)
moments = st.floats(-10.0, 1e4) | st.sampled_from([0.0, math.nan])
pairs = st.builds(NoiseEstimate, grad_sq_norm=moments, noise_trace=moments)
couplings = st.builds(
    LearningRate,
    scaling=st.sampled_from(["none", "sqrt", "linear", "gain", "sqrt_gain"]),
    reference_batch=st.none() | batches,
    max_factor=st.floats(1.0, 100.0),
    max_change=st.floats(1.001, 10.0),
    beta2=st.sampled_from(["fixed", "half-life"]),
    rescale_second_moment=st.booleans(),
)


def of_scale(noise_scale: float) -> NoiseEstimate:
    """Moments with this ``B``."""
    return NoiseEstimate(0.0, 3.0) if math.isinf(noise_scale) else NoiseEstimate(2.0, 2.0 * noise_scale)


def free(scaling: str, **changes: object) -> LearningRate:
    """A coupling whose factor is the formula's own."""
    return LearningRate(scaling, N0, max_factor=math.inf, max_change=math.inf, **changes)  # type: ignore[arg-type]


def factor(scaling: str, batch: float, pair: NoiseEstimate = UNKNOWN) -> float:
    return free(scaling).adjust(batch, pair).lr_factor


class TestFactor:
    @given(batches)
    def test_powers_of_the_batch(self, n):
        assert factor("sqrt", n) ** 2 == pytest.approx(n / N0)
        assert factor("linear", n) == pytest.approx(n / N0)

    @given(batches, st.floats(0.0, 1e6))
    def test_gain_is_adascale(self, n, scale):
        gain = (scale / N0 + 1.0) / (scale / n + 1.0)
        assert factor("gain", n, of_scale(scale)) == pytest.approx(gain)
        assert factor("sqrt_gain", n, of_scale(scale)) == pytest.approx(math.sqrt(gain))

    def test_limits_of_the_gain(self):
        assert factor("gain", 1e12, of_scale(1000.0)) == pytest.approx(1.0 + 1000.0 / N0, rel=1e-8)
        assert factor("gain", 1024.0, of_scale(math.inf)) == 4.0
        assert factor("sqrt_gain", 1024.0, of_scale(math.inf)) == 2.0
        for quiet in (NoiseEstimate(2.0, 0.0), NoiseEstimate(2.0, -5.0), NoiseEstimate(1e-3, -5.0)):
            assert factor("gain", 1024.0, quiet) == 1.0

    def test_a_negative_signal_reads_as_zero(self):
        assert factor("gain", 1024.0, NoiseEstimate(-1.0, 3.0)) == factor("gain", 1024.0, of_scale(math.inf))

    def test_gain_of_a_finite_population(self):
        phi = [1.0 / n - 1.0 / 5000.0 for n in (N0, 1024.0)]
        found = free("gain").adjust(1024.0, NoiseEstimate(2.0, 3000.0), population=5000.0).lr_factor
        assert found == pytest.approx((2.0 + 3000.0 * phi[0]) / (2.0 + 3000.0 * phi[1]))
        assert found > factor("gain", 1024.0, NoiseEstimate(2.0, 3000.0))

    @pytest.mark.parametrize("pair", [UNKNOWN, NoiseEstimate(0.0, 0.0), NoiseEstimate(1.0, math.nan)])
    def test_unknown_evidence_keeps_the_factor(self, pair):
        known = free("gain").adjust(1024.0, of_scale(1000.0))
        assert known.lr_factor > 1.5
        assert free("gain").adjust(4096.0, pair, known).lr_factor == known.lr_factor
        assert free("gain").adjust(4096.0, pair).lr_factor == 1.0

    @given(st.lists(st.tuples(batches, pairs), min_size=1, max_size=8), st.sampled_from([math.inf, 1e4]))
    def test_nothing_is_coupled_by_default(self, steps, population):
        adjustment = UNTOUCHED
        for n, pair in steps:
            adjustment = LearningRate().adjust(n, pair, adjustment, population)
            assert adjustment == replace(UNTOUCHED, batch=n, reference_batch=steps[0][0])


class TestCapAndSlew:
    @given(couplings, st.lists(st.tuples(batches, pairs), min_size=1, max_size=8), st.sampled_from([math.inf, 1e4]))
    def test_no_input_breaks_them(self, coupling, steps, population):
        adjustment = UNTOUCHED
        for n, pair in steps:
            previous, adjustment = adjustment, coupling.adjust(n, pair, adjustment, population)
            cap, change = coupling.max_factor * (1 + 1e-12), coupling.max_change * (1 + 1e-12)
            assert 1.0 / cap <= adjustment.lr_factor <= cap
            assert 1.0 / change <= adjustment.lr_factor / previous.lr_factor <= change
            assert 0.0 < adjustment.second_moment_factor < math.inf
            assert all(type(value) is float for value in asdict(adjustment).values())

    @pytest.mark.parametrize(("batch", "limit"), [(N0 * 100, 4.0), (N0 / 100, 0.25)], ids=["up", "down"])
    def test_arrives_at_the_cap_in_equal_ratios(self, batch, limit):
        coupling, adjustment, factors = LearningRate("linear", N0), UNTOUCHED, []
        for _ in range(20):
            adjustment = coupling.adjust(batch, UNKNOWN, adjustment)
            factors.append(adjustment.lr_factor)
        # ln 4 / ln 1.1 = 14.5: the fifteenth step arrives, and the rest stay.
        assert factors[:14] == pytest.approx([(1.1 if limit > 1 else 1 / 1.1) ** t for t in range(1, 15)])
        assert factors[14:] == [limit] * 6

    def test_a_coupling_switched_off_returns_at_the_same_speed(self):
        assert LearningRate().adjust(N0, UNKNOWN, Adjustment(lr_factor=2.0)).lr_factor == pytest.approx(2.0 / 1.1)


class TestReference:
    def test_the_first_batch_unless_given(self):
        coupling = replace(free("sqrt"), reference_batch=None)
        first = coupling.adjust(100.0, UNKNOWN)
        second = coupling.adjust(400.0, UNKNOWN, first)
        assert (first.lr_factor, second.lr_factor, second.reference_batch) == (1.0, 2.0, 100.0)
        assert free("sqrt").adjust(400.0, UNKNOWN, first).reference_batch == N0

    def test_the_previous_adjustment_is_all_there_is_to_resume(self):
        coupling = LearningRate("sqrt_gain", beta2="half-life", rescale_second_moment=True)
        adjustment = coupling.adjust(100.0, of_scale(1000.0))
        restored = Adjustment(**json.loads(json.dumps(asdict(adjustment))))
        straight = coupling.adjust(400.0, of_scale(500.0), adjustment)
        assert coupling.adjust(400.0, of_scale(500.0), restored) == straight
        assert straight.second_moment_factor != 1.0


class TestBeta2:
    @given(st.floats(0.9, 0.9999), st.floats(1 / 64, 64.0))
    def test_the_half_life_in_examples_stays(self, reference, ratio):
        found = half_life_beta2(reference, ratio)
        assert 0.9 <= found <= 0.9999
        if 0.9 < found < 0.9999:
            # Half-life in steps, ln(1/2) / ln(beta2), times examples per step.
            assert ratio / math.log(found) == pytest.approx(1.0 / math.log(reference), rel=1e-9)

    @pytest.mark.parametrize("reference", [0.0, 0.5, 0.9, 0.999, 0.99999])
    def test_a_ratio_of_one_changes_nothing(self, reference):
        assert half_life_beta2(reference, 1.0) == reference

    def test_range(self):
        assert half_life_beta2(0.999, 1e4) == 0.9
        assert half_life_beta2(0.999, 1e-4) == 0.9999
        # A beta2 outside the range may come back towards it, never go further out.
        assert half_life_beta2(0.5, 2.0) == 0.5
        assert half_life_beta2(0.5, 0.5) == pytest.approx(math.sqrt(0.5))

    def test_exponent_is_the_ratio_of_the_batches(self):
        assert LearningRate(reference_batch=N0, beta2="half-life").adjust(1024, UNKNOWN).beta2_exponent == 4.0
        assert LearningRate(reference_batch=N0).adjust(1024, UNKNOWN).beta2_exponent == 1.0


class TestSecondMoment:
    coupling = LearningRate(rescale_second_moment=True)

    def test_follows_the_expected_squared_gradient(self):
        pair = NoiseEstimate(2.0, 300.0)
        first = self.coupling.adjust(100.0, pair)
        second = self.coupling.adjust(400.0, pair, first)
        assert first.second_moment_factor == 1.0
        assert second.second_moment_factor == pytest.approx((2.0 + 300.0 / 400.0) / (2.0 + 300.0 / 100.0))
        # Only on a change.
        assert self.coupling.adjust(400.0, pair, second).second_moment_factor == 1.0
        back = self.coupling.adjust(100.0, pair, second).second_moment_factor
        assert back * second.second_moment_factor == pytest.approx(1.0)

    @pytest.mark.parametrize("pair", [UNKNOWN, NoiseEstimate(-1.0, -1.0), NoiseEstimate(math.nan, 1.0)])
    def test_unknown_moments_change_nothing(self, pair):
        first = self.coupling.adjust(100.0, pair)
        assert self.coupling.adjust(400.0, pair, first).second_moment_factor == 1.0

    @given(pairs, batches, batches, st.sampled_from([math.inf, 1e5]))
    def test_between_all_signal_and_all_noise(self, pair, n, m, population):
        ratio = sq_norm_ratio(pair, n, m, population)
        assert math.isnan(ratio) or min(1.0, m / n) <= ratio <= max(1.0, m / n)

    def test_the_whole_population_without_signal_does_not_vanish(self):
        assert sq_norm_ratio(NoiseEstimate(-1.0, 5.0), batch=1000.0, other=100.0, population=1000.0) == 0.1
        assert sq_norm_ratio(NoiseEstimate(-1.0, 5.0), batch=100.0, other=1000.0, population=1000.0) == 10.0


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"scaling": "cubic"}, r"scaling must be one of \('none', .*\), got scaling = 'cubic'"),
            ({"beta2": 0.98}, r"beta2 must be one of \('fixed', 'half-life'\), got beta2 = 0.98"),
            ({"reference_batch": 0}, r"reference_batch must be positive and finite, got reference_batch = 0; None"),
            ({"reference_batch": math.inf}, r"reference_batch must be positive and finite, got reference_batch = inf"),
            ({"max_factor": 0.5}, r"max_factor must be at least 1, got max_factor = 0.5; inf is no cap"),
            ({"max_factor": math.nan}, r"max_factor must be at least 1, got max_factor = nan"),
            ({"max_change": 1.0}, r"max_change must be above 1, got max_change = 1.0; inf is no limit"),
        ],
    )
    def test_an_argument_out_of_range(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            LearningRate(**arguments)

    @pytest.mark.parametrize("batch", [0.0, -1.0, math.nan, math.inf])
    def test_a_batch_that_is_none(self, batch):
        with pytest.raises(ValueError, match=r"batch must be positive and finite, got batch = .*; it is accumulation"):
            LearningRate().adjust(batch, UNKNOWN)

    def test_values_are_values(self):
        coupling = LearningRate("gain", N0, beta2="half-life")
        assert eval(repr(coupling)) == coupling
        assert hash(coupling) == hash(replace(coupling))
