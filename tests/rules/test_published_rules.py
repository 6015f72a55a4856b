"""The published rules: each keeps its own promise, and has the flaw that its docstring names."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptbatch import Limits, Pareto, Ramp, RelativeStandardError, estimate
from adaptbatch.records import Decision, Evidence, Measurement, NoiseEstimate, Progress
from adaptbatch.rules import (
    CABS,
    CosineSimilarity,
    DiveBatch,
    Goodput,
    InnerProductTest,
    NoiseScale,
    NormTest,
    Rule,
    Seesaw,
    decide,
)
from tests import reference

WIDE = Limits(min_steps=2, max_steps=100_000, max_growth=1e9, max_shrink=1e-9)
CELL, DIMENSION = 32, 2000


def draw(rng: np.random.Generator, cells: int, noise_scale: float, dimension: int = DIMENSION) -> Measurement:
    """The squared norms of ``cells`` micro-batches of Gaussian examples with ``|G| = 1`` and ``tr(Sigma) = B``."""
    n, each = cells * CELL, noise_scale / dimension
    along = (1.0 + math.sqrt(each / n) * rng.standard_normal()) ** 2
    length = along + each / n * rng.chisquare(dimension - 1)
    return Measurement(each * rng.chisquare(dimension * (cells - 1)) + n * length, length, float(n), cells)


def targets(rule: Rule, cells: int, noise_scale: float, windows: int) -> np.ndarray:
    """What ``rule`` wants after each of so many windows of one size."""
    rng, at = np.random.default_rng(1), Progress(accumulation_steps=cells, micro_batch_examples=CELL)
    drawn = (draw(rng, cells, noise_scale) for _ in range(windows))
    return np.array([decide(rule, Evidence(window=window), at, WIDE).target_batch for window in drawn])


def path(rule: Rule, noise_scale: float, windows: int) -> np.ndarray:
    """The sizes a rule takes from two steps on at a constant noise scale."""
    rng, at, sizes = np.random.default_rng(2), Progress(accumulation_steps=2, micro_batch_examples=CELL), []
    for _ in range(windows):
        window = draw(rng, at.accumulation_steps, noise_scale)
        decision = decide(rule, Evidence(window=window), at, Limits(max_steps=1000))
        at = replace(at, accumulation_steps=decision.accumulation_steps)
        sizes.append(decision.accumulation_steps)
    return np.array(sizes)


def standard_errors_from(values: np.ndarray, expected: float) -> float:
    return float(abs(values.mean() - expected) / (values.std(ddof=1) / math.sqrt(len(values))))


def some_cells(seed: int, equal: bool = False, cells: int = 6) -> list[tuple[float, np.ndarray]]:
    """Weights and mean gradients of a window's cells, about a common mean."""
    rng = np.random.default_rng(seed)
    weights = [4.0] * cells if equal else [float(w) for w in rng.integers(2, 9, cells)]
    return [(w, np.array([1.0, 0.5, 0.0, -1.0]) + rng.standard_normal(4)) for w in weights]


