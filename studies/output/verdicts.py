"""The comparison's tables and its verdicts, from rows and curves alone: neither torch nor adaptbatch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from studies.output.statistics import TARGET_SLACK, Interval, expected_best, holm, iqm, ratio, share, to_target

ADAPTIVE = "adaptive"
MARGIN, TASKS_SHARE = 1.10, 0.8
SWEEP = "fixed, any batch"
CONTROLS = ("replay", "rate follows root", "rate follows", "constant mean", "random switching")


def tables(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """All that the comparison reports; a table is missing while its runs are."""
    reported = runs[runs["stage"].isin(["final", "control", "away"])]
    tried = runs[runs["stage"] == "tune"]
    found = {"tuning": tuning(tried), "budget": budget(tried)}
    if len(reported):
        times = targets(reported, curves)
        found["arms"] = arms(times)
        found["claims"] = claims(times, runs)
        found["together"] = together(times)
    stressed = runs[runs["stage"] == "stress"]
    if len(stressed):
        found["stress"] = stress(stressed)
    return found


def fixed_arms(runs: pd.DataFrame) -> list[str]:
    """The fixed batches among the arms, smallest first."""
    names = {arm for arm in runs["arm"].unique() if arm.startswith("fixed ")}
    return sorted(names, key=lambda arm: int(arm.split()[1]))


def best_fixed(runs: pd.DataFrame) -> str:
    """The fixed batch with the smallest median ``final``."""
    fixed = runs[runs["arm"].isin(fixed_arms(runs))]
    return str(fixed.groupby("arm")["final"].median().idxmin())


def tuning(runs: pd.DataFrame) -> pd.DataFrame:
    """The best trial of each method, and its regret over the rates within a factor of about ten of it.

    ``regret``: mean over the method's trials of ``min(final, collapsed) / best``, where ``collapsed`` is the largest
    finite ``final`` that any method of the network has at its best: what the choice of a rate costs who cannot tune.
    """
    rows = []
    for network, part in runs.groupby("network", sort=False):
        means = part.groupby(["method", "trial"], sort=False).agg(final=("final", "mean"), lr=("lr", "first"))
        best = means["final"].groupby(level="method").min()
        for method, trials in means.groupby(level="method", sort=False):
            finals = trials["final"].clip(upper=4 * best.min())
            rows.append(
                {
                    "network": network,
                    "method": method,
                    "trials": len(trials),
                    "best": trials["final"].min(),
                    "lr": trials["lr"].iloc[int(trials["final"].argmin())],
                    "median trial": trials["final"].median(),
                    "regret": float((finals / best.min()).mean()),
                }
            )
    return pd.DataFrame(rows)


def budget(runs: pd.DataFrame) -> pd.DataFrame:
    """The loss to expect from so many trials of a method; :data:`SWEEP` draws among the fixed batches too.

    Losses count at most as four times the network's best, so that a trial that diverged does not make all infinite.

    Returns:
        A row for each network, method and number of trials: ``expected``, and ``of best``, over the network's best.
    """
    rows = []
    for network, part in runs.groupby("network", sort=False):
        finals = part.groupby(["method", "trial"], sort=False)["final"].mean()
        best = finals.min()
        pools = {str(method): own for method, own in finals.groupby(level="method", sort=False)}
        pools = {SWEEP: pd.concat([pools[arm] for arm in fixed_arms(runs)])} | pools
        for method, own in pools.items():
            for trials in range(1, len(own) + 1):
                expected = expected_best(own.clip(upper=4 * best).to_numpy(), trials)
                row = {"network": network, "method": method, "trials": trials, "expected": expected}
                rows.append(row | {"of best": expected / best})
    return pd.DataFrame(rows)


def targets(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Each run with what it had spent when it reached its task's target."""
    by_key = dict(tuple(curves.groupby("key", sort=False)))
    parts = []
    for _, part in runs.groupby(["network", "data"], sort=False):
        if not fixed_arms(part):
            continue
        target = TARGET_SLACK * part.loc[part["arm"] == best_fixed(part), "final"].median()
        spent = pd.DataFrame([to_target(by_key[key], target) for key in part["key"]], index=part.index)
        parts.append(part.assign(target=target).join(spent.add_suffix(" to target")))
    return pd.concat(parts)


