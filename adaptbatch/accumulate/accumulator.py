"""Makes ``.grad`` the exact mean of a window, and notices whoever else writes there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from adaptbatch.accumulate.gradients import (
    MISMATCH,
    Stepped,
    copied,
    divide_gradients_,
    gradient_sq_norm,
    gradient_stamps,
)
from adaptbatch.accumulate.ranks import Ranks
from adaptbatch.accumulate.seal import GradientSeal, checks_all, rounding
from adaptbatch.accumulate.suspicion import Suspicion
from adaptbatch.accumulate.window import Window

# Times the expected weight that a micro-batch may have before the window's reference follows it.
HEAVY = 4.0


class Accumulator:
    """The gradients of one optimizer, from a window's first micro-batch to its step.

    Args:
        optimizer: Its parameters, trainable or not, are what the mean is over.
        ranks: Who trains them.

    Attributes:
        parameters: Called, those parameters.
        window: Open, or empty between windows.
        suspicion: What the checks found that only the device knows.

    Example:
        Two micro-batches, of 1 and 3 examples; each was back-propagated times its weight over the expected 2:

        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> accumulator = Accumulator(torch.optim.SGD([weight], lr=0.1), Ranks(torch.nn.ParameterList([weight])))
        >>> accumulator.open(reference=2.0)
        >>> weight.grad = torch.tensor([1.0 / 2 * 4.0 + 3.0 / 2 * 8.0])
        >>> accumulator.add(1.0)
        >>> accumulator.add(3.0)
        >>> accumulator.divide()
        2.0
        >>> weight.grad
        tensor([7.])
    """

    def __init__(self, optimizer: Optimizer, ranks: Ranks) -> None:
        self._optimizer, self._ranks = optimizer, ranks
        self.parameters = Stepped(optimizer)
        self.window = Window()
        # Only a device is worth sparing a read.
        self.suspicion = Suspicion(self.parameters()[0].device.type == "cpu")
        self._seal = GradientSeal()
        self._turn = 0
        self._checks_first = True
        self._mean_stamps: list[tuple[int, int] | None] | None = None

    # --- the window -----------------------------------------------------------------------------------------------

    def open(self, reference: float, turn: int = 0, scale: Tensor | None = None, unscales: bool = True) -> None:
        """A window of which nothing is accumulated yet.

        Args:
            reference: What a full window of equal micro-batches weighs: the division at its end is by one.
            turn: Windows before it.
            scale, unscales: Of the :class:`~adaptbatch.accumulate.window.Window`.
        """
        self.window, self._turn = Window(reference=reference, scale=scale, unscales=unscales), turn

    def close(self) -> None:
        """No window is open, and none is suspected."""
        self.window = Window()
        self.suspicion.take()

    def make_room(self, weight: float, expected: float) -> float:
        """Raise the reference of a window whose first micro-batches were light: a heavy one's loss is not blown up.

        By a power of two, so that nothing is rounded.

        Args:
            weight: Of the micro-batch to come.
            expected: What a micro-batch of the window was expected to weigh.

        Returns:
            What the gradients so far were divided by; 1: they were not.
        """
        window = self.window
        if weight <= HEAVY * expected:
            return 1.0
        factor = 2.0 ** math.ceil(math.log2(weight / expected))
        window.reference *= factor
        if window.micro_batches:
            divide_gradients_(self.parameters(), factor)
            self.seal()
        return factor

    def require_arrived(self, silent: bool) -> None:
        """After a backward pass, whose window is broken unless it left ``.grad`` alone.

        Args:
            silent: Whether no gradient was heard of.

        Raises:
            RuntimeError: If all gradients are gone, though some were computed.
        """
        window, parameters = self.window, self.parameters()
        if self._ranks.sharded:
            return
        if silent:
            window.broken = window.micro_batches > 0 and not self._seal.stamped(parameters)
        elif all(p.grad is None for p in parameters):
            raise RuntimeError(
                "no parameter has a gradient after the backward pass, though all were computed: a hook used them up, "
                "as an optimizer in the backward pass does. Take it out, the controller steps once a window; "
                "discard_window()."
            )

    def require_first(self, sq_norm: Tensor, synchronises: bool) -> None:
        """Of a window's first micro-batch, the squared norm that was measured must be that of ``.grad``."""
        if self.window.micro_batches or synchronises or self._ranks.sharded:
            return
        parameters = self.parameters()
        if self._checks_first or checks_all(self._turn) or any(p._post_accumulate_grad_hooks for p in parameters):
            self._checks_first = False
            arrived = gradient_sq_norm(parameters)
            off = (arrived - sq_norm).abs() > rounding(parameters, 1) * torch.maximum(arrived, sq_norm)
            self.suspicion.refuse_if(off, MISMATCH)

    def add(self, weight: float) -> None:
        """A micro-batch of that weight is in ``.grad`` now; :meth:`seal` it, or :meth:`divide`."""
        self.window.broken = False
        self.window.add(weight)

    def divide(self) -> float:
        """Make ``.grad`` the mean over ``window.weight``, that of all ranks; returns what it was divided by."""
        window = self.window
        divisor = window.weight / (self._ranks.world_size * window.reference)
        divide_gradients_(self.parameters(), divisor)
        return divisor

    def mark_mean(self) -> None:
        """``.grad`` is the mean now; what changes it from here on is clipping, or wrong."""
        self._mean_stamps = gradient_stamps(self.parameters())
        self.seal()
        self.window.broken, self.window.due = False, True

    def applied_sq_norm(self, batch: Tensor, elsewhere: bool) -> Tensor | None:
        """``|g|^2`` of what is in ``.grad`` now, on all ranks; None where nothing wrote to it since it is the mean.

        Sharded it is always measured, in an all-reduce of one number.

        Args:
            batch: ``|g|^2`` of the mean.
            elsewhere: Whether a gradient was computed since, in a pass of somebody else.

        Raises:
            RuntimeError: If it was emptied, or another backward pass added to it.
        """
        before, now = self._mean_stamps, gradient_stamps(self.parameters())
        # A write past the counters is looked for only where that costs no wait. Of a sharded gradient no counter sees
        # what clipping does (fused operations on DTensors), and ranks whose shards differ must not decide apart.
        sharded, world = self._ranks.sharded, self._ranks.world_size
        if not sharded and now == before and not (self.suspicion.reads_now and self._seal.rewritten()):
            return None
        if before is not None and any(b is not None and a is None for a, b in zip(now, before, strict=False)):
            raise RuntimeError(_EMPTIED)
        if elsewhere:
            raise RuntimeError(_ADDED)
        own = gradient_sq_norm(self.parameters(), ranks=self._ranks)
        # All ranks of DDP hold the same mean.
        own = own.new_tensor(self._ranks.sum({"own": own})["own"]) if sharded else own * world
        self.suspicion.refuse_if((own == 0.0) & (batch.to(own) > 0.0), _EMPTIED)
        return own

    def clear(self) -> None:
        """Empty ``.grad``, also where ``zero_grad()`` fills with zeros."""
        self._optimizer.zero_grad()
        for p in self.parameters():
            p.grad = None

    # --- who else writes there ------------------------------------------------------------------------------------

    def attached(self) -> None:
        """Parameters were hooked anew: what is trained is looked up, and the next first micro-batch checked."""
        self.parameters.forget()
        self._checks_first = True

    def require_clear(self) -> None:
        """Before a window: whatever is left in ``.grad`` is zero, as of a ``zero_grad()`` that fills, and goes.

        Raises:
            RuntimeError: If it is not.
        """
        left = [p for p in self.parameters() if p.grad is not None]
        if left and not gradient_sq_norm(self.parameters(), ranks=self._ranks) == 0.0:
            raise RuntimeError(
                "gradients are left from before this window and would enter its mean; call optimizer.zero_grad() "
                "first. step() clears them itself."
            )
        for p in left:
            p.grad = None

    def require_untouched(self, call: str, *, stamps: bool = True) -> None:
        """Refuse an open window whose gradients something else has written to since they were measured.

        Args:
            call: Who asks.
            stamps: False where DDP may lay out its buckets anew, as between two backward passes.

        Raises:
            RuntimeError: If another backward pass, ``zero_grad()`` or clipping did, or a write through ``.data``.
        """
        message = f"{call} {_TOUCHED}"
        if stamps and not self._seal.stamped(self.parameters()):
            raise RuntimeError(message)
        self.suspicion.refuse_if(self._seal.rewritten(), message)

    def rounding(self, micro_batches: int) -> float:
        """How far the squared norm of a mean of so many may be off, relatively."""
        # Communication in half precision rounds on the way.
        return 0.03 if self._ranks.several else rounding(self.parameters(), micro_batches)

    def seal(self) -> None:
        """Whatever writes to gradients from here on is somebody else."""
        self._seal.close(self.parameters(), self._turn, self.suspicion.reads_now)

    # --- checkpoint -----------------------------------------------------------------------------------------------

    def copies(self) -> list[Tensor | None] | None:
        """Of the open window's gradients, which no checkpoint of model and optimizer holds; None between windows."""
        return copied(self.parameters()) if self.window.micro_batches else None

    def restore(self, gradients: Sequence[Tensor | None] | None, turn: int) -> None:
        """Put back :meth:`copies` of the window that is open, with so many before it."""
        self._turn = turn
        if gradients is not None:
            # Parameters that were added since it was found to fit have none.
            for p, gradient in zip(self.parameters(), gradients, strict=False):
                p.grad = None if gradient is None else gradient.to(p.device, p.dtype, copy=True)
        self.seal()
        # Whether what was saved of a due window had been clipped is not known: it is measured.
        self._mean_stamps = None


_TOUCHED = (
    "found gradients that were changed within the window, by zero_grad(), unscale_(), clipping, a write through .data, "
    "a change of type or another backward pass: its mean and its noise would be wrong. The controller unscales and "
    "clears gradients, clipping waits until step_due is true, and other losses are kept off these parameters by "
    "requires_grad_(False). discard_window() goes on without this window."
)
_EMPTIED = (
    "the due window's gradients are gone, by zero_grad() or as after a step of somebody else: step() would train "
    "nothing. The controller clears gradients itself; discard_window() goes on without this window."
)
_ADDED = (
    "another backward pass added to the due window's mean: the update would be of another loss. Keep other losses off "
    "these parameters by requires_grad_(False), or put them into the loss of backward(); discard_window() goes on."
)
