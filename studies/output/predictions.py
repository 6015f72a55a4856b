"""What one measured run says of every other batch, beside what tuned fixed batches took.

Updates are for an equal final loss, from a sweep of budgets: :mod:`studies.questions.planning` says why, and what it
claims of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

import adaptbatch as ab
from adaptbatch.planning.curves import TimeModel, critical_scale, integrated_noise
from studies.engine.metering import CHANNELS, STEPS
from studies.output.fronts import BEFORE, claim_row
from studies.output.statistics import Interval, ratio, scatter

DEVICES = (1, 8, 64)
# In units of a micro-batch's time; and how many parts of it a device may be given.
FIXED, SYNC, PARTS = 1.0, 4.0, 16
BOUNDS = {"alone": 1.5, "calibrated": 1.25}
STEADY, NEAR = 2.0, 1.10
RESAMPLES = 2_000


def budget_for(budgets: np.ndarray, losses: np.ndarray, target: float) -> float:
    """The budget that ends at ``target``: a line through logarithms; 0 or infinite where they do not bracket it.

    Args:
        budgets: Ascending.
        losses: Log loss at the end of each.
        target: Log loss.

    Example:
        >>> budget_for(np.array([100.0, 400.0]), np.array([2.0, 1.0]), 1.5)
        200.0
    """
    reached = np.flatnonzero(losses <= target)
    if not len(reached):
        return math.inf
    if reached[0] == 0:
        return 0.0
    after = int(reached[0])
    share = (losses[after - 1] - target) / (losses[after - 1] - losses[after])
    logs = np.log(budgets)
    return float(np.round(np.exp(logs[after - 1] + share * (logs[after] - logs[after - 1])), 6))


@dataclass(frozen=True)
class Sweep:
    """Fixed batches of a task, and the noise of its measured runs.

    Attributes:
        start: ``n0``.
        opening: Budget of the measured run.
        target: Log loss of the measured run, one a seed.
        losses: Of each other batch its budgets, ascending, and ``[budgets, seeds]`` of log losses.
        scales: ``B`` of each seed's run; NaN where it holds no evidence.
    """

    start: int
    opening: float
    target: np.ndarray
    losses: Mapping[int, tuple[np.ndarray, np.ndarray]]
    scales: np.ndarray

    def updates(self, seeds: np.ndarray) -> np.ndarray:
        """``S(n)`` of each other batch, of the mean log loss over some seeds."""
        target = float(self.target[seeds].mean())
        return np.array(
            [budget_for(b, loss[:, seeds].mean(axis=1), target) / n for n, (b, loss) in self.losses.items()]
        )

    def predicted(self, scales: np.ndarray) -> np.ndarray:
        """``[seeds, batches]`` from the noise scale of each seed's run."""
        n, b = np.array(list(self.losses), float), scales[:, None]
        with np.errstate(invalid="ignore"):
            factor = np.where(np.isinf(b), self.start / n, (1.0 + b / n) / (1.0 + b / self.start))
        return self.opening / self.start * factor

    def error(self, scales: np.ndarray) -> Interval:
        """P1: ``exp`` of the median absolute log error, with its interval over seeds."""
        rng, count = np.random.default_rng(0), len(self.target)
        draws = [np.arange(count), *(rng.integers(count, size=count) for _ in range(RESAMPLES))]
        found = []
        for seeds in draws:
            with np.errstate(divide="ignore"):
                logs = np.abs(np.log(self.predicted(scales[seeds])) - np.log(self.updates(seeds)))
            found.append(np.exp(np.median(np.nan_to_num(logs, nan=math.inf, posinf=math.inf))))
        low, high = np.quantile(found[1:], [0.025, 0.975], method="closest_observation")
        return Interval(float(found[0]), float(low), float(high), "bootstrap")


