"""Is a plan true? What one run at a small batch says of every other batch, against a sweep of tuned fixed batches.

Of each task one training at a small batch ``n0`` (two micro-batches: 32 examples, 512 characters) is measured by
:class:`adaptbatch.NoiseMeter`. From its rows alone comes ``B``, integrated over the run as :func:`adaptbatch.plan` does
it, and from ``B`` how many updates every other batch takes to the same loss::

    predicted(n) = S(n0) (1 + c B / n) / (1 + c B / n0)          c = 1, or the factor that branches measured

What it is compared with: updates for an equal *final* loss. In the sweeps of :mod:`studies.questions.live` and
:mod:`studies.questions.transformer` a rate decays over the whole budget, so that a batch whose curve crosses the target
early has not annealed there and one that crosses late has: updates-to-target of one curve has that bias. Here every run
decays to zero over its own budget, and ``E(n)`` is the budget at which batch ``n`` ends at the loss ``L`` of the
measured run: budgets are doubled or halved from the sweep's own until they bracket ``L``, with a line through the
logarithms of both between the two; ``S(n) = E(n) / n``. The measured run has a quarter of the sweep's budget (the
transformer's, because of its warm-up, half), so that large batches need not be trained for eight times as long. Runs
with a constant rate, whose curves have no such bias, were the alternative: but there small batches end at the floor of
their rate, a tuned constant rate is another for each target, and no one trains so. Batches are the sweep's powers of
two (16 to 1024 examples; 256 to 8,192 characters), the loss is ``test_loss``. Rates and warm-ups (as shares) are those
that the sweep's search found at its own budget: where a longer one would want a lower rate, large batches look dearer
than they are. A task whose sweep is not there waits for it.

Registered before its runs:

* P1: over all batches but ``n0`` and five seeds, the median of ``|log(predicted(n) / S(n))|`` is at most log 1.5 with
  ``c = 1``, and at most log 1.25 with the geometric mean of ``CriticalBatch.calibration`` over the branches. Each seed
  predicts from its own run; ``S(n)`` is of the seeds' mean log loss. 95 % intervals draw seeds again, for runs and
  sweep alike. A batch whose budgets do not bracket ``L`` within a factor of eight has an infinite error, and so has a
  run without evidence. Beside it stand two predictors that measure nothing: as many updates, and as many examples.
* P2: :func:`adaptbatch.critical_batch` after 0.15, 0.4 and 0.8 of the measured run, on two of the seeds (steps of 2 to
  32 micro-batches, three repeats, tolerance 1 %): the ratio of the critical batch to the noise scale that the meter's
  last row has, Euclidean, in Adam's metric, and (Euclidean) of the typical window. A channel is *steady* where ratios
  of a task scatter by less than a factor of 2 (the exponential of the standard deviation of their logarithms, with its
  chi-squared interval). All three are reported.
* P3: the batch that ``plan`` recommends from one seed's rows is followed on the other seeds, whose runs of that batch
  the sweep has. Its modelled time ``S(n) (fixed + sync + per_example n / devices)`` over that of the sweep's best batch
  has a geometric mean below 1.10, at 1, 8 and 64 devices. A window's fixed part takes as long as one micro-batch, its
  synchronisation as four. A device has at least a sixteenth of a micro-batch.

A claim is supported if its whole interval is below its bound, not supported if none of it is, else undecided.

Plan, on one core at 60 s for 128,000 examples in passes of 16. Brackets depend on the noise scale, which says how far
budgets are doubled: 50 to 60 runs and 7 to 14 minutes for each of the two autoencoders on MNIST (scales of 600 to 60
examples), 35 to 50 runs and 4 to 16 minutes for the transformer (6,000 to 500 characters). Measured runs 5 for each
task, 3 minutes; branches 6 for each task, 7 minutes. In all 50 to 75 minutes. Fashion-MNIST and Shuttle come after,
without branches: 10 to 17 minutes each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import torch
from rich.progress import Progress, TimeElapsedColumn
from scipy import stats
from torch import Tensor

import adaptbatch as ab
from adaptbatch.planning.curves import TimeModel, critical_scale, integrated_noise
from studies.engine.results import load, read_table, write_atomically
from studies.engine.runner import Run, provenance
from studies.engine.sweep import Found, Options, Study
from studies.engine.training import Problem
from studies.engine.tuning import Search
from studies.output.fronts import claim_row
from studies.output.plan_figure import draw_plans
from studies.output.statistics import Interval, ratio
from studies.questions import live, transformer

NAME = "planning"
SEEDS = {"smoke": 2, "laptop": 5, "paper": 5}
STEPS = 2
REACH = 8
# Branches are after these shares of the measured run, on so many seeds.
POINTS, BRANCHED = (0.15, 0.4, 0.8), 2
DEVICES = (1, 8, 64)
# In units of a micro-batch's time; and how many parts of it a device may be given.
FIXED, SYNC, PARTS = 1.0, 4.0, 16
BOUNDS = {"alone": 1.5, "calibrated": 1.25}
STEADY, NEAR = 2.0, 1.10
RESAMPLES = 2_000
CHANNELS = {"euclidean": "noise_scale", "adam": "noise_scale_metric", "typical": "noise_scale_typical"}
# A rate, and the share of the budget over which it warms up.
Tuned = tuple[float, float]
KEPT = ["examples_seen", "accumulation_steps", "global_batch", "grad_sq_norm", "noise_trace", *CHANNELS.values()]


@dataclass(frozen=True)
class Branches:
    """What is compared from one state.

    Attributes:
        points: Shares of the measured run after which they are; empty: nowhere.
        steps: Micro-batches of a window.
        windows: Of the largest.
        repeats: Orders of the data.
    """

    points: tuple[float, ...] = POINTS
    steps: tuple[int, ...] = (2, 4, 8, 16, 32)
    windows: int = 16
    repeats: int = 3


NONE = Branches(points=())
BRANCHES = {"smoke": Branches((0.4,), (2, 4), 4, 2), "laptop": Branches(), "paper": Branches()}


@dataclass(frozen=True)
class Subject:
    """A task whose sweep another study has.

    Attributes:
        name: Of the task.
        data: Its data set.
        start: ``n0``, the batch of the measured run.
        budget: Of the sweep.
        batches: Of the sweep, that are compared.
        searches: Of the sweep, for the rates of these batches.
        tuned: A batch's rate and the share of its warm-up, once they are finished.
        run: A fixed batch's run: budget, batch, rate and share, seed.
        part: Of the sweep's budget that the measured run has, one of so many.
        branched: Whether it has branches.
    """

    name: str
    data: str
    start: int
    budget: int
    batches: tuple[int, ...]
    searches: Callable[[Found], list[Search]]
    tuned: Callable[[int, Found], Tuned]
    run: Callable[[int, int, Tuned, int], Run]
    part: int = 4
    branched: bool = True

    @property
    def opening(self) -> int:
        """Budget of the measured run."""
        return self.budget // self.part

    def labelled(self, budget: int, batch: int, tuned: Tuned, seed: int) -> Run:
        """A run with its labels."""
        labels = {"stage": "final", "task": self.name, "budget": budget, "batch": batch, "start": self.start}
        labels |= {"lr": tuned[0], "warmup": tuned[1], "fixed": 1}
        return replace(self.run(budget, batch, tuned, seed), labels=tuple(labels.items()))


def subjects(options: Options) -> list[Subject]:
    """The calm and the trainable noisy network, the transformer; other data sets after."""
    settings = [live.Setting("calm"), live.Setting("noisy scaled")]
    away = [live.Setting("calm", "fashion"), live.Setting("calm", "shuttle")]
    if options.preset == "smoke":
        settings, away = settings[:1], []
    ordered = [
        *(_autoencoder(setting, options.preset) for setting in settings),
        _language(options.preset),
        *(replace(_autoencoder(setting, options.preset), branched=False) for setting in away),
    ]
    return [subject for subject in ordered if not options.data or subject.data in options.data]


def _autoencoder(setting: live.Setting, preset: str) -> Subject:
    scale = live.SCALES[preset]
    data, batches = setting.data or scale.home, _powers(scale.batches)
    plain, warm = (live.fixed_searches(setting, scale, share) for share in (0.0, live.WARMUP))

    def run(budget: int, batch: int, tuned: Tuned, seed: int) -> Run:
        arm = live.fixed_arm(setting, own := replace(scale, examples=budget), batch, tuned[1])(tuned[0])
        return live.labelled("final", setting, own, arm, seed, batch)

    return Subject(
        f"{setting.network}, {data}",
        data,
        live.START,
        scale.examples,
        batches,
        lambda found: [kind[n] for kind in (plain, warm) for n in batches if n in kind],
        lambda n, found: live.tuned(plain[n], warm.get(n), found),
        run,
    )


def _language(preset: str) -> Subject:
    scale, small = transformer.SCALES[preset], transformer.SMALL
    batches = _powers(scale.batches)

    def run(budget: int, batch: int, tuned: Tuned, seed: int) -> Run:
        return transformer.fixed_run(replace(small, millions=budget / scale.million), scale, batch, tuned[0], seed)

    def tuned(n: int, found: Found) -> Tuned:
        lr = transformer.search(small, scale, n, found).best(found)
        assert lr is not None
        # It has a warm-up of its own.
        return lr, 0.0

    return Subject(
        "transformer",
        "kjv",
        transformer.START,
        small.budget(scale),
        batches,
        lambda found: [transformer.search(small, scale, n, found) for n in batches],
        tuned,
        run,
        # Of a quarter, the warm-up would be nearly half.
        part=2,
    )


def _powers(batches: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for n in batches if n & (n - 1) == 0)


def plan(options: Options, found: Found) -> list[Run]:
    """Of every task whose sweep is there, budgets until they bracket the loss of its measured run."""
    runs: list[Run] = []
    for subject in subjects(options):
        searches = subject.searches(found)
        if options.preset == "smoke":
            # A laptop's sweep takes hours, and is its own study's to run.
            runs += [run for search in searches for run in search.planned(found)]
        if all(search.best(found) is not None for search in searches):
            rates = {n: subject.tuned(n, found) for n in subject.batches}
            runs += _swept(subject, rates, range(options.seeds or SEEDS[options.preset]), found)
    return runs


def _swept(subject: Subject, rates: Mapping[int, Tuned], seeds: range, found: Found) -> Iterator[Run]:
    def own(n: int, budget: int) -> list[Run]:
        return [subject.labelled(budget, n, rates[n], seed) for seed in seeds]

    yield from own(subject.start, subject.opening)
    target = _log_loss(own(subject.start, subject.opening), found)
    for n in rates:
        if n == subject.start:
            continue
        # The sweep's own runs are there.
        budgets: list[int] = [subject.opening if n < 4 * subject.start else subject.budget]
        while target is not None:
            losses = [_log_loss(own(n, budget), found) for budget in budgets]
            wanted = None if None in losses else next_budget(budgets, losses, target)  # type: ignore[arg-type]
            if wanted is None or not subject.budget / REACH <= wanted <= subject.budget * REACH:
                break
            budgets = sorted([*budgets, wanted])
        for budget in budgets:
            yield from own(n, budget)


def _log_loss(runs: Sequence[Run], found: Found) -> float | None:
    """Mean over seeds; None before all are finished."""
    losses = [row["test_loss"] for run in runs if (row := found.get(run)) is not None]
    return float(np.log(losses).mean()) if len(losses) == len(runs) else None


def next_budget(budgets: Sequence[int], losses: Sequence[float], target: float) -> int | None:
    """Half or double where none of the budgets ends on the other side of ``target``; None where they bracket it.

    Example:
        >>> next_budget([100, 200], [3.0, 2.0], 1.0), next_budget([100, 200], [3.0, 2.0], 5.0)
        (400, 50)
        >>> next_budget([100, 200], [3.0, 2.0], 2.5) is None
        True
    """
    if losses[0] <= target:
        return budgets[0] // 2
    return 2 * budgets[-1] if min(losses) > target else None


def budget_for(budgets: np.ndarray, losses: np.ndarray, target: float) -> float:
    """The budget that ends at ``target``: a line through logarithms; 0 or infinite where they do not bracket it.

    Args:
        budgets: Ascending.
        losses: Log loss at the end of each.
        target: Log loss.

    Example:
        >>> budget_for(np.array([100.0, 400.0]), np.array([2.0, 1.0]), 1.5)
        200.0
    """
    reached = np.flatnonzero(losses <= target)
    if not len(reached):
        return math.inf
    if reached[0] == 0:
        return 0.0
    after = int(reached[0])
    share = (losses[after - 1] - target) / (losses[after - 1] - losses[after])
    logs = np.log(budgets)
    return float(np.round(np.exp(logs[after - 1] + share * (logs[after] - logs[after - 1])), 6))


# --- what is measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Anew:
    """A problem's micro-batches in an order of their own, as often as asked."""

    problem: Problem
    seed: int

    def __iter__(self) -> Iterator[Tensor]:
        return self.problem.micro_batches(self.seed)


