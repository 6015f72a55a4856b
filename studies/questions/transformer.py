"""The origin's first example: a transformer, whose early gradients are said to be so noisy that it needs a warm-up.

A character language model (three layers of width 64, context 64; :mod:`studies.engine.language`) on a public-domain
text split by books, AdamW, a learning rate that warms up over a tenth of a million characters and decays linearly to
zero. Everything is counted in characters, which are the weights of the micro-batches too: 256 in each. Budgets of 1, 4
and 16 million. Fixed batches of 256 to 8,192, each at its own tuned rate: on three seeds of their own a grid of five
and the two beside its best (:class:`studies.engine.tuning.Search`); at 4 million the best at 1 million and the two
beside it; at 16 million the best at 4 million. Reported: the loss on the test books at the end of training, on eight
fresh seeds (16 million: three).

Arms and comparison are those of :mod:`studies.questions.live`: the *updates ratio* to the frontier of fixed batches at
equal examples and equal loss. No batch of an adaptive arm is tuned: it starts at two micro-batches, 512 characters, at
the rate that the grid gave a fixed 512, and its rate follows the root of its batch.

Registered before its runs, after pilots of one or two seeds that are not among the results:

* L1 (primary): ``theta 0.7, root``, the same as V1's in :mod:`studies.questions.live`, has an updates ratio below 1, at
  1 and at 4 million characters, pre-LN. The same is asked of ``pareto 2048, root`` (four times the starting batch).
* L2: the ratio falls as the budget grows: that at 4 million over that at 1 million is below 1, for each of these two.
* L3: warm-up. (a) The relative noise ``B / n`` over the first 50,000 characters is larger for post-LN than for pre-LN
  at the same batch and rate (geometric means over the rates at which neither diverges, seed by seed). (b) Over a grid
  of seven rates (three seeds), without a learning-rate warm-up, on post-LN: a batch that is large for the first 100,000
  characters (4,096, then 512), and one that :class:`adaptbatch.StandardError` opens large, end at a mean loss within 1
  % of what the warm-up gives at its best rate, and do so over as many rates.
* L4: ``theta 0.7, root`` and ``pareto 2048, root`` are within 3 % of the loss that the frontier has at their updates.
* L5 (registered once four seeds of L1 had been seen, before a run of its own): it is feedback. The updates ratio of
  ``theta 0.7, root`` at 1 million is below that of its batches replayed on another seed, of the constant batch of the
  same mean, and of ramps, linear and exponential, from where it starts to where it ended on these four, 32
  micro-batches.

Plan, on one core: 1 million, pre-LN and post-LN, 1.5 hours each; 4 million pre-LN 5; warm-up 1; 16 million 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

import adaptbatch as ab
from studies.engine.arms import Arm, Decay, Schedule
from studies.engine.language import LanguageTask, Order
from studies.engine.runner import Run
from studies.engine.sweep import TUNING_SEEDS, Found, Options, Study, from_runs
from studies.engine.tuning import Search, beside
from studies.output.front_figure import figure_of
from studies.output.fronts import bootstrapped, claim_row, compare_tasks, feedback
from studies.output.statistics import Interval, ratio
from studies.questions import live
from studies.questions.live import Method

NAME = "transformer"
CONTEXT = 64
MICRO_BATCH = 4 * CONTEXT
START = 2 * MICRO_BATCH
PASS = 2048
WARMUP = 100_000.0
BATCHES = (256, 512, 1024, 1536, 2048, 3072, 4096, 8192)
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
# Three decades, for the role of the warm-up.
WIDE_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
PRICES = (4.0 * START, 32.0 * START)
# Of a budget of one million: the first 50,000 characters.
EARLY = 0.05


@dataclass(frozen=True)
class Scale:
    """Sizes of a preset."""

    million: int
    seeds: int
    width: int = 64
    layers: int = 3
    batches: tuple[int, ...] = BATCHES
    rates: tuple[float, ...] = RATES
    wide_rates: tuple[float, ...] = WIDE_RATES
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS


SCALES: dict[str, Scale] = {
    "smoke": Scale(5_000, 2, 16, 1, (512, 2048), (4e-3, 8e-3), (4e-3,), (1000,)),
    "laptop": Scale(1_000_000, 8),
    "paper": Scale(1_000_000, 20, width=384, layers=6),
}


@dataclass(frozen=True)
class Setting:
    """A model and a budget.

    Attributes:
        millions: Budget [million characters], of a preset's millions.
        order: Where the blocks are normalised.
    """

    millions: float
    order: Order = "pre"

    def budget(self, scale: Scale) -> int:
        """Characters."""
        return round(self.millions * scale.million)

    def task(self, scale: Scale, batch: int) -> LanguageTask:
        """What its arms share; ``batch`` characters a pass."""
        budget = self.budget(scale)
        return LanguageTask(
            "kjv",
            budget,
            batch // CONTEXT,
            CONTEXT,
            width=scale.width,
            layers=scale.layers,
            order=self.order,
            probe_every=budget // 40,
        )

    def schedule(self, scale: Scale, warmup: bool = True) -> Schedule:
        """Of the learning rate; the warm-up is a tenth of a million whatever the budget."""
        return Decay(self.budget(scale), WARMUP * scale.million / 1e6 if warmup else 0.0)


SMALL = Setting(1)
POST = Setting(1, "post")
LARGE = Setting(16)
LARGE_SEEDS = 3


def _both(name: str, rule: ab.rules.Rule) -> tuple[Method, Method]:
    return Method(name, rule, start=START), Method(name, rule, coupled=False, start=START)


METHODS: tuple[Method, ...] = (
    *_both("theta 0.7", ab.RelativeStandardError(0.7)),
    *_both("pareto 2048", ab.Pareto(PRICES[0])),
    *_both("theta 1", ab.RelativeStandardError(1.0)),
    Method("pareto 16384", ab.Pareto(PRICES[1]), start=START),
)
PRIMARY = (live.PRIMARY, "pareto 2048, root")
RAMPS = {f"{shape} ramp": shape for shape in ("linear", "exponential")}
CONTROLS = ("replay", "constant mean", *(f"{name}, root" for name in RAMPS))


def plan(options: Options, found: Found) -> list[Run]:
    """The smallest budget, the role of the warm-up, then budget by budget."""
    scale = SCALES[options.preset]
    seeds = range(options.seeds or scale.seeds)
    if options.preset == "smoke":
        parts = _setting(POST, scale, seeds, found), _controls(POST, scale, seeds, found), _warming(POST, scale)
        return [run for part in parts for run in part]
    runs: list[Run] = []
    for part in (
        _setting(SMALL, scale, seeds, found),
        _controls(SMALL, scale, seeds, found),
        _warming(POST, scale),
        _warming(SMALL, scale),
        _setting(Setting(4), scale, seeds, found),
        _setting(POST, scale, seeds, found),
        _largest(scale, seeds[:LARGE_SEEDS], found),
    ):
        runs += part
        if any(run not in found for run in runs):
            break
    return runs


def _setting(setting: Setting, scale: Scale, seeds: range, found: Found) -> Iterator[Run]:
    searches = {n: search(setting, scale, n, found) for n in scale.batches}
    for each in searches.values():
        yield from each.planned(found)
    rates = {n: rate for n, each in searches.items() if (rate := each.best(found)) is not None}
    start = searches[START].first(found)
    if start is not None and len(rates) == len(searches):
        yield from _reported(setting, scale, rates, start, seeds)


def _reported(setting: Setting, scale: Scale, rates: dict[int, float], start: float, seeds: range) -> Iterator[Run]:
    # Seed by seed, so that what is finished can be compared.
    for seed in seeds:
        yield from (fixed_run(setting, scale, n, lr, seed) for n, lr in rates.items())
        for method in METHODS:
            yield _run("final", setting, scale, _arm(method, setting, scale, start), seed)


def _arm(method: Method, setting: Setting, scale: Scale, lr: float) -> Arm:
    return replace(method.arm(lr, setting.schedule(scale)), optimizer="adamw", beta2=0.99)


def _controls(setting: Setting, scale: Scale, seeds: range, found: Found) -> Iterator[Run]:
    """L5: the primary arm's batches without its feedback, their mean, and ramps of their range."""
    start = search(setting, scale, START, found).first(found)
    if start is None:
        return
    led = next(_arm(method, setting, scale, start) for method in METHODS if method.label == live.PRIMARY)
    ramps = [
        Method(name, ab.Ramp(2, 32, float(setting.budget(scale)), shape), start=START) for name, shape in RAMPS.items()
    ]
    for seed in seeds:
        recorded = found.get(_run("final", setting, scale, led, (seed - 1) % len(seeds)))
        arms = [*live.without_feedback(led, recorded, MICRO_BATCH), *(_arm(r, setting, scale, start) for r in ramps)]
        yield from (_run("final", setting, scale, arm, seed) for arm in arms)


