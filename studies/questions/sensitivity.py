"""How wide is the range in which each method works? Loss against the rate, and against each method's own knob.

The origin rejected learning-rate warmup because it is sensitive to its hyper-parameters. Measured here: the learning
rate over three decades for every method of :mod:`studies.questions.comparison` (its tuning runs), and at each method's
best rate its own knob: the length of the warmup and of the ramp, the clipping norm, theta, and adaptive's micro-batch.

* S1: the share of a knob's values over its range whose ``final`` is within 10 % of the knob's best is larger for theta
  than for the warmup's length.
* S2: the same for the learning rate, adaptive against warmup and against the best fixed batch: mean regret over the
  trials.

Those rates are constant, and theta was varied where it made no difference. *calm, decaying* is the setting of
:mod:`studies.questions.live` (micro-batch 16, a rate that falls linearly to zero), three values of theta with a rate
that follows the root of the batch and two fixed batches with a warm-up, at seven rates over three decades, on five
seeds. The coupling's reference needs no runs of its own: rate and reference enter as ``lr sqrt(n / reference)``, so
that another reference is another rate. Losses are ``test_loss``, at most four times the smallest of all. Registered
before its runs:

* S3: the mean loss over the three decades of ``theta 0.7, root`` over that of the fixed batch that is best there, seed
  by seed, is below 1.
* S4: theta is no second rate to tune: between 0.5 and 1.0, each at its best rate, losses differ by less than 10 %.
* S5: a reference that is ten times too large or too small, the next rate down or up, costs theta 0.7 less than 10 %.

Plan: 21 x 5 runs of 70 s and 7 x 5 of 29 and of 15 s: 2.5 hours on one core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

import adaptbatch as ab
from studies.engine.arms import Arm, Warmup
from studies.engine.results import load
from studies.engine.runner import Run
from studies.engine.sweep import SHARED, Found, Options, Study, from_runs
from studies.output.statistics import Interval, ratio
from studies.output.style import STYLE, save, short
from studies.output.verdicts import tuning as tuning_table
from studies.questions import comparison, live
from studies.questions.comparison import ADAPTIVE, METHODS, Network, choose, task, tuning

WITHIN = 1.10
DECIDING_SEEDS = 5
KNOBS: Mapping[str, tuple[str, tuple[float, ...], Callable[[Arm, float], Arm]]] = {
    "theta": (
        ADAPTIVE,
        (0.25, 0.5, 1.0, 2.0, 4.0),
        lambda arm, value: replace(arm, rule=ab.RelativeStandardError(value)),
    ),
    "warmup length": (
        "warmup",
        (1e3, 4e3, 16e3, 64e3, 128e3),
        lambda arm, value: replace(arm, schedule=Warmup(value)),
    ),
    "ramp length": (
        "ramp",
        (4e3, 16e3, 32e3, 64e3, 128e3),
        lambda arm, value: replace(arm, rule=ab.Ramp(1, 16, value)),
    ),
    "clipping norm": ("clip", (0.1, 1.0, 10.0, 100.0, 1000.0), lambda arm, value: replace(arm, clip=value)),
}
MICRO_BATCHES = (32, 64, 128, 256)
DECAYING, THETAS, DECAYED = "calm, decaying", (0.5, 0.7, 1.0), (64, 256)
RATES = (1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2, 3.2e-2, 1e-1)
DEFAULT, WORST, CLOSE = 0.7, 4.0, 1.10
SEEDS: dict[str, tuple[int, ...]] = {"smoke": (0,), "laptop": (0, 1), "paper": tuple(range(10))}


def plan(options: Options, found: Found) -> list[Run]:
    """The comparison's tuning, and each knob at the rate that it chose."""
    scale = comparison.SCALES[options.preset]
    data = (options.data or (scale.home,))[0]
    seeds = range(options.seeds) if options.seeds else SEEDS[options.preset]
    networks: tuple[Network, ...] = ("noisy", "calm")
    runs = []
    for network in networks:
        methods = {method.name: method for method in METHODS if network in method.networks}
        for method in methods.values():
            runs += list(tuning(method, network, data, scale))
        for knob, (name, values, change) in KNOBS.items():
            params = choose(methods[name], network, data, scale, found)
            if params is None:
                continue
            arm = methods[name].arm(params)
            for value in values:
                labels = {"stage": "knob", "network": network, "data": data, "method": name, "knob": knob}
                labels |= {"value": value}
                changed = replace(change(arm, value), name=f"{name}, {knob} {value:g}")
                runs += [_labelled(task(network, data, scale), changed, seed, labels) for seed in seeds]
        params = choose(methods[ADAPTIVE], network, data, scale, found)
        if params is not None:
            for size in MICRO_BATCHES:
                labels = {"stage": "knob", "network": network, "data": data, "method": ADAPTIVE, "knob": "micro-batch"}
                labels |= {"value": float(size)}
                arm = replace(methods[ADAPTIVE].arm(params), name=f"adaptive, micro-batch {size}")
                sized = replace(task(network, data, scale), micro_batch=size)
                runs += [_labelled(sized, arm, seed, labels) for seed in seeds]
    return [*runs, *decaying(options)]


