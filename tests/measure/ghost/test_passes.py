"""Forward and backward passes of every kind, in every precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from tests.measure.ghost.models import tied_pair
from tests.measure.ghost.twins import assert_exact, attached, heard, total_loss, total_twin, twin


class Steps(nn.Module):
    """Calls its layer as often as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.steps = 1

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = self.layer(x).tanh()
        return x


def test_the_number_of_calls_may_change():
    model, x = Steps().double(), torch.randn(5, 4).double()
    probe = attached(model)
    for model.steps in (1, 1, 3, 2, 1):
        torch.testing.assert_close(heard(probe, total_loss(model(x))), total_twin(model, x), rtol=1e-9, atol=0)


def test_micro_batches_of_different_sizes_and_forwards_that_overlap():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batches = [torch.randn(m, 5).double() for m in (6, 6, 2, 6)]
    expected = [total_twin(model, x) for x in batches]
    probe = attached(model)
    losses = [total_loss(model(x)) for x in batches]
    for loss, wanted in zip(losses, expected, strict=True):
        torch.testing.assert_close(heard(probe, loss), wanted, rtol=1e-9, atol=0)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, again: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first if again else nn.Linear(4, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(lambda h: self.first(h).tanh(), x, use_reentrant=self.reentrant)
        return checkpoint(lambda h: self.second(h).tanh(), x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_right_or_refused(reentrant, again):
    model, x = Checkpointed(reentrant, again).double(), torch.randn(3, 4, requires_grad=True).double()
    plain = nn.Sequential(model.first, nn.Tanh(), model.second, nn.Tanh())
    expected = total_twin(plain, x.detach())
    probe = attached(model)
    for _ in range(2):
        if reentrant and again:
            with pytest.raises(RuntimeError, match=r"first \(Linear\) was called again .* use_reentrant=False"):
                heard(probe, total_loss(model(x)))
        else:
            torch.testing.assert_close(heard(probe, total_loss(model(x))), expected, rtol=1e-9, atol=0)
    assert reentrant or probe._layers[model.first].repeated == again


def test_listens_only_when_told():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    probe = attached(model)
    torch.autograd.grad(total_loss(model(x)), list(model.parameters()))
    total_loss(model(x)).backward()
    with pytest.raises(RuntimeError, match="no layer was heard in this backward pass: the loss does not reach"):
        probe.take_example_sq_norms()
    with probe.listening():
        pass
    with pytest.raises(RuntimeError, match="no layer was heard"):
        probe.layer_sq_norms()


def test_a_gradient_taken_before_the_backward_pass_is_not_counted():
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3).double()
    expected = total_twin(model, x)
    loss = total_loss(model(x))
    probe = attached(model)
    loss = total_loss(model(x))
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    torch.testing.assert_close(heard(probe, loss), expected, rtol=1e-9, atol=0)


def test_a_failed_backward_leaves_nothing_behind():
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double(), torch.randn(4, 3).double()
    expected = total_twin(model, x)
    probe = attached(model)

    def explode(grad: Tensor) -> None:
        raise ArithmeticError("boom")

    loss = total_loss(model(x[:2]))
    handle = model[0].weight.register_hook(explode)
    with pytest.raises(ArithmeticError, match="boom"), probe.listening():
        loss.backward()
    handle.remove()
    torch.testing.assert_close(heard(probe, total_loss(model(x))), expected, rtol=1e-9, atol=0)


def test_a_micro_batch_that_is_not_taken_is_forgotten():
    model, x = tied_pair(nn.Linear(4, 4), nn.Linear(4, 4), "weight").double(), torch.randn(5, 4).double()
    probe = attached(model)
    with probe.listening():
        total_loss(model(x + 1)).backward()
    torch.testing.assert_close(heard(probe, total_loss(model(x))), total_twin(model, x), rtol=1e-9, atol=0)


def test_a_second_backward_through_one_forward_is_refused():
    model = nn.Linear(3, 2)
    probe, loss = attached(model), total_loss(model(torch.randn(4, 3)))
    with probe.listening():
        loss.backward(retain_graph=True)
    with (
        pytest.raises(RuntimeError, match=r"the model \(Linear\) was back-propagated a second time"),
        probe.listening(),
    ):
        loss.backward()


class Cut(torch.autograd.Function):
    """Stops the gradient by None, not by zeros."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, delta):
        return None


def test_a_gradient_of_none_is_zero():
    model, x = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]), torch.randn(4, 3)
    probe = attached(model)
    heard(probe, total_loss(model[0](x) + Cut.apply(model[1](x))))
    assert probe.layer_sq_norms()["1.weight"].tolist() == [0.0] * 4


class Keyword(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(input=x)
        return x


def test_keyword_calls_subclasses_and_the_users_own_hooks():
    class Named(nn.Linear):
        pass

    model = Keyword(Named(3, 4), nn.LayerNorm(4)).double()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    assert_exact(model, torch.randn(4, 3).double())


def test_a_functional_call_in_between_is_untouched():
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3).double()
    expected = twin(model, x)
    probe = attached(model)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    found = vmap(grad(lambda one: total_loss(functional_call(model, weights, (one[None],)))))(x)
    assert torch.equal(found, vmap(grad(lambda one: total_loss(copy.deepcopy(model)(one[None]))))(x))
    torch.testing.assert_close(heard(probe, total_loss(model(x))), expected["weight"] + expected["bias"])


# --- precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_norms_are_float32(dtype, positions):
    model, m = nn.Linear(1000, 2).to(dtype), 4
    with torch.no_grad():
        model.weight.zero_()
    probe, x = attached(model), torch.full((m, *positions, 1000), 300.0, dtype=dtype)
    times = float(torch.ones(positions).sum())
    for _ in range(2):
        # Each row of the gradient is a sum of x: 300^2 * 1000 is far above float16's 65504.
        found = heard(probe, model(x).sum())
        assert found.tolist() == pytest.approx([2 * (300.0**2 * 1000 + 1) * times**2] * m, rel=1e-3)


def test_autocast_and_mixed_types():
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
    x = torch.randn(8, 16)
    expected = total_twin(model, x)
    probe = attached(model)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(x)
        torch.testing.assert_close(heard(probe, total_loss(output.float())), expected, rtol=0.05, atol=0)


def test_layers_of_different_types():
    model, x = nn.ModuleList([nn.Linear(3, 2).double(), nn.Linear(3, 2)]), torch.randn(4, 3)
    wide, narrow = (twin(layer, x.to(layer.weight.dtype)) for layer in model)
    expected = sum([*wide.values(), *narrow.values()], torch.zeros(4).double())
    probe = attached(model)
    for _ in range(2):
        loss = total_loss(model[0](x.double())) + total_loss(model[1](x))
        torch.testing.assert_close(heard(probe, loss), expected, rtol=1e-5, atol=0)


def test_squares_of_large_norms_do_not_overflow():
    model = nn.Linear(1, 1, bias=False)
    probe = attached(model)
    for _ in range(2):
        found = heard(probe, (model(torch.tensor([[1e20], [1.0]])) * 1e10).sum())
    assert found.tolist() == pytest.approx([1e60, 1e20])