class TestNormTest:
    @pytest.mark.parametrize("theta", [0.9, 1.0, 1.5])
    @pytest.mark.parametrize("error_sq", [0.5, 4.0, 100.0])
    def test_the_published_one_asks_for_too_little_and_from_theta_1_for_nothing(self, theta, error_sq):
        """``n / n_wanted`` averages ``theta^2 (1 + n / B)``, above 1 for any ``theta >= 1`` however noisy the batch."""
        cells = 8
        found = cells * CELL / targets(NormTest(theta), cells, error_sq * cells * CELL, 1000)
        degrees = DIMENSION * (cells - 1)
        expected = theta**2 * (1.0 + 1.0 / error_sq)
        # E[1 / S^] = degrees / (degrees - 2) / S for the chi-square S^.
        assert standard_errors_from(found, expected * degrees / (degrees - 2)) < 5
        if theta >= 1.0:
            assert expected > 1.0

    @pytest.mark.parametrize("theta", [0.5, 1.0, 2.0])
    def test_debiased_it_wants_the_batch_of_its_theta(self, theta):
        """At ``n = B / theta^2`` the reciprocal of what it wants averages that of what it has."""
        cells = 8
        degrees = DIMENSION * (cells - 1)
        found = cells * CELL / targets(NormTest(theta, debiased=True), cells, theta**2 * cells * CELL, 1000)
        expected = (theta**2 + 1.0) * degrees / (degrees - 2) - theta**2
        assert expected == pytest.approx(1.0, abs=1e-3)
        assert standard_errors_from(found, expected) < 5

    def test_theta_of_a_biased_test_is_another_one(self):
        """``theta = 0.9`` is content with an error of 2.06: it hardly ever grows at 1.7, and nearly always at 2.6."""
        cells = 8
        n = cells * CELL
        content, not_content = (np.mean(targets(NormTest(0.9), cells, e**2 * n, 400) > n) for e in (1.7, 2.6))
        assert content < 0.05 < 0.9 < not_content

    def test_in_closed_loop(self):
        """B = 3200 is 100 steps: debiased gets there, the published one stalls far below and never comes down."""
        stalled, reached = path(NormTest(1.0), 3200, 300), path(NormTest(1.0, debiased=True), 3200, 300)
        assert stalled[-1] < 60
        assert 100 <= reached[-1] < 130
        assert (np.diff(stalled) >= 0).all()
        assert (np.diff(reached) >= 0).all()
        both = path(NormTest(1.0, debiased=True, grow_only=False), 3200, 300)[100:]
        assert abs(both.mean() - 100.5) < 3
        assert (np.diff(both) < 0).mean() > 0.2

    def test_is_the_rule_of_the_paper(self):
        """Sizes and the comparison from the cells' gradients themselves."""
        for seed in range(20):
            cells = some_cells(seed)
            trace, _ = reference.anova(cells)
            n = sum(weight for weight, _ in cells)
            mean = sum(weight * gradient for weight, gradient in cells) / n
            wanted = trace / (0.25 * float(mean @ mean))
            at = Progress(accumulation_steps=6, micro_batch_examples=n / 6)
            decision = decide(NormTest(0.5), Evidence(window=reference.measurement(cells)), at, WIDE)
            assert decision.target_batch == pytest.approx(wanted)
            assert (decision.reason == "grow") == (trace / n > 0.25 * float(mean @ mean))

    def test_a_known_population_needs_less(self):
        window = Measurement(2528.0, 4.0, 120.0, 3)
        at = Progress(accumulation_steps=3, micro_batch_examples=40, population=1024.0)
        assert decide(NormTest(0.5), Evidence(window=window), at, WIDE) == Decision(13, 512.0, "grow")

    def test_debiased_it_says_when_the_signal_is_lost(self):
        lost = Measurement(weighted_sq_norms=2560.0, batch_sq_norm=1.0, global_batch=256.0, cells=4)
        at = Progress(accumulation_steps=4, micro_batch_examples=64)
        found = decide(NormTest(1.0, debiased=True), Evidence(window=lost), at, Limits())
        assert found == Decision(8, math.inf, "signal_lost")
        assert decide(NormTest(1.0), Evidence(window=lost), at, Limits()).reason == "growth_limited"


