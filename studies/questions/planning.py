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
than they are; a rate at which a run diverges is left for the search's next best, as in the sweep (its runs have the
stage ``diverged``). The calm network on MNIST and the transformer wait for their studies' sweeps; of other tasks the
searches that :mod:`studies.questions.live` would make are made here.

What changed after runs had been seen: first, batches of 64 to 256 had a warm-up over 5 % to choose, others none, and
512 and 1024 took 1.51 and 1.79 of the updates that were foretold (the table ``before``). Since then the sweep tries
warm-ups over 20 and 40 % for batches of 64 and more, and the claims are judged by it.

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

Plan, on one core: the calm network on MNIST and the transformer have been run, in 2.2 hours. The noisy network 1.5 to 2
hours, Fashion-MNIST and Shuttle, without branches, 1.5 each; 80 minutes of each are its searches (190 runs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from rich.progress import Progress, TimeElapsedColumn

from studies.engine.metering import KEPT, NONE, Branches, measured
from studies.engine.results import load, read_table, write_atomically
from studies.engine.runner import Run, provenance
from studies.engine.sweep import Found, Options, Study
from studies.engine.tuning import Search, planned
from studies.output import predictions
from studies.output.fronts import BEFORE
from studies.output.plan_figure import draw_plans
from studies.questions import live, transformer
from studies.questions.live import Tuned

NAME = "planning"
SEEDS = {"smoke": 2, "laptop": 5, "paper": 5}
REACH = 8
BRANCHES = {"smoke": Branches((0.4,), (2, 4), 4, 2), "laptop": Branches(), "paper": Branches()}
# On so many of the seeds.
BRANCHED = 2
# The largest batch that had any warm-up to choose at first.
FIRST_WARMED = 256


@dataclass(frozen=True)
class Subject:
    """A task whose sweep another study has.

    Attributes:
        name: Of the task.
        data: Its data set.
        start: ``n0``, the batch of the measured run.
        budget: Of the sweep.
        batches: Of the sweep, that are compared.
        searches: Of the sweep, for the rates of a batch.
        ranked: A batch's rates and shares of the warm-up, from the best on, once they are finished.
        run: A fixed batch's run: budget, batch, rate and share, seed.
        earlier: What a batch took while it had short warm-ups at most to choose; None: that is not asked.
        part: Of the sweep's budget that the measured run has, one of so many.
        branched: Whether it has branches.
        waits: Whether the sweep is left to its own study.
    """

    name: str
    data: str
    start: int
    budget: int
    batches: tuple[int, ...]
    searches: Callable[[int, Found], Mapping[float, Search]]
    ranked: Callable[[int, Found], Sequence[Tuned]]
    run: Callable[[int, int, Tuned, int], Run]
    earlier: Callable[[int, Found], Tuned] | None = None
    part: int = 4
    branched: bool = True
    waits: bool = True

    @property
    def opening(self) -> int:
        """Budget of the measured run."""
        return self.budget // self.part

    def labelled(self, budget: int, batch: int, tuned: Tuned, seed: int) -> Run:
        """A run with its labels."""
        labels = {"stage": "final", "task": self.name, "budget": budget, "batch": batch, "start": self.start}
        labels |= {"lr": tuned[0], "warmup": tuned[1], "fixed": 1}
        return replace(self.run(budget, batch, tuned, seed), labels=tuple(labels.items()))

    def seeded(self, budget: int, batch: int, tuned: Tuned, seeds: range) -> list[Run]:
        """One for each seed."""
        return [self.labelled(budget, batch, tuned, seed) for seed in seeds]


def subjects(options: Options) -> list[Subject]:
    """The calm and the trainable noisy network, the transformer; other data sets after."""
    settings = [live.HOME, live.Setting("noisy scaled")]
    away = [live.Setting("calm", "fashion"), live.Setting("calm", "shuttle")]
    if options.preset == "smoke":
        settings, away = settings[:1], []
    ordered = [
        *(_autoencoder(setting, options.preset) for setting in settings),
        _language(options.preset),
        *(replace(_autoencoder(setting, options.preset), branched=False) for setting in away),
    ]
    if options.preset == "smoke":
        ordered = [replace(subject, waits=False) for subject in ordered]
    return [subject for subject in ordered if not options.data or subject.data in options.data]


def _autoencoder(setting: live.Setting, preset: str) -> Subject:
    scale = live.SCALES[preset]
    data, batches = setting.data or scale.home, _powers(scale.batches)

    def run(budget: int, batch: int, tuned: Tuned, seed: int) -> Run:
        arm = live.fixed_arm(setting, own := replace(scale, examples=budget), batch, tuned[1])(tuned[0])
        return live.labelled("final", setting, own, arm, seed, batch)

    def earlier(n: int, found: Found) -> Tuned:
        shares = live.SHORT[: 1 + (n <= FIRST_WARMED)]
        return next(reversed(live.reported(setting, scale, n, range(scale.seeds), found, shares)))

    return Subject(
        f"{setting.network}, {data}",
        data,
        live.START,
        scale.examples,
        batches,
        partial(live.searched, setting, scale),
        partial(live.ranked, setting, scale),
        run,
        earlier if setting.whole and preset != "smoke" else None,
        waits=setting.whole,
    )


def _language(preset: str) -> Subject:
    scale, small = transformer.SCALES[preset], transformer.SMALL
    batches = _powers(scale.batches)

    def run(budget: int, batch: int, tuned: Tuned, seed: int) -> Run:
        return transformer.fixed_run(replace(small, millions=budget / scale.million), scale, batch, tuned, seed)

    return Subject(
        "transformer",
        "kjv",
        transformer.START,
        small.budget(scale),
        batches,
        partial(transformer.searched, small, scale),
        partial(transformer.ranked, small, scale),
        run,
        # Of a quarter, the warm-up would be nearly half.
        part=2,
    )


def _powers(batches: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for n in batches if n & (n - 1) == 0)


def plan(options: Options, found: Found) -> list[Run]:
    """The sweeps that wait for no other study; of every task whose sweep is there, budgets around its measured run."""
    runs: list[Run] = []
    for subject in subjects(options):
        if not subject.waits:
            runs += planned((subject.searches(n, found) for n in subject.batches), found)
        if all(subject.ranked(n, found) for n in subject.batches):
            runs += _swept(subject, range(options.seeds or SEEDS[options.preset]), found)
    return runs


def _swept(subject: Subject, seeds: range, found: Found) -> Iterator[Run]:
    """The measured run, and of every other batch budgets until they bracket its loss."""

    def opening(tuned: Tuned) -> list[Run]:
        return subject.seeded(subject.opening, subject.start, tuned, seeds)

    measured, left = _settled(subject, subject.start, opening, found)
    yield from measured + left
    target = _log_loss(measured, found)
    for n in subject.batches:
        if n != subject.start:
            brackets = partial(_bracketed, subject, n, seeds, target, found)
            counted, left = _settled(subject, n, brackets, found)
            yield from counted + left
            if subject.earlier is not None:
                earlier = brackets(subject.earlier(n, found))
                yield from (live.restaged(run, BEFORE) for run in earlier if run not in counted)


def _bracketed(subject: Subject, n: int, seeds: range, target: float | None, found: Found, tuned: Tuned) -> list[Run]:
    # The sweep's own runs are there.
    budgets = [subject.opening if n < 4 * subject.start else subject.budget]
    while target is not None:
        losses = [_log_loss(subject.seeded(budget, n, tuned, seeds), found) for budget in budgets]
        wanted = None if None in losses else next_budget(budgets, losses, target)  # type: ignore[arg-type]
        if wanted is None or not subject.budget / REACH <= wanted <= subject.budget * REACH:
            break
        budgets = sorted([*budgets, wanted])
    return [run for budget in budgets for run in subject.seeded(budget, n, tuned, seeds)]


def _settled(subject: Subject, n: int, runs: Callable[[Tuned], list[Run]], found: Found) -> tuple[list[Run], list[Run]]:
    """The runs of the best rate at which none diverges, or of the last, and what there is of those at better ones."""
    left: list[Run] = []
    *others, last = subject.ranked(n, found)
    for tuned in others:
        own = runs(tuned)
        if not any(row["diverged"] for run in own if (row := found.get(run)) is not None):
            return own, left
        left += [live.restaged(run, "diverged") for run in own if run in found]
    return runs(last), left


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


def measure(options: Options, workers: int, folder: Path) -> None:
    """Write ``windows.parquet`` and ``branches.parquet``: what is not there yet of the runs that are."""
    runs = load(NAME, folder=folder.parent) if (folder / "runs.parquet").is_file() else pd.DataFrame({"task": []})
    kept = {name: _there(folder / f"{name}.parquet") for name in ("windows", "branches")}
    there = set(map(tuple, kept["windows"].drop_duplicates(["task", "seed", "lr"])[["task", "seed", "lr"]].values))
    jobs = []
    for subject in subjects(options):
        own = runs[(runs["task"] == subject.name) & (runs["stage"] == "final")] if len(runs) else runs
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


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """What each batch took and what was predicted, recommendations followed, branches, and the claims."""
    runs = load(NAME, folder=folder.parent)
    return predictions.tables(runs, _there(folder / "windows.parquet"), _there(folder / "branches.parquet"))


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
