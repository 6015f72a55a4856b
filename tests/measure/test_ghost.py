"""ghost.py: squared norms of single examples, equal to those of the gradients one by one, or refused."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from adaptbatch.measure.ghost import GhostProbe, direct_sq_norms, gram_sq_norms, record, terms
from tests import reference
from tests.searches import costly

torch.set_num_threads(1)
WAY_OUT = r"use Limits\(min_steps=2\) without ghost=True"


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


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- every kind of layer ------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer, called twice, on inputs that differ."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


class LanguageModel(nn.Module):
    """Embedding, LayerNorm, Linear; the head is tied to the embedding or has its own weight."""

    def __init__(self, tied: bool, positions: bool = False, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=padding_idx)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.positions = nn.Embedding(5, 4) if positions else None
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        if self.positions is not None:
            h = h + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.mix(self.norm(h)).tanh() + h)


class TwoEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(6, 3), nn.Embedding(6, 3)
        self.right.weight = self.left.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.left(tokens).tanh() * self.right(tokens.flip(1)) + self.left(tokens + 1)


def tied_pair(first: nn.Module, second: nn.Module, *names: str) -> nn.Sequential:
    for name in names:
        setattr(second, name, getattr(first, name))
    return nn.Sequential(first, nn.Tanh(), second)


TOKENS = torch.tensor([[1, 2, 2, 1], [0, 0, 0, 0], [3, 1, 4, 2]])
CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "rows": lambda: (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)), torch.randn(6, 5)),
    "sequence, Gram": lambda: (nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 9)), torch.randn(4, 2, 9)),
    "sequence, direct": lambda: (nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)), torch.randn(4, 7, 3)),
    "four axes": lambda: (nn.Linear(3, 2), torch.randn(4, 2, 3, 3)),
    "conv1d": lambda: (nn.Sequential(nn.Conv1d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)),
                       torch.randn(4, 3, 7)),
    "conv2d, Gram": lambda: (nn.Conv2d(4, 6, 3, stride=2), torch.randn(3, 4, 4, 4)),
    "conv2d, direct": lambda: (nn.Conv2d(2, 3, (2, 1), stride=(1, 2), padding=(1, 0)), torch.randn(3, 2, 6, 7)),
    "conv2d, same": lambda: (nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(3, 1)), torch.randn(3, 2, 5, 6)),
    "conv2d, valid": lambda: (nn.Conv2d(2, 3, 2, padding="valid", bias=False), torch.randn(3, 2, 5, 6)),
    "conv2d, depthwise": lambda: (nn.Conv2d(4, 8, 3, groups=4, padding=1), torch.randn(3, 4, 5, 5)),
    "conv1d, circular": lambda: (nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), torch.randn(3, 2, 5)),
    "conv2d, reflect": lambda: (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), torch.randn(3, 2, 5, 6)),
    "conv3d": lambda: (nn.Conv3d(2, 4, 2, groups=2), torch.randn(3, 2, 3, 4, 3)),
    "norm of rows": lambda: (nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)), torch.randn(4, 3)),
    "norm of positions": lambda: (nn.LayerNorm(5, eps=0.1), torch.randn(4, 3, 5)),
    "norm of two axes": lambda: (nn.LayerNorm((2, 5), bias=False), torch.randn(4, 3, 2, 5)),
    "norm without affine": lambda: (nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5, elementwise_affine=False)),
                                    torch.randn(4, 3)),
    "tokens": lambda: (nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2)), TOKENS),
    "one token": lambda: (nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2)), torch.tensor([1, 2, 1])),
    "padding": lambda: (nn.Embedding(7, 4, padding_idx=2), TOKENS),
    "sparse": lambda: (nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 2)), TOKENS),
    "in place": lambda: (nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)), torch.randn(6, 5)),
    "linear twice": lambda: (Twice(nn.Linear(4, 4)), torch.randn(5, 4)),
    "linear twice, positions": lambda: (Twice(nn.Linear(4, 4)), torch.randn(5, 3, 4)),
    "conv twice": lambda: (Twice(nn.Conv2d(2, 2, 3, padding=1)), torch.randn(3, 2, 4, 4)),
    "norm twice": lambda: (Twice(nn.LayerNorm(4)), torch.randn(5, 3, 4)),
    "tied linears": lambda: (tied_pair(nn.Linear(4, 4), nn.Linear(4, 4), "weight"), torch.randn(5, 4)),
    "tied linears and biases": lambda: (tied_pair(nn.Linear(4, 4), nn.Linear(4, 4), "weight", "bias"),
                                        torch.randn(5, 3, 4)),
    "tied bias only": lambda: (tied_pair(nn.Linear(4, 4), nn.LayerNorm(4), "bias"), torch.randn(5, 4)),
    "tied convs": lambda: (tied_pair(nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 3, groups=2, stride=2), "weight"),
                           torch.randn(3, 4, 8)),
    "tied embeddings": lambda: (TwoEmbeddings(), TOKENS),
    "untied language model": lambda: (LanguageModel(tied=False), TOKENS),
    "tied language model": lambda: (LanguageModel(tied=True), TOKENS),
    "tied language model, padding": lambda: (LanguageModel(tied=True, padding_idx=2), TOKENS),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", CASES)
def test_equals_the_gradients_one_by_one(case):
    model, x = CASES[case]()
    model.double()
    assert_exact(model, x.double() if x.is_floating_point() else x)


@pytest.mark.parametrize("case", ["rows", "sequence, Gram", "conv2d, direct", "tied language model"])
def test_single_precision(case):
    model, x = CASES[case]()
    expected = total_twin(copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x)
    probe = attached(model)
    for _ in range(2):
        torch.testing.assert_close(heard(probe, total_loss(model(x))), expected, rtol=1e-5, atol=0)


@given(st.tuples(*[st.integers(1, 4)] * 4), st.booleans())
@costly(25)
def test_linear_of_any_shape(shape, bias):
    m, positions, inputs, outputs = shape
    assert_exact(nn.Linear(inputs, outputs, bias=bias).double(), torch.randn(m, positions, inputs).double())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@given(st.data())
@costly(40)
def test_conv_of_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups, kernel, dilation = draw(1, 3), (draw(1, 3), draw(1, 3)), (draw(1, 2), draw(1, 2))
    padding = data.draw(st.one_of(st.just("same"), st.tuples(st.integers(0, 2), st.integers(0, 2))))
    stride = 1 if padding == "same" else (draw(1, 3), draw(1, 3))
    layer = nn.Conv2d(
        groups * draw(1, 2),
        groups * draw(1, 2),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias=data.draw(st.booleans()),
    )
    x = torch.randn(draw(1, 3), layer.in_channels, draw(5, 7), draw(5, 7))
    assert_exact(layer.double(), x.double())


@given(st.tuples(*[st.integers(1, 5)] * 5))
@costly(25)
def test_both_forms_agree(shape):
    m, groups, positions, outputs, inputs = shape
    deltas, x = torch.randn(m, groups, positions, outputs).double(), torch.randn(m, groups, positions, inputs).double()
    torch.testing.assert_close(gram_sq_norms(deltas, x), direct_sq_norms(deltas, x), rtol=1e-9, atol=1e-12)


def test_no_square_is_negative():
    # The gradient cancels over the positions; what is left is the rounding of the Gram form.
    deltas = torch.randn(200, 1, 6, 5)
    deltas -= deltas.mean(dim=2, keepdim=True)
    assert bool((gram_sq_norms(deltas, torch.randn(200, 1, 1, 5).expand(-1, -1, 6, -1)) >= 0).all())


@pytest.mark.parametrize(("positions", "chosen"), [(2, "gram_sq_norms"), (40, "direct_sq_norms")])
def test_the_cheaper_form_is_taken(monkeypatch, positions, chosen):
    def spent(*_: Tensor) -> Tensor:
        raise AssertionError("the costlier form")

    other = {"gram_sq_norms", "direct_sq_norms"} - {chosen}
    monkeypatch.setattr(terms, other.pop(), spent)
    model = nn.Linear(16, 16)
    assert heard(attached(model), total_loss(model(torch.randn(3, positions, 16)))).shape == (3,)


@pytest.mark.parametrize("case", ["conv2d, Gram", "conv2d, direct", "sequence, direct", "tied language model"])
def test_examples_are_taken_in_turns_where_memory_is_short(monkeypatch, case):
    for module in (terms, record):
        monkeypatch.setattr(module, "CHUNK", 1)
    model, x = CASES[case]()
    model.double()
    assert_exact(model, x.double() if x.is_floating_point() else x)


def test_the_sum_over_examples_is_that_of_one_backward_each():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(), torch.randn(6, 5).double()
    gradients = reference.per_example_gradients(model, lambda m, one: total_loss(m(one)), x)
    probe = attached(model)
    found = 36 * heard(probe, total_loss(model(x)) / 6).sum()
    assert float(found) == pytest.approx(float((gradients**2).sum()), rel=1e-9)


# --- which parameters count ---------------------------------------------------------------------------------------


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


# --- forward and backward passes of every kind --------------------------------------------------------------------


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


# --- refusals -----------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.inner(x)


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Gain(nn.Linear):
    """A third parameter, as torch's older weight norm adds them."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.gain = nn.Parameter(torch.ones(()))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (
        lambda: nn.BatchNorm1d(3),
        r"1 \(BatchNorm1d\) couples the examples .* parameters \['bias', 'weight'\]",
    ),
    "batch norm without affine": (lambda: nn.BatchNorm1d(3, affine=False), r"1 \(BatchNorm1d\) couples the examples"),
    "own parameter": (Scaled, r"1 \(Scaled\) is not a Linear, .* parameters \['scale'\]"),
    "attention": (lambda: nn.MultiheadAttention(3, 1), r"1 \(MultiheadAttention\) is not a Linear"),
    "recurrent": (lambda: nn.GRU(3, 3), r"1 \(GRU\) is not a Linear"),
    "own forward": (lambda: OwnForward(3, 3), r"1 \(OwnForward\) is not a Linear"),
    "weight norm": (lambda: weight_norm(nn.Linear(3, 3)), r"1.parametrizations.weight \(ParametrizationList\) is not"),
    "frequency": (lambda: nn.Embedding(5, 3, scale_grad_by_freq=True), r"1 \(Embedding\) scales a token's gradient"),
    "complex": (lambda: nn.Linear(3, 3, dtype=torch.complex64), r"1 \(Linear\) is complex"),
    "gain": (Gain, r"1 \(Gain\) has parameters besides weight and bias: .* \['bias', 'gain', 'weight'\]"),
    "tied convs in different groups": (
        lambda: tied_pair(nn.Conv1d(4, 8, 3, groups=2), nn.Conv1d(8, 8, 3, groups=4), "weight"),
        r"1.0 \(Conv1d\), 1.2 \(Conv1d\) share a parameter, but not the form",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layers_whose_examples_cannot_be_told_apart_are_refused(case):
    build, message = REFUSED[case]
    model = nn.Sequential(nn.Linear(3, 3), build())
    with pytest.raises(ValueError, match=rf"(?s){message}.*{WAY_OUT}"):
        attached(model)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_frozen_batch_norm_is_welcome_in_eval_mode_only():
    model, x = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).double(), torch.randn(4, 3).double()
    model[0].eval().requires_grad_(False)
    probe = assert_exact(model, x)
    model.train()
    with pytest.raises(ValueError, match=r"0 \(BatchNorm1d\) couples the examples .* unless it is frozen and in eval"):
        probe.attach(model, torch.optim.SGD(model.parameters()))


