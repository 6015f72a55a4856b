"""Where theory says that adapting should pay: a noise scale that grows many times over, and updates that cost.

On one device an example is all that costs, and small batches win. Where an update costs as much as ``price`` examples
beside its own (ranks that wait for each other), a run costs ``examples + price * updates``, and in the model of
McCandlish et al. 2018 (arXiv:1812.06162) the rule that spends least follows ``n = sqrt(price B)``. Measured here on the
calm network of :mod:`studies.questions.comparison`, whose noise scale grows more than tenfold, with that rule
(:class:`adaptbatch.Pareto`), its learning rate constant or with the root of the batch, each tuned with the same trials
as the fixed batches.

The same model bounds what can be gained. Over the progress ``s`` with ``ds = dt / (1 + B / n)`` the best rule costs the
mean of ``B + price + 2 sqrt(price B)``, the best fixed batch ``mean B + price + 2 sqrt(price mean B)``: their ratio is
reported beside the measured one.

Pre-registered, before any run of the new arms:

* Target: 1.10 times the median ``final`` of the best fixed batch; cost to target: infinite if there is none.
* F2: the cost to target of ``pareto`` or of ``pareto, sqrt rate`` over that of the fixed batch with the lowest median
  cost, seed by seed, is below 1.
* F3: the same is below 1.05, at the trials of one method in place of those of a sweep.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter

import adaptbatch as ab
from studies.engine.arms import Arm
from studies.engine.results import load, read_table
from studies.engine.runner import Run
from studies.engine.sweep import Found, Options, Study, from_runs
from studies.output.statistics import Interval, ratio, to_target
from studies.output.style import KINDS, STYLE, kind, save, short
from studies.output.verdicts import best_fixed, fixed_arms
from studies.questions import comparison
from studies.questions.comparison import MICRO_BATCH, Method, choose, tuning

NETWORK: comparison.Network = "calm"
PRICE = 1024.0
SLACK = 1.10
RULE = ab.Pareto(PRICE)
METHODS = (
    Method("pareto", lambda p: Arm("", RULE, p["lr"])),
    Method("pareto, sqrt rate", lambda p: Arm("", RULE, p["lr"], coupling=ab.LearningRate("sqrt", 4 * MICRO_BATCH))),
)


def plan(options: Options, found: Found) -> list[Run]:
    """The comparison's fixed batches and adaptive arm on the calm network, and two more methods, tuned alike."""
    scale = comparison.SCALES[options.preset]
    data = (options.data or (scale.home,))[0]
    runs = [run for run in comparison.plan(replace(options, data=(data,)), found) if _wanted(run)]
    for method in METHODS:
        runs += list(tuning(method, NETWORK, data, scale))
        params = choose(method, NETWORK, data, scale, found)
        if params is not None:
            arm, seeds = method.arm(params), range(options.seeds or scale.seeds)
            runs += [comparison.labelled("final", NETWORK, data, scale, arm, seed, method.name) for seed in seeds]
    return runs


def _wanted(run: Run) -> bool:
    labels = dict(run.labels)
    method = str(labels["method"])
    shared = method.startswith("fixed ") or method == comparison.ADAPTIVE
    return labels["stage"] in ("tune", "final") and labels["network"] == NETWORK and shared


