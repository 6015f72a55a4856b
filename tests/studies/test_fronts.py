"""The frontier of fixed batches, the ratios to it, and what is trained in the live studies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import adaptbatch as ab
from studies import data
from studies.engine import reduce
from studies.engine.arms import Arm, Decay
from studies.engine.language import CharacterModel, LanguageTask, mean_loss, sequences
from studies.engine.results import load
from studies.engine.sweep import Found
from studies.engine.training import train
from studies.output.fronts import Frontier, against_earlier, claim_row, compare, compare_tasks, is_live
from studies.output.statistics import Interval
from studies.questions import live, quick, transformer


def table(noise: float = 0.0, seeds: int = 6, **arms: tuple[float, float]) -> pd.DataFrame:
    """Fixed batches on ``loss = 100 / sqrt(updates)``, arms of given updates and loss, noise of a seed's own."""
    rng = np.random.default_rng(0)
    points = {f"fixed {n}": (128_000 / n, 100 / np.sqrt(128_000 / n), True) for n in (16, 64, 256, 1024)}
    points |= {name: (*point, False) for name, point in arms.items()}
    shared = np.exp(noise * rng.standard_normal(seeds))
    rows = [
        {"arm": arm, "seed": s, "fixed": fixed, "updates": u, "test_loss": loss * shared[s]}
        for arm, (u, loss, fixed) in points.items()
        for s in range(seeds)
    ]
    return pd.DataFrame(rows)


class TestFrontier:
    def test_a_batch_that_another_dominates_is_not_on_it(self):
        front = Frontier.of([100, 200, 300, 400], [4.0, 3.0, 3.5, 2.0])
        assert front.updates.tolist() == [100.0, 200.0, 400.0]
        assert front.losses.tolist() == [4.0, 3.0, 2.0]

    def test_what_diverged_is_not_on_it_and_nothing_at_all_is_refused(self):
        assert Frontier.of([100, 200], [np.inf, 2.0]).updates.tolist() == [200.0]
        with pytest.raises(ValueError, match="at least one finite value"):
            Frontier.of([100], [np.inf])

    def test_an_arm_off_the_line_has_the_ratio_by_which_it_is(self):
        """It takes 3,000 updates to a loss for which a fixed batch on the line needs 4,000."""
        found = compare(table(better=(3_000.0, 100 / np.sqrt(4_000)))).set_index("arm")
        assert found.loc["better", "updates ratio"] == pytest.approx(0.75, rel=1e-3)
        assert found.loc["better", "loss ratio"] == pytest.approx(np.sqrt(3_000 / 4_000), rel=1e-3)
        assert found.loc[["fixed 16", "fixed 64", "fixed 1024"], "updates ratio"].tolist() == [1.0, 1.0, 1.0]

    def test_noise_that_arms_share_does_not_widen_the_interval(self):
        found = compare(table(noise=0.2, better=(3_000.0, 100 / np.sqrt(4_000)))).set_index("arm").loc["better"]
        assert found["updates ratio high"] - found["updates ratio low"] < 1e-3

    def test_a_loss_above_all_fixed_batches_is_no_gain(self):
        worse = compare(table(worse=(10.0, 50.0))).set_index("arm").loc["worse"]
        assert np.isinf(worse["updates ratio"])
        assert worse["beyond"] == 1.0

    def test_a_loss_below_all_is_a_bound(self):
        best = compare(table(best=(8_000.0, 0.5))).set_index("arm").loc["best"]
        assert best["updates ratio"] == 1.0
        assert best["beyond"] == 1.0

    def test_an_arm_that_diverged_is_infinite(self):
        rows = table(lost=(100.0, 3.0))
        rows.loc[(rows["arm"] == "lost") & (rows["seed"] == 2), "test_loss"] = np.inf
        lost = compare(rows).set_index("arm").loc["lost"]
        assert np.isinf(lost["updates ratio"])
        assert np.isinf(lost["updates ratio high"])

    def test_seeds_that_not_all_have_are_left_out(self):
        rows = table(late=(3_000.0, 2.0))
        rows = rows[(rows["arm"] != "late") | (rows["seed"] < 2)]
        assert compare(rows)["seeds"].unique().tolist() == [2]
        with pytest.raises(ValueError, match="a seed that all arms share"):
            compare(rows[(rows["arm"] == "late") | (rows["seed"] > 2)])

    def test_one_arm_over_another_leaves_the_frontiers_noise_out(self):
        rows = table(noise=0.3, mine=(2_000.0, 100 / np.sqrt(4_000)), theirs=(3_000.0, 100 / np.sqrt(4_000)))
        found = compare(rows, against="mine").set_index("arm").loc["theirs"]
        assert found["over"] == pytest.approx(2 / 3, rel=1e-3)
        assert found["over high"] - found["over low"] < 1e-3


