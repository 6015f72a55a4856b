"""Resume as users do it: with a stateful loader, distributed checkpoints, and after kill -9 at random moments."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import random
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils.data import TensorDataset

import adaptbatch as ab
from tests.models import LastDigits, equal_state, small_model, squared
from tests.processes import start

# torchdata calls what torch 2.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
EPOCHS, EXAMPLES, MICRO_BATCH = 3, 70, 4


class Job:
    """A training whose whole state is four state_dicts; 18 micro-batches an epoch, the last one partial."""

    def __init__(self, seed: int = 0) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            from torchdata.stateful_dataloader import StatefulDataLoader
        torch.manual_seed(seed)
        data = torch.randn(EXAMPLES, 4, generator=torch.Generator().manual_seed(5))
        self.model = small_model(seed, dtype=torch.float32)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.controller = ab.BatchController(self.model, self.optimizer, rule=LastDigits())
        self.loader: Any = StatefulDataLoader(TensorDataset(data), batch_size=MICRO_BATCH, shuffle=True)
        self.epoch = 0
        self.micro_batches = 0

    def run(self, after: Any = lambda job: None) -> None:
        for epoch in range(self.epoch, EPOCHS):
            self.epoch = epoch
            for (x,) in self.controller.micro_batches(self.loader):
                self.controller.backward(squared(self.model, x), weight=len(x))
                if self.controller.step_due:
                    self.controller.step()
                self.micro_batches += 1
                after(self)

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "controller": self.controller}
        states = {name: part.state_dict() for name, part in parts.items()}
        states |= {"loader": self.controller.loader_state_dict(), "random": torch.get_rng_state()}
        return states | {"epoch": self.epoch, "micro_batches": self.micro_batches}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.controller.load_state_dict(state["controller"])
        self.loader.load_state_dict(state["loader"])
        torch.set_rng_state(state["random"])
        self.epoch, self.micro_batches = state["epoch"], state["micro_batches"]


def finished() -> Job:
    job = Job()
    job.run()
    return job


class TestStatefulLoader:
    @pytest.mark.parametrize("stop", [1, 2, 9, 17, 18, 19, 36, 47])
    def test_goes_on_within_an_epoch_and_within_a_window(self, tmp_path, stop):
        """At its end, too: the last partial micro-batch of an epoch is neither lost nor repeated."""
        job, whole = Job(), finished()

        def save(job: Job) -> None:
            if job.micro_batches == stop:
                torch.save(job.state(), tmp_path / "checkpoint.pt")

        job.run(save)
        other = Job(seed=1)
        other.load(torch.load(tmp_path / "checkpoint.pt"))
        other.run()
        assert equal_state(other.model, whole.model)
        assert other.micro_batches == whole.micro_batches == EPOCHS * 18
        assert other.controller.examples_seen == whole.controller.examples_seen == EPOCHS * EXAMPLES

    def test_a_loader_that_only_seems_to_have_a_state_trains(self):
        class Seeming(list):
            def state_dict(self) -> None:
                raise NotImplementedError("none at all")

        job, seen = Job(), []
        for x in job.controller.micro_batches(Seeming([torch.ones(2, 4), torch.ones(3, 4)])):
            job.controller.backward(squared(job.model, x), weight=len(x))
            seen.append(len(x))
            if not job.controller.step_due:
                with pytest.raises(NotImplementedError, match="none at all"):
                    job.controller.loader_state_dict()
        assert seen == [2, 3]

    def test_a_loader_without_a_state_is_refused(self):
        job = Job()
        for _ in job.controller.micro_batches([]):
            pass
        with pytest.raises(
            RuntimeError, match=r"loader_state_dict\(\) needs .* of a loader with state_dict\(\), got list"
        ):
            job.controller.loader_state_dict()


def trained(windows: int, micro_batches: int, late: bool = False, **options: Any) -> ab.BatchController:
    """A controller after so many windows and micro-batches of the next; ``late`` as on a GPU."""
    model = small_model(dtype=torch.float32)
    controller = ab.BatchController(model, torch.optim.Adam(model.parameters(), betas=(0.9, 0.5)), **options)
    controller._read_late = late
    hear(controller, windows)
    for x in torch.randn(micro_batches, 4, 4, generator=torch.Generator().manual_seed(1)):
        controller.backward(squared(model, x), weight=len(x))
    return controller


def hear(controller: ab.BatchController, windows: int) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(windows):
        while not controller.step_due:
            x = torch.randn(4, 4, generator=generator)
            controller.backward(squared(controller.model, x), weight=len(x))
        controller.step()


STATES: dict[str, dict[str, Any]] = {
    "fresh": {"windows": 0, "micro_batches": 0},
    "between windows": {
        "windows": 20,
        "micro_batches": 0,
        "rule": ab.rules.Replay([2] * 8 + [3] * 12),
        "consecutive": True,
    },
    "within a window": {"windows": 12, "micro_batches": 2, "rule": ab.Fixed(3), "consecutive": True, "metric": "adam"},
    "with kept gradients": {"windows": 3, "micro_batches": 1, "rule": ab.rules.InnerProductTest()},
    "with a scaler": {"windows": 3, "micro_batches": 1, "scaler": torch.amp.GradScaler("cpu", init_scale=4.0)},
    "with a late window": {"windows": 12, "micro_batches": 1, "late": True},
}
HOSTILE: list[Any] = [
    *(None, True, "2", 3, -1, 0, 2.5, -1.5, math.nan, math.inf, 10**400),
    *([], [1], ["weighted"], {}, {"x": 1}, object(), 2 + 1j),
    *(torch.ones((), dtype=torch.int64), torch.ones(7), torch.ones((), dtype=torch.complex64)),
    *(torch.ones((), device="meta"), torch.tensor([])),
]
Place = tuple[str | int, ...]


def places(state: Any, at: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value in ``state`` and where it stands, containers included."""
    yield at, state
    if isinstance(state, dict | list):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from places(value, (*at, key))


