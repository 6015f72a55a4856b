"""Layers whose examples cannot be told apart are refused by name; the check of each gradient bears rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from adaptbatch.measure.ghost import GhostProbe, record
from tests.measure.ghost.models import CASES, TOKENS, LanguageModel, tied_pair
from tests.measure.ghost.twins import assert_exact, attached, heard, total_loss, total_twin

WAY_OUT = r"use Limits\(min_steps=2\) without ghost=True"


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
