"""Copies of gradients, for the two measurements that squared norms cannot give; made only where they are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from adaptbatch.accumulate.gradients import wide_dtype


class WindowGradients:
    """Keeps what ``.grad`` was after each micro-batch of a window: ``K`` copies of the gradient.

    Example:
        Two micro-batches of one example, gradients (2, 0) and (0, 2), mean (1, 1): each has half its square along it.

        >>> weight = Parameter(torch.zeros(2))
        >>> kept = WindowGradients()
        >>> weight.grad = torch.tensor([2.0, 0.0])
        >>> kept.add([weight], weight=1.0)
        >>> weight.grad = torch.tensor([2.0, 2.0])
        >>> kept.add([weight], weight=1.0)
        >>> weight.grad = torch.tensor([1.0, 1.0])
        >>> kept.radial_sq_norms([weight], reference=1.0).item()
        4.0
    """

    def __init__(self) -> None:
        self.sums: list[list[Tensor | None]] = []
        self.weights: list[float] = []

    def add(self, parameters: Sequence[Parameter], weight: float) -> None:
        """Copy the gradient accumulated so far, after a micro-batch of ``weight``."""
        self.sums.append([None if p.grad is None else _dense(p.grad).clone() for p in parameters])
        self.weights.append(weight)

    def divide(self, divisor: float) -> None:
        """The accumulated gradients are divided by ``divisor``, and so are their copies."""
        self.sums = [[None if g is None else g / divisor for g in sums] for sums in self.sums]

    def radial_sq_norms(self, parameters: Sequence[Parameter], reference: float) -> Tensor:
        """``sum_c w_c <g_c, g>^2 / |g|^2`` with ``g`` the normalised mean in ``.grad``; a float64 scalar on the device.

        Args:
            parameters: Those that were given to :meth:`add`, and any that were added since, last.
            reference: What the accumulated sums are to be multiplied by to become sums over examples.
        """
        mean = [None if p.grad is None else _dense(p.grad) for p in parameters]
        ahead = torch.stack([inner_product(sums, mean) for sums in self.sums]) * reference
        # <w_c g_c, g>, from sums that hold all micro-batches so far.
        own = torch.diff(ahead, prepend=ahead.new_zeros(1))
        # Divided one by one: a tensor of the weights would wait for the device on its way there.
        parts = [part / weight for part, weight in zip(own.square(), self.weights, strict=True)]
        return torch.stack(parts).sum() / inner_product(mean, mean)


class PreviousGradient:
    """The gradient of the window before: one copy.

    Example:
        >>> weight, previous = Parameter(torch.zeros(1)), PreviousGradient()
        >>> weight.grad = torch.tensor([3.0])
        >>> previous.product([weight]) is None
        True
        >>> previous.keep([weight])
        >>> previous.product([weight]).item()
        9.0
    """

    def __init__(self) -> None:
        self.gradients: list[Tensor | None] = []

    def product(self, parameters: Sequence[Parameter]) -> Tensor | None:
        """``<g, g'>`` of the gradients in ``.grad`` and those kept; None at first, or of other parameters."""
        present = [None if p.grad is None else _dense(p.grad) for p in parameters]
        known = [None if g is None else g.shape for g in self.gradients] == [
            None if g is None else g.shape for g in present
        ]
        return inner_product(self.gradients, present) if known else None

    def keep(self, parameters: Sequence[Parameter], scale: Tensor | float = 1.0) -> None:
        """Replace what is kept by the gradients in ``.grad``, divided by ``scale``."""
        present = [None if p.grad is None else _dense(p.grad) for p in parameters]
        self.gradients = [None if g is None else g / scale if isinstance(scale, Tensor) else g.clone() for g in present]

    def forget(self) -> None:
        """As before the first call."""
        self.gradients = []


@torch.no_grad()
def inner_product(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> Tensor:
    """``sum_i <a_i, b_i>`` over the pairs that both exist, in float64 where the device has it."""
    pairs = [(x, y) for x, y in zip(a, b, strict=False) if x is not None and y is not None]
    dots = [torch.dot(_wide(x).flatten(), _wide(y).flatten()) for x, y in pairs]
    first = dots[0].device
    return torch.stack([dot.to(first, wide_dtype(first)) for dot in dots]).sum()


def _dense(grad: Tensor) -> Tensor:
    return grad.detach().to_dense() if grad.is_sparse else grad.detach()


def _wide(x: Tensor) -> Tensor:
    # Of complex gradients the real part of <x, y>: they are vectors of twice the length.
    if x.is_complex():
        return torch.view_as_real(x.resolve_conj())
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
