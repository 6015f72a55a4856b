"""The layers whose gradients are known by example, which term each has, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from adaptbatch.measure.ghost.terms import Lookup, Outer, Rows, Term

WAY_OUT = "use Limits(min_steps=2) without ghost=True, whose micro-batch cells measure any layer."


def _linear(module: nn.Module, name: str, x: Tensor, delta: Tensor) -> Term:
    if name == "bias":
        return Rows(positions(delta))
    return Outer(positions(delta)[:, None], positions(x)[:, None])


def positions(x: Tensor) -> Tensor:
    """``(m, ..., n)`` as ``(m, positions, n)``."""
    return x.reshape(len(x), -1, x.shape[-1])


def _conv(module: nn.Module, name: str, x: Tensor, delta: Tensor) -> Term:
    assert isinstance(module, _ConvNd)
    if name == "bias":
        return Rows(delta.flatten(2).mT)
    deltas = _grouped(delta, module.groups).flatten(3)
    return Outer(deltas.mT, _patches(module, x))


def _grouped(x: Tensor, groups: int) -> Tensor:
    """``(m, channels, ...)`` as ``(m, groups, channels / groups, ...)``."""
    return x.reshape(len(x), groups, -1, *x.shape[2:])


def _patches(conv: _ConvNd, x: Tensor) -> Tensor:
    """What each filter sees at each position: ``(m, groups, positions, inputs of a filter)``."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = _grouped(F.pad(x, conv._reversed_padding_repeated_twice, mode=mode), conv.groups)
    for axis, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), 3):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (m, groups, channels, *positions, *offsets): the channels go to the offsets.
    space = len(conv.kernel_size)
    return x.movedim(2, 2 + space).flatten(2 + space).flatten(2, 1 + space)


def _layer_norm(module: nn.Module, name: str, x: Tensor, delta: Tensor) -> Term:
    assert isinstance(module, nn.LayerNorm)
    if name == "weight":
        delta = delta * F.layer_norm(x, module.normalized_shape, eps=module.eps)
    return Rows(positions(delta.flatten(-len(module.normalized_shape))))


def _embedding(module: nn.Module, name: str, x: Tensor, delta: Tensor) -> Term:
    assert isinstance(module, nn.Embedding)
    ids, deltas = x.reshape(len(x), -1, 1), positions(delta)
    return Lookup(ids, deltas if module.padding_idx is None else deltas * (ids != module.padding_idx))


# By the function that computes them: subclasses that keep it are heard too.
TERM_OF: Mapping[Any, Callable[[nn.Module, str, Tensor, Tensor], Term]] = {
    nn.Linear.forward: _linear,
    nn.Conv1d.forward: _conv,
    nn.Conv2d.forward: _conv,
    nn.Conv3d.forward: _conv,
    nn.LayerNorm.forward: _layer_norm,
    nn.Embedding.forward: _embedding,
}


def output_axes(module: nn.Module) -> int:
    """Axes of the output for a micro-batch of single positions."""
    if isinstance(module, _ConvNd):
        return 2 + len(module.kernel_size)
    return 1 + (len(module.normalized_shape) if isinstance(module, nn.LayerNorm) else 1)


def gradient_form(module: nn.Module, name: str) -> tuple[type[Term], int]:
    """Kind of the gradient of one parameter, and its groups."""
    if name == "bias" or isinstance(module, nn.LayerNorm):
        return Rows, 1
    return (Lookup, 1) if isinstance(module, nn.Embedding) else (Outer, getattr(module, "groups", 1))


class Owner(NamedTuple):
    """A module, and by their names in it the indices of those of its own parameters that are counted."""

    label: str
    module: nn.Module
    counted: dict[str, int]


def owners_of(model: nn.Module, index: Mapping[int, int]) -> list[Owner]:
    """The modules of the model, none of them one that is refused; ``index`` is by identity of the parameter."""
    owners = []
    for path, module in model.named_modules():
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        counted = {name: index[id(p)] for name, p in own if id(p) in index}
        owners.append(Owner(f"{path or 'the model'} ({type(module).__name__})", module, counted))
        require_separable(owners[-1])
    return owners


def require_separable(owner: Owner) -> None:
    if reason := _reason_against(owner.module, owner.counted.keys()):
        raise ValueError(
            f"{owner.label} {reason}: the gradient of its trainable parameters {sorted(owner.counted)} cannot be split "
            f"by example here; {WAY_OUT}"
        )


def _reason_against(module: nn.Module, counted: Set[str]) -> str | None:
    if isinstance(module, _BatchNorm) and (counted or module.training or module.running_mean is None):
        # Without trainable parameters too: it couples the gradients of the layers before it.
        return "couples the examples of a micro-batch, unless it is frozen and in eval() mode"
    if not counted:
        return None
    if type(module).forward not in TERM_OF:
        return "is not a Linear, Conv, LayerNorm or Embedding"
    if counted - {"weight", "bias"}:
        return "has parameters besides weight and bias"
    if any(module.get_parameter(name).is_complex() for name in counted):
        return "is complex"
    if getattr(module, "scale_grad_by_freq", False):
        return "scales a token's gradient by its frequency in the micro-batch"
    return None


def shared_among(owners: list[Owner]) -> set[int]:
    """Indices of the parameters with several owners, whose uses must be added before their norm is taken."""
    uses: dict[int, list[tuple[Owner, str]]] = {}
    for owner in owners:
        for name, index in owner.counted.items():
            uses.setdefault(index, []).append((owner, name))
    shared = {index: group for index, group in uses.items() if len(group) > 1}
    for group in shared.values():
        forms = {gradient_form(owner.module, name) for owner, name in group}
        if len(forms) > 1 and forms != {(Outer, 1), (Lookup, 1)}:
            raise ValueError(
                f"{', '.join(owner.label for owner, _ in group)} share a parameter, but not the form of its gradient; "
                f"only layers of one kind (and number of groups), or a Linear and an Embedding, can share one here; "
                f"{WAY_OUT}"
            )
    return set(shared)
