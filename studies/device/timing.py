"""The time of a window against the hand-written accumulation loop, eager and compiled, in three precisions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import adaptbatch as ab
from studies.device.cases import Case, Window, adam, cases, controlled, hand_written, steady
from studies.device.harness import Report
from studies.device.machine import Stopwatch

PLAIN = "hand-written loop"
ROUNDS = (5, 200)


def run(report: Report, device: str, tiny: bool) -> None:
    """Eager: every network in every precision."""
    todo = [(case, precision) for precision in ("bf16", "fp16", "float32") for case in cases(tiny).values()]
    for turn, (case, precision) in enumerate(todo):
        ends = time.time() + report.left / (len(todo) - turn)
        check = partial(_case, report, case, device, precision, tiny, ends)
        report.attempt(check, network=case.name, precision=precision, compiled="no")


def run_compiled(report: Report, device: str, tiny: bool) -> None:
    """Compiled; the networks whose compilation is quick first, and none that would not be done in time."""
    backend = "aot_eager" if tiny else "inductor"
    # How long a compilation takes, beside the others.
    known, longest, sizes = cases(tiny), 0.0, {"wide MLP": 0.5, "transformer": 1.0, "autoencoder": 2.0}
    for precision in ("bf16", "fp16", "float32"):
        for name, size in sizes.items():
            if report.left < longest * size:
                report.note(f"no time was left for {name}, {precision}")
                continue
            began = time.time()
            # A compiled graph of another case neither serves here nor counts against the limit of graphs.
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            check = partial(_case, report, known[name], device, precision, tiny, began + report.left / 6, backend)
            report.attempt(check, network=name, precision=precision, compiled=backend)
            longest = max(longest, (time.time() - began) / size)


def _case(
    report: Report, case: Case, device: str, precision: str, tiny: bool, ends: float, backend: str | None = None
) -> None:
    """The rows of one network in one precision.

    Args:
        report: Takes them.
        case: The network.
        device: Where.
        precision: Of its forward pass.
        tiny: Whether windows are small.
        ends: When to measure no more [s since the epoch]; each contender has five rounds whatever this says.
        backend: Of ``torch.compile``; None: eager.
    """
    steps, windows = (2, 2) if tiny else (8, 3)
    batches = case.batches(device, [case.micro_batch] * steps)
    made: dict[str, Window] = {}
    for name, make in _contenders(case, device, precision, steps, backend).items():
        try:
            made[name] = make()
            for _ in range(3):
                made[name](batches)
        except Exception as error:
            if backend is None or name != PLAIN:
                raise
            # A machine without a compiler says nothing of the controller.
            why = str(error).splitlines()[0]
            report.note(f"{case.name}, {precision}: the hand-written loop does not compile here: {why}")
            return
    graphs = math.nan if backend is None else torch._dynamo.utils.counters["stats"]["unique_graphs"]
    seconds = _rounds(made, batches, device, windows, ends, ROUNDS if not tiny else (5, 10))
    base = np.array(seconds[PLAIN])
    for name, own in seconds.items():
        ratio, low, high = median_interval(np.array(own) / base)
        report.row(
            all(map(math.isfinite, (ratio, low, high))),
            network=case.name,
            precision=precision,
            compiled=backend or "no",
            contender=name,
            micro_batches=steps,
            rounds=len(base),
            window_ms=1e3 * float(np.median(own)),
            ratio=ratio,
            ratio_low=low,
            ratio_high=high,
            graphs=graphs,
        )


def _contenders(
    case: Case, device: str, precision: str, steps: int, backend: str | None
) -> dict[str, Callable[[], Window]]:
    """By name; a GradScaler's steps are skipped, so that it leaves nothing to be read late."""

    def trained() -> tuple[nn.Module, Any, torch.optim.Optimizer, Any]:
        model = case.network(device)
        called = model if backend is None else torch.compile(model, backend=backend)
        scaler = torch.amp.GradScaler(device) if precision == "fp16" else None
        return model, called, adam(model, 1e-5), scaler

    def plain() -> Window:
        _, called, optimizer, scaler = trained()
        return hand_written(called, optimizer, device, precision, scaler)

    def ours(skip: bool) -> Window:
        model, called, optimizer, scaler = trained()
        controller = ab.BatchController(model, optimizer, scaler=scaler, skip_nonfinite=skip, **steady(steps))
        return controlled(controller, called, device, precision)

    found: dict[str, Callable[[], Window]] = {PLAIN: plain}
    if precision != "fp16":
        found["adaptbatch, read late" if device == "cuda" else "adaptbatch, no skipping"] = lambda: ours(False)
    return found | {"adaptbatch, read before the step": lambda: ours(True)}


def _rounds(
    made: dict[str, Window], batches: list[Tensor], device: str, windows: int, ends: float, bounds: tuple[int, int]
) -> dict[str, list[float]]:
    """Seconds of a window of each contender, one of each a round; the order rotates."""
    names, watch = list(made), Stopwatch(device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(bounds[1]):
        if turn >= bounds[0] and time.time() > ends:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with watch:
                # Several: what is read late is read within the next.
                for _ in range(windows):
                    made[name](batches)
            seconds[name].append(watch.seconds / windows)
    return seconds


def median_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Median with its 95 % bootstrap interval.

    Example:
        >>> median_interval(np.full(9, 2.0))
        (2.0, 2.0, 2.0)
    """
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(np.median(values[draws], axis=1), [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)
