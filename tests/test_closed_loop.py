"""studies/closed_loop.py: the simulator draws what it says, and the default rule keeps its promise in it."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

import adaptbatch as ab
from adaptbatch import noise
from studies import closed_loop


def test_windows_have_the_moments_they_are_drawn_from():
    rng = np.random.default_rng(0)
    pairs = [noise.estimate(closed_loop.draw_window(rng, 4, noise_scale=300.0, length=2.0)) for _ in range(4000)]
    for found, truth in (
        ([pair.noise_trace for pair in pairs], 4.0 * 300.0),
        ([pair.grad_sq_norm for pair in pairs], 4.0),
    ):
        assert abs(np.mean(found) - truth) < 5 * np.std(found, ddof=1) / math.sqrt(len(found))


@pytest.mark.parametrize("profile", closed_loop.PROFILES, ids=lambda profile: profile.name)
def test_the_default_rule_follows_without_hunting(profile):
    """At most 40 switches and an rms log error of 0.30 on moving profiles; no reversal at a constant one."""
    found = closed_loop.measure(closed_loop.simulate(ab.RelativeStandardError(), profile, seed=0))
    assert found["switches"] <= 40
    assert found["rms log error"] <= 0.30
    if profile.name.startswith("constant"):
        assert found["reversals"] == 0


def test_the_decisions_do_not_depend_on_the_gradients_length():
    """A power of two scales every float exactly: the same sizes for the same reasons, window by window."""
    rule = ab.RelativeStandardError()
    one = closed_loop.Profile("p", lambda u: 400)
    large = closed_loop.Profile("p", lambda u: 400, lambda u: 2.0**20)
    short, long = (closed_loop.simulate(rule, profile, seed=0, examples=5e5) for profile in (one, large))
    assert short["accumulation_steps"].nunique() > 2
    pd.testing.assert_frame_equal(short, long)


def test_measures_of_a_run_made_by_hand():
    seen = np.arange(1, 101) * 100.0
    k = np.where(seen <= 5000, 4, 8)
    run = pd.DataFrame(
        {"examples_seen": seen, "accumulation_steps": k, "true_noise_scale": np.where(seen <= 4000, 128.0, 256.0)}
    )
    found = closed_loop.measure(run)
    assert (found["switches"], found["reversals"]) == (1, 0)
    # Ten of the 95 counted windows are wrong by a factor of two.
    assert found["rms log error"] == pytest.approx(math.log(2) * math.sqrt(10 / 95))
    assert found["lag"] == pytest.approx(1000.0, abs=100.0)
