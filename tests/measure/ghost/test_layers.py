"""Every kind of layer: squared norms of single examples equal those of the gradients one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adaptbatch.measure.ghost import direct_sq_norms, gram_sq_norms, record, terms
from tests import reference
from tests.measure.ghost.models import CASES
from tests.measure.ghost.twins import assert_exact, attached, heard, total_loss, total_twin
from tests.searches import costly


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
