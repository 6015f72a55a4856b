"""What a training loop calls between two steps: micro-batches, their backward passes, the window's end."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from torch import Tensor

from adaptbatch.mechanics import WindowMechanics

Item = TypeVar("Item")


class WindowLoop(WindowMechanics):
    """Between two optimizer steps, a *window*, it takes :attr:`accumulation_steps` micro-batches of any sizes.

    What it sizes them by says the class that is made of it: :class:`~adaptbatch.BatchController`.
    """

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
