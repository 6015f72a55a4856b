"""The picture of what replaces a warm-up: where runs end over three decades of rates, by how they open."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import NullFormatter

from studies.output.style import STYLE, save

LINES = {
    "rate warm-up": ("the rate warms up", "#999999", "o"),
    "none": ("nothing does", "#D55E00", "^"),
    "large batch first": ("a large batch first", "#009E73", "s"),
    "standard error": ("StandardError opens large", "#0072B2", "D"),
}


def draw_openings(runs: pd.DataFrame, title: str, folder: Path) -> None:
    """Save ``opening``: the final loss of every run, and the mean over seeds, against the rate.

    Args:
        runs: With ``order``, ``arm``, ``lr`` and ``test_loss``.
        title: Of each order, a format of it.
        folder: Of the study.
    """
    orders = list(dict.fromkeys(runs["order"]))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            1, len(orders), figsize=(4.4 * len(orders), 3.2), sharey=True, squeeze=False, layout="constrained"
        )
        for axes, order in zip(grid[0], orders, strict=True):
            own = runs[runs["order"] == order]
            for way, (label, colour, marker) in LINES.items():
                part = own[own["arm"] == way]
                means = part.groupby("lr")["test_loss"].mean()
                axes.plot(part["lr"], part["test_loss"], marker, color=colour, markersize=3, alpha=0.35)
                axes.plot(means.index, means, "-", color=colour, marker=marker, markersize=5, label=label)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_yticks(ticks := [1.5, 2.0, 2.5, 3.0], [f"{tick:g}" for tick in ticks])
            axes.set_title(title.format(order))
            axes.set_xlabel("peak learning rate")
        grid[0, 0].set_ylabel("test loss at the end")
        grid[0, 0].legend(fontsize=7.5)
        save(figure, folder, "opening")
