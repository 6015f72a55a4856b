"""A run in one matplotlib axes. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BATCH, SCALE = "#0072B2", "#D55E00"


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


def _axes() -> Axes:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'A history is plotted by matplotlib, which is not installed: pip install "adaptbatch[plot]".'
        ) from error
    return pyplot.subplots(figsize=(7.0, 3.6), layout="constrained")[1]
