"""The bursts study: what its claims say of worlds that are known, and that its plan is what it registers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import adaptbatch as ab
from studies.engine.sweep import Found, Options, write
from studies.questions import bursts, comparison

World = Callable[[int, float, int], int]


def plan(seeds: int = 8) -> tuple[list[Any], Found]:
    """All runs, the trials of which are finished: the second value of each knob was best."""
    found, options = Found(Path("nowhere")), Options("laptop", seeds)
    for run in bursts.plan(options, found):
        labels = dict(run.labels)
        if labels["stage"] == "tune":
            values = bursts.KNOBS[str(labels["method"])][1]
            found.rows[run.key] = {"final": 50.0 + abs(values.index(labels["value"]) - 1)}
    return bursts.plan(options, found), found


def made_up(spikes: World, k: tuple[int, ...] = (16, 2, 9, 2), windows: tuple[int, ...] = (2, 60, 1, 40)) -> Any:
    """Rows and curves of a world in which so many spikes come of a batch, a rate and a seed; the rule counts as 512."""
    rows, curves = [], []
    for run in plan()[0]:
        labels, steps = dict(run.labels), getattr(run.arm.rule, "accumulation_steps", 8)
        batch = run.task.micro_batch * steps
        count = spikes(batch, run.arm.lr, run.seed)
        final = 50.0 + math.log2(batch) + 0.01 * (run.seed % 3) + count / 10
        row = {"key": f"{labels['stage']} {run.key}", "arm": run.arm.name, "seed": run.seed, **labels}
        row |= {"spikes": count, "probe_spikes": count // 2, "diverged": count > 40, "final": final}
        row |= {"mean_batch": float(batch), "updates": run.task.examples // batch, "at_limit": 0.9, "changes": 3}
        row |= {
            "adaptbatch": "0.1" if run.arm.rule.closed_loop else "any",
            "schedule_k": k,
            "schedule_windows": windows,
        }
        rows.append(row)
        seen = np.linspace(0.0, run.task.examples, 21)[1:]
        curve = {"key": row["key"], "examples_seen": seen, "validation_loss": final * (1 + 30 * np.exp(-seen / 4e3))}
        curves.append(pd.DataFrame(curve | {"global_batch": float(batch), "relative_error": 60 / math.sqrt(batch)}))
    return pd.DataFrame(rows), pd.concat(curves, ignore_index=True)


def verdicts(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[tuple[str, str], str]:
    table = bursts.tables(runs, curves)["claims"]
    return {(row.claim, f"{row.what}, {row.where}"): row.verdict for row in table.itertuples()}


def of(found: dict[tuple[str, str], str], claim: str, text: str) -> str:
    (verdict,) = (said for (name, what), said in found.items() if name == claim and text in what)
    return verdict


def averaging(batch: int, lr: float, seed: int) -> int:
    """Bursts are made of the batch's error: a batch and a rate lowered by its root do the same."""
    noise = lr / math.sqrt(batch / 64) / 1e-2
    return 50 + seed if noise > 0.8 and seed % 2 else 0


def too_far(batch: int, lr: float, seed: int) -> int:
    """Bursts are made of the rate: a batch does nothing about them."""
    return 50 if lr > 6e-3 and seed % 4 else 0


