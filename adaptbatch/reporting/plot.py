"""A run, or a plan from it, in one matplotlib axes. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from adaptbatch.planning.advice import Plan

BATCH, SCALE, TIME = "#0072B2", "#D55E00", "#009E73"


def draw_history(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """See :meth:`adaptbatch.History.plot`."""
    if rows.empty:
        raise ValueError("history must have at least one window to plot, it has none; plot after the first step.")
    if ax is None:
        ax = _axes()
    seen, scale = rows["examples_seen"], rows["noise_scale"].replace(math.inf, math.nan)
    ax.step(seen, rows["global_batch"], where="post", color=BATCH, linewidth=1.6, label="batch n")
    ax.plot(seen, scale, color=SCALE, linewidth=1.2, label="noise scale B")
    drawn = np.concatenate([scale, rows["global_batch"]])
    top, bottom = 4.0 * np.nanmax(drawn), 0.25 * np.nanmin(drawn[~(drawn <= 0.0)])
    known = rows["noise_scale_low"].notna()
    ax.fill_between(
        seen[known],
        rows["noise_scale_low"][known].clip(lower=bottom),
        rows["noise_scale_high"][known].clip(upper=top),
        color=SCALE,
        alpha=0.18,
        linewidth=0,
        label="95 % interval",
    )
    ax.set_yscale("log")
    ax.set_ylim(bottom, top)
    unit = rows.attrs.get("unit", "examples")
    ax.set_xlabel(f"{unit} seen")
    ax.set_ylabel(unit)
    ax.legend(frameon=False, fontsize="small")
    return ax


def draw_plan(plan: Plan, ax: Axes | None = None) -> Axes:
    """See :meth:`adaptbatch.planning.advice.Plan.plot`."""
    if ax is None:
        ax = _axes()
    table = plan.table
    for name, colour in (("steps", BATCH), ("examples", SCALE)):
        factor = table[f"{name}_factor"]
        label = f"{plan.unit} / least" if name == "examples" else "steps / least"
        ax.plot(table["batch"], factor, color=colour, linewidth=1.6, marker="o", markersize=3, label=label)
        high = table[f"{name}_factor_high"].clip(upper=10.0 * factor.max())
        ax.fill_between(table["batch"], table[f"{name}_factor_low"], high, color=colour, alpha=0.18, linewidth=0)
    if table["seconds_factor"].notna().all():
        label = f"seconds / least, {plan.recommended.devices} devices".replace(" 1 devices", " 1 device")
        ax.plot(table["batch"], table["seconds_factor"], color=TIME, linewidth=1.6, linestyle="--", label=label)
    ax.axvline(plan.recommended.batch, color="#666666", linewidth=1.0, linestyle=":", label="recommended")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_ylim(0.9, 1.4 * float(table[["steps_factor", "examples_factor"]].max().max()))
    ax.set_xlabel(f"batch [{plan.unit}]")
    ax.set_ylabel("over the least [1]")
    ax.legend(frameon=False, fontsize="small")
    return ax


def _axes() -> Axes:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Runs and plans are plotted by matplotlib, which is not installed: pip install "adaptbatch[plot]".'
        ) from error
    return pyplot.subplots(figsize=(7.0, 3.6), layout="constrained")[1]