class TestInnerProductTest:
    @pytest.mark.parametrize("seed", range(10))
    @pytest.mark.parametrize("nu", [None, 0.3, 5.84])
    def test_agrees_with_the_inner_products(self, seed, nu):
        """Weighted sample variances of ``<g_c, g>`` and of what is left of ``g_c``, per example."""
        cells, theta = some_cells(seed), 0.4
        n = sum(weight for weight, _ in cells)
        mean = sum(weight * gradient for weight, gradient in cells) / n
        length = float(mean @ mean)
        products = [float(gradient @ mean) for _, gradient in cells]
        inside = sum(w * (p - length) ** 2 for (w, _), p in zip(cells, products, strict=True)) / 5
        rest = [gradient - p / length * mean for (_, gradient), p in zip(cells, products, strict=True)]
        across = sum(w * float(r @ r) for (w, _), r in zip(cells, rest, strict=True)) / 5
        wanted = max(inside / (theta**2 * length**2), 0.0 if nu is None else across / (nu**2 * length))
        radial = sum(w * p**2 for (w, _), p in zip(cells, products, strict=True)) / length
        window = replace(reference.measurement(cells), radial_sq_norms=radial)
        at = Progress(accumulation_steps=6, micro_batch_examples=n / 6)
        decision = decide(InnerProductTest(theta, nu), Evidence(window=window), at, WIDE)
        assert decision.target_batch == pytest.approx(wanted)
        assert decision.accumulation_steps == max(6, math.ceil(wanted / (n / 6)))

    @pytest.mark.parametrize(
        ("theta", "nu", "wanted"), [(0.2, None, 100), (0.1, 2.0, 400), (0.2, 1.0, 400), (0.1, 0.5, 1600)]
    )
    def test_either_test_can_ask_for_more(self, theta, nu, wanted):
        """``K = 5``, ``n = 100``, ``|g|^2 = 1``: radial variance 4, orthogonal one 400."""
        window = Measurement(100 + 16 + 1600, 1.0, 100.0, 5, radial_sq_norms=116.0)
        at = Progress(accumulation_steps=5, micro_batch_examples=20)
        found = decide(InnerProductTest(theta, nu), Evidence(window=window), at, WIDE)
        assert found.target_batch == pytest.approx(wanted)

    def test_never_shrinks_and_needs_the_inner_products(self):
        quiet = Measurement(100.0 + 4.0, 1.0, 100.0, 5, radial_sq_norms=100.0 + 2.0)
        at = Progress(accumulation_steps=5, micro_batch_examples=20)
        assert decide(InnerProductTest(), Evidence(window=quiet), at, WIDE).reason == "hold"
        without = replace(quiet, radial_sq_norms=math.nan)
        assert decide(InnerProductTest(), Evidence(window=without), at, WIDE).reason == "undecided"
        assert InnerProductTest.keeps_gradients

    def test_needs_a_fraction_of_the_norm_tests_batch(self):
        """In many equal directions the radial variance is one of ``D``: far fewer examples pass."""
        rng, cells, dimension = np.random.default_rng(3), 32, 200
        gradients = np.eye(1, dimension)[0] + rng.standard_normal((cells, dimension))
        mean = gradients.mean(axis=0)
        window = reference.measurement([(4.0, g) for g in gradients])
        window = replace(window, radial_sq_norms=4.0 * float(((gradients @ mean) ** 2).sum() / (mean @ mean)))
        at = Progress(accumulation_steps=cells, micro_batch_examples=4)
        norm, inner = (decide(r, Evidence(window=window), at, WIDE) for r in (NormTest(0.9), InnerProductTest(0.9)))
        assert norm.target_batch / inner.target_batch == pytest.approx((5.84 / 0.9) ** 2, rel=0.05)


