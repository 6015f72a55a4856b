"""From rows to tables: neither torch nor adaptbatch, only the results schema."""

from __future__ import annotations

import pandas as pd

SPIKE_WINDOW = 100
SPIKE_FACTOR = 2.0
SPIKE_SKIP = 0.1


def spike_flags(losses: pd.Series) -> pd.Series:
    """Which micro-batch losses are spikes: above twice the running median of the 100 before, or not finite.

    The first tenth of training is not counted, where the loss falls too fast for a median to mean anything.

    Args:
        losses: One loss per micro-batch, in order.

    Example:
        >>> losses = pd.Series([1.0] * 200 + [2.5] + [1.0] * 9)
        >>> spike_flags(losses).to_numpy().nonzero()[0].tolist()
        [200]
    """
    median = losses.rolling(SPIKE_WINDOW, min_periods=1).median().shift(1)
    spikes = ~(losses <= SPIKE_FACTOR * median)
    return spikes & (losses.index >= max(1, SPIKE_SKIP * len(losses)))


def summary(results: pd.DataFrame) -> pd.DataFrame:
    """One row per run: what was reached, at what cost, how smoothly.

    ``final`` and ``best`` are validation losses, means per example on the fixed probe set; ``mean n`` is examples per
    update; ``limits`` is the share of steps that a closed-loop rule took at the smallest or largest allowed ``k``;
    ``lr`` is the largest learning rate.
    """

    def one(run: pd.DataFrame) -> pd.Series:
        validation = run["validation_loss"].dropna()
        return pd.Series(
            {
                "final": validation.iloc[-1],
                "best": validation.min(),
                "examples": run["examples_seen"].iloc[-1],
                "updates": run["optimizer_step"].iloc[-1],
                "mean n": run["examples_seen"].iloc[-1] / len(run),
                "spikes": run["spikes"].sum(),
                "limits": run["at_limit"].mean(),
                "lr": run["lr"].max(),
                "wall s": run["wall_seconds"].iloc[-1],
            }
        )

    runs = {key: one(run) for key, run in results.groupby(["arm", "seed"], sort=False)}
    return pd.DataFrame(runs).T.rename_axis(["arm", "seed"]).reset_index()
