"""The origin's own relation where training bursts: does a mean of more examples cure it, and is it the mean that does?

On the raw noisy network the default rule stays at its smallest window (:mod:`studies.questions.comparison`): there the
gradient is long rather than uncertain. The origin's relation is absolute, ``std = sigma / sqrt(n)``, and its cure a
batch that is larger at the same rate. The comparison's ten stress runs suggest that it works; they are not counted
here. All is at the rate at which their smallest batch bursts (Adam, 1e-2, constant), on 20 fresh seeds, in
micro-batches of 64, so that a spike (:mod:`studies.engine.reduce`) is the same event in every arm.

Registered before its runs:

* O1: at that rate ``spikes`` and divergence fall with the accumulated batch, 64 to 1,024: the trend (Kendall's tau over
  the batches of a seed, mean over seeds) is below 0. So do ``probe_spikes``, as the running median of 100 micro-batches
  is of fewer updates where the batch is large. The same at 1,000 updates for batches of 64 to 512, so that it is not
  merely fewer steps; what counts there is ``probe_spikes``, evaluated every ten updates in every arm.
* O2: the same for batch 64 at a rate lowered by the root of the batch ratio, 1e-2 sqrt(64 / n), n = 256 and 1,024.
* O3: ``StandardError`` is not told the batch: its reference is one micro-batch. Its mean ``spikes`` are at most 5 % of
  the smallest batch's, and none of its runs diverges.
* O4: its ``final`` is not above that of the best fixed batch that O3 would accept (margin 2 %), seed by seed.
* O5: its ``final`` is below that of a linear learning-rate warm-up, with what both are given untuned (a warm-up of
  20,000 examples, the comparison's), and with the best of four references and of four lengths on three other seeds.

What the central limit theorem says of it, asked in advance:

* A mean of n has an error of ``sigma / sqrt(n)``. If that error is what bursts are made of, Adam at equal examples does
  not tell a batch n times larger from a rate lowered by the root of n (Malladi et al. 2022, arXiv:2205.10287): C1, the
  share of seeds that spike differs by less than 0.2 between the two, and C2, ``final`` by less than 5 %. What C1 and C2
  leave is not averaging.
* It says nothing of how far a step may go. A rate that is too high for the curvature is so at every batch: where
  O1 holds at equal examples and not at equal updates, the cure was taking fewer steps.
* It speaks of finite variance. ``relative error`` in the table is the part of a batch gradient that is error, along the
  runs; where it is small and a batch bursts all the same, noise is not the reason.

A rule's claim counts only if it was awake in most of its runs: ``k`` changed after the first tenth, and fewer than half
of its windows were the largest, where ``StandardError`` is the fixed batch of 1,024. That it stands at its smallest
window, two micro-batches, while training is calm is what it is for; so O3 asks, too, for fewer spikes than the fixed
batch of that size has.

Pilot, on two seeds that are not reported and on which batch 64 did not spike: gradients begin a thousand times as long
as they stay, so that with the default memory (32,000 examples) the rule is at its largest window for 91 % of the
windows, with a memory of 4,000 or 2,000 for 47,000 or 23,500 of the 128,000 examples, then at its smallest (``final``
56.5, 52.6, 51.7 on the first seed; mean batch 985, 235, 176). With ghost norms and a memory of 4,000 it ended at 59.8
on the second. So it is given a memory of 2,000 and no ghost norms; it then ended at 51.7 and 52.4, batch 64 at 48.9 and
46.0. The composition with the relative rule is left out: that one asks for 50 to 120 examples here, less than the
smallest window.

Plan, on one core at 25 s a run of 128,000 examples: fixed batches 100 runs, rule and warm-up 80, lower rates 40, trials
24, at equal updates 60 (12, 20 and 40 s): 2 hours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import adaptbatch as ab
from studies.engine.analysis import SPIKE_SKIP
from studies.engine.arms import Arm, Warmup
from studies.engine.results import load
from studies.engine.runner import Run
from studies.engine.sweep import SHARED, Found, Options, Scale, Study, from_runs
from studies.engine.tuning import best_of
from studies.output.burst_figure import draw_bursts
from studies.output.fronts import claim_row
from studies.output.statistics import Interval, iqm, of_seeds, ratio, share, trend
from studies.questions import comparison
from studies.questions.comparison import STRESS_KNOBS, STRESS_LR, fixed

MICRO_BATCH = comparison.MICRO_BATCH
BATCHES = comparison.BATCHES
# At equal updates: as many as this batch makes of the budget.
MATCHED, AS_MANY_AS = (64, 128, 256, 512), 128
PASS = 256
LOWERED = (256, 1024)
MAX_STEPS = 16
MEMORY = 2_000.0
REFERENCES = (32.0, 64.0, 128.0, 256.0)
LENGTHS = (5e3, 2e4, 6.4e4, 1.28e5)
FIRST_SEED = 10
RULE, WARMUP = "standard error", "warm-up"
# Its smallest window: noise is heard between two micro-batches.
FLOOR = 2 * MICRO_BATCH
AWAKE_SHARE = 0.5
SPIKES_SHARE, MARGIN = 0.05, 1.02
SAME_SHARE, SAME_LOSS = 0.2, 1.05


SCALES: dict[str, Scale] = {
    "smoke": Scale(1_000, (16, 8), 8, 2, (1000,), "digits"),
    "laptop": Scale(128_000, (64, 16), 80, seeds=20),
    "paper": Scale(10_800_000, (128, 32), 80, seeds=30),
}


def standard_error(reference: float) -> Arm:
    """The origin's relation, its level that of ``reference`` examples in an ordinary window."""
    rule = ab.StandardError(reference_batch=reference, memory=MEMORY)
    return Arm(RULE, rule, STRESS_LR, max_steps=MAX_STEPS)


