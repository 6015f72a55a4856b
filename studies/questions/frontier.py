"""Where does each method lie on the frontier of updates against examples?

A fixed batch ``n`` that reaches a target in ``S`` updates has spent ``E = n S`` examples; in the model of McCandlish et
al. 2018 (arXiv:1812.06162, section 2) ``S(n) = S_min + E_min / n``, so that ``(S / S_min - 1) (E / E_min - 1) = 1``
whatever ``n``. A method whose product ``q`` is below 1 is inside the frontier of the fixed batches. Theory says that a
rule ``n = B / theta^2`` cannot be inside by much: its ``q`` is that of a fixed batch (F1: the interval of adaptive's
``q`` contains 1).

The fixed batches are those of :mod:`studies.questions.comparison`, each with its own tuned rate, and one that is four
times larger.

Those runs are at constant rates, and their adaptive arm did not act. *calm, decaying* is the same question as networks
are trained: the setting of :mod:`studies.questions.live` (micro-batch 16, a rate that falls linearly to zero), where a
loss belongs to a run that has ended. So each arm is trained with an eighth, a quarter, half and the whole of the
budget, five seeds, at the rate, and with the warm-up, that the live study found for the whole. ``E`` is where the line
through the logarithms of its ``test_loss`` crosses the target: 1.02 times the loss at which the slowest fixed batch
ends. Registered before its runs, after the live study's first results (the whole budget):

* F2: ``q`` of ``theta 0.7, root`` and of ``theta 1, root`` is below 1: inside the frontier, which theory rules out for
  a noise scale that does not change with the rate.

Plan: three shorter budgets of four fixed batches and two rules, 0.9 times 260 s a seed: 20 minutes on one core; the
whole budget is the live study's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from scipy import optimize

from studies.engine.arms import Arm
from studies.engine.results import read_table
from studies.engine.runner import Run
from studies.engine.sweep import Found, Options, Study, from_runs
from studies.engine.tuning import planned
from studies.output.statistics import Interval, first_crossing
from studies.output.style import KINDS, STYLE, kind, save
from studies.questions import comparison, live
from studies.questions.comparison import Method, Network, choose, fixed, tuning

NETWORKS: tuple[Network, ...] = ("noisy", "calm")
DECAYING, DECAYED, BUDGETS, SEEDS = "calm, decaying", (32, 64, 128, 256), (1 / 8, 1 / 4, 1 / 2, 1.0), 5
DECAYED_RULES = ("theta 0.7, root", "theta 1, root")
DECAYED_SLACK = 1.02
LARGER = Method("fixed 4096", lambda p: Arm("", fixed(4096), p["lr"]))
SLACK = 1.25
RESAMPLES = 500


def plan(options: Options, found: Found) -> list[Run]:
    """The comparison's tuning and final runs, and those of one larger batch."""
    scale = comparison.SCALES[options.preset]
    data = (options.data or (scale.home,))[0]
    runs = [run for run in comparison.plan(replace(options, data=(data,)), found) if _wanted(run)]
    for network in NETWORKS:
        runs += list(tuning(LARGER, network, data, scale))
        params = choose(LARGER, network, data, scale, found)
        if params is not None:
            arm = LARGER.arm(params)
            seeds = range(options.seeds or scale.seeds)
            runs += [comparison.labelled("final", network, data, scale, arm, seed, LARGER.name) for seed in seeds]
    return [*runs, *decaying(options, found)]


