"""Sections in a process of their own, bounded in time; their rows and texts on disk. Without torch: a quick start."""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

# In the order in which they run, with their share of the time.
SHARES = {"sync": 0.08, "time": 0.20, "exact": 0.10, "ghost": 0.05, "bias": 0.08, "compiled": 0.28, "table": 1.0}
# Until a process is up, with its imports from a cold disk and its first CUDA context.
START_S = 90.0
# Beyond its share, before a section counts as hanging: a compiler may be under way.
GRACE_S = 45.0
SHORTEST_S = 3.0
# After the end of all: what a section that took its whole time may still take.
LATE_S = 20.0
STAMP = ("device", "torch", "adaptbatch")


@dataclass(frozen=True)
class Options:
    """What is asked for on the command line.

    Attributes:
        folder: Of the results.
        sections: Keys of :data:`SHARES`.
        seconds: For all of them.
        device: ``"cuda"`` or ``"cpu"``; None: a GPU if there is one.
        tiny: Tiny sizes, for a trial of the check itself.
    """

    folder: Path
    sections: tuple[str, ...]
    seconds: float
    device: str | None = None
    tiny: bool = False


class Report:
    """One section's rows and remarks, on disk as soon as they are known.

    Args:
        name: Of the section.
        folder: Of the results.
        stamp: What every row ends with: device and versions.
        ends: When the section is to be done [s since the epoch].
    """

    def __init__(self, name: str, folder: Path, stamp: dict[str, str], ends: float = math.inf) -> None:
        self.name, self.folder, self.ends = name, folder, ends
        self._stamp = stamp
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def row(self, ok: bool, **values: Any) -> None:
        """Add a row; write and print it."""
        self.rows.append({**values, "ok": bool(ok), **self._stamp})
        shown = ", ".join(f"{name} {_text(value)}" for name, value in values.items())
        print(f"  {self.name}: {'ok' if ok else 'FAILED'}: {shown}", flush=True)
        write(self.folder / f"{self.name}.csv", pd.DataFrame(self.rows).to_csv(index=False))

    def attempt(self, check: Callable[[], object], /, **values: Any) -> None:
        """Run a check; one that raises leaves a row of ``values`` with its error, and the next one runs."""
        try:
            check()
        except Exception as error:
            self.note(traceback.format_exc())
            self.row(False, **values, error=f"{type(error).__name__}: {error}".splitlines()[0])

    def note(self, text: str) -> None:
        """Add a remark to the text; print it."""
        self.notes.append(text)
        print(f"  {self.name}: {text}", flush=True)

    @property
    def left(self) -> float:
        """Seconds until the section is to be done."""
        return self.ends - time.time()

    @property
    def ok(self) -> bool:
        """Whether no row failed."""
        return all(row["ok"] for row in self.rows)

    def finish(self) -> None:
        """Write the text."""
        table = pd.DataFrame(self.rows).drop(columns=list(STAMP), errors="ignore")
        parts = [", ".join(f"{name} {value}" for name, value in self._stamp.items()), *self.notes]
        parts += [table.to_string(index=False, float_format=lambda x: f"{x:.4g}")] if len(table) else []
        write(self.folder / f"{self.name}.txt", "\n\n".join(parts) + "\n")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(path: Path, text: str) -> None:
    """Write beside its place, then move it there."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


# --- the process that runs the sections ---------------------------------------------------------------------------


def work(options: Options, names: tuple[str, ...], ends: float, pipe: Any) -> None:
    """Run the sections ``names``, and tell through ``pipe`` when each begins and ends.

    Args:
        options: Of the run.
        names: What is left to do.
        ends: When all is to be done [s since the epoch].
        pipe: Takes ``(name, seconds, stamp)`` before a section, ``(name, ok, note)`` after it.
    """
    # Whatever is started here ends with it.
    os.setsid()
    from studies.device import machine

    device = machine.prepare(options.device)
    stamp = machine.stamp(device)
    for name in names:
        left = ends - time.time()
        seconds = min(SHARES[name] * options.seconds, left - SHORTEST_S)
        if seconds < SHORTEST_S:
            seconds = 0.0
        pipe.send((name, max(seconds, 0.0), stamp))
        report = Report(name, options.folder, stamp, time.time() + seconds)
        failure = "no time was left" if seconds == 0.0 else _run(report, device, options.tiny)
        report.finish()
        pipe.send((name, not failure and report.ok, failure or "; ".join(report.notes)))
        if not machine.healthy(device):
            # No kernel runs in this process any more, and to end it in good order may take for ever.
            os._exit(1)


def _run(report: Report, device: str, tiny: bool) -> str:
    """Why the section failed, if it did by an error; rows that failed speak for themselves."""
    module = {"compiled": "timing", "time": "timing"}.get(report.name, report.name)
    try:
        section = importlib.import_module(f"studies.device.{module}")
        (section.run_compiled if report.name == "compiled" else section.run)(report, device, tiny)
    except Exception as error:
        report.note(traceback.format_exc())
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


# --- the process that waits for it --------------------------------------------------------------------------------


class Supervisor:
    """Runs all sections, the others after one that failed, and writes ``summary.csv`` and ``summary.txt``."""

    def __init__(self, options: Options, target: Callable[..., None] = work) -> None:
        self._options, self._target = options, target
        self._ends = time.time() + options.seconds
        self._todo = list(options.sections)
        self._stamp = dict.fromkeys(STAMP, "unknown")
        self._rows: list[dict[str, Any]] = []

    def run(self) -> int:
        """All sections; 0 if all is well, else 1."""
        context = multiprocessing.get_context("spawn")
        while self._todo:
            receive, send = context.Pipe(duplex=False)
            arguments = (self._options, tuple(self._todo), self._ends, send)
            worker = context.Process(target=self._target, args=arguments)
            worker.start()
            send.close()
            try:
                self._follow(worker, receive)
            finally:
                end_group(worker.pid)
                worker.join()
        return 0 if all(row["ok"] for row in self._rows) else 1

    def _follow(self, worker: Any, receive: Any) -> None:
        """Until the worker is done, dies, or hangs."""
        before, limit = len(self._todo), START_S
        began = time.time()
        current: str | None = None
        while self._todo:
            try:
                if not receive.poll(limit):
                    self._lost(current, f"hung for {limit:.0f} s", began)
                    return
                name, *message = receive.recv()
            except EOFError:
                worker.join()
                if current is not None or len(self._todo) == before:
                    self._lost(current, f"its process ended with exit status {worker.exitcode}", began)
                return
            if current is None:
                current, began = name, time.time()
                limit = max(min(message[0] + GRACE_S, self._ends + LATE_S - began), SHORTEST_S)
                self._stamp = message[1]
                print(f"{name}, at most {message[0]:.0f} s", flush=True)
            else:
                self._ended(name, *message, time.time() - began)
                current, limit = None, GRACE_S

    def _lost(self, name: str | None, why: str, began: float) -> None:
        name = name or self._todo[0]
        with (self._options.folder / f"{name}.txt").open("a") as file:
            file.write(f"{why}\n")
        self._ended(name, False, why, time.time() - began)

    def _ended(self, name: str, ok: bool, note: str, seconds: float) -> None:
        self._todo.remove(name)
        first = note.splitlines()[0] if note else ""
        print(f"{name}: {'ok' if ok else 'FAILED'} after {seconds:.1f} s {first}", flush=True)
        self._rows.append({"section": name, "ok": ok, "seconds": round(seconds, 1), "note": first, **self._stamp})
        table = pd.DataFrame(self._rows)
        write(self._options.folder / "summary.csv", table.to_csv(index=False))
        write(self._options.folder / "summary.txt", table.to_string(index=False) + "\n")


def end_group(pid: int | None) -> None:
    """End a process that leads a group, and all that it started."""
    if pid is not None:
        # Before it leads one, there is none.
        for end in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                end(pid, signal.SIGKILL)