def closed(rows: pd.DataFrame, **arms: int) -> pd.DataFrame:
    """Rows as a study has them; of the arms so many runs were live."""
    live = [row["fixed"] or row["seed"] < arms.get(row["arm"], 0) for row in rows.to_dict("records")]
    rows = rows.assign(task="a", adaptbatch=["any" if fixed else "0.1" for fixed in rows["fixed"]])
    rows = rows.assign(changes=np.where(live, 3, 0), at_limit=0.0, lr=1e-3, diverged=False)
    return rows.assign(mean_batch=64.0, last_batch=64.0, fixed=rows["fixed"].astype(int))


class TestTasks:
    def test_a_run_is_live_if_it_moved_and_was_mostly_free_or_has_no_loop_to_close(self):
        rows = pd.DataFrame({"changes": [0, 3, 3, 0], "at_limit": [0.0, 0.49, 0.5, 0.0]})
        assert is_live(rows.assign(adaptbatch=["0.1", "0.1", "0.1", "any"])).tolist() == [False, True, False, True]

    def test_an_arm_that_lacks_a_seed_of_the_fixed_batches_waits(self):
        rows = closed(table(late=(3_000.0, 2.0), early=(3_000.0, 2.0)))
        rows = rows[(rows["arm"] != "late") | (rows["seed"] < 2)]
        found = compare_tasks(rows, ["task"])
        assert "late" not in set(found["arm"])
        assert found["seeds"].unique().tolist() == [6]
        assert len(compare_tasks(rows[rows["arm"] == "early"], ["task"])) == 0

    def test_beside_fixed_batches_as_they_were_an_arm_looks_better(self):
        """Fixed 64, of 2,000 updates, ended as high as one of 1,000 before it was tuned again."""
        rows = closed(table(arm=(2_000.0, 100 / np.sqrt(2_000))))
        earlier = rows[rows["arm"] == "fixed 64"].assign(test_loss=100 / np.sqrt(1_000))
        now, before = (
            found.set_index("arm").loc["arm", "updates ratio"]
            for found in (compare_tasks(rows, ["task"]), against_earlier(rows, earlier, ["task"]))
        )
        assert now == pytest.approx(1.0)
        # A third of the way from 2,000 updates and 3.16 to 8,000 and 1.12, in logarithms.
        assert before == pytest.approx(4 ** (-1 / 3))

    @pytest.mark.parametrize(("live", "verdict"), [(4, "supported"), (3, "undecided"), (0, "undecided")])
    def test_a_claim_on_runs_that_did_not_move_is_undecided(self, live, verdict):
        rows = closed(table(moved=(2_000.0, 100 / np.sqrt(4_000))), moved=live)
        arm = compare_tasks(rows, ["task"]).set_index("arm").loc["moved"]
        assert arm["live"] == live
        found = Interval(*(arm[f"updates ratio{end}"] for end in ("", " low", " high")))
        row = claim_row("V1", "what", "where", found, arm=arm)
        assert (row["verdict"], row["live"]) == (verdict, f"{live} of 6")

    def test_a_gain_that_grows_with_the_budget_is_said_of_each_arm(self):
        """0.9 of the updates at one million and 0.75 at four is 5/6; the tuned arm has 0.75 at both."""
        line = {0.9: 100 / np.sqrt(3_000 / 0.9), 0.75: 100 / np.sqrt(4_000)}
        parts = []
        for millions, led in ((1, 0.9), (4, 0.75)):
            arms = {live.PRIMARY: (3_000.0, line[led]), transformer.TUNED: (3_000.0, line[0.75])}
            rows = closed(table(**arms), **dict.fromkeys(arms, 6))
            parts.append(rows.assign(order="pre", millions=millions, stage="final"))
        claims = transformer.tables(pd.concat(parts, ignore_index=True), pd.DataFrame())["claims"]
        own = claims[claims["claim"] == "L2"].set_index("what")
        said = "updates ratio of {} at 4 million over that at 1 million is below 1"
        assert own.loc[said.format(live.PRIMARY), "value"] == pytest.approx(5 / 6, rel=1e-3)
        assert own.loc[said.format(live.PRIMARY), "verdict"] == "supported"
        assert own.loc[said.format(transformer.TUNED), "value"] == pytest.approx(1.0, rel=1e-3)
        assert own.loc[said.format(transformer.TUNED), "verdict"] != "supported"
        assert len(own) == 2