def decaying(options: Options, found: Found) -> Iterator[Run]:
    """The live study's arms with every budget, once it has found their rates; until then what finds them."""
    scale, setting = live.SCALES[options.preset], live.SETTINGS[0]
    searches = {n: live.searched(setting, scale, n, found) for n in DECAYED}
    waiting = [run for run in planned(searches.values(), found) if run not in found]
    if waiting:
        yield from waiting
        return
    for seed in range(options.seeds or min(scale.seeds, SEEDS)):
        for budget in BUDGETS:
            part = replace(scale, examples=round(budget * scale.examples))
            arms: list[tuple[Arm, int]] = []
            for n in DECAYED:
                (rate, warmup), *_ = live.ranked(setting, scale, n, found)
                arms.append((live.fixed_arm(setting, part, n, warmup)(rate), n))
            start = searches[live.START][0.0].first(found)
            assert start is not None
            methods = [method for method in live.METHODS if method.label in DECAYED_RULES]
            arms += [(method.arm(start, setting.schedule(part)), 0) for method in methods]
            for arm, n in arms:
                run = live.labelled("decaying", setting, part, arm, seed, n)
                labels = dict(run.labels) | {"network": DECAYING, "budget": part.examples}
                yield replace(run, labels=tuple(labels.items()))


def _wanted(run: Run) -> bool:
    return dict(run.labels)["stage"] in ("tune", "final")


def fit(batches: np.ndarray, updates: np.ndarray) -> tuple[float, float]:
    """``S_min`` and ``E_min`` of ``S(n) = S_min + E_min / n``, by least squares of the logarithm of ``S``.

    Example:
        >>> n = np.array([64.0, 256.0, 1024.0])
        >>> [round(x) for x in fit(n, 100 + 20_000 / n)]
        [100, 20000]
    """

    def error(logs: np.ndarray) -> np.ndarray:
        smallest, examples = np.exp(logs)
        return np.log(smallest + examples / batches) - np.log(updates)

    start = np.log([updates.min() / 2, (batches * updates).min() / 2])
    smallest, examples = np.exp(optimize.least_squares(error, start).x)
    return float(smallest), float(examples)


