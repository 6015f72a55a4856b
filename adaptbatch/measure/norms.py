"""Norms of gradients, of any layout and precision, on the device: nothing here reads the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from adaptbatch.accumulate.ranks import local_part

HALF = (torch.float16, torch.bfloat16)


class NormBuffer:
    """The norms of one micro-batch on one device: a slot for each large gradient, one for the small ones together."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self._copies = False
        self._values = torch.zeros(size + 1, device=device, dtype=dtype)
        self._slots = self._values.unbind()
        self._held: list[Tensor] = []

    def writer(self, index: int) -> Callable[[Tensor], None]:
        """What writes the norm of a gradient into its slot."""
        slot = self._slots[index]
        return lambda grad: gradient_norm(grad, slot)  # type: ignore[return-value]

    def hold(self, grad: Tensor) -> None:
        """Keep a small gradient until :meth:`norms`."""
        values = _values(grad).flatten()
        # Autograd makes it .grad as it is, and DDP would average it in place before it is measured.
        self._held.append(values.clone() if self._copies else values)

    def clear(self, copies: bool) -> None:
        """Nothing heard; hold small gradients as they are now, whatever becomes of them, if ``copies``."""
        self._copies = copies
        self._held.clear()
        self._values.zero_()

    def norms(self) -> Tensor:
        """All slots, those not written zero."""
        if self._held:
            gradient_norm(torch.cat(self._held), self._slots[-1])
            self._held.clear()
        return self._values


def scaled(grad: Tensor, scale: Tensor) -> Tensor:
    # Half-precision gradients are small times large: their product is taken in the scale's float32.
    return (grad.to_dense() if grad.is_sparse else grad) * scale


def _values(grad: Tensor) -> Tensor:
    return grad.coalesce().values() if grad.is_sparse else grad


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Norms are float32, and float64 for gradients that are finer."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def gradient_norm(grad: Tensor, out: Tensor | None = None) -> Tensor:
    """Euclidean norm, at least in float32, of any layout; duplicate sparse entries are added first."""
    dtype = torch.float32 if grad.dtype in HALF else None
    if out is not None and grad.dtype != out.dtype and not grad.is_complex():
        # A sharded parameter's gradient may be coarser than the parameter.
        dtype = out.dtype
    norm: Tensor = torch.linalg.vector_norm(_values(grad), dtype=dtype, out=out)
    return norm


def sum_of_squares(norms: Sequence[Tensor]) -> Tensor:
    """``sum |x_i|^2`` of all entries, in float64 where the device has it: float32 overflows above 1e19."""
    first = norms[0].device
    wide = torch.float32 if first.type == "mps" else torch.float64
    sums = [norm.to(wide).square().sum().to(first) for norm in norms]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def batch_gradient_sq_norm(parameters: Sequence[Parameter], scales: Sequence[Tensor] | None = None) -> Tensor:
    """Squared norm of the accumulated gradient, over all parameters that have one; times ``scales``, if given."""
    if scales is not None:
        pairs = [(p.grad, scale) for p, scale in zip(parameters, scales, strict=True) if p.grad is not None]
        return sum_of_squares([gradient_norm(scaled(grad, scale)) for grad, scale in pairs])
    return sum_of_squares(gradient_norms(parameters))


def gradient_norms(parameters: Sequence[Parameter]) -> list[Tensor]:
    """The norms of all gradients, or of this rank's parts of them, those of one device and type in one tensor."""
    kinds: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            grad = local_part(p.grad)
            kinds.setdefault((grad.device, grad.dtype, grad.is_sparse), []).append(grad)
    return [torch.stack(_norms_of(grads)) for grads in kinds.values()]


def _norms_of(grads: list[Tensor]) -> list[Tensor]:
    if grads[0].is_sparse:
        return [gradient_norm(grad) for grad in grads]
    return list(torch._foreach_norm(grads, 2, torch.float32 if grads[0].dtype in HALF else None))


def gradient_stamps(parameters: Sequence[Parameter]) -> list[tuple[int, int] | None]:
    """Which tensors are in ``.grad`` and how often each was written to; reads no value.

    Example:
        >>> weight = Parameter(torch.ones(1))
        >>> weight.sum().backward()
        >>> before = gradient_stamps([weight])
        >>> _ = torch.nn.utils.clip_grad_norm_([weight], 0.5)
        >>> gradient_stamps([weight]) == before
        False
    """
    # Writes to a sharded gradient count in the DTensor, those to its local part there.
    return [None if g is None else (id(g), g._version + local_part(g)._version) for g in (p.grad for p in parameters)]


@torch.no_grad()
def divide_gradients_(parameters: Sequence[Parameter], divisor: float) -> None:
    """Divide every gradient in place; by 1 it is a no-op, bit for bit."""
    if divisor == 1.0:
        return
    dense = [local_part(p.grad) for p in parameters if p.grad is not None and not p.grad.is_sparse]
    if dense:
        torch._foreach_div_(dense, divisor)
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            p.grad.div_(divisor)


@torch.no_grad()
def all_gradients_finite(parameters: Sequence[Parameter]) -> bool:
    """The exact test, element by element; reads the host, so it is for the rare case only."""
    grads = [_values(local_part(p.grad)) for p in parameters if p.grad is not None]
    return all(bool(torch.isfinite(grad).all()) for grad in grads)
