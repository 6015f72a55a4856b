"""Updates at equal examples and equal loss, against the frontier of fixed batches. Neither torch nor adaptbatch.

All runs of a task see the same examples, so that a batch costs updates or loss. The frontier is what tuned fixed
batches can have: for each number of updates the lowest loss of a fixed batch that takes no more, log-linear between
batches. A method with ``U`` updates and loss ``L`` is compared where the frontier has that loss::

    updates ratio = U / U_frontier(L)          loss ratio = L / L_frontier(U)

Below 1 is better. Where a loss is lower than that of any fixed batch the frontier is held at its end: the ratio is then
at most what is said. Where it is higher than that of the largest batch the ratio is infinite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

RESAMPLES = 2_000
LIVE_SHARE = 0.5


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


def compare(runs: pd.DataFrame, loss: str = "test_loss", resamples: int = RESAMPLES) -> pd.DataFrame:
    """Every arm of one task against the frontier of its fixed batches, with 95 % bootstrap intervals over seeds.

    Seeds are drawn again for all arms alike: they share initial weights and the order of the data. An arm's loss is the
    geometric mean over its seeds, its updates their geometric mean; where a run ended without a finite loss, so does
    the arm's mean.

    Args:
        runs: A row for each run, with ``arm``, ``seed``, ``fixed`` (whether it is a fixed batch), ``updates`` and
            ``loss``; every arm on the same seeds.
        loss: Column of the loss.
        resamples: Of the bootstrap.

    Returns:
        A row for each arm: ``updates``, ``loss``, ``updates ratio`` and ``loss ratio`` with ``low`` and ``high``,
        ``beyond`` (the share of resamples, the whole included, where its loss is beyond the frontier's ends).
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
        rows.append(row | {"beyond": float(found[:, index, 2].mean())})
    return pd.DataFrame(rows)


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
    """Which closed-loop runs put their rule to the test: ``k`` changed, and fewer than half the windows at a limit."""
    return (runs["changes"] > 0) & (runs["at_limit"] < LIVE_SHARE)
