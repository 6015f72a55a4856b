"""Is it depth, by way of the residual sum, that makes the gradient noisy? Absolute and relative noise, exactly.

Autoencoders of 6 to 80 layers, in five architectures, at the start and in training. At each point the per-example
gradients of a fixed set of images are computed one by one: their covariance is exact, so that what is said of an
architecture does not rest on the estimator; and the controller's own estimate of the same moments stands beside them.

The autoencoder is not variational: a sampled code would be noise of its own. What the origin claims, and what can be
true: skips make tr(Sigma) grow with depth, since they let the gradient through; the *relative* noise
B = tr(Sigma) / |G|^2, which decides the batch, need not grow with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.ticker import NullFormatter
from rich.progress import Progress, TimeElapsedColumn
from scipy import stats
from torch import Tensor

import adaptbatch as ab
from studies import data
from studies.engine.networks import Autoencoder, Norm, Residual
from studies.engine.results import read_table, write_atomically
from studies.engine.runner import provenance
from studies.engine.sweep import Options, Study
from studies.output.style import STYLE, save

DEPTHS = (6, 10, 20, 40, 80)
ARCHITECTURES: dict[str, tuple[Residual, Norm]] = {
    "plain": ("none", "none"),
    "residual": ("identity", "none"),
    "scaled": ("scaled", "none"),
    "rezero": ("rezero", "none"),
    "pre-LN": ("identity", "pre"),
    "branch-LN": ("identity", "branch"),
}


@dataclass(frozen=True)
class Scale:
    """Sizes of a preset."""

    examples: int
    updates: tuple[int, ...]
    windows: int
    seeds: int
    depths: tuple[int, ...] = DEPTHS
    widths: tuple[int, int] = (64, 32)
    data: str = "mnist"


SCALES: dict[str, Scale] = {
    "smoke": Scale(64, (0, 5), windows=10, seeds=1, depths=(6, 10, 14), widths=(16, 8), data="digits"),
    "laptop": Scale(512, (0, 100, 1000), windows=50, seeds=3),
    "paper": Scale(4096, (0, 100, 1000, 10_000), windows=200, seeds=20, widths=(128, 32)),
}
MICRO_BATCH, STEPS, LR = 32, 4, 1e-3


def exact(model: Autoencoder, images: Tensor, chunk: int = 32) -> dict[str, float]:
    """``tr(Sigma)``, ``|G|^2`` and the loss of the uniform distribution on ``images``, from per-example gradients."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).sum()

    per_example = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(None, 0))
    total: Tensor | None = None
    square, losses = 0.0, 0.0
    for x in images.split(chunk):
        gradients, values = per_example(parameters, x)
        flat = torch.cat([g.reshape(len(x), -1) for g in gradients.values()], dim=1).double()
        square += float(flat.square().sum())
        losses += float(values.double().sum())
        total = flat.sum(dim=0) if total is None else total + flat.sum(dim=0)
    assert total is not None
    signal = float((total / len(images)).square().sum())
    return {
        "loss": losses / len(images),
        "noise_trace": square / len(images) - signal,
        "grad_sq_norm": signal,
    }


def estimated(model: Autoencoder, images: Tensor, windows: int, seed: int) -> dict[str, float]:
    """The controller's mean estimates of the same, of windows drawn with replacement, and their standard errors."""
    rng, optimizer = np.random.default_rng(seed), torch.optim.SGD(model.parameters(), lr=0.0)
    with ab.BatchController(model, optimizer, rule=ab.Fixed(STEPS)) as controller:
        for _ in range(windows):
            for _ in range(STEPS):
                x = images[torch.from_numpy(rng.integers(len(images), size=MICRO_BATCH))]
                controller.backward(model.loss(x), weight=len(x))
            controller.step()
    rows = controller.history.to_pandas()
    found = {}
    for name in ("noise_trace", "grad_sq_norm"):
        found[f"estimated_{name}"] = float(rows[name].mean())
        found[f"se_{name}"] = float(rows[name].std(ddof=1)) / math.sqrt(windows)
    return found


