"""The mechanics of a window, whoever sizes it: micro-batches in, their exact mean in ``.grad``, measured on the way."""

from __future__ import annotations

import math
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from adaptbatch.accumulate.accumulator import Accumulator
from adaptbatch.accumulate.gradients import all_gradients_finite
from adaptbatch.accumulate.ranks import Ranks
from adaptbatch.accumulate.stream import Stream
from adaptbatch.accumulate.window import Window
from adaptbatch.checks import checked_weight, require_scalar_loss
from adaptbatch.measure.sensor import Metric, Sensor
from adaptbatch.measure.sums import SavedWindow
from adaptbatch.optimizer.learning_rate import LearningRate
from adaptbatch.optimizer.step import Stepper

Item = TypeVar("Item")


class WindowLoop(ABC):
    """Between two optimizer steps, a *window*, it takes :attr:`accumulation_steps` micro-batches of any sizes.

    As soon as it has them, ``.grad`` is exactly the weighted mean over its examples, unscaled and on all ranks, and its
    norms are in the sensor's sums. How many they are, and what becomes of the sums, says the class that is made of it:
    :class:`~adaptbatch.BatchController`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        ranks: Ranks,
        *,
        metric: Metric,
        ghost: bool,
        consecutive: bool,
        keep_gradients: bool,
        scaler: GradScaler | None,
        learning_rate: LearningRate | None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self._ranks = ranks
        self._stepper = Stepper(optimizer, scaler, learning_rate)
        self._sensor = Sensor(
            model,
            optimizer,
            metric=metric,
            ghost=ghost,
            consecutive=consecutive,
            keep_gradients=keep_gradients,
            ranks=ranks,
        )
        self._accumulator = Accumulator(optimizer, ranks)
        self._stream = Stream(
            ranks,
            fills=lambda: self._window.micro_batches + 1 >= self.accumulation_steps,
            pending=lambda: self._window.micro_batches,
        )
        self._closed = False
        self._optimizer_step = 0
        self._backward_passes = 0
        self._trainer_steps = False
        self._restored: SavedWindow | None = None
        # A controller that is dropped without close(), as in a notebook cell run again, leaves no hook behind.
        self._finalizer = weakref.finalize(self, _unhook, self._sensor, self._stepper)
        self._finalizer.atexit = False

    # --- what sizes a window ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def accumulation_steps(self) -> int:
        """``k`` of the window that is open or comes next."""

    @property
    @abstractmethod
    def _known_weight(self) -> float:
        """What a micro-batch weighs, the same on all ranks; NaN before the first window."""

    @property
    @abstractmethod
    def _turn(self) -> int:
        """Windows before this one."""

    @abstractmethod
    def _keep_within_limits(self) -> None:
        """Between windows: the next one's size may have other bounds by now."""

    @abstractmethod
    def _share_sums(self) -> None:
        """Make the window's sums those of all ranks, which have to be several."""

    @property
    @abstractmethod
    def _listens(self) -> bool:
        """Whether the window that opens now is measured, and not only its mean."""

    @property
    @abstractmethod
    def _measures_shards(self) -> bool:
        """Whether this window says how much the ranks' data differ, which costs one more norm."""

    # --- the window ---------------------------------------------------------------------------------------------

    @property
    def _window(self) -> Window:
        return self._accumulator.window

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
        return self._sensor.sums["batch"].sqrt()

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

        On several ranks that is where the window's one all-reduce is (FSDP2: one more, of a number, at the step).

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
        weight = self._begin(loss, weight, unscales=True)
        try:
            scaled = self._stepper.scaled(self._share_of(loss, weight), self._window.scale)
            scaled.backward()  # type: ignore[no-untyped-call]
        finally:
            self._sensor.end_pass()
        self._end(loss, weight)

    @contextmanager
    def observe(self, loss: Tensor, weight: float) -> Iterator[Tensor]:
        """:meth:`backward` for a trainer that has a call of its own: back-propagate what this yields, once, inside.

        A ``scaler`` is left to that call: the mean in ``.grad`` keeps the loss scale until the trainer takes it out.
        Arguments and errors are those of :meth:`backward`.
        """
        self.expect_trainer()
        if self._window.micro_batches:
            self._stepper.require_scale()
        arrived: list[Tensor] = []
        weight = self._begin(loss, weight, unscales=False)
        try:
            weighted = self._share_of(loss, weight)
            handle = weighted.register_hook(arrived.append)  # type: ignore[no-untyped-call]
            yield weighted
            handle.remove()
            # A leaf stands for a loss that the trainer scales itself.
            if weighted.grad_fn is not None and not arrived:
                raise RuntimeError(
                    "observe() yields the loss to back-propagate, with the micro-batch's share of the window, and got "
                    "no backward pass through it: call backward() on what it yields, not on the loss that it was "
                    "given. discard_window() goes on without this window."
                )
        finally:
            self._sensor.end_pass()
        self._end(loss, weight)

    def _begin(self, loss: Tensor, weight: float, unscales: bool) -> float:
        """Before a backward pass; returns the weight as a Python number."""
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
        if self._window.micro_batches == 0:
            self._open_window(loss, weight, unscales)
        else:
            self._follow_window()
        several, window = self._ranks.several, self._window
        if not several:
            expected = window.reference / self.accumulation_steps
            self._sensor.rescale(self._accumulator.make_room(weight, expected))
        closes = self._stream.closes
        # Only a scope knows that this is the window's last; after a backward pass that synchronised, .grad is no
        # longer this rank's own.
        local = several and self._stream.used is not None and (window.micro_batches == 0 or not window.synced)
        window.synced = self._ranks.synchronises(closes)
        window.broken = True
        self._sensor.begin(local and closes and self._measures_shards, several and window.synced)
        return weight

    def _share_of(self, loss: Tensor, weight: float) -> Tensor:
        share = weight / self._window.reference
        return loss if share == 1.0 else loss * share

    def _end(self, loss: Tensor, weight: float) -> None:
        """After the backward pass."""
        window = self._window
        self._take(loss, weight, self._ranks.several and window.synced)
        self._guard_window()
        self._backward_passes += 1
        if self._stream.used is not None:
            self._stream.used = True
        window.ended = self._stream.last
        if window.ended or window.micro_batches >= self.accumulation_steps:
            self._complete()

    def _open_window(self, loss: Tensor, weight: float, unscales: bool) -> None:
        self._attach()
        self._accumulator.require_clear()
        reference = self._expected_weight(weight) * self.accumulation_steps
        self._sensor.open(self._stepper.applied, self._optimizer_step, self._listens)
        self._accumulator.open(reference, self._turn, self._stepper.loss_scale(loss.device), unscales)

    def _attach(self) -> None:
        self._sensor.attach()
        self._accumulator.parameters.forget()

    def _follow_window(self) -> None:
        """Before another micro-batch: what is trained may have changed, gradients may not."""
        if self._sensor.follow():
            self._accumulator.attached()
        # DDP may lay out its buckets anew between two backward passes.
        self._accumulator.require_untouched("backward()", stamps=not self._ranks.several)

    def _expected_weight(self, weight: float) -> float:
        """Of a micro-batch in the window that opens with ``weight``; the same on all ranks."""
        known = self._known_weight
        if not self._ranks.several:
            # One micro-batch is its own mean, bit for bit; in a window of more the first may be unlike the others.
            return weight if self.accumulation_steps == 1 or math.isnan(known) else known
        return self._ranks.sum({"weight": weight})["weight"] / self._ranks.world_size if math.isnan(known) else known

    def _take(self, loss: Tensor, weight: float, synchronises: bool) -> None:
        """A backward pass has ended."""
        accumulator, sensor, window = self._accumulator, self._sensor, self._window
        accumulator.require_arrived(sensor.silent)
        sq_norm = sensor.sq_norm()
        if sq_norm is not None:
            accumulator.require_first(sq_norm, synchronises)
        sensor.take(loss, weight, window.reference, sq_norm)
        accumulator.add(weight)
        sensor.keep(weight, window.reference, window.weight)

    def _complete(self) -> None:
        """The window has all its micro-batches: make ``.grad`` their mean, and measure it."""
        window, sensor, accumulator = self._window, self._sensor, self._accumulator
        window.broken = True
        if window.unscales:
            self._stepper.unscale_(window.scale)
        else:
            self._stepper.require_scale()
        sensor.measure_accumulated(window.reference)
        sensor.sums.unscale(window.scale, accumulated=not window.unscales)
        self._note_suspicion()
        if self._ranks.several:
            self._share_sums()
        sensor.sums.divide(accumulator.divide())
        sensor.end(None if window.unscales else window.scale)
        accumulator.mark_mean()
        self._stepper.gate.refuses, self._stepper.gate.passed = None, 0

    def _note_suspicion(self) -> None:
        """What could not be read goes with the sums, on every rank."""
        found = self._accumulator.suspicion.take()
        if not self._accumulator.suspicion.reads_now:
            sums = self._sensor.sums
            sums.add("suspect", sums["batch"].new_zeros(()) if found is None else found)

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
        if not self._window.micro_batches:
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
        self._accumulator.require_untouched("close_window()")
        self._window.ended = True
        self._complete()

    def discard_window(self) -> None:
        """Forget the open window: gradients cleared, nothing recorded. The way on after a failed backward pass."""
        self._stepper.abandon()
        self._accumulator.clear()
        self._ranks.forget()
        self._stepper.gate.refuses = None
        self._accumulator.close()
        self._restored = None
        self._sensor.forget()
        self._keep_within_limits()
        self._stream.forget()

    def withhold_nonfinite(self) -> bool:
        """Empty ``.grad`` of a due window that is not finite, for a trainer that steps all the same.

        Optimizers leave a parameter without a gradient alone, its state included. Reads the host.

        Returns:
            Whether it was done; :meth:`record_step` is then told ``skipped=True``.

        Raises:
            RuntimeError: If no step is due.
        """
        self._require_due("withhold_nonfinite()")
        if math.isfinite(self._sensor.sums["batch"].item()):
            return False
        withheld = not self._finite_everywhere()
        if withheld:
            self._accumulator.clear()
        return withheld

    def _finite_everywhere(self) -> bool:
        return self._ranks.everyone(all_gradients_finite(self._accumulator.parameters()))

    def _guard_window(self) -> None:
        """Nobody steps while the window is open."""
        self._stepper.gate.refuses = None if self._trainer_steps else _STEP_WITHIN

    def _measure_applied(self) -> None:
        """The norm after clipping, where somebody wrote to ``.grad`` since the window is due."""
        sums = self._sensor.sums
        applied = self._accumulator.applied_sq_norm(sums["batch"], self._sensor.elsewhere)
        self._note_suspicion()
        if applied is not None:
            sums["applied_sq_norm"] = applied

    def _restore(self) -> None:
        """Put a checkpoint's gradients in place, once model and optimizer have been loaded as well."""
        if self._restored is None:
            return
        self._attach()
        if self._restored.gradients is not None:
            self._sensor.restore(self._sensor.sums, self._stepper.applied, self._optimizer_step)
        self._accumulator.restore(self._restored.gradients, self._turn)
        self._sensor.load(self._restored)
        self._restored = None

    def close(self) -> None:
        """Remove every hook; the history stays. Warns when an unfinished window's gradients are left."""
        if self._closed:
            return
        self._finalizer()
        self._closed = True
        if self._window.micro_batches:
            warnings.warn(
                f"closed with {self._window.micro_batches} micro-batches of an unfinished window in .grad; call "
                f"close_window() and step() before close() to use them.",
                stacklevel=2,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is not None:
            self._accumulator.close()
        self.close()

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

    def _require_due(self, call: str) -> None:
        self._require_open()
        if not self._window.due:
            raise RuntimeError(
                f"{call} is early: the window has {self._window.micro_batches} of {self.accumulation_steps} "
                f"micro-batches; wait for step_due, or end it with close_window()."
            )

    def _require_between_windows(self, call: str) -> None:
        if self._window.micro_batches or self._window.broken:
            raise RuntimeError(
                f"{call} is for between windows, got one with {self._window.micro_batches} of "
                f"{self.accumulation_steps} micro-batches; call it before the first backward(), or right after step() "
                f"or discard_window()."
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
        if self._ranks.several and self._window.micro_batches:
            raise RuntimeError(
                f"{call} is for between windows on several ranks, got one with {self._window.micro_batches} of "
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
