"""The planning study: exact where its model holds, large errors where it does not, brackets that are found."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.pyplot import imread

from studies.engine import sweep as engine
from studies.engine.metering import CHANNELS
from studies.engine.results import RESULTS, load, write_atomically
from studies.engine.runner import Run
from studies.engine.sweep import Found, Options, Where, carry_out
from studies.output import predictions
from studies.output.plan_figure import quick_plan
from studies.questions import live, planning, quick, transformer
from tests.planning.test_plan import exact

START, OPENING, SCALE = 32, 64_000.0, 200.0
BATCHES = (16, 64, 128, 256, 512, 1024)
BUDGETS = OPENING * 2.0 ** np.arange(-2, 5)


def results(folder: Path, power: float = 1.0, seeds: int = 5, noise: float = 0.0) -> Path:
    """A sweep whose loss follows the way that a step goes: ``E / (n + B)``, or ``E / (n + B)^power``."""
    rng, rows, windows = np.random.default_rng(0), [], []

    def loss(n: float, budget: float) -> float:
        way = budget / (n + SCALE) * ((n + SCALE) / (START + SCALE)) ** (1.0 - power)
        return float(40.0 * way**-0.1 * math.exp(noise * rng.standard_normal()))

    for seed in range(seeds):
        names = {"stage": "final", "task": "exact", "start": START, "seed": seed, "lr": 0.01}
        names |= {"study": "planning", "key": "x"}
        rows.append(names | {"batch": START, "budget": OPENING, "test_loss": loss(START, OPENING)})
        rows += [
            names | {"batch": n, "budget": budget, "test_loss": loss(n, budget)} for n in BATCHES for budget in BUDGETS
        ]
        table = exact(np.full(2_000, SCALE), batch=float(START)).assign(accumulation_steps=2)
        for name in CHANNELS.values():
            table[name] = SCALE * np.exp(0.05 * rng.standard_normal(len(table))).cumprod() ** 0.1
        windows.append(table.assign(task="exact", seed=seed, lr=0.01))
    branches = pd.DataFrame(
        {"task": "exact", "seed": [0, 0, 1], "at": [6e3, 3e4, 6e3], "critical": [128.0, 256.0, 128.0]}
    )
    branches = branches.assign(excluded=math.inf, smallest=32.0, largest=512.0, calibration=[1.0, 1.25, 0.8], lr=0.01)
    branches = branches.assign(task="exact", **dict.fromkeys(CHANNELS, SCALE))
    engine.write(pd.DataFrame(rows), pd.DataFrame({"key": ["x"]}), folder / "planning")
    write_atomically(pd.concat(windows, ignore_index=True), folder / "planning" / "windows.parquet")
    write_atomically(branches, folder / "planning" / "branches.parquet")
    return folder / "planning"


def claims(folder: Path) -> pd.DataFrame:
    return planning.tables(folder)["claims"]


def test_where_its_model_holds_the_error_is_none(tmp_path: Path):
    folder = results(tmp_path)
    tables = planning.tables(folder)
    found = tables["predictions"].set_index("batch")
    np.testing.assert_allclose(found["updates"], found["predicted"], rtol=1e-3)
    np.testing.assert_allclose(
        found["updates"], OPENING / START * (1 + SCALE / found.index) / (1 + SCALE / START), rtol=1e-3
    )
    rows = tables["claims"].set_index("claim")
    assert rows.loc["P1", "value"].to_numpy() == pytest.approx(1.0, abs=1e-3)
    assert rows.loc["P1", "verdict"].tolist() == ["supported", "supported"]
    assert (tables["blind"]["low"] > 1.5).all()
    assert rows.loc["P3", "verdict"].tolist() == ["supported"] * 3
    assert (tables["followed"]["worst"] > 1.2).all()
    planning.draw(folder)
    assert (folder / "figure.png").stat().st_size > 20_000


def test_where_it_does_not_hold_the_error_is_large(tmp_path: Path):
    """Steps go a way that falls with the square of ``n + B``: a large batch takes far more updates."""
    rows = claims(results(tmp_path, power=2.5)).set_index("claim")
    assert (rows.loc["P1", "value"] > 1.7).all()
    assert rows.loc["P1", "verdict"].tolist() == ["not supported", "not supported"]


def test_noise_of_the_losses_widens_the_interval(tmp_path: Path):
    (alone, *_), (noisy, *_) = (
        claims(results(tmp_path / name, noise=noise)).to_dict("records") for name, noise in (("a", 0.0), ("b", 0.02))
    )
    assert noisy["high"] - noisy["low"] > 10 * (alone["high"] - alone["low"])
    assert noisy["value"] < 1.5


def test_a_batch_that_never_gets_there_has_an_infinite_error():
    budgets, losses = np.array([1.0, 2.0]), np.array([3.0, 2.0])
    assert predictions.budget_for(budgets, losses, 1.0) == math.inf
    assert predictions.budget_for(budgets, losses, 3.5) == 0.0
    never = {n: (np.array([1e4, 2e4]), np.full((2, 3), 5.0)) for n in (64, 128, 256)}
    sweep = predictions.Sweep(START, OPENING, np.full(3, 3.0), never, np.full(3, SCALE))
    assert sweep.error(sweep.scales).value == math.inf


def trained(
    ranked: Sequence[tuple[float, float]], diverges: Callable[[dict], bool], earlier: tuple[float, float] | None = None
) -> list[Run]:
    """All runs of the calm network, from rows that are put there, run by run, as they would be trained."""
    (subject, *_) = planning.subjects(Options("laptop"))
    assert subject.batches == (16, 32, 64, 128, 256, 512, 1024)
    subject = replace(
        subject, ranked=lambda n, found: ranked, earlier=None if earlier is None else lambda n, found: earlier
    )
    found = Found(Path("nowhere"))
    for _ in range(12):
        missing = [run for run in planning._swept(subject, range(2), found) if run not in found]
        for run in missing:
            labels = dict(run.labels)
            loss = 1e6 if diverges(labels) else 40.0 * (labels["budget"] / (labels["batch"] + SCALE)) ** -0.1
            found.rows[run.key] = {"test_loss": loss, "diverged": diverges(labels)}
        if not missing:
            return list(planning._swept(subject, range(2), found))
    raise AssertionError(f"{len(missing)} runs are still missing")


def test_budgets_are_doubled_until_they_bracket_the_loss():
    swept = trained([(0.01, 0.0)], diverges=lambda labels: False)
    (subject, *_) = planning.subjects(Options("laptop"))
    for n, own in pd.DataFrame([dict(run.labels) for run in swept]).groupby("batch"):
        needed = subject.opening * (n + SCALE) / (START + SCALE)
        assert own["budget"].min() <= needed <= own["budget"].max()
        assert n == START or own["budget"].max() <= 4 * needed
    shared = {run.key for run in swept if run.task.examples == 128_000}
    setting, scale = live.SETTINGS[0], live.SCALES["laptop"]
    arm = live.fixed_arm(setting, scale, 1024)(0.01)
    assert live.labelled("final", setting, scale, arm, 0, 1024).key in shared


def test_a_rate_at_which_a_run_diverges_is_left_for_the_next_best():
    """At 0.04 fixed 256 diverges at every budget, at 0.02 at a short one: both stay in the results, apart."""

    def diverges(labels: dict) -> bool:
        return labels["batch"] == 256 and (
            labels["lr"] == 0.04 or (labels["budget"] < 128_000 and labels["lr"] == 0.02)
        )

    swept = pd.DataFrame(
        [dict(run.labels) for run in trained([(0.04, 0.0), (0.02, 0.4), (0.01, 0.2)], diverges=diverges)]
    )
    counted = swept[swept["stage"] == "final"].groupby("batch")["lr"].agg(["min", "max"])
    assert counted.loc[256].tolist() == [0.01, 0.01]
    assert (counted.drop(index=256) == 0.04).all(axis=None)
    left = swept[swept["stage"] == "diverged"]
    assert set(zip(left["batch"], left["lr"], strict=True)) == {(256, 0.04), (256, 0.02)}


def test_what_batches_took_earlier_stands_beside(tmp_path: Path):
    """At rates of their own, until they bracket the loss too; where they are those of today nothing is said twice."""
    ranked = [(0.02, 0.4)]
    swept = pd.DataFrame(dict(run.labels) for run in trained(ranked, lambda labels: False, earlier=(0.01, 0.0)))
    stages = swept.groupby("stage")["lr"].agg(["min", "max", "size"])
    assert stages.loc["shorter warm-ups"].tolist() == [0.01, 0.01, stages.loc["final", "size"] - 2]
    assert stages.loc["final", ["min", "max"]].tolist() == [0.02, 0.02]
    assert {dict(run.labels)["stage"] for run in trained(ranked, lambda labels: False, earlier=ranked[0])} == {"final"}

    runs, curves = (load("planning", curves=which, folder=results(tmp_path).parent) for which in (False, True))
    later = runs[runs["batch"] != START].assign(stage="shorter warm-ups")
    later["budget"] *= 2.0
    engine.write(pd.concat([runs, later], ignore_index=True), curves, tmp_path / "planning")
    tables = planning.tables(tmp_path / "planning")
    now, before = (tables[name].set_index("batch")["updates"] for name in ("predictions", "before"))
    assert before.to_numpy() == pytest.approx(2.0 * now.to_numpy(), rel=1e-6)
    planning.draw(tmp_path / "planning")


def test_runs_at_rates_that_were_left_are_not_counted(tmp_path: Path):
    folder = results(tmp_path)
    runs, curves = (load("planning", curves=which, folder=tmp_path) for which in (False, True))
    left = runs.assign(stage="diverged", lr=0.04, test_loss=1e6)
    engine.write(pd.concat([left, runs], ignore_index=True), curves, tmp_path / "again" / "planning")
    for name in ("windows", "branches"):
        shutil.copy(folder / f"{name}.parquet", tmp_path / "again" / "planning")
    pd.testing.assert_frame_equal(claims(tmp_path / "again" / "planning"), claims(folder))


def test_the_plan_of_the_main_job_is_drawn_from_its_rows(tmp_path: Path):
    rows = pd.read_parquet(RESULTS / "quick" / "results.parquet")
    quick_plan(rows, tmp_path / "plan.png", *quick.PLANNED)
    quick_plan(rows, tmp_path / "again.png", *quick.PLANNED)
    assert (tmp_path / "plan.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert imread(tmp_path / "plan.png").std() > 0.05


def test_seconds_that_tell_nothing_are_no_picture(tmp_path: Path):
    rows = pd.read_parquet(RESULTS / "quick" / "results.parquet")
    rows["wall_seconds"] = np.arange(len(rows), dtype=float)
    with pytest.raises(ValueError, match="do not follow its size clearly enough"):
        quick_plan(rows, tmp_path / "plan.png", *quick.PLANNED)


def test_the_other_studies_own_sweeps_are_waited_for(tmp_path: Path):
    assert planning.plan(Options("laptop"), Found(tmp_path)) == []


def test_a_task_that_no_study_has_swept_is_swept_here(tmp_path: Path):
    """From the home sweep that is committed, in rounds; at the end each batch has what brackets the measured run."""
    found = Found(tmp_path, engine.committed())
    options = Options("laptop", seeds=1, data=("fashion",))
    (subject,) = planning.subjects(options)
    for _ in range(20):
        missing = [run for run in planning.plan(options, found) if run not in found]
        for run in missing:
            labels = dict(run.labels)
            batch = labels.get("batch") or int(labels["method"].partition(",")[0].removeprefix("fixed "))
            loss = (run.task.examples / (batch + SCALE)) ** -0.1
            final = loss * (1.0 + abs(math.log(labels["lr"] / 0.01)) + abs(labels["warmup"] - 0.2))
            found.rows[run.key] = {"final": final, "test_loss": loss, "diverged": False}
        if not missing:
            break
    assert not missing
    runs = pd.DataFrame(dict(run.labels) for run in planning.plan(options, found))
    assert runs[runs["stage"] == "final"].groupby("batch")["budget"].size().min() >= 1
    assert set(runs[runs["stage"] == "final"]["batch"]) == set(subject.batches)
    assert set(runs[runs["stage"] == "tune"]["data"]) == {"fashion"}


def test_measured_runs_are_kept_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The smoke preset, smaller, on one seed: sweeps, brackets, meters, branches, tables, figure."""
    # No committed run is looked for.
    monkeypatch.setattr(engine, "committed", list)
    monkeypatch.setitem(live.SCALES, "smoke", replace(live.SCALES["smoke"], examples=2_000))
    monkeypatch.setitem(transformer.SCALES, "smoke", replace(transformer.SCALES["smoke"], million=6_000))
    carry_out(planning.STUDY, Options("smoke", seeds=1), Where(1), tmp_path, tmp_path / "store")
    folder = tmp_path / "planning"
    windows, branches = (pd.read_parquet(folder / f"{name}.parquet") for name in ("windows", "branches"))
    assert windows.groupby(["task", "seed"]).size().tolist() == [15, 5]
    assert windows["noise_trace"].notna().all()
    assert branches["critical"].tolist() == pytest.approx([32.0, 512.0], rel=1.0)
    tables = planning.tables(folder)
    assert set(tables) >= {"predictions", "claims", "ratios"}
    assert all(len(table) or title == "claims" for title, table in tables.items())
    planning.draw(folder)
    assert {path.suffix for path in folder.glob("*.p[nd][gf]")} >= {".pdf"}
    assert all(path.stat().st_size > 5_000 for path in folder.glob("*.p[nd][gf]"))
    monkeypatch.setattr(planning, "measured", lambda *_: pytest.fail("run again"))
    carry_out(planning.STUDY, Options("smoke", seeds=1), Where(1), tmp_path, tmp_path / "store")
