"""Do optimizers with momentum suffer more from gradient noise? Seven optimizers at a small and a large batch.

The origin says that Adam, RAdam and RMSprop suffer more from noise than SGD, AdaGrad and Adadelta. Tested here, with
every optimizer's rate tuned over three decades of its own, on the noisy network of :mod:`studies.comparison`:

* M1: what a 16 times larger batch does to the loss, at the same examples, differs between optimizers with and without
  momentum: ratio of the best ``final`` at 1024 to that at 64, pair by pair (Adam with and without beta1, gradient
  descent with and without momentum), over fresh seeds.
* M2: momentum gains more rates from a large batch: the ratio of the largest rates that work (``final`` at most 1.5
  times the best) at 1024 and at 64. Theory: momentum's larger margin needs a batch of ``(1 + beta) / (1 - beta)`` times
  the size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from studies import comparison
from studies.arms import Arm
from studies.comparison import fixed, task
from studies.runner import Run
from studies.statistics import ratio
from studies.sweep import SHARED, Found, Options
from studies.tuning import Range, trials

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
    """Tuning of every optimizer at both batches, then fresh seeds at the best rate."""
    scale = comparison.SCALES[options.preset]
    data = (options.data or (scale.home,))[0]
    seeds = range(options.seeds or SEEDS[options.preset])
    runs = []
    for name in KINDS:
        for batch in BATCHES:
            trials_ = list(tuning(name, batch, data, scale))
            runs += trials_
            rows = [found.get(run) for run in trials_]
            if all(row is not None for row in rows):
                best = trials_[int(np.argmin([row["final"] for row in rows if row is not None]))]
                runs += [_run("final", name, batch, data, scale, best.arm.lr, seed) for seed in seeds]
    return runs


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
    return {"optimizers": table, "claims": claims(table, final)}


def claims(table: pd.DataFrame, final: pd.DataFrame) -> pd.DataFrame:
    """M1 and M2 for the pairs that differ in nothing but momentum."""
    small, large = BATCHES
    gain = table.pivot_table(index="optimizer", columns="batch", values="largest that works")
    rows = []
    for with_, without in PAIRS:
        if with_ not in set(final["method"]) or without not in set(final["method"]):
            continue
        by = final.pivot_table(index=["method", "seed"], columns="batch", values="final", dropna=False)
        effect = by[large] / by[small]
        found, p = ratio(effect[with_].to_numpy(float), effect[without].to_numpy(float))
        what = f"what batch {large} does to the loss ({large} / {small}): {with_} / {without}, is below 1"
        row = {"claim": "M1", "what": what, "value": found.value, "low": found.low, "high": found.high, "p": p}
        rows.append(row | {"verdict": found.below(1.0)})
        rates = gain[large] / gain[small]
        what = f"gain in the largest rate that works, {large} against {small}: {with_} / {without} (one tuning seed)"
        rows.append({"claim": "M2", "what": what, "value": rates[with_] / rates[without], "verdict": "undecided"})
    return pd.DataFrame(rows, columns=["claim", "what", "value", "low", "high", "p", "verdict"])
