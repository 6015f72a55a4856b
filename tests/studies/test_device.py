"""The check for a machine with a GPU, tried at a tiny size on the CPU."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

import adaptbatch as ab
from adaptbatch.accumulate import accumulator
from adaptbatch.accumulate.window import Window
from adaptbatch.measure.result import HostCopy, PendingResult
from adaptbatch.measure.sums import Sums
from studies.device import bias, exact, harness, table
from studies.device import ghost as ghost_section
from studies.device.cases import cases
from studies.device.sync import SETTINGS, Reads
from studies.questions import origin
from tests.studies.misbehaving import STAMP, misbehaving, stillborn

REPOSITORY = Path(__file__).parents[2]
NEEDED = ("torch", "numpy", "scipy", "pandas", "pytest")


def distributions(names: tuple[str, ...]) -> set[str]:
    """Installed distributions that these need, and they themselves, with their extras' aside."""
    found, todo = set(), list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        todo += [re.split(r"[^\w.-]", one)[0] for one in requires if "extra ==" not in one]
    return found


def unneeded() -> set[str]:
    """Importable names of installed packages that the check has to do without."""
    needed = distributions(NEEDED) | {"adaptbatch"}
    owners = importlib.metadata.packages_distributions()
    return {
        name
        for name, by in owners.items()
        if needed.isdisjoint(re.sub(r"[-_.]+", "-", one).lower() for one in by) and not name.startswith("_")
    }


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of processes in which whatever is not needed cannot be imported, theirs included."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(
        f"from importlib.machinery import PathFinder\nUNNEEDED, find = {unneeded()!r}, PathFinder.find_spec\n"
        "def find_needed(name, path=None, target=None):\n"
        "    return None if name.partition('.')[0] in UNNEEDED else find(name, path, target)\n"
        "PathFinder.find_spec = find_needed\n"
    )
    return os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def trial(environment, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder and the outcome of one whole trial."""
    folder = tmp_path_factory.mktemp("device") / "out"
    return folder, python(environment, "-m", "studies.device", str(folder), "--tiny", "--device", "cpu")


@pytest.mark.timeout(300)
class TestTrial:
    def test_all_sections_run_with_what_is_needed_and_nothing_else(self, trial, environment):
        folder, done = trial
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        summary = pd.read_csv(folder / "summary.csv")
        assert summary["section"].tolist() == list(harness.SHARES)
        assert summary["ok"].all()
        assert {"tyro", "optuna", "pyarrow", "matplotlib", "rich", "sklearn", "joblib"} <= unneeded()
        for name in ("tyro", "pyarrow", "sklearn"):
            refused = python(environment, "-c", f"import {name}")
            assert refused.returncode == 1
            assert f"No module named '{name}'" in refused.stderr

    @pytest.mark.parametrize("name", harness.SHARES)
    def test_every_section_leaves_a_table_and_a_text_that_say_where_they_were_made(self, trial, name):
        folder, _ = trial
        found, text = pd.read_csv(folder / f"{name}.csv"), (folder / f"{name}.txt").read_text()
        assert len(found)
        assert found["ok"].all()
        assert set(found["device"]) == {f"CPU, {os.uname().machine}"}
        assert set(found["torch"]) == {torch.__version__}
        assert set(found["adaptbatch"]) == {ab.__version__}
        assert all(word in text for word in (torch.__version__, ab.__version__, "CPU"))
        assert not list(folder.glob("*.png"))
        assert not list(folder.glob(".*unfinished"))

    def test_waiting_needs_cuda_and_reads_are_counted_without(self, trial):
        folder, _ = trial
        assert "needs CUDA" in (folder / "sync.txt").read_text()
        found = pd.read_csv(folder / "sync.csv")
        ours = found[found["setting"] != "hand-written loop"]
        assert set(ours["setting"]) == set(SETTINGS)
        assert (ours["reads"] == ours["windows"]).all()
        assert (ours["reads_of_this_window"] == ours["windows"]).all()
        assert (ours["reads_within"] == 0).all()

    @pytest.mark.parametrize("name", ["time", "compiled"])
    def test_ratios_are_of_every_network_in_every_precision(self, trial, name):
        folder, _ = trial
        found = pd.read_csv(folder / f"{name}.csv")
        precisions, networks = ("bf16", "fp16", "float32"), ("autoencoder", "transformer", "wide MLP")
        for precision, network in itertools.product(precisions, networks):
            part = found[(found["network"] == network) & (found["precision"] == precision)].set_index("contender")
            assert len(part) == (2 if precision == "fp16" else 3)
            assert part.loc["hand-written loop", "ratio"] == 1.0
        numbers = found[["window_ms", "ratio", "ratio_low", "ratio_high"]].to_numpy()
        assert np.isfinite(numbers).all()
        assert (numbers > 0.0).all()
        assert (found["ratio_low"] <= found["ratio"]).all()
        assert (found["ratio"] <= found["ratio_high"]).all()
        if name == "compiled":
            # The contenders share one graph: the controller has nothing recompiled.
            assert set(found["graphs"]) == {1.0}

    def test_exactness_is_within_bounds_that_mean_something(self, trial):
        folder, _ = trial
        found = pd.read_csv(folder / "exact.csv")
        assert (found["deviation"] <= found["bound"]).all()
        whole = found[found["check"] == "gradient of one batch"]
        assert (whole["bound"] < whole["precision"].map({"float64": 1e-11, "float32": 1e-3})).all()
        bits = found[found["bound"] == 0.0]
        expected = {"hand-written loop", "hand-written loop twice", "overflow is left out", *exact.RESUMED}
        assert set(bits["check"]) == expected
        assert set(whole["network"]) == set(bits["network"]) == set(cases(tiny=True))

    def test_ghost_norms_are_within_bounds_that_mean_something(self, trial):
        folder, _ = trial
        found = pd.read_csv(folder / "ghost.csv")
        assert (found["deviation"] <= found["bound"]).all()
        assert (found["bound"] <= found["precision"].map({"float64": 1e-11, "float32": 1e-3, "bf16": 0.0625})).all()
        assert found["network"].nunique() == 4

    def test_estimates_are_near_the_truth(self, trial):
        folder, _ = trial
        found = pd.read_csv(folder / "bias.csv")
        assert len(found) == len(bias.WINDOWS) * 2
        z = (found["estimate"] - found["exact"]) / found["standard_error"]
        assert (z.abs() <= 5.0).all()
        assert (found["standard_error"] < 0.1 * found["exact"]).all()

    def test_the_table_has_a_line_for_each_epoch_of_each_row(self, trial):
        folder, _ = trial
        found = pd.read_csv(folder / "table.csv")
        assert found["row"].tolist() == list(table.TINY_ROWS)
        assert (found["epoch"] == table.TINY.epochs).all()
        for name in table.TINY_ROWS:
            lines = pd.read_csv(folder / f"{table.file_name(name, 0)}.csv")
            assert lines["epoch"].tolist() == list(range(1, table.TINY.epochs + 1))
            assert np.isfinite(lines[["train_loss", "valid_loss", "auroc", "auprc"]].to_numpy()).all()


# --- the table goes on where it stood -----------------------------------------------------------------------------


class After:
    """Says stop at the ``count``-th micro-batch, and counts them."""

    def __init__(self, count: float) -> None:
        self.count, self.limit = 0, count

    def __call__(self) -> bool:
        self.count += 1
        return self.count >= self.limit


@pytest.mark.parametrize("name", table.ROWS)
def test_a_training_that_was_put_away_goes_on_to_the_same_end(name, tmp_path):
    def training(folder: str) -> table.Training:
        (tmp_path / folder).mkdir(exist_ok=True)
        return table.Training(name, 0, size, tmp_path / folder, "cpu")

    size = table.Size(depth=8, widths=(16, 8), code=4, epochs=3, examples=1500)
    whole = training("whole")
    assert whole.run(After(np.inf))
    positions = [0]
    while positions[-1] < whole.position:
        one = training("parts")
        assert one.position == positions[-1]
        one.run(After(2))
        assert one.position > positions[-1]
        positions.append(one.position)
    assert len(positions) > 3
    expected, found = (
        pd.read_csv(tmp_path / folder / f"{table.file_name(name, 0)}.csv") for folder in ("whole", "parts")
    )
    pd.testing.assert_frame_equal(found.drop(columns="seconds"), expected.drop(columns="seconds"), check_exact=True)
    # What is done is not done again.
    again, asked = training("parts"), After(np.inf)
    assert again.run(asked)
    assert asked.count == 0


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    name = next(iter(table.ROWS))
    table.Training(name, 0, table.TINY, tmp_path, "cpu").run(After(1))
    other = table.Size(depth=8, widths=(16, 8), code=4, epochs=9, examples=600)
    with pytest.raises(ValueError, match="give another folder"):
        table.Training(name, 0, other, tmp_path, "cpu")


def test_the_rows_are_the_origin_studys():
    scale = origin.SCALES["paper"]
    size = table.Size()
    assert (size.depth, size.widths, size.epochs) == (scale.layers, scale.widths, scale.epochs)
    assert table.CLASSES == origin.CLASSES
    for name, (rule, micro_batch) in table.ROWS.items():
        arm, theirs = origin.rows(scale)[name]
        assert (rule, micro_batch) == (arm.rule, theirs)
        assert (arm.lr, arm.max_steps) == (table.LR, table.MAX_STEPS)
        assert (arm.residual, arm.norm, arm.optimizer) == ("identity", "branch", "adam")


def test_areas_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    for scores in (rng.normal(size=300), rng.integers(5, size=300).astype(float)):
        positive = rng.random(300) < 0.3
        assert table.auroc(positive, scores) == pytest.approx(roc_auc_score(positive, scores), rel=1e-12)
        expected = average_precision_score(positive, scores)
        assert table.average_precision(positive, scores) == pytest.approx(expected, rel=1e-12)
    assert np.isnan(table.auroc(positive, np.full(300, np.nan)))


# --- checks that can fail -----------------------------------------------------------------------------------------


def report(folder: Path) -> harness.Report:
    return harness.Report("section", folder, STAMP)


def test_a_mean_that_is_not_divided_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(accumulator, "divide_gradients_", lambda parameters, divisor: None)
    found = report(tmp_path)
    exact.one_batch(found, cases(tiny=True)["wide MLP"], "cpu", torch.float32)
    assert not found.ok
    assert not pd.read_csv(tmp_path / "section.csv")["ok"].all()


def test_a_bit_that_a_checkpoint_loses_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(ab.BatchController, "load_state_dict", lambda self, state: None)
    found = report(tmp_path)
    exact.resume(found, cases(tiny=True)["wide MLP"], "cpu", "resume, read before the step")
    assert not found.ok


def test_a_wrong_estimate_is_found(tmp_path, monkeypatch):
    right = bias.exact_moments
    monkeypatch.setattr(bias, "exact_moments", lambda *args: {k: 1.5 * v for k, v in right(*args).items()})
    found = report(tmp_path)
    bias.run(found, "cpu", tiny=True)
    assert not any(row["ok"] for row in found.rows if row["quantity"] == "noise_trace")


def test_a_wrong_norm_of_an_example_is_found(tmp_path, monkeypatch):
    right = ghost_section.per_example_sq_norms
    monkeypatch.setattr(ghost_section, "per_example_sq_norms", lambda *args: 1.001 * right(*args))
    found = report(tmp_path)
    ghost_section.compare(found, ghost_section.networks(tiny=True)[2], "cpu", "float32")
    assert not found.ok


def test_reads_are_told_with_their_part_of_the_loop_and_the_age_of_their_window():
    reads = Reads()
    with reads.counting():
        copy = HostCopy(torch.ones(2))
        reads.phase, reads.window = "backward", 1
        copy.read()
        copy.read()
    HostCopy(torch.ones(2)).read()
    assert reads.found == [("backward", 1, False)]


def test_a_learning_rate_that_is_on_the_host_is_not_sent_to_the_device():
    window = Window()
    window.add(3.0)
    sums = Sums({"weighted": torch.tensor(1.0), "batch": torch.tensor(4.0), "loss_sum": torch.tensor(6.0)}, cells=1)
    rate = torch.tensor(0.125)
    pending = PendingResult.of(sums, window, rate, steps=1)
    rate.mul_(2.0)
    assert "lr" not in pending.names
    assert pending.result.lr == 0.125


# --- sections that fail, die or hang ------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_the_others_run_after_a_section_that_dies_hangs_or_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "GRACE_S", 4.0)
    names = ("sync", "time", "exact", "ghost")
    assert harness.Supervisor(harness.Options(tmp_path, names, 100.0), misbehaving).run() == 1
    found = pd.read_csv(tmp_path / "summary.csv", keep_default_na=False).set_index("section")
    assert found["ok"].to_dict() == {"sync": False, "time": False, "exact": False, "ghost": True}
    assert "exit status 3" in found.loc["sync", "note"]
    assert "hung" in found.loc["time", "note"]
    assert "hung" in (tmp_path / "time.txt").read_text()
    for _ in range(100):
        if not alive(int((tmp_path / "child").read_text())):
            break
        time.sleep(0.1)
    else:
        pytest.fail("what a section started outlived it")


def test_a_process_that_does_not_start_is_told_of_every_section(tmp_path):
    names = ("ghost", "bias")
    assert harness.Supervisor(harness.Options(tmp_path, names, 100.0), stillborn).run() == 1
    found = pd.read_csv(tmp_path / "summary.csv")
    assert found["section"].tolist() == list(names)
    assert not found["ok"].any()


@pytest.fixture
def module(monkeypatch) -> Iterator[ModuleType]:
    """A section of the test's own."""
    own = ModuleType("studies.device.own")
    monkeypatch.setitem(sys.modules, "studies.device.own", own)
    return own


def test_an_error_in_a_section_is_written_down_after_the_rows_that_were_done(tmp_path, module):
    def run(report: harness.Report, device: str, tiny: bool) -> None:
        report.row(True, number=1)
        raise ZeroDivisionError("a section's own\nerror")

    module.run = run
    found = harness.Report("own", tmp_path, STAMP)
    assert harness._run(found, "cpu", True) == "ZeroDivisionError: a section's own"
    found.finish()
    assert pd.read_csv(tmp_path / "own.csv")["number"].tolist() == [1]
    assert "in run" in (tmp_path / "own.txt").read_text()


def test_a_check_that_raises_leaves_a_row_and_lets_the_next_one_run(tmp_path, monkeypatch):
    def broken(report: harness.Report, *_: Any) -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(ghost_section, "compare", broken)
    found = report(tmp_path)
    ghost_section.run(found, "cpu", tiny=True)
    rows = pd.read_csv(tmp_path / "section.csv")
    assert len(rows) == 12
    assert not rows["ok"].any()
    assert set(rows["error"]) == {"RuntimeError: out of memory"}


def test_a_section_without_time_is_no_success(tmp_path):
    names = ("ghost",)
    assert harness.Supervisor(harness.Options(tmp_path, names, 0.0, "cpu", tiny=True)).run() == 1
    found = pd.read_csv(tmp_path / "summary.csv")
    assert found["note"].tolist() == ["no time was left"]
