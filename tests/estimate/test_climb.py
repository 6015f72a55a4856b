"""floor.py: the elasticity of the noise scale tells a floor from a rise that nobody caused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adaptbatch.estimate.climb import RUNG_WINDOWS, Climb
from adaptbatch.records import NoiseEstimate
from adaptbatch.schema import restored, saved


def climb_of(sizes: list[float], noise_scale, windows: int = 40, relative_sd: float = 0.0) -> Climb:
    rng, climb = np.random.default_rng(0), Climb()
    for n in sizes:
        for _ in range(windows):
            signal = 1.0 / noise_scale(n) * (1.0 + relative_sd * rng.standard_normal())
            climb = climb.update(NoiseEstimate(signal, 1.0, degrees_of_freedom=1.0), n / 32, n)
    return climb


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_the_elasticity_is_the_exponent(exponent):
    climb = climb_of([64.0, 128.0, 256.0, 512.0], lambda n: 3.0 * n**exponent)
    assert climb.elasticity() == pytest.approx(exponent, abs=1e-9)
    assert climb.least_error_sq() == pytest.approx(min(3.0 * n**exponent / n for n in (64.0, 512.0)))


def test_noise_averages_out_within_a_size():
    climb = climb_of([64.0, 128.0, 256.0], lambda n: 3.0 * n, windows=400, relative_sd=2.0)
    # Two logs of means of 400 windows: sd 2 / sqrt(400) * sqrt(2) / ln 4 = 0.10.
    assert climb.elasticity() == pytest.approx(1.0, abs=0.4)


def test_a_jump_while_a_size_is_in_use_is_no_floor():
    """The first size's mean holds the time before the jump, its last windows do not."""
    climb = Climb()
    for k, windows, scale in ((2, 100, 128.0), (2, 200, 2048.0), (4, 40, 2048.0), (8, 40, 2048.0), (16, 40, 2048.0)):
        for _ in range(windows):
            climb = climb.update(NoiseEstimate(1.0 / scale, 1.0, degrees_of_freedom=1.0), k, 32.0 * k)
    first, last = climb.rungs[0].noise_scales(), climb.rungs[-1].noise_scales()
    assert math.log(last[0] / first[0]) / math.log(8) > 0.7
    assert climb.elasticity() < 0.1


def test_a_climb_needs_three_sizes_over_a_factor_of_four():
    assert math.isnan(climb_of([64.0, 256.0], lambda n: n).elasticity())
    assert math.isnan(climb_of([64.0, 80.0, 100.0], lambda n: n).elasticity())


def test_a_size_needs_its_windows():
    assert math.isnan(climb_of([64.0, 128.0, 256.0], lambda n: n, windows=RUNG_WINDOWS - 1).elasticity())


def test_a_shrink_ends_the_climb():
    climb = climb_of([64.0, 128.0, 256.0, 200.0], lambda n: n)
    assert [rung.batch for rung in climb.rungs] == [200.0]
    assert math.isnan(climb.elasticity())


def test_sizes_are_told_by_steps_however_their_examples_vary():
    rng, climb = np.random.default_rng(0), Climb()
    for k in (2, 4, 8):
        for _ in range(40):
            n = 32.0 * k * rng.uniform(0.7, 1.3)
            climb = climb.update(NoiseEstimate(1.0 / (96.0 * k), 1.0, degrees_of_freedom=1.0), k, n)
    assert climb.elasticity() == pytest.approx(1.0, abs=0.1)
    assert len(climb.rungs) == 3


def test_sizes_far_below_are_forgotten():
    climb = climb_of([2.0**i for i in range(10)], lambda n: n)
    assert climb.rungs[0].batch * 16 >= climb.rungs[-1].batch


def test_a_lost_signal_at_the_top_is_an_unbounded_rise():
    climb = climb_of([64.0, 128.0], lambda n: n)
    for _ in range(RUNG_WINDOWS):
        climb = climb.update(NoiseEstimate(-1.0, 1.0, degrees_of_freedom=1.0), 8, 256.0)
    assert climb.elasticity() == math.inf


def test_state_comes_back():
    climb = climb_of([64.0, 128.0, 256.0], lambda n: n, relative_sd=0.5)
    assert restored(Climb, saved(climb)) == climb
