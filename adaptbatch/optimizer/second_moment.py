"""The optimizer's second moment: read as a metric, and kept true when the batch or ``beta2`` changes.

Adam's step is gradient descent in coordinates scaled by ``(sqrt(v) + eps)^(1/2)``: there the norm of a gradient is
``|x|_P^2 = sum_i x_i^2 / (sqrt(v_i) + eps)``, and that is the length its noise is to be compared with. Everything here
works on a plain ``torch.optim`` optimizer, between its steps, and leaves no attribute on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from adaptbatch.optimizer.learning_rate import UNTOUCHED, Adjustment, LearningRate, half_life_beta2

# Where each optimizer keeps its second moment; only exp_avg_sq is divided by 1 - beta2^t before use.
_MOMENT_KEYS: dict[type[Optimizer], str] = {
    optim.Adam: "exp_avg_sq",
    optim.AdamW: "exp_avg_sq",
    optim.NAdam: "exp_avg_sq",
    optim.RAdam: "exp_avg_sq",
    optim.RMSprop: "square_avg",
    optim.Adagrad: "sum",
}
# Before both, the second moment is the square of a few gradients and no metric.
WARM_STEPS = 10.0
WARM_MEMORIES = 0.1


class _Slot(NamedTuple):
    """One parameter's place in the optimizer."""

    group: dict[str, Any]
    state: dict[str, Any]

    def beta2(self, adjustment: Adjustment) -> float | None:
        """Decay of its second moment under ``adjustment``; None for Adagrad, which forgets nothing."""
        own = _beta2(self.group)
        return None if own is None else half_life_beta2(own, adjustment.beta2_exponent)


@torch.no_grad()
def second_moments(
    optimizer: Optimizer, parameters: Sequence[Tensor], applied: Adjustment = UNTOUCHED
) -> list[Tensor | None]:
    """The second moment that the optimizer's last step divided by the root of, for each parameter.

    ``exp_avg_sq / (1 - beta2^t)`` for Adam, AdamW, NAdam and RAdam, ``max_exp_avg_sq / (1 - beta2^t)`` with amsgrad,
    ``square_avg`` for RMSprop, less ``grad_avg^2`` when centered, and Adagrad's ``sum``.

    Args:
        optimizer: One of these.
        parameters: Parameters it holds.
        applied: The adjustment of the last step: its ``beta2`` is the one in the state.

    Returns:
        New tensors of the parameters' shapes [g^2], at least float32; None before a parameter's first step.

    Raises:
        ValueError: If the optimizer is of another kind, a parameter is complex or none of its own.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> adam = optim.Adam([weight])
        >>> weight.grad = torch.tensor([3.0, -4.0])
        >>> adam.step()
        >>> [moment.round(decimals=4).tolist() for moment in second_moments(adam, [weight])]
        [[9.0, 16.0]]
    """
    key = _metric_key(optimizer)
    return [_second_moment(slot, key, applied) for slot in _slots(optimizer, parameters)]