def arms(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each task and arm: where it ended, against the best fixed batch seed by seed, at what cost."""
    rows = []
    for (network, data), part in runs.groupby(["network", "data"], sort=False):
        best = best_fixed(part)
        reference = part[part["arm"] == best].set_index("seed")
        for arm, own in part.groupby("arm", sort=False):
            final = iqm([own["final"].to_numpy(float)])
            paired = own.set_index("seed").index.intersection(reference.index)
            mine, theirs = own.set_index("seed").loc[paired], reference.loc[paired]
            against, p = ratio(mine["final"].to_numpy(float), theirs["final"].to_numpy(float))
            rows.append(
                {
                    "network": network,
                    "data": data,
                    "arm": arm,
                    "seeds": len(own),
                    **_named("final", final),
                    **_named("of best fixed", against),
                    "p": math.nan if arm == best else p,
                    "reached": float(np.isfinite(own["examples to target"]).mean()),
                    "examples to target": own["examples to target"].median(),
                    "updates to target": own["updates to target"].median(),
                    "seconds to target": own["seconds to target"].median(),
                    "diverged": int(own["diverged"].sum()),
                    "spikes": own["spikes"].mean(),
                    "probe spikes": own["probe_spikes"].mean(),
                    "mean n": own["mean_batch"].mean(),
                    "auroc": own["auroc"].mean(),
                    "auprc": own["auprc"].mean(),
                    "log sd": float(np.log(own["final"]).std()) if np.isfinite(own["final"]).all() else math.inf,
                    "lr": own["lr"].iloc[0],
                    "best fixed": arm == best,
                }
            )
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p"]))


def together(runs: pd.DataFrame) -> pd.DataFrame:
    """Arms that ran on several tasks: interquartile mean over tasks and seeds of ``final / best fixed``.

    Normalised by the task's best fixed batch (its median over seeds); the bootstrap resamples seeds within tasks.
    """
    tasks = [part for _, part in runs.groupby(["network", "data"], sort=False)]
    rows = []
    for arm in runs["arm"].unique():
        strata = []
        for part in tasks:
            reference = part.loc[part["arm"] == best_fixed(part), "final"].median()
            strata.append((part.loc[part["arm"] == arm, "final"] / reference).to_numpy(float))
        if len(strata) > 1 and all(len(stratum) for stratum in strata):
            rows.append({"arm": arm, "tasks": len(strata), **_named("of best fixed", iqm(strata))})
    return pd.DataFrame(rows)


def _named(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name} low": interval.low, f"{name} high": interval.high}


def stress(runs: pd.DataFrame) -> pd.DataFrame:
    """Each arm at the rate at which the smallest batch spikes: how often it diverges, spikes, and where it ends."""
    rows = []
    for arm, own in runs.groupby("arm", sort=False):
        diverged = share(int(own["diverged"].sum()), len(own))
        row = {"arm": arm, "seeds": len(own), **_named("diverged", diverged)}
        row |= {"runs with spikes": int((own["spikes"] > 0).sum()), "spikes": own["spikes"].mean()}
        row |= {"probe spikes": own["probe_spikes"].mean(), "mean n": own["mean_batch"].mean()}
        rows.append(row | _named("final", iqm([own["final"].to_numpy(float)])))
    return pd.DataFrame(rows)


def claims(times: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """W1 to W4, task by task and together: the figure, its interval, the verdict."""
    rows = [*_w1(times), *_w2(times, runs), *_w3(runs), *_w4(times)]
    columns = ["claim", "what", "where", "value", "low", "high", "interval", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def _row(claim: str, what: str, where: str, found: Interval, verdict: str) -> dict[str, object]:
    bounds = {"value": found.value, "low": found.low, "high": found.high, "interval": found.kind}
    return {"claim": claim, "what": what, "where": where, **bounds, "verdict": verdict}


def _pairs(part: pd.DataFrame, ours: str, theirs: str, column: str) -> tuple[Interval, float]:
    wide = part[part["arm"].isin([ours, theirs])].pivot_table(index="seed", columns="arm", values=column, dropna=False)
    if ours not in wide or theirs not in wide:
        return Interval(math.nan, math.nan, math.nan), math.nan
    wide = wide.dropna()
    return ratio(wide[ours].to_numpy(float), wide[theirs].to_numpy(float))


def _w1(times: pd.DataFrame) -> Iterator[dict[str, object]]:
    what = "examples to target, adaptive / best fixed, is below 1.10"
    verdicts = []
    for (network, data), part in times.groupby(["network", "data"], sort=False):
        if ADAPTIVE not in set(part["arm"]):
            continue
        found, _ = _pairs(part, ADAPTIVE, best_fixed(part), "examples to target")
        verdicts.append(found.below(MARGIN))
        yield _row("W1", what, f"{network}, {data}", found, verdicts[-1])
    if verdicts:
        held = verdicts.count("supported") / len(verdicts)
        lost = verdicts.count("not supported") / len(verdicts)
        verdict = "supported" if held >= TASKS_SHARE else "not supported" if 1 - lost < TASKS_SHARE else "undecided"
        yield _row(
            "W1", "share of the tasks, at least 0.8", "all tasks", Interval(held, held, 1 - lost, "count"), verdict
        )


def _w2(times: pd.DataFrame, runs: pd.DataFrame) -> Iterator[dict[str, object]]:
    """Regret when carried over, and the cost with the trials: 1 method against the sweep of all fixed batches."""
    away = times[times["stage"] == "away"]
    names = fixed_arms(away)
    if len(away) and ADAPTIVE in set(away["arm"]):
        for (network, data), part in away.groupby(["network", "data"], sort=False):
            home = times[(times["network"] == network) & (times["stage"] == "final")]
            chosen = best_fixed(home)
            found, _ = _pairs(part, ADAPTIVE, chosen, "final")
            what = "final, adaptive / the fixed batch that was best at home, both carried over, is below 1"
            yield _row("W2", what, f"{network}, {data}", found, found.below(1.0))
    tune = runs[runs["stage"] == "tune"]
    names = fixed_arms(tune)
    for network, part in times[times["stage"] == "final"].groupby("network", sort=False):
        trials = tune[(tune["network"] == network)].groupby("arm").size()
        if ADAPTIVE not in trials or not names:
            continue
        cost = trials[ADAPTIVE] / trials[names].sum()
        found, _ = _pairs(part, ADAPTIVE, best_fixed(part), "final")
        what = f"final, adaptive / best fixed, at {cost:.2f} of the trials, is below 1.05"
        yield _row("W2", what, f"{network}, home", found, found.below(TARGET_SLACK))


def _w3(runs: pd.DataFrame) -> Iterator[dict[str, object]]:
    stressed = runs[runs["stage"] == "stress"]
    if not len(stressed):
        return
    largest = fixed_arms(stressed)[-1]
    both = [stressed.loc[stressed["arm"] == arm, "diverged"].to_numpy(bool) for arm in (ADAPTIVE, largest)]
    difference = Interval(float(both[0].mean() - both[1].mean()), *_difference(*both), "Newcombe")
    what = f"divergence rate, adaptive less {largest}, is at most 0 (margin 0.1)"
    yield _row("W3", what, "noisy, stress rate", difference, difference.below(0.1))


def _difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Newcombe's interval of the difference of two shares, from their Wilson intervals."""
    a, b = share(int(ours.sum()), len(ours)), share(int(theirs.sum()), len(theirs))
    low = a.value - b.value - math.hypot(a.value - a.low, b.high - b.value)
    return low, a.value - b.value + math.hypot(a.high - a.value, b.value - b.low)


def _w4(times: pd.DataFrame) -> Iterator[dict[str, object]]:
    """A control that is as good (within 2 %) shows that feedback was not what it took."""
    for (network, data), part in times[times["stage"].isin(["final", "control"])].groupby(
        ["network", "data"], sort=False
    ):
        for control in CONTROLS:
            if control not in set(part["arm"]):
                continue
            found, _ = _pairs(part, ADAPTIVE, control, "final")
            yield _row("W4", f"final, adaptive / {control}, is below 1", f"{network}, {data}", found, found.below(1.0))


VERDICTS = ("supported", "not supported", "undecided")


def counted(claims: pd.DataFrame) -> list[dict[str, str]]:
    """A row for each claim of a study: in how many places it holds, the smallest and the largest figure.

    Example:
        >>> places = pd.DataFrame({"claim": "W1", "what": "x", "value": [1.0, 2.0]})
        >>> list(counted(places.assign(verdict=["supported", "undecided"]))[0].values())
        ['W1', 'x', '1', '0', '1', '1.00 to 2.00']
    """
    rows = []
    for (claim, what), part in claims.groupby(["claim", "what"], sort=False):
        counts = part["verdict"].value_counts()
        ends = [f"{end:.2f}" if math.isfinite(end) else "never" for end in (part["value"].min(), part["value"].max())]
        row = {"claim": str(claim), "what": str(what)} | {name: str(counts.get(name, 0)) for name in VERDICTS}
        rows.append(row | {"values": " to ".join(dict.fromkeys(ends))})
    return rows
