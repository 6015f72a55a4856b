"""The companion of a training loop: hears the micro-batches, normalises, steps, records and sizes the next window."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Self, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from adaptbatch import noise
from adaptbatch.checks import checked_weight, require_scalar_loss, require_single_process
from adaptbatch.explain import explain
from adaptbatch.history import History, decision_row
from adaptbatch.learning_rate import UNTOUCHED, Adjustment, LearningRate
from adaptbatch.loop import Loop, require_keys
from adaptbatch.optimizer_state import applied_beta2, require_coupling, scaled_step
from adaptbatch.probe import all_gradients_finite
from adaptbatch.records import Decision, Evidence, NoiseEstimate, Progress
from adaptbatch.rules import Guard, Limits, RelativeStandardError, Rule
from adaptbatch.sensor import Metric, Sensor
from adaptbatch.window import FinishedWindow, HostCopy, OpenWindow

STATE_VERSION = 3

Item = TypeVar("Item")


class BatchController:
    """Chooses the accumulation steps of every window from the measured gradient noise.

    It wraps nothing: model, optimizer and loader stay what they are. Between two optimizer steps, a *window*, it takes
    ``k`` micro-batches of any sizes, and ``.grad`` becomes exactly the weighted mean over the window's examples, for
    every ``k``. The next ``k`` is decided by ``rule`` from finished windows only.

    Args:
        model: The module being trained, in a single process.
        optimizer: Its optimizer; the trainable parameters in its groups are measured.
        rule: Any :class:`~adaptbatch.rules.Rule`; None is ``RelativeStandardError()``.
        limits: Bounds on ``k``; None is ``Limits()``.
        metric: ``"euclidean"``, or ``"adam"``: the decision is made in the coordinates in which the optimizer
            descends, squared gradients weighted by ``1 / (sqrt(v) + eps)`` with the second moment of the step before
            (:func:`~adaptbatch.optimizer_state.metric_scales`), once that is warm. Costs a second norm of gradients.
        population: Examples in the data set, when batches are drawn from it without replacement and its own gradient
            is the target (finite-population correction); in the unit of the weights. None: unlimited.
        ghost: Measure every example on its own, so that one micro-batch holds evidence and ``k`` may be 1; for models
            of the layers that :class:`~adaptbatch.ghost.GhostProbe` knows. ``weight`` is then the number of examples.
        learning_rate: Couples the learning rate, ``beta2`` or the second moment to the batch for the time of each
            step, unseen by schedulers; None couples nothing.
        guard: Answers exceedances of the usual gradient, and gradients that are not finite, by skipping and growing,
            whatever the rule; None leaves them to the rule. Reads the window's numbers before each step.
        phase: Measure the inner product of consecutive gradients, whose sign tells a noise floor from a transient.
            Costs a copy of the gradient.
        skip_nonfinite: Leave out a step whose gradients are not finite (one host read before each step). With False
            the step is taken as in a plain loop, and on a GPU the numbers reach the host, hence the decision, one
            window late.

    Raises:
        ValueError: If nothing is trainable, ``population`` is below 1, ``limits`` do not fit the rule, a layer has no
            ghost norms, or the optimizer has not what ``metric`` or ``learning_rate`` needs.

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
        skip_nonfinite: bool = True,
    ) -> None:
        require_single_process(model)
        if population is not None and not population >= 1.0:
            raise ValueError(
                f"population must be at least 1 example, got population = {population!r}; None: unlimited."
            )
        self.model = model
        self.optimizer = optimizer
        self.rule: Rule = RelativeStandardError() if rule is None else rule
        self.limits = (Limits() if limits is None else limits).resolve(self.rule, world_size=1, by_example=ghost)
        if learning_rate is not None:
            require_coupling(optimizer, learning_rate)
        self.guard = guard
        self._coupling = learning_rate
        self._adjustment = UNTOUCHED
        self.history = History(self._settle)
        # Both leave out steps, and so have to see a window before its step.
        self._reads_first = skip_nonfinite or guard is not None
        self._skips_in_a_row = 0
        self._started = time.perf_counter()
        self._ended = self._started
        self._closed = False
        self._optimizer_step = 0
        self._backward_passes = 0
        self._late: FinishedWindow | None = None
        self._window = OpenWindow()
        self._last_micro_batch = False
        self._scope_used: bool | None = None
        self._sensor = Sensor(
            model,
            optimizer,
            metric=metric,
            ghost=ghost,
            phase=phase,
            keep_gradients=bool(getattr(self.rule, "keeps_gradients", False)),
        )
        # On a GPU without the check before the step, nothing may wait for this window's numbers.
        self._read_late = not self._reads_first and self._sensor.parameters[0].device.type == "cuda"
        start = Progress(
            accumulation_steps=self.limits.lower,
            population=math.inf if population is None else float(population),
            by_example=ghost,
        )
        self._loop, self._decision = Loop(start).decided(self.rule, self.limits)
        # The first size is no change of one.
        self._loop = replace(self._loop, changed_at=-math.inf)

    @property
    def accumulation_steps(self) -> int:
        """``k`` of the window that is open or comes next."""
        return self._loop.progress.accumulation_steps

    @property
    def step_due(self) -> bool:
        """Whether the window has all its micro-batches and :meth:`step` is the next call."""
        return self._window.due

    # --- the loop -----------------------------------------------------------------------------------------------

    def micro_batches(self, loader: Iterable[Item]) -> Iterator[Item]:
        """Iterate over ``loader``, one item ahead, so that its last item closes the last, possibly partial, window."""
        items = iter(loader)
        missing = object()
        upcoming: Any = next(items, missing)
        try:
            while upcoming is not missing:
                item, upcoming = upcoming, next(items, missing)
                self._last_micro_batch = upcoming is missing
                self._scope_used = False
                yield item
        finally:
            self._last_micro_batch, self._scope_used = False, None

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """The scope of one micro-batch, forward and backward: at most one :meth:`backward` inside.

        Raises:
            RuntimeError: If scopes are nested.
        """
        if self._scope_used is not None:
            raise RuntimeError(
                "micro_batch() scopes must not be nested; micro_batches(loader) opens one for each item."
            )
        self._scope_used = False
        try:
            yield
        finally:
            self._scope_used = None

    def backward(self, loss: Tensor, weight: float) -> None:
        """Back-propagate one micro-batch and hear its gradient.

        Args:
            loss: Mean loss over the micro-batch; a scalar with a graph.
            weight: Examples (or tokens) that the mean is over; a positive Python number.

        Raises:
            ValueError: If ``loss`` or ``weight`` is not of that kind.
            RuntimeError: If a step is due, the micro-batch had its backward, gradients are left from before the
                window, the optimizer does not hold the model's parameters, or no gradient arrived. After an error
                within the backward pass the window's gradients are incomplete: :meth:`discard_window`.
        """
        self._require_open()
        weight = checked_weight(weight)
        require_scalar_loss(loss)
        self._require_whole()
        if self._window.due:
            raise RuntimeError("a step is due: call step() before the next backward().")
        if self._scope_used:
            raise RuntimeError(
                "one micro-batch takes one backward(): add its losses, or open a micro_batch() for each."
            )
        if self._window.cells == 0:
            self._open_window(weight)
        window = self._window
        self._sensor.hear(window, loss, weight)
        self._backward_passes += 1
        if self._scope_used is not None:
            self._scope_used = True
        window.due = self._last_micro_batch or window.cells >= self.accumulation_steps

    def close_window(self) -> None:
        """End the window with the micro-batches it has: ``step_due`` is true afterwards, unless it has none.

        At the end of a hand-written loop, whose last window may be partial or just over.

        Raises:
            RuntimeError: If the window's last backward pass failed.
        """
        self._require_whole()
        self._window.due = self._window.cells > 0

    def discard_window(self) -> None:
        """Forget the open window: gradients cleared, nothing recorded. The way on after a failed backward pass."""
        self.optimizer.zero_grad()
        self._window = OpenWindow()
        self._sensor.forget()

    def normalize_(self) -> Tensor:
        """Turn the accumulated gradients into the exact weighted mean, once; then is the time to clip.

        Returns:
            The norm of that mean gradient, before clipping: a scalar on the device.

        Raises:
            RuntimeError: If no step is due.
        """
        self._require_due("normalize_()")
        window = self._window
        if window.norms.batch is None:
            self._sensor.normalize_(window)
        assert window.norms.batch is not None
        return window.norms.batch.sqrt()

    def step(self) -> Decision:
        """Normalise if that is not done, take the optimizer step, clear the gradients, record, choose the next ``k``.

        Returns:
            The decision for the next window.

        Raises:
            RuntimeError: If no step is due.
        """
        self._require_due("step()")
        self.normalize_()
        began = time.perf_counter()
        window = self._window.finished(self.optimizer.param_groups[0]["lr"])
        skipped = self._skips(window)
        applied = UNTOUCHED if skipped else self._take_step()
        window.lr_factor = applied.lr_factor
        window.steps = window.cells if window.cells == self.accumulation_steps else 0
        self.optimizer.zero_grad()
        seconds = (time.perf_counter() - began, began - self._ended)
        self._ended = began + seconds[0]
        return self._finish(window, applied, skipped, seconds)

    def explain(self) -> str:
        """Why ``k`` is what it is, in three sentences: what was measured, what was decided, what speaks against it."""
        self._settle()
        rows = self.history.to_pandas()
        return explain(self.rule, self._loop.evidence(), self._loop.progress, self._decision, self.limits, rows)

    def layer_noise(self) -> dict[str, NoiseEstimate]:
        """The unbiased pair of each parameter, by name, in a due window of one micro-batch; their sum is the whole's.

        For diagnosis with ``ghost=True``, between the last :meth:`backward` and :meth:`step`: which layer carries the
        noise, which one the signal. Reads the host for every parameter.

        Raises:
            RuntimeError: If no step is due, examples are not measured, or the window has several micro-batches.
        """
        self.normalize_()
        population = self._loop.progress.population
        parts = self._sensor.layer_measurements(self._window)
        return {name: noise.estimate(part, population) for name, part in parts.items()}

    def _skips(self, window: FinishedWindow) -> bool:
        """Whether the step is left out: its gradients are not finite, or the guard says so."""
        skips = False
        if self._reads_first and not window.measurement.finite:
            # Norms above 1e19 overflow in float32 though the gradient is finite: such a step is taken, not measured.
            skips = not all_gradients_finite(self._sensor.parameters)
        elif self.guard is not None:
            measured = window.heard.in_metric or window.measurement
            skips = self.guard.skips(measured, self._loop.typical.level, self._skips_in_a_row)
        self._skips_in_a_row = self._skips_in_a_row + 1 if skips else 0
        return skips

    def _take_step(self) -> Adjustment:
        """The optimizer's step, under the coupling's adjustment for the batch as it was decided."""
        if self._coupling is None:
            self.optimizer.step()
            return UNTOUCHED
        progress = self._loop.progress
        known = not math.isnan(progress.cell_examples)
        cell = progress.cell_examples if known else self._window.weight / self._window.cells
        batch, evidence = progress.accumulation_steps * cell, self._loop.pooled.estimate()
        adjustment = self._coupling.adjust(batch, evidence, self._adjustment, progress.population)
        with scaled_step(self.optimizer, adjustment, self._adjustment):
            self.optimizer.step()
        self._adjustment = adjustment
        return adjustment

    # --- the end of a window ------------------------------------------------------------------------------------

    def _finish(
        self, window: FinishedWindow, applied: Adjustment, skipped: bool, seconds: tuple[float, float]
    ) -> Decision:
        """Count, pool, decide, record: floats only from here on."""
        self._window = OpenWindow()
        heard = [waiting for waiting in (self._late, window) if waiting is not None]
        # The newest window stays behind until the next one ends where nothing may wait for it.
        self._late = heard.pop() if self._read_late else None
        self._optimizer_step += not skipped
        finite = all(one.measurement.finite for one in heard)
        loop = self._loop.counted(window.global_batch, window.cells, window.largest, finite, *seconds)
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
        return self._decision

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
        pair = noise.estimate(measured, self._loop.progress.population) if measured.finite else _NO_EVIDENCE
        self.history.amend(
            window.row,
            {
                "loss": window.loss,
                "lr": window.learning_rate,
                "grad_sq_norm": pair.grad_sq_norm,
                "noise_trace": pair.noise_trace,
                "consecutive_product": measured.consecutive_product,
            },
        )
        window.row = None

    def _settle(self) -> None:
        if self._late is not None:
            self._amend(self._late)

    # --- parameters and hooks -----------------------------------------------------------------------------------

    def _open_window(self, weight: float) -> None:
        self._sensor.attach()
        if any(p.grad is not None for p in self._sensor.parameters):
            raise RuntimeError(
                "gradients are left from before this window and would enter its mean; call optimizer.zero_grad() "
                "(set_to_none=True) first. step() clears them itself."
            )
        reference = weight * self.accumulation_steps
        self._window = self._sensor.open_window(reference, self._adjustment, self._optimizer_step)

    def close(self) -> None:
        """Remove every hook; the history stays. Warns when an unfinished window's gradients are left."""
        if self._closed:
            return
        self._settle()
        self._sensor.close()
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
        """Everything the next decision depends on, in plain ints, floats and lists; between windows only.

        History rows are not in it (``history.to_parquet()`` keeps them); their numbering goes on after a load.

        Raises:
            RuntimeError: If a window is open: its gradients live in ``.grad``, which no checkpoint of model and
                optimizer holds.
        """
        self._require_between_windows("state_dict()")
        late = None
        if self._late is not None:
            numbers = [self._late.global_batch, float(self._late.pieces), *self._late.values.read()]
            late = {"names": list(self._late.names), "numbers": numbers, "lr": self._late.lr}
            late |= {"lr_factor": self._late.lr_factor, "steps": self._late.steps}
        return {
            "version": STATE_VERSION,
            "optimizer_step": self._optimizer_step,
            "backward_passes": self._backward_passes,
            "wall_seconds": time.perf_counter() - self._started,
            "skips_in_a_row": self._skips_in_a_row,
            "loop": self._loop.state_dict(),
            "decision": asdict(self._decision),
            "adjustment": asdict(self._adjustment),
            "late_window": late,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, to the last bit.

        With ``phase=True`` the first inner product after it is missing: a gradient is not part of the state.

        Raises:
            ValueError: If the version or a key is unknown, or a key is missing; nothing is changed then.
            RuntimeError: If a window is open.
        """
        self._require_between_windows("load_state_dict()")
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"state must have version {STATE_VERSION}, got version = {state.get('version')!r}; it was saved by "
                f"another release of adaptbatch, load it with that one."
            )
        require_keys("state", state, self.state_dict())
        adjustment, decision = state["adjustment"], state["decision"]
        require_keys("state['adjustment']", adjustment, asdict(UNTOUCHED))
        require_keys("state['decision']", decision, asdict(self._decision))
        late, names = state["late_window"], ("names", "numbers", "lr", "lr_factor", "steps")
        if late is not None:
            require_keys("state['late_window']", late, names)
        loop = Loop.from_state_dict(state["loop"])
        # What the data set is and how it is measured belongs to this controller, not to the checkpoint.
        at = self._loop.progress
        progress = replace(loop.progress, population=at.population, by_example=at.by_example)
        self._loop = replace(loop, progress=progress)
        self._decision = Decision(**decision)
        self._adjustment = Adjustment(**adjustment)
        self._optimizer_step = int(state["optimizer_step"])
        self._backward_passes = int(state["backward_passes"])
        self._skips_in_a_row = int(state["skips_in_a_row"])
        self._started = time.perf_counter() - float(state["wall_seconds"])
        self._ended = time.perf_counter()
        self._sensor.forget()
        self._late = None if late is None else _late_window(**late)

    # --- refusals -----------------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("the controller is closed and hears nothing; make a new one to go on training.")

    def _require_whole(self) -> None:
        if self._window.broken:
            raise RuntimeError("the window's last backward() failed, its gradients are incomplete; discard_window().")

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
                f"micro-batches, whose gradients a checkpoint would lose; call it right after step()."
            )


_NO_EVIDENCE = NoiseEstimate(grad_sq_norm=math.nan, noise_trace=math.nan)


def _late_window(
    names: Sequence[str], numbers: Sequence[float], lr: float | None, lr_factor: float, steps: int
) -> FinishedWindow:
    n, pieces, *values = numbers
    return FinishedWindow(n, 0, int(pieces), tuple(names), HostCopy.of(values), lr, lr_factor, steps=steps)