class TestCosineSimilarity:
    @pytest.mark.parametrize("cells", [2, 4, 6])
    @pytest.mark.parametrize("seed", range(5))
    def test_is_the_average_over_all_ways_to_halve_a_window(self, seed, cells):
        """``mean <a, b> / mean |a|^2`` over the halves ``a``, ``b``, to rounding."""
        drawn = some_cells(seed, equal=True, cells=cells)
        gradients = np.stack([gradient for _, gradient in drawn])
        products, squares = [], []
        for chosen in combinations(range(cells), cells // 2):
            others = [c for c in range(cells) if c not in chosen]
            a, b = gradients[list(chosen)].mean(axis=0), gradients[others].mean(axis=0)
            products.append(a @ b)
            squares.append(a @ a)
        found = CosineSimilarity().similarity(reference.measurement(drawn))
        assert found == pytest.approx(np.mean(products) / np.mean(squares), rel=1e-12)

    def test_a_target_is_a_relative_error(self):
        """With exact moments at ``n = B / theta^2`` the cosine is ``1 / (1 + 2 theta^2)``."""
        for theta in (0.41, 1.0):
            n, cells, trace = 640.0, 10, 640.0 * theta**2
            length = 1.0 + trace / n
            window = Measurement(9 * trace + n * length, length, n, cells)
            found = CosineSimilarity().similarity(window)
            assert found == pytest.approx(1.0 / (1.0 + 2.0 * theta**2))
            assert found == pytest.approx({0.41: 0.75, 1.0: 1 / 3}[theta], abs=0.003)

    @pytest.mark.parametrize(
        ("k", "trace", "expected"), [(20, 400.0, 22), (20, 1.0, 18), (3, 400.0, 4), (3, 1.0, 2), (64, 400.0, 64)]
    )
    def test_moves_by_a_tenth_and_at_least_one_step(self, k, trace, expected):
        n = 8.0 * k
        window = Measurement((k - 1) * trace + n, 1.0, n, k)
        at = Progress(accumulation_steps=k, micro_batch_examples=8)
        assert decide(CosineSimilarity(), Evidence(window=window), at, Limits()).accumulation_steps == expected

    def test_a_move_of_one_step_is_one_step(self):
        """``3 * 0.1 / 0.1`` is above 3 in floating point."""
        window, at = Measurement(100.0, 1.0, 0.2, 2), Progress(accumulation_steps=2, micro_batch_examples=0.1)
        assert decide(CosineSimilarity(), Evidence(window=window), at, Limits()).accumulation_steps == 3

    def test_hovers_about_its_target_and_never_rests(self):
        """B = 320, ``n = 6 B`` is 60 steps: the path's mean is near it, and nearly every window changes the size."""
        sizes = path(CosineSimilarity(), 320, 600)[200:]
        assert abs(math.log(sizes.mean() / 60)) < 0.15
        assert (np.diff(sizes) != 0).mean() > 0.9


class TestNoiseScale:
    @given(st.floats(1.0, 1e4), st.floats(1e-3, 1e3))
    def test_is_the_target_of_the_clt_rule_at_theta_1(self, scale, length):
        pair = NoiseEstimate(length, scale * length, 0.0, 0.0, 0.0, 99.0, 30.0)
        at = Progress(accumulation_steps=4, micro_batch_examples=64)
        both = Evidence(pooled=pair, typical=pair)
        found = decide(NoiseScale(), both, at, Limits())
        assert found.target_batch == decide(RelativeStandardError(1.0), both, at, Limits()).target_batch
        assert found.accumulation_steps == min(max(math.ceil(scale / 64 - 1e-9), 3), 8)

    def test_grows_while_the_signal_is_lost(self):
        lost, at = Evidence(pooled=NoiseEstimate(-0.1, 5.0)), Progress(accumulation_steps=4, micro_batch_examples=64)
        assert decide(NoiseScale(), lost, at, Limits()) == Decision(8, math.inf, "signal_lost")
        assert decide(NoiseScale(), lost, at, Limits(max_steps=6)) == Decision(6, math.inf, "at_max")
        finite = replace(at, population=5000.0)
        assert decide(NoiseScale(), lost, finite, Limits()) == Decision(8, 5000.0, "signal_lost")


class TestPareto:
    @given(st.floats(10.0, 1e5), st.floats(10.0, 1e4))
    def test_is_the_cheapest_batch(self, scale, price):
        """No batch a little smaller or larger has a lower ``(price + n) (1 + B / n)``."""
        at = Progress(accumulation_steps=4, micro_batch_examples=64)
        found = decide(Pareto(price), Evidence(pooled=NoiseEstimate(1.0, scale)), at, WIDE).target_batch
        n = found * np.array([1.0, 0.5, 0.99, 1.01, 2.0])
        cost = (price + n) * (1.0 + scale / n)
        assert cost.argmin() == 0
        assert found == pytest.approx(math.sqrt(price * scale))


class TestGoodput:
    @given(st.floats(0.0, 1e5), st.floats(1.0, 2e3), st.floats(1e-3, 10.0), st.floats(1e-5, 1e-1), st.integers(2, 60))
    def test_is_the_best_size_there_is(self, scale, initial, c0, c1, k):
        at = Progress(accumulation_steps=k, micro_batch_examples=32.0)
        limits = Limits(min_steps=2, max_steps=60, max_growth=99.0, max_shrink=0.001)
        rule = Goodput(initial, improvement=1.0)
        evidence = Evidence(pooled=NoiseEstimate(1.0, scale), step_seconds=c0, example_seconds=c1)
        decision = decide(rule, evidence, at, limits)
        sizes = np.arange(2, 61)
        n = 32.0 * sizes
        goodput = n / (c0 + c1 * n) * (scale + initial) / (scale + n)
        allowed = (n >= initial * (1 - 1e-9)) | (sizes == 60)
        chosen = sizes == decision.accumulation_steps
        assert allowed[chosen].all()
        assert goodput[chosen] >= goodput[allowed].max() * (1 - 1e-9)

    def test_without_a_smallest_batch_it_is_the_pareto_optimum_in_seconds(self):
        """Steps of one example: ``sqrt(B c0 / c1)``, the rule Pareto at the price ``c0 / c1``."""
        at = Progress(accumulation_steps=10, micro_batch_examples=1.0)
        for scale, c0, c1 in ((400.0, 0.9, 0.001), (50.0, 0.2, 0.0005), (3000.0, 0.01, 0.001)):
            rule = Goodput(1e-9, step_seconds=c0, example_seconds=c1, improvement=1.0)
            evidence, limits = Evidence(pooled=NoiseEstimate(1.0, scale)), replace(WIDE, max_steps=2000)
            found = decide(rule, evidence, at, limits).accumulation_steps
            wanted = decide(Pareto(c0 / c1), evidence, at, limits).target_batch
            assert wanted == pytest.approx(math.sqrt(scale * c0 / c1))
            assert abs(found - wanted) <= 1.0

    def test_stays_unless_the_best_is_enough_better(self):
        at, evidence = (
            Progress(accumulation_steps=10, micro_batch_examples=32.0),
            Evidence(pooled=NoiseEstimate(1.0, 640.0)),
        )
        c0, c1 = 0.64, 0.001
        ratio = _goodput(640.0, 640.0, c0, c1) / _goodput(320.0, 640.0, c0, c1)
        assert ratio == pytest.approx(1.125)
        limits = Limits(max_growth=9.0)
        rule = Goodput(32.0, c0, c1, improvement=1.12)
        assert decide(rule, evidence, at, limits) == Decision(20, 640.0, "grow")
        assert decide(replace(rule, improvement=1.13), evidence, at, limits) == Decision(10, 320.0, "hold")

    def test_goes_up_to_the_initial_batch_whatever_it_promises(self):
        at, evidence = (
            Progress(accumulation_steps=4, micro_batch_examples=32.0),
            Evidence(pooled=NoiseEstimate(1.0, 0.0)),
        )
        rule = Goodput(250.0, step_seconds=0.001, example_seconds=0.1, improvement=10.0)
        assert decide(rule, evidence, at, Limits()) == Decision(8, 256.0, "grow")

    def test_a_lost_signal_asks_for_throughput_alone(self):
        at, lost = Progress(accumulation_steps=4, micro_batch_examples=32.0), Evidence(pooled=NoiseEstimate(-1.0, 9.0))
        rule = Goodput(32.0, step_seconds=1.0, example_seconds=0.001)
        assert decide(rule, lost, at, Limits()) == Decision(8, 2048.0, "signal_lost")

    def test_given_seconds_overrule_measured_ones(self):
        at = Progress(accumulation_steps=4, micro_batch_examples=32.0)
        slow = Evidence(pooled=NoiseEstimate(1.0, 640.0), step_seconds=5.0, example_seconds=0.001)
        assert decide(Goodput(32.0), slow, at, WIDE).accumulation_steps > 20
        given_times = Goodput(32.0, step_seconds=0.0001, example_seconds=0.001)
        assert decide(given_times, slow, at, WIDE).accumulation_steps == 2


def _goodput(n: float, scale: float, c0: float, c1: float) -> float:
    return n / (c0 + c1 * n) / (1.0 + n / scale)


class TestCABS:
    def test_is_the_formula_of_the_paper_from_examples(self):
        """``lr sum_j Var_i(g_ij) / loss``, from the gradients of every example."""
        gradients = np.random.default_rng(4).standard_normal((50, 3)) * [1.0, 2.0, 3.0]
        pair = estimate.estimate_window(reference.measurement([(1.0, g) for g in gradients]))
        at = Progress(accumulation_steps=4, micro_batch_examples=1.0)
        evidence = Evidence(pooled=pair, lr=0.3, loss=0.75)
        variances = gradients.var(axis=0, ddof=1).sum()
        assert decide(CABS(), evidence, at, WIDE).target_batch == pytest.approx(0.3 * variances / 0.75)
        changed = decide(CABS(scale=2.0, loss_floor=0.25), evidence, at, WIDE)
        assert changed.target_batch == pytest.approx(2.0 * 0.3 * variances / 0.5)

    @given(st.floats(0.1, 10.0), st.floats(0.1, 10.0), st.floats(1.0, 1e4))
    def test_has_the_largest_guaranteed_gain_for_each_example(self, curvature, x, trace):
        """In a quadratic valley at the rate ``1 / curvature``: the loss falls by ``lr/2 (|G|^2 - tr(Sigma) / n)``."""
        at, squared = Progress(accumulation_steps=4, micro_batch_examples=1.0), (curvature * x) ** 2
        evidence = Evidence(pooled=NoiseEstimate(squared, trace), lr=1.0 / curvature, loss=0.5 * curvature * x**2)
        found = decide(CABS(), evidence, at, WIDE).target_batch
        n = found * np.array([1.0, 0.5, 0.9, 1.1, 2.0])
        assert ((squared - trace / n) / n).argmax() == 0

    def test_a_loss_at_its_floor_is_undecided(self):
        at = Progress(accumulation_steps=4, micro_batch_examples=64)
        for loss in (0.5, 0.4, math.nan):
            evidence = Evidence(pooled=NoiseEstimate(1.0, 100.0), lr=0.1, loss=loss)
            assert decide(CABS(loss_floor=0.5), evidence, at, Limits()).reason == "undecided"


class TestDiveBatch:
    at = Progress(accumulation_steps=4, micro_batch_examples=64, examples_seen=50_000)
    ended = Evidence(pooled=NoiseEstimate(1.0, 799.0), window=Measurement(1.0, 1.0, 256.0, 4))

    def test_is_the_diversity_of_every_examples_gradient(self):
        """``delta N sum |g_i|^2 / |sum g_i|^2`` of a population, from its exact moments."""
        gradients = np.random.default_rng(5).standard_normal((300, 5)) + 0.3
        trace, length = reference.exact_moments(gradients)
        diversity = (gradients**2).sum() / (gradients.sum(axis=0) ** 2).sum()
        evidence = replace(self.ended, pooled=NoiseEstimate(length, trace))
        at = Progress(accumulation_steps=4, micro_batch_examples=0.1, examples_seen=300, population=300)
        decision = decide(DiveBatch(0.7, epoch_examples=300), evidence, at, WIDE)
        assert decision.target_batch == pytest.approx(0.7 * 300 * diversity, rel=1e-12)

    def test_decides_once_a_pass(self):
        """Windows of 256 over 100,000 examples, with the last one of each pass cut short."""
        rule, seen, decided = DiveBatch(0.5, epoch_examples=10_000), 0.0, []
        for batch in ([256.0] * 39 + [16.0]) * 10:
            seen += batch
            evidence = replace(self.ended, window=Measurement(1.0, 1.0, batch, 4))
            decision = decide(rule, evidence, replace(self.at, examples_seen=seen), Limits())
            if decision.reason != "hold":
                decided.append(seen)
        assert decided == [10_000.0 * (i + 1) for i in range(10)]

    def test_a_short_window_after_the_end_of_a_pass_decides_nothing(self):
        rule, at = DiveBatch(0.5, epoch_examples=1000), replace(self.at, examples_seen=1024)
        assert decide(rule, self.ended, at, Limits()).reason == "grow"
        short = replace(self.ended, window=Measurement(1.0, 1.0, 64.0, 1))
        assert decide(rule, short, replace(at, examples_seen=1088), Limits()).reason == "hold"

    def test_moves_both_ways_unless_told_otherwise(self):
        rule = DiveBatch(0.5, epoch_examples=50_000)
        assert decide(rule, self.ended, self.at, Limits()) == Decision(7, 400.0, "grow")
        large = replace(self.at, accumulation_steps=8)
        assert decide(rule, self.ended, large, Limits()) == Decision(7, 400.0, "shrink")
        assert decide(replace(rule, grow_only=True), self.ended, large, Limits()) == Decision(8, 400.0, "hold")

    def test_its_evidence_has_the_mean_age_of_a_pass(self):
        """An exponential memory of half-life ``H`` has the mean age ``H / ln 2``; a pass has half its length."""
        assert DiveBatch(1.0, 1000).memory / math.log(2.0) == pytest.approx(500.0)


class TestMegatronRamp:
    def test_a_table_made_by_hand(self):
        """``--rampup-batch-size 32 32 1000`` up to 160 with micro-batches of 32: a size for each 250 examples."""
        ramp = Ramp(1, 5, 1000, shape="increments", increment=1)
        table = {0: 32, 249: 32, 250: 64, 499: 64, 500: 96, 749: 96, 750: 128, 999: 128, 1000: 160, 10**6: 160}
        at = Progress(micro_batch_examples=32)
        found = {n: decide(ramp, Evidence(), replace(at, examples_seen=n), Limits()).target_batch for n in table}
        assert found == table

    @given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 7), st.booleans())
    def test_takes_every_size_once_for_equally_long(self, first, treads, increment, down):
        expected = [first + i * increment for i in range(treads + 1)]
        expected = expected[::-1] if down else expected
        ramp = Ramp(expected[0], expected[-1], 100 * treads, shape="increments", increment=increment)
        found = [round(ramp.steps(n)) for n in range(100 * treads + 100)]
        assert found == [size for size in expected for _ in range(100)]

    def test_a_tread_begins_at_its_first_example(self):
        """``49 * (1 / 49)`` is below 1 in floating point."""
        assert Ramp(1, 50, 49, shape="increments", increment=1).steps(1) == 2
        assert Ramp(2**0, 2**7, 7 * 49, shape="staircase", stairs=7).steps(49) == pytest.approx(2)

    def test_a_ramp_of_no_height_is_flat(self):
        ramp = Ramp(3, 3, 100, shape="increments", increment=5)
        assert [ramp.steps(n) for n in (0, 50, 100)] == [3, 3, 3]


class TestSeesaw:
    @given(st.floats(0.1, 0.9), st.integers(1, 8), st.integers(0, 5))
    def test_keeps_the_squared_rate_times_the_batch(self, decay, start, passed):
        rule = Seesaw(start, [10, 20, 30, 40, 50], decay)
        seen = 10 * passed + 5
        assert rule.lr_factor(seen) ** 2 * rule.steps(seen) == pytest.approx(start)
        assert rule.lr_factor(seen) / math.sqrt(rule.steps(seen) / start) == pytest.approx(decay**passed), (
            "the step schedule's rate"
        )

    def test_doubles_the_batch_at_each_milestone(self):
        rule, at = Seesaw(3, (1000, 3000)), Progress(micro_batch_examples=64)
        found = [
            decide(rule, Evidence(), replace(at, examples_seen=n), Limits()).accumulation_steps
            for n in (0, 999, 1000, 2999, 3000, 10**9)
        ]
        assert found == [3, 3, 6, 6, 12, 12]
        assert [rule.lr_factor(n) for n in (999, 1000)] == [1.0, math.sqrt(0.5)]
