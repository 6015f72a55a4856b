"""From rows to verdicts: statistics against their definitions, claims that follow from made-up rows."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from studies.output import verdicts
from studies.output.statistics import Interval, expected_best, holm, iqm, quotient, ratio, share, to_target
from studies.questions import frontier, momentum, sensitivity


class TestStatistics:
    def test_the_interquartile_mean_ignores_both_ends(self):
        values = np.array([-1e9, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1e9])
        found = iqm([values[:4], values[4:]])
        assert found.value == pytest.approx(np.mean([2.0, 3.0, 4.0, 5.0]))
        assert found.low < found.value < found.high

    def test_a_paired_ratio_is_the_t_interval_of_the_logs(self):
        rng = np.random.default_rng(0)
        theirs = rng.lognormal(size=8)
        ours = theirs * rng.lognormal(0.3, 0.1, size=8)
        found, p = ratio(ours, theirs)
        logs = np.log(ours / theirs)
        half = stats.t.ppf(0.975, 7) * logs.std(ddof=1) / math.sqrt(8)
        assert (found.value, found.low, found.high) == pytest.approx(
            tuple(math.exp(logs.mean() + x) for x in (0, -half, half))
        )
        assert p == pytest.approx(stats.ttest_rel(np.log(ours), np.log(theirs)).pvalue)

    def test_coverage_of_the_ratio(self):
        """95 % intervals of 400 made-up studies cover a true ratio of 1.2, within four standard errors."""
        rng = np.random.default_rng(1)
        pairs = [(1.2 * rng.lognormal(0, 0.2, 5), np.ones(5)) for _ in range(400)]
        covered = np.mean([found.low < 1.2 < found.high for found, _ in (ratio(*pair) for pair in pairs)])
        assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 400)

    def test_a_target_that_is_not_reached_has_no_finite_ratio(self):
        inf = math.inf
        found, p = ratio(np.array([1.0, inf, inf]), np.array([1.0, 1.0, inf]))
        assert (found.value, found.low, found.high) == (1.0, 1.0, inf)
        assert p == 1.0
        assert ratio(np.array([inf, inf]), np.array([1.0, 1.0]))[0].below(1.1) == "not supported"

    def test_coverage_of_a_quotient_of_two_estimates(self):
        """Of 2,000 pairs of unlike precision, within four standard errors; bounds over bounds would hold more."""
        rng = np.random.default_rng(2)
        ends = np.array([0.0, -1.96, 1.96])
        covered = wider = 0
        for _ in range(2_000):
            ours, theirs = (np.log(true) + rng.normal(0, error) for true, error in ((0.9, 0.02), (1.2, 0.05)))
            a, b = (Interval(*np.exp(x + error * ends)) for x, error in ((ours, 0.02), (theirs, 0.05)))
            found = quotient(a, b)
            covered += found.low < 0.9 / 1.2 < found.high
            wider += a.low / b.high < found.low and found.high < a.high / b.low
        assert abs(covered / 2_000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2_000)
        assert wider == 2_000

    def test_a_quotient_of_what_was_not_reached_is_no_support(self):
        inf = math.inf
        known = Interval(1.1, 1.0, 1.2, "bootstrap")
        assert quotient(Interval(inf, inf, inf), known).below(1.0) == "not supported"
        assert quotient(Interval(inf, 0.9, inf), known).below(1.0) == "undecided"
        assert quotient(Interval(0.9, 0.8, inf), known).below(1.0) == "undecided"

    def test_corrections_are_holms(self):
        assert holm(pd.Series([0.01, 0.03, 0.02])).tolist() == pytest.approx([0.03, 0.04, 0.04])

    @given(
        st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=7).flatmap(
            lambda values: st.tuples(st.just(values), st.integers(1, len(values)))
        )
    )
    def test_the_expected_best_is_the_mean_over_all_subsets(self, case):
        values, draws = case
        twin = np.mean([min(subset) for subset in itertools.combinations(values, draws)])
        assert expected_best(np.array(values), draws) == pytest.approx(twin, abs=1e-9)

    @pytest.mark.parametrize("draws", [0, 4])
    def test_no_more_draws_than_values(self, draws):
        with pytest.raises(ValueError, match=rf"draws must be from 1 to the number of values \(3\), got {draws}"):
            expected_best(np.ones(3), draws)

    def test_shares_and_verdicts(self):
        found = share(0, 10)
        assert (found.value, found.low) == (0.0, 0.0)
        assert 0.2 < found.high < 0.35
        assert Interval(0.9, 0.8, 1.0).below(1.1) == "supported"
        assert Interval(1.2, 1.1, 1.3).below(1.1) == "not supported"
        assert Interval(1.0, 0.8, 1.2).below(1.1) == "undecided"

    def test_the_target_is_reached_by_the_mean_of_five(self):
        losses = [10.0, 10.0, 10.0, 10.0, 5.0, 5.0, 5.0, 5.0, 5.0]
        curve = pd.DataFrame({"validation_loss": losses, "examples_seen": np.arange(1.0, 10.0)})
        curve = curve.assign(optimizer_step=2 * np.arange(9), wall_seconds=0.5)
        assert to_target(curve, 6.0).to_dict() == {"examples": 8.0, "updates": 14.0, "seconds": 0.5}
        assert to_target(curve, 1.0)["examples"] == math.inf


def made_up(ends: dict[str, list[float]], stage: str = "final", data: str = "mnist", **more: object) -> pd.DataFrame:
    """Rows of finished runs, one for each arm and seed."""
    rows = [
        {"stage": stage, "network": "calm", "data": data, "arm": arm, "method": arm, "seed": seed, "final": final}
        | {"key": f"{stage} {data} {arm} {seed}", "lr": 1e-3, "trial": seed, "mean_batch": 100.0}
        | {"diverged": False, "spikes": 0, "probe_spikes": 0, "auroc": 0.5, "auprc": 0.5}
        | more
        for arm, finals in ends.items()
        for seed, final in enumerate(finals)
    ]
    return pd.DataFrame(rows)


def curves_of(runs: pd.DataFrame) -> pd.DataFrame:
    """Each run falls to twice its end at once, and to its end when it has seen as many examples as its end says."""
    parts = []
    for run in runs.itertuples():
        seen = np.arange(1.0, 101.0)
        losses = np.where(seen < run.final, 2 * run.final, run.final)
        rows = {"key": run.key, "examples_seen": seen, "optimizer_step": seen, "wall_seconds": seen}
        parts.append(pd.DataFrame(rows | {"validation_loss": losses}))
    return pd.concat(parts, ignore_index=True)


class TestComparison:
    def claims(self, adaptive: list[float], control: list[float] | None = None) -> pd.DataFrame:
        ends = {"fixed 64": [30.0, 30.4, 29.8], "fixed 1024": [45.0, 44.0, 46.0], "adaptive": adaptive}
        runs = [made_up(ends), made_up({arm: finals[:2] for arm, finals in ends.items()}, stage="tune")]
        runs.append(made_up(ends, stage="stress"))
        if control is not None:
            runs.append(made_up({"replay": control}, stage="control"))
        table = pd.concat(runs, ignore_index=True)
        return verdicts.tables(table, curves_of(table))["claims"].set_index(["claim", "where"])

    @pytest.mark.parametrize(
        ("adaptive", "verdict"),
        [([30.1, 30.3, 30.0], "supported"), ([40.0, 41.0, 39.0], "not supported"), ([26.0, 31.0, 38.0], "undecided")],
    )
    def test_w1_follows_from_the_rows(self, adaptive, verdict):
        table = self.claims(adaptive)
        assert table.loc[("W1", "calm, mnist"), "verdict"] == verdict
        assert table.loc[("W1", "all tasks"), "verdict"] == verdict

    def test_w2_counts_the_trials(self):
        row = self.claims([30.1, 30.3, 30.0]).loc[("W2", "calm, home")]
        assert "at 0.50 of the trials" in row["what"]
        assert row["verdict"] == "supported"

    def test_w4_needs_a_control_that_is_worse(self):
        same = self.claims([30.0, 30.2, 30.1], control=[30.1, 30.1, 30.1]).loc[("W4", "calm, mnist")]
        assert same["verdict"] == "undecided"
        worse = self.claims([30.0, 30.2, 30.1], control=[36.0, 36.1, 35.9]).loc[("W4", "calm, mnist")]
        assert worse["verdict"] == "supported"

    def test_w3_is_the_difference_of_shares(self):
        few = self.claims([30.0, 30.0, 30.0]).loc[("W3", "noisy, stress rate")]
        assert few["value"] == 0.0
        assert few["verdict"] == "undecided"
        low, high = verdicts._difference(np.array([True] * 40 + [False] * 60), np.array([False] * 100))
        assert low < 0.4 < high
        assert low > 0.29

    def test_the_best_fixed_batch_is_one_of_the_fixed(self):
        table = made_up({"fixed 64": [30.0], "fixed 128": [29.0], "adaptive": [1.0]})
        assert verdicts.best_fixed(table) == "fixed 128"
        assert verdicts.fixed_arms(table) == ["fixed 64", "fixed 128"]

    def test_regret_is_of_the_whole_range(self):
        runs = made_up({"fixed 64": [30.0, 60.0], "adaptive": [30.0, math.inf]}, stage="tune")
        table = verdicts.tuning(runs).set_index("method")
        assert table.loc["fixed 64", "regret"] == pytest.approx(1.5)
        assert table.loc["adaptive", "regret"] == pytest.approx((1 + 4) / 2)

    def test_a_sweep_draws_among_all_fixed_batches(self):
        ends = {"fixed 64": [30.0, 60.0], "fixed 128": [40.0, 50.0], "adaptive": [33.0, math.inf]}
        table = verdicts.budget(made_up(ends, stage="tune")).set_index(["method", "trials"])
        assert table.loc[(verdicts.SWEEP, 1), "expected"] == pytest.approx(45.0)
        assert table.loc[(verdicts.SWEEP, 4), "of best"] == pytest.approx(1.0)
        assert table.loc[("adaptive", 1), "expected"] == pytest.approx((33 + 4 * 30) / 2)
        assert table.loc[("adaptive", 2), "expected"] == pytest.approx(33.0)

    def test_together_is_normalised_within_a_task(self):
        ends = {"fixed 64": [30.0] * 4, "adaptive": [33.0] * 4}
        other = {"fixed 64": [0.9] * 4, "adaptive": [0.99] * 4}
        runs = pd.concat([made_up(ends), made_up(other, stage="away", data="shuttle")], ignore_index=True)
        table = verdicts.together(runs).set_index("arm")
        assert table.loc["adaptive", "of best fixed"] == pytest.approx(1.1)
        assert table.loc["adaptive", "tasks"] == 2


class TestOtherStudies:
    def test_the_frontier_of_made_up_runs_is_found(self):
        """``S = 20 + 1000 / n`` to a loss of 12.5: the fixed batches lie on it, one of fewer updates inside."""
        parts, curves = [], []
        for arm, n, updates in [*((f"fixed {n}", n, 20 + 1000 / n) for n in (10, 40, 160, 640)), ("better", 50, 25.0)]:
            for seed in range(3):
                run = made_up({arm: [10.0]}).assign(seed=seed, key=f"{arm} {seed}")
                parts.append(run)
                step = np.array([1.0, updates])
                rows = {"key": f"{arm} {seed}", "optimizer_step": step, "examples_seen": n * step, "wall_seconds": 0.0}
                curves.append(pd.DataFrame(rows | {"validation_loss": [99.0, 12.5]}))
        found = frontier.tables(pd.concat(parts, ignore_index=True), pd.concat(curves, ignore_index=True))
        fit, methods = found["fit"].iloc[0], found["methods"].set_index("arm")
        assert (fit["S_min"], fit["E_min"]) == pytest.approx((20.0, 1000.0), rel=1e-3)
        assert methods.loc["fixed 40", "q"] == pytest.approx(1.0, abs=0.01)
        assert methods.loc["better", "q"] == pytest.approx((25 / 20 - 1) * (1250 / 1000 - 1), abs=0.01)

    @pytest.mark.parametrize(
        ("low", "high", "verdict"),
        [(0.8, 1.3, "supported"), (1.1, 1.3, "not supported"), (0.1, 4.0, "undecided")],
    )
    def test_the_frontiers_claim_follows_from_the_interval(self, low, high, verdict):
        row = {"network": "calm", "arm": "adaptive", "q": 1.2, "q low": low, "q high": high}
        assert frontier.claims(pd.DataFrame([row]))["verdict"].tolist() == [verdict]

    def test_sensitivity_compares_rate_by_rate_and_value_by_value(self):
        rates = {"fixed 64": [30.0, 40.0, 50.0], "adaptive": [27.0, 36.0, 45.0], "warmup": [33.0, 44.0, 55.0]}
        knobs = {"theta": [30.0, 30.0, 31.0, 32.0], "warmup length": [30.0, 30.0, 60.0, 60.0]}
        parts = [made_up(rates, stage="tune").assign(seed=1000)]
        for knob, finals in knobs.items():
            for value, final in enumerate(finals):
                for seed in range(5):
                    row = made_up({"a": [final]}, stage="knob").assign(knob=knob, value=float(value), seed=seed)
                    parts.append(row)
        table = sensitivity.claims(pd.concat(parts, ignore_index=True))
        few = pd.concat([part for part in parts if part["seed"].iloc[0] in (0, 1, 1000)], ignore_index=True)
        assert sensitivity.claims(few).iloc[0][["value", "verdict"]].tolist() == [-0.5, "undecided"]
        s1, s2, s2_fixed = (row for _, row in table.iterrows())
        assert (s1["value"], s1["verdict"]) == (-0.5, "supported")
        assert s2["value"] == pytest.approx(27 / 33)
        assert (s2_fixed["value"], s2_fixed["verdict"]) == (pytest.approx(0.9), "supported")

    def test_momentum_is_judged_on_pairs(self):
        rows = []
        for method, has, effect in (("sgd", False, 1.0), ("momentum", True, 0.8)):
            for batch, factor in ((64, 1.0), (1024, effect)):
                run = made_up({f"{method}, {batch}": [30 * factor, 31 * factor, 32 * factor]}).assign(method=method)
                rows += [run.assign(batch=batch, momentum=has), run.assign(batch=batch, momentum=has, stage="tune")]
        found = momentum.tables(pd.concat(rows, ignore_index=True), pd.DataFrame())
        effects, table = found["effects"].set_index("optimizer"), found["claims"]
        assert effects["ratio"].to_dict() == pytest.approx({"momentum": 0.8, "sgd": 1.0})
        m1 = table[table["claim"] == "M1"].iloc[0]
        assert m1["value"] == pytest.approx(0.8)
        assert m1["verdict"] == "supported"

    def test_momentum_gains_rates_from_a_large_batch(self):
        # Without momentum both batches bear 1e-2; with it the small one bears 1e-3, the large one 1e-2. Each fails at
        # the next rate to the same degree, so that interpolation moves all alike.
        largest = {("sgd", 64): 1e-2, ("sgd", 1024): 1e-2, ("momentum", 64): 1e-3, ("momentum", 1024): 1e-2}
        rows = []
        for (method, batch), bound in largest.items():
            for seed in range(3):
                for trial, lr in enumerate((1e-4, 1e-3, 1e-2, 1e-1)):
                    final = 30.0 + seed if lr <= bound else np.inf
                    rows.append({"method": method, "batch": batch, "seed": seed, "trial": trial, "lr": lr})
                    rows[-1]["final"] = final
        limits = momentum.largest_rates(pd.DataFrame(rows))
        assert len(limits) == 12
        table = momentum.claims(pd.DataFrame(columns=["method", "seed", "batch", "final"]), limits)
        m2 = table[table["claim"] == "M2"].iloc[0]
        assert (m2["value"], m2["seeds"], m2["verdict"]) == (pytest.approx(0.1), 3, "supported")

    def test_rates_of_a_seed_count_when_all_of_them_ran(self):
        rows = [
            {"method": "sgd", "batch": 64, "seed": seed, "trial": trial, "lr": 10.0**trial, "final": 1.0}
            for seed in (0, 1)
            for trial in range(3 - seed)
        ]
        assert momentum.largest_rates(pd.DataFrame(rows))["seed"].tolist() == [0]

    def test_no_rate_works_where_all_diverge(self):
        rates, losses = pd.Series([1.0, 2.0]), pd.Series([np.inf, np.inf])
        assert np.isnan(momentum.largest_that_works(rates, losses))

    def test_the_width_of_a_knob_is_the_share_of_its_values_that_work(self):
        finals = {1.0: 30.0, 2.0: 32.9, 3.0: 33.1, 4.0: 60.0}
        knobs = pd.concat([made_up({"a": [final]}).assign(knob="k", value=value) for value, final in finals.items()])
        row = sensitivity.widths(knobs).iloc[0]
        assert (row["best value"], row["share within 10 %"], row["worst / best"]) == (1.0, 0.5, 2.0)