def tables(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The fit of each network, and where every method lies."""
    final = runs[runs["stage"] == "final"]
    by_key = dict(tuple(curves.groupby("key", sort=False)))
    parts = [(network, *_crossed(part, by_key)) for network, part in final.groupby("network", sort=False)]
    ended = runs[runs["stage"] == "decaying"]
    if len(ended):
        parts.append((DECAYING, *_ended(ended)))
    fits, methods = [], []
    for network, target, part in parts:
        held = part[part["arm"].str.startswith("fixed ") & np.isfinite(part["updates_"])]
        if held["arm"].nunique() < 3:
            continue
        held = held.assign(batch=held["arm"].str.split().str[1].astype(float))
        smallest, examples = fit(held["batch"].to_numpy(), held["updates_"].to_numpy())
        reached = part[np.isfinite(part["updates_"])]
        draws, spent_ = _resampled(held, reached)
        fits.append(
            {
                "network": network,
                "target": target,
                "S_min": smallest,
                "S_min low": np.quantile(draws[:, 0], 0.025),
                "S_min high": np.quantile(draws[:, 0], 0.975),
                "E_min": examples,
                "E_min low": np.quantile(draws[:, 1], 0.025),
                "E_min high": np.quantile(draws[:, 1], 0.975),
            }
        )
        for arm, own in part.groupby("arm", sort=False):
            whole = reached[reached["arm"] == arm]
            row = {"network": network, "arm": arm, "seeds": len(own), "reached": len(whole) / len(own)}
            if len(whole):
                updates, used = whole["updates_"].mean(), whole["examples_"].mean()
                q = (spent_[arm][:, 0] / draws[:, 0] - 1) * (spent_[arm][:, 1] / draws[:, 1] - 1)
                row |= {"updates": updates, "examples": used, "q": (updates / smallest - 1) * (used / examples - 1)}
                row |= {"q low": np.quantile(q, 0.025), "q high": np.quantile(q, 0.975)}
            methods.append(row)
    table = pd.DataFrame(methods)
    return {"fit": pd.DataFrame(fits), "methods": table, "claims": claims(table)}


def _crossed(part: pd.DataFrame, by_key: Mapping[str, pd.DataFrame]) -> tuple[float, pd.DataFrame]:
    """The target of a network, and its runs with what each had spent when its curve first crossed it."""
    # What every fixed batch can reach, up to the slowest one.
    reachable = part[part["arm"].str.startswith("fixed ")].groupby("arm")["final"].median()
    target = SLACK * reachable.nsmallest(max(3, len(reachable) - 1)).max()
    spent = pd.DataFrame([first_crossing(by_key[key], target) for key in part["key"]], index=part.index)
    return target, part.assign(updates_=spent["updates"], examples_=spent["examples"])


def _ended(runs: pd.DataFrame) -> tuple[float, pd.DataFrame]:
    """The target of runs of several budgets, and of each arm and seed the budget that ends there."""
    whole = runs[(runs["fixed"] > 0) & (runs["budget"] == runs["budget"].max())]
    target = DECAYED_SLACK * float(whole.groupby("arm")["test_loss"].mean().max())
    rows = []
    for (arm, seed), own in runs.sort_values("budget").groupby(["arm", "seed"], sort=False):
        spent = {name: budget_to(own["test_loss"], own[name], target) for name in ("updates", "examples")}
        rows.append({"arm": arm, "seed": seed, "updates_": spent["updates"], "examples_": spent["examples"]})
    return target, pd.DataFrame(rows)


def budget_to(losses: pd.Series, spent: pd.Series, target: float) -> float:
    """What a run must spend to end at ``target``, on the line through the logarithms of its budgets; else infinite.

    Example:
        >>> budget_to(pd.Series([16.0, 4.0, 1.0]), pd.Series([100.0, 200.0, 400.0]), 2.0)
        282.842712
    """
    falling = np.minimum.accumulate(losses.to_numpy(float))
    if not falling[-1] <= target <= falling[0]:
        return math.inf
    return round(math.exp(np.interp(-math.log(target), -np.log(falling), np.log(spent.to_numpy(float)))), 6)


def claims(methods: pd.DataFrame) -> pd.DataFrame:
    """F1: adaptive is on the frontier, its ``q`` between 1/2 and 2; not supported if its interval leaves out 1. F2."""
    rows = []
    for own in methods[methods["arm"] == comparison.ADAPTIVE].dropna(subset="q").itertuples():
        low, high = methods.loc[own.Index, "q low"], methods.loc[own.Index, "q high"]
        verdict = "not supported" if low > 1 or high < 1 else "supported" if low > 0.5 and high < 2 else "undecided"
        row = {
            "claim": "F1",
            "what": "q of adaptive is 1: it lies on the fixed batches' frontier",
            "where": own.network,
        }
        rows.append(row | {"value": own.q, "low": low, "high": high, "interval": "bootstrap", "verdict": verdict})
    for own in methods[methods["arm"].isin(DECAYED_RULES)].dropna(subset="q").itertuples():
        found = Interval(own.q, methods.loc[own.Index, "q low"], methods.loc[own.Index, "q high"], "bootstrap")
        row = {"claim": "F2", "what": f"q of {own.arm} is below 1", "where": own.network, "value": found.value}
        row |= {"low": found.low, "high": found.high, "interval": found.kind}
        rows.append(row | {"verdict": found.below(1.0)})
    return pd.DataFrame(rows, columns=["claim", "what", "where", "value", "low", "high", "interval", "verdict"])


def _resampled(held: pd.DataFrame, reached: pd.DataFrame) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Fits to seeds drawn again within each fixed batch, and what each arm spent on the mean of its seeds so drawn."""
    rng = np.random.default_rng(0)
    fixed_ = {arm: part["batch"].iloc[0] for arm, part in held.groupby("arm")}
    spent = {str(arm): part[["updates_", "examples_"]].to_numpy(float) for arm, part in reached.groupby("arm")}
    draws, means = [], {arm: [] for arm in spent}
    for _ in range(RESAMPLES):
        drawn = {arm: rows[rng.integers(len(rows), size=len(rows))] for arm, rows in spent.items()}
        for arm, rows in drawn.items():
            means[arm].append(rows.mean(axis=0))
        batches = np.concatenate([np.full(len(drawn[arm]), batch) for arm, batch in fixed_.items()])
        draws.append(fit(batches, np.concatenate([drawn[arm][:, 0] for arm in fixed_])))
    return np.array(draws), {arm: np.array(rows) for arm, rows in means.items()}


# Beyond them an arm is named and not drawn.
MOST_UPDATES = 300


def draw(folder: Path) -> None:
    """Updates against examples to the target: the fixed batches' hyperbola, and every method."""
    methods, fits = read_table(folder / "methods.parquet"), read_table(folder / "fit.parquet")
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            1, max(len(fits), 1), figsize=(4.2 * max(len(fits), 1), 4.0), squeeze=False, layout="constrained"
        )
        for axes, fit in zip(grid[0], fits.itertuples(), strict=False):
            part = methods[(methods["network"] == fit.network) & methods["updates"].notna()]
            of_fixed = part.loc[part["arm"].str.startswith("fixed "), "updates"]
            off = part["updates"] > max(MOST_UPDATES, 2 * of_fixed.max())
            if off.any():
                said = ", ".join(f"{own.arm}: {own.updates:,.0f} updates" for own in part[off].itertuples())
                axes.annotate(f"off the right: {said}", (1.0, 0.02), xycoords="axes fraction", fontsize=7.5, ha="right")
            part = part[~off]
            n = np.geomspace(16, 65536, 200)
            updates = fit.S_min + fit.E_min / n
            axes.plot(updates, n * updates, color="#BBBBBB", zorder=0)
            for own in part.itertuples():
                colour, marker = KINDS[kind(own.arm)]
                axes.plot(own.updates, own.examples, marker, color=colour, markersize=5)
            axes.set_xscale("log")
            axes.set_yscale("log")
            spans = (part["updates"], part["examples"])
            axes.set_xlim(spans[0].min() / 2.5, spans[0].max() * 3.0)
            axes.set_ylim(spans[1].min() / 1.5, spans[1].max() * 1.5)
            ticks = [
                t
                for t in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
                if spans[0].min() / 2.5 < t < spans[0].max() * 3.0
            ]
            axes.set_xticks(ticks, map(str, ticks))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_formatter(NullFormatter())
            _label_places(axes, part)
            axes.set_title(f"{fit.network}: to a loss of {fit.target:.1f}")
            axes.set_xlabel("updates")
        grid[0, 0].set_ylabel("examples")
        save(figure, folder, "figure")


