"""The picture of the bursts study: how often runs burst and where they end, by batch; and one seed."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from studies.output.style import KINDS, STYLE, save

LINES = {
    "examples": ("larger batch, equal examples", "#999999", "-", "o"),
    "updates": ("larger batch, equal updates", "#009E73", "--", "s"),
    "rates": ("rate lowered by its root", "#E69F00", ":", "^"),
}


def draw_bursts(arms: pd.DataFrame, runs: pd.DataFrame, curves: pd.DataFrame, rule: str, folder: Path) -> None:
    """Save ``figure``: the arms by batch; and the seed that is worst for the smallest, with what the rule did about it.

    Args:
        arms: Table of the study.
        runs, curves: Its rows and evaluations.
        rule: The arm that decides.
        folder: Of the study.
    """
    batches = _batches(arms)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplot_mosaic(
            [["bursts", "ends"], ["loss", "batch"]], figsize=(9.0, 6.4), layout="constrained"
        )
        _bursting(grid["bursts"], arms, rule)
        _ending(grid["ends"], arms, rule)
        _one_seed(grid["loss"], grid["batch"], curves, _worst(runs, batches[0]), batches, rule)
        save(figure, folder, "figure")


def _batches(table: pd.DataFrame) -> list[int]:
    """Those of the fixed arms, ascending."""
    return sorted(table.loc[table["stage"] == "examples", "batch"].astype(int))


def _line(table: pd.DataFrame, stage: str) -> pd.DataFrame:
    own = table[table["stage"] == stage]
    if stage == "rates":
        start = table[(table["stage"] == "examples") & (table["batch"] == _batches(table)[0])]
        own = pd.concat([start, own])
    return own.sort_values("batch")


def _bursting(axes: Axes, table: pd.DataFrame, rule: str) -> None:
    for stage, (name, colour, style, marker) in LINES.items():
        own = _line(table, stage)
        count = own["runs with probe spikes" if stage == "updates" else "runs with spikes"]
        axes.plot(own["batch"], count / own["seeds"], style, color=colour, marker=marker, markersize=5, label=name)
    lines = axes.get_legend_handles_labels()
    _rule_points(axes, table, table["runs with spikes"] / table["seeds"], rule)
    _sizes(axes, _batches(table))
    axes.set_ylim(-0.03, 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_title("Seeds that spike")
    axes.legend(*lines, fontsize=7.5)


def _ending(axes: Axes, table: pd.DataFrame, rule: str) -> None:
    ends = table["final"].where(np.isfinite(table["final"]))
    for stage in ("examples", "rates"):
        _, colour, style, marker = LINES[stage]
        own = _line(table, stage)
        low, high = (own["final"] - own["final low"]).abs(), (own["final high"] - own["final"]).abs()
        axes.errorbar(
            own["batch"],
            own["final"],
            [low, high],
            fmt=style,
            color=colour,
            marker=marker,
            markersize=5,
            elinewidth=1,
        )
    _rule_points(axes, table, ends, rule)
    _sizes(axes, _batches(table))
    shown = ends[table["stage"].isin(["examples", "rates", "rules", "tuned"])]
    axes.set_ylim(0.94 * shown.min(), min(1.06 * shown.max(), 2 * shown.min()))
    axes.set_title("Final loss (equal examples)")
    axes.legend(fontsize=7.5)


def _rule_points(axes: Axes, table: pd.DataFrame, values: pd.Series, rule: str) -> None:
    """The rule and what it is compared with at their mean batch, tuned ones hollow."""
    for index, row in table[table["stage"].isin(["rules", "tuned"])].iterrows():
        method = str(row["arm"]).removesuffix(", tuned")
        kind, marker = ("adaptive", "D") if method == rule else ("other", "v")
        colour = KINDS[kind][0]
        face = colour if method == row["arm"] else "white"
        at = (row["mean n"], values[index])  # type: ignore[call-overload]
        axes.plot(*at, marker, color=colour, mfc=face, markersize=6, zorder=3, label=row["arm"])


def _sizes(axes: Axes, batches: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [f"{n:,}" for n in batches])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("batch, or the one whose rate is taken")


def _worst(runs: pd.DataFrame, batch: int) -> int:
    """The seed on which a fixed batch spikes most."""
    own = runs[(runs["stage"] == "examples") & (runs["batch"] == batch)].set_index("seed")["spikes"]
    return int(own.idxmax())


def _one_seed(above: Axes, below: Axes, curves: pd.DataFrame, seed: int, batches: list[int], rule: str) -> None:
    own = curves[(curves["seed"] == seed) & curves["stage"].isin(["examples", "rules"])]
    smallest = f"fixed {batches[0]}"
    for arm, colour in ((smallest, KINDS["fixed"][0]), (rule, KINDS["adaptive"][0])):
        run = own[own["arm"] == arm]
        above.plot(run["examples_seen"] / 1e3, run["validation_loss"], color=colour, linewidth=1.3, label=arm)
    above.set_yscale("log")
    losses = own[own["arm"].isin([smallest, rule])]["validation_loss"]
    above.set_ylim(0.9 * losses.min(), min(losses.max(), 40 * losses.min()))
    above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    above.yaxis.set_minor_formatter(NullFormatter())
    above.set_title(f"Validation loss, seed {seed}")
    above.legend(fontsize=7.5)
    run = own[own["arm"] == rule]
    below.step(run["examples_seen"] / 1e3, run["global_batch"], where="pre", color=KINDS["adaptive"][0])
    below.set_yscale("log", base=2)
    below.set_ylim(batches[0] / 1.2, batches[-1] * 1.2)
    below.set_yticks(batches, [f"{n:,}" for n in batches])
    below.set_title("Batch that the standard error asks for")
    for axes in (above, below):
        axes.set_xlabel("training examples (thousands)")