@torch.no_grad()
def metric_scales(
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    applied: Adjustment = UNTOUCHED,
    steps_taken: int | None = None,
) -> list[Tensor] | None:
    """``s_i = (sqrt(v_i) + eps)^(-1/2)``: the gradient times ``s`` has Euclidean norm ``|g|_P``.

    Read before a step, ``v`` is the previous step's and independent of the noise that is to be measured; the current
    one would not be. A factor that all coordinates share cancels in the noise scale, so RAdam's rectification and the
    learning rate are left out.

    Args:
        optimizer: As for :func:`second_moments`; ``eps`` is taken where its kind has it.
        parameters: Parameters that receive gradients; one that never does keeps the metric from getting warm.
        applied: The adjustment of the last step.
        steps_taken: Steps that every parameter has taken, where the optimizer counts on a GPU (fused, capturable) and
            nothing may wait for it. None reads the counts: one wait for each device.

    Returns:
        New tensors of the parameters' shapes [g^(-1/2)], float32, float64 for float64 parameters. None while a
        parameter has taken fewer than ``max(10, 0.1 / (1 - beta2))`` steps (Adagrad: 10).

    Raises:
        ValueError: As :func:`second_moments`.

    Source:
        Descent in ``P^(-1/2)`` coordinates; the full power ``P^2`` of Qiao et al. 2021 (Pollux, arXiv:2008.12260) lets
        nearly dead coordinates decide.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> adam = optim.Adam([weight], betas=(0.9, 0.99))
        >>> for _ in range(10):
        ...     assert metric_scales(adam, [weight]) is None
        ...     weight.grad = torch.tensor([4.0, 0.25])
        ...     adam.step()
        >>> metric_scales(adam, [weight])[0].round(decimals=4).tolist()
        [0.5, 2.0]
    """
    key = _metric_key(optimizer)
    slots = _slots(optimizer, parameters)
    if not slots or any(key not in slot.state for slot in slots):
        return None
    steps = _step_counts(slots) if steps_taken is None else [float(steps_taken)] * len(slots)
    if not all(_is_warm(slot.beta2(applied), t) for slot, t in zip(slots, steps, strict=True)):
        return None
    roots = [correction**0.5 for correction in _corrections(slots, key, steps, applied)]
    scales = list(torch._foreach_sqrt([_raw_moment(slot, key) for slot in slots]))
    torch._foreach_div_(scales, roots)
    # RAdam adds eps before the bias correction, the others after it.
    before = isinstance(optimizer, optim.RAdam)
    eps = [slot.group["eps"] / (root if before else 1.0) for slot, root in zip(slots, roots, strict=True)]
    torch._foreach_add_(scales, eps)
    torch._foreach_pow_(scales, -0.5)
    return scales


@contextmanager
def scaled_step(optimizer: Optimizer, adjustment: Adjustment, previous: Adjustment = UNTOUCHED) -> Iterator[None]:
    """Exactly one ``optimizer.step()`` under ``adjustment``; learning rates and betas are the user's again afterwards.

    A scheduler between the steps sees nothing. The second moment is multiplied by ``second_moment_factor``, and where
    ``beta2`` goes from ``b`` to ``b'`` after ``t`` steps also by ``(1 - b'^t) / (1 - b^t)``. The optimizer divides
    by ``1 - b'^(t+1)`` as if ``b'`` had always been there; the weights in its average do sum to that::

        b' (1 - b^t) (1 - b'^t) / (1 - b^t)  +  (1 - b')  =  1 - b'^(t+1)

    so that ``v`` stays a mean with weights that sum to one. Uncorrected, ``beta2`` from .999 to .984 after 100 steps
    makes it 8.4 times too small. RMSprop and Adagrad do not correct for the bias and are not corrected. RAdam's
    rectification takes the new ``beta2`` as if it had always been there.

    Args:
        optimizer: Any for ``lr_factor``; as for :func:`second_moments` for the rest.
        adjustment: What changes. It counts as taken also when the step is skipped inside, as a gradient scaler does.
        previous: The last adjustment that was taken.

    Raises:
        ValueError: If the optimizer lacks the second moment, or the ``beta2``, that is to change. An error inside the
            block leaves learning rates and betas as they were, the second moment to rounding.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> sgd = optim.SGD([weight], lr=0.5)
        >>> weight.grad = torch.ones(1)
        >>> with scaled_step(sgd, Adjustment(lr_factor=2.0)):
        ...     sgd.step()
        >>> weight.item(), sgd.param_groups[0]["lr"]
        (-1.0, 0.5)
    """
    factors = _second_moment_factors(optimizer, adjustment, previous)
    if adjustment.beta2_exponent != 1.0:
        _require_beta2(optimizer)
    with ExitStack() as restore:
        _scale_learning_rates(optimizer, adjustment.lr_factor, restore)
        if adjustment.beta2_exponent != 1.0:
            _set_beta2(optimizer, adjustment, restore)
        _multiply(factors)
        try:
            yield
        except BaseException:
            # The adjustment was not taken: tried again, it must not find its own factor in the state.
            _multiply([(slot, 1.0 / factor) for slot, factor in factors])
            raise


def require_coupling(optimizer: Optimizer, coupling: LearningRate) -> None:
    """Refuse, before the training starts, a coupling that :func:`scaled_step` could not carry out.

    Raises:
        ValueError: As :func:`scaled_step`.

    Example:
        >>> require_coupling(optim.SGD([torch.zeros(1)]), LearningRate("linear"))
    """
    if coupling.rescale_second_moment:
        _moment_key(optimizer, _NO_RESCALING)
    if coupling.beta2 != "fixed":
        _require_beta2(optimizer)


