"""What many runs say together: means with intervals, paired ratios, corrected tests. Neither torch nor adaptbatch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import special, stats
from statsmodels.stats.multitest import multipletests

Verdict = Literal["supported", "not supported", "undecided"]
LEVEL = 0.95
RESAMPLES = 5_000
TARGET_SLACK, TARGET_MEAN = 1.05, 5
SPENT = {"examples_seen": "examples", "optimizer_step": "updates", "wall_seconds": "seconds"}


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; NaN bounds where there is one value only.

    ``kind`` says how it was made: ``t``, ``bootstrap``, ``Wilson``, ``Newcombe``, or the ``range`` of all values, which
    holds the median of five with 94 %, of two with 50 %; ``one seed`` has none.
    """

    value: float
    low: float
    high: float
    kind: str = "t"

    def below(self, bound: float) -> Verdict:
        """Whether what is estimated is below ``bound``, as far as the interval tells."""
        if self.high < bound:
            return "supported"
        return "not supported" if self.low >= bound else "undecided"

    def within(self, low: float, high: float) -> Verdict:
        """Whether what is estimated lies between two bounds, as far as the interval tells."""
        if low < self.low and self.high < high:
            return "supported"
        return "not supported" if self.high <= low or self.low >= high else "undecided"


def quotient(above: Interval, below: Interval) -> Interval:
    """One estimate over another that is independent of it, both positive: log half-widths add in quadrature.

    Each side of the interval has its own: ``log(high / value)`` of the one above and ``log(value / low)`` of the one
    below, and the other way round. Where the estimate above is infinite the bounds are those of the two bounds.

    Example:
        >>> found = quotient(Interval(2.0, 1.0, 4.0), Interval(1.0, 1.0, 1.0))
        >>> found.value, found.low, found.high
        (2.0, 1.0, 4.0)
    """
    with np.errstate(all="ignore"):
        a, b = (np.log([each.low, each.value, each.high]) for each in (above, below))
        down, up = np.hypot(a[1] - a[0], b[2] - b[1]), np.hypot(a[2] - a[1], b[1] - b[0])
        bounds = a[1] - b[1] + np.array([-down, 0.0, up])
        low, value, high = np.exp(np.where(np.isnan(bounds), a - b[::-1], bounds))
    return Interval(float(value), float(low), float(high), above.kind)


