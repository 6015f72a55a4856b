"""gradients.py against the window's gradients written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from adaptbatch.measure.copies import PreviousGradient, WindowGradients, inner_product


def parameters(dtype: torch.dtype = torch.float64) -> list[Parameter]:
    return [Parameter(torch.zeros(3, 2, dtype=dtype)), Parameter(torch.zeros(4, dtype=dtype))]


def set_gradients(params: list[Parameter], flat: np.ndarray) -> None:
    values = torch.as_tensor(flat, dtype=params[0].dtype)
    params[0].grad, params[1].grad = values[:6].reshape(3, 2).clone(), values[6:].clone()


@pytest.mark.parametrize("weights", [[4.0, 4.0, 4.0], [5.0, 2.0, 9.0, 1.0], [3.0]])
def test_radial_squares_are_those_of_the_cells(weights):
    rng = np.random.default_rng(0)
    cells = [rng.normal(size=10) + 0.5 for _ in weights]
    n, reference = sum(weights), 7.0
    params, kept = parameters(), WindowGradients()
    running = np.zeros(10)
    for w, g in zip(weights, cells, strict=True):
        running = running + w * g / reference
        set_gradients(params, running)
        kept.add(params, w)
    mean = sum(w * g for w, g in zip(weights, cells, strict=True)) / n
    set_gradients(params, mean)
    expected = sum(w * (g @ mean) ** 2 for w, g in zip(weights, cells, strict=True)) / (mean @ mean)
    assert kept.radial_sq_norms(params, reference).item() == pytest.approx(expected, rel=1e-12)


def test_a_parameter_without_a_gradient_counts_as_zero():
    params, kept = parameters(), WindowGradients()
    params[1].grad = torch.tensor([1.0, 2.0, 2.0, 0.0], dtype=torch.float64)
    kept.add(params, 2.0)
    assert kept.radial_sq_norms(params, 2.0).item() == pytest.approx(2.0 * 9.0)


def test_the_previous_gradient_is_a_copy():
    params, previous = parameters(), PreviousGradient()
    first, second = np.arange(10.0), np.ones(10)
    set_gradients(params, first)
    assert previous.product(params) is None
    previous.keep(params)
    params[0].grad.zero_()
    set_gradients(params, second)
    assert previous.product(params).item() == first.sum()
    previous.forget()
    assert previous.product(params) is None


def test_other_parameters_have_no_product_with_the_old_ones():
    params, previous = parameters(), PreviousGradient()
    set_gradients(params, np.ones(10))
    previous.keep(params)
    assert previous.product(params[:1]) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_products_do_not_overflow(dtype):
    big = [torch.full((1000,), 200.0, dtype=dtype)]
    assert inner_product(big, big).item() == 4e7
