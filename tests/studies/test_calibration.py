"""questions/calibration: draws of known moments, every estimator on gradients whose answer is known by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from studies.output.figures import calibration_figure
from studies.questions import calibration
from studies.questions.calibration import coverage, error, estimators

# Two micro-batches of two examples with the gradients (4, 2) and (2, 0): cells' means 3 and 1, their mean 2.
EXAMPLES = [torch.tensor([[-4.0], [-2.0]]), torch.tensor([[-2.0], [0.0]])]
BY_HAND = {
    # Between cells: SS = 2 * 1 + 2 * 1 with one degree of freedom, |G|^2 = 4 - 4 / 4.
    "adaptbatch": 4 / 3,
    "adaptdl formula": 4 / 3,
    "fairscale AdaScale": 4 / 3,
    # Between examples: SS = 4 + 0 + 0 + 4 with three, |G|^2 = 4 - (8 / 3) / 4.
    "adaptbatch, one example a cell": (8 / 3) / (10 / 3),
    "gns-pytorch": (8 / 3) / (10 / 3),
    # Norms 3 and 1: variance 2, mean square 5, two examples a draw.
    "torch-gqc GNS": 2 * 2 / 5,
}
# The opposite order of signs: mean 0, so that no signal is left, |G|^2 = 0 - 36 / 4.
LOST = [torch.tensor([[-3.0], [-3.0]]), torch.tensor([[3.0], [3.0]])]


def made(name: str) -> estimators.Estimator:
    return estimators.ESTIMATORS[name][0](estimators.Location(torch.zeros(1)), [2, 2])


class TestEstimators:
    def test_every_estimator_has_its_answer_by_hand(self):
        assert BY_HAND.keys() == estimators.ESTIMATORS.keys()
        assert estimators.OURS in estimators.available()

    @pytest.mark.parametrize("windows", [1, 3])
    @pytest.mark.parametrize("name", estimators.available())
    def test_on_gradients_known_by_hand(self, name, windows):
        estimator = made(name)
        for _ in range(windows):
            estimator.hear(EXAMPLES)
        # The same window again is nothing new, but six norms have fewer than six degrees of freedom.
        norms = [3.0, 1.0] * windows
        expected = 2 * np.var(norms, ddof=1) / 5 if name == "torch-gqc GNS" else BY_HAND[name]
        assert estimator.noise_scale() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("name", estimators.available())
    def test_without_a_signal(self, name):
        estimator = made(name)
        estimator.hear(LOST)
        # A ratio that is clipped at 0 and a spread of norms cannot say so.
        silent = name in ("gns-pytorch", "torch-gqc GNS")
        assert estimator.noise_scale() == (0.0 if silent else math.inf)

    @pytest.mark.parametrize("name", estimators.available())
    def test_equal_weights(self, name):
        """The first window counts as much as the last: the order does not matter."""
        found = []
        for order in ((EXAMPLES, EXAMPLES, LOST), (LOST, EXAMPLES, EXAMPLES)):
            estimator = made(name)
            for window in order:
                estimator.hear(window)
            found.append(estimator.noise_scale())
        assert found[0] == pytest.approx(found[1], rel=1e-5)

    def test_the_published_memory_of_adaptdl(self):
        """0.999 for each micro-batch: the older of two windows of two weighs 0.998."""
        estimator = estimators.AdaptDL(estimators.Location(torch.zeros(1)), [2, 2], smoothing=0.999)
        estimator.hear(EXAMPLES)
        estimator.hear([torch.tensor([[-5.0], [-5.0]])] * 2)
        variance, signal = 0.999**2 * np.array([2.0, 3.0]) + [0.0, 25.0]
        assert estimator.noise_scale() == pytest.approx(2 * variance / signal)

    def test_a_setting_draws_its_noise_scale(self):
        setting, rng = error.SETTINGS[-1], np.random.default_rng(0)
        windows = [setting.draw(rng) for _ in range(100)]
        assert [tuple(map(len, window)) for window in windows] == [setting.sizes] * 100
        sq_norms = torch.cat([x for window in windows for x in window]).double().square().sum(dim=1)
        spread = float(sq_norms.std()) / math.sqrt(len(sq_norms))
        assert float(sq_norms.mean()) == pytest.approx(setting.noise_scale, abs=5 * spread)
        assert float(estimators.location().theta.detach().square().sum()) == pytest.approx(1.0)


class TestCoverage:
    @pytest.mark.parametrize("scales", coverage.SCALES.values(), ids=coverage.SCALES)
    def test_squared_scales_have_mean_one(self, scales):
        drawn = scales(np.random.default_rng(1), (200_000,))
        assert drawn.mean() == pytest.approx(1.0, abs=5 * drawn.std() / math.sqrt(len(drawn)) + 1e-12)

    @pytest.mark.parametrize(
        "case", [coverage.Case(1.0, "contaminated", cells=8), coverage.Case(math.inf, cells=2)], ids=repr
    )
    def test_windows_are_unbiased(self, case):
        lost = math.isinf(case.theta_sq)
        truths = (coverage.BATCH, 0.0) if lost else (case.noise_scale, 1.0)
        for found, truth in zip(coverage.draw_pairs(np.random.default_rng(2), case, runs=200), truths, strict=True):
            assert found.shape == (200, case.windows)
            assert found.mean() == pytest.approx(truth, abs=5 * found.std() / math.sqrt(found.size))

    def test_correlated_errors_keep_their_variance(self):
        white = np.random.default_rng(3).normal(2.0, 1.0, (500, 40))
        series = coverage.correlate(white, mean=2.0, r=0.5) - 2.0
        assert series.var() == pytest.approx(1.0, abs=0.05)
        assert (series[:, 1:] * series[:, :-1]).mean() == pytest.approx(0.5, abs=0.05)

    def test_a_row(self):
        row = coverage.measure_coverage(coverage.Case(1.0, windows=12), runs=200)
        assert row["coverage"] == pytest.approx(0.95, abs=5 * math.sqrt(0.95 * 0.05 / 200))
        assert row["coverage SE"] == pytest.approx(math.sqrt(row["coverage"] * (1 - row["coverage"]) / 200))
        lost = coverage.measure_coverage(coverage.Case(math.inf, windows=12), runs=200)
        assert lost["coverage"] == lost["unbounded"] > 0.9

    def test_the_cases_are_those_the_promise_is_about(self):
        cases = set(coverage.CASES)
        assert len(cases) == len(coverage.CASES)
        for level in (0.25, 1.0, 4.0, math.inf):
            assert {coverage.Case(level, name, cells) for name in coverage.SCALES for cells in (2, 4, 8)} <= cases


class TestTables:
    def test_a_short_run_has_all_tables_and_a_figure(self, monkeypatch, tmp_path):
        monkeypatch.setattr(coverage, "CASES", (coverage.Case(1.0, windows=5), coverage.Case(math.inf, windows=5)))
        monkeypatch.setattr(error, "SETTINGS", (replace(error.SETTINGS[0], sizes=(4, 4)), error.SETTINGS[-1]))
        tables = calibration.run(windows=(2, 3), repeats=2, runs=20, workers=1)
        covered, errors = tables["coverage"], tables["error"]
        assert list(covered) == [
            *("B / n", "examples", "cells", "windows", "half-life", "r", "runs"),
            *("coverage", "coverage SE", "unbounded"),
        ]
        assert list(errors) == [
            *("setting", "windows", "estimator", "repeats"),
            *("bias", "bias SE", "rms", "rms SE", "infinite", "further by", "note"),
        ]
        assert len(covered) == 2
        assert len(errors) == 2 * 2 * len(estimators.available())
        calibration_figure(covered, errors, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 10_000

    def test_errors_are_summarised_with_their_standard_errors(self):
        logs = {
            estimators.OURS: [0.1, -0.1, 0.3],
            "gns-pytorch": [0.5, 0.7, 0.9],
            "torch-gqc GNS": [0.2, 0.2, math.inf],
        }
        rows = [
            {"setting": "s", "windows": 9, "estimator": name, "repeat": repeat, "log error": log}
            for name, values in logs.items()
            for repeat, log in enumerate(values)
        ]
        ours, peer, lost = error.error_table(pd.DataFrame(rows)).to_dict("records")
        assert ours["further by"] == 0.0
        assert ours["rms"] == pytest.approx(math.sqrt(0.11 / 3))
        assert peer["bias"] == pytest.approx(0.7)
        assert peer["bias SE"] == pytest.approx(0.2 / math.sqrt(3))
        excess = np.array([0.24, 0.48, 0.72])
        assert peer["further by"] == pytest.approx(0.48 / (excess.std(ddof=1) / math.sqrt(3)))
        assert (lost["rms"], lost["infinite"]) == (math.inf, pytest.approx(1 / 3))
        assert math.isnan(lost["further by"])