def iqm(strata: Sequence[np.ndarray]) -> Interval:
    """Interquartile mean over all values, with a bootstrap interval that resamples within each stratum.

    The mean of the middle half: robust as the median, less noisy (Agarwal et al. 2021, arXiv:2108.13264).

    Args:
        strata: The seeds' values of each task.

    Example:
        >>> iqm([np.array([1.0, 2.0, 3.0, 100.0])]).value
        2.5
    """

    def statistic(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis))

    value = float(statistic(*strata))
    if any(len(stratum) < 2 for stratum in strata):
        return Interval(value, math.nan, math.nan)
    with warnings.catch_warnings():
        # Infinite values and equal ones have degenerate resamples, which percentiles bear.
        warnings.simplefilter("ignore")
        found = stats.bootstrap(
            tuple(strata),
            statistic,
            vectorized=True,
            paired=False,
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
    return Interval(value, float(found.low), float(found.high), "bootstrap")


def ratio(ours: np.ndarray, theirs: np.ndarray) -> tuple[Interval, float]:
    """Geometric mean of ``ours / theirs`` over paired seeds, its t interval, and the p of a ratio of 1.

    Where a value is infinite (a target that was not reached, a run that broke off) there is no mean: the ratio is the
    median of the pairs, with two infinite ones equal, its bounds are the extremes, and p is of the sign test.

    Args:
        ours, theirs: Positive, one for each seed, in the same order.

    Example:
        >>> found, p = ratio(np.array([2.0, 4.0, 8.0]), np.array([1.0, 2.0, 4.0]))
        >>> round(found.value, 6), round(found.low, 6)
        (2.0, 2.0)
    """
    with np.errstate(invalid="ignore"):
        logs = np.log(ours) - np.log(theirs)
    logs = np.where(np.isinf(ours) & np.isinf(theirs), 0.0, logs)
    if not np.isfinite(logs).all():
        wins, losses = int((logs < 0).sum()), int((logs > 0).sum())
        p = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
        with np.errstate(over="ignore", invalid="ignore"):
            return Interval(*(float(np.exp(x)) for x in (np.median(logs), logs.min(), logs.max())), "range"), p
    mean = float(logs.mean())
    if len(logs) < 2:
        return Interval(math.exp(mean), math.nan, math.nan, "one seed"), math.nan
    if np.ptp(logs) < 1e-12:
        return Interval(*[math.exp(mean)] * 3), float(abs(mean) < 1e-12)
    test = stats.ttest_1samp(logs, 0.0)
    bounds = test.confidence_interval(LEVEL)
    return Interval(math.exp(mean), math.exp(bounds.low), math.exp(bounds.high)), float(test.pvalue)


def expected_best(values: np.ndarray, draws: int) -> float:
    """What the best of so many trials gives on average: the mean smallest of ``draws`` values, all subsets alike.

    ``sum_k x_(k) C(B - k, m - 1) / C(B, m)`` for ``m`` of ``B`` trials in ascending order: the curve of Dodge et al.
    2019 (arXiv:1909.03004), drawn without replacement, which makes it unbiased (Tang et al. 2020, arXiv:2004.13705).

    Args:
        values: Loss of each trial.
        draws: From one to the number of trials.

    Example:
        >>> expected_best(np.array([3.0, 1.0, 2.0]), 2)
        1.3333333333333333
    """
    if not 1 <= draws <= len(values):
        raise ValueError(f"draws must be from 1 to the number of values ({len(values)}), got {draws}.")
    left = len(values) - np.arange(1, len(values) + 1)
    return float(np.sort(values) @ special.comb(left, draws - 1) / special.comb(len(values), draws))


def holm(p: pd.Series) -> pd.Series:
    """The p values corrected for their number; NaN stays.

    Example:
        >>> holm(pd.Series([0.01, 0.04, float("nan")])).round(3).tolist()
        [0.02, 0.04, nan]
    """
    known = p.notna()
    corrected = pd.Series(math.nan, index=p.index, dtype=float)
    if known.any():
        corrected[known] = multipletests(p[known].to_numpy(), method="holm")[1]
    return corrected


def of_seeds(values: np.ndarray, statistic: Callable[[np.ndarray], float]) -> Interval:
    """A statistic of ``[seeds, arms]`` with a bootstrap interval: seeds are drawn again for all arms alike.

    A resample in which it is not a number (a ratio to nothing) is left out.

    Example:
        >>> found = of_seeds(np.array([[1.0, 2.0], [3.0, 6.0]]), lambda rows: rows[:, 0].sum() / rows[:, 1].sum())
        >>> found.value, found.low, found.high
        (0.5, 0.5, 0.5)
    """
    rng = np.random.default_rng(0)
    drawn = np.array([statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(RESAMPLES)])
    known = drawn[~np.isnan(drawn)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
    return Interval(float(statistic(values)), float(low), float(high), "bootstrap")


def trend(values: np.ndarray) -> float:
    """Kendall's tau-a of ``[seeds, arms]`` with the order of the arms, averaged over seeds: -1 if all of them fall.

    A tie counts as neither, so that a seed on which no arm does anything says nothing.

    Example:
        >>> trend(np.array([[9.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        -0.3333333333333333
    """
    first, second = np.triu_indices(values.shape[1], 1)
    return float(np.sign(values[:, second] - values[:, first]).mean())


def share(successes: int, count: int) -> Interval:
    """A share with its Wilson interval."""
    bounds = stats.binomtest(successes, count).proportion_ci(LEVEL, method="wilson")
    return Interval(successes / count, float(bounds.low), float(bounds.high), "Wilson")


def scatter(values: pd.Series) -> Interval:
    """``exp`` of the standard deviation of logarithms, with its chi-squared interval.

    Example:
        >>> scatter(pd.Series([1.0, 1.0, 1.0])).value
        1.0
    """
    logs = np.log(values[(values > 0.0) & np.isfinite(values)].to_numpy(float))
    if len(logs) < 2:
        return Interval(math.nan, math.nan, math.nan, "one value")
    degrees = len(logs) - 1
    sd = float(logs.std(ddof=1))
    low, high = (sd * math.sqrt(degrees / stats.chi2.ppf(p, degrees)) for p in (0.975, 0.025))
    return Interval(math.exp(sd), math.exp(low), math.exp(min(high, 700.0)), "chi-squared")


def to_target(curve: pd.DataFrame, target: float) -> pd.Series:
    """What a run had spent when the mean of its last five evaluations was first at or below ``target``.

    Args:
        curve: Evaluations of one run, in order.
        target: Loss on the probe set.

    Returns:
        ``examples``, ``updates`` and ``seconds``; infinite if it never was.

    Example:
        >>> rows = pd.DataFrame({"validation_loss": [9.0, 5.0, 1.0], "examples_seen": [1.0, 2.0, 3.0]})
        >>> float(to_target(rows.assign(optimizer_step=rows.index, wall_seconds=0.0), 5.0)["examples"])
        3.0
    """
    curve = evenly(curve)
    smooth = curve["validation_loss"].rolling(TARGET_MEAN, min_periods=1).mean()
    reached = np.flatnonzero(smooth <= target)
    if not len(reached):
        return pd.Series(dict.fromkeys(SPENT.values(), math.inf))
    return curve.iloc[reached[0]][list(SPENT)].astype(float).rename(SPENT)


def first_crossing(curve: pd.DataFrame, target: float) -> pd.Series:
    """What a run had spent when its loss first crossed ``target``, for targets that are met within a few evaluations.

    On the line through the logarithms of the loss before and after; the first evaluation is after the first update.

    Args, Returns:
        As :func:`to_target`.

    Example:
        >>> rows = pd.DataFrame({"validation_loss": [16.0, 4.0, 1.0], "examples_seen": [1.0, 2.0, 3.0]})
        >>> float(first_crossing(rows.assign(optimizer_step=rows.index, wall_seconds=0.0), 2.0)["examples"])
        2.5
    """
    curve = evenly(curve)
    losses, spent = curve["validation_loss"].to_numpy(float), curve[list(SPENT)].to_numpy(float)
    reached = np.flatnonzero(losses <= target)
    if not len(reached):
        return pd.Series(dict.fromkeys(SPENT.values(), math.inf))
    after = int(reached[0])
    before = max(after - 1, 0)
    fall = math.log(losses[before] / losses[after])
    share = math.log(losses[before] / target) / fall if fall > 0.0 and math.isfinite(losses[before]) else 1.0
    return pd.Series(dict(zip(SPENT.values(), spent[before] + share * (spent[after] - spent[before]), strict=True)))


def evenly(curve: pd.DataFrame) -> pd.DataFrame:
    """Evaluations at least half of their usual distance apart: two that came close count once.

    Example:
        >>> evenly(pd.DataFrame({"examples_seen": [1.0, 10.0, 11.0, 20.0, 29.0]}))["examples_seen"].tolist()
        [1.0, 10.0, 20.0, 29.0]
    """
    seen = curve["examples_seen"].to_numpy(float)
    usual = np.median(np.diff(seen)) if len(seen) > 1 else 0.0
    kept, last = [], -math.inf
    for index, at in enumerate(seen):
        if at - last >= 0.5 * usual:
            kept.append(index)
            last = at
    return curve.iloc[kept]