def tables(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """What every arm paid to the target, and the claims."""
    costs = cost_to_target(runs[runs["stage"] == "final"], curves)
    fixed = costs[costs["arm"].isin(fixed_arms(costs))]
    best = str(fixed.groupby("arm")["cost"].median().idxmin())
    bounds = [
        attainable(curves[(curves["key"] == run["key"]) & (curves["examples_seen"] <= run["examples"])])
        for run in fixed[fixed["arm"] == best].to_dict("records")
    ]
    bound = {"attainable": np.mean(bounds), "attainable low": min(bounds), "attainable high": max(bounds)}
    reference = costs[costs["arm"] == best].set_index("seed")["cost"]
    rows = []
    for arm, own in costs.groupby("arm", sort=False):
        mine = own.set_index("seed")["cost"]
        seeds = mine.index.intersection(reference.index)
        found, p = ratio(mine[seeds].to_numpy(float), reference[seeds].to_numpy(float))
        row = {"arm": arm, "seeds": len(own), "reached": float(np.isfinite(own["cost"]).mean())}
        row |= {name: own[name].median() for name in ("cost", "examples", "updates")}
        row |= {"of best fixed": found.value, "of best fixed low": found.low, "of best fixed high": found.high, "p": p}
        rows.append(
            row | {"mean n": own["mean_batch"].mean(), "final": own["final"].median(), "best fixed": arm == best}
        )
    table = pd.DataFrame(rows)
    return {"costs": table.assign(**bound), "claims": claims(table, runs)}


def cost_to_target(final: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """``examples``, ``updates`` and ``cost`` of each run to the target; infinite if it never was there."""
    by_key = dict(tuple(curves.groupby("key", sort=False)))
    target = SLACK * final.loc[final["arm"] == best_fixed(final), "final"].median()
    spent = pd.DataFrame([to_target(by_key[key], target) for key in final["key"]], index=final.index)
    spent["cost"] = spent["examples"] + PRICE * spent["updates"]
    return final.drop(columns=["examples", "updates"], errors="ignore").join(spent[["examples", "updates", "cost"]])


def attainable(curve: pd.DataFrame) -> float:
    """Cost of the best rule over that of the best fixed batch, in the model, for the noise scale along ``curve``.

    Example:
        >>> rows = pd.DataFrame({"optimizer_step": [1.0, 2.0, 3.0], "noise_scale": 9.0, "global_batch": 9.0})
        >>> attainable(rows)
        1.0
    """
    known = curve[np.isfinite(curve["noise_scale"]) & (curve["noise_scale"] > 0)]
    steps = np.gradient(known["optimizer_step"].to_numpy(float))
    scale = known["noise_scale"].to_numpy(float)
    progress = steps / (1 + scale / known["global_batch"].to_numpy(float))
    mean, root = np.average(scale, weights=progress), np.average(np.sqrt(scale), weights=progress)
    best, fixed = (mean + PRICE + 2 * np.sqrt(PRICE) * part for part in (root, np.sqrt(mean)))
    return float(best / fixed)


def claims(table: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """F2 and F3 for both ways to set the learning rate."""
    trials = runs[runs["stage"] == "tune"].groupby("arm").size()
    swept = int(trials[trials.index.str.startswith("fixed ")].sum())
    rows = []
    for method in METHODS:
        for own in table[table["arm"] == method.name].to_dict("records"):
            kind = "t" if np.isfinite(own["of best fixed high"]) else "range"
            found = Interval(*(own[f"of best fixed{end}"] for end in ("", " low", " high")), kind)
            what = f"cost to target, {method.name} / best fixed"
            share = trials.get(method.name, 0) / swept if swept else float("nan")
            for claim, said, bound in (
                ("F2", f"{what}, is below 1", 1.0),
                ("F3", f"{what}, at {share:.2f} of the trials, is below 1.05", 1.05),
            ):
                row = {"claim": claim, "what": said, "where": NETWORK, "value": found.value}
                row |= {"low": found.low, "high": found.high, "interval": found.kind}
                rows.append(row | {"verdict": found.below(bound)})
    columns = ["claim", "what", "where", "value", "low", "high", "interval", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def draw(folder: Path) -> None:
    """What each arm paid to the target, seed by seed, and the batches beside the noise scale."""
    costs, runs = read_table(folder / "costs.parquet"), load(folder.name, folder=folder.parent)
    curves = load(folder.name, curves=True, folder=folder.parent)
    spent = cost_to_target(runs[runs["stage"] == "final"], curves)
    order = costs.sort_values("cost", ascending=False)["arm"].tolist()
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.6), layout="constrained")
        for height, arm in enumerate(order):
            colour, marker = KINDS[kind(arm)]
            own = spent.loc[spent["arm"] == arm, "cost"]
            held = own[np.isfinite(own)] / 1e6
            left.plot(held, [height] * len(held), marker, color=colour, markersize=4, alpha=0.6, linestyle="none")
            if len(held) < len(own):
                never, place = f"{len(own) - len(held)} of {len(own)} never", ("axes fraction", "data")
                left.annotate(never, (1.01, height), fontsize=7, va="center", xycoords=place)
        left.set_yticks(range(len(order)), order)
        left.set_ylim(-0.6, len(order) - 0.4)
        left.set_xlabel(f"examples + {PRICE:,.0f} x updates to the target (millions)")
        best = str(costs.loc[costs["best fixed"], "arm"].iloc[0])
        for arm in (best, "pareto"):
            part = curves[(curves["arm"] == arm) & (curves["stage"] == "final")]
            for index, (_, own) in enumerate(part.groupby("seed")):
                colour, label = KINDS[kind(arm)][0], f"batch, {arm}" if index == 0 else None
                inner = own.iloc[:-1]  # the last window is a partial one
                right.plot(inner["examples_seen"], inner["global_batch"], color=colour, linewidth=1.4, label=label)
                if arm == "pareto":
                    name = "noise scale B" if index == 0 else None
                    right.plot(own["examples_seen"], own["noise_scale"], ":", color="#D55E00", linewidth=1, label=name)
        right.set_yscale("log")
        right.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        right.set_xlabel("examples")
        right.set_ylabel("examples")
        right.legend(fontsize=7)
        save(figure, folder, "figure")


STUDY = Study(
    "favourable",
    "where theory says that adapting should pay: a growing noise scale, updates that cost",
    plan,
    from_runs(tables),
    order=9,
    figures=draw,
)
