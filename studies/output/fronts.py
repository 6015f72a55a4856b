"""Updates at equal examples and equal loss, against the frontier of fixed batches. Neither torch nor adaptbatch.

All runs of a task see the same examples, so that a batch costs updates or loss. The frontier is what tuned fixed
batches can have: for each number of updates the lowest loss of a fixed batch that takes no more, log-linear between
batches. A method with ``U`` updates and loss ``L`` is compared where the frontier has that loss::

    updates ratio = U / U_frontier(L)          loss ratio = L / L_frontier(U)

Below 1 is better. Where a loss is lower than that of any fixed batch the frontier is held at its end: the ratio is then
at most what is said. Where it is higher than that of the largest batch the ratio is infinite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from studies.output.statistics import Interval, ratio

RESAMPLES = 2_000
LIVE_SHARE = 0.5
# Stage of the fixed batches' runs with the warm-ups that they had to choose at first.
BEFORE = "shorter warm-ups"


@dataclass(frozen=True)
class Frontier:
    """Points that no other fixed batch dominates, by growing updates and falling loss.

    Attributes:
        updates: Ascending.
        losses: Strictly descending.
    """

    updates: np.ndarray
    losses: np.ndarray

    @classmethod
    def of(cls, updates: Sequence[float] | np.ndarray, losses: Sequence[float] | np.ndarray) -> Frontier:
        """The frontier of some batches' updates and losses; what did not end at a finite loss has no place in it.

        Example:
            >>> front = Frontier.of([8000, 1000, 2000, 4000], [2.2, 4.0, 2.0, 2.1])
            >>> front.updates.tolist(), front.losses.tolist()
            ([1000.0, 2000.0], [4.0, 2.0])
        """
        order = np.lexsort((np.asarray(losses, float), np.asarray(updates, float)))
        u, loss = np.asarray(updates, float)[order], np.asarray(losses, float)[order]
        u, loss = u[np.isfinite(loss)], loss[np.isfinite(loss)]
        if not len(u):
            raise ValueError("losses must hold at least one finite value, got none; the fixed batches all diverged.")
        kept = np.concatenate([[True], loss[1:] < np.minimum.accumulate(loss)[:-1]])
        return cls(u[kept], loss[kept])

    def updates_at(self, loss: float) -> float:
        """Updates of a fixed batch that ends at ``loss``: at least the most tried below its end, 0 above it.

        Example:
            >>> Frontier.of([1000, 4000], [4.0, 1.0]).updates_at(2.0)
            2000.0
        """
        if loss > self.losses[0]:
            return 0.0
        logs = np.interp(-np.log(loss), -np.log(self.losses), np.log(self.updates))
        return float(np.round(np.exp(logs), 9))

    def loss_at(self, updates: float) -> float:
        """Loss of a fixed batch with so many updates; held at the ends."""
        return float(np.exp(np.interp(np.log(updates), np.log(self.updates), np.log(self.losses))))

    def holds(self, loss: float) -> bool:
        """Whether ``loss`` lies between its ends."""
        return bool(self.losses[-1] <= loss <= self.losses[0])


def compare(
    runs: pd.DataFrame, loss: str = "test_loss", resamples: int = RESAMPLES, against: str | None = None
) -> pd.DataFrame:
    """Every arm of one task against the frontier of its fixed batches, with 95 % bootstrap intervals over seeds.

    Seeds are drawn again for all arms alike: they share initial weights and the order of the data. An arm's loss is the
    geometric mean over its seeds, its updates their geometric mean; where a run ended without a finite loss, so does
    the arm's mean.

    Args:
        runs: A row for each run, with ``arm``, ``seed``, ``fixed`` (whether it is a fixed batch), ``updates`` and
            ``loss``; every arm on the same seeds.
        loss: Column of the loss.
        resamples: Of the bootstrap.
        against: An arm whose updates ratio is divided by that of every arm, draw by draw; None: none.

    Returns:
        A row for each arm: ``updates``, ``loss``, ``updates ratio`` and ``loss ratio`` with ``low`` and ``high``,
        ``beyond`` (the share of resamples, the whole included, where its loss is beyond the frontier's ends),
        and ``over`` with its bounds: the updates ratio of ``against`` over the arm's.
    """
    seeds = sorted(set.intersection(*(set(own) for _, own in runs.groupby("arm")["seed"])))
    if not seeds:
        raise ValueError("runs must have a seed that all arms share, got none; run the missing ones.")
    kept = runs[runs["seed"].isin(seeds)]
    arms = list(dict.fromkeys(kept["arm"]))
    fixed = kept.groupby("arm")["fixed"].first()[arms].to_numpy(bool)
    spent, ended = (
        np.log(kept.pivot_table(index="arm", columns="seed", values=column).loc[arms, seeds].to_numpy(float))
        for column in ("updates", loss)
    )
    rng = np.random.default_rng(0)
    draws = [np.arange(len(seeds)), *(rng.integers(len(seeds), size=len(seeds)) for _ in range(resamples))]
    found = np.array([_ratios(spent[:, draw], ended[:, draw], fixed) for draw in draws])
    rows = []
    for index, arm in enumerate(arms):
        row = {"arm": arm, "fixed": bool(fixed[index]), "seeds": len(seeds)}
        row |= {"updates": float(np.exp(spent[index].mean())), "loss": float(np.exp(ended[index].mean()))}
        for place, name in enumerate(("updates ratio", "loss ratio")):
            values = found[:, index, place]
            row |= {name: values[0]} | _interval(name, values[1:])
        if against in arms:
            with np.errstate(invalid="ignore"):
                over = found[:, arms.index(against), 0] / found[:, index, 0]
            row |= {"over": over[0]} | _interval("over", over[1:])
        rows.append(row | {"beyond": float(found[:, index, 2].mean())})
    return pd.DataFrame(rows)


def compare_tasks(final: pd.DataFrame, task: Sequence[str], against: str | None = None) -> pd.DataFrame:
    """:func:`compare` of every task on the seeds of its fixed batches; an arm without one of them waits.

    Args:
        final: Rows of finished runs, those of a fixed batch with ``fixed`` above 0.
        task: Columns that tell tasks apart.
        against: Of :func:`compare`.

    Returns:
        Its rows with the columns ``task``, ``live`` (how many runs were), the median of ``changes``, the rate and the
        batch; empty before a task has two fixed batches.
    """
    parts = []
    for names, part in final.groupby(list(task), sort=False):
        part = part.assign(fixed=part["fixed"] > 0, live=is_live(part))
        by_arm = {arm: set(own) for arm, own in part.groupby("arm")["seed"]}
        batches = part.loc[part["fixed"], "arm"].unique()
        if len(batches) < 2:
            continue
        seeds = set.intersection(*(by_arm[arm] for arm in batches))
        arms = [arm for arm, own in by_arm.items() if seeds <= own]
        whole = part[part["arm"].isin(arms) & part["seed"].isin(seeds)]
        more = whole.groupby("arm", sort=False).agg(
            live=("live", "sum"),
            changes=("changes", "median"),
            lr=("lr", "first"),
            diverged=("diverged", "sum"),
            **{"mean n": ("mean_batch", "mean"), "last n": ("last_batch", "mean"), "limits": ("at_limit", "mean")},
        )
        table = compare(whole, against=against).join(more, on="arm")
        parts.append(table.assign(**dict(zip(task, names, strict=True))))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*task, "arm", "fixed"])
    return table[[*task, *(name for name in table if name not in task)]]


def against_earlier(final: pd.DataFrame, earlier: pd.DataFrame, task: Sequence[str]) -> pd.DataFrame:
    """:func:`compare_tasks` with the frontier of fixed batches that had less to choose from.

    Args:
        final: Rows of all arms.
        earlier: Rows of those fixed batches that have changed since, as they were.
        task: Columns that tell tasks apart.
    """
    names = [*task, "arm"]
    changed = final.set_index(names).index.isin(earlier.set_index(names).index)
    return compare_tasks(pd.concat([final[~changed], earlier], ignore_index=True), task)


def tuned_rates(tried: pd.DataFrame, task: Sequence[str]) -> pd.DataFrame:
    """The best rate of each task's methods, and whether it stands at an end of the range.

    Args:
        tried: Rows of the trials.
        task: Columns that tell tasks apart.
    """
    names = [*task, "method"]
    rows = []
    for values, own in tried.groupby(names, sort=False):
        means = own.groupby("lr")["final"].mean()
        best = float(means.idxmin())
        row = dict(zip(names, values, strict=True)) | {"lr": best, "final": means.min()}
        rows.append(row | {"trials": len(means), "edge": best in (means.index.min(), means.index.max())})
    return pd.DataFrame(rows)


def claim_row(
    claim: str, what: str, where: str, found: Interval, bound: float = 1.0, arm: Mapping[str, Any] | None = None
) -> dict[str, object]:
    """A claim that ``found`` is below ``bound``, undecided where most runs of its ``arm`` were not live."""
    row = {"claim": claim, "what": what, "where": where, "value": found.value, "low": found.low, "high": found.high}
    live = "" if arm is None else f"{arm['live']:.0f} of {arm['seeds']:.0f}"
    tested = arm is None or arm["live"] > arm["seeds"] / 2
    return row | {"interval": found.kind, "live": live, "verdict": found.below(bound) if tested else "undecided"}


def bootstrapped(row: Mapping[str, Any], name: str) -> Interval:
    """A quantity of a table's row, with the interval that :func:`compare` gave it."""
    return Interval(*(float(row[f"{name}{end}"]) for end in ("", " low", " high")), "bootstrap")


def annealing(claim: str, runs: pd.DataFrame, where: str) -> list[dict[str, object]]:
    """Does the batch anneal twice: loss with the root coupling over loss without, seed by seed."""
    rows = []
    by_arm = {str(arm): own.set_index("seed")["test_loss"] for arm, own in runs.groupby("arm", sort=False)}
    for arm, with_it in by_arm.items():
        without = by_arm.get(arm.removesuffix(", root")) if arm.endswith(", root") else None
        if without is None:
            continue
        seeds = with_it.index.intersection(without.index)
        found, _ = ratio(with_it[seeds].to_numpy(float), without[seeds].to_numpy(float))
        rows.append(claim_row(claim, f"loss of {arm} over that without the coupling is below 1", where, found))
    return rows


def feedback(claim: str, own: pd.DataFrame, where: str, arm: str, controls: Sequence[str]) -> list[dict[str, object]]:
    """Is it feedback: what the controls leave of ``arm``'s updates ratio, draw by draw; ``own`` by arm."""
    rows = []
    for control in controls:
        if control in own.index and "over" in own:
            said = f"updates ratio of {arm} over that of {control} is below 1"
            rows.append(claim_row(claim, said, where, bootstrapped(own.loc[control], "over"), arm=own.loc[arm]))
    return rows


def _interval(name: str, values: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(values, [0.025, 0.975], method="closest_observation")
    return {f"{name} low": float(low), f"{name} high": float(high)}


def _ratios(spent: np.ndarray, ended: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """``[arms, (updates ratio, loss ratio, beyond)]`` of one draw of seeds, from logarithms ``[arms, seeds]``."""
    updates, losses = np.exp(spent.mean(axis=1)), np.exp(ended.mean(axis=1))
    front = Frontier.of(updates[fixed], losses[fixed])
    rows = []
    for u, loss in zip(updates, losses, strict=True):
        if not np.isfinite(loss):
            rows.append((np.inf, np.inf, 1.0))
        else:
            theirs = front.updates_at(loss)
            rows.append((u / theirs if theirs else np.inf, loss / front.loss_at(u), float(not front.holds(loss))))
    # An arm that is a fixed batch itself is at 1, not at its rounding.
    return np.round(rows, 6)


def is_live(runs: pd.DataFrame) -> pd.Series:
    """Which runs put a rule to the test: in a closed loop ``k`` changed, and fewer than half the windows at a limit.

    What an open loop does, it does.
    """
    return (runs["adaptbatch"] == "any") | (runs["changes"] > 0) & (runs["at_limit"] < LIVE_SHARE)