class TestLanguage:
    def test_the_books_are_whole_and_apart(self):
        text = data.text("kjv")
        parts = ["".join(text.vocabulary[index] for index in part) for part in (text.train, text.validation, text.test)]
        assert sum(map(len, parts)) > 4_000_000
        assert parts[0].startswith("In the beginning God created the heaven and the earth.\n")
        assert "There was a man in the land of Uz" in parts[1]
        assert "Go to the ant, thou sluggard" in parts[2]
        assert not any("Go to the ant, thou sluggard" in part for part in parts[:2])

    def test_a_character_sees_none_after_it(self):
        torch.manual_seed(0)
        model = CharacterModel(vocabulary=11, context=8, width=16, layers=2, heads=2)
        x = torch.randint(11, (3, 8))
        changed = x.clone()
        changed[:, 5] = (changed[:, 5] + 1) % 11
        before, after = model(x), model(changed)
        assert torch.equal(before[:, :5], after[:, :5])
        assert not torch.equal(before[:, 5:], after[:, 5:])

    @pytest.mark.parametrize("order", ["pre", "post"])
    def test_it_learns_in_windows_of_any_size(self, order):
        task = LanguageTask("kjv", 40_000, 4, 32, width=16, layers=1, heads=2, order=order, probe_every=10_000)
        arm = Arm("adaptive", ab.Pareto(500.0), 1e-2, Decay(40_000, 4_000), optimizer="adamw")
        run = train(task, arm, seed=0, study="test")
        assert run["examples_seen"].iloc[-1] == 40_000
        assert run["accumulation_steps"].max() > run["accumulation_steps"].min()
        assert run["validation_loss"].dropna().iloc[-1] < task.collapsed_loss() + 0.1
        assert run.attrs["test"]["test_loss"] < 3.2

    def test_a_budget_that_is_no_multiple_of_the_context_is_spent(self):
        task = LanguageTask("kjv", 2_010, 4, 32, width=16, layers=1, heads=2, probe_every=500)
        run = train(task, Arm("fixed", ab.Fixed(2), 1e-2, optimizer="adamw"), seed=0, study="test")
        found = reduce.outcome(run, task.examples, task.collapsed_loss())
        assert 2_010 <= found["examples"] < 2_010 + 32
        assert np.isfinite(found["final"])

    def test_the_mean_over_pieces_is_the_mean(self):
        model = CharacterModel(vocabulary=11, context=8, width=16, layers=1, heads=2)
        x = sequences(torch.randint(11, (8 * 600 + 1,)), 8)
        with torch.no_grad():
            assert mean_loss(model, x) == pytest.approx(float(model.loss(x)), rel=1e-5)

    def test_names_are_checked(self):
        with pytest.raises(ValueError, match=r"order must be one of .* got order = 'mid'"):
            CharacterModel(11, order="mid")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="width must be a multiple of heads, got width = 10, heads = 4"):
            CharacterModel(11, width=10)