def test_nothing_to_train_and_foreign_parameters_are_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match=r"parameters that the model does not have, of shapes \[\(5,\)\]"):
        GhostProbe().attach(model, torch.optim.SGD([model.weight, nn.Parameter(torch.ones(5))]))
    probe = attached(model)
    optimizer = torch.optim.SGD(model.parameters())
    model.load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="load_state_dict"):
        probe.attach(model, optimizer)
    with pytest.raises(ValueError, match="at least one parameter"):
        attached(model.requires_grad_(False))


class Autoencoder(nn.Module):
    """Reads its encoder's weight behind its back, to a degree."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(5, 4), nn.Linear(4, 5)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        h = self.enc(x).tanh()
        return self.dec(h) + self.share * F.linear(h, self.enc.weight.t())


@pytest.mark.parametrize("share", [1.0, 1e-2])
def test_a_weight_used_outside_its_module_is_refused(share):
    model = Autoencoder(share)
    probe = attached(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"(?s)'enc.weight' is not the sum over the calls .*{WAY_OUT}"):
            heard(probe, total_loss(model(torch.randn(300, 5))))


def test_a_penalty_and_a_weight_never_called_are_refused():
    model, x = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3, bias=False)]), torch.randn(4, 3)
    with pytest.raises(RuntimeError, match=r"'0.bias' is not the sum"):
        heard(attached(model), total_loss(model[0](x)) + 0.1 * model[0].bias.square().sum())
    with pytest.raises(RuntimeError, match=r"'1.weight' is not the sum"):
        heard(attached(model), total_loss(F.linear(model[0](x), model[1].weight)))
    model.append(nn.Embedding(5, 3, sparse=True))
    with pytest.raises(RuntimeError, match=r"'2.weight' is not the sum"):
        heard(attached(model), total_loss(model[0](x) + F.embedding(torch.arange(4), model[2].weight, sparse=True)))


@pytest.mark.parametrize("frozen", ["0.weight", None])
def test_the_check_is_made_once_and_leaves_no_hook(frozen):
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(4, 3)
    probe = attached(model)
    assert all(p._backward_hooks for p in model.parameters())
    # A gradient that is not finite settles nothing, as while a loss scale is searched.
    heard(probe, total_loss(model(x)) * torch.inf)
    assert all(p._backward_hooks for p in model.parameters())
    heard(probe, total_loss(model(x)))
    assert not any(p._backward_hooks for p in model.parameters())


PENALTIES: dict[str, tuple[Callable[[nn.Module], Tensor], int]] = {
    "L1 of all": (lambda model: sum(p.abs().sum() for p in model.parameters()), record.ONE_EVERY),
    "decay of one": (lambda model: model[2].weight.square().sum(), record.ALL_EVERY),
    "of a bias": (lambda model: model[0].bias.square().sum(), record.ALL_EVERY),
}


@pytest.mark.parametrize("period", [1, 4, 16])
@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_that_begins_late_is_noticed_in_time(name, period):
    """Every micro-batch or, as lazy regularisation does, now and then; too small to be longer than the parts."""
    penalty, within = PENALTIES[name]
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(), torch.randn(6, 5).double()
    probe = attached(model)

    def train(micro_batches: int, strength: float) -> None:
        for index in range(micro_batches):
            loss = total_loss(model(x))
            heard(probe, loss if index % period else loss + strength * penalty(model))

    train(40, strength=0.0)
    with pytest.raises(RuntimeError, match=rf"(?s)is not the sum over the calls .* a penalty in the loss.*{WAY_OUT}"):
        train(within * period + 1, strength=0.01)
    # As long as it is there.
    with pytest.raises(RuntimeError, match="is not the sum"):
        heard(probe, total_loss(model(x)) + 0.01 * penalty(model))
    heard(probe, total_loss(model(x)))
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("case", ["rows", "linear twice", "conv2d, direct", "tied language model"])
def test_what_is_checked_again_is_measured_all_the_same(monkeypatch, case):
    monkeypatch.setattr(record, "ONE_EVERY", 2)
    monkeypatch.setattr(record, "ALL_EVERY", 5)
    model, x = CASES[case]()
    model.double()
    x = x.double() if x.is_floating_point() else x
    probe, expected = attached(model), total_twin(model, x)
    for _ in range(12):
        torch.testing.assert_close(heard(probe, total_loss(model(x))), expected, rtol=1e-9, atol=0)


class Attention(nn.Module):
    """Softmax attention: the gradient of the keys' bias is nothing but rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_bears_rounding(dtype):
    model = Attention().to(dtype)
    found = heard(attached(model), total_loss(model(torch.randn(64, 16, 8, dtype=dtype)).float()))
    assert bool((found > 0).all())


