"""The comparison drawn: every arm against the best fixed batch, and what trials buy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from studies.engine.results import read_table
from studies.output.style import KINDS, STYLE, kind, save
from studies.output.verdicts import SWEEP


def draw(folder: Path) -> None:
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
