"""Squared gradient norms of single examples against per-example gradients, one by one."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaptbatch.measure.ghost import GhostProbe
from studies.device.cases import Case, Convolutions, Perceptron, autocast, cases
from studies.device.exact import SIGMAS, flat
from studies.device.harness import Report

EXAMPLES = 16


def run(report: Report, device: str, tiny: bool) -> None:
    """Rows for each network and precision."""
    for case in networks(tiny):
        for precision in ("float64", "float32", "bf16"):
            check = partial(compare, report, case, device, precision)
            report.attempt(check, network=case.name, precision=precision)


def networks(tiny: bool) -> list[Case]:
    """Those whose layers it knows, at a size at which all per-example gradients fit."""
    known = cases(tiny)
    width, inputs, side = (32, 16, 8) if tiny else (512, 1024, 14)
    mlp = Case("MLP", lambda: Perceptron(inputs, width, 3), (inputs,), 0, EXAMPLES, terms=2 * (inputs + 3 * width))
    places = side**2
    convolved = Case(
        "convolutions", lambda: Convolutions(side), (1, side, side), 0, EXAMPLES, terms=16 * places, positions=places
    )
    return [known["autoencoder"], known["transformer"], mlp, convolved]


def compare(report: Report, case: Case, device: str, precision: str) -> None:
    """Largest relative error of an example's squared norm, in the probe's first micro-batch and in a later one.

    A squared norm is a sum over pairs of positions: with random signs it is ``positions`` times smaller than the sum of
    their sizes, and rounding ``sqrt(k) u`` of that.
    """
    dtype = torch.float64 if precision == "float64" else torch.float32
    model = case.network(device, dtype=dtype)
    (x,) = case.batches(device, [EXAMPLES], dtype=dtype)
    forward = "bf16" if precision == "bf16" else "float32"
    probe = GhostProbe()
    probe.attach(model, torch.optim.SGD(model.parameters(), lr=0.0))
    bound = SIGMAS * math.sqrt(case.terms) * torch.finfo(dtype).eps / 2.0 * case.positions
    if precision == "bf16":
        # Every activation and its gradient is rounded, in another order in a batch of one: a few u, of u = 2^-9, of
        # each factor of a squared norm.
        bound = 32.0 * 2.0**-9
    with sdpa_kernel(SDPBackend.MATH):
        expected = one_by_one(model, x, device) if precision == "bf16" else per_example_sq_norms(model, x)
        for which in ("first", "later"):
            with autocast(device, forward):
                loss = model(x) * len(x)
            with probe.listening():
                loss.backward()
            found = probe.take_example_sq_norms()
            model.zero_grad()
            error = float(((found - expected).abs() / expected).max())
            shared = {"network": case.name, "precision": precision, "micro_batch": which, "examples": len(x)}
            report.row(error <= bound, **shared, deviation=error, bound=bound)
    probe.close()


def one_by_one(model: nn.Module, x: Tensor, device: str) -> Tensor:
    """``|grad l_i|^2`` under autocast, which vmap does not take everywhere: a backward pass for each example."""
    found = []
    for one in x:
        with autocast(device, "bf16"):
            loss = model(one[None])
        loss.backward()
        found.append(flat(model).square().sum())
        model.zero_grad()
    return torch.stack(found)


def per_example_sq_norms(model: nn.Module, x: Tensor) -> Tensor:
    """``|grad l_i|^2`` in float64, from the gradients of all examples."""
    return sum(
        (g.double().flatten(1).square().sum(1) for g in per_example_gradients(model, x)),
        torch.zeros(len(x), dtype=torch.float64, device=x.device),
    )


def per_example_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """``(m, *shape)`` for each parameter."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, Tensor], one: Tensor) -> Tensor:
        found: Tensor = functional_call(model, given, (one[None],))
        return found

    return list(vmap(grad(loss), in_dims=(None, 0))(parameters, x).values())