def test_outputs_that_do_not_start_with_the_examples_are_refused():
    probe_of = attached(positional := LanguageModel(tied=False, positions=True))
    with pytest.raises(
        RuntimeError,
        match=r"got head \(Linear\) returned \(3, 4, 7\), but positions \(Embedding\) returned \(4, 4\)",
    ):
        heard(probe_of, total_loss(positional(TOKENS)))
    flattened = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0, 1), nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match=r"2 \(Linear\) returned \(12, 2\), but 0 \(Linear\) returned \(3, 4, 4\)"):
        heard(attached(flattened), total_loss(flattened(torch.randn(3, 4, 4))))
    model = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match=r"the model \(Linear\) returned \(2,\), which has no axis of examples"):
        heard(attached(model), total_loss(model(torch.randn(3))))


# --- no trace -----------------------------------------------------------------------------------------------------


def test_closing_leaves_no_trace():
    model, x = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), torch.randn(4, 3)
    before = [{key: copy.copy(value) for key, value in module.__dict__.items()} for module in model.modules()]
    probe = attached(model)
    assert all(layer._forward_hooks for layer in model)
    loss = total_loss(model(x))
    probe.close()
    assert [module.__dict__ for module in model.modules()] == before
    assert not any(p._backward_hooks for p in model.parameters())
    with probe.listening():
        loss.backward()
    with pytest.raises(RuntimeError, match="no layer was heard"):
        probe.take_example_sq_norms()