def measured(run: Run, branched: Branches = NONE) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The meter's rows of a training in micro-batches half as large, and branches after shares of its budget.

    Args:
        run: Of one pass a step.
        branched: Where they begin, and how long they are.

    Returns:
        Rows of windows; rows of branches.
    """
    torch.set_num_threads(1)
    task: Any = run.task
    task = replace(task, micro_batch=task.micro_batch // STEPS)
    torch.manual_seed(run.seed)
    problem: Problem = task.problem(run.arm, "cpu")
    network: Any = problem.network
    optimizer = run.arm.build_optimizer(network.parameters())
    codes = torch.Generator().manual_seed(run.seed)
    # What is typical is of the metric that a meter judges in: so one for each.
    meters = [ab.NoiseMeter(network, optimizer), ab.NoiseMeter(network, optimizer, metric="adam")]
    branches, seen, left = [], 0.0, list(branched.points)
    for count, x in enumerate(problem.micro_batches(run.seed), start=1):
        weight = problem.weight(x)
        if weight < dict(run.labels)["batch"] / STEPS:  # type: ignore[operator]
            # What is left at the end, which would be an unequal share of its window.
            break
        for meter in meters:
            meter.weight(weight)
        (network.loss(x, codes) / STEPS).backward()
        seen += weight
        if count % STEPS:
            continue
        optimizer.param_groups[0]["lr"] = run.arm.learning_rate(seen)
        optimizer.step()
        optimizer.zero_grad()
        if left and seen >= left[0] * task.examples:
            left.pop(0)
            critical = ab.critical_batch(
                (network, optimizer),
                _Anew(problem, run.seed + 10_000),
                lambda model, item: (model.loss(item, codes), problem.weight(item)),
                lambda model: problem.evaluate(),
                branched.steps,
                examples=branched.windows * branched.steps[-1] * weight,
                reference=STEPS,
                repeats=branched.repeats,
                generators=[codes],
                seed=run.seed,
                progress=False,
            )
            last = _rows(meters).iloc[-1]
            row = {"at": seen, "critical": critical.critical, "excluded": critical.excluded}
            row |= {"calibration": critical.calibration, "smallest": branched.steps[0] * weight}
            branches.append(row | {"largest": branched.steps[-1] * weight} | {c: last[n] for c, n in CHANNELS.items()})
    for meter in meters:
        meter.close()
    return _rows(meters), pd.DataFrame(branches)


def _rows(meters: Sequence[ab.NoiseMeter]) -> pd.DataFrame:
    """The first one's, with the noise scale in the second one's metric."""
    own, other = (meter.history.to_pandas() for meter in meters)
    return own.assign(noise_scale_metric=other["noise_scale_metric"])[KEPT]


def measure(options: Options, workers: int, folder: Path) -> None:
    """Write ``windows.parquet`` and ``branches.parquet``: what is not there yet of the runs that are."""
    runs = load(NAME, folder=folder.parent) if (folder / "runs.parquet").is_file() else pd.DataFrame({"task": []})
    kept = {name: _there(folder / f"{name}.parquet") for name in ("windows", "branches")}
    there = set(map(tuple, kept["windows"].drop_duplicates(["task", "seed", "lr"])[["task", "seed", "lr"]].values))
    jobs = []
    for subject in subjects(options):
        own = runs[runs["task"] == subject.name]
        own = own[(own["batch"] == subject.start) & (own["budget"] == subject.opening)] if len(own) else own
        for row in own.to_dict("records"):
            if (subject.name, row["seed"], row["lr"]) not in there:
                run = subject.labelled(subject.opening, subject.start, (row["lr"], row["warmup"]), row["seed"])
                branched = subject.branched and row["seed"] < BRANCHED
                jobs.append((run, BRANCHES[options.preset] if branched else NONE))
    with (
        joblib.parallel_config("loky", inner_max_num_threads=1),
        Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as bar,
    ):
        progress = bar.add_task("measured runs", total=len(jobs))
        found = joblib.Parallel(n_jobs=workers, return_as="generator")(joblib.delayed(measured)(*job) for job in jobs)
        for (run, _), tables_ in zip(jobs, found, strict=True):
            names = {"task": dict(run.labels)["task"], "seed": run.seed, "lr": run.arm.lr}
            for name, table in zip(kept, tables_, strict=True):
                kept[name] = pd.concat([kept[name], table.assign(**names)], ignore_index=True)
            bar.advance(progress)
    for name, table in kept.items():
        numbers = {column: "float32" for column in KEPT if column in table and name == "windows"}
        table = table.astype(numbers)
        table.attrs = {"provenance": provenance()}
        write_atomically(table, folder / f"{name}.parquet")


def _there(path: Path) -> pd.DataFrame:
    return read_table(path) if path.is_file() else pd.DataFrame({"task": [], "seed": [], "lr": []})


# --- what it says ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """Fixed batches of a task, and the noise of its measured runs.

    Attributes:
        start: ``n0``.
        opening: Budget of the measured run.
        target: Log loss of the measured run, one a seed.
        losses: Of each other batch its budgets, ascending, and ``[budgets, seeds]`` of log losses.
        scales: ``B`` of each seed's run; NaN where it holds no evidence.
    """

    start: int
    opening: float
    target: np.ndarray
    losses: Mapping[int, tuple[np.ndarray, np.ndarray]]
    scales: np.ndarray

    def updates(self, seeds: np.ndarray) -> np.ndarray:
        """``S(n)`` of each other batch, of the mean log loss over some seeds."""
        target = float(self.target[seeds].mean())
        return np.array(
            [budget_for(b, loss[:, seeds].mean(axis=1), target) / n for n, (b, loss) in self.losses.items()]
        )

    def predicted(self, scales: np.ndarray) -> np.ndarray:
        """``[seeds, batches]`` from the noise scale of each seed's run."""
        n, b = np.array(list(self.losses), float), scales[:, None]
        with np.errstate(invalid="ignore"):
            factor = np.where(np.isinf(b), self.start / n, (1.0 + b / n) / (1.0 + b / self.start))
        return self.opening / self.start * factor

    def error(self, scales: np.ndarray) -> Interval:
        """P1: ``exp`` of the median absolute log error, with its interval over seeds."""
        rng, count = np.random.default_rng(0), len(self.target)
        draws = [np.arange(count), *(rng.integers(count, size=count) for _ in range(RESAMPLES))]
        found = []
        for seeds in draws:
            with np.errstate(divide="ignore"):
                logs = np.abs(np.log(self.predicted(scales[seeds])) - np.log(self.updates(seeds)))
            found.append(np.exp(np.median(np.nan_to_num(logs, nan=math.inf, posinf=math.inf))))
        low, high = np.quantile(found[1:], [0.025, 0.975], method="closest_observation")
        return Interval(float(found[0]), float(low), float(high), "bootstrap")


