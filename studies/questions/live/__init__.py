"""The main study, with a controller that acts: how many updates does it save at equal examples and equal loss?

In :mod:`studies.questions.comparison` the micro-batch was 64 and the noise scale 50 to 130 examples, so that the rule
stood at its smallest window. Here the micro-batch is 16, and a closed-loop run counts as *live* only if its ``k``
changed and fewer than half of its windows stood at a limit; how many did not is reported beside every ratio.

All runs of a task see 128,000 examples. An arm is compared with the frontier of the fixed batches 16 to 1024, each with
its own tuned rate (:mod:`studies.output.fronts`): the ratio of its updates to those that a fixed batch needs for the
same loss. The loss is ``test_loss``: all normal rows of the test set, at the end of training. Rates are chosen by
``final`` on the probe set, on three seeds of their own, from a grid of five and the two beside its best
(:class:`studies.engine.tuning.Search`), the same for every method; reported seeds are fresh.

Fixed batches are computed in passes of at most 128 examples: the same examples and the same update, to rounding.
*Untuned* arms take the rate that the grid gave the batch they start from, two micro-batches (with ghost norms: one), at
which their coupling, if they have one, is 1.

What the plan was, and what changed after runs had been seen, always in the frontier's favour:

* Of six rates 5e-4 and 1e-3 were dropped once three seeds of the smallest batch, where rates are lowest, had ended at
  36.6 and 33.8 with them, against 32.0 and 31.0 at 2e-3 and 4e-3.
* 3.2e-2 was added once the largest of the other four had been best for fixed 64 to 512.
* The frontier of seven batches and five rates was coarse: the control ``constant mean``, a fixed 192 at 2e-2, had an
  updates ratio of 0.78 to it. So fixed batches of 96, 192 and 384 were added, and the rates beside the best. Untuned
  arms kept the rate they had.
* ``constant mean`` still had 0.79. Its coupling lets the rate grow by a tenth a step, from that of 32 examples: it
  warms up, and so do all coupled arms, while no fixed batch did. Two tuning seeds of fixed 192 at 1.6e-2: 34.0 without
  a warm-up, 33.4, 33.2 and 33.1 with one of 2, 5 and 10 % of the examples. So fixed batches of 64 to 384 are tuned once
  more with a linear warm-up of 5 %, and the frontier takes the better of the two for each batch (label ``warmup``).
* :mod:`studies.questions.planning` found 512 and 1024, without a warm-up to choose, to need 1.5 and 1.8 times what it
  foretold. So these have it too; and as one of eight fresh seeds diverged at the rate so chosen for 512, a fixed batch
  that does takes its next best rate (its runs are of stage ``diverged``), which an adaptive arm does not.
* A pilot (one tuning seed) of longer warm-ups, of 20 and 40 %, found 31.9 for fixed 192 with either, against 32.7 with
  5 %: as much as the gain that had been reported. So 64 to 1024 are tuned with these too, and so is V4's primary arm.
* At home that is 7 or 20 trials a batch. Before any run elsewhere (V6's other networks and data): there a batch is
  tuned from what is best for it at home (:func:`studies.engine.tuning.carried`), the rates around it, on while one at
  an end is better, and shorter and longer warm-ups while they are better.

Registered before its runs, after pilots of one to three seeds that are not among the results:

* V1 (primary): ``theta 0.7, root``, untuned, needs fewer updates than the frontier: the ratio's interval is below 1, on
  the calm network and MNIST, with a rate that decays linearly to zero. The same is asked of ``theta 1, root``.
* V2: ``pareto 128, root`` and ``pareto 1024, root`` (prices of 4 and 32 times the starting batch), untuned: below 1.
* V3: under a decaying rate a batch that grows without a coupling anneals twice: for each rule the loss ratio with the
  root coupling is below the one without, seed by seed.
* V4: at equal trials (``..., tuned``): ratio below 1.
* V5: it is feedback, not a schedule: the updates ratio of ``theta 0.7, root`` is below that of its batches replayed on
  another seed, of the constant batch of the same mean, and of a ramp of the same range.
* V6: the same as V1 with a constant rate, on the noisy network made trainable (ReZero; scaled branches), on
  Fashion-MNIST and Shuttle.

Plan, hours on one core: calm MNIST with the decaying rate 9 (has been run), the constant rate 7, others 2.5 each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd

import adaptbatch as ab
from studies.engine.arms import Arm
from studies.engine.reduce import recorded_steps
from studies.engine.runner import Run
from studies.engine.sweep import Found, Options, Study, from_runs
from studies.engine.tuning import planned, together
from studies.output.front_figure import figure_of
from studies.output.fronts import (
    BEFORE,
    against_earlier,
    annealing,
    bootstrapped,
    claim_row,
    compare_tasks,
    feedback,
    tuned_rates,
)
from studies.questions.live.fixed import fixed_arm, ranked, reported, searched
from studies.questions.live.setting import (
    HOME,
    MICRO_BATCH,
    NAME,
    PASS,
    SCALES,
    START,
    TUNED_RATES,
    WARMUP,
    Method,
    Scale,
    Setting,
    Tuned,
    labelled,
    restaged,
    search,
)

__all__ = [
    "MICRO_BATCH",
    "PASS",
    "SCALES",
    "START",
    "WARMUP",
    "Method",
    "Scale",
    "Setting",
    "Tuned",
    "fixed_arm",
    "labelled",
    "ranked",
    "reported",
    "restaged",
    "searched",
]
PRICES = (4.0 * START, 32.0 * START)
PRIMARY = "theta 0.7, root"
SETTINGS = (
    HOME,
    Setting("calm", rate="constant", whole=True),
    Setting("rezero"),
    Setting("calm", "fashion"),
    Setting("calm", "shuttle"),
    Setting("noisy scaled"),
)


def _both(name: str, rule: ab.rules.Rule) -> tuple[Method, Method]:
    return Method(name, rule), Method(name, rule, coupled=False)


METHODS: tuple[Method, ...] = (
    *_both("theta 0.7", ab.RelativeStandardError(0.7)),
    *_both("theta 1", ab.RelativeStandardError(1.0)),
    *_both("pareto 128", ab.Pareto(PRICES[0])),
    Method("pareto 1024", ab.Pareto(PRICES[1])),
    Method("ghost, theta 1", ab.RelativeStandardError(1.0), ghost=True, start=MICRO_BATCH),
)
# Warm-ups that fixed batches had to choose at first.
SHORT = (0.0, WARMUP)
FEW = ("theta 0.7, root", "theta 1, root", "pareto 128, root", "theta 1")
TUNED = ("theta 0.7, root", "pareto 128, root")
CONTROLS = ("replay", "constant mean", "ramp 2 to 16, root")


def plan(options: Options, found: Found) -> list[Run]:
    """Setting by setting, in order of importance: tuning, then what is reported."""
    scale = SCALES[options.preset]
    runs: list[Run] = []
    for setting in SETTINGS:
        if options.data and (setting.data or scale.home) not in options.data:
            continue
        if options.preset == "smoke" and setting is not SETTINGS[0]:
            continue
        own = list(_setting(setting, scale, range(options.seeds or scale.seeds), found))
        runs += own
        if any(run not in found for run in own):
            break
    return runs


def _setting(setting: Setting, scale: Scale, seeds: range, found: Found) -> Iterator[Run]:
    searches = {n: searched(setting, scale, n, found) for n in scale.batches}
    yield from planned(searches.values(), found)
    fixed = [list(reported(setting, scale, n, seeds, found).values()) for n in searches]
    if not all(fixed):
        return
    for n, (*diverged, runs) in zip(searches, fixed, strict=True):
        *others, earlier = reported(setting, scale, n, seeds, found, SHORT if setting.whole else None).values()
        left = diverged + [own for own in others if own not in diverged]
        yield from (restaged(run, "diverged") for own in left for run in own)
        yield from (restaged(run, BEFORE) for run in earlier if earlier != runs)
    start = {n: rate for n, own in searches.items() if 0.0 in own and (rate := own[0.0].first(found)) is not None}
    ramp = Method("ramp 2 to 16", ab.Ramp(2, 16, float(scale.examples)))
    methods = [method for method in (*METHODS, ramp) if setting.whole or method.label in FEW]
    # Seed by seed, so that what is finished can be compared.
    for seed in seeds:
        yield from (runs[seeds.index(seed)] for *_, runs in fixed)
        for method in methods:
            lr = start[method.start if method.start in start else min(start)]
            yield labelled("final", setting, scale, method.arm(lr, setting.schedule(scale)), seed)
    if not setting.whole:
        return
    yield from _controls(setting, scale, start, seeds, found)
    for method in methods:
        if method.label in TUNED:
            yield from _tuned(method, setting, scale, seeds, found)


def _tuned(method: Method, setting: Setting, scale: Scale, seeds: range, found: Found) -> Iterator[Run]:
    """The same at the rate of its own that is best for it; the primary one also after a warm-up."""
    name = f"{method.label}, tuned"

    def make(lr: float, share: float = 0.0) -> Arm:
        return method.arm(lr, setting.schedule(scale, share), name)

    searches = {0.0: search(setting, scale, name, make)}
    for share in scale.long_warmups if method.label == PRIMARY else ():
        searches[share] = search(setting, scale, name, partial(make, share=share), rates=TUNED_RATES)
    yield from planned([searches], found)
    if means := together(searches, found):
        best = make(*min(means, key=means.__getitem__))
        yield from (labelled("final", setting, scale, best, seed) for seed in seeds)


def _controls(setting: Setting, scale: Scale, rates: dict[int, float], seeds: range, found: Found) -> Iterator[Run]:
    """The primary arm's batches without its feedback: replayed on the next seed, or their mean alone."""
    method = next(method for method in METHODS if method.label == PRIMARY)
    arm = method.arm(rates[START], setting.schedule(scale))
    for seed in seeds:
        recorded = found.get(labelled("final", setting, scale, arm, (seed - 1) % len(seeds)))
        yield from (
            labelled("final", setting, scale, each, seed) for each in without_feedback(arm, recorded, MICRO_BATCH)
        )


