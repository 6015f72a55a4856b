"""How a training opens: its noise, and what replaces the warm-up of its rate. Neither torch nor adaptbatch."""

from __future__ import annotations

import numpy as np
import pandas as pd

from studies.output.fronts import claim_row
from studies.output.statistics import Interval, ratio

# Of a budget of one million: the first 50,000 characters.
EARLY = 0.05


def opening_noise(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """L3 (a): geometric mean of the relative noise ``B / n`` at the early evaluations of every run with a warm-up."""
    own = runs.loc[runs["arm"] == "rate warm-up", ["key", "order", "lr", "seed", "diverged"]].merge(
        curves[["key", "examples_seen", "noise_scale", "global_batch"]], on="key"
    )
    early = own[own["examples_seen"] <= EARLY * own.groupby("key")["examples_seen"].transform("max")]
    noise = np.log(early["noise_scale"] / early["global_batch"])
    by = early.assign(noise=noise).groupby(["order", "lr", "seed"], sort=False)
    found = by.agg(noise=("noise", "mean"), diverged=("diverged", "first")).reset_index()
    return found.assign(**{"B / n": np.exp(found.pop("noise"))})


def noisier(table: pd.DataFrame) -> list[dict[str, object]]:
    """L3 (a): post-LN over pre-LN, where there are both."""
    calm = table[~table.groupby("lr")["diverged"].transform("max").astype(bool)]
    means = np.exp(np.log(calm.set_index(["order", "lr", "seed"])["B / n"]).groupby(["order", "seed"]).mean())
    if set(means.index.get_level_values("order")) != {"pre", "post"}:
        return []
    found, _ = ratio(means["pre"].to_numpy(float), means["post"].to_numpy(float))
    return [claim_row("L3", "early B / n of pre-LN over that of post-LN is below 1", "1 million", found)]


def openings(table: pd.DataFrame) -> list[dict[str, object]]:
    """L3 (b): what opens with a large batch against the rate's warm-up, on post-LN."""
    rows = []
    own = table[table["order"] == "post"].set_index("opening")
    for way in ("large batch first", "standard error"):
        if way in own.index:
            row = own.loc[way]
            found = Interval(row["of rate warm-up"], row["low"], row["high"], "t")
            said = f"loss of {way} over that of the rate's warm-up is below 1.01, at as many rates"
            claimed = claim_row("L3", said, "post-LN, 1 million", found, 1.01)
            if row["rates within a tenth"] < own.loc["rate warm-up", "rates within a tenth"]:
                claimed["verdict"] = "not supported"
            rows.append(claimed)
    return rows


def warm_up(runs: pd.DataFrame) -> pd.DataFrame:
    """L3: each way's best rate, its loss there, and how many rates are within a tenth of it."""
    rows = []
    for (order, way), part in runs.groupby(["order", "arm"], sort=False):
        means = part.groupby("lr")["test_loss"].mean()
        best = float(means.idxmin())
        reference = runs[(runs["order"] == order) & (runs["arm"] == "rate warm-up")]
        best_reference = float(reference.groupby("lr")["test_loss"].mean().idxmin())
        mine = part[part["lr"] == best].set_index("seed")["test_loss"]
        theirs = reference[reference["lr"] == best_reference].set_index("seed")["test_loss"]
        found, _ = ratio(mine.to_numpy(float), theirs[mine.index].to_numpy(float))
        row = {"order": order, "opening": way, "lr": best, "loss": means.min()}
        row |= {"of rate warm-up": found.value, "low": found.low, "high": found.high}
        row |= {"rates within a tenth": int((means <= 1.1 * means.min()).sum()), "rates": len(means)}
        rows.append(row | {"spikes": part["spikes"].mean(), "diverged": int(part["diverged"].sum())})
    return pd.DataFrame(rows)
