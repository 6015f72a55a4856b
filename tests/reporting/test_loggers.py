"""watch.py: loggers get complete rows in order, as plain values, and nothing that befalls them harms the training."""

from __future__ import annotations

import gc
import importlib
import io
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptbatch as ab
from adaptbatch.reporting.history import COLUMNS, History
from adaptbatch.reporting.loggers import Logger, ProgressLine, TensorBoardLogger, WandbLogger
from tests.waiting import until

PLAIN = {"int64": int, "float64": float, "bool": bool, "str": str}
EMPTY = {name: kind(0) if kind is not str else "hold" for name, kind in ((n, PLAIN[k]) for n, k in COLUMNS.items())}


class Notes:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self.closed = False

    def log(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    def close(self) -> None:
        self.closed = True

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows]


class Broken(Notes):
    """Breaks at its second row."""

    def log(self, row: Mapping[str, Any]) -> None:
        super().log(row)
        if len(self.rows) == 2:
            raise OSError("disk full")


def appended(history: History, *steps: int) -> None:
    for step in steps:
        history.append(EMPTY | {"optimizer_step": step, "loss": math.nan})


def training(*loggers: Logger, windows: int = 4, **options: Any) -> tuple[ab.BatchController, nn.Module]:
    """A run of ``windows`` windows of two micro-batches."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    data = [torch.randn(8, 3) for _ in range(2 * windows)]
    controller = ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=0.1), rule=ab.Fixed(2), **options)
    for logger in loggers:
        controller.history.watch(logger)
    with controller:
        for x in controller.micro_batches(data):
            controller.backward(model(x).square().mean(), weight=len(x))
            if controller.step_due:
                controller.step()
    return controller, model


class TestRows:
    def test_a_row_is_told_once_it_is_complete(self):
        history, notes = History(), Notes()
        history.watch(notes)
        appended(history, 1)
        assert notes.rows == []
        appended(history, 2)
        history.amend(0, {"loss": 0.5})
        assert notes.losses == [0.5]
        history.amend(0, {"loss": 0.25})
        assert notes.losses == [0.5]
        history.amend(1, {"loss": 0.125})
        assert notes.losses == [0.5, 0.125]

    def test_the_last_waiting_row_is_told_when_the_history_settles(self):
        history = History(settle=lambda: history.amend(1, {"loss": 2.0}))
        notes, gone = Notes(), Notes()
        history.watch(notes)
        history.watch(gone)
        appended(history, 1, 2)
        history.amend(0, {"loss": 1.0})
        assert notes.losses == [1.0]
        history.unwatch(gone)
        assert gone.losses == notes.losses == [1.0, 2.0]
        assert not gone.closed
        appended(history, 3)
        history.amend(2, {"loss": 3.0})
        assert (gone.losses, notes.losses) == ([1.0, 2.0], [1.0, 2.0, 3.0])

    def test_a_row_that_is_never_amended_comes_before_the_next(self):
        history, notes = History(), Notes()
        history.watch(notes)
        appended(history, 1, 2, 3)
        history.amend(2, {"loss": 3.0})
        assert [row["optimizer_step"] for row in notes.rows] == [1, 2, 3]
        assert math.isnan(notes.losses[0])

    def test_who_comes_late_hears_what_is_complete_from_then_on(self):
        history, notes = History(), Notes()
        appended(history, 1, 2)
        history.amend(0, {"loss": 1.0})
        history.watch(notes)
        history.amend(1, {"loss": 2.0})
        assert notes.losses == [2.0]

    def test_rows_are_plain_values_and_everyone_has_their_own(self):
        one, two = Notes(), Notes()
        controller, _ = training(one, two)
        for row, kept in zip(one.rows, controller.history, strict=True):
            assert {name: type(value) for name, value in row.items()} == {n: PLAIN[k] for n, k in COLUMNS.items()}
            assert repr(row) == repr(kept | {"skipped": bool(kept["skipped"])})
        assert one.rows[0] is not two.rows[0]
        assert len(one.rows) == 4

    def test_a_late_reading_controller_tells_every_row_complete(self):
        early, late = Notes(), Notes()
        training(early)
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        data = [torch.randn(8, 3) for _ in range(8)]
        controller = ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=0.1), rule=ab.Fixed(2))
        controller._read_late = True  # as on a GPU without the check before the step
        controller.history.watch(late)
        told = []
        with controller:
            for x in controller.micro_batches(data):
                controller.backward(model(x).square().mean(), weight=len(x))
                if controller.step_due:
                    controller.step()
                    told.append(len(late.rows))
        assert told == [0, 1, 2, 3]
        assert late.losses == early.losses

    def test_what_is_no_logger_is_refused(self):
        with pytest.raises(
            TypeError, match=r"methods log\(row\) and close\(\), got list; adaptbatch\.reporting\.loggers wraps"
        ):
            History().watch([])  # type: ignore[arg-type]

    def test_nobody_watches_twice(self):
        history, notes = History(), Notes()
        history.watch(notes)
        with pytest.raises(ValueError, match=r"logger must not be watching already, got <.*; unwatch\(\) it first"):
            history.watch(notes)
        history.unwatch(notes)
        history.watch(notes)


class TestFailure:
    def test_the_training_goes_on_as_if_nobody_had_watched(self):
        broken, notes = Broken(), Notes()
        with pytest.warns(
            RuntimeWarning, match=r"Broken raised OSError\('disk full'\) and is told nothing more"
        ) as all:
            controller, model = training(broken, notes)
        assert len(all) == 1
        assert (len(broken.rows), len(notes.rows)) == (2, 4)
        undisturbed, twin = training()
        assert all_equal(model, twin)
        columns = [name for name in COLUMNS if name != "wall_seconds"]
        assert controller.history.to_pandas()[columns].equals(undisturbed.history.to_pandas()[columns])

    def test_a_mended_logger_goes_on(self):
        history, broken = History(), Broken()
        history.watch(broken)
        appended(history, 1, 2, 3, 4)
        history.amend(0, {"loss": 1.0})
        with pytest.warns(RuntimeWarning, match="Once the cause is mended, history"):
            history.amend(1, {"loss": 2.0})
        history.amend(2, {"loss": 3.0})
        history.watch(broken)
        history.amend(3, {"loss": 4.0})
        assert broken.losses == [1.0, 2.0, 4.0]

    def test_an_interrupt_is_not_swallowed(self):
        class Interrupted(Notes):
            def log(self, row: Mapping[str, Any]) -> None:
                raise KeyboardInterrupt

        history = History()
        history.watch(Interrupted())
        appended(history, 1)
        with pytest.raises(KeyboardInterrupt):
            history.amend(0, {"loss": 1.0})
        assert next(iter(history))["loss"] == 1.0


def all_equal(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


ROWS = [
    EMPTY | {"examples_seen": 64.0, "loss": 2.5, "noise_scale_high": math.inf, "noise_scale": math.nan},
    EMPTY | {"examples_seen": 128.0, "loss": 1.5, "noise_scale_high": 90.0, "noise_scale": 50.0, "reason": "grow"},
    EMPTY
    | {
        "noise_scale_high": 80.0,
        "examples_seen": 256.0,
        "loss": math.nan,
        "skipped": True,
        "reason": "grow",
        "optimizer_step": 2**40,
    },
]


def told(logger: Logger) -> None:
    with closing(logger):
        for row in ROWS:
            logger.log(row)


class TestTensorBoard:
    def check(self, directory: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(directory)).Reload()
        assert points(events, "adaptbatch/loss") == [(64, 2.5), (128, 1.5)]
        assert points(events, "adaptbatch/noise_scale_high") == [(128, 90.0), (256, 80.0)]
        assert points(events, "adaptbatch/skipped") == [(64, 0.0), (128, 0.0), (256, 1.0)]
        assert points(events, "adaptbatch/optimizer_step") == [(64, 0.0), (128, 0.0), (256, 2.0**40)]
        assert set(events.Tags()["scalars"]) == {f"adaptbatch/{name}" for name in COLUMNS} - {"adaptbatch/reason"}
        reasons = events.Tensors("adaptbatch/reason/text_summary")
        assert [(e.step, e.tensor_proto.string_val[0]) for e in reasons] == [(64, b"hold"), (128, b"grow")]

    def test_its_event_files_hold_the_rows(self, tmp_path: Path):
        told(TensorBoardLogger(tmp_path / "run"))
        self.check(tmp_path / "run")

    def test_a_writer_of_the_user_stays_open(self, tmp_path: Path):
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(tmp_path)) as writer:
            told(TensorBoardLogger(writer))
            self.check(tmp_path)
            assert writer.file_writer is not None

    def test_a_run_writes_its_curves(self, tmp_path: Path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        with closing(TensorBoardLogger(str(tmp_path), prefix="batch")) as logger:
            controller, _ = training(logger)
        events = EventAccumulator(str(tmp_path)).Reload()
        losses = controller.history.to_pandas()["loss"].tolist()
        steps, values = zip(*points(events, "batch/loss"), strict=True)
        assert steps == (16, 32, 48, 64)
        assert values == pytest.approx(losses, rel=1e-6)


def points(events: Any, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.fixture
def offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A wandb run that stays in ``tmp_path``; its service process ends with it."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    quiet = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True, x_disable_meta=True)
    run = wandb.init(mode="offline", project="adaptbatch", dir=str(tmp_path), settings=quiet)
    yield run
    run.finish()
    wandb.teardown()


def test_rows_of_weights_below_one_do_not_share_a_step():
    class Writer:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.steps += [step] if name.endswith("/loss") else []

        def add_text(self, name: str, text: str, step: int) -> None: ...

        def flush(self) -> None: ...

    writer = Writer()
    logger = TensorBoardLogger(writer)
    for seen in (0.2, 0.4, 0.6, 0.8, 9.0):
        logger.log({"examples_seen": seen, "loss": 1.0, "reason": "hold"})
    assert writer.steps == [0, 1, 2, 3, 9]


class TestWandb:
    def test_the_offline_file_holds_the_rows(self, offline_run: Any):
        told(WandbLogger(offline_run))
        offline_run.log({"validation": 1.0})
        assert offline_run.summary["adaptbatch/reason"] == "grow"
        assert offline_run.summary["adaptbatch/loss"] == 1.5
        offline_run.finish()
        records = until(lambda: finished(Path(offline_run.settings.sync_file)), "wandb's process to write its file")
        rows = [
            {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        assert [row.get("adaptbatch/examples_seen") for row in rows] == ["64", "128", "256", None]
        assert [row.get("adaptbatch/loss") for row in rows] == ["2.5", "1.5", None, None]
        assert [row.get("adaptbatch/noise_scale_high") for row in rows[:2]] == [None, "90"]
        assert [row.get("adaptbatch/reason") for row in rows[:3]] == ['"hold"', '"grow"', '"grow"']
        assert [row.get("adaptbatch/skipped") for row in rows[:3]] == ["0", "0", "1"]
        axes = {r.metric.glob_name or r.metric.name: r.metric.step_metric for r in records if r.HasField("metric")}
        assert axes == {"adaptbatch/examples_seen": "", "adaptbatch/*": "adaptbatch/examples_seen"}


def finished(path: Path) -> list[Any]:
    """The records of a file that its own process has written to the end; none before."""
    records = list(offline_records(path)) if path.exists() else []
    return records if any(record.HasField("exit") for record in records) else []


def offline_records(path: Path) -> Iterator[Any]:
    """The protobuf records in wandb's own file: LevelDB's log format, in blocks of 32 kB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        end = at + 7 + int.from_bytes(data[at + 4 : at + 6], "little")
        message += data[at + 7 : end]
        if end > len(data):  # still being written
            return
        if data[at + 6] in (1, 4):  # the whole, or its last part
            yield Record.FromString(message)
            message = b""
        at = end


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("package", ["rich", "tqdm"])
class TestProgressLine:
    @pytest.fixture(autouse=True)
    def terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "110")

    def test_the_line_says_where_the_run_stands(self, package: Any):
        file = Terminal()
        line = ProgressLine(512, package=package, file=file)
        assert file.getvalue() == ""
        with closing(line):
            line.log(ROWS[0] | {"accumulation_steps": 2, "global_batch": 64.0})
            assert "12% 64 of 512 examples  loss 2.5  k 2  n 64  B -  hold" in file.getvalue()
            line.log(ROWS[1] | {"noise_scale_low": 35.4, "examples_seen": 1024.0, "global_batch": 64.0})
        assert "200% 1,024 of 512 examples  loss 1.5  k 0  n 64  B 50 (35 to 90)  grow" in file.getvalue()
        assert file.getvalue().count("\n") == 1
        line.close()

    def test_without_a_budget_it_counts(self, package: Any):
        file = Terminal()
        with closing(ProgressLine(package=package, file=file)) as line:
            line.log(ROWS[2] | {"noise_scale_low": 3.0, "noise_scale_high": math.inf, "noise_scale": 1234.0})
        assert "256 examples  loss -  k 0  n 0  B 1,234 (3 to inf)  grow" in file.getvalue()
        assert "%" not in file.getvalue()

    def test_it_is_left_in_order_when_nobody_closes_it(self, package: Any):
        file = Terminal()
        line = ProgressLine(512, package=package, file=file)
        line.log(ROWS[0])
        del line
        gc.collect()
        assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h")
        assert file.getvalue().endswith(("\n", "\x1b[?25h"))

    def test_a_run_moves_it(self, package: Any):
        file = Terminal()
        with closing(ProgressLine(64, package=package, file=file)) as line:
            training(line)
        assert "100% 64 of 64 examples" in file.getvalue()
        assert line.text.startswith("100% 64 of 64 examples  loss 0.")

    def test_standard_error_is_the_default(self, package: Any, capsys: pytest.CaptureFixture[str]):
        with closing(ProgressLine(512, package=package)) as line:
            line.log(ROWS[0])
        assert "64 of 512 examples" in capsys.readouterr().err


