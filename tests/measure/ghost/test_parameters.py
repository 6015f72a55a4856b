"""Which parameters count: frozen, thawed, held by nobody, gone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adaptbatch.measure.ghost import GhostProbe
from tests.measure.ghost.twins import assert_exact, attached, heard, total_loss, total_twin, twin


@pytest.mark.parametrize("frozen", [["0.weight"], ["0.bias"], ["0.weight", "0.bias"], ["2.weight", "0.bias"]])
def test_frozen_parameters_are_not_counted(frozen):
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    assert_exact(model, torch.randn(6, 5).double())


def test_parameters_that_the_optimizer_lacks_are_not_counted():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.PReLU(), nn.Linear(4, 3)).double(), torch.randn(6, 5).double()
    expected = twin(model, x)
    probe = GhostProbe()
    probe.attach(model, torch.optim.SGD([model[0].weight, model[2].bias]))
    for _ in range(2):
        found = heard(probe, total_loss(model(x)))
        torch.testing.assert_close(found, expected["0.weight"] + expected["2.bias"], rtol=1e-9, atol=0)
    assert probe.layer_sq_norms().keys() == {"0.weight", "2.bias"}


def test_a_layer_that_took_no_part_is_zero():
    model, x = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}), torch.randn(4, 3)
    probe = attached(model)
    for _ in range(2):
        found = heard(probe, total_loss(model["used"](x)))
        split = probe.layer_sq_norms()
        assert split["idle.weight"].tolist() == split["idle.bias"].tolist() == [0.0] * 4
        torch.testing.assert_close(split["used.weight"] + split["used.bias"], found)


def test_a_parameter_that_thaws_between_windows_is_heard_at_once():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(), torch.randn(6, 5).double()
    model[0].requires_grad_(False)
    probe, optimizer = attached(model), torch.optim.SGD(model.parameters())
    heard(probe, total_loss(model(x)))
    model[0].requires_grad_(True)
    loss = total_loss(model(x))
    # The controller attaches at the window's first backward, after its forward pass.
    probe.attach(model, optimizer)
    found = heard(probe, loss)
    probe.close()
    torch.testing.assert_close(found, total_twin(model, x), rtol=1e-9, atol=0)


def test_attaching_again_is_a_no_op_until_a_parameter_changes():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    probe = attached(model)
    hooks = dict(model._forward_hooks)
    heard(probe, total_loss(model(x)))
    probe.attach(model, torch.optim.SGD(model.parameters()))
    assert dict(model._forward_hooks) == hooks
    # No second check.
    assert not model.weight._backward_hooks
    model.double()
    probe.attach(model, torch.optim.SGD(model.parameters()))
    assert model.weight._backward_hooks
    assert heard(probe, total_loss(model(x.double()))).shape == (4,)


def test_a_layer_that_is_gone_is_unhooked():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    probe, gone = attached(model), model[0]
    model[0] = nn.Linear(3, 3)
    probe.attach(model, torch.optim.SGD(model.parameters()))
    assert not gone._forward_hooks
    assert heard(probe, total_loss(model(torch.randn(4, 3)))).shape == (4,)
