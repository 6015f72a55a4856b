"""``python -m studies``: run a study, show its table, write its results and figure."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import tyro
from rich.progress import Progress, TimeElapsedColumn

from studies.engine import ranks
from studies.engine.analysis import summary
from studies.engine.provenance import record
from studies.engine.results import RESULTS, write_atomically
from studies.engine.runner import RUNS, provenance, run_all
from studies.engine.sweep import Cluster, Preset, Study
from studies.output.figures import closed_loop_figure, quick_figure
from studies.output.plan_figure import quick_plan
from studies.questions import catalogue
from studies.questions import quick as quick_study
from studies.questions import two_networks as two_networks_study

Data = Literal["mnist", "fashion", "shuttle", "digits"]
# The text ships with the project.
Known = Data | Literal["kjv"]
Name = Annotated[str, tyro.conf.arg(help="of a study that `list` names")]

app = tyro.extras.SubcommandApp()


@app.command
def quick(
    out: Path = RUNS / "quick",
    seed: int = 0,
    examples: Annotated[int, tyro.conf.arg(help="training examples of each arm")] = quick_study.TASK.examples,
    workers: Annotated[int, tyro.conf.arg(help="processes, one thread each")] = 2,
    fresh: Annotated[bool, tyro.conf.arg(help="run all arms again, stored or not")] = False,
) -> None:
    """The main job: four ways to choose the batch, one 80-layer residual VAE on MNIST; finished arms are kept."""
    started = time.perf_counter()
    runs = quick_study.runs(seed, examples)
    if ranks.world_size() > 1 and out == RUNS / "quick":
        out = out.with_name(f"quick-{ranks.world_size()}-ranks")
    if fresh:
        for path in (out / "results.parquet", *(run.path(out) for run in runs)):
            path.unlink(missing_ok=True)
    # Where arms are kept from before, so is what is said of their code.
    if ranks.rank() == 0 and not any(run.stored(out) is not None for run in runs):
        record("quick", out)
    with ranks.group():
        results = run_all(runs, out, workers)
    if ranks.rank() > 0:
        return
    show(summary(results).drop(columns="seed"), "80-layer residual VAE on MNIST, validation loss on a fixed probe set")
    title = f"80-layer residual VAE on MNIST, {examples:,} examples, seed {seed}"
    quick_figure(
        results,
        out / "figure.png",
        adaptive=quick_study.ADAPTIVE,
        title=title,
        micro_batch=quick_study.MICRO_BATCH,
        collapsed=quick_study.TASK.collapsed_loss(),
    )
    try:
        quick_plan(results, out / "plan.png", *quick_study.PLANNED)
        drawn = f"{out / 'figure.png'}, {out / 'plan.png'}"
    except ValueError as error:
        # A run cut short by --examples holds no evidence.
        drawn = f"{out / 'figure.png'}; no plan: {error}"
    print(f"table   {out / 'results.parquet'}  ({len(results):,} optimizer steps, schema in studies/engine/schema.py)")
    print(f"figures {drawn}")
    print(f"took    {time.perf_counter() - started:.0f} s")


@app.command
def overhead(
    out: Path = RUNS / "overhead",
    rounds: Annotated[int, tyro.conf.arg(help="windows of each contender")] = 60,
    windows: Annotated[int, tyro.conf.arg(help="windows for the bias of the estimates")] = 1000,
) -> None:
    """What the controller costs and how right it is: time, memory and host reads against peers, bias of estimates."""
    from studies.questions import overhead as study
    from studies.questions.overhead import accuracy, profile
    from studies.questions.overhead.settings import MICRO_BATCH, STEPS, WIDTH

    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as bar:
        task = bar.add_task("windows, interleaved", total=rounds)
        seconds = study.measure_time(rounds, report=lambda done: bar.update(task, completed=done))
    seconds = pd.concat([seconds, study.measure_ranks_time(rounds)], ignore_index=True)
    times = study.ratios(seconds).merge(study.measure_cost(), how="left")
    with study.one_thread():
        parts = profile.measure(rounds)
    bias = accuracy.measure(windows)
    show(
        times,
        f"one window: {STEPS} micro-batches of {MICRO_BATCH}, 80 layers of width {WIDTH} unless named, one thread",
    )
    show(parts, "where a window's time goes, by the share of windows that are measured")
    reduced = study.all_reduce_seconds().astype({"ranks": str})
    show(reduced, "a window's one all-reduce on paper: 16 doubles, 10 us and 25 GB/s between two ranks")
    show(bias.drop(columns="windows"), f"estimates against the exact per-example covariance, {windows} windows")
    for name, table in (("time", seconds), ("cost", times), ("profile", parts), ("bias", bias)):
        table.attrs = {"provenance": provenance()}
        write_atomically(table, out / f"{name}.parquet")
    record("overhead", out)
    print(f"tables  {out}")


@app.command(name="two-networks")
def two_networks(
    network: Annotated[two_networks_study.Network | None, tyro.conf.arg(help="one of them; all if not given")] = None,
    seeds: Annotated[int | None, tyro.conf.arg(help="seeds 0 to this, less one; the study's own if not given")] = None,
    out: Path = RUNS / "two-networks",
    workers: Annotated[int, tyro.conf.arg(help="processes, one thread each")] = 2,
) -> None:
    """One rule on a noisy and on a well-behaved network, against fixed batches; finished runs are kept."""
    from adaptbatch.estimate.typical import EXCEEDANCE
    from studies.output.channel_figure import channel_figure
    from studies.questions.two_networks.channel_designs import designs

    study, tables, verdicts = two_networks_study, {}, []
    for name in study.TASKS if network is None else (network,):
        tables[name] = run_all(study.runs(name, seeds or study.SEEDS[name]), out / name, workers)
        show(summary(tables[name]).astype({"seed": str}), f"{name} network, 80-layer residual VAE on MNIST")
        verdicts.append(study.verdict(tables[name], name).assign(network=name))
        show(verdicts[-1].astype({"meets": str}), f"{name} network, over seeds")
        print(f"table   {out / name / 'results.parquet'}")
    others = pd.concat([designs(table).assign(network=name) for name, table in tables.items()], ignore_index=True)
    show(others, "what other statistics say of the fixed arms, medians over seeds")
    # What is said of one network does not replace what is said of all.
    place = out if network is None else out / network
    write_atomically(others, place / "designs.parquet")
    write_atomically(pd.concat(verdicts, ignore_index=True), place / "verdict.parquet")
    smallest = {name: f"fixed {study.BATCHES[name][0]}" for name in tables}
    channel_figure(tables, place / "figure.png", smallest=smallest, exceedance=EXCEEDANCE)
    print(f"figure  {place / 'figure.png'}")


@app.command(name="closed-loop")
def closed_loop(
    out: Path = RUNS / "closed-loop",
    seeds: Annotated[int, tyro.conf.arg(help="seeds 0 to this, less one")] = 5,
    workers: int = 2,
) -> None:
    """Every rule against a noise scale that is known: switches, reversals, error, lag."""
    from studies.questions import closed_loop as study

    runs, windows = study.run_study(seeds, workers)
    table = study.table(runs)
    for rule, shown in table.groupby("rule", sort=False):
        show(shown.drop(columns="rule"), f"{rule}: {study.RULES[rule]!r}, means over {seeds} seeds")
    table.attrs = {"provenance": provenance()}
    write_atomically(table, out / "table.parquet")
    record("closed-loop", out)
    moving = [profile.name for profile in study.PROFILES if profile.moving]
    closed_loop_figure(windows, table, out / "figure.png", cell=study.CELL, moving=moving)
    print(f"table   {out / 'table.parquet'}\nfigure  {out / 'figure.png'}")


@app.command
def calibration(
    out: Path = RUNS / "calibration",
    runs: Annotated[int, tyro.conf.arg(help="intervals of each case")] = 4000,
    repeats: Annotated[int, tyro.conf.arg(help="runs of every estimator on each problem")] = 40,
    workers: Annotated[int, tyro.conf.arg(help="processes, one thread each")] = 2,
) -> None:
    """Do the 95 % intervals cover the truth, and is any peer's estimator closer to it?"""
    from studies.output.figures import calibration_figure
    from studies.questions import calibration as study

    tables = study.run(repeats=repeats, runs=runs, workers=workers)
    for name, table in tables.items():
        print(f"\n{name}\n\n{table.to_string(index=False, float_format=lambda x: f'{x:.3f}')}\n")
        table.attrs = {"provenance": provenance()}
        write_atomically(table, out / f"{name}.parquet")
    record("calibration", out)
    calibration_figure(tables["coverage"], tables["error"], out / "figure.png")
    print(f"tables  {out}\nfigure  {out / 'figure.png'}")


