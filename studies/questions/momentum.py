"""Do optimizers with momentum suffer more from gradient noise? Seven optimizers at a small and a large batch.

The origin says that Adam, RAdam and RMSprop suffer more from noise than SGD, AdaGrad and Adadelta. Tested here, with
every optimizer's rate tuned over three decades of its own, on the noisy network of :mod:`studies.questions.comparison`:

* M1: what a 16 times larger batch does to the loss, at the same examples, differs between optimizers with and without
  momentum: ratio of the best ``final`` at 1024 to that at 64, pair by pair (Adam with and without beta1, gradient
  descent with and without momentum), over fresh seeds.
* M2: momentum gains more rates from a large batch: the ratio of the largest rates that work (``final`` at most 1.5
  times the seed's best, between two rates by the line through their logarithms) at 1024 and at 64, pair by pair over
  seeds on which every rate was tried. Theory: momentum's larger margin needs a batch of ``(1 + beta) / (1 - beta)``
  times the size.

Plan, at 30 s a run on one core: 128 trials, 48 runs at the best rates, and M2's 192 seed by seed (64 a seed, of three;
23 are among the 48): 3 hours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from studies.engine.arms import Arm
from studies.engine.results import load
from studies.engine.runner import Run
from studies.engine.sweep import SHARED, Found, Options, Study, from_runs
from studies.engine.tuning import Range, trials
from studies.output.statistics import ratio
from studies.output.style import STYLE, save
from studies.questions import comparison
from studies.questions.comparison import fixed, task

BATCHES = (64, 1024)
SEEDS: dict[str, int] = {"smoke": 2, "laptop": 3, "paper": 20}
WORKS = 1.5


@dataclass(frozen=True)
class Kind:
    """An optimizer, the range of its rate, and whether it has a momentum."""

    arm: Arm
    rates: Range
    momentum: bool


def _arm(name: str, **changes: object) -> Arm:
    return replace(Arm(name, fixed(BATCHES[0]), lr=0.0, optimizer=name), **changes)  # type: ignore[arg-type]


KINDS: dict[str, Kind] = {
    "sgd": Kind(_arm("sgd"), Range(1e-6, 1e-3), momentum=False),
    "momentum": Kind(_arm("momentum"), Range(1e-7, 1e-4), momentum=True),
    "adagrad": Kind(_arm("adagrad"), Range(1e-4, 1e-1), momentum=False),
    "adadelta": Kind(_arm("adadelta"), Range(1e-2, 1e1), momentum=False),
    "rmsprop": Kind(_arm("rmsprop", beta2=0.99), Range(1e-5, 1e-2), momentum=False),
    "adam without beta1": Kind(_arm("adam", beta1=0.0), Range(1e-4, 1e-1), momentum=False),
    "adam": Kind(_arm("adam"), Range(1e-4, 1e-1), momentum=True),
    "radam": Kind(_arm("radam"), Range(1e-4, 1e-1), momentum=True),
}
# With and without momentum, and otherwise the same.
PAIRS = (("momentum", "sgd"), ("adam", "adam without beta1"))


def tuning(name: str, batch: int, data: str, scale: comparison.Scale) -> Iterator[Run]:
    """An optimizer's trials at a batch."""
    kind = KINDS[name]
    for index, params in enumerate(trials({"lr": kind.rates}, scale.trials)):
        yield _run("tune", name, batch, data, scale, params["lr"], comparison.TUNING_SEED, index)


def _run(
    stage: str, name: str, batch: int, data: str, scale: comparison.Scale, lr: float, seed: int, trial: int = -1
) -> Run:
    arm = replace(KINDS[name].arm, name=f"{name}, {batch}", rule=fixed(batch), lr=lr)
    labels = {"stage": stage, "network": "noisy", "data": data, "method": name, "trial": trial, "lr": lr}
    labels |= {"batch": batch, "momentum": KINDS[name].momentum}
    return Run(SHARED, task("noisy", data, scale), arm, seed, tuple(labels.items()))


def plan(options: Options, found: Found) -> list[Run]:
    """Tuning of every optimizer at both batches, then fresh seeds at the best rate, and the pairs' at every rate."""
    scale = comparison.SCALES[options.preset]
    data = (options.data or (scale.home,))[0]
    seeds = range(options.seeds or SEEDS[options.preset])
    tuned = {(name, batch): list(tuning(name, batch, data, scale)) for name in KINDS for batch in BATCHES}
    runs = [run for trials_ in tuned.values() for run in trials_]
    if any(run not in found for run in runs):
        return runs
    for (name, batch), trials_ in tuned.items():
        best = trials_[int(np.argmin([found[run]["final"] for run in trials_]))]
        runs += [_run("final", name, batch, data, scale, best.arm.lr, seed) for seed in seeds]
    return runs + [
        _run("rates", name, batch, data, scale, params["lr"], seed, index)
        for seed in seeds
        for pair in PAIRS
        for name in pair
        for batch in BATCHES
        for index, params in enumerate(trials({"lr": KINDS[name].rates}, scale.trials))
    ]


