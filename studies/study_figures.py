"""Figures of the studies of many runs, from their folders: PNG and PDF, one colour for each kind of arm everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from studies import favourable as favourable_study
from studies.figures import STYLE
from studies.results import load, read_table
from studies.verdicts import SWEEP

# Okabe and Ito's colours; their lightness differs too, and so do the markers, so that grey tells them apart.
KINDS: Mapping[str, tuple[str, str]] = {
    "fixed": ("#999999", "o"),
    "adaptive": ("#0072B2", "D"),
    "control": ("#56B4E9", "s"),
    "other": ("#D55E00", "^"),
}
ARCHITECTURES: Mapping[str, tuple[str, str]] = {
    "plain": ("#000000", "o"),
    "residual": ("#D55E00", "^"),
    "scaled": ("#0072B2", "D"),
    "rezero": ("#56B4E9", "s"),
    "pre-LN": ("#009E73", "v"),
    "branch-LN": ("#CC79A7", "P"),
}
CONTROLS = ("replay", "rate follows root", "rate follows", "constant mean", "random switching")


def kind(arm: str) -> str:
    """To which kind an arm belongs."""
    if arm in CONTROLS:
        return "control"
    first = arm.split()[0].rstrip(",")
    if first == "pareto":
        return "adaptive"
    return first if first in KINDS else "other"


def save(figure: Figure, folder: Path, name: str) -> None:
    """As PNG and as PDF, without a date in it."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png")
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    plt.close(figure)


def comparison(folder: Path) -> None:
    """Every arm of every task against its best fixed batch."""
    arms = read_table(folder / "arms.parquet")
    tasks = list(dict.fromkeys(zip(arms["network"], arms["data"], strict=True)))
    heights = [
        max(len(arms[(arms["network"] == n)]["arm"].unique()) for n in ("noisy", "calm") if n in set(arms["network"]))
    ]
    with plt.rc_context(STYLE):
        networks = list(dict.fromkeys(network for network, _ in tasks))
        data = list(dict.fromkeys(name for _, name in tasks))
        figure, grid = plt.subplots(
            len(networks),
            len(data),
            figsize=(2.3 * len(data) + 1.2, 0.165 * heights[0] * len(networks) + 1.2),
            sharey="row",
            squeeze=False,
            layout="constrained",
        )
        for row, network in enumerate(networks):
            order = _order(arms[(arms["network"] == network)])
            for column, name in enumerate(data):
                if (network, name) not in tasks:
                    grid[row, column].set_axis_off()
                    continue
                part = arms[(arms["network"] == network) & (arms["data"] == name)]
                _ratios(grid[row, column], part, order)
                grid[row, column].set_title(f"{network}, {name}")
        figure.supxlabel("final loss / that of the best fixed batch", fontsize=9)
        save(figure, folder, "figure")
    _budgets(read_table(folder / "budget.parquet"), folder)


# Method to colour, line and marker.
BUDGETS: Mapping[str, tuple[str, str, str]] = {
    SWEEP: ("#777777", "-", "o"),
    "fixed 64": ("#000000", ":", "o"),
    "adaptive": ("#0072B2", "-", "D"),
    "adaptive, theta": ("#56B4E9", "--", "s"),
    "warmup": ("#E69F00", "--", "^"),
    "clip": ("#009E73", "-.", "v"),
}


def _budgets(table: pd.DataFrame, folder: Path, most: int = 8) -> None:
    """What to expect of so many trials, by network."""
    networks = list(table["network"].unique())
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(networks), figsize=(8.4, 3.0), squeeze=False, layout="constrained")
        for axes, network in zip(grid[0], networks, strict=True):
            for method, (colour, style, marker) in BUDGETS.items():
                own = table[(table["network"] == network) & (table["method"] == method) & (table["trials"] <= most)]
                axes.plot(
                    own["trials"], own["expected"], style, marker=marker, color=colour, markersize=4, label=method
                )
            axes.set_title(network)
            axes.set_xlabel("trials")
        grid[0, 0].set_ylabel("expected loss of the best trial")
        grid[0, 0].legend(fontsize=7.5)
        save(figure, folder, "budget")


