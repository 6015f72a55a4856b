"""Just the measurement: the noise of the gradient in a loop, or a trainer, that stays as it is."""

from __future__ import annotations

import sys
import time
import warnings
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from adaptbatch.accumulate.gradients import Stepped
from adaptbatch.accumulate.ranks import Ranks
from adaptbatch.accumulate.seal import rounding
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
from adaptbatch.measure.passes import WRITTEN, Passes
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
        optimizer: Its optimizer, wrapped or not; the trainable parameters in its groups are measured.
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
        >>> import torch
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
        optimizer = _innermost(optimizer)
        require_shared_parameter(model, optimizer)
        require_plain_step(optimizer)
        require_scaler(scaler)
        size = checked_population(population)
        self._optimizer = optimizer
        self._ranks = Ranks(model, process_group)
        if self._ranks.sharded:
            raise ValueError(
                "model must not be sharded for a NoiseMeter, got fully_shard, whose gradients are in no .grad before "
                "they are synchronised; use a BatchController with rule=Fixed(k), or DistributedDataParallel."
            )
        world = self._ranks.world_size
        self._sensor = Sensor(model, optimizer, metric=metric, ghost=ghost, ranks=self._ranks)
        self._parameters, examples = Stepped(optimizer), ExampleCount(model)
        self._passes = Passes(
            self._sensor,
            examples,
            self._parameters,
            self._ranks,
            scaler,
            by_example=ghost,
            on_skipped=_weak(self._step_skipped),
            say=_weak(self._say),
        )
        self.history = History(self._settle, unit)
        self._limits = Limits(max_steps=sys.maxsize).resolve(Fixed(1), world_size=world, by_example=ghost)
        self._state = State(Progress(population=size, by_example=ghost, world_size=world))
        self._read_late = self._parameters()[0].device.type == "cuda" and not self._ranks.several
        self._late: PendingResult | None = None
        self._started = self._ended = time.perf_counter()
        self._said: set[str] = set()
        self._waits = False
        handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(_weak(self._step_begins)),
            optimizer.register_step_post_hook(_weak(self._step_ended)),
        ]
        # A meter that is dropped without close() leaves no hook behind.
        self._finalizer = weakref.finalize(self, _unhook, self._sensor, examples, handles)
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
        self._passes.declared = checked_weight(weight)

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
        if self._finalizer.alive and not self._ranks.several and self._passes.skipped_by_scaler():
            self._finish(skipped=True)
        self.history.release()
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    # --- a step -------------------------------------------------------------------------------------------------

    def _step_begins(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        # A trainer's last backward pass may be within the step, which is over when that is.
        self._waits = closure is not None
        if not self._waits:
            self._passes.end_window()

    def _step_ended(self, *_: Any) -> None:
        if self._waits:
            self._passes.end_window()
        if self._passes.count:
            self._finish(skipped=_skips_within(self._optimizer))
        # What was thawed, moved or added since is measured from the next window on.
        self._sensor.attach()
        self._parameters.forget()

    def _step_skipped(self) -> None:
        """A scaler had found infinities in the window before."""
        self._finish(skipped=True)

    def _finish(self, skipped: bool) -> None:
        """Pool and record the window."""
        passes, trouble = self._passes, self._passes.trouble
        now, window = time.perf_counter(), passes.finish(skipped)
        pending = PendingResult.of(
            self._sensor.sums, window, self._optimizer.param_groups[0]["lr"], window.micro_batches
        )
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
                "optimizer_step": passes.steps,
                "backward_passes": passes.backward_passes,
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
        if self._sensor.sums.cells < 2 and not trouble:
            self._say(_ONE_CELL)
        passes.reset()

    def _believed(self, pending: PendingResult) -> WindowResult:
        """Its numbers; none where its gradient is longer than those that were measured allow."""
        measured = pending.result.measurement
        # As in a controller; communication in half precision rounds on the way.
        margin = 0.03 if self._ranks.several else rounding(self._parameters(), pending.micro_batches)
        if measured.finite and measured.batch_sq_norm > (1.0 + margin) * measured.mean_sq_norm:
            self._say(WRITTEN)
            pending.disbelieve()
        return pending.result

    # --- rows ---------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        if self._late is not None:
            self.history.fill(self._late, self._state.progress.population)

    def _say(self, trouble: str) -> None:
        """Warn of what cannot be measured, once."""
        if trouble not in self._said:
            self._said.add(trouble)
            warnings.warn(f"NoiseMeter: {trouble}", RuntimeWarning, stacklevel=2)


def _weak(method: Callable[..., None]) -> Callable[..., None]:
    """A hook that keeps no meter alive."""
    held = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        if (own := held()) is not None:
            own(*args)

    return call


def _innermost(optimizer: Optimizer) -> Optimizer:
    """What steps: a wrapper calls it when a window is complete, and need not have its hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _skips_within(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer is told by the scaler that calls it to leave its parameters as they are."""
    found = getattr(optimizer, "found_inf", None)
    # Read as a scaler reads it for optimizers that are not fused.
    return found is not None and bool(found > 0.0)


def _unhook(sensor: Sensor, examples: ExampleCount, handles: list[RemovableHandle]) -> None:
    sensor.close()
    examples.close()
    for handle in handles:
        handle.remove()


_ONE_CELL = (
    "a window of one micro-batch holds no evidence of the noise, its row has NaN. Accumulate two micro-batches, or "
    "measure single examples: NoiseMeter(model, optimizer, ghost=True)."
)
