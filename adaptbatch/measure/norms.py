"""The norms of one backward pass, gradient by gradient, on the device: nothing here reads the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adaptbatch.accumulate.gradients import MISMATCH, gradient_norm, values_of


class NormBuffer:
    """The norms of one micro-batch on one device: a slot for each large gradient, one for the small ones together."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self._copies = False
        self._values = torch.zeros(size + 1, device=device, dtype=dtype)
        self._slots = self._values.unbind()
        self._held: list[tuple[Tensor, int]] = []

    def writer(self, index: int) -> Callable[[Tensor], None]:
        """What writes the norm of a gradient into its slot."""
        slot = self._slots[index]
        return lambda grad: gradient_norm(grad, slot)  # type: ignore[return-value]

    def hold(self, grad: Tensor) -> None:
        """Keep a small gradient until :meth:`norms`."""
        values = values_of(grad).flatten()
        # Autograd makes it .grad as it is, and DDP would average it in place before it is measured.
        values = values.clone() if self._copies else values
        self._held.append((values, values._version))

    def clear(self, copies: bool) -> None:
        """Nothing heard; hold small gradients as they are now, whatever becomes of them, if ``copies``."""
        self._copies = copies
        self._held.clear()
        self._values.zero_()

    def norms(self) -> Tensor:
        """All slots, those not written zero.

        Raises:
            RuntimeError: If a gradient that was held was written to meanwhile.
        """
        if self._held:
            # Where it became .grad as it is, a hook on that wrote here as well: its norm would be that of the first
            # micro-batch only.
            if any(values._version != version for values, version in self._held):
                raise RuntimeError(MISMATCH)
            one = len(self._held) == 1
            gradient_norm(self._held[0][0] if one else torch.cat([values for values, _ in self._held]), self._slots[-1])
            self._held.clear()
        return self._values


def scaled(grad: Tensor, scale: Tensor) -> Tensor:
    """A gradient in a metric: elementwise times ``scale``."""
    # Half-precision gradients are small times large: their product is taken in the scale's float32.
    return (grad.to_dense() if grad.is_sparse else grad) * scale
