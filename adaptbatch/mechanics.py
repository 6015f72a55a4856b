"""The mechanics of a window, whoever sizes it: micro-batches in, their exact mean in ``.grad``, measured on the way."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod

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


class WindowMechanics(ABC):
    """What happens to a window between a backward pass and the step: its parts, in their order, and what they refuse.

    As soon as it has its micro-batches, ``.grad`` is exactly the weighted mean over its examples, unscaled and on all
    ranks, and its norms are in the sensor's sums. How many they are, and what becomes of the sums, says the class that
    is made of it; what a loop calls is in :class:`~adaptbatch.loop.WindowLoop`.
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

    # --- what sizes a window ------------------------------------------------------------------------------------------

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

    # --- a backward pass ----------------------------------------------------------------------------------------------

    @property
    def _window(self) -> Window:
        return self._accumulator.window

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
        else:
            self._accumulator.seal()

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

    # --- refusals -----------------------------------------------------------------------------------------------------

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
