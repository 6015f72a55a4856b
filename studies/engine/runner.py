"""Runs the arms of a study: in parallel, one thread each, with live progress; finished runs are never run again."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from multiprocessing import parent_process
from multiprocessing.managers import SyncManager
from pathlib import Path
from queue import Queue
from typing import Any

import joblib
import pandas as pd
from filelock import FileLock, Timeout
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from studies import data
from studies.engine import ranks
from studies.engine.arms import Arm
from studies.engine.results import as_json, read_table, write_atomically
from studies.engine.schema import SCHEMA_VERSION, conform
from studies.engine.training import Trainable, train

RUNS = Path(__file__).parents[1] / "runs"


# The first release that estimates and decides as this one does. A change that can alter an estimate or a decision
# raises it, and closed-loop runs are trained anew.
CLOSED_LOOP = "0.1.0.dev4"


@dataclass(frozen=True)
class Run:
    """One arm on one seed; its :meth:`identity` decides whether a stored result is this run's.

    Attributes:
        study: Whose; runs of studies that share them have one name.
        task, arm, seed: What is trained.
        labels: What the run is in its study (its part of a comparison, the number of its trial); not its identity.
    """

    study: str
    task: Trainable
    arm: Arm
    seed: int
    labels: tuple[tuple[str, str | int | float], ...] = field(default=(), compare=False)

    @property
    def label(self) -> str:
        """Arm and seed, for the progress bars."""
        return f"{self.arm.name}, seed {self.seed}"

    def identity(self) -> dict[str, Any]:
        """What must be equal for a stored result to be taken as this run's: all that decides its numbers.

        An open-loop run is the plain accumulation loop to the bit in every release; a closed-loop one is of
        :data:`CLOSED_LOOP`.
        """
        identity = {
            "schema": SCHEMA_VERSION,
            "study": self.study,
            "seed": self.seed,
            "task": {item.name: repr(getattr(self.task, item.name)) for item in fields(self.task)},  # type: ignore[arg-type]
            # Neither a name nor new ways in which arms may differ make old runs others.
            "arm": {
                item.name: _short(repr(getattr(self.arm, item.name)))
                for item in fields(self.arm)
                if item.name != "name" and getattr(self.arm, item.name) != item.default
            },
            "data_sha256": data.SOURCES[self.task.data].sha256,
        }
        if self.arm.rule.closed_loop:
            identity["adaptbatch"] = CLOSED_LOOP
        if ranks.world_size() > 1:
            identity["world_size"] = ranks.world_size()
        return identity

    @functools.cached_property
    def key(self) -> str:
        """The identity in twelve letters."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:12]

    def path(self, folder: Path) -> Path:
        """Where its table is kept."""
        return folder / "runs" / f"{self.key}.parquet"

    def stored(self, folder: Path) -> pd.DataFrame | None:
        """Its finished table, from its own file or from the study's; None if there is none of this configuration.

        Raises:
            ResultsError: If the file is there and cannot be read.
        """
        identity = as_json(self.identity())
        if (path := self.path(folder)).is_file():
            return self._named(read_table(path))
        if not (path := folder / "results.parquet").is_file():
            return None
        results = read_table(path)
        for attrs in results.attrs.get("runs", ()):
            if attrs.get("identity") == identity:
                rows = results[(results["arm"] == attrs["arm"]) & (results["seed"] == self.seed)]
                table = rows.reset_index(drop=True)
                table.attrs = attrs
                return self._named(table)
        return None

    def _named(self, table: pd.DataFrame) -> pd.DataFrame:
        """A table under this run's name, whatever it was called when it was trained."""
        attrs = table.attrs | {"arm": self.arm.name}
        table = table.assign(arm=self.arm.name)
        table.attrs = attrs
        return table

    def execute(self, folder: Path, progress: Queue[tuple[str, float]] | None = None, device: str = "cpu") -> bool:
        """Train and store, in one atomic move: a table exists whole or not at all.

        Where several machines share ``folder``, a run is taken by one of them: the lock that says so is the kernel's,
        and ends with its process.

        Args:
            folder: Of the study.
            progress: Told the examples seen.
            device: Where to train.

        Returns:
            Whether the run is stored now; False if another process is at it.
        """
        import torch

        torch.set_num_threads(1)
        path = self.path(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        report = (lambda seen: progress.put((self.label, seen))) if progress is not None else (lambda seen: None)
        try:
            # All ranks of a run train it together.
            with nullcontext() if ranks.world_size() > 1 else FileLock(path.with_suffix(".lock"), timeout=0):
                if path.is_file():
                    return True
                table = train(self.task, self.arm, self.seed, study=self.study, device=device, report=report)
                if ranks.rank() == 0:
                    table.attrs |= {"arm": self.arm.name, "identity": self.identity(), "provenance": provenance(device)}
                    write_atomically(table, path)
        except Timeout:
            return False
        return True


def _short(text: str) -> str:
    """A long sequence by its hash."""
    return text if len(text) < 400 else f"{text[:60]}... sha256 {hashlib.sha256(text.encode()).hexdigest()}"


def provenance(device: str = "cpu") -> dict[str, str]:
    """Which code on what machine."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy", "pandas")}
    machine = platform.machine()
    if device.startswith("cuda"):
        import torch

        machine = torch.cuda.get_device_name(device)
    return versions | {"commit": commit, "python": platform.python_version(), "machine": machine}


def run_all(runs: Sequence[Run], folder: Path, workers: int) -> pd.DataFrame:
    """Run what is not stored yet and return (and store) the table of all.

    Args:
        runs: Runs of one study.
        folder: Where ``results.parquet`` and the runs' own tables go.
        workers: Processes; each computes with one thread.
    """
    waiting = ranks.agreed([run for run in runs if run.stored(folder) is None])
    if ranks.world_size() > 1:
        return _run_together(runs, waiting, folder)
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("examples"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    manager = SyncManager()
    manager.start(_end_with_parent)
    with manager, Progress(*columns) as bars:
        names = {}
        for run in runs:
            done = 0 if run in waiting else run.task.examples
            note = "" if run in waiting else " (stored)"
            names[run.label] = bars.add_task(run.label + note, total=run.task.examples, completed=done)
        queue: Queue[tuple[str, float]] = manager.Queue()
        listener = threading.Thread(target=_show, args=(queue, bars, names))
        listener.start()
        try:
            with joblib.parallel_config("loky", inner_max_num_threads=1):
                joblib.Parallel(n_jobs=workers)(joblib.delayed(run.execute)(folder, queue) for run in waiting)
        finally:
            queue.put(("", -1.0))
            listener.join()
    return _collect(runs, folder)


def _run_together(runs: Sequence[Run], waiting: Sequence[Run], folder: Path) -> pd.DataFrame:
    """One run after the other, each by all ranks; rank 0 stores, and tells the others when all is stored."""
    for run in waiting:
        if ranks.rank() == 0:
            print(f"{run.label}, on {ranks.world_size()} ranks")
        run.execute(folder)
    return ranks.agreed(_collect(runs, folder) if ranks.rank() == 0 else pd.DataFrame())


def _collect(runs: Sequence[Run], folder: Path) -> pd.DataFrame:
    tables = [run.stored(folder) for run in runs]
    if any(table is None for table in tables):
        raise RuntimeError(f"a run in {folder} was overwritten by another study; give each its own folder.")
    results = conform(pd.concat(tables, ignore_index=True))
    results.attrs = {"runs": [table.attrs for table in tables if table is not None]}
    write_atomically(results, folder / "results.parquet")
    return results


def _end_with_parent() -> None:
    """In the manager's process: a killed study must not leave it behind."""

    def wait() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _show(queue: Queue[tuple[str, float]], bars: Progress, names: dict[str, Any]) -> None:
    while (message := queue.get())[1] >= 0.0:
        bars.update(names[message[0]], completed=message[1])
