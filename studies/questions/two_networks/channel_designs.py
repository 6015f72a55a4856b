"""What other statistics would have said: the designs that were weighed against the typical and the tail channel.

All are computed from the committed rows of fixed arms, whose batch no rule moved; ``n`` is that batch, ``theta`` 1.

=====================  ===========================================================================================
pooled B               ratio of sums, ``sum S_t / sum g_t``: what the plain rule decides on
typical B              the typical channel's, at the end of the run (:mod:`adaptbatch.estimate.typical`)
median of means B      ratio of the medians of 30 block means of ``S_t`` and ``g_t``
self-normalised t      Student's t of ``D_t / (|S_t| / n + |g_t|)``, ``D_t = S_t / n - g_t``: above 2.33 asks for growth
top 5 % share          of ``sum S_t``, held by the largest twentieth of the windows
tail index             Hill's, of the largest twentieth of ``S_t``: below 1 the sum is its largest term, below 2 the
                       variance of the mean is not finite
above 1e2, above 1e4   windows whose ``Q / n`` is that many times the median of those before it: does the tail foretell?
lead                   examples from the first window above 1e2 to the first spike; NaN where there is none of them
=====================  ===========================================================================================
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float64]
BLOCKS, TOP = 30, 0.05
# The first tenth of training is another process.
SKIP = 0.1


def designs(results: pd.DataFrame) -> pd.DataFrame:
    """Medians over seeds of every statistic, a row for each fixed arm."""
    rows = [
        {"arm": arm, "seed": seed} | statistics(run) | foretold(run)
        for (arm, seed), run in results.groupby(["arm", "seed"], sort=False)
        if str(arm).startswith("fixed")
    ]
    table = pd.DataFrame(rows).groupby("arm", sort=False).median(numeric_only=True)
    return table.drop(columns="seed").reset_index()


def statistics(run: pd.DataFrame) -> dict[str, float]:
    """Every statistic of one run's noise; all NaN for windows of one micro-batch, which hold none."""
    kept = run[run["examples_seen"] > SKIP * run["examples_seen"].iloc[-1]].dropna(subset="noise_trace")
    trace, signal = kept["noise_trace"].to_numpy(), kept["grad_sq_norm"].to_numpy()
    if len(kept) <= BLOCKS:
        names = ("pooled B", "typical B", "median of means B", "self-normalised t", "top 5 % share", "tail index")
        return dict.fromkeys(names, math.nan)
    n = float(kept["global_batch"].median())
    contrast = (trace / n - signal) / (np.abs(trace) / n + np.abs(signal))
    return {
        "pooled B": _ratio(trace.sum(), signal.sum()),
        "typical B": float(kept["noise_scale_typical"].iloc[-1]),
        "median of means B": _ratio(_median_of_means(trace), _median_of_means(signal)),
        "self-normalised t": float(contrast.mean() / (contrast.std(ddof=1) / math.sqrt(len(contrast)))),
        "top 5 % share": float(np.sort(trace)[-_top(trace) :].sum() / trace.sum()),
        "tail index": hill(trace),
    }


def foretold(run: pd.DataFrame) -> dict[str, float]:
    """What stood out of one run, and its spikes."""
    spikes, above = run["spikes"] > 0, run["tail_excess"] > 1e2
    known = spikes.any() and above.any()
    lead = run["examples_seen"][spikes].iloc[0] - run["examples_seen"][above].iloc[0] if known else math.nan
    return {
        "above 1e2": float(above.sum()),
        "above 1e4": float((run["tail_excess"] > 1e4).sum()),
        "lead": float(lead),
        "spikes": float(run["spikes"].sum()),
    }


def hill(values: Array) -> float:
    """Hill's estimator of the tail index ``a`` of ``P(X > x) ~ x^-a``, from the largest twentieth.

    Source:
        Hill 1975, Ann. Statist. 3:1163.

    Example:
        >>> from scipy import stats
        >>> draws = stats.pareto(1.5).rvs(20_000, random_state=0)
        >>> round(hill(draws), 1)
        1.5
    """
    ordered = np.sort(values)[::-1]
    top = _top(values)
    return float(1.0 / np.mean(np.log(ordered[:top] / ordered[top])))


def _median_of_means(values: Array) -> float:
    return float(np.median([block.mean() for block in np.array_split(values, BLOCKS)]))


def _top(values: Array) -> int:
    return max(1, int(TOP * len(values)))


def _ratio(trace: float, signal: float) -> float:
    return trace / signal if signal > 0.0 else math.inf
