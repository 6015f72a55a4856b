"""Figures from the results schema: neither torch nor adaptbatch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from studies.output.style import STYLE

# Okabe and Ito's colours, told apart by all readers.
ARM_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]
REASON_COLOURS = {
    "grow": "#D55E00",
    "growth_limited": "#E69F00",
    "shrink": "#0072B2",
    "hold": "#C9D6DF",
    "undecided": "#8C8C8C",
    "at_min": "#56B4E9",
    "at_max": "#CC79A7",
    "signal_lost": "#7B3294",
    "noise_floor": "#A6761D",
    "nonfinite": "#000000",
    "guard": "#F0E442",
}


def quick_figure(
    results: pd.DataFrame, path: Path, *, adaptive: str, title: str, micro_batch: int, collapsed: float
) -> None:
    """Loss of every arm, and what the adaptive one measured and did, against examples.

    Args:
        results: A study's table, one seed.
        path: PNG to write.
        adaptive: The arm whose decisions are shown.
        title: What was trained on what.
        micro_batch: Examples of one accumulation step, for the axis of ``k``.
        collapsed: Loss of a network that reconstructs the mean image whatever it sees.
    """
    with plt.rc_context(STYLE):
        figure, (top, middle, ribbon) = plt.subplots(
            3, 1, figsize=(8, 7.2), sharex=True, height_ratios=[3, 3, 0.35], layout="constrained"
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        _losses(top, results, adaptive, collapsed)
        run = results[results["arm"] == adaptive]
        _noise(middle, run, adaptive, micro_batch)
        _reasons(ribbon, run)
        ribbon.set_xlabel("training examples seen")
        ribbon.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def _losses(axes: Axes, results: pd.DataFrame, adaptive: str, collapsed: float) -> None:
    """Validation curves, each named at its end."""
    ends = []
    for colour, (arm, run) in zip(ARM_COLOURS, results.groupby("arm", sort=False), strict=False):
        probed = run.dropna(subset="validation_loss")
        width = 2.6 if arm == adaptive else 1.5
        axes.plot(probed["examples_seen"], probed["validation_loss"], color=colour, lw=width)
        last = probed.iloc[-1]
        said = f"{arm}: {last['validation_loss']:.1f}\nin {len(run):,} updates"
        ends.append((last["examples_seen"], last["validation_loss"], said, colour))
    first = results.dropna(subset="validation_loss")["validation_loss"]
    axes.set_ylim(0.95 * first.min(), min(first.max(), 75.0))
    axes.axhline(collapsed, color="#777777", lw=1, ls=":")
    ends.append((ends[0][0], collapsed, "the mean image", "#777777"))
    _label_ends(axes, ends)
    axes.set_title("Validation loss on a fixed probe set (squared error + KL, per image)")
    axes.set_ylabel("validation loss")
    axes.grid(axis="y", alpha=0.25)


def _label_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names beside the curves' ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, place = 0.115 * (high - low), -np.inf
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        place = max(y, place + gap)
        axes.annotate(
            text, (x, y), (1.01, (place - low) / (high - low)), "data", "axes fraction", color=colour, va="center"
        )


def _noise(axes: Axes, run: pd.DataFrame, arm: str, micro_batch: int) -> None:
    """The noise scale with its interval, and the batch that follows it, on one scale of examples."""
    x = run["examples_seen"]
    sizes = run["global_batch"].iloc[:-1]
    finite = run["noise_scale"].replace(np.inf, np.nan)
    settled = finite.iloc[min(8, len(finite) - 1) :]
    low, high = 0.7 * min(sizes.min(), settled.quantile(0.02)), 1.6 * max(sizes.max(), settled.max())
    axes.plot(x, finite, color="#009E73", lw=1.4, label="noise scale B = tr(Σ) / |G|²")
    axes.fill_between(
        x,
        run["noise_scale_low"].clip(low, high),
        run["noise_scale_high"].clip(low, high),
        color="#009E73",
        alpha=0.2,
        lw=0,
        label="its 95 % interval",
    )
    axes.step(x.iloc[:-1], sizes, where="pre", color="#222222", lw=1.8, label="batch n used")
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    ticks = [tick for tick in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if low <= tick <= high]
    axes.set_yticks(ticks)
    axes.minorticks_off()
    axes.set_ylabel("examples")
    axes.grid(axis="y", alpha=0.25)
    axes.set_title(f"What the arm “{arm}” measured, and the batch it chose")
    axes.legend(loc="lower right", ncols=3)
    steps = axes.secondary_yaxis("right", functions=(lambda n: n / micro_batch, lambda k: k * micro_batch))
    steps.set_yscale("log")
    shown = sorted(set(sizes.div(micro_batch).round().astype(int)))
    steps.set_yticks(shown if len(shown) <= 8 else shown[:: len(shown) // 8 + 1])
    steps.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    steps.yaxis.set_minor_formatter(NullFormatter())
    steps.minorticks_off()
    steps.set_ylabel("accumulation steps k")


def _reasons(axes: Axes, run: pd.DataFrame) -> None:
    """A ribbon of the decisions' reasons; changes are drawn wider than one window, or they would not be seen."""
    ends = run["examples_seen"].to_numpy()
    starts = np.concatenate([[0.0], ends[:-1]])
    for start, end, reason in zip(starts, ends, run["reason"], strict=True):
        axes.axvspan(start, end, color=REASON_COLOURS[reason], lw=0)
    shown = 0.004 * ends[-1]
    for end, reason in zip(ends, run["reason"], strict=True):
        if reason in ("grow", "growth_limited", "shrink"):
            axes.axvspan(end - shown / 2, end + shown / 2, color=REASON_COLOURS[reason], lw=0)
    axes.set_yticks([])
    axes.set_ylabel("reason", rotation=0, ha="right", va="center")
    axes.spines[["left", "bottom"]].set_visible(False)
    counts = run["reason"].value_counts()
    handles = [Patch(color=REASON_COLOURS[reason], label=f"{reason} ({count})") for reason, count in counts.items()]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -1.6), ncols=6, handlelength=1.2)


