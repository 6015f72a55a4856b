"""planning/curves.py and advice.py: what one run's noise says of every batch, and what it is sure of."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adaptbatch as ab
from adaptbatch.__main__ import main
from adaptbatch.estimate import estimate_window, noise_scale, noise_scale_interval
from adaptbatch.planning.curves import TimeModel, integrated_noise, measured_seconds, speed_table
from adaptbatch.records import Measurement
from tests.models import batches, small_model, squared


def drawn(
    rng: np.random.Generator, windows: int, scale: np.ndarray | float, k: int = 4, b: float = 8.0
) -> pd.DataFrame:
    """Windows as a controller measures them, of Gaussian gradients with this noise scale in each."""
    dimension, rows = 20, []
    for _ in range(windows):
        mean = np.full(dimension, math.sqrt(1.0 / dimension))
        cells = mean + rng.normal(size=(k, dimension)) * math.sqrt(scale / dimension / b)
        total = cells.mean(axis=0)
        measured = Measurement(float((cells**2).sum()) * b, float(total @ total), k * b, k)
        pair = estimate_window(measured)
        rows.append((pair.grad_sq_norm, pair.noise_trace, k * b, k))
    table = pd.DataFrame(rows, columns=["grad_sq_norm", "noise_trace", "global_batch", "accumulation_steps"])
    return table.assign(examples_seen=table["global_batch"].cumsum())


def exact(scale: np.ndarray, batch: float = 32.0, length: np.ndarray | float = 1.0) -> pd.DataFrame:
    """Windows without any error."""
    table = pd.DataFrame({"grad_sq_norm": np.broadcast_to(length, scale.shape), "noise_trace": scale * length})
    return table.assign(global_batch=batch, accumulation_steps=4, examples_seen=batch * (table.index + 1.0))


class TestNoise:
    def test_the_interval_covers_the_truth(self):
        runs = [integrated_noise(drawn(np.random.default_rng(seed), 60, 40.0)) for seed in range(400)]
        limits = [noise_scale_interval(pair) for pair in runs]
        covered = np.mean([low <= 40.0 <= high for low, high in limits])
        assert abs(covered - 0.95) < 4.0 * math.sqrt(0.95 * 0.05 / 400)
        assert np.median([noise_scale(pair) for pair in runs]) == pytest.approx(40.0, rel=0.03)

    def test_it_is_the_mean_along_the_way_and_not_the_last_value(self):
        """The slow twin: E(n) and S(n) are added up step by step, each going 1 / (1 + B / n) of a clean step's way."""
        scale = np.geomspace(10.0, 400.0, 4_000)
        way = 1.0 / (1.0 + scale / 32.0)
        expected = (scale * way).sum() / way.sum()
        found = noise_scale(integrated_noise(exact(scale, length=np.geomspace(100.0, 0.01, len(scale)))))
        assert found == pytest.approx(expected, rel=1e-2)
        assert found < 0.5 * scale[-1]

    def test_a_window_without_a_measurement_is_stood_for(self):
        scale = np.geomspace(20.0, 200.0, 600)
        rows = exact(scale)
        sparse = rows.copy()
        sparse.loc[sparse.index % 3 > 0, ["grad_sq_norm", "noise_trace"]] = math.nan
        whole, part = noise_scale(integrated_noise(rows)), noise_scale(integrated_noise(sparse))
        assert part == pytest.approx(whole, rel=1e-2)

    def test_a_burst_is_bounded(self):
        rows = exact(np.full(200, 50.0))
        burst = rows.copy()
        burst.loc[100, ["grad_sq_norm", "noise_trace"]] = [1e6, 5e9]
        assert noise_scale(integrated_noise(burst)) < 1.2 * noise_scale(integrated_noise(rows))

    def test_windows_that_were_skipped_are_no_part_of_the_way(self):
        rows = exact(np.full(40, 50.0)).assign(skipped=[index % 2 == 1 for index in range(40)])
        rows.loc[rows["skipped"], "noise_trace"] = 1e9
        assert noise_scale(integrated_noise(rows)) == pytest.approx(50.0)


