"""The picture of the planning study: what one run foretold, what it took, and what a recommendation costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from studies.output.style import KINDS, STYLE, save

FORETOLD, CALIBRATED = KINDS["adaptive"][0], KINDS["other"][0]
QUIET = "#AAAAAA"
CHANNELS = {"noise_scale": ("#0072B2", "Euclidean"), "noise_scale_metric": ("#CC79A7", "Adam's metric")}
CHANNELS |= {"noise_scale_typical": ("#009E73", "typical window")}


def draw_plans(tables: Mapping[str, pd.DataFrame], windows: pd.DataFrame, folder: Path) -> None:
    """Save ``figure``: a row for each task; updates by batch, noise along the run, time of what was recommended.

    Args:
        tables: Those of the study: ``predictions``, and ``ratios`` and ``followed`` where they are.
        windows: Rows of the measured runs.
        folder: Of the study.
    """
    tasks = list(tables["predictions"].groupby("task", sort=False))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(tasks),
            3,
            figsize=(10.5, 3.1 * len(tasks)),
            squeeze=False,
            layout="constrained",
            gridspec_kw={"width_ratios": (1.25, 1.0, 0.8)},
        )
        for (name, part), (left, middle, right) in zip(tasks, grid, strict=True):
            _updates(left, part)
            left.set_title(f"{name}: updates for one loss")
            _noise(middle, windows[windows["task"] == name], _own(tables, "ratios", name))
            middle.set_title("noise scale along the run")
            right.set_title("recommended, followed")
            _times(right, _own(tables, "followed", name))
        grid[0, 0].legend(fontsize=7.5)
        grid[0, 1].legend(fontsize=7.5)
        save(figure, folder, "figure")


def _own(tables: Mapping[str, pd.DataFrame], name: str, task: str) -> pd.DataFrame:
    table = tables.get(name)
    return pd.DataFrame() if table is None else table[table["task"] == task]


def _updates(axes: Axes, part: pd.DataFrame) -> None:
    """Predicted curves, and the sweep's points on or off them; the two that measure nothing in grey."""
    start, opening = int(part["start"].iloc[0]), float(part["opening"].iloc[0])
    first = pd.DataFrame([{"batch": start} | dict.fromkeys(_WAYS, opening / start)])
    curve = pd.concat([part, first]).sort_values("batch")
    axes.fill_between(curve["batch"], curve["low"], curve["high"], color=FORETOLD, alpha=0.2, linewidth=0)
    for way, (colour, line, label) in _WAYS.items():
        if label and curve[way].notna().all():
            axes.plot(curve["batch"], curve[way], line, color=colour, label=label, linewidth=1.4, zorder=1)
    taken = curve[np.isfinite(curve["updates"]) & (curve["updates"] > 0.0)]
    axes.plot(taken["batch"], taken["updates"], "o", color="black", markersize=5, label="it took", zorder=3)
    axes.plot(start, opening / start, "o", color="white", markeredgecolor="black", markersize=8, zorder=4)
    axes.annotate("the measured run", (start, opening / start), (8, 6), textcoords="offset points", fontsize=7.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(0.5 * curve["equal examples"].min(), 2.0 * curve[["equal examples", "updates"]].max().max())
    axes.set_xticks(curve["batch"], [f"{n:,.0f}" for n in curve["batch"]], fontsize=7.5)
    _plain(axes)
    axes.set_xlabel("batch")
    axes.set_ylabel("updates")


_WAYS = {
    "predicted": (FORETOLD, "-", "foretold by one run"),
    "calibrated": (CALIBRATED, "--", "calibrated by branches"),
    "equal updates": (QUIET, ":", "as many updates"),
    "equal examples": (QUIET, "-.", "as many examples"),
    "low": (QUIET, "", ""),
    "high": (QUIET, "", ""),
    "updates": (QUIET, "", ""),
}


def _noise(axes: Axes, windows: pd.DataFrame, critical: pd.DataFrame) -> None:
    """Each seed's pooled noise scale in three channels, and the critical batches of branches."""
    tops = []
    for column, (colour, label) in CHANNELS.items():
        for index, (_, own) in enumerate(windows.groupby("seed")):
            rows = own[np.isfinite(own[column]) & (own[column] > 0.0)]
            thin = rows.iloc[:: max(1, len(rows) // 200)]
            axes.plot(
                thin["examples_seen"],
                thin[column],
                color=colour,
                linewidth=0.8,
                alpha=0.6,
                label=label if index == 0 else None,
            )
            tops.append(thin[column].quantile(0.98) if len(thin) else np.nan)
    if len(critical):
        low, high = (critical["critical"] / factor for factor in (1.0, 0.5))
        axes.vlines(critical["at"], low, high, color="black", linewidth=1.0)
        axes.plot(critical["at"], critical["critical"], "_", color="black", markersize=9, label="critical, by branches")
        tops.append(2.5 * critical["critical"].max())
    if np.isfinite(tops).any():
        axes.set_yscale("log")
        axes.set_ylim(top=2.0 * np.nanmax(tops))
    _plain(axes)
    axes.set_xlabel("examples or characters seen")


def _times(axes: Axes, followed: pd.DataFrame) -> None:
    """By devices, each seed's recommendation over the best of the sweep, and the span to the worst."""
    axes.axhline(1.0, color=QUIET, linewidth=1.0, zorder=0)
    axes.axhline(1.1, color=QUIET, linewidth=1.0, linestyle=":", zorder=0)
    if not len(followed):
        axes.set_axis_off()
        return
    devices = sorted(followed["devices"].unique())
    for place, count in enumerate(devices):
        own = followed[followed["devices"] == count]
        worst = float(own["worst"].median())
        axes.plot([place, place], [1.0, worst], color=QUIET, linewidth=5, alpha=0.35, solid_capstyle="butt", zorder=1)
        spread = np.linspace(-0.12, 0.12, len(own)) if len(own) > 1 else [0.0]
        axes.plot(place + np.asarray(spread), own["time"], "D", color=FORETOLD, markersize=4)
        chosen = ", ".join(f"{n:,.0f}" for n in sorted(own["batch"].unique()))
        axes.annotate(f"n = {chosen}", (place, worst), (0, 3), textcoords="offset points", fontsize=7.5, ha="center")
    axes.set_yscale("log")
    axes.set_xticks(range(len(devices)), [f"{count:.0f}" for count in devices])
    axes.set_xlim(-0.6, len(devices) - 0.4)
    top = 1.5 * float(followed["worst"].max())
    axes.set_ylim(0.9, max(top, 2.0))
    axes.set_yticks(*_factors(top))
    _plain(axes)
    axes.set_xlabel("devices")
    axes.set_ylabel("time over the best of the sweep")


def _factors(top: float) -> tuple[list[float], list[str]]:
    ticks = [tick for tick in (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0) if tick <= max(top, 2.0)]
    return ticks, [f"{tick:g}" for tick in ticks]


def _plain(axes: Axes) -> None:
    """No ticks but those with a number."""
    axes.minorticks_off()