def without_feedback(arm: Arm, recorded: Mapping[str, Any] | None, micro_batch: int) -> Iterator[Arm]:
    """An arm with the batches of a run of it, or with their mean; none while that run is not finished."""
    if recorded is not None:
        mean = max(1, round(recorded["mean_batch"] / micro_batch))
        yield replace(arm, name="replay", rule=ab.rules.Replay(tuple(recorded_steps(recorded).tolist())))
        yield replace(arm, name="constant mean", rule=ab.Fixed(mean))


TASK = ["network", "data", "rate"]


def tables(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The arms of each task against its frontier, the claims, and what was tuned."""
    tried, final = runs[runs["stage"] == "tune"], runs[runs["stage"] == "final"]
    found = {"tuning": tuned_rates(tried, TASK)}
    compared = compare_tasks(final, TASK, against=PRIMARY)
    if len(before := runs[runs["stage"] == BEFORE]):
        found["before"] = against_earlier(final, before, TASK)
    if len(compared):
        auroc = final.groupby([*TASK, "arm"])["auroc"].mean().rename("auroc")
        found["arms"] = compared.join(auroc, on=[*TASK, "arm"])
        found["claims"] = claims(found["arms"], final)
    return found


def claims(table: pd.DataFrame, final: pd.DataFrame) -> pd.DataFrame:
    """V1 to V6, each with its interval."""
    rows = []
    for names, part in table.groupby(TASK, sort=False):
        where = ", ".join(map(str, names))
        home = part["network"].iloc[0] == "calm" and part["rate"].iloc[0] == "decaying"
        home = home and part["data"].iloc[0] in ("mnist", "digits")
        own = part.set_index("arm")
        for arm in own.index[~own["fixed"]]:
            claim = _claim(arm, home)
            if claim is None:
                continue
            row = own.loc[arm]
            said = f"updates ratio of {arm} to the frontier is below 1"
            rows.append(claim_row(claim, said, where, bootstrapped(row, "updates ratio"), arm=row))
        runs = final[(final[TASK] == list(names)).all(axis=1)]
        if part["rate"].iloc[0] == "decaying":
            rows += annealing("V3", runs, where)
        if home:
            rows += feedback("V5", own, where, PRIMARY, CONTROLS)
    return pd.DataFrame(rows)


def _claim(arm: str, home: bool) -> str | None:
    if arm.endswith("tuned"):
        return "V4"
    if arm in ("theta 0.7, root", "theta 1, root"):
        return "V1" if home else "V6"
    return "V2" if arm.startswith("pareto") and arm.endswith("root") else None


STUDY = Study(
    NAME,
    "updates at equal examples and equal loss, with a controller that acts",
    plan,
    from_runs(tables),
    figures=figure_of(from_runs(tables), TASK, "{}, {}, {} rate"),
    order=3,
)
