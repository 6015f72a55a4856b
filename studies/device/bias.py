"""Estimates of ``tr(Sigma)`` and ``|G|^2`` over many windows against the exact covariance of a small model.

Parameters stand still (learning rate 0) and examples are drawn with replacement from a fixed set, so that the truth is
of that set's per-example gradients.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

import adaptbatch as ab
from studies.device.cases import Case, Perceptron
from studies.device.ghost import per_example_gradients
from studies.device.harness import Report

EXAMPLES, LARGEST_Z = 256, 5.0
# Sizes of the micro-batches of a window, and whether examples are measured.
WINDOWS = {
    "equal": ((16, 16, 16, 16), False),
    "unequal": ((28, 20, 11, 5), False),
    "ghost norms": ((64,), True),
}
QUANTITIES = ("noise_trace", "grad_sq_norm")


def run(report: Report, device: str, tiny: bool) -> None:
    """Rows for each kind of window and quantity: no mean is further than five standard errors from the truth."""
    case = Case("small MLP", lambda: Perceptron(16, 32, 2), (16,), 0, EXAMPLES, terms=200)
    model, examples = case.network(device), case.batches(device, [EXAMPLES])[0]
    truth = exact_moments(model, examples)
    for turn, (kind, (sizes, ghost)) in enumerate(WINDOWS.items()):
        count = 100 if tiny else 2000
        history = windows(model, examples, sizes, ghost, count, report.ends - report.left * (2 - turn) / (3 - turn))
        for quantity in QUANTITIES:
            found = history[quantity].to_numpy()
            standard_error = found.std(ddof=1) / math.sqrt(len(found))
            z = (found.mean() - truth[quantity]) / standard_error
            report.row(
                len(found) >= 100 and abs(z) <= LARGEST_Z,
                micro_batches=kind,
                quantity=quantity,
                windows=len(found),
                exact=truth[quantity],
                estimate=float(found.mean()),
                standard_error=float(standard_error),
                deviation=float(z),
                bound=LARGEST_Z,
            )


def exact_moments(model: nn.Module, examples: Tensor) -> dict[str, float]:
    """Of the uniform distribution on ``examples``, in float64."""
    rows = torch.cat([g.double().flatten(1) for g in per_example_gradients(model, examples)], dim=1)
    mean = rows.mean(0)
    return {"noise_trace": float((rows - mean).square().sum(1).mean()), "grad_sq_norm": float(mean.square().sum())}


def windows(model: nn.Module, examples: Tensor, sizes: tuple[int, ...], ghost: bool, count: int, ends: float) -> Any:
    """The history of up to ``count`` windows, fewer when time is up after the first hundred."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    generator = torch.Generator(examples.device).manual_seed(0)
    rule = ab.Fixed(len(sizes))
    with ab.BatchController(model, optimizer, rule=rule, ghost=ghost, skip_nonfinite=False) as controller:
        for turn in range(count):
            if turn >= 100 and time.time() > ends:
                break
            for size in sizes:
                index = torch.randint(len(examples), (size,), generator=generator, device=examples.device)
                controller.backward(model(examples[index]), weight=size)
            controller.step()
        return controller.history.to_pandas()