@app.command(name="list")
def list_studies() -> None:
    """The studies of many runs, for ``run``, ``status`` and ``report``."""
    for study in catalogue().values():
        print(f"{study.name:<12} {study.about}")


@app.command
def run(
    name: tyro.conf.Positional[Name],
    preset: Preset = "laptop",
    seeds: Annotated[int | None, tyro.conf.arg(help="of the reported runs; the preset's if not given")] = None,
    data: Annotated[tuple[Known, ...], tyro.conf.arg(help="data sets; the study's if not given")] = (),
    workers: Annotated[int, tyro.conf.arg(help="processes here, or jobs at once on a cluster")] = 2,
    device: Annotated[str, tyro.conf.arg(help="cpu, cuda (all GPUs in turn), cuda:1")] = "cpu",
    cluster: Annotated[Cluster, tyro.conf.arg(help="submit with submitit; local tries its way here")] = "none",
    partition: Annotated[str | None, tyro.conf.arg(help="of the cluster")] = None,
    minutes: Annotated[int, tyro.conf.arg(help="time limit of a cluster job")] = 240,
    store: Annotated[Path, tyro.conf.arg(help="where runs are kept; machines may share it")] = RUNS / "store",
    out: Annotated[Path | None, tyro.conf.arg(help="where the study's tables go; runs/PRESET if not given")] = None,
) -> None:
    """Run what is missing of a study, here or on a cluster, and show its tables; finished runs are kept."""
    from studies.engine.sweep import Options, Where, carry_out

    study, options = _study(name), Options(preset, seeds, data)
    carry_out(study, options, Where(workers, device, cluster, minutes, partition), out, store)
    _report(study, study.folder(options, out))