def sweep_of(runs: pd.DataFrame, windows: pd.DataFrame) -> Sweep:
    """Of one task, on the seeds that all have."""
    start = int(runs["start"].iloc[0])
    first = runs[runs["batch"] == start].set_index("seed")
    seeds = sorted(set(first.index) & set(windows["seed"]))
    losses = {}
    for n, own in runs[runs["batch"] != start].groupby("batch"):
        table = np.log(own.pivot_table(index="budget", columns="seed", values="test_loss").reindex(columns=seeds))
        table = table.dropna()
        losses[int(n)] = (table.index.to_numpy(float), table.to_numpy(float))  # type: ignore[call-overload]
    scales = [_scale(windows[windows["seed"] == seed])[0] for seed in seeds]
    budget = float(first["budget"].iloc[0])
    return Sweep(start, budget, np.log(first.loc[seeds, "test_loss"].to_numpy(float)), losses, np.array(scales))


def _scale(windows: pd.DataFrame) -> tuple[float, float, float]:
    """``B`` of a run as ``plan`` has it, with its interval; NaN where it holds no evidence."""
    try:
        return critical_scale(integrated_noise(windows.reset_index(drop=True)), 1.0, 0.95)
    except ValueError:
        return math.nan, math.nan, math.nan


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """What each batch took and what was predicted, recommendations followed, branches, and the claims."""
    runs = load(NAME, folder=folder.parent)
    if "task" not in runs:
        return {}
    windows, branches = _there(folder / "windows.parquet"), _there(folder / "branches.parquet")
    predictions, followed, beside, claimed = [], [], [], []
    for name, part in runs.dropna(subset="task").groupby("task", sort=False):
        own, cut = windows[windows["task"] == name], branches[branches["task"] == name]
        if not len(own):
            continue
        sweep, factor = sweep_of(part, own), calibration(cut)
        predictions.append(prediction_table(sweep, factor, own).assign(task=name))
        followed.append(follow(sweep, own).assign(task=name))
        beside.append(blind(sweep).assign(task=name))
        claimed += claims(str(name), sweep, factor, followed[-1], cut)
    if not predictions:
        return {}
    found = {"predictions": pd.concat(predictions, ignore_index=True), "blind": pd.concat(beside, ignore_index=True)}
    if any(map(len, followed)):
        found["followed"] = pd.concat(followed, ignore_index=True)
    if len(branches):
        found["ratios"] = ratios(branches)
    return found | {"claims": pd.DataFrame(claimed)}


