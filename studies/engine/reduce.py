"""From a run's table to what is committed: one row of settings and outcomes, and its curve. Neither torch nor
adaptbatch.

Definitions, fixed before any run of the studies:

* ``final``: mean loss on the probe set over the last tenth of training; infinite if the run broke off.
* ``diverged``: the loss stopped being finite, or more than 1 % of its values on the probe set after the first tenth are
  lost: above the first one, or above both four times the best so far and the loss of the mean input.
* ``spikes``: micro-batches whose loss is above twice the running median of the 100 before
  (:func:`studies.engine.analysis.spike_flags`). A micro-batch is as large in every arm: a large batch averages nothing
  here.
* ``probe_spikes``: the same with 1.3 times the median of the 20 evaluations before, on the fixed probe set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from studies.engine.analysis import SPIKE_SKIP

LAST = 0.1
POINTS = 120
DIVERGED_SHARE, DIVERGED_FACTOR = 0.01, 4.0
PROBE_WINDOW, PROBE_FACTOR = 20, 1.3
CURVE = {
    "examples_seen": "float32",
    "optimizer_step": "int32",
    "wall_seconds": "float32",
    "accumulation_steps": "int32",
    "global_batch": "float32",
    "reason": "str",
    "loss": "float32",
    "validation_loss": "float32",
    "noise_scale": "float32",
    "noise_scale_low": "float32",
    "noise_scale_high": "float32",
    "noise_scale_typical": "float32",
    "relative_error": "float32",
    "tail_share": "float32",
    "batch_grad_norm": "float32",
    "lr": "float32",
}


def outcome(table: pd.DataFrame, budget: float, mean_input_loss: float) -> dict[str, Any]:
    """What came of a run.

    Args:
        table: Of the results schema, one run.
        budget: Examples that it was to see.
        mean_input_loss: Loss of the mean input as the reconstruction of everything.

    Example:
        >>> rows = {"validation_loss": [8.0, 4.0, 2.0, 2.0], "loss": 1.0, "spikes": 0, "skipped": False, "at_limit": 0}
        >>> rows |= {"examples_seen": [1, 2, 3, 4], "global_batch": 1.0, "accumulation_steps": 1, "wall_seconds": 1.0}
        >>> found = outcome(pd.DataFrame(rows), budget=4, mean_input_loss=5.0)
        >>> found["final"], found["diverged"], found["updates"]
        (2.0, False, 4)
    """
    seen, n = table["examples_seen"], table["global_batch"]
    probe = table.dropna(subset="validation_loss")
    whole = bool(seen.iloc[-1] >= budget and np.isfinite(table["loss"]).all())
    losses = probe["validation_loss"].where(np.isfinite(probe["validation_loss"]))
    later = losses[probe["examples_seen"] > SPIKE_SKIP * budget]
    first = losses.iloc[0] if len(losses) else math.nan
    bound = np.maximum(DIVERGED_FACTOR * losses.cummin(), mean_input_loss)[later.index]
    lost = (later > first) | (later > bound)
    ending = losses[probe["examples_seen"] > (1 - LAST) * budget]
    trained = table[seen > (1 - LAST) * budget]
    return {
        "final": float(ending.mean()) if whole and len(ending) else math.inf,
        "best": float(losses.min()),
        "train_loss": float(np.average(trained["loss"], weights=trained["global_batch"])) if whole else math.inf,
        "diverged": not whole or bool(lost.mean() > DIVERGED_SHARE),
        "spikes": int(table["spikes"].sum()),
        "probe_spikes": int(probe_spikes(losses)[probe["examples_seen"] > SPIKE_SKIP * budget].sum()),
        "examples": float(seen.iloc[-1]),
        "updates": int((~table["skipped"]).sum()),
        "mean_batch": float(seen.iloc[-1] / len(table)),
        "last_batch": float(n.iloc[-len(n) // 10 - 1 :].mean()),
        "at_limit": float(table["at_limit"].mean()),
        "changes": int((table["accumulation_steps"].diff().fillna(0) != 0).sum()),
        "seconds": float(table["wall_seconds"].iloc[-1]),
    }


def probe_spikes(losses: pd.Series) -> pd.Series:
    """Which losses on the probe set are spikes: above 1.3 times the running median of the 20 before, or not finite."""
    median = losses.rolling(PROBE_WINDOW, min_periods=1).median().shift(1)
    return ~(losses <= PROBE_FACTOR * median) & median.notna()


def curve(table: pd.DataFrame) -> pd.DataFrame:
    """At most :data:`POINTS` evaluations; ``loss`` is the mean over the examples since the one before."""
    at = np.flatnonzero(table["validation_loss"].notna())
    at = at[np.unique(np.linspace(0, len(at) - 1, min(POINTS, len(at))).round().astype(int))] if len(at) else at
    weighted = (table["loss"] * table["global_batch"]).cumsum().to_numpy()[at]
    seen = table["global_batch"].cumsum().to_numpy()[at]
    rows = table.iloc[at][list(CURVE)].copy()
    rows["loss"] = np.diff(weighted, prepend=0.0) / np.diff(seen, prepend=0.0)
    with np.errstate(over="ignore"):
        return rows.astype(CURVE).reset_index(drop=True)


def schedule(table: pd.DataFrame) -> dict[str, list[int]]:
    """The accumulation steps as they followed each other: each ``k``, and how many windows it held.

    Example:
        >>> schedule(pd.DataFrame({"accumulation_steps": [2, 2, 3]}))
        {'k': [2, 3], 'windows': [2, 1]}
    """
    k = table["accumulation_steps"].to_numpy()
    starts = np.flatnonzero(np.diff(k, prepend=k[0] - 1))
    return {"k": k[starts].tolist(), "windows": np.diff(starts, append=len(k)).tolist()}


def recorded_steps(row: Mapping[str, Any]) -> np.ndarray:
    """The accumulation steps of every window of a finished run, from its row.

    Example:
        >>> recorded_steps({"schedule_k": [2, 3], "schedule_windows": [2, 1]}).tolist()
        [2, 2, 3]
    """
    return np.repeat(row["schedule_k"], row["schedule_windows"]).astype(int)


# What every run has, the beginnings of its settings, and what only some kinds have: labels have none of these names.
_OWN = {
    *("key", "seed", "adaptbatch", "final", "best", "train_loss", "test_loss", "diverged", "spikes", "probe_spikes"),
    *("examples", "updates", "mean_batch", "last_batch", "at_limit", "changes", "seconds"),
}
_SETTINGS, _OF_SOME = ("task_", "arm_", "on_", "schedule_"), ("auroc", "auprc")


def of_the_run(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a study's row says of its run itself: no label, and nothing that only other kinds of runs in it have.

    Example:
        >>> of_the_run({"key": "a", "network": "calm", "task_depth": math.nan, "task_width": 64, "final": math.nan})
        {'key': 'a', 'task_width': 64, 'final': nan}
    """
    return {
        name: value
        for name, value in row.items()
        if name in _OWN or (name.startswith((*_SETTINGS, *_OF_SOME)) and not _is_missing(value))
    }


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings, in columns: those of the task, and ``arm_`` those in which its arm is not plain."""
    task = {f"task_{name}": value for name, value in identity["task"].items()}
    arm = {f"arm_{name}": value for name, value in identity["arm"].items()}
    return task | arm | {"adaptbatch": identity.get("adaptbatch", "any")}
