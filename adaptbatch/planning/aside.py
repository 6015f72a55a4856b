"""A training set aside: what a branch may change is as before afterwards, to the last bit, however it ends."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@contextmanager
def set_aside(
    model: nn.Module, optimizer: Optimizer, generators: Iterable[torch.Generator] = ()
) -> Iterator[Callable[[], None]]:
    """Within it ``model`` may be trained, by a :func:`twin` of its optimizer; afterwards nothing has happened.

    Parameters, buffers (a replaced one included), ``.grad``, the mode of every module, and the random states of torch,
    NumPy, Python and of ``generators`` are put back, also after an error or an interrupt. Values are copied back in
    place, so that views, compiled graphs and buckets keep their storage; it costs one copy of them.

    What it does not know is other Python state of a module, such as a counter of its own.

    Yields:
        What goes back to the beginning: call it before each branch.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> before, gradient = model.weight.detach().clone(), torch.ones(1, 2)
        >>> model.weight.grad = gradient
        >>> with set_aside(model, torch.optim.SGD(model.parameters())):
        ...     model.weight.grad = None
        ...     _ = model.eval(), nn.init.zeros_(model.weight), torch.rand(3)
        >>> torch.equal(model.weight, before), model.weight.grad is gradient, model.training
        (True, True, True)
    """
    held = [p for group in optimizer.param_groups for p in group["params"]]
    parameters = list(dict.fromkeys([*model.parameters(), *held]))
    gradients = [p.grad for p in parameters]
    modules = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    tensors: list[Tensor] = [
        *parameters,
        *dict.fromkeys(buffer for _, _, own in modules for buffer in own.values() if buffer is not None),
    ]
    values = [tensor.detach().clone() for tensor in tensors]
    restore_random = _random_states(tuple(generators))

    def begin() -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.detach().copy_(value)
        for p in parameters:
            p.grad = None
        for module, training, buffers in modules:
            module.training = training
            module._buffers.update(buffers)

    try:
        yield begin
    finally:
        begin()
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        restore_random()


def twin(optimizer: Optimizer) -> Optimizer:
    """Another optimizer of the same parameters in the same state, which shares nothing else and has no hooks.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> adam = torch.optim.Adam([weight])
        >>> weight.grad = torch.ones(1)
        >>> adam.step()
        >>> other = twin(adam)
        >>> other.step()
        >>> adam.state[weight]["step"].item(), other.state[weight]["step"].item()
        (1.0, 2.0)
    """
    other = copy.copy(optimizer)
    memo: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    for name, value in vars(optimizer).items():
        # A scheduler puts its own step() on the optimizer, which would step this one.
        if name in ("state", "param_groups") or (name not in vars(other) and name != "step"):
            setattr(other, name, copy.deepcopy(value, memo))
    return other


def loader_generators(loader: object) -> list[torch.Generator]:
    """The generators that a ``DataLoader`` and its samplers draw from.

    Example:
        >>> own = torch.Generator()
        >>> data = torch.utils.data.DataLoader([1, 2, 3], shuffle=True, generator=own)
        >>> [one is own for one in loader_generators(data)]
        [True]
    """
    batches = getattr(loader, "batch_sampler", None)
    places = [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    found = [getattr(place, "generator", None) for place in places]
    return list(dict.fromkeys(one for one in found if isinstance(one, torch.Generator)))


def _random_states(generators: tuple[torch.Generator, ...]) -> Callable[[], None]:
    """What puts all random states back as they are now."""
    cpu, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    own = [generator.get_state() for generator in generators]

    def restore() -> None:
        torch.set_rng_state(cpu)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        for generator, state in zip(generators, own, strict=True):
            generator.set_state(state)

    return restore