def _order(part: pd.DataFrame) -> list[str]:
    """Fixed batches first, then the others by where they end on the home task."""
    home = part[part["data"] == part["data"].iloc[0]].set_index("arm")["of best fixed"]
    fixed = sorted((arm for arm in home.index if kind(arm) == "fixed"), key=lambda arm: int(arm.split()[1]))
    return fixed + list(home.drop(fixed).sort_values(ascending=False).index)


def _ratios(axes: Axes, part: pd.DataFrame, order: Sequence[str], limit: float = 3.0) -> None:
    rows = part.set_index("arm")
    axes.axvline(1.0, color="#BBBBBB", linewidth=0.8)
    for place, arm in enumerate(order):
        if arm not in rows.index:
            continue
        row, (colour, marker) = rows.loc[arm], KINDS[kind(arm)]
        low, value, high = (row[f"of best fixed{end}"] for end in (" low", "", " high"))
        axes.plot([low, min(high, limit)], [place, place], color=colour, linewidth=1.4)
        if high > limit:
            axes.plot(limit, place, ">", color=colour, markersize=4, clip_on=False)
        if value <= limit:
            axes.plot(value, place, marker, color=colour, markersize=5)
        else:
            axes.annotate("off", (limit, place), color=colour, ha="right", va="center", fontsize=7)
        if row["diverged"]:
            axes.annotate(
                f"  {row['diverged']:.0f} of {row['seeds']:.0f} diverged", (limit, place), fontsize=6, va="center"
            )
    axes.set_yticks(range(len(order)), order, fontsize=7.5)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.set_xscale("log")
    axes.set_xlim(0.6, limit)
    axes.set_xticks([0.7, 1.0, 1.5, 2.0, 3.0])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())


LINES: Mapping[str, tuple[str, str, str]] = {
    "fixed 64": ("#999999", "-", "o"),
    "fixed 1024": ("#555555", "-", "o"),
    "adaptive": ("#0072B2", "-", "D"),
    "warmup": ("#E69F00", "--", "^"),
    "clip": ("#009E73", "--", "v"),
    "rezero": ("#CC79A7", ":", "s"),
    "radam": ("#D55E00", ":", "P"),
}


