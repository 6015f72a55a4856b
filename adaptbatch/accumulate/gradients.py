"""What is in ``.grad``: its norm, its marks, its mean, of any layout and precision, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from adaptbatch.accumulate.ranks import Ranks, local_part, unique_share

HALF = (torch.float16, torch.bfloat16)
MISMATCH = (
    "the gradient that arrived in .grad is not the one that was measured: something changes it in between, such as a "
    "hook of register_post_accumulate_grad_hook or one that registers itself in each pass. Change gradients in a hook "
    "of Tensor.register_hook, which is measured, or once step_due is true; discard_window() goes on."
)


def values_of(grad: Tensor) -> Tensor:
    """All its numbers; of a sparse gradient, duplicate entries added."""
    return grad.coalesce().values() if grad.is_sparse else grad


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Norms are float32, and float64 for gradients that are finer."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """What sums are taken in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def gradient_norm(grad: Tensor, out: Tensor | None = None) -> Tensor:
    """Euclidean norm, at least in float32, of any layout; duplicate sparse entries are added first."""
    dtype = torch.float32 if grad.dtype in HALF else None
    if out is not None and grad.dtype != out.dtype and not grad.is_complex():
        # A sharded parameter's gradient may be coarser than the parameter.
        dtype = out.dtype
    norm: Tensor = torch.linalg.vector_norm(values_of(grad), dtype=dtype, out=out)
    return norm


def sum_of_squares(norms: Sequence[Tensor]) -> Tensor:
    """``sum |x_i|^2`` of all entries, in float64 where the device has it: float32 overflows above 1e19."""
    sums = [_square_sum(norm.to(wide_dtype(norm.device))) for norm in norms]
    return sums[0] if len(sums) == 1 else torch.stack([each.to(norms[0].device) for each in sums]).sum()


def _square_sum(wide: Tensor) -> Tensor:
    # Half the time of a norm and its square.
    return wide.dot(wide) if wide.dim() else wide.square()


def gradient_sq_norm(
    parameters: Sequence[Parameter], scales: Sequence[Tensor] | None = None, ranks: Ranks | None = None
) -> Tensor:
    """This rank's part of ``|.grad|^2``, over all parameters that have one: the parts sum up to it over the ranks.

    Args:
        parameters: Of one mean, on all ranks the same.
        scales: A metric: what each gradient is multiplied by before, of its shape; None: none.
        ranks: Who trains them; None: one process.
    """
    if scales is not None:
        pairs = [(p.grad, scale) for p, scale in zip(parameters, scales, strict=True) if p.grad is not None]
        # Half-precision gradients are small times large: their product is taken in the scale's float32.
        sq_norm = sum_of_squares([gradient_norm(_dense(grad) * scale) for grad, scale in pairs])
    elif ranks is not None and ranks.sharded:
        return _sharded_sq_norm(parameters, ranks)
    else:
        sq_norm = sum_of_squares(gradient_norms(parameters))
    # All ranks of DDP hold the same mean.
    return sq_norm / ranks.world_size if ranks is not None and ranks.several else sq_norm


def _sharded_sq_norm(parameters: Sequence[Parameter], ranks: Ranks) -> Tensor:
    terms = [
        unique_share(p, ranks.world_size) * gradient_norm(local_part(p.grad)).double().square()
        for p in parameters
        if p.grad is not None
    ]
    return torch.stack(terms).sum()


def _dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.is_sparse else grad


def gradient_norms(parameters: Sequence[Parameter]) -> list[Tensor]:
    """The norms of all gradients, or of this rank's parts of them, those of one device and type in one tensor."""
    kinds: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
    for p in parameters:
        if (grad := p.grad) is not None:
            grad = grad if type(grad) is Tensor else local_part(grad)
            kinds.setdefault((grad.device, grad.dtype, grad.is_sparse), []).append(grad)
    return [_norms_of(grads) for grads in kinds.values()]


def _norms_of(grads: list[Tensor]) -> Tensor:
    """In one tensor."""
    if len(grads) == 1:
        return gradient_norm(grads[0]).reshape(1)
    if grads[0].is_sparse:
        return torch.stack([gradient_norm(grad) for grad in grads])
    return torch.stack(torch._foreach_norm(grads, 2, torch.float32 if grads[0].dtype in HALF else None))


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
    return [
        # Writes to a sharded gradient count in the DTensor, those to its local part there.
        None if g is None else (id(g), g._version if type(g) is Tensor else g._version + local_part(g)._version)
        for g in (p.grad for p in parameters)
    ]


def divide_gradients_(parameters: Sequence[Parameter], divisor: float) -> None:
    """Divide every gradient in place; by 1 it is a no-op, bit for bit."""
    if divisor == 1.0:
        return
    with torch.no_grad():
        dense = [local_part(p.grad) for p in parameters if p.grad is not None and not p.grad.is_sparse]
        if dense:
            torch._foreach_div_(dense, divisor)
        for p in parameters:
            if p.grad is not None and p.grad.is_sparse:
                p.grad.div_(divisor)


@torch.no_grad()
def all_gradients_finite(parameters: Sequence[Parameter]) -> bool:
    """The exact test, element by element; reads the host, so it is for the rare case only."""
    grads = [values_of(local_part(p.grad)) for p in parameters if p.grad is not None]
    return all(bool(torch.isfinite(grad).all()) for grad in grads)


class Stepped:
    """The parameters that an optimizer steps, trainable or not: all that a window's mean is over.

    One that is frozen or thawed within a window is part of its gradient.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._held: list[Parameter] = []

    def forget(self) -> None:
        """Look again: a parameter may have taken another's place."""
        self._held = []

    def __call__(self) -> list[Parameter]:
        held = 0
        for group in self._optimizer.param_groups:
            held += len(group["params"])
        if held != len(self._held):
            self._held = list(dict.fromkeys(p for group in self._optimizer.param_groups for p in group["params"]))
        return self._held


def copied(parameters: Sequence[Parameter]) -> list[Tensor | None]:
    """Copies of what is in ``.grad``."""
    return [None if p.grad is None else p.grad.detach().clone() for p in parameters]
