"""Where the host waits for the device: nowhere within a window, and once before the step if steps may be skipped.

``torch.cuda.set_sync_debug_mode("error")`` raises at what copies and waits, ``.item()`` and its kin. It does not see
events that are waited for, which is how the controller reads: so those reads are counted too, and one more proof is
that the host runs ahead of a device that is kept busy.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import adaptbatch as ab
from adaptbatch.measure.result import HostCopy
from studies.device.cases import Case, adam, autocast, cases, hand_written, steady
from studies.device.harness import Report

STEPS, WINDOWS, WARM_UP = 4, 4, 12
STALL_S = 0.4


@dataclass(frozen=True)
class Setting:
    """Options of the controller and its surroundings.

    Attributes:
        options: Of the controller.
        networks: On which it is tried.
        precision: Of the forward pass; ``"fp16"`` brings a GradScaler.
        clips: Whether the loop clips the due window.
        lr: Makes a learning rate for a device.
        reads_first: Whether it reads before each step whatever ``skip_nonfinite`` says.
    """

    options: dict[str, Any] = field(default_factory=dict)
    networks: tuple[str, ...] = ("transformer",)
    precision: str = "float32"
    clips: bool = False
    lr: Callable[[str], Any] = lambda device: 1e-4
    reads_first: bool = False


SETTINGS = {
    "usual": Setting(networks=("transformer", "autoencoder", "wide MLP")),
    "bf16": Setting(precision="bf16"),
    "fp16, scaler": Setting(precision="fp16", reads_first=True),
    "clipping": Setting(clips=True),
    "Adam's metric": Setting({"metric": "adam"}),
    "consecutive": Setting({"consecutive": True}),
    "ghost norms": Setting({"ghost": True}, networks=("transformer", "wide MLP")),
    "guard": Setting({"guard": ab.Guard()}, reads_first=True),
    "kept gradients": Setting({"rule": ab.rules.InnerProductTest()}),
    "coupled rate": Setting({"learning_rate": ab.LearningRate("linear")}),
    "rate on the device": Setting(lr=lambda device: torch.tensor(1e-4, device=device)),
    "rate on the host": Setting(lr=lambda device: torch.tensor(1e-4)),
}


@dataclass
class Reads:
    """Notes each time that the controller asks a copy for its numbers: in which part of the loop, and of which window.

    Attributes:
        phase: Part of the loop now.
        window: Number of the window now.
        found: ``(phase, windows ago, whether the device was still busy with it)``.
    """

    phase: str = "forward"
    window: int = 0
    found: list[tuple[str, int, bool]] = field(default_factory=list)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside."""
        made, read, begin = {}, HostCopy.read, HostCopy.__init__

        def noted_init(copy: HostCopy, scalars: Tensor) -> None:
            begin(copy, scalars)
            made[id(copy)] = (copy, self.window)

        def noted_read(copy: HostCopy) -> list[float]:
            if copy._values is None and id(copy) in made:
                busy = copy._event is not None and not copy._event.query()
                self.found.append((self.phase, self.window - made[id(copy)][1], busy))
            return read(copy)

        HostCopy.__init__, HostCopy.read = noted_init, noted_read  # type: ignore[method-assign]
        try:
            yield
        finally:
            HostCopy.__init__, HostCopy.read = begin, read  # type: ignore[method-assign]


@dataclass
class Loop:
    """A controller's loop that says which part of it runs."""

    controller: ab.BatchController
    model: nn.Module
    device: str
    setting: Setting
    reads: Reads = field(default_factory=Reads)

    def run(self, batches: Sequence[Tensor]) -> None:
        """As many windows as the micro-batches make."""
        controller, reads = self.controller, self.reads
        for x in controller.micro_batches(batches):
            reads.phase = "forward"
            with autocast(self.device, self.setting.precision):
                loss = self.model(x)
            reads.phase = "backward"
            controller.backward(loss, weight=len(x))
            if controller.step_due:
                if self.setting.clips:
                    reads.phase = "clipping"
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                reads.phase = "step"
                controller.step()
                reads.window += 1
                reads.phase = "forward"


def build(case: Case, setting: Setting, device: str, skip_nonfinite: bool, steps: int = STEPS) -> Loop:
    """A new model with its optimizer and controller."""
    model = case.network(device)
    # At this beta2 the metric is warm after the ten steps that it takes anyhow.
    optimizer = adam(model, setting.lr(device), betas=(0.9, 0.9))
    options = steady(steps) | setting.options | {"skip_nonfinite": skip_nonfinite}
    if setting.precision == "fp16":
        options["scaler"] = torch.amp.GradScaler(device)
    return Loop(ab.BatchController(model, optimizer, **options), model, device, setting)