def changed(state: Any, at: Place, value: Any) -> Any:
    """``state`` with another value there; the rest is shared."""
    if not at:
        return value
    other = copy.copy(state)
    other[at[0]] = changed(state[at[0]], at[1:], value)
    return other


def named(at: Place) -> str:
    return "state" + "".join(f"[{key!r}]" for key in at)


def alike(value: Any, original: Any) -> bool:
    """Whether one may stand for the other: numbers for numbers, a tensor or None for a tensor or None."""
    kinds: list[Any] = [(int, float), torch.Tensor, str, list, type(None)]
    if isinstance(value, bool) or isinstance(original, bool):
        return type(value) is type(original)
    same = any(isinstance(value, kind) and isinstance(original, kind) for kind in kinds)
    return same or (value is None) != (original is None)


def text(controller: ab.BatchController) -> str:
    return repr(controller.state_dict() | {"wall_seconds": 0.0})


class TestDistributedCheckpoint:
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_the_controller_is_stateful(self, tmp_path):
        """torch.distributed.checkpoint takes any object with state_dict and load_state_dict; between windows here."""
        import torch.distributed.checkpoint as dcp

        torch.manual_seed(0)
        models = [small_model(seed, dtype=torch.float32) for seed in (0, 1)]
        first, second = (
            ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=0.05), rule=LastDigits())
            for model in models
        )
        data = torch.randn(200, 5, 4)

        def go_on(controller: ab.BatchController, items: torch.Tensor) -> None:
            for x in items:
                controller.backward(squared(controller.model, x), weight=len(x))
                if controller.step_due:
                    controller.step()

        stop = 0
        while stop < 100 or first._window.micro_batches:
            go_on(first, data[stop : stop + 1])
            stop += 1
        done = len(first.history)
        dcp.save({"model": models[0].state_dict(), "controller": first}, checkpoint_id=tmp_path / "dcp")
        state = {"model": models[1].state_dict(), "controller": second}
        dcp.load(state, checkpoint_id=tmp_path / "dcp")
        models[1].load_state_dict(state["model"])
        go_on(first, data[stop:])
        go_on(second, data[stop:])
        assert equal_state(*models)
        expected = first.history.to_pandas().iloc[done:].drop(columns="wall_seconds").reset_index(drop=True)
        pd.testing.assert_frame_equal(
            second.history.to_pandas().drop(columns="wall_seconds"), expected, check_exact=True
        )

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize(
        ("name", "missing"),
        [
            ("between windows", "sensor.previous"),
            ("within a window", "window"),
            ("with kept gradients", "window"),
            ("with a late window", "late_window"),
        ],
    )
    def test_a_state_with_more_in_it_than_a_fresh_one_is_read_whole(self, tmp_path, name, missing):
        """In place it is refused by torch, which loads what both states hold; the documented way goes on to the bit."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        options = {key: value for key, value in STATES[name].items() if key not in ("windows", "micro_batches")}
        first, second = trained(**STATES[name]), trained(0, 0, **options)
        model, optimizer = get_state_dict(first.model, first.optimizer)
        parts = {"model": model, "optimizer": optimizer, "controller": first}
        dcp.save(parts, checkpoint_id=tmp_path / "dcp")
        before = text(second)
        with pytest.raises(
            dcp.CheckpointException, match=rf"Missing key in checkpoint state_dict: controller\.{missing}\."
        ):
            dcp.load({"controller": second}, checkpoint_id=tmp_path / "dcp")
        assert text(second) == before
        dcp_to_torch_save(tmp_path / "dcp", tmp_path / "whole.pt")
        whole = torch.load(tmp_path / "whole.pt")
        set_state_dict(
            second.model,
            second.optimizer,
            model_state_dict=whole["model"],
            optim_state_dict=whole["optimizer"],
        )
        second.load_state_dict(whole["controller"])
        assert text(second) == text(first)
        done = len(first.history)
        for controller in (first, second):
            hear(controller, 5)
        assert equal_state(first.model, second.model)
        expected = first.history.to_pandas().iloc[done:].drop(columns="wall_seconds").reset_index(drop=True)
        pd.testing.assert_frame_equal(
            second.history.to_pandas().drop(columns="wall_seconds"), expected, check_exact=True
        )


def slow_job(folder: str) -> None:
    """Trains with a checkpoint after every micro-batch, moved into its place; goes on from the last one."""
    torch.set_num_threads(1)
    path, job = Path(folder) / "checkpoint.pt", Job()
    if path.exists():
        job.load(torch.load(path))

    def save(job: Job) -> None:
        torch.save(job.state(), path.with_suffix(".unfinished"))
        os.replace(path.with_suffix(".unfinished"), path)
        time.sleep(0.02)

    job.run(save)
    torch.save(job.state(), Path(folder) / "done.pt")


class TestHostileStates:
    @pytest.mark.parametrize("name", STATES)
    def test_any_other_value_is_refused_by_its_place_or_trains(self, name):
        """Every value of a real state is replaced by hostile ones: nothing fails later, or after half a load.

        What all states have meets each of them in two of the six.
        """
        state = trained(**STATES[name]).state_dict()
        options = {key: value for key, value in STATES[name].items() if key not in ("windows", "micro_batches")}
        controller = trained(5, 0, **options)
        own, before, refused, loaded = controller.state_dict(), text(controller), 0, 0
        third = list(STATES).index(name) % 3
        for at, original in places(state):
            for value in HOSTILE[third::3] if at[:1] == ("loop",) else HOSTILE:
                try:
                    controller.load_state_dict(changed(state, at, value))
                except ValueError as error:
                    refused += 1
                    message = str(error)
                    assert any(message.startswith(f"{named(at[:depth])} must ") for depth in range(len(at) + 1)) or (
                        named(at) in message
                    ), (at, value, message)
                    continue
                loaded += 1
                assert alike(value, original), (at, value)
                if controller.accumulation_steps < 1000:
                    hear(controller, 1)
                controller.explain()
                controller.discard_window()
                controller.load_state_dict(own)
            assert text(controller) == before
        assert refused > 4 * loaded > 0

    @pytest.mark.parametrize("name", STATES)
    def test_an_unknown_and_a_missing_key_are_refused_at_any_depth(self, name):
        state = trained(**STATES[name]).state_dict()
        controller = trained(
            5, 0, **{key: value for key, value in STATES[name].items() if key in ("rule", "consecutive")}
        )
        before = text(controller)
        for at, original in places(state):
            if isinstance(original, dict):
                first = next(key for key in original if key != "version")
                for other in (original | {7: 1.0}, {key: one for key, one in original.items() if key != first}):
                    with pytest.raises(ValueError, match=rf"^{re.escape(named(at))} must have exactly the known keys"):
                        controller.load_state_dict(changed(state, at, other))
        assert text(controller) == before

    def test_a_file_that_was_cut_short_fails_in_torch_load(self):
        whole = io.BytesIO()
        torch.save(trained(**STATES["within a window"]).state_dict(), whole)
        size = len(whole.getvalue())
        for length in range(0, size, size // 40):
            with pytest.raises((RuntimeError, ValueError, EOFError, pickle.PickleError)):
                torch.load(io.BytesIO(whole.getvalue()[:length]))


class TestKill:
    def test_a_killed_training_goes_on_to_the_last_bit(self, tmp_path):
        """kill -9 at random moments, also while a checkpoint is written."""
        moments, kills = random.Random(0), 0
        for _ in range(20):
            before = _written(tmp_path)
            process = start(slow_job, str(tmp_path))
            # Some progress each time, then any moment.
            while process.is_alive() and before == _written(tmp_path):
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, 0.3))
            if kills < 3 and process.is_alive():
                process.kill()
                kills += 1
            process.join()
            if process.exitcode == 0:
                break
        whole, state = finished(), torch.load(tmp_path / "done.pt")
        assert kills == 3
        other = small_model(1, dtype=torch.float32)
        other.load_state_dict(state["model"])
        assert equal_state(other, whole.model)
        assert state["micro_batches"] == whole.micro_batches


def _written(folder: Path) -> int:
    path = folder / "checkpoint.pt"
    return path.stat().st_mtime_ns if path.exists() else 0
