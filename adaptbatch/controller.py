"""The companion of a training loop: observes micro-batches, makes their mean, steps, records, sizes the next window."""

from __future__ import annotations

import math
import sys
import time
import warnings
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from numbers import Real
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from adaptbatch import estimate
from adaptbatch.accumulate.ranks import Ranks, Sync, require_agreement
from adaptbatch.accumulate.stream import Stream
from adaptbatch.accumulate.window import FinishedWindow, OpenWindow
from adaptbatch.checks import (
    checked_weight,
    require_kind,
    require_pair,
    require_scalar_loss,
    require_shared_parameter,
    require_unit,
)
from adaptbatch.measure.norms import all_gradients_finite
from adaptbatch.measure.sensor import Metric, Sensor
from adaptbatch.optimizer.learning_rate import UNTOUCHED, Adjustment, LearningRate
from adaptbatch.optimizer.second_moment import applied_beta2
from adaptbatch.optimizer.step import Stepper
from adaptbatch.records import Decision, Evidence, NoiseEstimate, Progress
from adaptbatch.reporting.explain import explain
from adaptbatch.reporting.history import History, decision_row
from adaptbatch.rules import Guard, Limits, RelativeStandardError, Rule
from adaptbatch.schema import STATE_VERSION, require_state
from adaptbatch.state import Loop

if TYPE_CHECKING:
    from adaptbatch.planning.advice import Plan

# Windows between two measurements of how much the ranks' data differ, each of which costs one more norm.
SHARDS_EVERY = 16

Item = TypeVar("Item")


