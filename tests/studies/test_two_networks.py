"""questions/two_networks and what goes with it: verdicts that follow from the rows, statistics with known answers."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

import adaptbatch as ab
from studies.engine import schema
from studies.output.channel_figure import channel_figure
from studies.questions.two_networks import BATCHES, SEEDS, TASKS, arms, runs, verdict
from studies.questions.two_networks.channel_designs import designs, hill, statistics


def rows(arm: str, seed: int, final: float, spikes: int, batch: float, windows: int = 60) -> pd.DataFrame:
    """A run of the results schema with nothing but what the verdict reads."""
    blank = {name: np.zeros(windows) if kind == "float64" else [0] * windows for name, kind in schema.COLUMNS.items()}
    table = pd.DataFrame(blank).assign(
        study="s", arm=arm, seed=seed, reason="hold", optimizer_step=np.arange(1, windows + 1), global_batch=batch
    )
    table["examples_seen"] = batch * table["optimizer_step"]
    table["validation_loss"] = [math.nan] * (windows - 1) + [final]
    table.loc[windows - 1, "spikes"] = spikes
    rng = np.random.default_rng(seed)
    table["noise_trace"], table["grad_sq_norm"] = rng.exponential(100.0, windows), rng.exponential(1.0, windows)
    table["tail_excess"], table["noise_scale_typical"], table["micro_batch_loss_max"] = 1.0, 100.0, 50.0
    return schema.conform(table)


def noisy(adaptive: list[float], spikes: int) -> pd.DataFrame:
    """Fixed 512 is the best of the fixed; fixed 256 has forty spikes in all."""
    finals = {256: [60.0, 70.0], 512: [50.0, 52.0], 1024: [51.0, 53.0], 4096: [60.0, 60.0]}
    tables = [
        rows(f"fixed {n}", seed, final, 20 if n == 256 else 0, n)
        for n, values in finals.items()
        for seed, final in enumerate(values)
    ]
    tables += [rows("adaptive", seed, final, spikes, 600) for seed, final in enumerate(adaptive)]
    return pd.concat(tables, ignore_index=True)


class TestVerdict:
    def test_figures_follow_from_the_rows(self):
        table = verdict(noisy([51.0, 51.0], spikes=1), "noisy").set_index("arm")
        own = table.loc["adaptive"]
        assert own["of best fixed"] == pytest.approx(51.0 / 51.0)
        assert own["paired"] == pytest.approx(math.sqrt(51 / 50 * 51 / 52))
        assert own["paired low"] <= own["paired"] <= own["paired high"]
        assert (own["spikes"], own["of smallest"], own["mean n"]) == (2.0, 0.05, 600.0)
        assert table.loc["fixed 512", "of best fixed"] == 1.0

    @pytest.mark.parametrize(
        ("final", "spikes", "meets"),
        [(53.5, 1, True), (53.6, 1, False), (51.0, 2, False)],
        ids=["ok", "loss", "spikes"],
    )
    def test_both_conditions_must_hold(self, final, spikes, meets):
        own = verdict(noisy([final, final], spikes), "noisy").set_index("arm").loc["adaptive"]
        assert own["meets"] == meets

    def test_the_calm_network_bounds_the_mean_batch(self):
        tables = [rows(f"fixed {n}", 0, 30.0, 0, n) for n in BATCHES["calm"]]
        for batch, meets in ((500, True), (520, False)):
            table = pd.concat([*tables, rows("adaptive", 0, 30.5, 0, batch)], ignore_index=True)
            assert verdict(table, "calm").set_index("arm").loc["adaptive", "meets"] == meets


class TestDesign:
    @pytest.mark.parametrize("network", ["noisy", "calm"])
    def test_one_default_serves_both(self, network):
        by_name = {arm.name: arm for arm in arms(network)}
        assert by_name["adaptive"].rule == ab.RelativeStandardError()
        for n in BATCHES[network]:
            assert by_name[f"fixed {n}"].rule == ab.Fixed(n // TASKS[network].micro_batch)
        assert len({arm.lr for arm in arms(network)}) == 1

    def test_runs_go_seed_by_seed(self):
        assert [run.seed for run in runs("calm", SEEDS["calm"])] == [0] * 5 + [1] * 5 + [2] * 5


class TestStatistics:
    @pytest.mark.parametrize("index", [0.5, 1.5, 3.0])
    def test_hill_finds_the_index_of_a_pareto_tail(self, index):
        draws = np.random.default_rng(0).pareto(index, 20_000) + 1.0
        # Its standard error is the index over the root of the thousand draws it uses.
        assert hill(draws) == pytest.approx(index, abs=5 * index / math.sqrt(1000))

    def test_of_light_tails_all_noise_scales_agree(self):
        run = rows("fixed 512", 0, 50.0, 3, 512.0, windows=4000)
        found = statistics(run)
        assert found["pooled B"] == pytest.approx(100.0, rel=0.1)
        assert found["median of means B"] == pytest.approx(100.0, rel=0.15)
        assert found["self-normalised t"] < -2.33

    def test_one_window_moves_the_pooled_but_not_the_medians(self):
        run = rows("fixed 512", 0, 50.0, 0, 512.0, windows=4000)
        run.loc[2000, "noise_trace"] = 1e9
        found = statistics(run)
        assert found["pooled B"] > 1e4
        assert found["median of means B"] == pytest.approx(100.0, rel=0.15)
        assert found["top 5 % share"] > 0.99

    def test_windows_of_one_micro_batch_have_a_tail_and_no_noise(self):
        single = rows("fixed 256", 0, 50.0, 0, 256.0).assign(noise_trace=math.nan)
        single.loc[[10, 20], "tail_excess"], single.loc[20, "tail_excess"] = 500.0, 2e4
        single.loc[30, "spikes"] = 2
        table = designs(single).iloc[0]
        assert math.isnan(table["pooled B"])
        assert (table["above 1e2"], table["above 1e4"], table["spikes"], table["lead"]) == (2.0, 1.0, 2.0, 20 * 256.0)

    def test_other_arms_are_left_out(self):
        table = designs(pd.concat([rows("adaptive", 0, 50.0, 0, 600.0), rows("fixed 512", 0, 50.0, 0, 512.0)]))
        assert table["arm"].tolist() == ["fixed 512"]


def test_the_figure_is_drawn(tmp_path):
    table = noisy([51.0, 51.0], spikes=1)
    channel_figure({"noisy": table}, tmp_path / "figure.png", smallest={"noisy": "fixed 512"}, exceedance=1e4)
    assert imread(tmp_path / "figure.png").std() > 0.05
