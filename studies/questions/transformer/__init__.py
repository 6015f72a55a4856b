"""The origin's first example: a transformer, whose early gradients are said to be so noisy that it needs a warm-up.

A character language model (three layers of width 64, context 64; :mod:`studies.engine.language`) on a public-domain
text split by books, AdamW, a learning rate that warms up over a tenth of a million characters and decays linearly to
zero. Everything is counted in characters, which are the weights of the micro-batches too: 256 in each. Budgets of 1, 4
and 16 million. Fixed batches of 256 to 8,192, each at its own tuned rate: on three seeds of their own a grid of five
and the two beside its best (:class:`studies.engine.tuning.Search`). Longer budgets have the fixed batches of 1,024 to
8,192 and the arms of L2, at 4 million tuned from the best at 1 million (:func:`studies.engine.tuning.carried`): the
rates around it, shorter and longer warm-ups while they are better, and the rates beside at the best of these; at 16
million the best at 4 million. Reported: the loss on the test books at the end of training, on eight fresh seeds (16
million: three).

Arms and comparison are those of :mod:`studies.questions.live`: the *updates ratio* to the frontier of fixed batches at
equal examples and equal loss. No batch of an adaptive arm is tuned: it starts at two micro-batches, 512 characters, at
the rate that the grid gave a fixed 512, and its rate follows the root of its batch.

What changed after runs had been seen, in the frontier's favour: with the usual warm-up L1 had 0.61 (0.59 to 0.64) for
``theta 0.7, root``. But a rate that follows a growing batch warms up for longer, and a pilot (one tuning seed) of fixed
2048 found 1.76 with a warm-up over a tenth, 1.66 over three, 1.63 over five tenths. So fixed batches of 512 and
more are tuned with warm-ups over 30, 50 and 70 % as well, and take the best. Before any run at 4 million: fewer fixed
batches there (at 1 million the five give 1.06, 1.05 and 0.84 for the arms of L2, where all eight give 1.06, 1.04 and
0.84), the next shorter warm-up, and L2 of the tuned arm too, which gains most. The first tuning runs there found that
one better by 0.6 to 2 % for each of 1,024 to 4,096: what is best as a share falls with the budget. So, before any final
run, it goes on to shorter ones, a tenth among them, and the tuned arm is tuned again as fixed batches are.

Registered before its runs, after pilots of one or two seeds that are not among the results:

* L1 (primary): ``theta 0.7, root``, the same as V1's in :mod:`studies.questions.live`, has an updates ratio below 1, at
  1 and at 4 million characters, pre-LN. The same is asked of ``pareto 2048, root`` (four times the starting batch).
* L2: the ratio falls as the budget grows: that at 4 million over that at 1 million is below 1, for each of these two
  and for ``theta 0.7, root, tuned``. Intervals of the two budgets add in quadrature, in logarithms.
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

Plan, hours on one core: 1 million pre-LN and warm-up 8 (both have been run); 4 million 5.5, post-LN 2.5; 16 million 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

import adaptbatch as ab
from studies.engine.arms import Arm
from studies.engine.results import load
from studies.engine.runner import Run
from studies.engine.sweep import Found, Options, Study, from_runs
from studies.engine.tuning import Search, carried, planned
from studies.output.front_figure import figure_of
from studies.output.fronts import BEFORE, against_earlier, bootstrapped, claim_row, compare_tasks, feedback
from studies.output.opening import noisier, opening_noise, openings, warm_up
from studies.output.opening_figure import draw_openings
from studies.output.statistics import quotient
from studies.questions import live
from studies.questions.live import Method, Tuned
from studies.questions.transformer.setting import (
    LARGE,
    LARGE_SEEDS,
    MICRO_BATCH,
    MIDDLE,
    NAME,
    POST,
    SCALES,
    SMALL,
    START,
    WARMUP,
    Scale,
    Setting,
    adaptive_arm,
    best_of_all,
    fixed_run,
    labelled,
    ranked,
    searched,
    trials,
    tuned,
)

__all__ = ["SCALES", "SMALL", "START", "Scale", "Setting", "fixed_run", "ranked", "searched", "tuned"]
# At 4 and 16 million.
LONGER_BATCHES = (1024, 2048, 3072, 4096, 8192)
# Of an arm that is tuned, at the batch it starts from.
ARM_RATES = (4e-3, 5.66e-3)
PRICES = (4.0 * START, 32.0 * START)


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
TUNED = f"{live.PRIMARY}, tuned"
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
        _longer(MIDDLE, scale, seeds, found),
        _setting(POST, scale, seeds, found),
        _longer(LARGE, scale, seeds[:LARGE_SEEDS], found),
    ):
        runs += part
        if any(run not in found for run in runs):
            break
    return runs


def _setting(setting: Setting, scale: Scale, seeds: range, found: Found) -> Iterator[Run]:
    searches = {n: searched(setting, scale, n, found) for n in scale.batches}
    yield from planned(searches.values(), found)
    chosen = {n: best for n in searches if (best := tuned(setting, scale, n, found)) is not None}
    usual = {n: best for n, own in searches.items() if 0.0 in own and (best := best_of_all({0.0: own[0.0]}, found))}
    start = searched(setting, scale, START, found)[0.0].first(found)
    if start is not None and len(chosen) == len(searches):
        earlier = [(n, seed) for seed in seeds for n in usual if usual[n] != chosen[n]]
        yield from (live.restaged(fixed_run(setting, scale, n, usual[n], seed), BEFORE) for n, seed in earlier)
        arms = [adaptive_arm(method, setting, scale, start) for method in METHODS]
        yield from _reported(setting, scale, chosen, arms, seeds)


def _reported(
    setting: Setting, scale: Scale, chosen: dict[int, Tuned], arms: Sequence[Arm], seeds: range
) -> Iterator[Run]:
    # Seed by seed, so that what is finished can be compared.
    for seed in seeds:
        yield from (fixed_run(setting, scale, n, own, seed) for n, own in chosen.items())
        yield from (labelled("final", setting, scale, arm, seed) for arm in arms)


def _longer(setting: Setting, scale: Scale, seeds: range, found: Found) -> Iterator[Run]:
    """L2: a longer budget of fixed batches and of the arms it asks of, those that are tuned so at 4 million."""
    batches = [n for n in LONGER_BATCHES if n in scale.batches]
    own = best_of_all(_searches(SMALL, scale), found)
    searches = {n: searched(MIDDLE, scale, n, found) for n in batches}
    led = {} if own is None else carried(own, partial(_search, MIDDLE, scale), scale.longer_shares, found)
    yield from planned((*searches.values(), led), found)
    chosen = {n: best for n in batches if (best := tuned(MIDDLE, scale, n, found)) is not None}
    start, best = searched(SMALL, scale, START, found)[0.0].first(found), best_of_all(led, found)
    if len(chosen) == len(batches) and start is not None and best is not None:
        methods = [method for method in METHODS if method.label in PRIMARY]
        arms = [adaptive_arm(method, setting, scale, start) for method in methods]
        yield from _reported(setting, scale, chosen, [*arms, _tuned_arm(setting, scale, *best)], seeds)


def _controls(setting: Setting, scale: Scale, seeds: range, found: Found) -> Iterator[Run]:
    """L5: the primary arm's batches without its feedback, their mean, and ramps of their range."""
    start = searched(setting, scale, START, found)[0.0].first(found)
    if start is None:
        return
    led = next(adaptive_arm(method, setting, scale, start) for method in METHODS if method.label == live.PRIMARY)
    ramps = [
        Method(name, ab.Ramp(2, 32, float(setting.budget(scale)), shape), start=START) for name, shape in RAMPS.items()
    ]
    for seed in seeds:
        recorded = found.get(labelled("final", setting, scale, led, (seed - 1) % len(seeds)))
        arms = [*live.without_feedback(led, recorded, MICRO_BATCH)]
        arms += [adaptive_arm(ramp, setting, scale, start) for ramp in ramps]
        yield from (labelled("final", setting, scale, arm, seed) for arm in arms)