def one(architecture: str, depth: int, seed: int, scale: Scale) -> list[dict[str, Any]]:
    """Rows of one network: its noise before training and after each number of updates, until it is not finite."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    residual, norm = ARCHITECTURES[architecture]
    inputs = torch.from_numpy(data.load(scale.data).train_inputs)
    model = _Losses(depth, scale.widths, 16, residual, norm, variational=False, inputs=inputs.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    generator = torch.Generator().manual_seed(seed)
    images, rows, done = inputs[: scale.examples], [], 0
    for updates in scale.updates:
        for _ in range(updates - done):
            x = inputs[torch.randint(len(inputs), (MICRO_BATCH * STEPS,), generator=generator)]
            optimizer.zero_grad()
            model.loss(x).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        done = updates
        optimizer.zero_grad()
        found = exact(model, images)
        if not math.isfinite(found["noise_trace"]):
            break
        row = {"architecture": architecture, "depth": depth, "seed": seed, "updates": updates}
        rows.append(row | found | estimated(model, images, scale.windows, seed))
    return rows


class _Losses(Autoencoder):
    """Its forward is the example losses, for functional calls."""

    def forward(self, x: Tensor) -> Tensor:
        return self.example_losses(x)


def run(options: Options, workers: int, report: Callable[[], None] = lambda: None) -> pd.DataFrame:
    """A row for each architecture, depth, seed and point of training, with ``noise_scale``."""
    scale = SCALES[options.preset]
    jobs = [
        (a, d, s, scale)
        for s in range(options.seeds or scale.seeds)
        for d in reversed(scale.depths)
        for a in ARCHITECTURES
    ]
    rows: list[dict[str, Any]] = []
    with joblib.parallel_config("loky", inner_max_num_threads=1):
        for found in joblib.Parallel(n_jobs=workers, return_as="generator")(joblib.delayed(one)(*j) for j in jobs):
            rows += found
            report()
    table = pd.DataFrame(rows)
    return table.assign(noise_scale=table["noise_trace"] / table["grad_sq_norm"])


def growth(table: pd.DataFrame) -> pd.DataFrame:
    """By what power of the depth each quantity grows, from 10 layers on: slope of the logarithms over all seeds.

    ``low`` and ``high`` are the 95 % t interval; 0 means that depth does not matter.
    """
    rows = []
    for (architecture, updates), part in table[table["depth"] >= 10].groupby(["architecture", "updates"], sort=False):
        for quantity in ("noise_trace", "grad_sq_norm", "noise_scale"):
            if part["depth"].nunique() < 2:
                continue
            fit = stats.linregress(np.log(part["depth"]), np.log(part[quantity]))
            width = stats.t.ppf(0.975, max(len(part) - 2, 1)) * fit.stderr
            row = {"architecture": architecture, "updates": updates, "quantity": quantity, "power": fit.slope}
            rows.append(row | {"low": fit.slope - width, "high": fit.slope + width, "networks": len(part)})
    return pd.DataFrame(rows)


def measure(options: Options, workers: int, folder: Path) -> None:
    """Write ``noise.parquet``, unless it is there."""
    if (folder / "noise.parquet").is_file():
        return
    jobs = len(SCALES[options.preset].depths) * len(ARCHITECTURES) * (options.seeds or SCALES[options.preset].seeds)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as bar:
        task = bar.add_task("depth", total=jobs)
        table = run(options, workers, report=lambda: bar.advance(task))
    table.attrs = {"provenance": provenance(), "preset": options.preset}
    write_atomically(table, folder / "noise.parquet")


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """What was measured, means over seeds, and how it grows with depth."""
    table = read_table(folder / "noise.parquet")
    columns = ["loss", "noise_trace", "grad_sq_norm", "noise_scale"]
    means = table.groupby(["architecture", "updates", "depth"], sort=False)[columns].median().reset_index()
    powers = growth(table)
    return {"noise_by_depth": means, "growth": powers, "claims": claims(powers)}


def claims(powers: pd.DataFrame) -> pd.DataFrame:
    """The origin's explanation in two parts, for residual networks before training: D1 absolute, D2 relative noise.

    Of a power of depth, on the interval: supported if it is above 0.25, not supported if it is below that.
    """
    rows = []
    for claim, quantity, what in (
        ("D1", "noise_trace", "skips make the absolute noise grow with depth"),
        ("D2", "noise_scale", "skips make the relative noise grow with depth"),
    ):
        for own in powers[(powers["quantity"] == quantity) & (powers["updates"] == 0)].itertuples():
            verdict = "supported" if own.low > 0.25 else "not supported" if own.high <= 0.25 else "undecided"
            row = {"claim": claim, "what": f"{what}: power", "where": own.architecture, "value": own.power}
            rows.append(row | {"low": own.low, "high": own.high, "interval": "t", "verdict": verdict})
    return pd.DataFrame(rows)


def checks(table: pd.DataFrame) -> Iterator[float]:
    """How many standard errors the controller's estimates are from the exact moments."""
    for name in ("noise_trace", "grad_sq_norm"):
        yield from (table[f"estimated_{name}"] - table[name]) / table[f"se_{name}"]


MARKS: dict[str, tuple[str, str]] = {
    "plain": ("#000000", "o"),
    "residual": ("#D55E00", "^"),
    "scaled": ("#0072B2", "D"),
    "rezero": ("#56B4E9", "s"),
    "pre-LN": ("#009E73", "v"),
    "branch-LN": ("#CC79A7", "P"),
}


def draw(folder: Path) -> None:
    """Absolute noise, signal and relative noise against depth, before and in training."""
    table = read_table(folder / "noise.parquet")
    quantities = {
        "noise_trace": "tr(Σ), absolute noise",
        "grad_sq_norm": "|G|², signal",
        "noise_scale": "B = tr(Σ)/|G|², relative noise",
    }
    points = sorted(table["updates"].unique())
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(points), 3, figsize=(10, 2.7 * len(points)), sharex=True, squeeze=False, layout="constrained"
        )
        for row, updates in enumerate(points):
            for axes, (quantity, label) in zip(grid[row], quantities.items(), strict=True):
                for name, (colour, marker) in MARKS.items():
                    part = table[(table["updates"] == updates) & (table["architecture"] == name)]
                    if not len(part):
                        continue
                    spread = part.groupby("depth")[quantity].agg(["min", "median", "max"])
                    axes.fill_between(spread.index, spread["min"], spread["max"], color=colour, alpha=0.15, linewidth=0)
                    axes.plot(spread.index, spread["median"], marker=marker, color=colour, markersize=4, label=name)
                axes.set_xscale("log")
                axes.set_yscale("log")
                axes.set_title(label if row == 0 else "")
                axes.set_xticks(sorted(table["depth"].unique()), [str(d) for d in sorted(table["depth"].unique())])
                axes.xaxis.set_minor_formatter(NullFormatter())
            grid[row, 0].set_ylabel(f"after {updates:,} updates")
        grid[0, 0].legend(fontsize=7)
        for axes in grid[-1]:
            axes.set_xlabel("weight layers")
        save(figure, folder, "figure")


STUDY = Study(
    "depth",
    "noise by depth and architecture, exactly",
    lambda *_: [],
    tables,
    order=7,
    measure=measure,
    figures=draw,
)