class TestTable:
    @given(
        scale=st.floats(1e-3, 1e6),
        spread=st.floats(1.0, 100.0),
        micro=st.floats(1.0, 256.0),
        devices=st.integers(1, 64),
        fixed=st.floats(0.0, 1.0),
        each=st.floats(1e-6, 1.0),
    )
    def test_bounds_and_order(self, scale: float, spread: float, micro: float, devices: int, fixed: float, each: float):
        sizes = [micro * 2**power for power in range(8)]
        bounds = (scale, scale / spread, scale * spread)
        table = speed_table(bounds, sizes, micro, devices, TimeModel(fixed, each))
        for name in ("steps_factor", "examples_factor"):
            assert (table[name] >= 1.0).all()
            assert (table[f"{name}_low"] <= table[name]).all()
            assert (table[name] <= table[f"{name}_high"]).all()
        assert table["steps_factor"].is_monotonic_decreasing
        assert table["examples_factor"].is_monotonic_increasing
        assert table["seconds_factor"].min() == 1.0
        assert table["efficiency"].between(0.0, 1.0 + 1e-12).all()
        held = table["accumulation_steps"] * micro * devices
        assert (held >= table["batch"] * (1.0 - 1e-6)).all()

    def test_the_equation(self):
        table = speed_table((100.0,) * 3, [50.0, 100.0, 200.0], 50.0)
        assert table["steps_factor"].tolist() == [3.0, 2.0, 1.5]
        assert table["examples_factor"].tolist() == [1.5, 2.0, 3.0]
        assert table["seconds_factor"].isna().all()


class TestSeconds:
    def test_two_sizes_tell_a_step_from_an_example(self):
        rng = np.random.default_rng(0)
        batch = np.repeat([32.0, 256.0], 60)
        seconds = 0.02 + 0.001 * batch + 0.001 * rng.exponential(size=len(batch))
        # An evaluation now and then is no part of a window.
        seconds[::20] += 5.0
        table = pd.DataFrame({"global_batch": batch, "wall_seconds": seconds.cumsum()})
        model = measured_seconds(table)
        assert model.per_example == pytest.approx(0.001, rel=0.05)
        assert model.fixed == pytest.approx(0.0207, rel=0.1)

    def test_one_size_with_one_part_tells_the_other(self):
        table = pd.DataFrame({"global_batch": 100.0, "wall_seconds": np.arange(20) * 0.3})
        assert measured_seconds(table, fixed=0.1).per_example == pytest.approx(0.002)
        assert measured_seconds(table, per_example=0.002).fixed == pytest.approx(0.1)
        with pytest.raises(ValueError, match=r"seconds need windows of at least two sizes to tell .* got 100 only"):
            measured_seconds(table)

    def test_seconds_that_cannot_be_told_apart_are_refused(self):
        """They do not grow with the batch."""
        batch = np.repeat([50.0, 100.0], 20)
        seconds = 0.3 + 0.01 * np.random.default_rng(0).random(40)
        table = pd.DataFrame({"global_batch": batch, "wall_seconds": seconds.cumsum()})
        with pytest.raises(ValueError, match=r"seconds of a window do not follow its size clearly enough, got"):
            measured_seconds(table)
        with pytest.raises(ValueError, match=r"seconds need a column wall_seconds with at least \d+ windows"):
            measured_seconds(table.head(2))