def blind(sweep: Sweep) -> pd.DataFrame:
    """The same error of predictors that measure nothing."""
    rows = []
    for way, scale in (("as many updates", 0.0), ("as many examples", math.inf)):
        found = sweep.error(np.full(len(sweep.scales), scale))
        rows.append({"predictor": way, "error": found.value, "low": found.low, "high": found.high})
    return pd.DataFrame(rows)


def calibration(branches: pd.DataFrame) -> float:
    """The geometric mean of the branches' factors; NaN where there are none."""
    known = branches["calibration"].dropna() if len(branches) else pd.Series(dtype=float)
    return float(np.exp(np.log(known[known > 0.0]).mean()))


def prediction_table(sweep: Sweep, factor: float, windows: pd.DataFrame) -> pd.DataFrame:
    """A row for each batch but ``n0``: updates for the measured run's loss, and what was predicted."""
    seeds = np.arange(len(sweep.target))
    table = pd.DataFrame({"start": sweep.start, "batch": list(sweep.losses), "updates": sweep.updates(seeds)})
    scales = np.array([_scale(own) for _, own in windows.groupby("seed")])
    ways = {
        "predicted": sweep.predicted(sweep.scales),
        "low": sweep.predicted(scales[:, 1]),
        "high": sweep.predicted(scales[:, 2]),
        "calibrated": sweep.predicted(factor * sweep.scales),
        "equal updates": sweep.predicted(np.zeros(len(seeds))),
        "equal examples": sweep.predicted(np.full(len(seeds), math.inf)),
    }
    for way, found in ways.items():
        table[way] = np.exp(np.nanmean(np.log(found), axis=0)) if np.isfinite(found).any() else math.nan
    # Between two ends of an interval updates fall or rise with B, on either side of n0.
    table[["low", "high"]] = np.sort(table[["low", "high"]].to_numpy(), axis=1)
    known = sweep.scales[np.isfinite(sweep.scales)]
    return table.assign(B=float(known.mean()) if len(known) else math.nan, opening=sweep.opening)


