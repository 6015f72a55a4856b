"""The picture of the studies in which the controller acts: loss against updates, and how many updates an arm needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from studies.output.fronts import Frontier
from studies.output.style import KINDS, STYLE, save, short

LIVE, STILL = KINDS["adaptive"][0], KINDS["other"][0]
OPEN = "#D55E00"
OPEN_LOOP = r"\bramp\b|replay|constant mean"


def figure_of(
    tables: Callable[[Path], Mapping[str, pd.DataFrame]], task: Sequence[str], title: str
) -> Callable[[Path], None]:
    """:func:`draw_fronts` of a study's folder; nothing before a task has a frontier.

    Args:
        tables: Of a folder, among them ``arms``.
        task: Columns that tell tasks apart.
        title: Of each task, a format of these columns.
    """

    def draw(folder: Path) -> None:
        found = tables(folder)
        if "arms" in found:
            draw_fronts(found["arms"], task, title, folder, found.get("before"))

    return draw


def draw_fronts(
    arms: pd.DataFrame, task: Sequence[str], title: str, folder: Path, before: pd.DataFrame | None = None
) -> None:
    """Save ``figure``: a row for each task, its frontier with all arms, and their ratios with intervals.

    Args:
        arms: Table of :func:`studies.output.fronts.compare` with the columns ``task`` and ``live``.
        task, title: Columns that tell tasks apart, and a format of them.
        folder: Of the study.
        before: The same with fixed batches as they were at first, whose frontier is drawn beside; None: without.
    """
    tasks = list(arms.groupby(list(task), sort=False))
    with plt.rc_context(STYLE):
        heights = [0.9 + 0.24 * max(8, (~part["fixed"]).sum()) for _, part in tasks]
        figure, grid = plt.subplots(
            len(tasks),
            2,
            figsize=(9.0, sum(heights)),
            squeeze=False,
            layout="constrained",
            gridspec_kw={"height_ratios": heights, "width_ratios": (1.0, 1.1)},
        )
        for (names, part), (left, right) in zip(tasks, grid, strict=True):
            _loss_by_updates(left, part)
            if before is not None:
                _frontier(left, before[(before[list(task)] == list(names)).all(axis=1)], label="with shorter warm-ups")
            left.set_title(title.format(*names))
            _ratios(right, part)
        grid[-1, 0].set_xlabel("updates, at equal examples")
        grid[-1, 1].set_xlabel("updates, over those of a fixed batch of that loss")
        save(figure, folder, "figure")


def _colour(row: pd.Series) -> str:
    if re.search(OPEN_LOOP, str(row["arm"])):
        return OPEN
    return LIVE if row["live"] > row["seeds"] / 2 else STILL


def _loss_by_updates(axes: Axes, part: pd.DataFrame) -> None:
    """Fixed batches with their frontier, arms as diamonds."""
    fixed, others = part[part["fixed"]].sort_values("updates"), part[~part["fixed"] & np.isfinite(part["loss"])]
    known = fixed[np.isfinite(fixed["loss"])]
    _frontier(axes, known)
    axes.plot(known["updates"], known["loss"], KINDS["fixed"][1], color="#777777", markersize=5)
    for row in known.itertuples():
        axes.annotate(
            str(row.arm).removeprefix("fixed "),
            (row.updates, row.loss),
            (3, 4),
            textcoords="offset points",
            fontsize=7.5,
        )
    for _, row in others.iterrows():
        axes.plot(row["updates"], row["loss"], KINDS["adaptive"][1], color=_colour(row), markersize=4.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [float(t) for t in known["updates"]]
    axes.set_xticks(ticks, [short(round(t, -1) if t > 100 else round(t)) for t in ticks], fontsize=7.5, rotation=45)
    spread = np.geomspace(part["loss"][np.isfinite(part["loss"])].min(), known["loss"].max(), 4)
    axes.set_yticks(spread, [f"{value:.3g}" for value in spread])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("loss at the end")


def _frontier(axes: Axes, part: pd.DataFrame, label: str = "") -> None:
    """Of the fixed batches; dotted and labelled where it is not the one that counts."""
    known = part[part["fixed"] & np.isfinite(part["loss"])]
    if not len(known):
        return
    front = Frontier.of(known["updates"].to_numpy(), known["loss"].to_numpy())
    axes.plot(front.updates, front.losses, ":" if label else "-", color="#BBBBBB", zorder=0, label=label)
    if label:
        axes.legend(fontsize=7.5, loc="upper right")


def _ratios(axes: Axes, part: pd.DataFrame) -> None:
    """One line an arm, the smallest ratio on top; an arm that hardly moved is marked."""
    others = part[~part["fixed"]].sort_values("updates ratio", ascending=False).reset_index(drop=True)
    axes.axvline(1.0, color="#BBBBBB", zorder=0)
    labels = []
    for place, row in others.iterrows():
        labels.append(f"{row['arm']} ({row['live']:.0f}/{row['seeds']:.0f})")
        ratio = row["updates ratio"]
        if not np.isfinite(ratio):
            axes.annotate("above all fixed batches", (1.02, float(place)), fontsize=7.5, va="center")  # type: ignore[arg-type]
            continue
        high = min(row["updates ratio high"], 3.0)
        axes.plot([row["updates ratio low"], high], [place, place], color=_colour(row), linewidth=1.2)
        axes.plot(ratio, place, KINDS["adaptive"][1], color=_colour(row), markersize=5)
    axes.set_yticks(range(len(labels)), labels, fontsize=7.5)
    axes.set_ylim(-0.7, len(labels) - 0.3)
    axes.set_title("blue: live in so many seeds; orange: open loop", fontsize=8, fontweight="normal")
