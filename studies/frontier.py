"""Where does each method lie on the frontier of updates against examples?

A fixed batch ``n`` that reaches a target in ``S`` updates has spent ``E = n S`` examples; in the model of McCandlish et
al. 2018 (arXiv:1812.06162, section 2) ``S(n) = S_min + E_min / n``, so that ``(S / S_min - 1) (E / E_min - 1) = 1``
whatever ``n``. A method whose product ``q`` is below 1 is inside the frontier of the fixed batches. Theory says that a
rule ``n = B / theta^2`` cannot be inside by much: its ``q`` is that of a fixed batch (F1: the interval of adaptive's
``q`` contains 1).

The fixed batches are those of :mod:`studies.comparison`, each with its own tuned rate, and one that is four times
larger.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import optimize

from studies import comparison
from studies.arms import Arm
from studies.comparison import Method, Network, choose, fixed, tuning
from studies.runner import Run
from studies.statistics import first_crossing
from studies.sweep import Found, Options

LARGER = Method("fixed 4096", lambda p: Arm("", fixed(4096), p["lr"]))
SLACK = 1.25
RESAMPLES = 500


def plan(options: Options, found: Found) -> list[Run]:
    """The comparison's tuning and final runs, and those of one larger batch."""
    scale = comparison.SCALES[options.preset]
    data = (options.data or (scale.home,))[0]
    runs = [run for run in comparison.plan(replace(options, data=(data,)), found) if _wanted(run)]
    networks: tuple[Network, ...] = ("noisy", "calm")
    for network in networks:
        runs += list(tuning(LARGER, network, data, scale))
        params = choose(LARGER, network, data, scale, found)
        if params is not None:
            arm = LARGER.arm(params)
            seeds = range(options.seeds or scale.seeds)
            runs += [comparison.labelled("final", network, data, scale, arm, seed, LARGER.name) for seed in seeds]
    return runs


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
    fits, methods = [], []
    for network, part in final.groupby("network", sort=False):
        is_fixed = part["arm"].str.startswith("fixed ")
        # What every fixed batch can reach, up to the slowest one.
        reachable = part[is_fixed].groupby("arm")["final"].median()
        target = SLACK * reachable.nsmallest(max(3, len(reachable) - 1)).max()
        spent = pd.DataFrame([first_crossing(by_key[key], target) for key in part["key"]], index=part.index)
        part = part.assign(updates_=spent["updates"], examples_=spent["examples"])
        held = part[is_fixed & np.isfinite(part["updates_"])]
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


def claims(methods: pd.DataFrame) -> pd.DataFrame:
    """F1: adaptive is on the frontier, its ``q`` between 1/2 and 2; not supported if its interval leaves out 1."""
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
