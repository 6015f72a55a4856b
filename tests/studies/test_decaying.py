"""Frontier, sensitivity and the origin's table where the rate decays and the controller acts: plans and claims."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from studies.engine.runner import Run
from studies.engine.sweep import Found, Options
from studies.questions import frontier, live, origin, origin_live, sensitivity


class Finished(Found):
    """A store in which whatever is asked for is finished; the best rate is 8e-3."""

    def __init__(self) -> None:
        super().__init__(Path("nowhere"))

    def __contains__(self, run: Run) -> bool:
        return True

    def __getitem__(self, run: Run) -> dict[str, Any]:
        recorded = {"schedule_k": [2, 4], "schedule_windows": [3, 5], "mean_batch": 96.0}
        return recorded | {"diverged": False, "final": 30.0 + abs(math.log(run.arm.lr / 8e-3))}


class TestFrontier:
    def test_waits_for_the_rates_that_the_live_study_looks_for(self, tmp_path):
        runs = list(frontier.decaying(Options("laptop"), Found(tmp_path)))
        assert {dict(run.labels)["stage"] for run in runs} == {"tune"}
        assert {run.arm.name for run in runs} == {f"fixed {n}" for n in frontier.DECAYED}

    def test_every_arm_has_every_budget_and_the_whole_one_is_the_live_studys(self):
        runs = list(frontier.decaying(Options("laptop"), Finished()))
        arms = {run.arm.name for run in runs}
        assert arms == {*(f"fixed {n}" for n in frontier.DECAYED), *frontier.DECAYED_RULES}
        assert len(runs) == len(arms) * len(frontier.BUDGETS) * frontier.SEEDS
        # At its own end every budget's rate is zero.
        assert {run.arm.learning_rate(run.task.examples) for run in runs} == {0.0}
        ours = {run.key for run in runs if run.task.examples == live.SCALES["laptop"].examples}
        theirs = {run.key for run in live.plan(Options("laptop"), Finished()) if dict(run.labels)["stage"] == "final"}
        assert ours <= theirs
        assert len(ours) == len(arms) * frontier.SEEDS

    @pytest.mark.parametrize(("saved", "verdict"), [(0.7, "supported"), (1.0, "undecided"), (1.5, "not supported")])
    def test_an_arm_inside_the_hyperbola_is_found(self, saved, verdict):
        """Fixed batches that follow S = 1000 + 60,000 / n for one loss; a rule like batch 60 in so many examples."""
        rng, rows = np.random.default_rng(0), []
        sizes = {f"fixed {n}": (float(n), 1.0) for n in frontier.DECAYED}
        sizes |= dict.fromkeys(frontier.DECAYED_RULES, (60.0, saved))
        for arm, (n, times) in sizes.items():
            needed = (1_000 + 60_000 / n) * n * times
            for seed in range(5):
                luck = math.exp(0.02 * rng.normal())
                for budget in (40_000, 80_000, 160_000, 320_000):
                    row = {
                        "stage": "decaying",
                        "network": frontier.DECAYING,
                        "arm": arm,
                        "seed": seed,
                        "budget": budget,
                        "examples": budget,
                    }
                    row |= {"updates": budget / n, "fixed": int(arm.startswith("fixed"))}
                    rows.append(row | {"test_loss": 30.0 * (budget / needed) ** -0.2 * luck})
        # The slowest fixed batch sets the target; all of them reach it.
        runs = pd.DataFrame(rows)
        found = frontier.tables(runs, pd.DataFrame({"key": []}))
        assert found["fit"]["network"].tolist() == [frontier.DECAYING]
        claims = found["claims"].set_index("what")["verdict"]
        assert claims.index.tolist() == [f"q of {arm} is below 1" for arm in frontier.DECAYED_RULES]
        assert set(claims) == {verdict}

    def test_a_loss_between_two_budgets_is_on_their_line(self):
        losses, spent = pd.Series([16.0, 4.0, 4.5]), pd.Series([100.0, 200.0, 400.0])
        assert frontier.budget_to(losses, spent, 8.0) == pytest.approx(100 * math.sqrt(2))
        assert frontier.budget_to(losses, spent, 3.0) == math.inf
        assert frontier.budget_to(losses, spent, 20.0) == math.inf


class TestSensitivity:
    def rows(self, width: float, worse: float) -> pd.DataFrame:
        """Losses that rise with the distance from the best rate; thetas in so wide a valley, 1.0 so much worse."""
        rows = []
        for run in sensitivity.decaying(Options("laptop")):
            labels = dict(run.labels)
            adaptive = run.arm.rule.closed_loop
            away = abs(math.log10(run.arm.lr / 1e-2)) / (width if adaptive else 1.0)
            loss = 30.0 * (worse if run.arm.name == "theta 1, root" else 1.0) * (1 + 0.2 * away) * (1 + 0.01 * run.seed)
            row = {"arm": run.arm.name, "seed": run.seed, "test_loss": loss, "mean_batch": 100.0, **labels}
            rows.append(row)
        return pd.DataFrame(rows)

    def test_all_arms_have_all_rates(self):
        rows = self.rows(1.0, 1.0)
        assert len(rows) == (3 + 2) * 7 * 5
        assert rows.groupby("arm")["lr"].nunique().eq(7).all()
        assert np.ptp(np.log10(rows["lr"])) == pytest.approx(3.0)

    @pytest.mark.parametrize(
        ("width", "worse", "verdicts"),
        [
            (4.0, 1.0, ["supported", "supported", "supported", "supported"]),
            (0.5, 1.3, ["not supported", "not supported", "not supported", "not supported"]),
        ],
    )
    def test_claims_of_a_wide_and_a_narrow_valley(self, width, worse, verdicts):
        claims = pd.DataFrame(sensitivity.decaying_claims(self.rows(width, worse)))
        assert claims["claim"].tolist() == ["S3", "S4", "S5", "S5"]
        assert claims["verdict"].tolist() == verdicts

    def test_before_all_arms_have_run_there_is_no_claim(self):
        rows = self.rows(1.0, 1.0)
        assert sensitivity.decaying_claims(rows[rows["arm"] != "fixed 64"]) == []


class TestOrigin:
    def test_the_rows_beside_it_are_the_origins_and_its_rate_is_that_of_256(self):
        runs = origin_live.plan(Options("laptop"), Finished())
        theirs = {run.key for run in origin.table_runs("mnist", origin.SCALES["laptop"], 0)}
        own = [run for run in runs if run.key not in theirs]
        assert theirs < {run.key for run in runs}
        assert len(own) == 6
        assert {run.task.micro_batch for run in own} == {32}
        assert {(run.task.residual, run.task.norm) for run in own} == {("identity", "branch")}
        beside, _ = origin.rows(origin.SCALES["laptop"])[origin_live.SMALL]
        assert {(run.arm.lr, run.arm.coupling.reference_batch) for run in own} == {(beside.lr, 256)}

    def test_the_course_counts_examples_near_the_reports_batch_after_the_first_epoch(self):
        own = {"key": "a", "class": 0.0, "seed": 0, "mean_batch": 96.0, "adaptbatch": "0.1", "changes": 3}
        own |= {"at_limit": 0.1, "schedule_k": [128, 2, 64, 3], "schedule_windows": [1, 100_000, 10, 100]}
        own |= {"examples": float(32 * (128 + 200_000 + 640 + 300))}
        measured = np.r_[np.full(50, 40.0), np.full(50, 80.0)]
        course = origin_live.course(pd.DataFrame([own]), pd.DataFrame({"key": "a", "noise_scale": measured})).iloc[0]
        assert course["largest n"] == 64 * 32
        assert course["near the report's"] == pytest.approx(640 / 201_068)
        assert (course["noise scale, middle"], course["noise scale, end"]) == (40.0, 80.0)
        assert course["error at 4000"] == pytest.approx(math.sqrt(80 / 4000))
        assert course["live"]