class TestRefusals:
    @pytest.mark.parametrize("budget", [0, -1.0, math.nan, math.inf])
    def test_a_budget_out_of_range(self, budget: float):
        with pytest.raises(ValueError, match=f"budget must be positive and finite, got budget = {budget!r}; None"):
            ProgressLine(budget)

    def test_an_unknown_package(self):
        with pytest.raises(ValueError, match=r"'rich', 'tqdm' or None for either, got package = 'bar'"):
            ProgressLine(package="bar")  # type: ignore[arg-type]

    def test_a_missing_package_names_the_extra(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "tensorboard", None)
        with pytest.raises(
            ModuleNotFoundError, match=r"^tensorboard must be .*; pip install 'adaptbatch\[tensorboard\]'"
        ):
            TensorBoardLogger(tmp_path)
        monkeypatch.setitem(sys.modules, "rich", None)
        with pytest.raises(ModuleNotFoundError, match=r"^rich must be installed .*'adaptbatch\[progress\]'"):
            ProgressLine(package="rich")
        assert ProgressLine()._package is importlib.import_module("tqdm")
        monkeypatch.setitem(sys.modules, "tqdm", None)
        with pytest.raises(ModuleNotFoundError, match=r"^rich must be installed .*'adaptbatch\[progress\]'"):
            ProgressLine()