def tables(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Each optimizer at both batches, and the claims."""
    tune, final = runs[runs["stage"] == "tune"], runs[runs["stage"] == "final"]
    rows = []
    for (method, batch), part in tune.groupby(["method", "batch"], sort=False):
        working = part[part["final"] <= WORKS * part["final"].min()]
        own = final[(final["method"] == method) & (final["batch"] == batch)]
        rows.append(
            {
                "optimizer": method,
                "momentum": bool(part["momentum"].iloc[0]),
                "batch": batch,
                "best": part["final"].min(),
                "lr": part["lr"].iloc[int(part["final"].argmin())],
                "largest that works": working["lr"].max(),
                "rates that work": len(working),
                "final": own["final"].median(),
                "spikes": own["spikes"].mean(),
                "diverged": int(own["diverged"].sum()),
                "seeds": len(own),
            }
        )
    table = pd.DataFrame(rows)
    limits = largest_rates(runs[runs["stage"].isin(["tune", "rates"])])
    return {"optimizers": table, "effects": effects(final), "limits": limits, "claims": claims(final, limits)}


def effects(final: pd.DataFrame) -> pd.DataFrame:
    """For each optimizer, what the large batch does to its loss: ``final`` at the large one over that at the small."""
    by_batch, rows = _of_batches(final, "final"), []
    for method in by_batch:
        own = by_batch[method].dropna().to_numpy(float)
        if not len(own):
            continue
        found, _ = ratio(own, np.ones(len(own)))
        momentum = bool(final.loc[final["method"] == method, "momentum"].iloc[0])
        row = {"optimizer": method, "momentum": momentum, "seeds": len(own), "ratio": found.value}
        rows.append(row | {"low": found.low, "high": found.high, "interval": found.kind})
    columns = ["optimizer", "momentum", "seeds", "ratio", "low", "high", "interval"]
    return pd.DataFrame(rows, columns=columns).sort_values("ratio", ignore_index=True)


def largest_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """The largest rate that works for each optimizer, batch and seed whose rates have all been tried."""
    keys = ["method", "batch", "seed"]
    tried = runs.groupby(keys, sort=False)["trial"].nunique()
    rows = [
        dict(zip(keys, key, strict=True)) | {"largest": largest_that_works(part["lr"], part["final"])}
        for key, part in runs.groupby(keys, sort=False)
        if tried[key] == tried.max()
    ]
    return pd.DataFrame(rows, columns=[*keys, "largest"])


def largest_that_works(rates: pd.Series, losses: pd.Series) -> float:
    """Where the loss last crosses 1.5 times its smallest value, on the line through the logarithms of two rates.

    Losses beyond ten times the smallest, of runs that diverged too, count as ten times: by how much a run fails does
    not matter. NaN where all diverged.

    Example:
        >>> round(largest_that_works(pd.Series([1.0, 10.0, 100.0]), pd.Series([2.0, 1.0, 2.25])), 2)
        31.62
    """
    by_rate = pd.Series(losses.to_numpy(float), index=np.log(rates.to_numpy(float))).sort_index()
    if not math.isfinite(by_rate.min()):
        return math.nan
    excess = np.log((by_rate / by_rate.min()).clip(upper=10.0))
    last = int(np.flatnonzero(excess <= math.log(WORKS))[-1])
    if last == len(excess) - 1:
        return float(rates.max())
    part = excess.iloc[last : last + 2]
    return math.exp(np.interp(math.log(WORKS), part.to_numpy(), part.index.to_numpy()))


def claims(final: pd.DataFrame, limits: pd.DataFrame) -> pd.DataFrame:
    """M1 and M2 for the pairs that differ in nothing but momentum."""
    measured = {"M1": _of_batches(final, "final"), "M2": 1 / _of_batches(limits, "largest")}
    said = {"M1": "loss at {} / loss at {}", "M2": "largest rate that works at {1} / at {0}"}
    rows = []
    for claim, effect in measured.items():
        for with_, without in PAIRS:
            if {with_, without} <= set(effect.columns):
                both = effect[[with_, without]].dropna()
                found, p = ratio(both[with_].to_numpy(), both[without].to_numpy())
                what = f"{said[claim].format(*reversed(BATCHES))}: {with_} / {without}, is below 1"
                row = {"claim": claim, "what": what, "value": found.value, "low": found.low, "high": found.high, "p": p}
                rows.append(row | {"interval": found.kind, "seeds": len(both), "verdict": found.below(1.0)})
    columns = ["claim", "what", "value", "low", "high", "interval", "p", "seeds", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def _of_batches(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The column at the large batch over the column at the small one: a row for each seed, a column for each method."""
    small, large = (
        table[table["batch"] == batch].pivot_table(index="seed", columns="method", values=column) for batch in BATCHES
    )
    return (large / small).mask(np.isinf(large) & np.isinf(small), 1.0)


def draw(folder: Path) -> None:
    """Final loss of every optimizer against its rate, at the small and the large batch."""
    runs = load(folder.name, folder=folder.parent)
    tune, names = runs[runs["stage"] == "tune"], list(runs["method"].unique())
    top = 2.2 * tune["final"].min()
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, math.ceil(len(names) / 2), figsize=(10, 4.6), sharey=True, layout="constrained")
        for axes, name in zip(grid.flat, names, strict=False):
            own = tune[tune["method"] == name]
            for batch, colour, marker in ((64, "#D55E00", "^"), (1024, "#0072B2", "D")):
                part = own[own["batch"] == batch].sort_values("lr")
                axes.plot(
                    part["lr"],
                    part["final"].clip(upper=top),
                    marker=marker,
                    color=colour,
                    markersize=4,
                    label=f"batch {batch}",
                )
            axes.set_xscale("log")
            axes.set_title(
                name + (", with momentum" if name != "momentum" and bool(own["momentum"].iloc[0]) else ""), fontsize=8
            )
        grid[0, 0].legend(fontsize=7)
        for axes in grid[:, 0]:
            axes.set_ylabel("final loss")
        for axes in grid[-1]:
            axes.set_xlabel("learning rate")
        save(figure, folder, "figure")


STUDY = Study(
    "momentum",
    "seven optimizers at a small and a large batch",
    plan,
    from_runs(tables),
    order=6,
    figures=draw,
)
