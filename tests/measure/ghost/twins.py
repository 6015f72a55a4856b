"""Squared norms of single examples, and the slow twin that takes their gradients one by one."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from adaptbatch.measure.ghost import GhostProbe


def total_loss(output: Tensor) -> Tensor:
    """A sum over examples, with a different gradient at every element."""
    return (output.sin() + output.square()).sum()


def heard(probe: GhostProbe, loss: Tensor) -> Tensor:
    with probe.listening():
        loss.backward()
    return probe.take_example_sq_norms()


def attached(model: nn.Module) -> GhostProbe:
    probe = GhostProbe()
    probe.attach(model, torch.optim.SGD(model.parameters()))
    return probe


def twin(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """``(m,)`` for each parameter, from the gradients of the examples one by one; of a copy, which hears nothing."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            # vmap has no sparse gradients.
            module.sparse = False
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return total_loss(functional_call(model, parameters, (one[None],)))

    gradients = vmap(grad(loss), (None, 0))(trainable, x)
    return {name: each.flatten(1).double().square().sum(1) for name, each in gradients.items()}


def total_twin(model: nn.Module, x: Tensor) -> Tensor:
    """The same over all parameters."""
    return torch.stack(list(twin(model, x).values())).sum(0)


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad.to_dense() for p in model.parameters() if p.grad is not None]


def assert_exact(model: nn.Module, x: Tensor, rtol: float = 1e-9) -> GhostProbe:
    """The first, checked, micro-batch and those after it equal the twin, and leave the gradient as it is."""
    expected = twin(model, x)
    total = torch.stack(list(expected.values())).sum(0)
    bare = copy.deepcopy(model)
    total_loss(bare(x)).backward()
    probe = attached(model)
    for _ in range(2):
        model.zero_grad()
        torch.testing.assert_close(heard(probe, total_loss(model(x))), total, rtol=rtol, atol=0)
        split = probe.layer_sq_norms()
        assert split.keys() == expected.keys()
        for name, sq_norms in split.items():
            torch.testing.assert_close(sq_norms, expected[name], rtol=rtol, atol=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(gradients_of(model), gradients_of(bare), strict=True))
    return probe
