"""probe.py: the hooks hear what they claim, on every kind of parameter a model may have."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from adaptbatch.accumulate.gradients import (
    all_gradients_finite,
    divide_gradients_,
    gradient_norm,
    gradient_sq_norm,
    sum_of_squares,
)
from adaptbatch.measure.probe import GradientProbe
from tests import reference
from tests.models import Checkpointed, TiedLanguageModel


def heard(probe: GradientProbe, loss: Tensor) -> float:
    with probe.listening():
        loss.backward()
    return float(probe.take_sq_norm())


def attached(model: nn.Module) -> GradientProbe:
    probe = GradientProbe()
    probe.attach(model, torch.optim.SGD(model.parameters()))
    return probe


def accumulated(model: nn.Module) -> float:
    return sum(float(p.grad.to_dense().double().square().sum()) for p in model.parameters() if p.grad is not None)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_each_backward_is_heard_before_it_is_accumulated():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 5)
    twin = (reference.per_example_gradients(model, lambda m, one: m(one).square().sum(), x) ** 2).sum(axis=1)
    probe = attached(model)
    found = [heard(probe, model(one[None]).square().sum()) for one in x]
    assert found == pytest.approx(twin.tolist(), rel=1e-6)
    assert accumulated(model) != pytest.approx(found[-1])


def test_a_tied_weight_is_heard_once_with_the_sum_of_its_uses():
    model = TiedLanguageModel()
    loss = model(torch.tensor([1, 2, 2])).square().sum()
    assert heard(attached(model), loss) == pytest.approx(accumulated(model), rel=1e-6)


def test_sparse_gradients_are_coalesced_first():
    model = TiedLanguageModel(sparse=True)
    # Token 2 thrice: its uncoalesced entries add up before they are squared.
    loss = model(torch.tensor([1, 2, 2, 2])).square().sum()
    assert heard(attached(model), loss) == pytest.approx(accumulated(model), rel=1e-6)
    assert model.embedding.weight.grad.is_sparse


def test_frozen_and_unused_parameters_are_silent():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "frozen": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    model["frozen"].requires_grad_(False)
    x = torch.randn(4, 3)
    loss = (model["used"](x) + model["frozen"](x)).square().sum()
    assert heard(attached(model), loss) == pytest.approx(accumulated(model), rel=1e-6)


def test_two_forwards_and_one_backward_are_one_gradient():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    loss = model(x).square().sum() + model(x + 1).square().sum()
    assert heard(attached(model), loss) == pytest.approx(accumulated(model), rel=1e-6)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_right_or_refused(reentrant, shared):
    model = Checkpointed(reentrant, shared)
    probe, loss = attached(model), model(torch.randn(3, 4, requires_grad=True)).square().sum()
    if reentrant and shared:
        with pytest.raises(RuntimeError, match=r"in several parts .* use checkpoint\(\.\.\., use_reentrant=False\)"):
            heard(probe, loss)
    else:
        assert heard(probe, loss) == pytest.approx(accumulated(model), rel=1e-6)


def test_listens_only_when_told():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    probe = attached(model)
    torch.autograd.grad(model(x).sum(), list(model.parameters()))
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="no hook heard a gradient in this backward pass: the loss does not reach"):
        probe.take_sq_norm()
    with probe.listening():
        pass
    with pytest.raises(RuntimeError, match="no hook heard a gradient"):
        probe.take_sq_norm()


def test_a_failed_backward_leaves_nothing_behind():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    probe = attached(model)

    def explode(grad: Tensor) -> None:
        raise ArithmeticError("boom")

    y = model(x)
    handle = model.weight.register_hook(explode)
    with pytest.raises(ArithmeticError, match="boom"), probe.listening():
        y.sum().backward()
    handle.remove()
    model.zero_grad()
    assert heard(probe, model(x).sum()) == pytest.approx(accumulated(model), rel=1e-6)


def test_closing_leaves_no_trace():
    model = nn.Linear(3, 2)
    before = {id(p): dict(p.__dict__) for p in model.parameters()}
    probe = attached(model)
    assert all(p._backward_hooks for p in model.parameters())
    probe.close()
    assert all(not p._backward_hooks for p in model.parameters())
    assert {id(p): dict(p.__dict__) for p in model.parameters()} == before


def test_copies_and_pickles_are_clean():
    model = nn.Linear(3, 2)
    attached(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(not p._backward_hooks for p in other.parameters())


def test_attaching_again_is_a_no_op_until_a_parameter_changes():
    model = nn.Linear(3, 2)
    probe = attached(model)
    hooks = dict(model.weight._backward_hooks)
    probe.attach(model, torch.optim.SGD(model.parameters()))
    assert dict(model.weight._backward_hooks) == hooks
    probe.attach(model, torch.optim.SGD([model.bias]))
    assert not model.weight._backward_hooks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_norms_are_float32(dtype):
    grad = torch.full((1000,), 300.0, dtype=dtype)
    # 300^2 * 1000 is far above float16's 65504.
    assert gradient_norm(grad).dtype == torch.float32
    assert float(gradient_norm(grad)) == pytest.approx(300 * 1000**0.5, rel=1e-3)


def test_squares_of_large_norms_do_not_overflow():
    assert float(sum_of_squares([torch.tensor(1e30), torch.tensor(1e30)])) == pytest.approx(2e60)


def test_the_accumulated_gradient_dense_and_sparse():
    model = TiedLanguageModel(sparse=True)
    for tokens in ([1, 2, 2], [2, 3]):
        model(torch.tensor(tokens)).square().sum().backward()
    parameters = list(model.parameters())
    before = accumulated(model)
    assert float(gradient_sq_norm(parameters)) == pytest.approx(before, rel=1e-6)
    divide_gradients_(parameters, 4.0)
    assert accumulated(model) == pytest.approx(before / 16, rel=1e-6)
    assert all_gradients_finite(parameters)
    model.out.weight.grad[0, 0] = torch.inf
    assert not all_gradients_finite(parameters)


def test_mixed_types_and_a_model_that_changes_its_type():
    model = nn.ModuleList([nn.Linear(3, 3).double(), nn.Linear(3, 3), nn.Linear(3, 3).bfloat16()])

    def loss() -> Tensor:
        x = torch.ones(2, 3)
        return sum((layer(x.to(layer.weight.dtype)).double().square().sum() for layer in model), torch.zeros(()))

    probe = attached(model)
    assert heard(probe, loss()) == pytest.approx(accumulated(model), rel=1e-5)
    assert float(gradient_sq_norm(list(model.parameters()))) == pytest.approx(accumulated(model), rel=1e-5)
    model.zero_grad()
    model.double()
    probe.attach(model, torch.optim.SGD(model.parameters()))
    assert heard(probe, loss()) == pytest.approx(accumulated(model), rel=1e-12)
