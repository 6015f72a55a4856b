"""Refusals of bad input: each names the argument, its value, the bound and the way out."""

from __future__ import annotations

import inspect
import math
from numbers import Real

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer


def require_pair(model: object, optimizer: object) -> None:
    """Refuse what are no module and optimizer, in this order."""
    if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"model must be a torch.nn.Module and optimizer a torch.optim.Optimizer, got {type(model).__name__} and "
            f"{type(optimizer).__name__}; BatchController(model, optimizer) takes them in this order."
        )


def require_shared_parameter(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimizer that trains none of the model's parameters."""
    own = {id(p) for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if lazy := sum(is_lazy(p) for p in held):
        raise ValueError(
            f"model must be initialised, got {lazy} parameters of lazy layers without a shape; run one forward "
            f"pass first."
        )
    if held and not any(id(p) in own for p in held):
        raise ValueError(
            f"optimizer must hold parameters of model, got {len(held)} parameters none of which it has; make the "
            f"optimizer from model.parameters(), after the model was moved, sharded or loaded with assign=True."
        )


def require_unit(unit: object, by_example: bool = False) -> None:
    """Refuse what is no word for what weights count."""
    if not isinstance(unit, str) or not unit.replace("-", "").replace(" ", "").isalpha():
        raise ValueError(f"unit must be a word for what weights count, in the plural, got unit = {unit!r}; 'tokens'.")
    if by_example and unit != "examples":
        raise ValueError(
            f"unit must be 'examples' with ghost=True, whose weights are numbers of examples, got unit = {unit!r}; "
            f"leave it out, or weigh {unit} without ghost norms."
        )


def require_kind(name: str, value: object, kind: type, way_out: str) -> None:
    """Refuse what is neither None nor one of ``kind``, its class included."""
    if value is not None and (isinstance(value, type) or not isinstance(value, kind)):
        shown = value.__name__ if isinstance(value, type) else repr(value)
        raise TypeError(f"{name} must be a {kind.__name__} or None, got {name} = {shown}; {way_out}.")


def require_plain_step(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose step evaluates the loss itself, as often as it likes."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer must step without a closure, got {type(optimizer).__name__}, whose step() evaluates the loss "
            f"again: a window's mean and its noise are of one pass. Use a first-order optimizer."
        )


def require_scaler(scaler: object) -> None:
    """Refuse what has not a GradScaler's methods."""
    missing = [name for name in ("scale", "unscale_", "step", "update") if not hasattr(scaler, name)]
    if scaler is not None and missing:
        raise ValueError(
            f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__} without {missing}; without "
            f"loss scaling (bfloat16, float32) leave it out."
        )


def checked_population(population: float | None) -> float:
    """The examples of a data set as a float, infinite for None; refuse fewer than one."""
    if population is None:
        return math.inf
    if not isinstance(population, Real) or not population >= 1.0:
        raise ValueError(f"population must be at least 1 example, got population = {population!r}; None: unlimited.")
    return float(population)


def checked_weight(weight: float) -> float:
    """A micro-batch's weight as a float; refuse what weighs nothing, or would have to be read from a device."""
    if type(weight) is int and weight > 0:
        return float(weight)
    if isinstance(weight, Tensor):
        raise ValueError(
            "weight must be a Python number, got a tensor: reading it would stall the device; pass len(x)."
        )
    if isinstance(weight, bool) or not isinstance(weight, Real) or not (0.0 < weight < math.inf):
        raise ValueError(f"weight must be positive and finite, got weight = {weight!r}; skip an empty micro-batch.")
    return float(weight)


def require_examples(weight: float, examples: int) -> None:
    """Refuse a weight that is not the number of examples measured."""
    if weight != examples:
        raise ValueError(
            f"weight must be the number of examples with ghost=True, got weight = {weight!r} for {examples} examples; "
            f"weigh tokens without ghost norms."
        )


def require_scalar_loss(loss: Tensor) -> None:
    """Refuse what cannot be back-propagated as a mean."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        kind = (
            f"shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}" if isinstance(loss, Tensor) else repr(loss)
        )
        raise ValueError(f"loss must be a scalar tensor with a graph, the mean over the micro-batch, got {kind}.")