def _tuned(setting: Setting, scale: Scale, seeds: range, found: Found) -> Iterator[Run]:
    """L6: the primary arm, as much of it tuned as of a fixed batch."""
    searches = _searches(setting, scale)
    yield from planned([searches], found)
    if (best := best_of_all(searches, found)) is not None:
        yield from (labelled("final", setting, scale, _tuned_arm(setting, scale, *best), seed) for seed in seeds)


def _tuned_arm(setting: Setting, scale: Scale, lr: float, share: float) -> Arm:
    method = next(method for method in METHODS if method.label == live.PRIMARY)
    return replace(method.arm(lr, setting.schedule(scale, share=share), TUNED), optimizer="adamw", beta2=0.99)


def _searches(setting: Setting, scale: Scale) -> dict[float, Search]:
    """For the primary arm's rate, by the share of its warm-up."""
    return {
        share: replace(_search(setting, scale, share, ARM_RATES), refined=False) for share in (0.0, *scale.long_warmups)
    }


def _search(setting: Setting, scale: Scale, share: float, rates: tuple[float, ...]) -> Search:
    return Search(rates, lambda lr: trials(setting, scale, _tuned_arm(setting, scale, lr, share)))


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
            yield from (labelled("warm-up", setting, scale, arm, seed) for seed in range(3))


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
    """L1, L2, L4, L5 and L6."""
    rows: list[dict[str, object]] = []
    own = table[table["arm"].isin(PRIMARY)]
    for row in own.to_dict("records"):
        where = f"{row['order']}-LN, {row['millions']} million"
        for claim, name, bound in (("L1", "updates ratio", 1.0), ("L4", "loss ratio", 1.03)):
            said = f"{name} of {row['arm']} to the frontier is below {bound:g}"
            rows.append(claim_row(claim, said, where, bootstrapped(row, name), bound, row))
    for (order, millions), part in table.groupby(TASK, sort=False):
        own_tuned = part[part["arm"] == TUNED]
        for row in own_tuned.to_dict("records"):
            said = f"updates ratio of {row['arm']} to the frontier is below 1"
            rows.append(claim_row("L6", said, f"{order}-LN, {millions} million", bootstrapped(row, "updates ratio")))
        rows += feedback("L5", part.set_index("arm"), f"{order}-LN, {millions} million", live.PRIMARY, CONTROLS)
    for arm in (*PRIMARY, TUNED):
        for order, part in table[table["arm"] == arm].groupby("order"):
            by_budget = part.set_index("millions").sort_index()
            for small, large in zip(by_budget.index[:-1], by_budget.index[1:], strict=True):
                a, b = by_budget.loc[large], by_budget.loc[small]
                found = quotient(bootstrapped(a, "updates ratio"), bootstrapped(b, "updates ratio"))
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
