"""studies/questions/closed_loop.py: the simulator draws what it says, and the default rule keeps its promise in it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest

import adaptbatch as ab
from adaptbatch import estimate
from studies.output.figures import closed_loop_figure
from studies.questions import closed_loop
from studies.questions.closed_loop import CELL, DIMENSION, FLOOR, LIMITS, RULES, Profile

PROFILES = {profile.name: profile for profile in closed_loop.PROFILES}
MEAN = np.r_[2.0, np.zeros(DIMENSION - 1)]
VARIANCE = 4.0 * 300.0 / DIMENSION


def drawn(name: str, cells: int = 4, draws: int = 4000, **options: float) -> np.ndarray:
    """One quantity of many windows with ``|G| = 2`` and ``B = 300``."""
    rng = np.random.default_rng(0)
    windows = [closed_loop.draw_window(rng, cells, MEAN, VARIANCE, **options)[0] for _ in range(draws)]
    return np.array([QUANTITIES[name](window) for window in windows])


def made_of_vectors(name: str, cells: int = 4, draws: int = 4000) -> np.ndarray:
    """The same quantity of Gaussian examples written out, one by one."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(draws):
        examples = MEAN + math.sqrt(VARIANCE) * rng.standard_normal((cells, CELL, DIMENSION))
        each = examples.mean(axis=1)
        g = each.mean(axis=0)
        radial = CELL * np.sum((each @ g) ** 2) / (g @ g)
        window = ab.records.Measurement(CELL * np.sum(each**2), g @ g, float(cells * CELL), cells, radial)
        found.append(QUANTITIES[name](window))
    return np.array(found)


QUANTITIES = {
    "trace": lambda window: estimate.estimate_window(window).noise_trace,
    "signal": lambda window: estimate.estimate_window(window).grad_sq_norm,
    "total": lambda window: window.weighted_sq_norms,
    "length": lambda window: window.batch_sq_norm,
    "radial": lambda window: window.radial_sq_norms,
    "radial share": lambda window: window.radial_sq_norms / window.weighted_sq_norms,
}


def standard_error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


class TestWindows:
    @pytest.mark.parametrize("student", [math.inf, 5.0, 3.0])
    def test_are_unbiased(self, student):
        for name, truth in (("trace", 1200.0), ("signal", 4.0)):
            found = drawn(name, student=student)
            assert abs(found.mean() - truth) < 5 * standard_error(found)

    def test_have_the_variances_of_gaussian_examples(self):
        each = VARIANCE / (4 * CELL)
        for name, truth in (
            ("trace", 2 * 1200.0**2 / (3 * DIMENSION)),
            ("length", 4 * each * 4.0 + 2 * DIMENSION * each**2),
        ):
            found = drawn(name)
            squares = (found - found.mean()) ** 2
            assert abs(squares.mean() - truth) < 5 * standard_error(squares)

    @pytest.mark.parametrize("name", ["total", "length", "radial", "radial share"])
    @pytest.mark.parametrize("power", [1, 2])
    def test_are_those_of_explicit_examples(self, name, power):
        """Chi-squares against vectors: means, and mean squares."""
        found, twin = drawn(name) ** power, made_of_vectors(name) ** power
        assert abs(found.mean() - twin.mean()) < 5 * math.hypot(standard_error(found), standard_error(twin))

    def test_of_students_t_with_many_degrees_are_gaussian(self):
        for name in ("total", "radial share"):
            found, twin = drawn(name), drawn(name, student=1e9)
            assert abs(found.mean() - twin.mean()) < 5 * math.hypot(standard_error(found), standard_error(twin))

    def test_that_are_longer_have_the_same_noise_scale(self):
        window, _ = closed_loop.draw_window(np.random.default_rng(0), 4, MEAN, VARIANCE)
        pair, long = estimate.estimate_window(window), estimate.estimate_window(closed_loop.longer(window, 1e3))
        assert estimate.noise_scale(long) == pytest.approx(estimate.noise_scale(pair), rel=1e-9)
        assert long.grad_sq_norm == pytest.approx(1e6 * pair.grad_sq_norm)


@dataclass(frozen=True)
class Listener:
    """Four steps always; keeps what it is told."""

    heard: list[ab.records.Evidence] = field(default_factory=list)
    closed_loop = True
    memory = None

    def decide(
        self, evidence: ab.records.Evidence, progress: ab.records.Progress, limits: ab.Limits
    ) -> ab.records.Decision:
        self.heard.append(evidence)
        return ab.records.Decision(4, math.nan, "hold")


