"""The origin, reproduced: what it shows (G1-G5, T1), beside its numbers, and which choices make its instability appear.

The origin ("Handling noisy gradients", MakinaRocks engineering blog, 2020-12-29) trains fully connected (variational)
autoencoders for anomaly detection, finds that residual connections make deep ones unstable, and accumulates gradients.
It does not say which normalisation, rate or initialisation it used. So this study first looks for the instability over
the choices that it leaves open, and then runs the origin's table with the one that shows it most clearly: identity
skips over branches whose output is normalised, Adam at 1e-2. Beside the origin's two rows stand that network at the
small batch, the same with the controller, and the reviewer's question: branches scaled by 1/sqrt(L), at the small
batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import adaptbatch as ab
from studies import data
from studies.engine.arms import Arm
from studies.engine.networks import Autoencoder, Norm, Residual
from studies.engine.results import load, read_table, write_atomically
from studies.engine.runner import Run, provenance
from studies.engine.sweep import SHARED, Found, Options, Study, from_runs
from studies.engine.training import Task
from studies.output.style import KINDS, STYLE, save


@dataclass(frozen=True)
class Scale:
    """Sizes of a preset."""

    data: str
    epochs: int
    layers: int
    widths: tuple[int, int]
    choice_examples: int
    histogram_batches: tuple[int, int]
    seeds: int


SCALES: dict[str, Scale] = {
    "smoke": Scale("digits", 2, 8, (16, 8), 2_000, (64, 500), 1),
    "laptop": Scale("mnist", 200, 80, (64, 16), 150_000, (256, 6000), 1),
    "paper": Scale("mnist", 200, 80, (128, 32), 1_000_000, (256, 6000), 5),
}
CLASSES = (0, 1)
# The origin's table: mean over target classes 0 and 1.
ORIGIN: Mapping[str, Mapping[str, float]] = {
    "VAE, 256": {"train_loss": 48.7973, "valid_loss": 48.1675, "auroc": 0.6027},
    "residual VAE, 4000": {"train_loss": 30.6490, "valid_loss": 30.8461, "auroc": 0.7267},
}
SMALL, LARGE = 256, 4000
# Batch and rate of the choices: the large batch at the small one's rate times the root of their ratio.
SETTINGS = ((256, 1e-3), (256, 1e-2), (4096, 4e-3))
OPTIMIZERS = ("adam", "radam")


def rows(scale: Scale) -> dict[str, tuple[Arm, int]]:
    """The arms of the table, each with its micro-batch."""
    noisy = {"residual": "identity", "norm": "branch"}
    adaptive = ab.RelativeStandardError()
    return {
        "VAE, 256": (_arm("VAE, 256", ab.Fixed(1), 1e-3, residual="none"), SMALL),
        "residual VAE, 4000": (_arm("residual VAE, 4000", ab.Fixed(LARGE // 1000), 1e-2, **noisy), 1000),
        "residual VAE, adaptive": (_arm("residual VAE, adaptive", adaptive, 1e-2, **noisy), SMALL // 2),
        "residual VAE, 256": (_arm("residual VAE, 256", ab.Fixed(1), 1e-2, **noisy), SMALL),
        "scaled residual VAE, 256": (_arm("scaled residual VAE, 256", ab.Fixed(1), 3e-3, residual="scaled"), SMALL),
    }


def _arm(name: str, rule: ab.rules.Rule, lr: float, **changes: Any) -> Arm:
    return Arm(name, rule, lr, **changes)


def plan(options: Options, found: Found) -> list[Run]:
    """The choices, then the table: both classes, all rows."""
    scale = SCALES[options.preset]
    name = (options.data or (scale.data,))[0]
    seeds = range(options.seeds or scale.seeds)
    return [*choices(name, scale), *(run for seed in seeds for run in table_runs(name, scale, seed))]


def choices(name: str, scale: Scale) -> Iterator[Run]:
    """Every skip, normalisation, optimizer and batch that the origin leaves open, for a short while."""
    for residual in get_args(Residual):
        for norm in get_args(Norm):
            for optimizer in OPTIMIZERS:
                for batch, lr in SETTINGS:
                    arm = Arm(f"{residual}, {norm}", ab.Fixed(max(batch // SMALL, 1)), lr, optimizer=optimizer)
                    labels = {"stage": "choice", "network": f"{residual}, {norm}", "data": name, "lr": lr}
                    labels |= {"residual": residual, "norm": norm, "optimizer": optimizer, "batch": batch}
                    own = task(name, 0, scale, scale.choice_examples, SMALL, residual, norm)
                    yield Run(SHARED, own, arm, 0, tuple(labels.items()))


def table_runs(name: str, scale: Scale, seed: int) -> Iterator[Run]:
    """The table's runs on one seed."""
    for row, (arm, micro_batch) in rows(scale).items():
        for anomaly in CLASSES:
            examples = scale.epochs * len(data.split(name, anomaly).train)
            labels = {"stage": "table", "network": row, "data": name, "class": anomaly, "lr": arm.lr}
            own = task(name, anomaly, scale, examples, micro_batch, arm.residual or "none", arm.norm or "none")
            yield Run(SHARED, own, arm, seed, tuple(labels.items()))


