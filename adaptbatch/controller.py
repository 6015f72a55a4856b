"""The companion of a training loop: it takes the steps, records them, and sizes the next window from the noise."""

from __future__ import annotations

import math
import sys
import time
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from adaptbatch import checkpoint, estimate
from adaptbatch.accumulate.ranks import Ranks, Sync, require_agreement, require_one_mean
from adaptbatch.checks import checked_population, require_kind, require_pair, require_shared_parameter, require_unit
from adaptbatch.estimate.listening import Listen
from adaptbatch.loop import WindowLoop
from adaptbatch.measure.result import PendingResult
from adaptbatch.measure.sensor import Metric
from adaptbatch.optimizer.learning_rate import UNTOUCHED, Adjustment, LearningRate
from adaptbatch.optimizer.second_moment import applied_beta2
from adaptbatch.records import Decision, NoiseEstimate, Progress, WindowCounts
from adaptbatch.reporting.explain import explain
from adaptbatch.reporting.history import History, decision_row
from adaptbatch.rules import Guard, Limits, RelativeStandardError, Rule, decide
from adaptbatch.rules.base import resolve_listen
from adaptbatch.state import State

if TYPE_CHECKING:
    from adaptbatch.planning.advice import Plan

# Windows between two measurements of how much the ranks' data differ, each of which costs one more norm.
SHARDS_EVERY = 16
_SECONDS = ("step_seconds", "seconds")


