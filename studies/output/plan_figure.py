"""Pictures of plans: what one run foretells; in the planning study beside what it took, and what following it costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

import adaptbatch as ab
from adaptbatch.planning.advice import Plan
from adaptbatch.planning.curves import measured_seconds
from studies.output.style import KINDS, STYLE, save, short

FORETOLD, CALIBRATED = KINDS["adaptive"][0], KINDS["other"][0]
QUIET = "#AAAAAA"
CHANNELS = {"noise_scale": ("#0072B2", "Euclidean"), "noise_scale_metric": ("#CC79A7", "Adam's metric")}
CHANNELS |= {"noise_scale_typical": ("#009E73", "typical window")}


def draw_plans(tables: Mapping[str, pd.DataFrame], windows: pd.DataFrame, folder: Path) -> None:
    """Save ``figure``: a row for each task; updates by batch, noise along the run, time of what was recommended.

    Args:
        tables: Those of the study: ``predictions``, and ``before``, ``ratios`` and ``followed`` where they are.
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
            _updates(left, part, _own(tables, "before", name))
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


def _updates(axes: Axes, part: pd.DataFrame, before: pd.DataFrame) -> None:
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
    if len(before):
        axes.plot(before["batch"], before["updates"], "x", color=QUIET, markersize=5, label="with shorter warm-ups")
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
        low, high = axes.get_ylim()[0], 3.0 * float(np.nanmax(tops))
        axes.set_ylim(low, high)
        ticks = [m * 10.0**power for power in range(9) for m in (1, 2, 5) if low <= m * 10.0**power <= high]
        axes.set_yticks(ticks, [short(tick) for tick in ticks])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
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


# Of a device that joins others; nothing here measures it [s].
SYNC = 0.005
SIDE = (1, 8, 64)
LISTED = [2**power for power in range(4, 12)]


def quick_plan(results: pd.DataFrame, path: Path, adaptive: str, fixed: str) -> None:
    """What one run of the main job says of every batch, and of devices; another run says so too.

    Args:
        results: The study's table, one seed.
        path: PNG to write.
        adaptive: The arm that is planned from: its windows of several sizes tell a step's seconds from an example's.
        fixed: Another, whose noise scale is measured at another batch.

    Raises:
        ValueError: If the run is too short to be planned from, or its seconds too uneven, as on a busy machine.
    """
    runs = {arm: results[results["arm"] == arm].reset_index(drop=True) for arm in (adaptive, fixed)}
    plans = [ab.plan(runs[adaptive], LISTED, count, micro_batch=1.0, seconds_per_sync=SYNC) for count in SIDE]
    other = ab.plan(runs[fixed], LISTED)
    # A plan goes without seconds where they cannot be told; this picture is of them.
    measured_seconds(runs[adaptive])
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3), layout="constrained")
        _foretold(left, plans[0], other, {adaptive: runs[adaptive], fixed: runs[fixed]})
        _by_devices(right, plans)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def _foretold(axes: Axes, plan: Plan, other: Plan, runs: Mapping[str, pd.DataFrame]) -> None:
    """Steps and examples of every batch, with their intervals, from either run."""
    batch = plan.table["batch"]
    for name, colour in (("steps", "#0072B2"), ("examples", "#D55E00")):
        axes.plot(batch, plan.table[f"{name}_factor"], color=colour, lw=1.8, label=f"{name}, over the least")
        low, high = plan.table[f"{name}_factor_low"], plan.table[f"{name}_factor_high"]
        axes.fill_between(batch, low, high, color=colour, alpha=0.2, lw=0)
        axes.plot(batch, other.table[f"{name}_factor"], color=colour, lw=1.0, ls=":")
    first, second = runs
    axes.set_title(f"What one run ({first}) says of every batch", fontsize=9)
    low, high = plan.critical[1:]
    label = f"where both cost twice: B = {plan.critical[0]:.0f} ({low:.0f} to {high:.0f})"
    axes.axvline(plan.critical[0], color="#777777", lw=0.8, label=label)
    axes.plot([], [], color="#777777", lw=1.0, ls=":", label=f"by the run {second}: B = {other.critical[0]:.0f}")
    _axes_of_factors(axes, batch, 45.0)
    axes.legend(fontsize=7.5, loc="upper center")


def _by_devices(axes: Axes, plans: list[Plan]) -> None:
    """Seconds of every batch by devices, over those of the best on one, and what is recommended."""
    first = plans[0]
    least = _seconds(first, first.table["batch"], 1).min()
    lowest = 1.0
    for colour, plan in zip(("#999999", "#56B4E9", "#0072B2"), plans, strict=True):
        count, recommended = plan.recommended.devices, plan.recommended.batch
        held = plan.table["batch"][plan.table["batch"] >= count]
        seconds = _seconds(plan, held, count) / least
        lowest = min(lowest, seconds.min())
        axes.plot(held, seconds, color=colour, lw=1.8)
        at = float(_seconds(plan, pd.Series([recommended]), count).iloc[0] / least)
        axes.plot(recommended, at, "D", color=colour, markersize=6)
        said = f"{count} device{'s' * (count > 1)}: take {recommended:,.0f}"
        place = (0, 11) if count < max(SIDE) else (0, -14)
        axes.annotate(said, (recommended, at), place, textcoords="offset points", fontsize=8, ha="center")
    axes.set_title("Seconds, over the best on one device", fontsize=9)
    # Room for what is said of the fastest.
    _axes_of_factors(axes, first.table["batch"], 8.0, bottom=0.6 * lowest)
    axes.set_xlabel(f"batch [examples]; several devices: {1000 * SYNC:.0f} ms a synchronisation")


def _seconds(plan: Plan, batch: pd.Series, devices: int) -> pd.Series:
    assert plan.seconds is not None
    each = batch.map(lambda n: plan.seconds.seconds(n, devices))  # type: ignore[union-attr]
    return (1.0 + plan.critical[0] / batch) * each


def _axes_of_factors(axes: Axes, batch: pd.Series, top: float, bottom: float = 0.9) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(batch, [f"{n:,.0f}" for n in batch], fontsize=8, rotation=45)
    ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0) if bottom <= tick <= top]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(bottom, top)
    axes.minorticks_off()
    axes.set_xlabel("batch [examples]")