def follow(sweep: Sweep, windows: pd.DataFrame) -> pd.DataFrame:
    """P3: of each seed's run the batch that a plan recommends, and its modelled time on the other seeds.

    Returns:
        ``seed``, ``devices``, ``batch``, ``best`` (of the sweep, on the other seeds), ``time`` over that of the best,
        and ``worst``, of the sweep's worst batch.
    """
    micro = sweep.start / STEPS
    model = TimeModel(FIXED, 1.0 / micro, SYNC)
    batches = np.array([sweep.start, *sweep.losses], float)
    rows = []
    for index, (seed, own) in enumerate(windows.groupby("seed")):
        others = np.delete(np.arange(len(sweep.target)), index)
        updates = np.array([sweep.opening / sweep.start, *sweep.updates(others if len(others) else np.array([index]))])
        for devices in DEVICES:
            held = batches >= devices * micro / PARTS
            try:
                found = ab.plan(
                    own,
                    batches[held],
                    devices,
                    micro_batch=micro / PARTS,
                    seconds_per_step=FIXED,
                    seconds_per_example=1.0 / micro,
                    seconds_per_sync=SYNC,
                )
            except ValueError:
                continue
            times = np.array([model.seconds(float(n), devices) for n in batches[held]]) * updates[held]
            taken = times[batches[held] == found.recommended.batch][0]
            row = {"seed": seed, "devices": devices, "batch": found.recommended.batch, "time": taken / times.min()}
            rows.append(row | {"best": batches[held][times.argmin()], "worst": times.max() / times.min()})
    return pd.DataFrame(rows)


