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

What changed after runs had been seen, in the frontier's favour: with the usual warm-up L1 had 0.61 (0.59 to 0.64) for
``theta 0.7, root``. But a rate that follows a growing batch warms up for longer, and a pilot (one tuning seed) of fixed
2048 found 1.76 with a warm-up over a tenth, 1.66 over three, 1.63 over five tenths. So fixed batches of 512 and
more are tuned with warm-ups over 30, 50 and 70 % as well, and take the best.

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
* L6 (registered with the longer warm-ups, before its runs): with its rate and its warm-up tuned (8 trials, where a
  fixed batch has 16) ``theta 0.7, root, tuned`` has an updates ratio below 1.

Plan, hours on one core: 1 million pre-LN 1.5 and warm-up 1 (both have been run), post-LN 1.5; 4 million 5; 16 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd

import adaptbatch as ab
from studies.engine.arms import Arm, Decay, Schedule
from studies.engine.language import LanguageTask, Order
from studies.engine.results import load
from studies.engine.runner import Run
from studies.engine.sweep import TUNING_SEEDS, Found, Options, Study, from_runs
from studies.engine.tuning import Search, beside, together
from studies.output.front_figure import figure_of
from studies.output.fronts import BEFORE, against_earlier, bootstrapped, claim_row, compare_tasks, feedback
from studies.output.opening import noisier, opening_noise, openings, warm_up
from studies.output.opening_figure import draw_openings
from studies.output.statistics import Interval
from studies.questions import live
from studies.questions.live import Method, Tuned

NAME = "transformer"
CONTEXT = 64
MICRO_BATCH = 4 * CONTEXT
START = 2 * MICRO_BATCH
PASS = 2048
WARMUP = 100_000.0
BATCHES = (256, 512, 1024, 1536, 2048, 3072, 4096, 8192)
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
# Shares of the budget that a fixed batch may warm up over beside the usual tenth, and for which batches and rates.
LONG_WARMUPS = (0.3, 0.5, 0.7)
LONG_BATCHES = BATCHES[1:]
LONG_RATES = (5.66e-3, 8e-3)
# Of an arm that is tuned, at the batch it starts from.
ARM_RATES = (4e-3, 5.66e-3)
# Three decades, for the role of the warm-up.
WIDE_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
PRICES = (4.0 * START, 32.0 * START)


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
    long_warmups: tuple[float, ...] = LONG_WARMUPS