def test_copies_and_pickles_hear_nothing():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    probe = attached(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with probe.listening():
            total_loss(other(x)).backward()
        assert torch.equal(other(x), model(x))
        assert other(x)._backward_hooks is None
        with pytest.raises(RuntimeError, match="no layer was heard"):
            probe.take_example_sq_norms()
    assert heard(probe, total_loss(model(x))).shape == (4,)


def test_a_saved_model_needs_nothing_of_this_package(tmp_path):
    """In a process that cannot import it."""
    model, x = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), torch.randn(4, 3)
    attached(model)
    torch.save([model, x, model(x).detach()], tmp_path / "model.pt")
    script = (
        "import sys; sys.modules['adaptbatch'] = None\n"
        f"import torch; model, x, y = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert torch.equal(model(x), y) and model(x)._backward_hooks is None"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_a_model_is_scripted_when_its_norms_are_closed():
    model, x = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), torch.randn(4, 3)
    probe = attached(model)
    with pytest.raises(AttributeError, match=r"cannot be scripted.*controller\.close\(\) first"):
        torch.jit.script(model)
    assert heard(probe, total_loss(model(x))).shape == (4,)
    probe.close()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_checked_parameters_travel_without_a_warning():
    model = nn.Linear(3, 2)
    attached(model)
    for p in model.parameters():
        assert p._backward_hooks
        torch.utils.hooks.warn_if_has_hooks(p)