def warmup(length: float) -> Arm:
    """The smallest batch with a warm-up of ``length`` examples."""
    return Arm(WARMUP, fixed(BATCHES[0]), STRESS_LR, schedule=Warmup(length))


KNOBS = {RULE: (standard_error, REFERENCES), WARMUP: (warmup, LENGTHS)}
UNTUNED = {RULE: float(MICRO_BATCH), WARMUP: STRESS_KNOBS["warmup"]}


def plan(options: Options, found: Found) -> list[Run]:
    """Seed by seed: fixed batches and rules, fewer steps and lower rates; then the trials, and what they chose."""
    scale = SCALES[options.preset]
    seeds = range(FIRST_SEED, FIRST_SEED + (options.seeds or scale.seeds))
    runs = [run for seed in seeds for run in _of_seed(scale, seed)]
    trials = {method: list(_trials(method, scale)) for method in KNOBS}
    runs += [run for own in trials.values() for run in own]
    for method, (make, values) in KNOBS.items():
        best = best_of(values, [found.get(run) for run in trials[method]])
        if best is not None:
            arm = replace(make(best), name=f"{method}, tuned")
            runs += [_run("tuned", scale, arm, seed, method, value=best) for seed in seeds]
    return runs


def _of_seed(scale: Scale, seed: int) -> Iterator[Run]:
    for n in BATCHES:
        yield _run("examples", scale, Arm(f"fixed {n}", fixed(n), STRESS_LR), seed, "fixed", n)
    for method, (make, _) in KNOBS.items():
        yield _run("rules", scale, make(UNTUNED[method]), seed, method, value=UNTUNED[method])
    for n in LOWERED:
        arm = Arm(f"rate of {n}", fixed(BATCHES[0]), STRESS_LR * math.sqrt(BATCHES[0] / n))
        yield _run("rates", scale, arm, seed, "rate", n)
    for n in MATCHED:
        passes = PASS if n > AS_MANY_AS else MICRO_BATCH
        arm = Arm(f"fixed {n}", ab.Fixed(n // passes), STRESS_LR)
        budget = replace(scale, examples=scale.examples // AS_MANY_AS * n)
        yield _run("updates", budget, arm, seed, "fixed", n, micro_batch=passes)


def _trials(method: str, scale: Scale) -> Iterator[Run]:
    make, values = KNOBS[method]
    for value in values:
        for seed in scale.tuning_seeds:
            yield _run("tune", scale, make(value), seed, method, value=value)


def _run(
    stage: str,
    scale: Scale,
    arm: Arm,
    seed: int,
    method: str,
    batch: int = 0,
    value: float = math.nan,
    micro_batch: int = MICRO_BATCH,
) -> Run:
    """A run with its labels; ``batch`` is that of a fixed one, or the one whose rate is taken."""
    task = replace(comparison.task("noisy", scale.home, scale), micro_batch=micro_batch)
    labels = {"stage": stage, "network": "noisy", "data": task.data, "method": method, "batch": batch}
    return Run(SHARED, task, arm, seed, tuple((labels | {"lr": arm.lr, "value": value}).items()))


def tables(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Every arm, the trials, the claims."""
    reported = runs[runs["stage"] != "tune"]
    tried = runs[runs["stage"] == "tune"].groupby(["method", "value"], sort=False)
    table = arms(reported, curves)
    trials = tried.agg(final=("final", "mean"), spikes=("spikes", "mean"), seeds=("seed", "count")).reset_index()
    return {"arms": table, "tuning": trials, "claims": claims(reported, table)}


def arms(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """How often each arm spikes and diverges, where it ends, with what batch and what part of it error."""
    errors = curves.groupby("key")["relative_error"].median()
    rows = []
    for (stage, arm), own in runs.groupby(["stage", "arm"], sort=False):
        final, diverged = iqm([own["final"].to_numpy(float)]), share(int(own["diverged"].sum()), len(own))
        row = {"stage": stage, "arm": arm, "seeds": len(own), "batch": own["batch"].iloc[0], "lr": own["lr"].iloc[0]}
        row |= {"diverged": int(own["diverged"].sum()), "diverged low": diverged.low, "diverged high": diverged.high}
        row |= {"runs with spikes": int((own["spikes"] > 0).sum()), "spikes": own["spikes"].mean()}
        row |= {"runs with probe spikes": int((own["probe_spikes"] > 0).sum())}
        row |= {"probe spikes": own["probe_spikes"].mean(), "updates": own["updates"].mean()}
        row |= {"final": final.value, "final low": final.low, "final high": final.high}
        row |= {"mean n": own["mean_batch"].mean(), "live": sum(map(is_awake, own.to_dict("records")))}
        row |= {"value": own["value"].iloc[0]}
        rows.append(row | {"relative error": errors.reindex(own["key"]).median()})
    return pd.DataFrame(rows)


def is_awake(run: Mapping[str, Any]) -> bool:
    """Whether a rule answered anything after the first tenth, and was not at its largest window most of the time.

    Example:
        >>> run = {"adaptbatch": "0.1", "schedule_k": [16, 2, 9, 2], "schedule_windows": [2, 60, 1, 40]}
        >>> is_awake(run), is_awake(run | {"schedule_windows": [200, 20, 1, 1]})
        (True, False)
    """
    if run["adaptbatch"] == "any":
        return True
    k, windows = (np.asarray(run[f"schedule_{name}"]) for name in ("k", "windows"))
    changed = np.cumsum(k * windows)[:-1] > SPIKE_SKIP * (k * windows).sum()
    return bool(changed.any() and windows[k == MAX_STEPS].sum() < AWAKE_SHARE * windows.sum())


def claims(runs: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """O1 to O5, and what the central limit theorem says (C1, C2); each on the seeds that all its arms have."""
    home = runs[runs["stage"].isin(["examples", "rules", "tuned", "rates"])]
    wide = {name: _wide(home, name) for name in ("spikes", "probe_spikes", "diverged", "final")}
    sizes = [f"fixed {n}" for n in BATCHES]
    lowered = [sizes[0], *(f"rate of {n}" for n in LOWERED)]
    matched = {name: _wide(runs[runs["stage"] == "updates"], name) for name in ("probe_spikes", "diverged")}
    rows = [
        *_trends("O1", wide, sizes, "batch", "equal examples"),
        *_trends("O1", matched, [f"fixed {n}" for n in MATCHED], "batch", "equal updates"),
        *_trends("O2", wide, lowered, "lowered rate", "equal examples"),
        *_same(wide),
        *_rules(wide, table[table["stage"].isin(["rules", "tuned"])].set_index("arm"), sizes),
    ]
    return pd.DataFrame(rows, columns=["claim", "what", "where", "value", "low", "high", "interval", "live", "verdict"])


def _wide(runs: pd.DataFrame, column: str) -> pd.DataFrame:
    return runs.assign(**{column: runs[column].astype(float)}).pivot_table(index="seed", columns="arm", values=column)


def _of(wide: pd.DataFrame, arms: list[str]) -> np.ndarray:
    """``[seeds, arms]`` of the seeds that all of them have; none before an arm has run."""
    return wide.reindex(columns=arms).dropna().to_numpy(float)


def _trends(
    claim: str, wide: dict[str, pd.DataFrame], arms: list[str], with_: str, where: str
) -> Iterator[dict[str, object]]:
    for name, table in wide.items():
        values = _of(table, arms)
        if name != "final" and len(values):
            yield claim_row(
                claim, f"trend of {name} with the {with_} is below 0", where, of_seeds(values, trend), bound=0.0
            )


def _same(wide: dict[str, pd.DataFrame]) -> Iterator[dict[str, object]]:
    """C1 and C2: a batch n times larger against a rate lowered by the root of n."""
    pairs = [(f"fixed {n}", f"rate of {n}") for n in LOWERED]
    values = _of(wide["spikes"], [arm for pair in pairs for arm in pair]) > 0
    if len(values):
        found = of_seeds(values.astype(float), lambda rows: float((rows[:, ::2] - rows[:, 1::2]).mean()))
        what = f"share of seeds that spike, larger batch less lowered rate, is 0 (margin {SAME_SHARE})"
        row = claim_row("C1", what, "equal examples", found)
        yield row | {"verdict": found.within(-SAME_SHARE, SAME_SHARE)}
    for n, pair in zip(LOWERED, pairs, strict=True):
        ends = _of(wide["final"], list(pair))
        if len(ends):
            found, _ = ratio(ends[:, 0], ends[:, 1])
            row = claim_row("C2", f"final, batch {n} / lowered rate, is 1 (margin 5 %)", "equal examples", found)
            yield row | {"verdict": found.within(1 / SAME_LOSS, SAME_LOSS)}


def _mean_ratio(rows: np.ndarray) -> float:
    ours, theirs = rows.mean(axis=0)
    return float(ours / theirs) if theirs > 0 else math.nan


def _rules(wide: dict[str, pd.DataFrame], table: pd.DataFrame, sizes: list[str]) -> Iterator[dict[str, object]]:
    """O3 to O5."""
    if RULE not in table.index or not len(_of(wide["spikes"], [*sizes, RULE])):
        return
    own, where = table.loc[RULE], "equal examples"
    spikes = of_seeds(_of(wide["spikes"], [RULE, sizes[0]]), _mean_ratio)
    said = f"spikes, {RULE} / {sizes[0]}, are at most {SPIKES_SHARE}"
    yield claim_row("O3", said, where, spikes, SPIKES_SHARE, own)
    floor = f"fixed {FLOOR}"
    more = of_seeds(_of(wide["spikes"], [RULE, floor]), _mean_ratio)
    yield claim_row("O3", f"spikes, {RULE} / {floor}, are below 1", where, more, arm=own)
    broken = wide["diverged"][RULE].dropna()
    row = claim_row("O3", f"no run of {RULE} diverges", where, share(int(broken.sum()), len(broken)), arm=own)
    yield row | {"verdict": "not supported" if broken.any() else "supported" if _tested(own) else "undecided"}
    accepted = [arm for arm in sizes if _accepted(wide, arm, sizes[0])]
    if accepted:
        best = min(accepted, key=lambda arm: float(wide["final"][arm].median()))
        yield _ends("O4", wide["final"], RULE, best, f"is below {MARGIN}", own, MARGIN)
    for suffix in ("", ", tuned"):
        ours, theirs = RULE + suffix, WARMUP + suffix
        if {ours, theirs} <= set(table.index):
            yield _ends("O5", wide["final"], ours, theirs, "is below 1", table.loc[ours])


def _tested(arm: pd.Series) -> bool:
    return bool(arm["live"] > arm["seeds"] / 2)


def _accepted(wide: dict[str, pd.DataFrame], arm: str, smallest: str) -> bool:
    """Whether O3 would accept a fixed batch: by its value, as the rule's is an interval's matter."""
    return _mean_ratio(_of(wide["spikes"], [arm, smallest])) <= SPIKES_SHARE and not wide["diverged"][arm].any()


def _ends(
    claim: str, final: pd.DataFrame, ours: str, theirs: str, said: str, arm: pd.Series, bound: float = 1.0
) -> dict[str, object]:
    values = _of(final, [ours, theirs])
    found = ratio(values[:, 0], values[:, 1])[0] if len(values) else Interval(*[math.nan] * 3)
    return claim_row(claim, f"final, {ours} / {theirs}, {said}", "equal examples", found, bound, arm)


def draw(folder: Path) -> None:
    """How often runs burst and where they end, by batch; and one seed, with what the rule did about it."""
    runs, curves = load(folder.name, folder=folder.parent), load(folder.name, curves=True, folder=folder.parent)
    draw_bursts(STUDY.tables(folder)["arms"], runs, curves, RULE, folder)


STUDY = Study(
    "bursts",
    "the origin's absolute relation where training bursts: batch, rate, rule and warm-up",
    plan,
    from_runs(tables),
    figures=draw,
    order=4.5,
)
