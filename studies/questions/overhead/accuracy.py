"""Are the estimates right? The controller's rows against the exact per-example covariance of a small network.

The parameters stand still (learning rate 0) and examples are drawn with replacement from a fixed set, so that the true
``tr(Sigma)`` and ``|G|^2`` are those of the set's per-example gradients, computed one by one. The noise scale is about
the size of the batch, the hard case where noise and signal are alike.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import adaptbatch as ab
from studies import data
from studies.engine.networks import Autoencoder

WINDOWS = {"equal": (16, 16, 16, 16), "unequal": (28, 20, 11, 5)}


def network_and_examples() -> tuple[Autoencoder, Tensor]:
    """A trained-a-little 8-layer autoencoder and 256 images."""
    torch.manual_seed(0)
    images = torch.from_numpy(data.load("mnist").train_inputs[:256])
    model = Autoencoder(depth=8, widths=(32, 16), code=8, residual="scaled", variational=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model.loss(images).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad()
    return model, images


def exact_moments(model: Autoencoder, images: Tensor) -> dict[str, float]:
    """``tr(Sigma)`` and ``|G|^2`` of the uniform distribution on ``images``, from one backward pass for each."""
    parameters = list(model.parameters())
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(model.loss(x[None]), parameters)]).double()
        for x in images
    ]
    gradients = torch.stack(rows)
    mean = gradients.mean(dim=0)
    trace = (gradients - mean).square().sum(dim=1).mean()
    return {"noise_trace": float(trace), "grad_sq_norm": float(mean.square().sum())}


def measure(windows: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Bias of the rows' estimates over many windows, in per cent and in standard errors of the mean.

    Args:
        windows: Windows for each kind of cell sizes.
        seed: Of the draws.
    """
    model, images = network_and_examples()
    truth, rows = exact_moments(model, images), []
    for kind, sizes in WINDOWS.items():
        history = _windows(model, images, sizes, windows, seed)
        for quantity, exact in truth.items():
            found = history[quantity].to_numpy()
            error = found.std(ddof=1) / math.sqrt(windows)
            rows.append(
                {
                    "micro-batches": kind,
                    "quantity": quantity,
                    "windows": windows,
                    "exact": exact,
                    "mean estimate": found.mean(),
                    "bias %": 100 * (found.mean() / exact - 1),
                    "bias in SE": (found.mean() - exact) / error,
                }
            )
    return pd.DataFrame(rows)


def _windows(model: Autoencoder, images: Tensor, sizes: tuple[int, ...], windows: int, seed: int) -> pd.DataFrame:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rng = np.random.default_rng(seed)
    limits = ab.Limits(max_steps=len(sizes))
    with ab.BatchController(model, optimizer, rule=ab.Fixed(len(sizes)), limits=limits) as controller:
        for _ in range(windows):
            for size in sizes:
                x = images[torch.from_numpy(rng.integers(len(images), size=size))]
                controller.backward(model.loss(x), weight=size)
            controller.step()
        return controller.history.to_pandas()