def test_a_micro_batch_of_another_size_waits_for_no_device():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    probe, before = attached(model), None
    for examples in (4, 3, 4):
        heard(probe, total_loss(model(torch.randn(examples, 3))))
        (board,) = probe._record._boards
        assert before is None or board._biases is before
        before = board._biases
    assert before.tolist() == [[True], [False]]


def calls() -> list[record.Call]:
    gc.collect()
    return [one for one in gc.get_objects() if type(one) is record.Call]


def test_nothing_is_held_longer_than_the_graph():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(4, 3)
    probe = attached(model)
    output = model(x)
    assert len(calls()) == 2
    del output
    assert not calls()
    loss = total_loss(model(x))
    heard(probe, loss)
    assert len(calls()) == 2
    assert not any(call.pending for call in calls())


def test_a_layer_that_reads_what_it_changes_is_not_held_for_ever():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(4, 3)
    # Else autograd itself would hold it.
    model[1].weight.requires_grad_(False)
    attached(model)
    h = model[0](x)
    h += model[1](h)
    del h
    assert not calls()


def test_frozen_layers_hold_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2))
    attached(model)
    output = model(torch.randn(4, 3))
    assert len(calls()) == 2
    assert output.requires_grad


def test_evaluation_is_untouched():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(4, 3)
    expected = model(x)
    attached(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output = model(x)
        assert torch.equal(output, expected)
        assert output._backward_hooks is None
        assert not calls()