def closed_loop_figure(
    windows: pd.DataFrame, table: pd.DataFrame, path: Path, *, cell: int, moving: Sequence[str]
) -> None:
    """The default rule against the truth on every profile; below, every rule where there is something to follow.

    Args:
        windows: The default rule's, of :func:`studies.questions.closed_loop.run_study`.
        table: Of :func:`studies.questions.closed_loop.table`, all rules.
        path: PNG to write.
        cell: Examples of one accumulation step.
        moving: Names of the profiles on which the rules are compared.
    """
    profiles, columns = windows["profile"].unique(), 4
    rows = -(-len(profiles) // columns)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11, 2.0 * rows + 4.2), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=[2.0 * rows, 4.2])
        grid = above.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, profile in zip(grid.flat, profiles, strict=False):
            _followed(axes, windows[windows["profile"] == profile], cell)
        for axes in grid.flat[len(profiles) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel("examples")
        for axes in grid[-1]:
            axes.set_xlabel("million examples seen")
        truth, batch = Line2D([], [], color="black", lw=2), Line2D([], [], color=ARM_COLOURS[0], lw=1)
        named = Line2D([], [], color=ARM_COLOURS[5], lw=4)
        above.legend(
            [truth, batch, named],
            ["true noise scale B", "batch n, a line for each seed", "seed 0 says noise_floor or guard"],
            loc="outside upper left",
            ncols=3,
        )
        _rules_compared(below, table[table["profile"].isin(moving)], windows["rule"].iloc[0], moving)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def _followed(axes: Axes, windows: pd.DataFrame, cell: int) -> None:
    """One profile: the batch of every seed over the truth."""
    runs = [run for _, run in windows.groupby("seed")]
    for run in runs:
        x, n = run["examples_seen"] / 1e6, run["accumulation_steps"] * cell
        axes.step(x, n, color=ARM_COLOURS[0], lw=0.9, alpha=0.75, where="pre")
    first = runs[0]
    axes.plot(first["examples_seen"] / 1e6, first["true_noise_scale"], color="black", lw=1.6, zorder=1)
    told = first[first["reason"].isin(["noise_floor", "guard"])]
    axes.plot(told["examples_seen"] / 1e6, np.full(len(told), 42.0), "|", color=ARM_COLOURS[5], ms=5, mew=1)
    axes.set_title(windows["profile"].iloc[0])
    axes.set_yscale("log", base=2)
    axes.set_ylim(36, 3e4)
    axes.set_yticks([64, 512, 4096])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y", alpha=0.25)


def _rules_compared(figure: SubFigure, table: pd.DataFrame, default: str, moving: Sequence[str]) -> None:
    """A row for each rule: how far from ``B``, and how many changes that took."""
    rules = list(table["rule"].unique())
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, measure, bound in ((left, "rms log error", 0.30), (right, "switches", 40.0)):
        axes.axvline(bound, color="#777777", lw=1, ls=":")
        for place, profile in enumerate(moving):
            shown = table[table["profile"] == profile].set_index("rule").loc[rules]
            rows = np.arange(len(rules)) + 0.2 * (place - 1)
            axes.plot(shown[measure], rows, "osD"[place], color=ARM_COLOURS[[0, 5, 2][place]], ms=4.5, label=profile)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    left.set_xlabel("rms of log(n / B), left is closer (dotted: 0.30)")
    left.set_title("How far from n = B on the moving profiles")
    left.xaxis.set_minor_formatter(NullFormatter())
    left.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2])
    left.minorticks_off()
    right.set_xlabel("changes of k in a run, left is calmer (dotted: 40)")
    right.set_title("How often k changes")
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _rows(left, rules)
    _rows(right, rules)
    for label in left.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == default else "normal")


