"""The companion of a training loop: it takes the steps, records them, and sizes the next window from the noise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from adaptbatch import checkpoint, estimate
from adaptbatch.accumulate.ranks import Ranks, Sync
from adaptbatch.checks import checked_population, require_kind, require_pair, require_shared_parameter, require_unit
from adaptbatch.estimate.listening import Listen
from adaptbatch.measure.result import PendingResult
from adaptbatch.measure.sensor import Metric
from adaptbatch.optimizer.learning_rate import UNTOUCHED, LearningRate
from adaptbatch.records import Decision, NoiseEstimate, Progress
from adaptbatch.reporting.explain import explain
from adaptbatch.reporting.history import History
from adaptbatch.rules import Guard, Limits, RelativeStandardError, Rule, decide
from adaptbatch.rules.base import resolve_listen
from adaptbatch.sizing import SizedLoop
from adaptbatch.state import State

if TYPE_CHECKING:
    from adaptbatch.planning.advice import Plan


class BatchController(SizedLoop):
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

    # --- several ranks ------------------------------------------------------------------------------------------

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