def decaying(options: Options) -> Iterator[Run]:
    """Theta and two fixed batches over three decades of rates that decay, at the live study's micro-batch."""
    scale, setting = live.SCALES[options.preset], live.SETTINGS[0]
    schedule = setting.schedule(scale)
    methods = [live.Method(f"theta {theta:g}", ab.RelativeStandardError(theta)) for theta in THETAS]
    for seed in range(options.seeds or min(scale.seeds, DECIDING_SEEDS)):
        for lr in RATES:
            arms = [(method.arm(lr, schedule), 0) for method in methods]
            # A coupled rate begins at that of a small batch: it warms up, and so does theirs.
            arms += [(live.fixed_arm(setting, scale, n, live.WARMUP)(lr), n) for n in DECAYED]
            for arm, n in arms:
                run = live.labelled("decaying", setting, scale, arm, seed, n)
                yield replace(run, labels=tuple((dict(run.labels) | {"network": DECAYING}).items()))


def _labelled(task_: comparison.Task, arm: Arm, seed: int, labels: Mapping[str, str | float]) -> Run:
    return Run(SHARED, task_, arm, seed, tuple((labels | {"lr": arm.lr}).items()))


def tables(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Regret over the rates, and the width of every knob."""
    found = {"rates": tuning_table(runs[runs["stage"] == "tune"])}
    knobs = runs[runs["stage"] == "knob"]
    if len(knobs):
        found["knobs"] = widths(knobs)
    constant, ended = runs[runs["stage"] != "decaying"], runs[runs["stage"] == "decaying"]
    found["claims"] = claims(constant)
    if len(ended):
        found["decaying"] = over_rates(ended)
        found["claims"] = pd.concat([found["claims"], pd.DataFrame(decaying_claims(ended))], ignore_index=True)
    return found


def _name(theta: float) -> str:
    return f"theta {theta:g}, root"


def over_rates(ended: pd.DataFrame) -> pd.DataFrame:
    """Of each arm at each decaying rate: its loss, geometric mean over seeds, and its batch."""
    means = ended.assign(log=np.log(ended["test_loss"])).groupby(["arm", "lr"], sort=False)
    table = means.agg(log=("log", "mean"), seeds=("seed", "count"), **{"mean n": ("mean_batch", "mean")}).reset_index()
    return table.assign(loss=np.exp(table.pop("log")))


def decaying_claims(ended: pd.DataFrame) -> list[dict[str, object]]:
    """S3 to S5, seed by seed, on the seeds on which all arms have tried all rates."""
    # Arm by arm the losses, [seeds, rates].
    capped = ended.assign(loss=ended["test_loss"].fillna(math.inf).clip(upper=WORST * ended["test_loss"].min()))
    wide = capped.pivot_table(index="seed", columns=["arm", "lr"], values="loss").dropna()
    arms = [*map(_name, THETAS), *(f"fixed {n}" for n in DECAYED)]
    if not len(wide) or not set(arms) <= set(wide.columns.get_level_values("arm")):
        return []
    losses = {arm: wide[arm].sort_index(axis="columns").to_numpy(float) for arm in arms}
    means = {arm: own.mean(axis=1) for arm, own in losses.items()}
    best = {arm: int(np.log(own).mean(axis=0).argmin()) for arm, own in losses.items()}
    own, fixed = _name(DEFAULT), min(arms[len(THETAS) :], key=lambda arm: means[arm].mean())
    found, _ = ratio(means[own], means[fixed])
    rows = [_claim("S3", f"mean loss over the rates, {own} / {fixed}, is below 1", DECAYING, found, found.below(1.0))]
    ends = {arm: losses[arm][:, best[arm]] for arm in map(_name, THETAS)}
    ordered = sorted(ends, key=lambda arm: float(ends[arm].mean()))
    found, _ = ratio(ends[ordered[-1]], ends[ordered[0]])
    what = f"loss at the best rate, {ordered[-1]} / {ordered[0]} (worst / best theta), is below {CLOSE}"
    rows.append(_claim("S4", what, DECAYING, found, found.below(CLOSE)))
    for step, said in ((-1, "ten times too large"), (1, "ten times too small")):
        at = best[own] + step
        if 0 <= at < len(RATES):
            found, _ = ratio(losses[own][:, at], losses[own][:, best[own]])
            what = f"loss of {own} with a reference {said}, over that at its best rate, is below {CLOSE}"
            rows.append(_claim("S5", what, DECAYING, found, found.below(CLOSE)))
    return rows


def claims(runs: pd.DataFrame) -> pd.DataFrame:
    """S1 over the seeds, S2 over the rates that all methods were tried at.

    The bounds of S1 are its seeds' extremes; fewer than five decide nothing.
    """
    rows = []
    # Before the knobs have run there is no such column.
    runs = runs.reindex(columns=[*runs.columns, *({"knob", "value"} - set(runs))])
    for network, part in runs.groupby("network", sort=False):
        knobs = part[(part["stage"] == "knob") & part["knob"].isin(["theta", "warmup length"])]
        if knobs["knob"].nunique() == 2:
            shares = [_shares(own) for _, own in knobs.groupby("seed")]
            found = Interval(float(np.mean(shares)), min(shares), max(shares), "range")
            what = "share of values within 10 %, warmup length less theta, is below 0"
            # The range of fewer seeds decides nothing.
            verdict = found.below(0.0) if len(shares) >= DECIDING_SEEDS else "undecided"
            rows.append(_claim("S1", what, network, found, verdict))
        tried = part[part["stage"] == "tune"]
        tune = tried.pivot_table(index="trial", columns="method", values="final", dropna=False)
        tune = tune.clip(upper=4 * tune.min().min())
        fixed = min((name for name in tune if name.startswith("fixed ")), key=lambda name: tune[name].min())
        for other in ("warmup", fixed):
            found, _ = ratio(tune[ADAPTIVE].to_numpy(), tune[other].to_numpy())
            what = (
                f"loss over the rates, adaptive / {other} (the best fixed batch)"
                if other == fixed
                else (f"loss over the rates, adaptive / {other}")
            )
            rows.append(_claim("S2", f"{what}, is below 1", network, found, found.below(1.0)))
    return pd.DataFrame(rows)


def _shares(own: pd.DataFrame) -> float:
    """Share of the warmup's lengths that work less that of theta's values, on one seed."""
    table = widths(own).set_index("knob")["share within 10 %"]
    return float(table["warmup length"] - table["theta"])


def _claim(claim: str, what: str, where: object, found: Interval, verdict: str) -> dict[str, object]:
    bounds = {"value": found.value, "low": found.low, "high": found.high, "interval": found.kind}
    return {"claim": claim, "what": what, "where": where, **bounds, "verdict": verdict}


def widths(knobs: pd.DataFrame) -> pd.DataFrame:
    """Of each knob: its best value, the share of its values within 10 % of that, and what the worst one costs."""
    rows = []
    for (network, knob), part in knobs.groupby(["network", "knob"], sort=False):
        means = part.groupby("value")["final"].mean()
        rows.append(
            {
                "network": network,
                "knob": knob,
                "values": len(means),
                "best value": means.idxmin(),
                "best": means.min(),
                "share within 10 %": float((means <= WITHIN * means.min()).mean()),
                "worst / best": means.max() / means.min(),
            }
        )
    return pd.DataFrame(rows)


LINES: Mapping[str, tuple[str, str, str]] = {
    "fixed 64": ("#999999", "-", "o"),
    "fixed 1024": ("#555555", "-", "o"),
    "adaptive": ("#0072B2", "-", "D"),
    "warmup": ("#E69F00", "--", "^"),
    "clip": ("#009E73", "--", "v"),
    "rezero": ("#CC79A7", ":", "s"),
    "radam": ("#D55E00", ":", "P"),
}


def draw(folder: Path) -> None:
    """Final loss against the learning rate, and against every method's own knob."""
    runs = load(folder.name, folder=folder.parent)
    if (runs["stage"] == "decaying").any():
        _decaying(over_rates(runs[runs["stage"] == "decaying"]), folder)
        runs = runs[runs["stage"] != "decaying"]
    if not len(runs):
        return
    networks = list(runs["network"].unique())
    knobs = list(runs["knob"].dropna().unique()) if "knob" in runs else []
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(networks),
            1 + len(knobs),
            figsize=(3.4 + 1.4 * len(knobs), 2.7 * len(networks)),
            width_ratios=[2.0] + [1.0] * len(knobs),
            squeeze=False,
            sharey="row",
            layout="constrained",
        )
        for row, network in enumerate(networks):
            part = runs[runs["network"] == network]
            top = 2.2 * part["final"].min()
            _rates(grid[row, 0], part[part["stage"] == "tune"], top)
            grid[row, 0].set_title(f"{network}: learning rate")
            for axes, knob in zip(grid[row, 1:], knobs, strict=True):
                means = part[part["knob"] == knob].groupby("value")["final"].mean()
                axes.plot(
                    means.index,
                    means.clip(upper=top),
                    "-D",
                    color="#0072B2" if knob in ("theta", "micro-batch") else "#E69F00",
                    markersize=4,
                )
                axes.set_xscale("log")
                shown = [means.index.min(), *means.index[[len(means) // 2]], means.index.max()]
                axes.set_xticks(shown, [short(value) for value in shown])
                axes.xaxis.set_minor_locator(NullLocator())
                axes.set_title(knob)
            grid[row, 0].set_ylim(0.95 * part["final"].min(), 1.02 * top)
            grid[row, 0].set_ylabel("final validation loss")
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, fontsize=8, ncols=len(names), loc="outside lower center")
        save(figure, folder, "figure")


def _decaying(table: pd.DataFrame, folder: Path) -> None:
    """Loss against a rate that decays: what a theta or a reference not tuned would cost."""
    shades = dict(zip(map(_name, THETAS), ("#56B4E9", "#0072B2", "#003B5C"), strict=True))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.0, 3.6), layout="constrained")
        for arm, own in table.groupby("arm", sort=False):
            adaptive = arm in shades
            colour = shades.get(str(arm), LINES["fixed 64" if arm == "fixed 64" else "fixed 1024"][0])
            own = own.sort_values("lr")
            axes.plot(own["lr"], own["loss"], "-D" if adaptive else "-o", color=colour, markersize=4, label=str(arm))
        axes.set_xscale("log")
        axes.set_ylim(0.95 * table["loss"].min(), 2.2 * table["loss"].min())
        axes.set_xlabel("learning rate at 32 examples, or of the fixed batch; decays linearly to zero")
        axes.set_ylabel("test loss")
        axes.legend(fontsize=8)
        save(figure, folder, "decaying")


def _rates(axes: Axes, tune: pd.DataFrame, top: float) -> None:
    for method, (colour, style, marker) in LINES.items():
        means = tune[tune["method"] == method].groupby("lr")["final"].mean()
        if len(means):
            axes.plot(
                means.index, means.clip(upper=top), style, marker=marker, color=colour, markersize=4, label=method
            )
    axes.set_xscale("log")
    axes.set_xlabel("learning rate (Adam)")


STUDY = Study(
    "sensitivity",
    "how wide the range is in which each method works",
    plan,
    from_runs(tables),
    order=5,
    figures=draw,
)