class TestWhatIsReported:
    def known(self, diverged: set[tuple[int, float, float]]) -> Found:
        """Tuning found 8e-3 with a warm-up best, then 8e-3, then 2e-3; these (seed, rate, share) diverged."""
        found, scale, setting = Found(Path("nowhere")), live.SCALES["smoke"], live.SETTINGS[0]
        for share in (0.0, live.WARMUP):
            search = live.searched(setting, scale, 128, found)[share]
            for _ in range(2):
                for run in search.planned(found):
                    final = abs(np.log(run.arm.lr / 8e-3)) - share
                    found.rows[run.key] = {"final": final, "diverged": False}
            for lr in search.candidates(found):
                for seed in range(2):
                    arm = live.fixed_arm(setting, scale, 128, share)(lr)
                    run = live.labelled("final", setting, scale, arm, seed, 128)
                    found.rows[run.key] = {"diverged": (seed, lr, share) in diverged}
        return found

    @pytest.mark.parametrize(
        ("diverged", "rates"),
        [
            (set(), [(8e-3, live.WARMUP)]),
            ({(1, 8e-3, live.WARMUP)}, [(8e-3, live.WARMUP), (8e-3, 0.0)]),
            ({(1, 8e-3, 0.0)}, [(8e-3, live.WARMUP)]),
        ],
    )
    def test_a_batch_that_diverges_takes_its_next_best_rate_and_its_runs_stay(self, diverged, rates):
        reported = live.reported(live.SETTINGS[0], live.SCALES["smoke"], 128, range(2), self.known(diverged))
        assert list(reported) == rates
        assert [[run.seed for run in runs] for runs in reported.values()] == [[0, 1]] * len(rates)

    @pytest.mark.parametrize("best", [(2e-3, 0.0), (6.4e-2, live.WARMUP), (8e-3, live.WARMUP)])
    def test_away_from_home_the_best_is_looked_for_from_that_at_home(self, best: tuple[float, float]):
        """Which has 8e-3 with a warm-up; what is best away is found, wherever it is."""
        found, scale = self.known(set()), live.SCALES["smoke"]
        away = live.Setting("calm", "mnist")
        rates = set()
        for _ in range(12):
            missing = [
                run
                for search in live.searched(away, scale, 128, found).values()
                for run in search.planned(found)
                if run not in found
            ]
            for run in missing:
                share = run.arm.schedule.warmup / scale.examples
                off = abs(np.log(run.arm.lr / best[0])) + 0.01 * abs(share - best[1])
                found.rows[run.key] = {"final": off, "diverged": False}
                rates.add(run.arm.lr)
        assert live.ranked(away, scale, 128, found)[0] == pytest.approx(best, rel=0.01)
        assert min(rates) >= min(4e-3, best[0] / 3)
        assert max(rates) <= max(1.6e-2, 3 * best[0])

    def test_away_from_home_nothing_is_looked_for_before_home_is_tuned(self):
        away = live.Setting("noisy scaled")
        assert live.searched(away, live.SCALES["laptop"], 128, Found(Path("nowhere"))) == {}
        assert live.ranked(away, live.SCALES["laptop"], 128, Found(Path("nowhere"))) == []

    def test_nothing_is_reported_before_it_is_tuned(self):
        assert live.reported(live.SETTINGS[0], live.SCALES["smoke"], 128, range(2), Found(Path("nowhere"))) == {}


def test_the_main_job_has_the_rates_and_warm_ups_that_the_live_study_reports():
    runs = load("live")
    final = runs[(runs["stage"] == "final") & (runs["network"] == "calm") & (runs["rate"] == "decaying")]
    known = final.groupby("arm")[["lr", "warmup"]].first()
    assert {n: tuple(known.loc[f"fixed {n}"]) for n in quick.TUNED} == quick.TUNED
    assert known.loc["theta 0.7, root", "lr"] == quick.START_RATE
