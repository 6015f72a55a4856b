"""Just the measurement: the noise of the gradient in a loop, or a trainer, that stays as it is."""

from __future__ import annotations

import math
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from itertools import zip_longest
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from adaptbatch.accumulate.gradients import MISMATCH, Stepped, gradient_sq_norm, gradient_stamps
from adaptbatch.accumulate.ranks import Ranks
from adaptbatch.accumulate.seal import checks_all, rounding
from adaptbatch.accumulate.window import Window
from adaptbatch.checks import (
    checked_population,
    checked_weight,
    require_pair,
    require_plain_step,
    require_scaler,
    require_shared_parameter,
    require_unit,
)
from adaptbatch.measure.examples import ExampleCount
from adaptbatch.measure.result import PendingResult
from adaptbatch.measure.sensor import Metric, Sensor
from adaptbatch.optimizer.learning_rate import UNTOUCHED
from adaptbatch.optimizer.second_moment import applied_beta2
from adaptbatch.records import Progress, WindowCounts, WindowResult
from adaptbatch.reporting.explain import explain
from adaptbatch.reporting.history import History, decision_row
from adaptbatch.rules import Fixed, Limits, decide
from adaptbatch.state import State


class NoiseMeter:
    """Measures the noise of the gradient in a training loop without touching it: one line after the optimizer is made.

    The loop keeps its ``loss / k``, its clipping, its ``GradScaler``, its trainer. A micro-batch ends with its backward
    pass, a window with the optimizer's step; from the ``k`` micro-batch gradients of each window, each with its share
    ``w_c / n`` of the mean, come the unbiased ``|G|^2`` and ``tr(Sigma)`` that a
    :class:`~adaptbatch.BatchController` with ``rule=Fixed(k)`` measures, in the same ``history``. Parameters,
    optimizer and random numbers are bit for bit those of the loop without it.

    What a micro-batch weighs is the first dimension of what the model is called with, as in a loop that adds
    ``loss / k`` of equal micro-batches. Where they are unequal, and each loss is weighted by its share of the window,
    :meth:`weight` says what it counts. Were the losses not divided by ``k``, signal and noise would have the scale of
    the sum that is stepped on; their ratio, the noise scale, is the same.

    When it is wrong: in a loop that adds to ``.grad`` what is no backward pass of the model's losses, or whose
    micro-batches are unequal and weighted otherwise. What cannot be measured is NaN in its row, with a warning, once.

    Args:
        model: As the loop calls it: plain, compiled, or wrapped in DistributedDataParallel.
        optimizer: Its optimizer; the trainable parameters in its groups are measured.
        metric: ``"adam"`` measures in the optimizer's metric too.
        population: Examples in the data set; see :class:`~adaptbatch.BatchController`. None: unlimited.
        ghost: Measure every example on its own, so that a window of one micro-batch holds evidence.
        scaler: The loop's ``torch.amp.GradScaler``, which stays the loop's.
        process_group: The ranks that share each step; None: DDP's own, or the default group.
        unit: What weights count: ``"tokens"``.

    Raises:
        ValueError: If nothing is trainable, the model is sharded, or an argument is out of range.
        TypeError: If an argument is of another kind.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, appendix A.1 (two batch sizes; here by analysis of variance).

    Example:
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> meter = NoiseMeter(model, optimizer)
        >>> for index in range(12):
        ...     (model(torch.randn(8, 3)).square().mean() / 4).backward()
        ...     if index % 4 == 3:
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> meter.history.to_pandas()[["accumulation_steps", "global_batch"]].values.tolist()
        [[4.0, 32.0], [4.0, 32.0], [4.0, 32.0]]
        >>> meter.close()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        metric: Metric = "euclidean",
        population: float | None = None,
        ghost: bool = False,
        scaler: GradScaler | None = None,
        process_group: Any = None,
        unit: str = "examples",
    ) -> None:
        require_unit(unit, ghost)
        require_pair(model, optimizer)
        require_shared_parameter(model, optimizer)
        require_plain_step(optimizer)
        require_scaler(scaler)
        size = checked_population(population)
        self._optimizer, self._scaler, self._ghost = optimizer, scaler, ghost
        self._ranks = Ranks(model, process_group)
        if self._ranks.sharded:
            raise ValueError(
                "model must not be sharded for a NoiseMeter, got fully_shard, whose gradients are in no .grad before "
                "they are synchronised; use a BatchController with rule=Fixed(k), or DistributedDataParallel."
            )
        self._sensor = Sensor(model, optimizer, metric=metric, ghost=ghost, ranks=self._ranks)
        self._parameters = Stepped(optimizer)
        self._examples = ExampleCount(model)
        self.history = History(self._settle, unit)
        self._limits = Limits(max_steps=sys.maxsize).resolve(
            Fixed(1), world_size=self._ranks.world_size, by_example=ghost
        )
        self._state = State(
            Progress(
                population=size,
                by_example=ghost,
                world_size=self._ranks.world_size,
            )
        )
        self._read_late = self._parameters()[0].device.type == "cuda" and not self._ranks.several
        self._late: PendingResult | None = None
        self._optimizer_step = self._backward_passes = 0
        self._started = self._ended = time.perf_counter()
        self._said: set[str] = set()
        self._task = -1
        self._in_pass = False
        self._weight = self._largest = 0.0
        self._declared: float | None = None
        self._scale: Tensor | None = None
        self._scaler_stamp: tuple[int, int] | None = None
        self._stamps: _Stamps = []
        self._before: _Stamps = []
        self._touched: set[int] = set()
        self._left: Tensor | None = None
        # The first window may be clipped.
        self._measures_each = True
        self._reset()
        self._sensor.watch(_weak(self._gradient_arrives))
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(_weak(self._step_begins)),
            optimizer.register_step_post_hook(_weak(self._step_ended)),
        ]
        # A meter that is dropped without close() leaves no hook behind.
        self._finalizer = weakref.finalize(self, _unhook, self._sensor, self._examples, self._handles)
        self._finalizer.atexit = False

    def __repr__(self) -> str:
        return f"NoiseMeter({len(self.history)} windows)"

    def weight(self, weight: float) -> None:
        """Say, before its backward pass, what the next micro-batch counts: the loop adds ``weight / n`` of its loss.

        Args:
            weight: Examples (or tokens) that its loss is the mean over; a positive Python number.

        Raises:
            ValueError: If it is of another kind.
        """
        self._declared = checked_weight(weight)

    def explain(self) -> str:
        """What was measured, in three sentences."""
        self._settle()
        state, rule = self._state, Fixed(self._state.progress.accumulation_steps)
        decision = decide(rule, state.evidence(), state.progress, self._limits)
        asks, rows = self._sensor.metric == "adam", self.history.to_pandas()
        return explain(rule, state, decision, self._limits, rows, asks, self.history.unit)

    def close(self) -> None:
        """Leave nothing on model and optimizer; the history stays."""
        # Of several ranks this one may be alone in closing.
        if self._finalizer.alive and self._count and not self._ranks.several and self._skipped_by_scaler():
            self._finish(skipped=True)
        self.history.release()
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    # --- a backward pass ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _gradient_arrives(self) -> None:
        """Before each gradient: the first of a pass begins a micro-batch."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        self._task = task
        now = gradient_stamps(self._parameters())
        if self._count and self._was_dropped(now):
            if self._skipped_by_scaler():
                self._finish(skipped=True)
            self._reset()
        if self._in_pass:
            # A pass that failed; or one within another, whose parts are no gradients of micro-batches.
            self._trouble = _FAILED
        self._in_pass, self._before = True, now
        if not self._count:
            self._open_window(now)
        self._sensor.begin(synchronises=self._ranks.several)
        torch.autograd.Variable._execution_engine.queue_callback(self._pass_ended)

    def _open_window(self, now: _Stamps) -> None:
        self._sensor.open(UNTOUCHED, self._optimizer_step)
        self._scale = self._loss_scale()
        # What was not cleared would count for this window's gradient. A loop may fill with zeros.
        self._left = gradient_sq_norm(self._parameters()) if any(now) else None
        if self._left is not None and self._left.device.type == "cpu" and self._left > 0.0:
            self._trouble = _WRITTEN

    def _was_dropped(self, now: _Stamps) -> bool:
        """Whether the window's gradients so far were cleared, without a step."""
        if not any(now):
            return True
        # DDP lays out its buckets anew after its first pass; a parameter that was added has no gradient yet.
        if self._ranks.several or now[: len(self._stamps)] == self._stamps:
            return False
        if gradient_sq_norm(self._parameters()) == 0.0:
            return True
        self._trouble = _WRITTEN
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
        if self._count and touched.isdisjoint(self._touched):
            self._trouble = _PARTS
        self._stamps, self._touched = stamps, touched
        self._count += 1
        self._backward_passes += 1
        self._measured = False
        try:
            sq_norm = self._sensor.sq_norm()
            if self._count == 1 and sq_norm is not None and self._looks():
                self._require_arrived(sq_norm)
            self._take(sq_norm)
            if self._measures_each:
                self._measure()
        except (RuntimeError, ValueError) as error:
            self._trouble = _WRITTEN if str(error) == MISMATCH else str(error)

    def _looks(self) -> bool:
        """Whether this window's first gradient is compared with what was measured of it; both have to be read."""
        return checks_all(self._state.progress.window) and not (self._ranks.several or self._left is not None)

    def _require_arrived(self, sq_norm: Tensor) -> None:
        parameters = self._parameters()
        arrived = gradient_sq_norm(parameters)
        if (arrived - sq_norm).abs() > rounding(parameters, 1) * torch.maximum(arrived, sq_norm):
            self._trouble = _WRITTEN

    def _take(self, sq_norm: Tensor | None) -> None:
        """Add a micro-batch of unknown share: what its sum is multiplied by is known at the window's end."""
        examples, declared = self._examples.take(), self._declared
        self._declared = None
        if self._count == 1:
            self._declares = declared is not None
        elif self._declares != (declared is not None):
            self._trouble = _MIXED
        weight = declared if declared is not None else float(examples or 1)
        if examples is None and declared is None:
            self._say(_UNCOUNTED)
        self._weight += weight
        self._largest = max(self._largest, weight)
        if self._ghost:
            # Of each example its share is 1 / (m k) of its gradient, or 1 / n where the loop weighs its losses.
            self._sensor.take(None, weight, 1.0 if self._declares else math.sqrt(weight))
        else:
            # Its share is 1 / k, or weight / n: with the factor of :meth:`_shared`, sum_c w_c |g_c|^2 either way.
            self._sensor.take(None, weight if self._declares else 1.0, 1.0, sq_norm)

    def _measure(self) -> None:
        """The length of what is in ``.grad``."""
        self._sensor.measure_accumulated(1.0)
        self._measured = True

    # --- a step -------------------------------------------------------------------------------------------------

    def _step_begins(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        # A trainer's last backward pass may be within the step, which is over when that is.
        self._waits = closure is not None
        if not self._waits:
            self._end_window()

    def _step_ended(self, *_: Any) -> None:
        if self._waits:
            self._end_window()
        if self._count:
            self._finish(skipped=False)
        # What was thawed, moved or added since is measured from the next window on.
        self._sensor.attach()
        self._parameters.forget()

    @torch.no_grad()
    def _end_window(self) -> None:
        """The window's gradient is complete, and may have been clipped since."""
        changed = gradient_stamps(self._parameters()) != self._stamps
        if self._count and not self._measured:
            if changed:
                self._trouble = _CHANGED
            else:
                self._measure()
        # A scaler takes the loss scale out before the step, which no version counter sees.
        self._measures_each = changed or self._scaler is not None

    def _finish(self, skipped: bool) -> None:
        """Share, pool and record the window."""
        now, window = time.perf_counter(), self._shared()
        pending = PendingResult.of(
            self._sensor.sums, window, self._optimizer.param_groups[0]["lr"], window.micro_batches
        )
        self._optimizer_step += not skipped
        arrived = [one for one in (self._late, pending) if one is not None]
        self._late = arrived.pop() if self._read_late else None
        counts = WindowCounts(window.weight, window.all_micro_batches, window.largest, seconds=now - self._ended)
        self._ended = now
        k = window.micro_batches
        self._state, evidence, decision = self._state.sized(k).advance(
            counts, [self._believed(one) for one in arrived], Fixed(k), self._limits
        )
        self.history.append(
            decision_row(self._state, evidence, decision, window.weight)
            | {
                "optimizer_step": self._optimizer_step,
                "backward_passes": self._backward_passes,
                "wall_seconds": now - self._started,
                "accumulation_steps": k,
                "lr_factor": 1.0,
                "beta2": applied_beta2(self._optimizer, UNTOUCHED),
                "second_moment_factor": 1.0,
                "skipped": skipped,
            }
        )
        pending.row = len(self.history) - 1
        for one in arrived:
            self.history.fill(one, self._state.progress.population)
        if self._sensor.sums.cells < 2 and not self._trouble:
            self._say(_ONE_CELL)
        self._reset()

    def _believed(self, pending: PendingResult) -> WindowResult:
        """Its numbers; none where its gradient is longer than those that were measured allow."""
        measured = pending.result.measurement
        # As in a controller; communication in half precision rounds on the way.
        margin = 0.03 if self._ranks.several else rounding(self._parameters(), pending.micro_batches)
        if measured.finite and measured.batch_sq_norm > (1.0 + margin) * measured.mean_sq_norm:
            self._say(_WRITTEN)
            pending.disbelieve()
        return pending.result

    def _shared(self) -> Window:
        """The window as a controller would have had it: its sums on their common scale, over all ranks."""
        sums, window = self._sensor.sums, Window(weight=self._weight, largest=self._largest)
        window.micro_batches = window.all_micro_batches = self._count
        if self._trouble or not sums.keys() >= _NAMES:
            self._say(self._trouble or _CHANGED)
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

    def _skipped_by_scaler(self) -> bool:
        """Whether the scaler was updated without a step: it had found infinities."""
        return self._scaler is not None and self._stamp() != self._scaler_stamp

    def _reset(self) -> None:
        """No window is open."""
        self._count = 0
        self._weight = self._largest = 0.0
        self._declared = None
        self._declares = self._measured = self._waits = False
        self._trouble = ""
        self._scale = None
        self._scaler_stamp = self._left = None
        self._stamps = []

    # --- rows ---------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        if self._late is not None:
            self.history.fill(self._late, self._state.progress.population)

    def _say(self, trouble: str) -> None:
        """Warn of what cannot be measured, once."""
        if trouble not in self._said:
            self._said.add(trouble)
            warnings.warn(f"NoiseMeter: {trouble}", RuntimeWarning, stacklevel=2)


_Stamps = list[tuple[int, int] | None]
_NAMES = {"weighted", "batch"}
_METRIC_NAMES = {"metric_weighted", "metric_batch"}


def _weak(method: Callable[..., None]) -> Callable[..., None]:
    """A hook that keeps no meter alive."""
    held = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        if (own := held()) is not None:
            own(*args)

    return call


def _unhook(sensor: Sensor, examples: ExampleCount, handles: list[RemovableHandle]) -> None:
    sensor.close()
    examples.close()
    for handle in handles:
        handle.remove()


_FAILED = (
    "a backward pass began before the last one had ended, after an error, or within it as reentrant activation "
    "checkpointing does (use_reentrant=False does not); the window is not measured."
)
_CHANGED = (
    "the window's gradient was changed before its length was measured, by clipping or unscaling it for the first time; "
    "the window is not measured, those after it are."
)
_WRITTEN = (
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
_ONE_CELL = (
    "a window of one micro-batch holds no evidence of the noise, its row has NaN. Accumulate two micro-batches, or "
    "measure single examples: NoiseMeter(model, optimizer, ghost=True)."
)
_UNCOUNTED = (
    "the model was called without a tensor that has a first dimension, and weights count micro-batches. Say what each "
    "counts before its backward pass: meter.weight(len(x))."
)