def fixed_run(setting: Setting, scale: Scale, n: int, lr: float, seed: int) -> Run:
    """A reported run of a fixed batch."""
    return _run("final", setting, scale, _fixed(setting, scale, n, lr), seed, n)


def search(setting: Setting, scale: Scale, n: int, found: Found) -> Search:
    """A grid at one million; the best of it and those beside it for longer budgets; none while that is not known."""

    def runs(lr: float) -> list[Run]:
        arm = _fixed(setting, scale, n, lr)
        return [_run("tune", setting, scale, arm, seed, n) for seed in scale.tuning_seeds]

    if setting.millions == 1:
        return Search(scale.rates, runs)
    best = search(SMALL, scale, n, found).best(found)
    return Search(() if best is None else (best, *beside(best)), runs, refined=False)


def _fixed(setting: Setting, scale: Scale, n: int, lr: float) -> Arm:
    """A fixed batch in passes of at most :data:`PASS` characters."""
    rule = ab.Fixed(math.ceil(n / PASS))
    return Arm(f"fixed {n}", rule, lr, setting.schedule(scale), optimizer="adamw", beta2=0.99)


def _run(stage: str, setting: Setting, scale: Scale, arm: Arm, seed: int, batch: int = 0) -> Run:
    """A run with its labels; ``batch`` is that of a fixed batch."""
    task = setting.task(scale, batch // math.ceil(batch / PASS) if batch else MICRO_BATCH)
    labels = {"stage": stage, "order": setting.order, "millions": setting.millions}
    labels |= {"method": arm.name, "lr": arm.lr, "fixed": int(batch > 0)}
    return Run(NAME, task, arm, seed, tuple(labels.items()))


def _warming(setting: Setting, scale: Scale) -> Iterator[Run]:
    """L3: what opens gently, over three decades of rates: the rate, the batch by the clock or by measurement."""
    small, large = ab.Fixed(START // MICRO_BATCH), 4096 // MICRO_BATCH
    opening = ab.Schedule((0.0, WARMUP * scale.million / 1e6), (large, START // MICRO_BATCH))
    ways: dict[str, Callable[[float], Arm]] = {
        "rate warm-up": lambda lr: Arm("", small, lr, setting.schedule(scale)),
        "none": lambda lr: Arm("", small, lr, setting.schedule(scale, warmup=False)),
        "large batch first": lambda lr: Arm("", opening, lr, setting.schedule(scale, warmup=False)),
        "standard error": lambda lr: Arm(
            "", ab.StandardError(reference_batch=START), lr, setting.schedule(scale, warmup=False), max_steps=large
        ),
    }
    for name, make in ways.items():
        for lr in scale.wide_rates:
            arm = replace(make(lr), name=name, optimizer="adamw", beta2=0.99)
            yield from (_run("warm-up", setting, scale, arm, seed) for seed in range(3))


def _largest(scale: Scale, seeds: range, found: Found) -> Iterator[Run]:
    searches = {n: search(Setting(4), scale, n, found) for n in scale.batches[1:]}
    rates = {n: rate for n, each in searches.items() if (rate := each.best(found)) is not None}
    if len(rates) < len(searches):
        return
    for run in _reported(LARGE, scale, rates, rates[START], seeds):
        if dict(run.labels)["fixed"] or run.arm.name in PRIMARY:
            yield run


TASK = ["order", "millions"]


def tables(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The arms against the frontier of each budget, the role of the warm-up, the claims."""
    final, warming = runs[runs["stage"] == "final"], runs[runs["stage"] == "warm-up"]
    found: dict[str, pd.DataFrame] = {}
    compared = compare_tasks(final, TASK, against=live.PRIMARY)
    if len(compared):
        found["arms"] = compared
    if len(warming):
        found["opening"] = opening_noise(warming, curves)
        found["warm-up"] = warm_up(warming)
    rows = claims(compared) if len(compared) else []
    if len(warming):
        rows += noisier(found["opening"]) + openings(found["warm-up"])
    if rows:
        found["claims"] = pd.DataFrame(rows)
    return found


def claims(table: pd.DataFrame) -> list[dict[str, object]]:
    """L1, L2, L4 and L5."""
    rows: list[dict[str, object]] = []
    own = table[table["arm"].isin(PRIMARY)]
    for row in own.to_dict("records"):
        where = f"{row['order']}-LN, {row['millions']} million"
        for claim, name, bound in (("L1", "updates ratio", 1.0), ("L4", "loss ratio", 1.03)):
            said = f"{name} of {row['arm']} to the frontier is below {bound:g}"
            rows.append(claim_row(claim, said, where, bootstrapped(row, name), bound, row))
    for (order, millions), part in table.groupby(TASK, sort=False):
        rows += feedback("L5", part.set_index("arm"), f"{order}-LN, {millions} million", live.PRIMARY, CONTROLS)
    for arm in PRIMARY:
        for order, part in own[own["arm"] == arm].groupby("order"):
            by_budget = part.set_index("millions").sort_index()
            for small, large in zip(by_budget.index[:-1], by_budget.index[1:], strict=True):
                a, b = by_budget.loc[large], by_budget.loc[small]
                found = Interval(
                    a["updates ratio"] / b["updates ratio"],
                    a["updates ratio low"] / b["updates ratio high"],
                    a["updates ratio high"] / b["updates ratio low"],
                    "bootstrap",
                )
                said = f"updates ratio of {arm} at {large} million over that at {small} million is below 1"
                rows.append(claim_row("L2", said, f"{order}-LN", found, arm=a))
    return rows


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


STUDY = Study(
    NAME,
    "the same on a character language model, by budget, and the role of the warm-up",
    plan,
    from_runs(tables),
    figures=figure_of(from_runs(tables), TASK),
    order=4,
)
