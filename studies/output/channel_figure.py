"""The figure of the two-networks study: what the two channels saw on each network, and what the rule did."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from studies.output.style import STYLE

ARMS = {"smallest": "#E69F00", "adaptive": "#0072B2"}


def channel_figure(
    results: dict[str, pd.DataFrame], path: Path, *, smallest: dict[str, str], exceedance: float, seed: int = 0
) -> None:
    """One column a network, one seed: loss, the noise scales and the batch, the tail, against examples.

    Args:
        results: Tables of the results schema by network.
        path: PNG to write.
        smallest: Name of each network's smallest fixed arm, drawn beside the adaptive one.
        exceedance: ``Q / n`` over its median from which a window is an exceedance.
        seed: Which seed is drawn.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            3, len(results), figsize=(5.2 * len(results), 7.4), sharex="col", squeeze=False, layout="constrained"
        )
        for column, (network, table) in enumerate(results.items()):
            table = table[table["seed"] == seed]
            runs = {
                "smallest": table[table["arm"] == smallest[network]],
                "adaptive": table[table["arm"] == "adaptive"],
            }
            names = {"smallest": smallest[network], "adaptive": "adaptive"}
            _loss(axes[0, column], runs, names)
            _typical(axes[1, column], runs["adaptive"])
            _tail(axes[2, column], runs, names, exceedance)
            axes[0, column].set_title(f"{network} network, seed {seed}: training loss")
            axes[2, column].set_xlabel("training examples seen")
            axes[2, column].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:,.0f}k"))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def _loss(axes: Axes, runs: dict[str, pd.DataFrame], names: dict[str, str]) -> None:
    for key, run in runs.items():
        axes.plot(run["examples_seen"], run["micro_batch_loss_max"], color=ARMS[key], lw=0.9, label=names[key])
        spiked = run[run["spikes"] > 0]
        axes.plot(
            spiked["examples_seen"], spiked["micro_batch_loss_max"], "v", color=ARMS[key], ms=4, mec="white", mew=0.4
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("largest in a window (▼: spike)")
    axes.legend(loc="upper right", ncols=2)
    axes.grid(axis="y", alpha=0.25)


def _typical(axes: Axes, run: pd.DataFrame) -> None:
    x = run["examples_seen"]
    axes.plot(x, run["noise_scale"].replace(np.inf, np.nan), color="#999999", lw=1.2, label="pooled B")
    axes.plot(x, run["noise_scale_typical"], color="#009E73", lw=1.6, label="typical B")
    # Without the notches of an epoch's last micro-batch.
    sizes = run["global_batch"].rolling(5, center=True, min_periods=1).median()
    axes.step(x, sizes, where="pre", color="#222222", lw=1.6, label="batch n")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylabel("examples")
    axes.set_title("what “adaptive” did")
    # Above the axes, beside the title: within, it would lie on a line of one network or the other.
    axes.legend(loc="lower right", bbox_to_anchor=(1.01, 0.96), ncols=3, fontsize=8, columnspacing=1.0)
    axes.grid(axis="y", alpha=0.25)


def _tail(axes: Axes, runs: dict[str, pd.DataFrame], names: dict[str, str], exceedance: float) -> None:
    for key, run in runs.items():
        axes.plot(run["examples_seen"], run["tail_excess"], color=ARMS[key], lw=0.8, label=names[key])
    axes.axhline(exceedance, color="#D55E00", lw=1, ls="--")
    axes.annotate(
        "exceedance", (0.99, exceedance), xycoords=("axes fraction", "data"), color="#D55E00", ha="right", va="bottom"
    )
    axes.set_yscale("log")
    axes.set_ylabel("(Q/n) / median before")
    axes.set_title("tail channel")
    axes.grid(axis="y", alpha=0.25)