def require_metric(optimizer: Optimizer) -> None:
    """Refuse, before the training starts, an optimizer that :func:`metric_scales` could not read.

    Raises:
        ValueError: As :func:`metric_scales`.

    Example:
        >>> require_metric(optim.Adagrad([torch.zeros(1)]))
    """
    _metric_key(optimizer)
    _slots(optimizer, [p for group in optimizer.param_groups for p in group["params"]])


def applied_beta2(optimizer: Optimizer, adjustment: Adjustment) -> float:
    """``beta2`` of the first group under ``adjustment``; NaN where it has none.

    Example:
        >>> applied_beta2(optim.Adam([torch.zeros(1)]), UNTOUCHED)
        0.999
    """
    beta2 = _Slot(optimizer.param_groups[0], {}).beta2(adjustment)
    return math.nan if beta2 is None else beta2


_NO_RESCALING = "use LearningRate(rescale_second_moment=False)"


def _moment_key(optimizer: Optimizer, way_out: str) -> str:
    for kind, key in _MOMENT_KEYS.items():
        if isinstance(optimizer, kind):
            return key
    known = ", ".join(kind.__name__ for kind in _MOMENT_KEYS)
    raise ValueError(
        f"optimizer must be one with a second moment ({known}), got {type(optimizer).__name__}; {way_out}."
    )


def _metric_key(optimizer: Optimizer) -> str:
    return _moment_key(optimizer, 'use metric="euclidean"')


def _beta2(group: dict[str, Any]) -> float | None:
    """The group's own decay of the second moment; Adam takes one-element tensors too."""
    own = group["betas"][1] if "betas" in group else group.get("alpha")
    return None if own is None else float(own)


def _require_beta2(optimizer: Optimizer) -> None:
    way_out = 'use LearningRate(beta2="fixed")'
    _moment_key(optimizer, way_out)
    if any(_beta2(group) is None for group in optimizer.param_groups):
        raise ValueError(f"optimizer must have a beta2 (or alpha), got {type(optimizer).__name__}; {way_out}.")