def sensitivity(folder: Path) -> None:
    """Final loss against the learning rate, and against every method's own knob."""
    runs = load(folder.name, folder=folder.parent)
    networks = list(runs["network"].unique())
    knobs = list(runs["knob"].dropna().unique()) if "knob" in runs else []
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(networks),
            1 + len(knobs),
            figsize=(3.4 + 1.4 * len(knobs), 2.7 * len(networks)),
            width_ratios=[2.0] + [1.0] * len(knobs),
            squeeze=False,
            sharey="row",
            layout="constrained",
        )
        for row, network in enumerate(networks):
            part = runs[runs["network"] == network]
            top = 2.2 * part["final"].min()
            _rates(grid[row, 0], part[part["stage"] == "tune"], top)
            grid[row, 0].set_title(f"{network}: learning rate")
            for axes, knob in zip(grid[row, 1:], knobs, strict=True):
                means = part[part["knob"] == knob].groupby("value")["final"].mean()
                axes.plot(
                    means.index,
                    means.clip(upper=top),
                    "-D",
                    color="#0072B2" if knob in ("theta", "micro-batch") else "#E69F00",
                    markersize=4,
                )
                axes.set_xscale("log")
                shown = [means.index.min(), *means.index[[len(means) // 2]], means.index.max()]
                axes.set_xticks(shown, [_short(value) for value in shown])
                axes.xaxis.set_minor_locator(NullLocator())
                axes.set_title(knob)
            grid[row, 0].set_ylim(0.95 * part["final"].min(), 1.02 * top)
            grid[row, 0].set_ylabel("final validation loss")
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, fontsize=8, ncols=len(names), loc="outside lower center")
        save(figure, folder, "figure")


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _rates(axes: Axes, tune: pd.DataFrame, top: float) -> None:
    for method, (colour, style, marker) in LINES.items():
        means = tune[tune["method"] == method].groupby("lr")["final"].mean()
        if len(means):
            axes.plot(
                means.index, means.clip(upper=top), style, marker=marker, color=colour, markersize=4, label=method
            )
    axes.set_xscale("log")
    axes.set_xlabel("learning rate (Adam)")


def depth(folder: Path) -> None:
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
                for name, (colour, marker) in ARCHITECTURES.items():
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


# Beyond them an arm is named and not drawn.
MOST_UPDATES = 300


def frontier(folder: Path) -> None:
    """Updates against examples to the target: the fixed batches' hyperbola, and every method."""
    methods, fits = read_table(folder / "methods.parquet"), read_table(folder / "fit.parquet")
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            1, max(len(fits), 1), figsize=(4.2 * max(len(fits), 1), 4.0), squeeze=False, layout="constrained"
        )
        for axes, fit in zip(grid[0], fits.itertuples(), strict=False):
            part = methods[(methods["network"] == fit.network) & methods["updates"].notna()]
            off = part["updates"] > MOST_UPDATES
            if off.any():
                said = ", ".join(f"{own.arm}: {own.updates:,.0f} updates" for own in part[off].itertuples())
                axes.annotate(f"off the right: {said}", (1.0, 0.02), xycoords="axes fraction", fontsize=7.5, ha="right")
            part = part[~off]
            n = np.geomspace(16, 65536, 200)
            updates = fit.S_min + fit.E_min / n
            axes.plot(updates, n * updates, color="#BBBBBB", zorder=0)
            for own in part.itertuples():
                colour, marker = KINDS[kind(own.arm)]
                axes.plot(own.updates, own.examples, marker, color=colour, markersize=5)
            axes.set_xscale("log")
            axes.set_yscale("log")
            spans = (part["updates"], part["examples"])
            axes.set_xlim(spans[0].min() / 2.5, spans[0].max() * 3.0)
            axes.set_ylim(spans[1].min() / 1.5, spans[1].max() * 1.5)
            ticks = [t for t in (10, 20, 50, 100, 200, 500, 1000) if spans[0].min() / 2.5 < t < spans[0].max() * 3.0]
            axes.set_xticks(ticks, map(str, ticks))
            axes.xaxis.set_minor_formatter(NullFormatter())
            _label_places(axes, part)
            axes.set_title(f"{fit.network}: to a loss of {fit.target:.1f}")
            axes.set_xlabel("updates")
        grid[0, 0].set_ylabel("examples")
        save(figure, folder, "figure")


def _label_places(axes: Axes, part: pd.DataFrame) -> None:
    """Names beside where the arms stand, moved apart where they would overlap; who stands in one place shares one."""
    place = part[["updates", "examples"]].map(lambda value: round(math.log(value) / 0.05))
    to_axes = axes.transData + axes.transAxes.inverted()
    labels: dict[str, list[tuple[float, float, tuple[float, float], str]]] = {"left": [], "right": []}
    for _, own in part.groupby([place["updates"], place["examples"]], sort=False):
        names = sorted(own["arm"], key=lambda arm: kind(arm) != "adaptive")
        name = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
        spot = (float(own["updates"].mean()), float(own["examples"].mean()))
        x, y = to_axes.transform(spot)
        labels["left" if kind(name) == "adaptive" else "right"].append((y, x, spot, name))
    for side, entries in labels.items():
        height = -math.inf
        for y, x, spot, text in sorted(entries):
            height = max(y, height + 0.042)
            axes.annotate(
                text,
                spot,
                (x + (0.025 if side == "right" else -0.025), height),
                textcoords="axes fraction",
                fontsize=7.5,
                color=KINDS[kind(text)][0],
                va="center",
                ha="left" if side == "right" else "right",
                arrowprops={"arrowstyle": "-", "color": "#BBBBBB", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
            )


def favourable(folder: Path) -> None:
    """What each arm paid to the target, seed by seed, and the batches beside the noise scale."""
    costs, runs = read_table(folder / "costs.parquet"), load(folder.name, folder=folder.parent)
    curves = load(folder.name, curves=True, folder=folder.parent)
    spent = favourable_study.cost_to_target(runs[runs["stage"] == "final"], curves)
    order = costs.sort_values("cost", ascending=False)["arm"].tolist()
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.6), layout="constrained")
        for height, arm in enumerate(order):
            colour, marker = KINDS[kind(arm)]
            own = spent.loc[spent["arm"] == arm, "cost"]
            held = own[np.isfinite(own)] / 1e6
            left.plot(held, [height] * len(held), marker, color=colour, markersize=4, alpha=0.6, linestyle="none")
            if len(held) < len(own):
                never, place = f"{len(own) - len(held)} of {len(own)} never", ("axes fraction", "data")
                left.annotate(never, (1.01, height), fontsize=7, va="center", xycoords=place)
        left.set_yticks(range(len(order)), order)
        left.set_ylim(-0.6, len(order) - 0.4)
        left.set_xlabel(f"examples + {favourable_study.PRICE:,.0f} x updates to the target (millions)")
        best = str(costs.loc[costs["best fixed"], "arm"].iloc[0])
        for arm in (best, "pareto"):
            part = curves[(curves["arm"] == arm) & (curves["stage"] == "final")]
            for index, (_, own) in enumerate(part.groupby("seed")):
                colour, label = KINDS[kind(arm)][0], f"batch, {arm}" if index == 0 else None
                inner = own.iloc[:-1]  # the last window is a partial one
                right.plot(inner["examples_seen"], inner["global_batch"], color=colour, linewidth=1.4, label=label)
                if arm == "pareto":
                    name = "noise scale B" if index == 0 else None
                    right.plot(own["examples_seen"], own["noise_scale"], ":", color="#D55E00", linewidth=1, label=name)
        right.set_yscale("log")
        right.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
        right.set_xlabel("examples")
        right.set_ylabel("examples")
        right.legend(fontsize=7)
        save(figure, folder, "figure")