def ratios(branches: pd.DataFrame) -> pd.DataFrame:
    """P2: the critical batch over the noise scale of each channel, at each point."""
    rows = branches[["task", "seed", "at", "critical", "excluded", "smallest", "largest", "calibration"]].copy()
    for channel in CHANNELS:
        rows[channel] = branches["critical"] / branches[channel]
    return rows


def claims(
    task: str, sweep: Sweep, factor: float, followed: pd.DataFrame, branches: pd.DataFrame
) -> list[dict[str, object]]:
    """P1 to P3 of one task."""
    alone = sweep.error(sweep.scales)
    said = "median error of predicted updates, as a factor,"
    rows = [claim_row("P1", f"{said} is below 1.5", task, alone, BOUNDS["alone"])]
    if math.isfinite(factor):
        found = sweep.error(factor * sweep.scales)
        rows.append(claim_row("P1", f"{said} calibrated by branches is below 1.25", task, found, BOUNDS["calibrated"]))
    if len(branches):
        for channel, ratios_ in ratios(branches)[list(CHANNELS)].items():
            rows.append(
                claim_row("P2", f"critical batch over B, {channel}: scatter is below 2", task, scatter(ratios_), STEADY)
            )
    for devices, own in followed.groupby("devices") if len(followed) else ():
        found, _ = ratio(own["time"].to_numpy(float), np.ones(len(own)))
        rows.append(
            claim_row(
                "P3",
                f"time of the recommended batch over the best's, devices: {devices}, is below 1.10",
                task,
                found,
                NEAR,
            )
        )
    return rows


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


def draw(folder: Path) -> None:
    """What was predicted and what it took; nothing before a task is measured."""
    found = tables(folder)
    if found:
        draw_plans(found, _there(folder / "windows.parquet"), folder)


STUDY = Study(
    NAME,
    "is a plan true: updates of every batch predicted from one run, against tuned fixed batches",
    plan,
    tables,
    measure=measure,
    figures=draw,
    order=4.5,
)
