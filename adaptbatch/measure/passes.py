"""Somebody else's loop, heard: its backward passes are micro-batches, and what lies between two steps is a window."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from adaptbatch.accumulate.gradients import MISMATCH, Stepped, gradient_sq_norm, gradient_stamps
from adaptbatch.accumulate.ranks import Ranks
from adaptbatch.accumulate.seal import checks_all, rounding
from adaptbatch.accumulate.window import Window
from adaptbatch.measure.examples import ExampleCount
from adaptbatch.measure.sensor import Sensor
from adaptbatch.optimizer.learning_rate import UNTOUCHED

_Stamps = list[tuple[int, int] | None]
_NAMES = {"weighted", "batch"}
_METRIC_NAMES = {"metric_weighted", "metric_batch"}


class Passes:
    """Measures the windows of a loop that it knows nothing of; changes nothing in it.

    A pass begins with its first gradient and ends with autograd's callback. Its share of the window is known at the
    window's end only. ``.grad`` is measured after the pass after which it is about to be clipped or unscaled: after
    each, where the window before was.

    Args:
        sensor: Whose sums are the window's.
        examples: Says what a micro-batch weighs, unless :attr:`declared`.
        parameters: What is stepped.
        ranks: Who trains it.
        scaler: Of the loop.
        by_example: Whether single examples are measured.
        on_skipped: Called when a window turns out to have ended without a step.
        say: Tells of what cannot be measured.

    Attributes:
        count: Micro-batches of the open window.
        backward_passes: Of all windows.
        windows, steps: Finished windows, and those that were stepped on.
        declared: What the loop said that the next micro-batch weighs.
        trouble: Why the open window is not measured; empty: it is.
    """

    def __init__(
        self,
        sensor: Sensor,
        examples: ExampleCount,
        parameters: Stepped,
        ranks: Ranks,
        scaler: GradScaler | None,
        by_example: bool,
        on_skipped: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._sensor, self._examples, self._parameters, self._ranks = sensor, examples, parameters, ranks
        self._scaler, self._ghost, self._on_skipped, self._say = scaler, by_example, on_skipped, say
        self.count = self.backward_passes = self.windows = self.steps = 0
        self._task = -1
        self._in_pass = False
        self._weight = self._largest = 0.0
        self.declared: float | None = None
        self._scale: Tensor | None = None
        self._scaler_stamp: tuple[int, int] | None = None
        self._stamps: _Stamps = []
        self._before: _Stamps = []
        self._touched: set[int] = set()
        self._left: Tensor | None = None
        # The first window may be clipped.
        self._measures_each = True
        self.reset()
        sensor.watch(self._gradient_arrives)

    # --- a backward pass ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _gradient_arrives(self) -> None:
        """Before each gradient: the first of a pass begins a micro-batch."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        self._task = task
        now = gradient_stamps(self._parameters())
        if self.count and self._was_dropped(now):
            if self.skipped_by_scaler():
                self._on_skipped()
            self.reset()
        if self._in_pass:
            # A pass that failed; or one within another, whose parts are no gradients of micro-batches.
            self.trouble = _FAILED
        self._in_pass, self._before = True, now
        if not self.count:
            self._open_window(now)
        self._sensor.begin(synchronises=self._ranks.several)
        torch.autograd.Variable._execution_engine.queue_callback(self._pass_ended)

    def _open_window(self, now: _Stamps) -> None:
        self._sensor.open(UNTOUCHED, self.steps)
        self._scale = self._loss_scale()
        # What was not cleared would count for this window's gradient. A loop may fill with zeros.
        self._left = gradient_sq_norm(self._parameters()) if any(now) else None
        if self._left is not None and self._left.device.type == "cpu" and self._left > 0.0:
            self.trouble = WRITTEN

    def _was_dropped(self, now: _Stamps) -> bool:
        """Whether the window's gradients so far were cleared, without a step."""
        if not any(now):
            return True
        # DDP lays out its buckets anew after its first pass; a parameter that was added has no gradient yet.
        if self._ranks.several or now[: len(self._stamps)] == self._stamps:
            return False
        if gradient_sq_norm(self._parameters()) == 0.0:
            return True
        self.trouble = WRITTEN
        return False

    def _pass_ended(self) -> None:
        """At the end of a backward pass, within it."""
        if self._ranks.several:
            # DDP's own callback, which may come later, copies its buckets to .grad.
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._micro_batch_ended)
        else:
            self._micro_batch_ended()

    @torch.no_grad()
    def _micro_batch_ended(self) -> None:
        self._sensor.end_pass()
        self._in_pass = False
        stamps = gradient_stamps(self._parameters())
        if stamps == self._before:
            # torch.autograd.grad() adds to no .grad.
            return
        touched = {index for index, pair in enumerate(zip_longest(self._before, stamps)) if pair[0] != pair[1]}
        if self.count and touched.isdisjoint(self._touched):
            self.trouble = _PARTS
        self._stamps, self._touched = stamps, touched
        self.count += 1
        self._measured = False
        try:
            sq_norm = self._sensor.sq_norm()
            if self.count == 1 and sq_norm is not None and self._looks():
                self._require_arrived(sq_norm)
            self._take(sq_norm)
            if self._measures_each:
                self._measure()
        except (RuntimeError, ValueError) as error:
            self.trouble = WRITTEN if str(error) == MISMATCH else str(error)

    def _looks(self) -> bool:
        """Whether this window's first gradient is compared with what was measured of it; both have to be read."""
        return checks_all(self.windows) and not (self._ranks.several or self._left is not None)

    def _require_arrived(self, sq_norm: Tensor) -> None:
        parameters = self._parameters()
        arrived = gradient_sq_norm(parameters)
        if (arrived - sq_norm).abs() > rounding(parameters, 1) * torch.maximum(arrived, sq_norm):
            self.trouble = WRITTEN

    def _take(self, sq_norm: Tensor | None) -> None:
        """Add a micro-batch of unknown share: what its sum is multiplied by is known at the window's end."""
        examples, declared = self._examples.take(), self.declared
        self.declared = None
        if self.count == 1:
            self._declares = declared is not None
        elif self._declares != (declared is not None):
            self.trouble = _MIXED
        weight = declared if declared is not None else float(examples or 1)
        if examples is None and declared is None:
            self._say(_UNCOUNTED)
        self._weight += weight
        self._largest = max(self._largest, weight)
        if self._ghost:
            # Of each example its share is 1 / (m k) of its gradient, or 1 / n where the loop weighs its losses.
            self._sensor.take(None, weight, 1.0 if self._declares else math.sqrt(weight))
        else:
            # Its share is 1 / k, or weight / n: with the factor of :meth:`finish`, sum_c w_c |g_c|^2 either way.
            self._sensor.take(None, weight if self._declares else 1.0, 1.0, sq_norm)

    def _measure(self) -> None:
        """The length of what is in ``.grad``."""
        self._sensor.measure_accumulated(1.0)
        self._measured = True

    @torch.no_grad()
    def end_window(self) -> None:
        """The window's gradient is complete, and may have been clipped since."""
        changed = gradient_stamps(self._parameters()) != self._stamps
        if self.count and not self._measured:
            if changed:
                self.trouble = _CHANGED
            else:
                self._measure()
        # A scaler takes the loss scale out before the step, which no version counter sees.
        self._measures_each = changed or self._scaler is not None

    def finish(self, skipped: bool) -> Window:
        """The window as a controller would have had it: its sums on their common scale, over all ranks."""
        self.windows += 1
        self.backward_passes += self.count
        self.steps += not skipped
        sums, window = self._sensor.sums, Window(weight=self._weight, largest=self._largest)
        window.micro_batches = window.all_micro_batches = self.count
        if self.trouble or not sums.keys() >= _NAMES:
            self._say(self.trouble or _CHANGED)
            sums.clear()
            sums.cells = max(sums.cells, 1)
        # Ranks add the same names, whatever befell one of them.
        names = _NAMES | _METRIC_NAMES if self._ranks.several and self._sensor.metric == "adam" else _NAMES
        for name in sorted(names - sums.keys()):
            sums[name] = torch.tensor(math.nan, dtype=torch.float64)
        if self._left is not None:
            # Not read: the host may have to wait for it.
            sums["weighted"] = sums["weighted"].where(self._left == 0.0, math.nan)
        sums.unscale(self._scale, accumulated=True)
        declares = float(self._declares)
        if self._ranks.several:
            total = self._ranks.sum({**window.own(), "cells": sums.cells, "declares": declares, **sums})
            window.share(total, self._ranks.world_size)
            sums.share(total)
        # Each share is one of a rank's mean, and ranks are averaged.
        n, world = window.weight, self._ranks.world_size
        factor = (n * n if declares else n * window.all_micro_batches) / world**2
        for name in ("weighted", "metric_weighted"):
            if name in sums:
                sums[name] = sums[name] * factor
        return window

    def _loss_scale(self) -> Tensor | None:
        if self._scaler is None:
            return None
        self._scaler_stamp = self._stamp()
        return self._scaler.scale(torch.ones((), device=self._parameters()[0].device))

    def _stamp(self) -> tuple[int, int] | None:
        scale = getattr(self._scaler, "_scale", None)
        return None if scale is None else (id(scale), scale._version)

    def skipped_by_scaler(self) -> bool:
        """Whether the scaler was updated without a step: it had found infinities."""
        return self.count > 0 and self._scaler is not None and self._stamp() != self._scaler_stamp

    def reset(self) -> None:
        """No window is open; what was :attr:`declared` is of the micro-batch to come."""
        self.count = 0
        self._weight = self._largest = 0.0
        self._declares = self._measured = False
        self.trouble = ""
        self._scale = None
        self._scaler_stamp = self._left = None
        self._stamps = []


_FAILED = (
    "a backward pass began before the last one had ended, after an error, or within it as reentrant activation "
    "checkpointing does (use_reentrant=False does not); the window is not measured."
)
_CHANGED = (
    "the window's gradient was changed before its length was measured, by clipping or unscaling it for the first time; "
    "the window is not measured, those after it are."
)
WRITTEN = (
    "something else than the measured backward passes writes to .grad within the window (clipping or a mask between "
    "micro-batches, a hook on accumulated gradients, gradients left from before it); the window is not measured. "
    "Change gradients once the window is complete, or in a hook of Tensor.register_hook."
)
_PARTS = (
    "backward passes of a window computed gradients of different parameters, as parts of one gradient that arrive one "
    "by one (reentrant activation checkpointing; use_reentrant=False); the window is not measured."
)
_MIXED = (
    "meter.weight() was called for some micro-batches of the window and not for others, whose shares are unknown; the "
    "window is not measured. Call it before each backward pass, or never."
)
_UNCOUNTED = (
    "the model was called without a tensor that has a first dimension, and weights count micro-batches. Say what each "
    "counts before its backward pass: meter.weight(len(x))."
)