def _label_places(axes: Axes, part: pd.DataFrame) -> None:
    """Names beside where the arms stand, moved apart where they would overlap; who stands in one place shares one."""
    place = part[["updates", "examples"]].map(lambda value: round(math.log(value) / 0.05))
    to_axes = axes.transData + axes.transAxes.inverted()
    labels: dict[str, list[tuple[float, float, tuple[float, float], str]]] = {"left": [], "right": []}
    for _, own in part.groupby([place["updates"], place["examples"]], sort=False):
        names = sorted(own["arm"], key=lambda arm: kind(arm) != "adaptive")
        name = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
        spot = (float(own["updates"].mean()), float(own["examples"].mean()))
        x, y = to_axes.transform(spot)
        labels["left" if kind(name) == "adaptive" else "right"].append((y, x, spot, name))
    for side, entries in labels.items():
        height = -math.inf
        for y, x, spot, text in sorted(entries):
            height = max(y, height + 0.042)
            axes.annotate(
                text,
                spot,
                (x + (0.025 if side == "right" else -0.025), height),
                textcoords="axes fraction",
                fontsize=7.5,
                color=KINDS[kind(text)][0],
                va="center",
                ha="left" if side == "right" else "right",
                arrowprops={"arrowstyle": "-", "color": "#BBBBBB", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
            )


STUDY = Study(
    "frontier",
    "updates against examples, and where each method lies",
    plan,
    from_runs(tables),
    order=8,
    figures=draw,
)
