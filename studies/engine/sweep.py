"""Studies of many runs: planned from what is found, run anywhere, resumed from what is committed.

A study's plan is a function from what has been found to all runs that can be named by then; it is asked again until
nothing is missing. Studies share one store of runs: the same task, arm and seed is trained once, whoever asks. What is
committed of a run (its row and its curve) counts as found too, so that a fresh clone goes on where the last one ended.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import joblib
import pandas as pd
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from studies.engine import reduce
from studies.engine.results import RESULTS, load, read_table, write_atomically
from studies.engine.runner import RUNS, Run

SHARED = "shared"
# Of a study that takes hours, its rows can be read and kept while it runs.
SAVE_SECONDS = 300.0
TUNING_SEEDS = (1000, 1001, 1002)
Preset = Literal["smoke", "laptop", "paper"]
Cluster = Literal["none", "local", "slurm"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Options:
    """What a study is asked for.

    Attributes:
        preset: ``smoke`` finishes in a minute, ``laptop`` is what is committed, ``paper`` is for a GPU.
        seeds: Seeds of the reported runs; None: the preset's.
        data: Data sets; none: the study's.
    """

    preset: Preset = "laptop"
    seeds: int | None = None
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scale:
    """Sizes of a preset, for studies of autoencoders.

    Attributes:
        examples: Of a run.
        widths: Hidden and latent.
        layers: Of the network.
        seeds: Of the reported runs.
        tuning_seeds: Of the trials, which are never reported.
        home: The data set on which arms are tuned.
    """

    examples: int
    widths: tuple[int, int]
    layers: int
    seeds: int
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    home: str = "mnist"


@dataclass(frozen=True)
class Where:
    """Where runs are computed.

    Attributes:
        workers: Processes on this machine, one thread each.
        device: ``cpu``, ``cuda`` (all GPUs in turn) or one GPU.
        cluster: ``slurm``, or ``local`` to try its way here; ``none`` computes here.
        minutes: Time limit of a cluster job.
        partition: Of the cluster.
    """

    workers: int = 2
    device: str = "cpu"
    cluster: Cluster = "none"
    minutes: int = 240
    partition: str | None = None


@dataclass
class Found:
    """Finished runs by their key: rows of settings and outcomes, and curves.

    Args:
        store: Folder of the runs' own tables.
        committed: Folders of studies whose ``runs.parquet`` and ``curves.parquet`` count too.
    """

    store: Path
    committed: Sequence[Path] = ()
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, pd.DataFrame] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for folder in self.committed:
            if not (folder / "runs.parquet").is_file():
                continue
            for row in read_table(folder / "runs.parquet").to_dict("records"):
                self.rows.setdefault(str(row["key"]), reduce.of_the_run(row))
            for key, part in read_table(folder / "curves.parquet").groupby("key", sort=False):
                self.curves.setdefault(str(key), part.drop(columns="key").reset_index(drop=True))

    def __contains__(self, run: Run) -> bool:
        return run.key in self.rows or run.path(self.store).is_file()

    def __getitem__(self, run: Run) -> dict[str, Any]:
        """Row of a finished run; KeyError if it is not finished."""
        if run.key not in self.rows:
            if not run.path(self.store).is_file():
                raise KeyError(run.label)
            self._reduce(run)
        return self.rows[run.key]

    def get(self, run: Run) -> dict[str, Any] | None:
        """Row of a run, None if it is not finished."""
        return self[run] if run in self else None  # noqa: SIM401

    def _reduce(self, run: Run) -> None:
        table = read_table(run.path(self.store))
        attrs = table.attrs
        row = {"key": run.key, "seed": run.seed, **reduce.settings(attrs["identity"])}
        row |= reduce.outcome(table, run.task.examples, run.task.collapsed_loss())
        row |= attrs["test"] | {f"on_{name}": value for name, value in attrs["provenance"].items()}
        row |= {f"schedule_{name}": value for name, value in reduce.schedule(table).items()}
        self.rows[run.key], self.curves[run.key] = row, reduce.curve(table)


Plan = Callable[[Options, Found], list[Run]]


@dataclass(frozen=True)
class Study:
    """A study of many runs.

    Attributes:
        name: On the command line, and of its folder.
        about: One line.
        plan: All runs that can be named from what is found.
        tables: From the folder of its results to the tables that it reports.
        measure: Measures what is no training run, on so many processes, and writes it into the folder.
        figures: Draws from the folder into it.
        order: Its place among the studies; those without one come last, by name.
    """

    name: str
    about: str
    plan: Plan
    tables: Callable[[Path], dict[str, pd.DataFrame]]
    measure: Callable[[Options, int, Path], None] = lambda options, workers, folder: None
    figures: Callable[[Path], None] = lambda folder: None
    order: float = math.inf

    def folder(self, options: Options, out: Path | None = None) -> Path:
        """Where its tables go: the committed place only if asked for."""
        return (out or RUNS / options.preset) / self.name


def from_runs(
    tables: Callable[[pd.DataFrame, pd.DataFrame], dict[str, pd.DataFrame]],
) -> Callable[[Path], dict[str, pd.DataFrame]]:
    """``tables`` of the rows and curves in a folder."""

    def read(folder: Path) -> dict[str, pd.DataFrame]:
        name, parent = folder.name, folder.parent
        return tables(load(name, folder=parent), load(name, curves=True, folder=parent))

    return read


def committed() -> list[Path]:
    """The folders of committed results."""
    return sorted(path.parent for path in RESULTS.glob("*/runs.parquet"))


def carry_out(
    study: Study, options: Options, where: Where, out: Path | None = None, store: Path = RUNS / "store"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run what is missing, stage by stage, and write the study's rows and curves after each.

    Returns:
        :func:`collect`'s.
    """
    found, folder = Found(store, committed()), study.folder(options, out)
    while waiting := [run for run in study.plan(options, found) if run not in found]:
        execute(waiting, store, where, title=study.name, save=lambda: write(*collect(study, options, found), folder))
        missing = [run.label for run in waiting if run not in found]
        write(*collect(study, options, found), folder)
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(waiting)} runs of {study.name} are not finished ({missing[0]}, ...): another "
                f"process is at them, or failed; start the study again when it is done."
            )
    runs, curves = collect(study, options, found)
    write(runs, curves, folder)
    study.measure(options, where.workers, folder)
    return runs, curves