class BatchController:
    """Chooses the accumulation steps of every window from the measured gradient noise.

    It wraps nothing: model, optimizer and loader stay what they are. Between two optimizer steps, a *window*, it takes
    ``k`` micro-batches of any sizes. As soon as it has them, ``.grad`` is exactly the weighted mean over its examples,
    for every ``k``, unscaled and on all ranks: clip it as in any loop, then :meth:`step`. The next ``k`` is decided by
    ``rule`` from finished windows only.

    Args:
        model: The module being trained: plain, wrapped in DistributedDataParallel, given to ``fully_shard`` (FSDP2),
            compiled.
        optimizer: Its optimizer; the trainable parameters in its groups are measured.
        rule: Any :class:`~adaptbatch.rules.Rule`; None is ``RelativeStandardError()``.
        limits: Bounds on ``k``; None is ``Limits()``, or none for a rule that reads no noise, without a guard. They may
            be replaced under way: :attr:`limits`.
        metric: ``"euclidean"``, or ``"adam"``: the decision is made in the coordinates in which the optimizer
            descends, squared gradients weighted by ``1 / (sqrt(v) + eps)`` with the second moment of the step before
            (:func:`~adaptbatch.optimizer.second_moment.metric_scales`), once that is warm. Costs a second norm of
            gradients.
        population: Examples in the data set, when batches are drawn from it without replacement and its own gradient
            is the target (finite-population correction); in the unit of the weights. None: unlimited.
        ghost: Measure every example on its own, so that one micro-batch holds evidence and ``k`` may be 1; for models
            of the layers that :class:`~adaptbatch.measure.ghost.GhostProbe` knows. ``weight`` is then the number of
            examples.
        scaler: The loop's ``torch.amp.GradScaler``: :meth:`backward` scales, statistics and the due window's ``.grad``
            are unscaled, :meth:`step` steps through it and updates it.
        process_group: The ranks that share each step; None: DDP's own, or the default group.
        sync: With several ranks, synchronise gradients in a window's ``"last"`` micro-batch or in ``"every"`` one.
        learning_rate: Couples the learning rate, ``beta2`` or the second moment to the batch for the time of each
            step, unseen by schedulers; None couples nothing.
        guard: Answers exceedances of the usual gradient, and gradients that are not finite, by skipping and growing,
            whatever the rule; None leaves them to the rule. Reads the window's numbers before each step.
        phase: Measure the inner product of consecutive gradients, whose sign tells a noise floor from a transient.
            Costs a copy of the gradient.
        skip_nonfinite: Leave out a step whose gradients are not finite (one host read before each step). With False
            the step is taken as in a plain loop, and on a GPU the numbers reach the host, hence the decision, one
            window late.
        unit: What weights count, for whoever reads: ``"tokens"``. Columns keep their names.

    Raises:
        ValueError: If nothing is trainable, ``population`` is below 1, ``limits`` do not fit the rule, a layer has no
            ghost norms, or the optimizer has not what ``metric`` or ``learning_rate`` needs, or steps with a closure.
        TypeError: If an argument is of another kind.

    Example:
        >>> import torch
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> data = [torch.randn(8, 3) for _ in range(6)]
        >>> with BatchController(model, optimizer, limits=Limits(max_steps=4)) as controller:
        ...     for x in controller.micro_batches(data):
        ...         controller.backward(model(x).square().mean(), weight=len(x))
        ...         if controller.step_due:
        ...             decision = controller.step()
        >>> controller.history.to_pandas()["accumulation_steps"].tolist()
        [2, 2, 2]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        rule: Rule | None = None,
        limits: Limits | None = None,
        metric: Metric = "euclidean",
        population: float | None = None,
        ghost: bool = False,
        learning_rate: LearningRate | None = None,
        guard: Guard | None = None,
        phase: bool = False,
        scaler: GradScaler | None = None,
        process_group: Any = None,
        sync: Sync = "last",
        skip_nonfinite: bool = True,
        unit: str = "examples",
    ) -> None:
        require_unit(unit, ghost)
        require_pair(model, optimizer)
        require_shared_parameter(model, optimizer)
        require_kind(
            "rule", rule, Rule, "RelativeStandardError() is the default, Fixed(4) takes 4 micro-batches always"
        )
        require_kind("guard", guard, Guard, "Guard() is the usual one")
        require_kind("learning_rate", learning_rate, LearningRate, "the optimizer has the rate, this couples it")
        if population is not None and not (isinstance(population, Real) and population >= 1.0):
            raise ValueError(
                f"population must be at least 1 example, got population = {population!r}; None: unlimited."
            )
        self.model = model
        self.optimizer = optimizer
        self.rule: Rule = RelativeStandardError() if rule is None else rule
        self._ranks = ranks = Ranks(model, process_group, sync)
        self._by_example = ghost
        if limits is None:
            # An open-loop rule is bounded by itself.
            limits = Limits() if self.rule.closed_loop or guard is not None else Limits(max_steps=sys.maxsize)
        self._limits = self._resolved(limits)
        self.guard = guard
        self._stepper = Stepper(optimizer, scaler, learning_rate)
        self.history = History(self._settle, unit)
        # All leave out steps, and so have to see a window before its step; several ranks see it when they agree on it.
        self._reads_first = skip_nonfinite or guard is not None or scaler is not None or ranks.several
        self._skips_nonfinite = skip_nonfinite or scaler is not None
        self._skips_in_a_row = 0
        self._seconds = (0.0, 0.0)
        self._started = time.perf_counter()
        self._ended = self._started
        self._closed = False
        self._optimizer_step = 0
        self._backward_passes = 0
        self._late: FinishedWindow | None = None
        self._window = OpenWindow()
        self._stream = Stream(
            ranks,
            fills=lambda: self._window.cells + 1 >= self.accumulation_steps,
            pending=lambda: self._window.cells,
        )
        self._restored: Mapping[str, Any] | None = None
        self._trainer_steps = False
        # The index of the window in the history's first row.
        self._first_row = 0
        self._shared: dict[str, float] = {}
        self._sensor = Sensor(
            model,
            optimizer,
            metric=metric,
            ghost=ghost,
            phase=phase,
            keep_gradients=bool(getattr(self.rule, "keeps_gradients", False)),
            ranks=ranks,
        )
        # On a GPU without the check before the step, nothing may wait for this window's numbers.
        self._read_late = not self._reads_first and self._sensor.parameters[0].device.type == "cuda"
        start = Progress(
            accumulation_steps=self.limits.lower,
            population=math.inf if population is None else float(population),
            by_example=ghost,
            world_size=ranks.world_size,
        )
        self._loop, self._decision = Loop(start).decided(self.rule, self.limits)
        # A controller that is dropped without close(), as in a notebook cell run again, leaves no hook behind.
        self._finalizer = weakref.finalize(self, _unhook, self._sensor, self._stepper)
        self._finalizer.atexit = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self._window.cells} of {self.accumulation_steps} micro-batches"
        return f"BatchController({self.rule!r}, {state}, {self._optimizer_step} steps)"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a BatchController listens to one process's model and cannot be copied or pickled; take state_dict(), or "
            "its history."
        )

    @property
    def accumulation_steps(self) -> int:
        """``k`` of the window that is open or comes next."""
        return self._loop.progress.accumulation_steps

    @property
    def limits(self) -> Limits:
        """Bounds on ``k``, resolved for the rule and the ranks; assign others to change them under way.

        Every decision from now on keeps within the new ones. A window that is open keeps its ``k``. Between windows the
        size of the next one is brought within them at once; where they leave more room, it is taken decision by
        decision. They are no part of the state: a checkpoint is brought within those of the controller that loads it.
        On several ranks all assign the same, after the same step.

        Raises:
            ValueError: If they do not fit the rule; those before stay.
        """
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limits = self._resolved(limits)
        self._keep_within_limits()

    def _resolved(self, limits: Limits) -> Limits:
        if not isinstance(limits, Limits):
            raise ValueError(f"limits must be a Limits, got {limits!r}; Limits(max_steps=64) allows up to 64 steps.")
        return limits.resolve(self.rule, world_size=self._ranks.world_size, by_example=self._by_example)

    def _keep_within_limits(self) -> None:
        """Between windows; a scope that waits for its backward has decided already whether it synchronises."""
        if not (self._window.cells or self._window.broken or self._stream.used is False):
            self._loop, self._decision = self._loop.limited(self._decision, self._limits)

    @property
    def examples_seen(self) -> float:
        """Sum of all weights in finished windows, on all ranks, skipped ones included."""
        return self._loop.progress.examples_seen

    @property
    def unused_micro_batches(self) -> int:
        """This rank's micro-batches that were left over so far because another rank had no more."""
        return self._stream.unused

    @property
    def step_due(self) -> bool:
        """Whether the window has all its micro-batches, and ``.grad`` their mean, to be clipped and stepped on."""
        if self._window.due:
            # Of a window that was loaded, before somebody clips it.
            self._restore()
        return self._window.due

    @property
    def grad_norm(self) -> Tensor:
        """Norm of the due window's mean gradient before clipping, on all ranks; a scalar that is not read.

        Raises:
            RuntimeError: If no step is due.
        """
        self._require_due("grad_norm")
        assert self._window.norms.batch is not None
        return self._window.norms.batch.sqrt()

    # --- the loop -----------------------------------------------------------------------------------------------

    def micro_batches(self, loader: Iterable[Item]) -> Iterator[Item]:
        """Iterate over ``loader`` so that its last item closes the last, possibly partial, window.

        Each item comes in a scope of its own, which synchronises ranks in a window's last. Ranks end together: when one
        has no next micro-batch, the others warn of what they have left over (:attr:`unused_micro_batches`).

        One process asks for an item when a plain loop does, where ``len(loader)`` says which is the last. Where it has
        no length, has a ``state_dict()``, or ranks are several, the next item is asked for with this one in hand.

        An iteration that a ``break`` or an error left within a window warns at the next one, which goes on with it.

        Raises:
            RuntimeError: If the controller is closed, the item ahead overwrote the one in hand, or a newer iteration
                has begun.
        """
        self._require_open()
        return self._stream.items(loader)

    def loader_state_dict(self) -> Any:
        """State of the loader that :meth:`micro_batches` iterates, for a checkpoint: as of the item handed out last.

        It looks one item ahead, so that ``loader.state_dict()`` itself may be one too far.

        Raises:
            RuntimeError: If no loader with a ``state_dict()`` was iterated.
        """
        return self._stream.loader_state_dict()

    @contextmanager
    def micro_batch(self, last: bool = False) -> Iterator[None]:
        """The scope of one micro-batch, forward and backward: at most one :meth:`backward` inside.

        Args:
            last: Whether it is the last of the data, which ends its window. Ranks have to know before it; one process
                may also call :meth:`close_window` after it.

        Raises:
            RuntimeError: If scopes are nested.
        """
        with self._stream.scope(last):
            yield

    def backward(self, loss: Tensor, weight: float) -> None:
        """Back-propagate one micro-batch and measure its gradient; the window's last makes ``.grad`` the mean.

        On several ranks that is where the window's one all-reduce is.

        Args:
            loss: Mean loss over the micro-batch; a scalar with a graph.
            weight: Examples (or tokens) that the mean is over; a positive Python number.

        Raises:
            ValueError: If ``loss`` or ``weight`` is not of that kind.
            RuntimeError: If a step is due, the micro-batch had its backward, gradients are left from before the
                window, the optimizer does not hold the model's parameters, no gradient arrived, or ranks disagree or
                died. After an error within the backward pass the window's gradients are incomplete:
                :meth:`discard_window`.
        """
        with self._observing(loss, weight, unscales=True) as weighted:
            self._stepper.scaled(weighted, self._window.scale).backward()  # type: ignore[no-untyped-call]

    @contextmanager
    def observe(self, loss: Tensor, weight: float) -> Iterator[Tensor]:
        """:meth:`backward` for a trainer that has a call of its own: back-propagate what this yields, once, inside.

        A ``scaler`` is left to that call: the mean in ``.grad`` keeps the loss scale until the trainer takes it out.
        Arguments and errors are those of :meth:`backward`.
        """
        self.expect_trainer()
        if self._window.cells:
            self._stepper.require_scale()
        with self._observing(loss, weight, unscales=False) as weighted:
            yield weighted

    @contextmanager
    def _observing(self, loss: Tensor, weight: float, unscales: bool) -> Iterator[Tensor]:
        self._require_open()
        weight = checked_weight(weight)
        require_scalar_loss(loss)
        self._require_whole()
        if self._window.due:
            raise RuntimeError("a step is due: call step() before the next backward().")
        if self._stream.used:
            raise RuntimeError(
                "one micro-batch takes one backward(): add its losses, or open a micro_batch() for each."
            )
        self._restore()
        if self._window.cells == 0:
            self._open_window(loss, weight)
            self._window.unscales = unscales
        else:
            self._sensor.follow(self._window)
            # DDP may lay out its buckets anew between two backward passes.
            self._sensor.require_untouched(self._window, "backward()", stamps=not self._ranks.several)
        window, closes = self._window, self._stream.closes
        if not self._ranks.several:
            self._sensor.make_room(window, weight, window.reference / self.accumulation_steps)
        # Only a scope knows that this is the window's last; after a backward pass that synchronised, .grad is no
        # longer this rank's own.
        local = self._ranks.several and self._stream.used is not None and (window.cells == 0 or not window.synced)
        sums = local and closes and self._loop.progress.window % SHARDS_EVERY == 0
        window.synced = self._ranks.synchronises(closes)
        synchronises = self._ranks.several and window.synced
        with self._sensor.observing(window, loss, weight, sums=sums, synchronises=synchronises) as weighted:
            yield weighted
        self._guard_window()
        self._backward_passes += 1
        if self._stream.used is not None:
            self._stream.used = True
        window.ended = self._stream.last
        if window.ended or window.cells >= self.accumulation_steps:
            self._complete()

    def _complete(self) -> None:
        """The window has all its micro-batches: make ``.grad`` their mean, and measure it."""
        window = self._window
        window.broken = True
        if window.unscales:
            self._stepper.unscale_(window.scale)
        else:
            self._stepper.require_scale()
        note = self._note() if self._ranks.several else {}
        self._shared = self._sensor.complete(window, note)
        if self._ranks.several:
            require_agreement(self._ranks, note, self._shared)
            if self._shared["more"] < self._ranks.world_size:
                self._stream.end()
        self._stepper.gate.refuses, self._stepper.gate.passed = None, 0
        window.broken, window.due = False, True

    def expect_trainer(self) -> None:
        """A trainer steps the optimizer itself, told by :meth:`record_step`: its steps are not refused within a window.

        :meth:`observe` says the same; a trainer whose first step may come before it calls this.
        """
        self._trainer_steps = True
        self._stepper.gate.refuses = None

    def close_window(self) -> None:
        """End the window with the micro-batches it has: a step is due afterwards, unless it has none.

        At the end of a hand-written loop, whose last window may be partial or just over.

        Raises:
            RuntimeError: If the window's last backward pass failed, or did not synchronise the ranks, or its gradients
                were changed.
        """
        self._require_whole()
        if not self._window.cells:
            return
        if self._window.due:
            self._window.ended = True
            return
        if not self._window.synced:
            raise RuntimeError(
                "close_window() is too late on several ranks: the window's last micro-batch did not synchronise its "
                "gradients; announce it with micro_batch(last=True), or iterate micro_batches(loader)."
            )
        self._restore()
        self._sensor.require_untouched(self._window, "close_window()")
        self._window.ended = True
        self._complete()

    def discard_window(self) -> None:
        """Forget the open window: gradients cleared, nothing recorded. The way on after a failed backward pass."""
        self._stepper.abandon()
        self._clear_gradients()
        self._ranks.forget()
        self._stepper.gate.refuses = None
        self._window, self._restored = OpenWindow(), None
        self._sensor.forget()
        self._keep_within_limits()
        self._stream.forget()

    def _note(self) -> dict[str, float]:
        """What the ranks tell each other beside the sums: whether they go on, how long they took, that they agree."""
        k, decision = self.accumulation_steps, self._decision
        digest = zlib.crc32(repr((k, decision.target_batch, decision.reason, self.examples_seen)).encode())
        note = {"steps": k, "sq_steps": k**2, "digest": digest, "more": not self._stream.last}
        return {name: float(value) for name, value in note.items()} | dict(zip(_SECONDS, self._seconds, strict=True))

    def step(self) -> Decision:
        """Take the optimizer step, clear the gradients, record, choose the next ``k``.

        Returns:
            The decision for the next window.

        Raises:
            RuntimeError: If no step is due, or ``.grad`` was emptied or added to since it was the window's mean.
        """
        self._require_due("step()")
        self._restore()
        self._require_not_stepped()
        self._measure_applied()
        began = time.perf_counter()
        window = self._finished()
        skipped = self._skips(window)
        self._window.stepped = True
        applied = UNTOUCHED if skipped else self._take_step()
        self._stepper.update()
        self._clear_gradients()
        return self._finish(window, applied, skipped, began)

    def withhold_nonfinite(self) -> bool:
        """Empty ``.grad`` of a due window that is not finite, for a trainer that steps all the same.

        Optimizers leave a parameter without a gradient alone, its state included. Reads the host.

        Returns:
            Whether it was done; :meth:`record_step` is then told ``skipped=True``.

        Raises:
            RuntimeError: If no step is due.
        """
        self._require_due("withhold_nonfinite()")
        batch = self._window.norms.batch
        assert batch is not None
        if math.isfinite(batch.item()):
            return False
        withheld = not self._ranks.everyone(all_gradients_finite(self._sensor.parameters))
        if withheld:
            self._clear_gradients()
        return withheld

    def record_step(self, *, skipped: bool = False) -> Decision:
        """:meth:`step` for a trainer that stepped the optimizer and cleared the gradients itself: record and decide.

        Args:
            skipped: Whether the trainer left the step out.

        Raises:
            RuntimeError: If no step is due.
        """
        self._require_due("record_step()")
        self._clear_gradients()
        return self._finish(self._finished(), UNTOUCHED, skipped, time.perf_counter())

    def _guard_window(self) -> None:
        """Nobody steps while the window is open."""
        self._stepper.gate.refuses = None if self._trainer_steps else _STEP_WITHIN

    def _clear_gradients(self) -> None:
        """Also where ``zero_grad()`` fills with zeros."""
        self.optimizer.zero_grad()
        for p in self._sensor.parameters:
            p.grad = None

    def _measure_applied(self) -> None:
        """The norm after clipping, where somebody wrote to ``.grad`` since the window is due."""
        applied = self._sensor.applied_sq_norm(self._window)
        if applied is not None:
            self._window.extra["applied_sq_norm"] = applied

    def _finished(self) -> FinishedWindow:
        """The due window's numbers."""
        window = self._window.finished(self.optimizer.param_groups[0]["lr"])
        window.steps = window.cells if window.all_cells == self.accumulation_steps * self._ranks.world_size else 0
        return window

    def explain(self) -> str:
        """Why ``k`` is what it is, in three sentences: what was measured, what was decided, what speaks against it."""
        self._settle()
        loop, rows = self._loop, self.history.to_pandas()
        cold = self._sensor.metric == "adam" and loop.metric.weight == 0.0
        return explain(
            self.rule,
            loop.evidence(),
            loop.progress,
            self._decision,
            self.limits,
            rows,
            loop.shards,
            cold,
            self.history.unit,
        )

    def plan(self, batches: Iterable[float] | None = None, devices: int | None = None, **options: Any) -> Plan:
        """:func:`adaptbatch.plan` of the windows so far, with the seconds of a step that were measured, and the ranks.

        Raises:
            ValueError: If they hold no evidence, or an argument is out of range.
        """
        from adaptbatch.planning.advice import plan

        step = self._loop.evidence().step_seconds
        known = {"measured_on": self._ranks.world_size} | ({"seconds_per_step": step} if step > 0.0 else {})
        return plan(self.history, batches, devices, **(known | options))

    def layer_noise(self) -> dict[str, NoiseEstimate]:
        """The unbiased pair of each parameter, by name, in a due window of one micro-batch; their sum is the whole's.

        For diagnosis with ``ghost=True``, between the last :meth:`backward` and :meth:`step`: which layer carries the
        noise, which one the signal. Reads the host for every parameter.

        Raises:
            RuntimeError: If no step is due, examples are not measured, or the window has several micro-batches.
        """
        self._require_due("layer_noise()")
        population = self._loop.progress.population
        parts = self._sensor.layer_measurements(self._window)
        return {name: estimate.estimate_window(part, population) for name, part in parts.items()}

    def _skips(self, window: FinishedWindow) -> bool:
        """Whether the step is left out: its gradients are not finite, or the guard says so."""
        skips = False
        if self._reads_first:
            self._require_consistent(window)
        if self._reads_first and not window.measurement.finite:
            # Norms above 1e19 overflow in float32 though the gradient is finite: such a step is taken, not measured.
            finite = self._ranks.everyone(all_gradients_finite(self._sensor.parameters))
            skips = not finite and (self._skips_nonfinite or self.guard is not None)
        elif self.guard is not None:
            measured = self._loop.comparable(window.heard)
            level = self._loop.typical.level
            skips = measured is not None and self.guard.skips(measured, level, self._skips_in_a_row)
        self._skips_in_a_row = self._skips_in_a_row + 1 if skips else 0
        return skips

    def _take_step(self) -> Adjustment:
        """The optimizer's step, for the batch as it was decided: a partial window's is no smaller."""
        at, window = self._loop.progress, self._window
        cell = window.weight / window.all_cells if math.isnan(at.cell_examples) else at.cell_examples
        return self._stepper.step(at.accumulation_steps * cell * at.world_size, self._loop.pooled, at.population)

    # --- the end of a window ------------------------------------------------------------------------------------

    def _finish(self, window: FinishedWindow, applied: Adjustment, skipped: bool, began: float) -> Decision:
        """Count, pool, decide, record: floats only from here on."""
        self._window = OpenWindow()
        window.lr_factor = applied.lr_factor
        now = time.perf_counter()
        seconds = self._timed(now - began, began - self._ended)
        self._ended = now
        heard = [waiting for waiting in (self._late, window) if waiting is not None]
        # The newest window stays behind until the next one ends where nothing may wait for it.
        self._late = heard.pop() if self._read_late else None
        self._optimizer_step += not skipped
        finite = all(one.measurement.finite for one in heard)
        size = window.global_batch, window.all_cells, window.largest, window.ended
        loop = self._loop.counted(*size, finite, *seconds)
        memory = loop.memory(self.rule)
        for one in heard:
            if one.measurement.finite:
                loop = loop.heard(one.heard, memory)
            elif self.guard is not None:
                loop = loop.spoiled(one.global_batch, memory)
        self._loop, self._decision = loop.decided(self.rule, self.limits, self.guard)
        self._record(window, loop.evidence(), applied, skipped)
        for one in heard:
            self._amend(one)
        if not self._reads_first:
            # Too late to hold the step back, not too late to say so.
            for one in heard:
                self._require_consistent(one)
        return self._decision

    def _timed(self, step: float, rest: float) -> tuple[float, ...]:
        """Seconds of the step and of the rest: of several ranks their mean, as they told it one window later."""
        self._seconds = (step, rest)
        if not self._ranks.several:
            return self._seconds
        return tuple(self._shared[name] / self._ranks.world_size for name in _SECONDS)

    def _record(self, window: FinishedWindow, evidence: Evidence, applied: Adjustment, skipped: bool) -> None:
        self.history.append(
            decision_row(self._loop, evidence, self._decision, window.global_batch)
            | {
                "optimizer_step": self._optimizer_step,
                "backward_passes": self._backward_passes,
                "wall_seconds": time.perf_counter() - self._started,
                "accumulation_steps": window.cells,
                "lr_factor": applied.lr_factor,
                "beta2": applied_beta2(self.optimizer, applied),
                "second_moment_factor": applied.second_moment_factor,
                "skipped": skipped,
            }
        )
        window.row = len(self.history) - 1

    def _amend(self, window: FinishedWindow) -> None:
        """Fill in a row's own measurement once it is on the host."""
        if window.row is None:
            return
        measured = window.measurement
        pair = estimate.estimate_window(measured, self._loop.progress.population) if measured.finite else _NO_EVIDENCE
        self.history.amend(
            window.row,
            {
                "loss": window.loss,
                "lr": window.learning_rate,
                "grad_sq_norm": pair.grad_sq_norm,
                "noise_trace": pair.noise_trace,
                "consecutive_product": measured.consecutive_product,
                "batch_grad_norm": math.sqrt(measured.batch_sq_norm),
                "applied_grad_norm": math.sqrt(window.applied_sq_norm),
            },
        )
        window.row = None

    def _settle(self) -> None:
        if self._late is not None:
            self._amend(self._late)

    # --- parameters and hooks -----------------------------------------------------------------------------------

    def _open_window(self, loss: Tensor, weight: float) -> None:
        self._sensor.attach()
        self._sensor.require_clear()
        reference = self._expected_weight(weight) * self.accumulation_steps
        turn = self._loop.progress.window
        self._window = self._sensor.open_window(reference, self._stepper.applied, self._optimizer_step, turn=turn)
        self._window.scale = self._stepper.loss_scale(loss.device)

    def _expected_weight(self, weight: float) -> float:
        """Of a micro-batch in the window that opens with ``weight``; the same on all ranks."""
        known = self._loop.progress.cell_examples
        if not self._ranks.several:
            # One micro-batch is its own mean, bit for bit; in a window of more the first may be unlike the others.
            return weight if self.accumulation_steps == 1 or math.isnan(known) else known
        return self._ranks.sum({"weight": weight})["weight"] / self._ranks.world_size if math.isnan(known) else known

    def _restore(self) -> None:
        """Put a checkpoint's gradients in place, once model and optimizer have been loaded as well."""
        if self._restored is not None:
            self._sensor.load_state_dict(self._restored, self._window, self._stepper.applied, self._optimizer_step)
            self._restored = None

    def close(self) -> None:
        """Remove every hook; the history stays. Warns when an unfinished window's gradients are left."""
        if self._closed:
            return
        self.history.release()
        self._finalizer()
        self._closed = True
        if self._window.cells:
            warnings.warn(
                f"closed with {self._window.cells} micro-batches of an unfinished window in .grad; call close_window() "
                f"and step() before close() to use them.",
                stacklevel=2,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is not None:
            self._window = OpenWindow()
        self.close()

    # --- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything the next decision depends on, in plain ints, floats, lists and tensors, between any micro-batches.

        Within a window it holds copies of the gradients so far, in a due one of their mean: the loop that loads it asks
        :attr:`step_due` first. History rows are not in it (``history.to_parquet()``
        keeps them); their numbering goes on after a load.

        ``torch.distributed.checkpoint`` saves any of these states, and loads in place those whose keys the controller
        at hand has too: those between windows, without ``phase``. Of another it says that ``window`` or ``previous``
        is missing and changes nothing; such a checkpoint is read whole::

            dcp_to_torch_save(folder, "whole.pt")  # of torch.distributed.checkpoint.format_utils
            controller.load_state_dict(torch.load("whole.pt")["controller"])

        Raises:
            RuntimeError: After a failed backward pass, within a window of several ranks, or in a due window with a
                ``scaler``, whose own state does not say that these gradients are unscaled.
        """
        self._require_resumable("state_dict()")
        if self._window.cells:
            self._require_open()
        self._restore()
        if self._window.cells and not self._window.due:
            self._sensor.require_untouched(self._window, "state_dict()")
        return {
            "version": STATE_VERSION,
            "optimizer_step": self._optimizer_step,
            "backward_passes": self._backward_passes,
            "wall_seconds": time.perf_counter() - self._started,
            "skips_in_a_row": self._skips_in_a_row,
            "loop": self._loop.state_dict(),
            "decision": asdict(self._decision),
            "adjustment": asdict(self._stepper.applied),
            "late_window": None if self._late is None else self._late.state_dict(),
            "window": self._window.state_dict() if self._window.cells else None,
            "sensor": self._sensor.state_dict(self._window),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, to the last bit (ghost norms: estimates to rounding).

        Rows of the history that were added since it was taken are cut, so that none is there twice.

        Model and optimizer may be loaded before or after it; gradients of an open window are put in place at the next
        micro-batch. A file that was cut short fails before, in ``torch.load``, with an error of its own; a flipped bit
        that leaves a possible number is found by neither.

        Raises:
            ValueError: If the version is another, a key is unknown or missing, or a value is none that
                :meth:`state_dict` gives, named as ``state['window']['weight']``; or if an open window's gradients are
                of other parameters than those trained now. Nothing is changed then.
            RuntimeError: If a window is open.
        """
        self._require_open()
        self._require_between_windows("load_state_dict()")
        require_state(state)
        self._sensor.require_fit(state["sensor"])
        window, late = state["window"], state["late_window"]
        if window is not None and self._ranks.several:
            raise ValueError(
                f"state must be of between windows for several ranks, got one with {window['cells']} micro-batches of "
                f"an open window; save it right after step()."
            )
        loop = Loop.from_state_dict(state["loop"])
        # What the data set is and how it is measured belongs to this controller, not to the checkpoint.
        at = self._loop.progress
        progress = replace(loop.progress, population=at.population, by_example=at.by_example, world_size=at.world_size)
        self._loop = replace(loop, progress=progress)
        self._decision = Decision(**state["decision"])
        self._stepper.applied = Adjustment(**state["adjustment"])
        self._optimizer_step = int(state["optimizer_step"])
        self._backward_passes = int(state["backward_passes"])
        self._skips_in_a_row = int(state["skips_in_a_row"])
        self._started = time.perf_counter() - float(state["wall_seconds"])
        self._ended = time.perf_counter()
        self._sensor.forget()
        device = self._sensor.parameters[0].device
        self._window = OpenWindow() if window is None else OpenWindow.from_state_dict(window, device)
        self._restored = state["sensor"]
        self._late = None if late is None else FinishedWindow.from_state_dict(late)
        if window is not None and not window["due"]:
            self._guard_window()
        self._cut_history(progress.window)
        self._keep_within_limits()

    def _cut_history(self, window: int) -> None:
        """Rows of windows that come again go; ``window`` is the index of the one to come."""
        self._first_row = window - self.history.cut(window - self._first_row)

    # --- refusals -----------------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("the controller is closed and hears nothing; make a new one to go on training.")

    def _require_whole(self) -> None:
        if self._window.broken:
            raise RuntimeError("the window's last backward() failed, its gradients are incomplete; discard_window().")

    def _require_not_stepped(self) -> None:
        if self._window.stepped:
            raise RuntimeError(
                "step() was interrupted within the optimizer's step, which may have moved parameters already: a second "
                "one would apply the update twice. discard_window() goes on from the parameters as they are, or load a "
                "checkpoint."
            )
        if self._stepper.gate.passed:
            raise RuntimeError(
                "the optimizer has stepped since the window is due, and step() would apply the update twice: leave "
                "optimizer.step() to the controller, or call record_step() in a loop that steps itself."
            )

    def _require_consistent(self, window: FinishedWindow) -> None:
        """No mean is longer than the root mean square of its parts; and a single part is the mean."""
        measured = window.measurement
        if window.named().get("suspect", 0.0) > 0.0:
            raise RuntimeError(_SUSPECT)
        if not measured.finite:
            return
        mean_sq, margin = measured.mean_sq_norm, self._sensor.rounding(window.all_cells)
        if measured.batch_sq_norm > (1.0 + margin) * mean_sq:
            raise RuntimeError(_INCONSISTENT)

    def _require_due(self, call: str) -> None:
        self._require_open()
        if not self._window.due:
            raise RuntimeError(
                f"{call} is early: the window has {self._window.cells} of {self.accumulation_steps} micro-batches; "
                f"wait for step_due, or end it with close_window()."
            )

    def _require_between_windows(self, call: str) -> None:
        if self._window.cells or self._window.broken:
            raise RuntimeError(
                f"{call} is for between windows, got one with {self._window.cells} of {self.accumulation_steps} "
                f"micro-batches; call it before the first backward(), or right after step() or discard_window()."
            )

    def _require_resumable(self, call: str) -> None:
        self._require_whole()
        if self._window.due:
            self._require_not_stepped()
        if self._window.due and (self._window.scale is not None or self._trainer_steps):
            raise RuntimeError(
                f"{call} is too late in a due window whose loss scale somebody keeps account of (a GradScaler, a "
                f"trainer): call it before the window's last backward(), or after step()."
            )
        if self._ranks.several and self._window.cells:
            raise RuntimeError(
                f"{call} is for between windows on several ranks, got one with {self._window.cells} of "
                f"{self.accumulation_steps} micro-batches, whose gradients are not synchronised; call it right after "
                f"step()."
            )


def _unhook(sensor: Sensor, stepper: Stepper) -> None:
    sensor.close()
    stepper.close()


_STEP_WITHIN = (
    "optimizer.step() was called within an open window, whose gradients are no mean yet: call controller.step() once "
    "step_due is true, in place of optimizer.step()."
)
_SUSPECT = (
    "the window's gradients are not those that were measured: something adds to .grad or changes it beside the losses "
    "(zero_grad(), clipping or a write through .data within the window, a hook on accumulated gradients). Leave it "
    "out, or do it once step_due is true; discard_window() goes on without this window."
)
_INCONSISTENT = (
    "the window's mean gradient is longer than its micro-batches' gradients allow: something adds to .grad or changes "
    "it beside the losses that were measured (another loss, a penalty, a hook). Put it into the loss, or change "
    ".grad once step_due is true; discard_window() goes on without this window."
)
_NO_EVIDENCE = NoiseEstimate(grad_sq_norm=math.nan, noise_trace=math.nan)
_SECONDS = ("step_seconds", "seconds")