class TestFloor:
    def test_gradient_descent_ends_where_it_says(self):
        """``B = FLOOR n``, and ``<g, g'>`` of consecutive gradients is ``-|G|^2``."""
        listener = Listener()
        closed_loop.simulate(listener, PROFILES["noise floor"], seed=0, examples=1e6, consecutive=True)
        settled = [evidence.window for evidence in listener.heard[1000:]]
        signals = np.array([estimate.estimate_window(window).grad_sq_norm for window in settled])
        products = np.array([window.consecutive_product for window in settled])
        truth = DIMENSION / (FLOOR * 4 * CELL)
        for found, expected in ((signals, truth), (products, -truth)):
            # Windows are not independent: means of blocks are.
            blocks = found[: len(found) // 100 * 100].reshape(-1, 100).mean(axis=1)
            assert abs(blocks.mean() - expected) < 5 * standard_error(blocks)
        assert listener.heard[-1].response.consecutive < -2.0

    def test_without_a_floor_consecutive_gradients_agree(self):
        listener = Listener()
        closed_loop.simulate(listener, PROFILES["constant"], seed=0, examples=1e6, consecutive=True)
        products = np.array([evidence.window.consecutive_product for evidence in listener.heard[1:]])
        assert abs(products.mean() - 1.0) < 5 * standard_error(products)
        assert listener.heard[-1].response.consecutive > 2.0

    def test_the_default_rule_says_so_and_grows(self):
        run = closed_loop.simulate(RULES["CLT"], PROFILES["noise floor"], seed=0)
        assert (run["reason"] == "noise_floor").mean() > 0.05
        assert run["accumulation_steps"].iloc[-1] == LIMITS.max_steps

    @pytest.mark.parametrize("consecutive", [False, True])
    def test_holding_is_an_option(self, consecutive):
        run = closed_loop.simulate(
            RULES["CLT, holds at floor"], PROFILES["noise floor"], seed=0, consecutive=consecutive
        )
        assert (run["reason"] == "noise_floor").mean() > 0.9
        assert run["accumulation_steps"].max() <= 16

    @pytest.mark.parametrize(
        ("name", "seed"),
        [("ramp x32", 1), ("step x16", 1), ("hump x32", 1), ("fast rise x32", 0), ("fast rise x32", 1)],
    )
    def test_a_noise_scale_that_rises_by_itself_is_not_one(self, name, seed):
        """Nor on the seed on which the default rule follows without hunting."""
        run = closed_loop.simulate(RULES["CLT"], PROFILES[name], seed)
        assert not (run["reason"] == "noise_floor").any()

    def test_only_the_phase_tells_a_rise_as_fast_as_the_rule_grows(self):
        """``B`` doubles with every dead time: to the elasticity that is a floor."""
        mimic = Profile("mimic", lambda u: 64 * 2 ** min(max(50 * u - 5, 0), 8))
        deaf, hears = (closed_loop.simulate(RULES["CLT"], mimic, 0, 1e6, consecutive) for consecutive in (False, True))
        assert (deaf["reason"] == "noise_floor").any()
        assert not (hears["reason"] == "noise_floor").any()


class TestDefaultRule:
    @pytest.mark.parametrize("name", [profile.name for profile in closed_loop.PROFILES if profile.moving])
    def test_follows_without_hunting(self, name):
        """At most 40 switches and an rms log error of 0.30 on every moving profile, and no floor is seen."""
        run = closed_loop.simulate(RULES["CLT"], PROFILES[name], seed=0)
        found = closed_loop.measure(run)
        assert not (run["reason"] == "noise_floor").any()
        assert found["switches"] <= 40
        assert found["rms log error"] <= 0.30

    def test_rests_where_nothing_moves(self):
        """No reversal in 20,000 windows."""
        run = closed_loop.simulate(RULES["CLT"], PROFILES["constant"], seed=0, examples=1e7)
        assert len(run) >= 20_000
        assert closed_loop.measure(run)["reversals"] == 0

    @pytest.mark.parametrize("name", ["constant, |G| over 6 decades", "Student's t, 5 degrees"])
    def test_rests_whatever_the_scale_and_with_a_fourth_moment(self, name):
        found = closed_loop.measure(closed_loop.simulate(RULES["CLT"], PROFILES[name], seed=0))
        assert found["reversals"] == 0
        assert found["rms log error"] <= 0.30

    def test_decides_alike_for_gradients_of_any_length(self):
        """A power of two scales every float exactly: the same sizes for the same reasons, window by window."""
        one, large = Profile("one", lambda u: 400), Profile("large", lambda u: 400, lambda u: 2.0**20)
        short, long = (closed_loop.simulate(RULES["CLT"], profile, seed=0, examples=5e5) for profile in (one, large))
        assert short["accumulation_steps"].nunique() > 2
        pd.testing.assert_frame_equal(short, long)

    def test_follows_through_catastrophes_where_pooled_moments_freeze(self):
        """A few windows a million times as heavy are all that the pooled moments know."""
        profile = PROFILES["ramp x32, catastrophes"]
        typical, pooled = (closed_loop.simulate(RULES[name], profile, seed=0) for name in ("CLT", "CLT, pooled"))
        late = typical["examples_seen"] > 0.9 * closed_loop.EXAMPLES
        batch = CELL * typical["accumulation_steps"]
        assert (batch[late] >= 0.7 * typical["true_noise_scale"][late]).all()
        assert pooled["accumulation_steps"].iloc[-1] * CELL < 0.1 * pooled["true_noise_scale"].iloc[-1]
        assert closed_loop.measure(typical)["rms log error"] <= 0.30
        assert closed_loop.measure(pooled)["rms log error"] > 1.0

    def test_a_guard_answers_catastrophes_with_one_doubling(self):
        profile = PROFILES["catastrophes"]
        alone, guarded = (
            closed_loop.simulate(RULES["CLT"], profile, 0, guard=guard)
            for guard in (None, closed_loop.GUARDS["CLT, guarded"])
        )
        assert not (alone["reason"] == "guard").any()
        assert (guarded["reason"] == "guard").any()
        assert guarded["accumulation_steps"].max() <= 2 * alone["accumulation_steps"].max() + 1


def test_measures_of_a_run_made_by_hand():
    seen = np.arange(1, 101) * 100.0
    run = pd.DataFrame(
        {
            "examples_seen": seen,
            "accumulation_steps": np.where(seen <= 5000, 4, 8),
            "true_noise_scale": np.where(seen <= 4000, 128.0, 256.0),
            "reason": ["noise_floor"] * 3 + ["guard"] * 2 + ["hold"] * 95,
            "listened": [True] * 60 + [False] * 40,
            "noise_scale_low": 100.0,
            "noise_scale_high": np.where(seen <= 9050, 300.0, 200.0),
        }
    )
    found = closed_loop.measure(run)
    assert (found["switches"], found["reversals"]) == (1, 0)
    # Ten of the 95 counted windows are wrong by a factor of two.
    assert found["rms log error"] == pytest.approx(math.log(2) * math.sqrt(10 / 95))
    assert found["lag"] == pytest.approx(1000.0, abs=100.0)
    assert (found["at limits"], found["noise floor"], found["guard"]) == (0.0, 0.03, 0.02)
    # Of the 95 counted windows the last ten have an interval below the truth.
    assert (found["measured"], found["covered"]) == (0.6, pytest.approx(85 / 95))


def test_the_study_has_every_rule_on_every_profile(tmp_path):
    runs, windows = closed_loop.run_study(seeds=2, workers=1, examples=1e4)
    table = closed_loop.table(runs)
    assert len(table) == len(RULES) * len(PROFILES)
    assert list(table["rule"].unique()) == list(RULES)
    assert list(windows["profile"].unique()) == list(PROFILES)
    assert set(windows["rule"]) == {closed_loop.DEFAULT}
    one = runs[(runs["rule"] == "CABS") & (runs["profile"] == "constant")]
    row = table[(table["rule"] == "CABS") & (table["profile"] == "constant")].iloc[0]
    assert row["rms log error"] == pytest.approx(one["rms log error"].mean())
    assert row["most switches"] == one["switches"].max()
    closed_loop_figure(windows, table, tmp_path / "figure.png", cell=CELL, moving=["ramp x32", "step x16"])
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_every_rule_whose_batch_is_the_noise_scale_finds_it():
    """Knobs are set to ``n = B``: on average over the last half of a constant profile, within a factor of two."""
    grow_only = {"norm test", "inner product"}
    for name in RULES.keys() - grow_only - {"DiveBatch"}:
        run = closed_loop.simulate(RULES[name], PROFILES["constant"], seed=0, examples=4e5)
        late = run[run["examples_seen"] > 2e5]
        assert 0.5 < CELL * late["accumulation_steps"].mean() / 400 < 2.0, name
    for name in grow_only:
        run = closed_loop.simulate(RULES[name], PROFILES["constant"], seed=0, examples=4e5)
        assert CELL * run["accumulation_steps"].iloc[-1] > 400, name