def _slots(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[_Slot]:
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for p in parameters:
        if id(p) not in groups:
            raise ValueError(
                f"parameters must be held by the optimizer, got one of shape {tuple(p.shape)} that is in none of its "
                f"param_groups; add it or leave it out."
            )
        if p.is_complex():
            raise ValueError(
                f"parameters must be real for a metric, got one of {p.dtype}; train torch.view_as_real of it, or use "
                f'metric="euclidean".'
            )
    # get(): the state is a defaultdict, and a look must not leave an entry behind.
    return [_Slot(groups[id(p)], optimizer.state.get(p, {})) for p in parameters]


def _step_counts(slots: Sequence[_Slot]) -> list[float]:
    """The parameters' own step counts, with one read for each device."""
    counts = [torch.as_tensor(slot.state["step"]) for slot in slots]
    found: dict[int, float] = {}
    for device in {count.device for count in counts}:
        members = [i for i, count in enumerate(counts) if count.device == device]
        found.update(zip(members, torch.stack([counts[i] for i in members]).tolist(), strict=True))
    return [found[i] for i in range(len(counts))]


def _is_warm(beta2: float | None, steps: float) -> bool:
    return steps >= WARM_STEPS and (beta2 is None or steps * (1.0 - beta2) >= WARM_MEMORIES)


def _corrections(slots: Sequence[_Slot], key: str, steps: Sequence[float], adjustment: Adjustment) -> list[float]:
    """``1 - beta2^t``: the sum of the weights in each average, as its optimizer assumes it."""
    betas = [slot.beta2(adjustment) if key == "exp_avg_sq" else None for slot in slots]
    return [1.0 if beta2 is None else 1.0 - beta2**t for beta2, t in zip(betas, steps, strict=True)]


def _second_moment(slot: _Slot, key: str, applied: Adjustment) -> Tensor | None:
    if key not in slot.state:
        return None
    (correction,) = _corrections([slot], key, _step_counts([slot]), applied)
    # A state made ahead of the first step holds weights that sum to zero.
    return _raw_moment(slot, key) / correction if correction > 0.0 else None


def _raw_moment(slot: _Slot, key: str) -> Tensor:
    """Before the bias correction, at least float32; perhaps the state's own tensor."""
    moment: Tensor = slot.state["max_exp_avg_sq" if slot.group.get("amsgrad") else key]
    wide = moment if moment.dtype == torch.float64 else moment.float()
    if slot.group.get("centered"):
        # Below zero by rounding only.
        wide = wide.addcmul(slot.state["grad_avg"], slot.state["grad_avg"], value=-1.0).clamp_(min=0.0)
    return wide


def _second_moment_factors(
    optimizer: Optimizer, adjustment: Adjustment, previous: Adjustment
) -> list[tuple[_Slot, float | Tensor]]:
    """What each second moment is multiplied by before the step; nothing where that is 1 for all.

    Where the optimizer counts on a GPU it is a tensor there: nothing waits for it.
    """
    factor = adjustment.second_moment_factor
    changed = adjustment.beta2_exponent != previous.beta2_exponent
    if factor == 1.0 and not changed:
        return []
    key = _moment_key(optimizer, _NO_RESCALING if factor != 1.0 else 'use LearningRate(beta2="fixed")')
    slots = [
        _Slot(group, optimizer.state[p])
        for group in optimizer.param_groups
        for p in group["params"]
        if key in optimizer.state.get(p, {})
    ]
    if not changed:
        return [(slot, factor) for slot in slots]
    if key == "exp_avg_sq" and not all(_on_host(slot.state["step"]) for slot in slots):
        return [(slot, factor * _ratio(slot, adjustment, previous)) for slot in slots]
    steps = _step_counts(slots)
    new, old = (_corrections(slots, key, steps, value) for value in (adjustment, previous))
    return [(slot, factor * n / o if o > 0.0 else factor) for slot, n, o in zip(slots, new, old, strict=True)]


def _on_host(count: Tensor | float) -> bool:
    return not isinstance(count, Tensor) or count.device.type == "cpu"


@torch.no_grad()
def _ratio(slot: _Slot, adjustment: Adjustment, previous: Adjustment) -> Tensor:
    """The bias correction under ``adjustment`` over that under ``previous``, 1 before the first step."""
    count = torch.as_tensor(slot.state["step"])
    count = count.float() if count.device.type == "mps" else count.double()
    new, old = (1.0 - torch.pow(slot.beta2(value) or 0.0, count) for value in (adjustment, previous))
    return torch.where(old > 0.0, new / old, 1.0)


@torch.no_grad()
def _multiply(factors: Sequence[tuple[_Slot, float | Tensor]]) -> None:
    for (group, state), factor in factors:
        for name in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"):
            if name in state:
                state[name].mul_(factor)
        if group.get("centered"):
            # What the step divides by, square_avg - grad_avg^2, takes the factor, and the mean gradient none.
            state["square_avg"].addcmul_(state["grad_avg"], state["grad_avg"], value=1.0 - factor)


def _scale_learning_rates(optimizer: Optimizer, factor: float, restore: ExitStack) -> None:
    if factor == 1.0:
        return
    # A tensor may serve several groups, and a captured graph holds on to it: in place, once.
    tensors = {id(group["lr"]): group["lr"] for group in optimizer.param_groups if isinstance(group["lr"], Tensor)}
    for lr in tensors.values():
        restore.callback(lr.detach().copy_, lr.detach().clone())
        lr.detach().mul_(factor)
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], Tensor):
            restore.callback(group.__setitem__, "lr", group["lr"])
            group["lr"] = group["lr"] * factor


def _set_beta2(optimizer: Optimizer, adjustment: Adjustment, restore: ExitStack) -> None:
    for group in optimizer.param_groups:
        name = "betas" if "betas" in group else "alpha"
        beta2: Any = _Slot(group, {}).beta2(adjustment)
        own = group[name]
        restore.callback(group.__setitem__, name, own)
        if name == "betas":
            # Adam takes two floats or two tensors.
            group[name] = (own[0], torch.full_like(own[1], beta2) if isinstance(own[1], Tensor) else beta2)
        else:
            group[name] = beta2