class BatchController(WindowLoop):
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
        consecutive: Measure the inner product of consecutive gradients, whose sign tells a noise floor from a
            transient (Pflug 1990). Costs a copy of the gradient.
        skip_nonfinite: Leave out a step whose gradients are not finite (one host read before each step). With False
            the step is taken as in a plain loop, and on a GPU the numbers reach the host, hence the decision, one
            window late.
        unit: What weights count, for whoever reads: ``"tokens"``. Columns keep their names.
        listen: How many windows are measured: a share of them, or ``"auto"``, all while the noise scale is not known
            well and after every change of ``k``, else one in two to four; all of them where ``rule`` does not decide on
            pooled moments, or with a ``guard`` or ``consecutive``. Of the others only ``|g|^2`` is known, and their
            rows hold NaN. See :func:`~adaptbatch.estimate.listens`.

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
        consecutive: bool = False,
        scaler: GradScaler | None = None,
        process_group: Any = None,
        sync: Sync = "last",
        skip_nonfinite: bool = True,
        unit: str = "examples",
        listen: Listen = "auto",
    ) -> None:
        require_unit(unit, ghost)
        require_pair(model, optimizer)
        require_shared_parameter(model, optimizer)
        require_kind(
            "rule", rule, Rule, "RelativeStandardError() is the default, Fixed(4) takes 4 micro-batches always"
        )
        require_kind("guard", guard, Guard, "Guard() is the usual one")
        require_kind("learning_rate", learning_rate, LearningRate, "the optimizer has the rate, this couples it")
        size = checked_population(population)
        self.rule: Rule = RelativeStandardError() if rule is None else rule
        self.guard = guard
        self._listen = resolve_listen(
            listen, self.rule, "guard" if guard is not None else "consecutive" if consecutive else ""
        )
        self._ranks = ranks = Ranks(model, process_group, sync)
        self._by_example = ghost
        if limits is None:
            # An open-loop rule is bounded by itself.
            limits = Limits() if self.rule.closed_loop or guard is not None else Limits(max_steps=sys.maxsize)
        self._limits = self._resolved(limits)
        super().__init__(
            model,
            optimizer,
            ranks,
            metric=metric,
            ghost=ghost,
            consecutive=consecutive,
            keep_gradients=bool(getattr(self.rule, "keeps_gradients", False)),
            scaler=scaler,
            learning_rate=learning_rate,
        )
        self.history = History(self._settle, unit)
        # All leave out steps, and so have to see a window before its step; several ranks see it when they agree on it.
        self._reads_first = skip_nonfinite or guard is not None or scaler is not None or ranks.several
        self._skips_nonfinite = skip_nonfinite or scaler is not None
        self._skips_in_a_row = 0
        # On a GPU without the check before the step, nothing may wait for this window's numbers.
        self._read_late = not self._reads_first and self._accumulator.parameters()[0].device.type == "cuda"
        self._late: PendingResult | None = None
        self._seconds = (0.0, 0.0)
        self._shared: dict[str, float] = {}
        self._started = self._ended = time.perf_counter()
        # The index of the window in the history's first row.
        self._first_row = 0
        progress = Progress(
            accumulation_steps=self.limits.lower,
            population=size,
            by_example=ghost,
            world_size=ranks.world_size,
        )
        state = State(progress)
        self._decision = decide(self.rule, state.evidence(), progress, self.limits)
        self._state = state.sized(self._decision.accumulation_steps, state.evidence(), self._listen)

    def __repr__(self) -> str:
        micro_batches = f"{self._window.micro_batches} of {self.accumulation_steps} micro-batches"
        state = "closed" if self._closed else micro_batches
        return f"BatchController({self.rule!r}, {state}, {self._optimizer_step} steps)"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a BatchController listens to one process's model and cannot be copied or pickled; take state_dict(), or "
            "its history."
        )

    # --- the size of a window -----------------------------------------------------------------------------------

    @property
    def accumulation_steps(self) -> int:
        """``k`` of the window that is open or comes next."""
        return self._state.progress.accumulation_steps

    @property
    def examples_seen(self) -> float:
        """Sum of all weights in finished windows, on all ranks, skipped ones included."""
        return self._state.progress.examples_seen

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
        if not (self._window.micro_batches or self._window.broken or self._stream.used is False):
            self._state, self._decision = self._state.limited(self._decision, self._limits)

    @property
    def _known_weight(self) -> float:
        return self._state.progress.micro_batch_examples

    @property
    def _turn(self) -> int:
        return self._state.progress.window

    @property
    def _listens(self) -> bool:
        return self._state.progress.listens

    @property
    def _measures_shards(self) -> bool:
        return self._turn % SHARDS_EVERY == 0

    # --- the end of a window ------------------------------------------------------------------------------------

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
        pending = self._pending()
        skipped = self._skips(pending)
        self._window.stepped = True
        applied = UNTOUCHED if skipped else self._take_step()
        self._stepper.update()
        self._accumulator.clear()
        return self._finish(pending, applied, skipped, began)

    def record_step(self, *, skipped: bool = False) -> Decision:
        """:meth:`step` for a trainer that stepped the optimizer and cleared the gradients itself: record and decide.

        Args:
            skipped: Whether the trainer left the step out.

        Raises:
            RuntimeError: If no step is due.
        """
        self._require_due("record_step()")
        self._accumulator.clear()
        return self._finish(self._pending(), UNTOUCHED, skipped, time.perf_counter())

    def _pending(self) -> PendingResult:
        """The due window's numbers, on their way."""
        window = self._window
        full = window.all_micro_batches == self.accumulation_steps * self._ranks.world_size
        lr = self.optimizer.param_groups[0]["lr"]
        return PendingResult.of(self._sensor.sums, window, lr, window.micro_batches if full else 0)

    def _skips(self, pending: PendingResult) -> bool:
        """Whether the step is left out: its gradients are not finite, or the guard says so."""
        skips = False
        if self._reads_first:
            self._require_consistent(pending)
        if self._reads_first and not pending.result.measurement.finite:
            # Norms above 1e19 overflow in float32 though the gradient is finite: such a step is taken, not measured.
            skips = not self._finite_everywhere() and (self._skips_nonfinite or self.guard is not None)
        elif self.guard is not None:
            measured = self._state.comparable(pending.result)
            level = self._state.typical.level
            skips = measured is not None and self.guard.skips(measured, level, self._skips_in_a_row)
        self._skips_in_a_row = self._skips_in_a_row + 1 if skips else 0
        return skips

    def _require_consistent(self, pending: PendingResult) -> None:
        """No mean is longer than the root mean square of its parts; and a single part is the mean."""
        if pending.suspect:
            raise RuntimeError(_SUSPECT)
        measured = pending.result.measurement
        margin = self._accumulator.rounding(pending.micro_batches)
        if measured.finite and measured.batch_sq_norm > (1.0 + margin) * measured.mean_sq_norm:
            raise RuntimeError(_INCONSISTENT)

    def _take_step(self) -> Adjustment:
        """The optimizer's step, for the batch as it was decided: a partial window's is no smaller."""
        at, window = self._state.progress, self._window
        known = at.micro_batch_examples
        each = window.weight / window.all_micro_batches if math.isnan(known) else known
        return self._stepper.step(at.accumulation_steps * each * at.world_size, self._state.pooled, at.population)

    def _finish(self, pending: PendingResult, applied: Adjustment, skipped: bool, began: float) -> Decision:
        """Count, pool, decide, record: floats only from here on."""
        window, now = self._window, time.perf_counter()
        self._accumulator.close()
        pending.lr_factor = applied.lr_factor
        seconds = self._timed(now - began, began - self._ended)
        self._ended = now
        arrived = [one for one in (self._late, pending) if one is not None]
        # The newest window stays behind until the next one ends where nothing may wait for it.
        self._late = arrived.pop() if self._read_late else None
        self._optimizer_step += not skipped
        counts = WindowCounts(window.weight, window.all_micro_batches, window.largest, window.ended, *seconds)
        results = [one.result for one in arrived]
        self._state, evidence, self._decision = self._state.advance(
            counts, results, self.rule, self.limits, self.guard, self._listen
        )
        row = decision_row(self._state, evidence, self._decision, window.weight)
        row |= self._account(applied, skipped) | {"accumulation_steps": window.micro_batches}
        self.history.append(row)
        pending.row = len(self.history) - 1
        for one in arrived:
            self.history.fill(one, self._state.progress.population)
        if not self._reads_first:
            # Too late to hold the step back, not too late to say so.
            for one in arrived:
                self._require_consistent(one)
        return self._decision

    def _account(self, applied: Adjustment, skipped: bool) -> dict[str, Any]:
        """The part of a row that is known without any measurement."""
        return {
            "optimizer_step": self._optimizer_step,
            "backward_passes": self._backward_passes,
            "wall_seconds": time.perf_counter() - self._started,
            "lr_factor": applied.lr_factor,
            "beta2": applied_beta2(self.optimizer, applied),
            "second_moment_factor": applied.second_moment_factor,
            "skipped": skipped,
        }

    def _settle(self) -> None:
        if self._late is not None:
            self.history.fill(self._late, self._state.progress.population)

    # --- several ranks ------------------------------------------------------------------------------------------

    def _share_sums(self) -> None:
        window, sums, note = self._window, self._sensor.sums, self._note()
        spread = {"sq_batch": sums["batch"].square()}
        self._shared = self._ranks.sum({**window.own(), "cells": sums.cells, **sums, **spread, **note})
        window.share(self._shared, self._ranks.world_size)
        sums.share(self._shared)
        # Where DDP holds it whole, each rank's part is of the same mean.
        if not self._ranks.sharded:
            require_one_mean(self._ranks, self._shared["batch"], self._shared["sq_batch"])
        require_agreement(self._ranks, note, self._shared)
        if self._shared["more"] < self._ranks.world_size:
            self._stream.end()

    def _note(self) -> dict[str, float]:
        """What the ranks tell each other beside the sums: whether they go on, how long they took, that they agree."""
        k, decision = self.accumulation_steps, self._decision
        digest = zlib.crc32(repr((k, decision.target_batch, decision.reason, self.examples_seen)).encode())
        note = {"steps": k, "sq_steps": k**2, "digest": digest, "more": not self._stream.last}
        return {name: float(value) for name, value in note.items()} | dict(zip(_SECONDS, self._seconds, strict=True))

    def _timed(self, step: float, rest: float) -> tuple[float, ...]:
        """Seconds of the step and of the rest: of several ranks their mean, as they told it one window later."""
        self._seconds = (step, rest)
        if not self._ranks.several:
            return self._seconds
        return tuple(self._shared[name] / self._ranks.world_size for name in _SECONDS)

    # --- what was measured --------------------------------------------------------------------------------------

    def explain(self) -> str:
        """Why ``k`` is what it is, in three sentences: what was measured, what was decided, what speaks against it."""
        self._settle()
        asks, rows = self._sensor.metric == "adam", self.history.to_pandas()
        return explain(self.rule, self._state, self._decision, self.limits, rows, asks, self.history.unit)

    def plan(self, batches: Iterable[float] | None = None, devices: int | None = None, **options: Any) -> Plan:
        """:func:`adaptbatch.plan` of the windows so far, with the seconds of a step that were measured, and the ranks.

        Raises:
            ValueError: If they hold no evidence, or an argument is out of range.
        """
        from adaptbatch.planning.advice import plan

        step = self._state.evidence().step_seconds
        known = {"measured_on": self._ranks.world_size} | ({"seconds_per_step": step} if step > 0.0 else {})
        return plan(self.history, batches, devices, **(known | options))

    def layer_noise(self) -> dict[str, NoiseEstimate]:
        """The unbiased pair of each parameter, by name, in a due window of one micro-batch; their sum is the whole's.

        For diagnosis with ``ghost=True``, between the last :meth:`backward` and :meth:`step`: which layer carries the
        noise, which one the signal. Reads the host for every parameter.

        Raises:
            RuntimeError: If no step is due, examples or this window are not measured, or it has several micro-batches.
        """
        self._require_due("layer_noise()")
        parts = self._sensor.layer_measurements(self._window)
        population = self._state.progress.population
        return {name: estimate.estimate_window(part, population) for name, part in parts.items()}

    def close(self) -> None:
        """Remove every hook; the history stays. Warns when an unfinished window's gradients are left."""
        self.history.release()
        super().close()

    # --- checkpoint ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything the next decision depends on, in plain ints, floats, lists and tensors, between any micro-batches.

        Within a window it holds copies of the gradients so far, in a due one of their mean: the loop that loads it asks
        :attr:`step_due` first. History rows are not in it (``history.to_parquet()``
        keeps them); their numbering goes on after a load.

        ``torch.distributed.checkpoint`` saves any of these states, and loads in place those whose keys the controller
        at hand has too: those between windows, without ``consecutive``. Of another it says that ``window`` or
        ``previous`` is missing and changes nothing; such a checkpoint is read whole::

            dcp_to_torch_save(folder, "whole.pt")  # of torch.distributed.checkpoint.format_utils
            controller.load_state_dict(torch.load("whole.pt")["controller"])

        Raises:
            RuntimeError: After a failed backward pass, within a window of several ranks, or in a due window with a
                ``scaler``, whose own state does not say that these gradients are unscaled.
        """
        return checkpoint.take(self)

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
        checkpoint.put(self, state)


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