def task(
    name: str, anomaly: int, scale: Scale, examples: int, micro_batch: int, residual: Residual, norm: Norm
) -> Task:
    """What the rows of a class share."""
    return Task(
        name,
        examples,
        micro_batch,
        probe_examples=1_000,
        probe_every=max(examples // 200, 1),
        depth=scale.layers,
        widths=scale.widths,
        residual=residual,
        norm=norm,
        anomaly=anomaly,
    )


def tables(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """T1 beside the origin's numbers, and what each choice does."""
    found = {}
    chosen = runs[runs["stage"] == "choice"]
    if len(chosen):
        columns = [
            "residual",
            "norm",
            "optimizer",
            "batch",
            "lr",
            "final",
            "best",
            "diverged",
            "spikes",
            "probe_spikes",
        ]
        found["choices"] = chosen[columns].reset_index(drop=True)
    table = runs[runs["stage"] == "table"]
    if len(table):
        found["T1"] = _t1(table)
    return found


def _t1(table: pd.DataFrame) -> pd.DataFrame:
    lines = []
    for network, part in table.groupby("network", sort=False):
        line: dict[str, Any] = {"row": network, "classes": part["class"].nunique()}
        line |= {"train loss": part["train_loss"].mean(), "valid loss": part["test_loss"].mean()}
        line |= {"AUROC": part["auroc"].mean()}
        line |= {f"AUROC, class {anomaly}": own["auroc"].mean() for anomaly, own in part.groupby("class")}
        line |= {"spikes": part["spikes"].sum(), "diverged": int(part["diverged"].sum())}
        line |= {"mean n": part["mean_batch"].mean(), "updates": part["updates"].mean()}
        theirs = ORIGIN.get(str(network), {})
        line |= {f"origin's {name.replace('_', ' ')}": value for name, value in theirs.items()}
        lines.append(line)
    return pd.DataFrame(lines)


def histograms(scale: Scale, steps: int = 20, bins: int = 120) -> pd.DataFrame:
    """G1-G3: how the gradient of the last layer's weights is spread over the first steps, 30 layers.

    Args:
        scale: Its data, and the small and the large batch.
        steps: Optimizer steps, Adam at 1e-3.
        bins: Over the middle 99.8 % of all steps of a network.

    Returns:
        A row for each network, step and bin: ``centre``, ``density``; and the step's ``spread`` (standard deviation).
    """
    small, large = scale.histogram_batches
    cases: dict[str, tuple[Residual, int]] = {
        "G1: AE": ("none", small),
        "G2: residual AE": ("identity", small),
        "G3: residual AE, large batch": ("identity", large),
    }
    parts = []
    inputs = torch.from_numpy(data.split(scale.data, 0).train)
    for name, (residual, batch) in cases.items():
        gradients = _last_layer_gradients(residual, batch, inputs, scale, steps)
        edges = np.linspace(*np.quantile(np.concatenate(gradients), [0.001, 0.999]), bins + 1)
        for step, gradient in enumerate(gradients, start=1):
            density, _ = np.histogram(gradient, edges, density=True)
            row = {"network": name, "step": step, "centre": (edges[1:] + edges[:-1]) / 2, "density": density}
            parts.append(pd.DataFrame(row).assign(spread=gradient.std(), batch=batch))
    return pd.concat(parts, ignore_index=True)


def _last_layer_gradients(
    residual: Residual, batch: int, inputs: torch.Tensor, scale: Scale, steps: int
) -> list[np.ndarray]:
    torch.manual_seed(0)
    model = Autoencoder(30, scale.widths, 16, residual, "none", variational=False, inputs=inputs.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator, gradients = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        x = inputs[torch.randperm(len(inputs), generator=generator)[:batch]]
        optimizer.zero_grad()
        model.loss(x).backward()  # type: ignore[no-untyped-call]
        assert model.decode_out.weight.grad is not None
        gradients.append(model.decode_out.weight.grad.flatten().numpy().copy())
        optimizer.step()
    return gradients


def measure(options: Options, workers: int, folder: Path) -> None:
    """Write ``histograms.parquet``, unless it is there."""
    if not (folder / "histograms.parquet").is_file():
        table = histograms(SCALES[options.preset])
        table.attrs = {"provenance": provenance(), "preset": options.preset}
        write_atomically(table, folder / "histograms.parquet")


def draw(folder: Path) -> None:
    """G1-G3 as ridges of the first steps, G4 and G5 as training curves."""
    histograms = read_table(folder / "histograms.parquet")
    names = list(histograms["network"].unique())
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(names), figsize=(3.4 * len(names), 4.2), layout="constrained")
        for axes, name in zip(grid, names, strict=True):
            part = histograms[histograms["network"] == name]
            for step, own in part.groupby("step"):
                height = own["density"] / own["density"].max()
                base = -float(step)
                axes.fill_between(
                    own["centre"],
                    base,
                    base + 2.2 * height,
                    color="#0072B2",
                    alpha=0.55,
                    linewidth=0.4,
                    edgecolor="white",
                    zorder=step,
                )
            axes.set_yticks([-1, -10, -20], ["1", "10", "20"])
            axes.set_title(f"{name}\n(batch {part['batch'].iloc[0]})", fontsize=8.5)
            axes.set_xlabel("gradient of a weight")
        grid[0].set_ylabel("optimizer step")
        save(figure, folder, "gradients")
    runs = load(folder.name, folder=folder.parent)
    if (runs["stage"] == "table").any():
        _origin_curves(folder)


def _origin_curves(folder: Path) -> None:
    curves = load(folder.name, curves=True, folder=folder.parent)
    curves = curves[curves["stage"] == "table"]
    names, keys = list(curves["network"].unique()), curves.groupby("network", sort=False)["key"].unique()
    # The controller in its own colour; grey levels differ, and the plain network is dotted.
    colours = dict(zip(names, ["#000000", "#999999", KINDS["adaptive"][0], "#E69F00", "#CC79A7"], strict=False))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for name in names:
            for index, key in enumerate(keys[name]):
                own = curves[curves["key"] == key]
                axes.plot(
                    own["examples_seen"] / 1e6,
                    own["loss"],
                    ":" if name == names[0] else "-",
                    color=colours[name],
                    linewidth=1.0,
                    alpha=1.0 if index == 0 else 0.45,
                    label=name if index == 0 else None,
                )
        axes.set_yscale("log")
        axes.set_ylim(20, 1e4)
        axes.set_xlabel("training examples (millions)")
        axes.set_ylabel("training loss")
        axes.legend(fontsize=7.5)
        save(figure, folder, "curves")


STUDY = Study(
    "origin",
    "the origin's figures and table, and which choices make its instability appear",
    plan,
    from_runs(tables),
    order=1,
    measure=measure,
    figures=draw,
)