def momentum(folder: Path) -> None:
    """Final loss of every optimizer against its rate, at the small and the large batch."""
    runs = load(folder.name, folder=folder.parent)
    tune, names = runs[runs["stage"] == "tune"], list(runs["method"].unique())
    top = 2.2 * tune["final"].min()
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, math.ceil(len(names) / 2), figsize=(10, 4.6), sharey=True, layout="constrained")
        for axes, name in zip(grid.flat, names, strict=False):
            own = tune[tune["method"] == name]
            for batch, colour, marker in ((64, "#D55E00", "^"), (1024, "#0072B2", "D")):
                part = own[own["batch"] == batch].sort_values("lr")
                axes.plot(
                    part["lr"],
                    part["final"].clip(upper=top),
                    marker=marker,
                    color=colour,
                    markersize=4,
                    label=f"batch {batch}",
                )
            axes.set_xscale("log")
            axes.set_title(
                name + (", with momentum" if name != "momentum" and bool(own["momentum"].iloc[0]) else ""), fontsize=8
            )
        grid[0, 0].legend(fontsize=7)
        for axes in grid[:, 0]:
            axes.set_ylabel("final loss")
        for axes in grid[-1]:
            axes.set_xlabel("learning rate")
        save(figure, folder, "figure")


def origin(folder: Path) -> None:
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