SCALES: dict[str, Scale] = {
    "smoke": Scale(5_000, 2, 16, 1, (512, 2048), (4e-3, 8e-3), (4e-3,), (1000,), ()),
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

    def schedule(self, scale: Scale, warmup: bool = True, share: float = 0.0) -> Schedule:
        """Of the learning rate; the warm-up is a tenth of a million whatever the budget, or a ``share`` of it."""
        usual = WARMUP * scale.million / 1e6 if warmup else 0.0
        return Decay(self.budget(scale), share * self.budget(scale) or usual)


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
        _tuned(SMALL, scale, seeds, found),
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
    searches = {n: searched(setting, scale, n, found) for n in scale.batches}
    for own in searches.values():
        for each in own.values():
            yield from each.planned(found)
    chosen = {n: best for n in searches if (best := tuned(setting, scale, n, found)) is not None}
    usual = {n: best for n, own in searches.items() if 0.0 in own and (best := _best({0.0: own[0.0]}, found))}
    start = searched(replace(setting, millions=1), scale, START, found)[0.0].first(found)
    if start is not None and len(chosen) == len(searches):
        earlier = [(n, seed) for seed in seeds for n in usual if usual[n] != chosen[n]]
        yield from (live.restaged(fixed_run(setting, scale, n, usual[n], seed), BEFORE) for n, seed in earlier)
        yield from _reported(setting, scale, chosen, start, seeds)


def _reported(setting: Setting, scale: Scale, chosen: dict[int, Tuned], start: float, seeds: range) -> Iterator[Run]:
    # Seed by seed, so that what is finished can be compared.
    for seed in seeds:
        yield from (fixed_run(setting, scale, n, own, seed) for n, own in chosen.items())
        for method in METHODS:
            yield _run("final", setting, scale, _arm(method, setting, scale, start), seed)


def _arm(method: Method, setting: Setting, scale: Scale, lr: float) -> Arm:
    return replace(method.arm(lr, setting.schedule(scale)), optimizer="adamw", beta2=0.99)


def _controls(setting: Setting, scale: Scale, seeds: range, found: Found) -> Iterator[Run]:
    """L5: the primary arm's batches without its feedback, their mean, and ramps of their range."""
    start = searched(setting, scale, START, found)[0.0].first(found)
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


def _tuned(setting: Setting, scale: Scale, seeds: range, found: Found) -> Iterator[Run]:
    """L6: the primary arm, as much of it tuned as of a fixed batch."""
    method = next(method for method in METHODS if method.label == live.PRIMARY)

    def run(stage: str, lr: float, share: float, seed: int) -> Run:
        schedule = setting.schedule(scale, share=share)
        arm = replace(method.arm(lr, schedule, f"{method.label}, tuned"), optimizer="adamw", beta2=0.99)
        return _run(stage, setting, scale, arm, seed)

    def runs(lr: float, share: float) -> list[Run]:
        return [run("tune", lr, share, seed) for seed in scale.tuning_seeds]

    shares = (0.0, *scale.long_warmups)
    searches = {share: Search(ARM_RATES, partial(runs, share=share), refined=False) for share in shares}
    for search in searches.values():
        yield from search.planned(found)
    if (best := _best(searches, found)) is not None:
        yield from (run("final", *best, seed) for seed in seeds)


def fixed_run(setting: Setting, scale: Scale, n: int, own: Tuned, seed: int) -> Run:
    """A reported run of a fixed batch, of its rate and the share of its warm-up, 0 for the usual one."""
    return _run("final", setting, scale, _fixed(setting, scale, n, *own), seed, n)


def searched(setting: Setting, scale: Scale, n: int, found: Found) -> dict[float, Search]:
    """For the rate of a fixed batch, by the share of its warm-up, 0 for the usual one.

    At one million a grid, and longer warm-ups for some batches; for longer budgets the best of these and the rates
    beside it, none while that is not known.
    """

    def runs(lr: float, share: float) -> list[Run]:
        arm = _fixed(setting, scale, n, lr, share)
        return [_run("tune", setting, scale, arm, seed, n) for seed in scale.tuning_seeds]

    if setting.millions != 1:
        best = tuned(SMALL, scale, n, found)
        lr, share = (0.0, 0.0) if best is None else best
        return {share: Search((lr, *beside(lr)) if lr else (), partial(runs, share=share), refined=False)}
    longer = scale.long_warmups if n in LONG_BATCHES and setting == SMALL else ()
    return {0.0: Search(scale.rates, partial(runs, share=0.0))} | {
        share: Search(LONG_RATES, partial(runs, share=share)) for share in longer
    }


def tuned(setting: Setting, scale: Scale, n: int, found: Found) -> Tuned | None:
    """A fixed batch's best rate and share on the tuning seeds; None before all are finished."""
    return next(iter(ranked(setting, scale, n, found)), None)


def ranked(setting: Setting, scale: Scale, n: int, found: Found) -> list[Tuned]:
    """All that was tried for a fixed batch, the best first; empty before all are finished."""
    return list(together(searched(setting, scale, n, found), found))


def _best(searches: dict[float, Search], found: Found) -> Tuned | None:
    return next(iter(together(searches, found)), None)


def _fixed(setting: Setting, scale: Scale, n: int, lr: float, share: float) -> Arm:
    """A fixed batch in passes of at most :data:`PASS` characters."""
    rule, schedule = ab.Fixed(math.ceil(n / PASS)), setting.schedule(scale, share=share)
    return Arm(f"fixed {n}", rule, lr, schedule, optimizer="adamw", beta2=0.99)


def _run(stage: str, setting: Setting, scale: Scale, arm: Arm, seed: int, batch: int = 0) -> Run:
    """A run with its labels; ``batch`` is that of a fixed batch."""
    task = setting.task(scale, batch // math.ceil(batch / PASS) if batch else MICRO_BATCH)
    labels = {"stage": stage, "order": setting.order, "millions": setting.millions}
    labels |= {"method": arm.name, "lr": arm.lr, "fixed": int(batch > 0)}
    labels["warmup"] = getattr(arm.schedule, "warmup", 0.0) / setting.budget(scale)
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
    chosen = {n: best for n in scale.batches[1:] if (best := tuned(Setting(4), scale, n, found)) is not None}
    if len(chosen) < len(scale.batches) - 1:
        return
    for run in _reported(LARGE, scale, chosen, chosen[START][0], seeds):
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
    if len(before := runs[runs["stage"] == BEFORE]):
        found["before"] = against_earlier(final, before, TASK)
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
        own_tuned = part[part["arm"] == f"{live.PRIMARY}, tuned"]
        for row in own_tuned.to_dict("records"):
            said = f"updates ratio of {row['arm']} to the frontier is below 1"
            rows.append(claim_row("L6", said, f"{order}-LN, {millions} million", bootstrapped(row, "updates ratio")))
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


def draw(folder: Path) -> None:
    """Loss against updates by budget; and where runs end by how they open."""
    figure_of(from_runs(tables), TASK, "{}-LN, {:g} million characters")(folder)
    runs = load(folder.name, folder=folder.parent)
    if len(warming := runs[runs["stage"] == "warm-up"]):
        draw_openings(warming, "{}-LN", folder)


STUDY = Study(
    NAME,
    "the same on a character language model, by budget, and the role of the warm-up",
    plan,
    from_runs(tables),
    figures=draw,
    order=4,
)