def collect(study: Study, options: Options, found: Found) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row for each finished run of a study, with its labels, and the curves of all, told apart by ``key``."""
    rows, curves, seen = [], [], set()
    for run in study.plan(options, found):
        if run not in found:
            continue
        labels = {"study": study.name, "preset": options.preset, "arm": run.arm.name, **dict(run.labels)}
        rows.append(labels | {name: value for name, value in found[run].items() if name not in labels})
        # A run that broke off before its first evaluation has no curve.
        if run.key not in seen and run.key in found.curves:
            curves.append(found.curves[run.key].assign(key=run.key))
        seen.add(run.key)
    if not rows:
        return pd.DataFrame(), pd.DataFrame()
    return pd.DataFrame(rows), pd.concat(curves, ignore_index=True)


def write(runs: pd.DataFrame, curves: pd.DataFrame, folder: Path) -> None:
    """Store a study's rows and curves, each file whole or not at all."""
    if len(runs):
        write_atomically(runs, folder / "runs.parquet")
        write_atomically(curves, folder / "curves.parquet")


def execute(
    runs: Sequence[Run], store: Path, where: Where, title: str = "", save: Callable[[], None] = lambda: None
) -> None:
    """Compute runs here or on a cluster; each is stored when it is done, and ``save`` called now and then."""
    saved = time.monotonic()
    devices = _devices(where.device, len(runs))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(title, total=len(runs))
        for _ in (
            _submitted(runs, devices, store, where) if where.cluster != "none" else _joblib(runs, devices, store, where)
        ):
            bar.advance(task)
            if time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()


def _joblib(runs: Sequence[Run], devices: Sequence[str], store: Path, where: Where) -> Iterator[Any]:
    with joblib.parallel_config("loky", inner_max_num_threads=1):
        parallel = joblib.Parallel(n_jobs=where.workers, return_as="generator_unordered")
        yield from parallel(
            joblib.delayed(run.execute)(store, None, device) for run, device in zip(runs, devices, strict=True)
        )


def _submitted(runs: Sequence[Run], devices: Sequence[str], store: Path, where: Where) -> Iterator[Any]:
    """One job of an array for each run."""
    import submitit

    executor = submitit.AutoExecutor(folder=store / "jobs" / "%j", cluster=where.cluster)
    options = {"slurm_partition": where.partition} if where.partition else {}
    executor.update_parameters(
        timeout_min=where.minutes, cpus_per_task=1, gpus_per_node=int(where.device != "cpu"), **options
    )
    if where.cluster == "slurm":
        executor.update_parameters(slurm_array_parallelism=where.workers)
        # A job sees its own GPU only.
        devices = ["cpu" if where.device == "cpu" else "cuda"] * len(runs)
    jobs = executor.map_array(_run_job, runs, [store] * len(runs), devices)
    # It looks at the jobs' files; what it asks of the cluster it keeps for a minute.
    for job in submitit.helpers.as_completed(jobs, poll_frequency=1.0):
        yield job.result()


def _run_job(run: Run, store: Path, device: str) -> bool:
    return run.execute(store, None, device)


def _devices(device: str, count: int) -> list[str]:
    """A device for each run: with ``cuda`` the GPUs of this machine in turn."""
    if device != "cuda":
        return [device] * count
    import torch

    present = torch.cuda.device_count()
    if present == 0:
        raise ValueError("device must be 'cpu' on a machine without a GPU, got device = 'cuda'.")
    return [f"cuda:{index % present}" for index in range(count)]