def run(report: Report, device: str, tiny: bool) -> None:
    """Rows for each network and setting, with and without ``skip_nonfinite``; and of the host that runs ahead."""
    if device != "cuda":
        report.note("needs CUDA: the host is never ahead of a CPU; only the controller's reads are counted here")
    known = cases(tiny)
    if device == "cuda":
        for skip in (False, True):
            check = partial(_runs_ahead, report, known["wide MLP"], skip)
            report.attempt(check, setting="device kept busy", skip_nonfinite=skip)
    free = {name: _free_by_itself(report, case, device) for name, case in known.items()}
    for label, setting in SETTINGS.items():
        for name in setting.networks:
            for skip in (False, True):
                if report.left < 0.0:
                    report.note(f"no time was left for {label}, {name}, skip_nonfinite={skip}")
                elif free[name]:
                    check = partial(_one, report, known[name], label, setting, device, skip)
                    report.attempt(check, network=name, setting=label, skip_nonfinite=skip)


def _debugged(device: str, what: Callable[[], None]) -> str:
    """Where ``what`` first waits for the device, as a traceback; empty if nowhere."""
    if device != "cuda":
        what()
        return ""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        what()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return traceback.format_exc()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def _free_by_itself(report: Report, case: Case, device: str) -> bool:
    """Whether the hand-written loop waits nowhere: only then can it be told where the controller does."""
    model = case.network(device)
    batches, window = case.batches(device, [case.micro_batch] * STEPS), None
    window = hand_written(model, adam(model), device, "float32")
    window(batches)
    where = _debugged(device, lambda: window(batches))
    if where:
        report.note(where)
    report.row(not where, network=case.name, setting="hand-written loop", skip_nonfinite="", waits=int(bool(where)))
    return not where


def _one(report: Report, case: Case, label: str, setting: Setting, device: str, skip: bool) -> None:
    loop = build(case, setting, device, skip)
    # Everything that is done once: kernels loaded, buffers allocated, the metric warm, ghost norms checked.
    loop.run(case.batches(device, [case.micro_batch] * STEPS * WARM_UP))
    batches = case.batches(device, [case.micro_batch] * STEPS * WINDOWS, seed=2)
    with loop.reads.counting():
        where = _debugged(device, lambda: loop.run(batches))
    late = device == "cuda" and not (skip or setting.reads_first)
    reads = [(phase, ago) for phase, ago, _ in loop.reads.found]
    # The first late read is of a window before the counting began.
    expected = [("step", int(late))] * (WINDOWS - late)
    if where:
        report.note(f"{case.name}, {label}, skip_nonfinite={skip}: waits in {loop.reads.phase}\n{where}")
        loop.controller.discard_window()
    loop.controller.close()
    report.row(
        not where and reads == expected,
        network=case.name,
        setting=label,
        skip_nonfinite=skip,
        waits=int(bool(where)),
        where=loop.reads.phase if where else "",
        windows=WINDOWS,
        reads=len(reads),
        reads_within=sum(phase != "step" for phase, _ in reads),
        reads_of_this_window=sum(ago == 0 for _, ago in reads),
        reads_of_the_one_before=sum(ago == 1 for _, ago in reads),
        found_busy=sum(busy for _, _, busy in loop.reads.found),
    )


def _runs_ahead(report: Report, case: Case, skip: bool) -> None:
    """A device that sleeps at the window's start: the host is through with its backward passes long before, and with
    its step too unless it reads before it."""
    loop = build(case, Setting(), "cuda", skip, steps=2)
    batches = case.batches("cuda", [case.micro_batch] * 2)
    # Few enough launches to fit the device's queue: where that is full, the host waits for room.
    loop.run(batches * WARM_UP)
    cycles = _cycles(STALL_S)
    torch.cuda.synchronize()
    started = time.perf_counter()
    torch.cuda._sleep(cycles)
    for x in batches:
        loop.controller.backward(loop.model(x), weight=len(x))
    backward = time.perf_counter() - started
    loop.controller.step()
    step = time.perf_counter() - started
    torch.cuda.synchronize()
    slept = time.perf_counter() - started
    loop.controller.close()
    report.row(
        backward < slept / 2 and (step > slept / 2) == skip,
        network=case.name,
        setting="device kept busy",
        skip_nonfinite=skip,
        waits=int(step > slept / 2),
        host_s_backward=backward,
        host_s_step=step,
        device_s=slept,
    )


def _cycles(seconds: float) -> int:
    """Of the device's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1000)
    begin.record()
    torch.cuda._sleep(20_000_000)
    end.record()
    end.synchronize()
    return int(20_000_000 * seconds / (begin.elapsed_time(end) / 1e3))