class TestClaims:
    def test_where_the_mean_cures_all_says_so(self):
        found = verdicts(*made_up(averaging))
        assert of(found, "O1", "trend of spikes with the batch is below 0, equal examples") == "supported"
        assert of(found, "O1", "trend of probe_spikes with the batch is below 0, equal updates") == "supported"
        assert of(found, "O1", "trend of diverged with the batch is below 0, equal updates") == "supported"
        assert of(found, "O2", "trend of spikes") == "supported"
        assert of(found, "C1", "share of seeds") == "supported"
        assert of(found, "O3", "spikes, standard error / fixed 64") == "supported"
        assert of(found, "O3", "no run of standard error diverges") == "supported"
        assert of(found, "O4", "standard error / fixed 128") == "not supported"

    def test_where_the_rate_is_too_high_the_batch_is_not_credited(self):
        found = verdicts(*made_up(too_far))
        assert of(found, "O1", "trend of spikes with the batch is below 0, equal examples") == "not supported"
        assert of(found, "O2", "trend of spikes") == "supported"
        assert of(found, "C1", "share of seeds") == "not supported"
        assert of(found, "O3", "no run of standard error diverges") == "not supported"
        assert not [what for claim, what in found if claim == "O4"], "no fixed batch was quiet"

    @pytest.mark.parametrize(("k", "windows"), [((16, 2), (90, 10)), ((16, 2), (1, 900)), ((2,), (100,))])
    def test_a_rule_that_slept_has_no_verdict(self, k, windows):
        """At its largest window most of the time, or with no answer after the first tenth."""
        found = verdicts(*made_up(averaging, k, windows))
        assert {of(found, "O3", text) for text in ("/ fixed 64", "/ fixed 128", "diverges")} == {"undecided"}

    def test_half_a_study_has_the_claims_of_what_there_is(self):
        runs, curves = made_up(averaging)
        first = runs[(runs["stage"] == "examples") & (runs["seed"] == bursts.FIRST_SEED)]
        assert {claim for claim, _ in verdicts(first, curves)} == {"O1"}

    def test_the_figure_is_drawn(self, tmp_path):
        runs, curves = made_up(averaging)
        write(runs, curves, tmp_path / "bursts")
        bursts.STUDY.figures(tmp_path / "bursts")
        assert (tmp_path / "bursts" / "figure.png").stat().st_size > 20_000


class TestPlan:
    def test_every_arm_has_the_seeds_and_the_micro_batch_that_spikes_are_counted_in(self):
        runs, _ = plan()
        counts = Counter(
            (dict(run.labels)["stage"], run.arm.name) for run in runs if dict(run.labels)["stage"] != "tune"
        )
        assert set(counts.values()) == {8}
        assert len(counts) == 5 + 2 + 2 + 4 + 2
        counted = [run for run in runs if dict(run.labels)["stage"] != "updates"]
        assert {run.task.micro_batch for run in counted} == {comparison.MICRO_BATCH}
        assert {run.task.residual for run in runs} == {"identity"}

    def test_reported_seeds_are_neither_those_of_the_trials_nor_those_that_suggested_the_claims(self):
        runs = bursts.plan(Options("laptop"), Found(Path("nowhere")))
        reported = {run.seed for run in runs if dict(run.labels)["stage"] != "tune"}
        assert reported == set(range(10, 30))
        assert reported.isdisjoint(range(comparison.SCALES["laptop"].stress_seeds))

    def test_equal_updates_are_equal_and_evaluated_as_often(self):
        runs = [run for run in plan()[0] if dict(run.labels)["stage"] == "updates"]
        made = {run.task.examples // (run.task.micro_batch * run.arm.rule.accumulation_steps) for run in runs}
        assert made == {1000}
        assert {run.task.examples // run.task.probe_every for run in runs} == {100}

    def test_a_lowered_rate_is_lowered_by_the_root(self):
        rates = {dict(run.labels)["batch"]: run.arm.lr for run in plan()[0] if dict(run.labels)["stage"] == "rates"}
        assert rates == {256: 5e-3, 1024: 2.5e-3}

    def test_what_is_tuned_takes_the_best_of_its_own_trials(self):
        tuned = {run.arm.name: run for run in plan()[0] if dict(run.labels)["stage"] == "tuned"}
        rule = tuned["standard error, tuned"].arm.rule
        assert rule == ab.StandardError(reference_batch=bursts.REFERENCES[1], memory=bursts.MEMORY)
        assert tuned["warm-up, tuned"].arm.schedule.examples == bursts.LENGTHS[1]
