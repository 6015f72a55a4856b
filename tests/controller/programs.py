"""What tests of faults share: a controlled model, and the proof that a refusal's way on works."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import adaptbatch as ab
from tests.models import batches, sgd, small_model, squared


def controlled(steps: int, **options) -> ab.BatchController:
    model = small_model()
    return ab.BatchController(model, sgd(model), rule=ab.Fixed(steps), **options)


def goes_on(c: ab.BatchController) -> None:
    """The way on works: after discard_window() the next window is a plain mean."""
    c.discard_window()
    dtype = next(c.model.parameters()).dtype
    twin = small_model(dtype=dtype)
    twin.load_state_dict(c.model.state_dict())
    plain = torch.optim.SGD(twin.parameters(), lr=1.0)
    plain.load_state_dict(copy.deepcopy(c.optimizer.state_dict()))
    data = batches([4] * c.accumulation_steps, seed=7, dtype=dtype)
    for x in data:
        c.backward(squared(c.model, x), weight=4)
    c.step()
    squared(twin, torch.cat(data)).backward()
    plain.step()
    for p, q in zip(c.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def update_of(call: Callable[[], object], model: nn.Module) -> list[Tensor]:
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        # From zero, where nothing of the update is rounded off against the parameter.
        torch._foreach_zero_(parameters)
    call()
    updates = [-p.detach() for p in parameters]
    with torch.no_grad():
        torch._foreach_add_(parameters, before)
    return updates