class TestPlan:
    def test_costly_steps_and_devices_want_larger_batches(self):
        rows = exact(np.full(100, 200.0))
        cheap = ab.plan(rows, seconds_per_step=0.001, seconds_per_example=0.001)
        costly = ab.plan(rows, seconds_per_step=1.0, seconds_per_example=0.001)
        shared = ab.plan(rows, devices=64, seconds_per_step=0.1, seconds_per_example=0.001, seconds_per_sync=0.1)
        alone = ab.plan(rows, seconds_per_step=0.1, seconds_per_example=0.001)
        assert cheap.recommended.batch < costly.recommended.batch
        assert alone.recommended.batch < shared.recommended.batch
        # The least time of S(n) (c0 + c1 n) is at the root of B c0 / c1.
        best = math.sqrt(200.0 * 1.0 / 0.001)
        assert 0.5 * best <= costly.recommended.batch <= 2.0 * best

    def test_without_seconds_it_is_the_critical_batch(self):
        found = ab.plan(exact(np.full(100, 130.0)))
        assert found.recommended.batch == 128.0
        assert found.seconds is None
        assert any("Without a time model" in note for note in found.notes)
        doubled = ab.plan(exact(np.full(100, 130.0)), calibration=4.0)
        assert doubled.recommended.batch == 512.0

    def test_says_how_sure_it_is(self):
        vague = ab.plan(drawn(np.random.default_rng(0), 12, 40.0), confidence=0.99)
        sure = ab.plan(drawn(np.random.default_rng(0), 2_000, 40.0), batches=[8, 64, 512])
        assert "interval of the noise scale it would be" in vague.recommended.reason
        assert "interval of the noise scale says the same" in sure.recommended.reason
        for found in (vague, sure):
            assert found.recommended.reason in repr(found)
            assert "<table" in found._repr_html_()
            assert str(found.recommended) == found.recommended.reason

    def test_draws(self, tmp_path: Path):
        axes = ab.plan(
            drawn(np.random.default_rng(0), 200, 40.0), seconds_per_step=0.1, seconds_per_example=1e-3
        ).plot()
        assert axes.get_xlabel() == "batch [examples]"
        axes.figure.savefig(tmp_path / "plan.png")
        assert (tmp_path / "plan.png").stat().st_size > 10_000

    def test_drawing_without_matplotlib_names_the_extra(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ModuleNotFoundError, match=r'pip install "adaptbatch\[plot\]"'):
            ab.plan(exact(np.full(20, 50.0))).plot()

    def test_of_a_training(self):
        """Of a controller and of a meter, whose rows are alike."""
        data, model = batches([4] * 160), small_model()
        controller = ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=1e-3), rule=ab.Fixed(4))
        for x in controller.micro_batches(data):
            controller.backward(squared(model, x), weight=len(x))
            if controller.step_due:
                controller.step()
        other = small_model()
        meter = ab.NoiseMeter(other, optimizer := torch.optim.SGD(other.parameters(), lr=1e-3))
        for index, x in enumerate(data, start=1):
            (squared(other, x) / 4).backward()
            if index % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()
        mine, theirs = controller.plan(), ab.plan(meter.history)
        assert mine.critical == pytest.approx(theirs.critical, rel=1e-6)
        assert mine.seconds is not None
        assert mine.unit == "examples"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"devices": 0}, r"devices must be a whole number of at least 1, got devices = 0; 8 for eight"),
            ({"measured_on": 1.5}, r"measured_on must be a whole number of at least 1, got measured_on = 1.5"),
            ({"confidence": 1.0}, r"confidence must be in \(0, 1\), got confidence = 1.0; 0.95 is usual"),
            (
                {"seconds_per_sync": -1.0},
                r"seconds_per_sync must be at least 0 and finite, got seconds_per_sync = -1",
            ),
            ({"batches": []}, r"batches must be positive and finite numbers of examples, got batches = \[\]"),
            ({"batches": [-1]}, r"batches must be positive and finite numbers of examples, got batches = \[-1.0\]"),
            ({"calibration": 0.0}, r"calibration must be positive and finite, got calibration = 0.0"),
            ({"micro_batch": math.nan}, r"micro_batch must be positive and finite, got micro_batch = nan"),
        ],
    )
    def test_refuses_arguments(self, options: dict[str, Any], message: str):
        with pytest.raises(ValueError, match=message):
            ab.plan(exact(np.full(20, 50.0)), **options)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (
                exact(np.full(7, 50.0)),
                r"history must have at least 8 windows with a measurement .* got 7 of 7",
            ),
            (exact(np.full(20, math.nan)), r"got 0 of 20: a window of one micro-batch holds none\. Take two"),
            (exact(np.full(20, 50.0)).head(0), r"history must have at least one window, it has none"),
            (exact(np.full(20, 50.0)).drop(columns="noise_trace"), r"it lacks \['noise_trace'\]"),
            (pd.concat([exact(np.full(20, 50.0))] * 2), r"history must be of one run, got rows in which examples_seen"),
            (exact(np.full(20, 50.0)).assign(grad_sq_norm=-1.0), r"history must tell the gradient's length from zero"),
        ],
        ids=["few", "none", "empty", "columns", "two runs", "no signal"],
    )
    def test_refuses_a_run_without_evidence(self, rows: pd.DataFrame, message: str):
        with pytest.raises(ValueError, match=message):
            ab.plan(rows)

    def test_a_controller_without_evidence_refuses(self):
        model = torch.nn.Linear(2, 1)
        controller = ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.raises(ValueError, match="history must have at least one window, it has none"):
            controller.plan()

    def test_refuses_what_is_no_run(self):
        with pytest.raises(TypeError, match=r"history must be a History, its DataFrame or the place of .* got int"):
            ab.plan(3)


class TestCommand:
    def test_reads_parquet_and_csv(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        rows = drawn(np.random.default_rng(0), 200, 40.0)
        rows.to_parquet(tmp_path / "run.parquet")
        rows.to_csv(tmp_path / "run.csv", index=False)
        options = ("--devices", "1", "8", "--seconds-per-step", "0.05", "--seconds-per-example", "0.001")
        command = [sys.executable, "-m", "adaptbatch", "plan", str(tmp_path / "run.parquet"), *options]
        text = subprocess.run(command, capture_output=True, text=True).stdout
        assert main(["plan", str(tmp_path / "run.csv"), *options]) == 0
        assert capsys.readouterr().out == text
        assert text.count("Take ") == 2
        assert "on 8 devices" in text

    def test_says_what_is_wrong(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(tmp_path / "nowhere.parquet")])
        told = capsys.readouterr().err
        assert (ended.value.code, "nowhere.parquet" in told) == (2, True)
        assert "Traceback" not in told