def calibration_figure(coverage: pd.DataFrame, error: pd.DataFrame, path: Path) -> None:
    """How often the intervals hold the truth, and how far every estimator is from it.

    Args:
        coverage: ``"coverage"`` of :func:`studies.questions.calibration.run`.
        error: ``"error"`` of the same.
        path: PNG to write.
    """
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=[1, 1.05], layout="constrained")
        _coverages(left, coverage[np.isfinite(coverage["B / n"])])
        _errors(right, error)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def _coverages(axes: Axes, coverage: pd.DataFrame) -> None:
    """A row for each kind of evidence; colour is ``B / n``, shape is the examples' distribution."""
    kinds = coverage.groupby(["windows", "cells", "half-life", "r"], sort=False)
    levels, examples = list(coverage["B / n"].unique()), list(coverage["examples"].unique())
    axes.axvspan(0.94, 0.96, color="#EEEEEE", lw=0)
    axes.axvline(0.95, color="#777777", lw=1)
    for row, (_, shown) in enumerate(kinds):
        for _, point in shown.iterrows():
            level, name = levels.index(point["B / n"]), examples.index(point["examples"])
            axes.errorbar(
                point["coverage"],
                row + 0.08 * (3 * level + name - 4),
                xerr=point["coverage SE"],
                color=ARM_COLOURS[level],
                marker="osD"[name],
                ms=3.5,
                lw=1,
            )
    _rows(axes, [_kind(*kind) for kind, _ in kinds])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes.set_xlabel("intervals that contain the true B (bars: one standard error)")
    axes.set_title("Coverage of the 95 % interval")
    marks = [(colour, "o", f"B / n = {level:g}") for colour, level in zip(ARM_COLOURS, levels, strict=False)]
    marks += [("#555555", marker, name) for marker, name in zip("osD", examples, strict=False)]
    _legend(axes, marks)


def _kind(windows: int, cells: int, half_life: float, r: float) -> str:
    evidence = f"{windows} windows" if np.isinf(half_life) else f"half-life {half_life:g} windows"
    return f"{evidence}, K = {cells}" + (f"\nAR(1), r = {r:g}" if r else "")


def _errors(axes: Axes, error: pd.DataFrame) -> None:
    """A row for each estimator, a colour for each setting, from few windows (hollow) to many (filled)."""
    names, settings = list(error["estimator"].unique()), list(error["setting"].unique())
    finite = error["rms"].replace(np.inf, np.nan)
    edge = 2.5 * finite.max()
    for place, setting in enumerate(settings):
        colour, offset = ARM_COLOURS[place], 0.15 * (place - (len(settings) - 1) / 2)
        for name, readings in error[error["setting"] == setting].groupby("estimator", sort=False):
            row = names.index(name) + offset
            axes.plot(readings["rms"].clip(upper=edge), [row] * len(readings), color=colour, lw=0.8, alpha=0.5)
            for _, reading in readings.iterrows():
                known, last = np.isfinite(reading["rms"]), reading["windows"] == error["windows"].max()
                axes.errorbar(
                    min(reading["rms"], edge),
                    row,
                    xerr=reading["rms SE"] if known else None,
                    color=colour,
                    mfc=colour if last else "white",
                    marker="o" if known else ">",
                    ms=4,
                    lw=1,
                )
    _rows(axes, [name.replace(", ", ",\n") for name in names])
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("rms of log(estimate / B), left is closer (bars: one standard error)")
    axes.set_title("Error of the estimates of B")
    marks = [(colour, "o", setting) for colour, setting in zip(ARM_COLOURS, settings, strict=False)]
    few, many = error["windows"].min(), error["windows"].max()
    hollow = f"hollow: after {few} windows, filled: {many}" + ("; arrow: infinite" if finite.isna().any() else "")
    _legend(axes, [*marks, ("none", "o", hollow)])


def _rows(axes: Axes, names: list[str]) -> None:
    """Rows from top to bottom, a line between them."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    for edge in range(1, len(names)):
        axes.axhline(edge - 0.5, color="#DDDDDD", lw=0.8)


def _legend(axes: Axes, marks: list[tuple[str, str, str]]) -> None:
    """Colour, marker and name of each, below the axis."""
    handles = [Line2D([], [], color=colour, marker=marker, ls="", ms=4.5, label=name) for colour, marker, name in marks]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, handletextpad=0.2)