def sweep_of(runs: pd.DataFrame, windows: pd.DataFrame) -> Sweep:
    """Of one task, on the seeds that all have."""
    start = int(runs["start"].iloc[0])
    first = runs[runs["batch"] == start].set_index("seed")
    seeds = sorted(set(first.index) & set(windows["seed"]))
    losses = {}
    for n, own in runs[runs["batch"] != start].groupby("batch"):
        table = np.log(own.pivot_table(index="budget", columns="seed", values="test_loss").reindex(columns=seeds))
        table = table.dropna()
        losses[int(n)] = (table.index.to_numpy(float), table.to_numpy(float))  # type: ignore[call-overload]
    scales = [_scale(windows[windows["seed"] == seed])[0] for seed in seeds]
    budget = float(first["budget"].iloc[0])
    return Sweep(start, budget, np.log(first.loc[seeds, "test_loss"].to_numpy(float)), losses, np.array(scales))


def _scale(windows: pd.DataFrame) -> tuple[float, float, float]:
    """``B`` of a run as ``plan`` has it, with its interval; NaN where it holds no evidence."""
    try:
        return critical_scale(integrated_noise(windows.reset_index(drop=True)), 1.0, 0.95)
    except ValueError:
        return math.nan, math.nan, math.nan


def tables(runs: pd.DataFrame, windows: pd.DataFrame, branches: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """What each batch took and what was predicted, recommendations followed, branches, and the claims.

    Args:
        runs: Those of the sweep and the measured ones, with ``task``, ``start``, ``batch``, ``budget``, ``test_loss``.
        windows: The meter's rows of the measured ones.
        branches: Along them; may be empty.

    Returns:
        Among them ``before``: the predictions beside what batches took while they had short warm-ups at most to choose.
    """
    if "task" not in runs:
        return {}
    predictions, followed, beside, before, claimed = [], [], [], [], []
    counted = runs[runs["stage"] == "final"].dropna(subset="task")
    earlier = runs[runs["stage"] == BEFORE]
    for name, part in counted.groupby("task", sort=False):
        own, cut = windows[windows["task"] == name], branches[branches["task"] == name]
        if not len(own):
            continue
        sweep, factor = sweep_of(part, own), calibration(cut)
        predictions.append(prediction_table(sweep, factor, own).assign(task=name))
        followed.append(follow(sweep, own).assign(task=name))
        beside.append(blind(sweep).assign(task=name))
        claimed += claims(str(name), sweep, factor, followed[-1], cut)
        if len(then := earlier[earlier["task"] == name]):
            first = sweep_of(pd.concat([part[part["batch"] == sweep.start], then]), own)
            before.append(prediction_table(first, factor, own).assign(task=name))
    if not predictions:
        return {}
    found = {"predictions": pd.concat(predictions, ignore_index=True), "blind": pd.concat(beside, ignore_index=True)}
    if before:
        found["before"] = pd.concat(before, ignore_index=True)
    if any(map(len, followed)):
        found["followed"] = pd.concat(followed, ignore_index=True)
    if len(branches):
        found["ratios"] = ratios(branches)
    return found | {"claims": pd.DataFrame(claimed)}


def blind(sweep: Sweep) -> pd.DataFrame:
    """The same error of predictors that measure nothing."""
    rows = []
    for way, scale in (("as many updates", 0.0), ("as many examples", math.inf)):
        found = sweep.error(np.full(len(sweep.scales), scale))
        rows.append({"predictor": way, "error": found.value, "low": found.low, "high": found.high})
    return pd.DataFrame(rows)


def calibration(branches: pd.DataFrame) -> float:
    """The geometric mean of the branches' factors; NaN where there are none."""
    known = branches["calibration"].dropna() if len(branches) else pd.Series(dtype=float)
    return float(np.exp(np.log(known[known > 0.0]).mean()))


def prediction_table(sweep: Sweep, factor: float, windows: pd.DataFrame) -> pd.DataFrame:
    """A row for each batch but ``n0``: updates for the measured run's loss, and what was predicted."""
    seeds = np.arange(len(sweep.target))
    table = pd.DataFrame({"start": sweep.start, "batch": list(sweep.losses), "updates": sweep.updates(seeds)})
    scales = np.array([_scale(own) for _, own in windows.groupby("seed")])
    ways = {
        "predicted": sweep.predicted(sweep.scales),
        "low": sweep.predicted(scales[:, 1]),
        "high": sweep.predicted(scales[:, 2]),
        "calibrated": sweep.predicted(factor * sweep.scales),
        "equal updates": sweep.predicted(np.zeros(len(seeds))),
        "equal examples": sweep.predicted(np.full(len(seeds), math.inf)),
    }
    for way, found in ways.items():
        table[way] = np.exp(np.nanmean(np.log(found), axis=0)) if np.isfinite(found).any() else math.nan
    # Between two ends of an interval updates fall or rise with B, on either side of n0.
    table[["low", "high"]] = np.sort(table[["low", "high"]].to_numpy(), axis=1)
    known = sweep.scales[np.isfinite(sweep.scales)]
    return table.assign(B=float(known.mean()) if len(known) else math.nan, opening=sweep.opening)


def follow(sweep: Sweep, windows: pd.DataFrame) -> pd.DataFrame:
    """P3: of each seed's run the batch that a plan recommends, and its modelled time on the other seeds.

    Returns:
        ``seed``, ``devices``, ``batch``, ``best`` (of the sweep, on the other seeds), ``time`` over that of the best,
        and ``worst``, of the sweep's worst batch.
    """
    micro = sweep.start / STEPS
    model = TimeModel(FIXED, 1.0 / micro, SYNC)
    batches = np.array([sweep.start, *sweep.losses], float)
    rows = []
    for index, (seed, own) in enumerate(windows.groupby("seed")):
        others = np.delete(np.arange(len(sweep.target)), index)
        updates = np.array([sweep.opening / sweep.start, *sweep.updates(others if len(others) else np.array([index]))])
        for devices in DEVICES:
            held = batches >= devices * micro / PARTS
            try:
                found = ab.plan(
                    own,
                    batches[held],
                    devices,
                    micro_batch=micro / PARTS,
                    seconds_per_step=FIXED,
                    seconds_per_example=1.0 / micro,
                    seconds_per_sync=SYNC,
                )
            except ValueError:
                continue
            times = np.array([model.seconds(float(n), devices) for n in batches[held]]) * updates[held]
            taken = times[batches[held] == found.recommended.batch][0]
            row = {"seed": seed, "devices": devices, "batch": found.recommended.batch, "time": taken / times.min()}
            rows.append(row | {"best": batches[held][times.argmin()], "worst": times.max() / times.min()})
    return pd.DataFrame(rows)


def ratios(branches: pd.DataFrame) -> pd.DataFrame:
    """P2: the critical batch over the noise scale of each channel, at each point."""
    rows = branches[["task", "seed", "at", "critical", "excluded", "smallest", "largest", "calibration"]].copy()
    for channel in CHANNELS:
        rows[channel] = branches["critical"] / branches[channel]
    return rows


def claims(
    task: str, sweep: Sweep, factor: float, followed: pd.DataFrame, branches: pd.DataFrame
) -> list[dict[str, object]]:
    """P1 to P3 of one task."""
    alone = sweep.error(sweep.scales)
    said = "median error of predicted updates, as a factor,"
    rows = [claim_row("P1", f"{said} is below 1.5", task, alone, BOUNDS["alone"])]
    if math.isfinite(factor):
        found = sweep.error(factor * sweep.scales)
        rows.append(claim_row("P1", f"{said} calibrated by branches is below 1.25", task, found, BOUNDS["calibrated"]))
    if len(branches):
        for channel, ratios_ in ratios(branches)[list(CHANNELS)].items():
            rows.append(
                claim_row("P2", f"critical batch over B, {channel}: scatter is below 2", task, scatter(ratios_), STEADY)
            )
    for devices, own in followed.groupby("devices") if len(followed) else ():
        found, _ = ratio(own["time"].to_numpy(float), np.ones(len(own)))
        rows.append(
            claim_row(
                "P3",
                f"time of the recommended batch over the best's, devices: {devices}, is below 1.10",
                task,
                found,
                NEAR,
            )
        )
    return rows