@app.command
def status(
    name: tyro.conf.Positional[Name],
    preset: Preset = "laptop",
    seeds: int | None = None,
    data: tuple[Known, ...] = (),
    store: Path = RUNS / "store",
) -> None:
    """How much of a study is done, by stage, as far as its runs can be named now."""
    from studies.engine.sweep import Found, Options, committed

    found = Found(store, committed())
    runs = _study(name).plan(Options(preset, seeds, data), found)
    if not runs:
        print(f"{name} has no run that can be named now: it measures in one go, or waits for another's sweep.")
        return
    rows = pd.DataFrame({"stage": dict(run.labels)["stage"], "finished": run in found} for run in runs)
    table = rows.groupby("stage", sort=False)["finished"].agg(finished="sum", known="size").reset_index()
    print(table.to_string(index=False))


@app.command
def report(
    what: tyro.conf.Positional[
        Annotated[tuple[str, ...], tyro.conf.arg(help="a study, or histories' Parquet files; all studies if not given")]
    ] = (),
    results: Annotated[
        Path, tyro.conf.arg(help="where studies have written; the committed results if not given")
    ] = RESULTS,
    html: Annotated[Path, tyro.conf.arg(help="folder of the page")] = RUNS / "report",
) -> None:
    """Tables and figures of a study and one page that shows them; or a page of your own runs."""
    from studies.output import pages

    studies = catalogue()
    files = [Path(one) for one in what if one not in studies]
    if files:
        missing = [str(path) for path in files if not path.is_file()]
        if missing or len(files) < len(what):
            raise SystemExit(f"what must be studies ({', '.join(studies)}) or files, got {missing or list(what)}.")
        print(f"page    {pages.own_page(files, html / f'{files[0].stem}.html')}")
        return
    for name in what or [name for name in studies if (results / name / "runs.parquet").is_file()]:
        _report(studies[name], results / name)
        if (results / name / "runs.parquet").is_file():
            print(f"page    {pages.study_page(name, studies[name].about, results, html / f'{name}.html')}")


@app.command
def fetch(name: tyro.conf.Positional[Data]) -> None:
    """Download a data set into the user's cache, and verify it."""
    from studies import data as data_sets

    print(f"{name} is in {data_sets.fetch(name)}")


def _study(name: str) -> Study:
    studies = catalogue()
    if name not in studies:
        raise SystemExit(f"name must be a study ({', '.join(studies)}), got {name!r}.")
    return studies[name]


def _report(study: Study, folder: Path) -> None:
    for title, table in study.tables(folder).items():
        print(f"\n{study.name}: {title}\n\n{table.to_string(index=False, float_format=lambda x: f'{x:.4g}')}")
        write_atomically(table, folder / f"{title}.parquet")
    study.figures(folder)
    print(f"\nfolder  {folder}")


@app.command
def readme() -> None:
    """Write the numbers of README.md from the committed results, and draw its plan."""
    from studies.output import readme as page

    page.write()
    quick_plan(
        pd.read_parquet(RESULTS / "quick" / "results.parquet"), RESULTS / "quick" / "plan.png", *quick_study.PLANNED
    )


def show(table: pd.DataFrame, title: str) -> None:
    """Print a table whose numbers are formatted by their column's kind."""
    kinds = {
        "examples": ",.0f",
        "updates": ",.0f",
        "mean n": ",.0f",
        "tree us": ",.0f",
        "ring us": ",.0f",
        "spikes": ".0f",
        "limits": ".0%",
    }
    kinds |= {"lr": ".0e", "wall s": ".0f", "window ms": ".1f", "host reads": ".0f", "extra bytes": ",.0f"}
    kinds |= {"ratio": ".3f", "ratio low": ".3f", "ratio high": ".3f", "bias %": "+.2f", "bias in SE": "+.2f"}
    kinds |= {"exact": ".4g", "mean estimate": ".4g", "switches": ".1f", "reversals": ".1f", "lag": ",.0f"}
    kinds |= {"of best fixed": ".3f", "paired": ".3f", "paired low": ".3f", "paired high": ".3f", "of smallest": ".1%"}
    kinds |= {"rms log error": ".3f", "at limits": ".0%", "most switches": ".0f"}
    kinds |= {"noise floor": ".1%", "guard": ".1%"}
    texts = {name: [_text(value, kinds.get(name, ".2f")) for value in table[name]] for name in table}
    print(f"\n{title}\n\n{pd.DataFrame(texts).to_string(index=False)}\n")


def _text(value: object, kind: str) -> str:
    return value if isinstance(value, str) else f"{value:{kind}}"


if __name__ == "__main__":
    app.cli(prog="python -m studies", description=__doc__)
