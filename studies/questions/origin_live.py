"""The origin's table once more, with a controller that acts: what is the noise scale over 200 epochs, and 4000 to it?

In :mod:`studies.questions.origin` the adaptive row's micro-batch was 128, its smallest window two of them, and the
noise scale it measured about 100: it stood at 256. Here the micro-batch is 32, on the same network, both classes and
three seeds, beside that study's rows as they are (one seed). Its rate is that of the row "residual VAE, 256", 1e-2 at
256 examples, and follows the root of the batch: the same schedule as the row it stands beside.

Registered before its runs, knowing the ten of the origin study:

* N1: the batch that the noise asks for is not the report's. Less than 1 % of the examples are trained on in windows of
  at least 2,000, half of the report's batch, after the first epoch. If so, 4000 is no answer to this noise: its
  standard error would be a fifth of the gradient or less, and what is paid for it, at equal epochs, is 15 times fewer
  updates.
* N2: ``train_loss`` over that of "residual VAE, 4000" is below 1, class by class, over the seeds.
* N3: ``spikes`` a run, fewer than the mean of "residual VAE, 256" over the two classes.
* N4: the noise scale still rises in training for so long: the median of the tenth of the evaluations before the middle,
  over that of the last tenth, is below 1, run by run.

A claim counts only if most of the six runs were live (:func:`studies.output.fronts.is_live`).

Plan: 6 runs of 10.7 million examples, 335,000 passes of 32 at 9 ms: 5 core-hours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

import adaptbatch as ab
from studies import data
from studies.engine.arms import Arm
from studies.engine.results import load
from studies.engine.runner import Run
from studies.engine.sweep import SHARED, Found, Options, Study, from_runs
from studies.output.fronts import claim_row, is_live
from studies.output.statistics import Interval, of_seeds, ratio
from studies.output.style import KINDS, STYLE, save
from studies.questions import origin

MICRO_BATCH = 32
NAME = "residual VAE, adaptive, 32"
LARGE, SMALL = "residual VAE, 4000", "residual VAE, 256"
SEEDS = {"smoke": 2, "laptop": 3, "paper": 5}
NEAR = origin.LARGE / 2
FAR_SHARE = 0.01
EPOCH = 1 / 200


def arm() -> Arm:
    """The default rule, at the rate of the row of 256."""
    shared = {"residual": "identity", "norm": "branch", "coupling": ab.LearningRate("sqrt", origin.SMALL)}
    return Arm(NAME, ab.RelativeStandardError(), 1e-2, max_steps=128, **shared)  # type: ignore[arg-type]


def plan(options: Options, found: Found) -> list[Run]:
    """The origin's own rows on its first seed, and the live one on all: seed by seed, both classes."""
    scale = origin.SCALES[options.preset]
    name = (options.data or (scale.data,))[0]
    runs = list(origin.table_runs(name, scale, 0))
    return [*runs, *(run for seed in range(options.seeds or SEEDS[options.preset]) for run in _live(name, scale, seed))]


def _live(name: str, scale: origin.Scale, seed: int) -> Iterator[Run]:
    for anomaly in origin.CLASSES:
        examples = scale.epochs * len(data.split(name, anomaly).train)
        labels = {"stage": "table", "network": NAME, "data": name, "class": anomaly, "lr": arm().lr}
        task = origin.task(name, anomaly, scale, examples, MICRO_BATCH, "identity", "branch")
        yield Run(SHARED, task, arm(), seed, tuple(labels.items()))


def tables(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The origin's rows with the live one, its course, and the claims."""
    found = {"T1": _means(runs)}
    own = runs[runs["network"] == NAME]
    if len(own):
        found["course"] = course(own, curves)
        found["claims"] = claims(runs, found["course"])
    return found


def _means(runs: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for network, part in runs.groupby("network", sort=False):
        row: dict[str, object] = {"row": network, "runs": len(part)}
        row |= {"train loss": part["train_loss"].mean(), "valid loss": part["test_loss"].mean()}
        row |= {f"AUROC, class {kind}": own["auroc"].mean() for kind, own in part.groupby("class")}
        row |= {"spikes": part["spikes"].mean(), "diverged": int(part["diverged"].sum())}
        rows.append(row | {"mean n": part["mean_batch"].mean(), "updates": part["updates"].mean()})
    return pd.DataFrame(rows)


def course(own: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Of every live run: its batches, how near they come to the report's, and its noise scale early and late."""
    rows = []
    for run in own.assign(live=is_live(own)).to_dict("records"):
        k, windows = (np.asarray(run[f"schedule_{name}"]) for name in ("k", "windows"))
        sizes, examples = MICRO_BATCH * k, MICRO_BATCH * k * windows
        later = np.cumsum(examples) > EPOCH * run["examples"]
        measured = curves.loc[curves["key"] == run["key"], "noise_scale"].to_numpy(float)
        tenth = max(1, len(measured) // 10)
        middle = measured[len(measured) // 2 - tenth : len(measured) // 2]
        rows.append(
            {
                "class": run["class"],
                "seed": run["seed"],
                "mean n": run["mean_batch"],
                "largest n": int(sizes[later].max()) if later.any() else int(sizes.max()),
                "near the report's": float(examples[later & (sizes >= NEAR)].sum() / run["examples"]),
                "noise scale, middle": float(np.median(middle)) if len(middle) else math.nan,
                "noise scale, end": float(np.median(measured[-tenth:])) if len(measured) else math.nan,
                "error at 4000": math.sqrt(np.median(measured[-tenth:]) / origin.LARGE) if len(measured) else math.nan,
                "live": bool(run["live"]),
            }
        )
    return pd.DataFrame(rows)


def claims(runs: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """N1 to N4."""
    tested = {"live": int(found["live"].sum()), "seeds": len(found)}
    near = found["near the report's"].to_numpy(float)
    said = f"share of examples in windows of at least {NEAR:,.0f} is below {FAR_SHARE}"
    rows = [claim_row("N1", said, "both", Interval(near.mean(), near.min(), near.max(), "range"), FAR_SHARE, tested)]
    own = runs[runs["network"] == NAME]
    large = runs[runs["network"] == LARGE].groupby("class")["train_loss"].mean()
    for anomaly, part in own.groupby("class"):
        if anomaly in large:
            losses = part["train_loss"].to_numpy(float)
            ended, _ = ratio(losses, np.full(len(losses), large[anomaly]))
            said = f"train loss over that of {LARGE} is below 1"
            rows.append(claim_row("N2", said, f"class {anomaly:.0f}", ended, arm=tested))
    small = runs.loc[runs["network"] == SMALL, "spikes"]
    if len(small):
        spikes = of_seeds(own[["spikes"]].to_numpy(float), lambda values: float(values.mean()))
        said = f"spikes a run, below the {small.mean():.0f} of {SMALL}"
        rows.append(claim_row("N3", said, "both", spikes, float(small.mean()), tested))
    late, middle = found["noise scale, end"].to_numpy(float), found["noise scale, middle"].to_numpy(float)
    if np.isfinite(late * middle).all():
        risen, _ = ratio(middle, late)
        rows.append(
            claim_row("N4", "noise scale of the middle over that of the end is below 1", "both", risen, arm=tested)
        )
    return pd.DataFrame(rows)


def draw(folder: Path) -> None:
    """The noise scale and the batch along all epochs, and the loss beside the origin's rows, class by class."""
    curves = load(folder.name, curves=True, folder=folder.parent)
    curves = curves.merge(load(folder.name, folder=folder.parent)[["key", "class"]].drop_duplicates(), on="key")
    classes = sorted(curves["class"].unique())
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            2, len(classes), figsize=(4.6 * len(classes), 6.0), sharex=True, squeeze=False, layout="constrained"
        )
        for column, anomaly in enumerate(classes):
            own = curves[curves["class"] == anomaly]
            _course(grid[0, column], own[own["network"] == NAME])
            _losses(grid[1, column], own)
            grid[0, column].set_title(f"Noise scale and batch, class {anomaly:.0f} left out")
            grid[1, column].set_title("Validation loss")
            grid[1, column].set_xlabel("training examples (millions)")
        grid[0, 0].set_ylabel("examples")
        grid[0, -1].legend(fontsize=7.5, loc="upper right")
        grid[1, -1].legend(fontsize=7.5)
        save(figure, folder, "figure")


def _course(axes: Axes, runs: pd.DataFrame) -> None:
    for index, (_, run) in enumerate(runs.groupby("seed")):
        seen, first = run["examples_seen"] / 1e6, index == 0
        axes.fill_between(
            seen, run["noise_scale_low"], run["noise_scale_high"].clip(upper=1e5), color="#009E73", alpha=0.12, lw=0
        )
        axes.plot(
            seen, run["noise_scale"], color="#009E73", lw=1.0, label="noise scale, a line a seed" if first else None
        )
        # The last window of an epoch is short.
        size = (MICRO_BATCH * run["accumulation_steps"]).rolling(5, min_periods=1).median()
        axes.plot(seen, size, color=KINDS["adaptive"][0], lw=1.0, label="batch" if first else None)
    for size, name in ((origin.LARGE, "the report's batch"), (origin.SMALL, "256")):
        axes.axhline(size, color="#777777", lw=0.8, ls=":")
        axes.annotate(
            name, (0.01, size), xycoords=("axes fraction", "data"), va="bottom", fontsize=7.5, color="#777777"
        )
    axes.set_yscale("log", base=2)
    axes.set_ylim(MICRO_BATCH / 2, 16_384)
    ticks = (32, 64, 128, 256, 512, 1024, 4096)
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.yaxis.set_minor_formatter(NullFormatter())


SHOWN = {NAME: KINDS["adaptive"][0], LARGE: "#000000", SMALL: "#999999", "scaled residual VAE, 256": "#CC79A7"}


def _losses(axes: Axes, curves: pd.DataFrame) -> None:
    for name, colour in SHOWN.items():
        for index, (_, run) in enumerate(curves[curves["network"] == name].groupby("key", sort=False)):
            label = name if index == 0 else None
            axes.plot(run["examples_seen"] / 1e6, run["validation_loss"], color=colour, lw=1.0, label=label)
    ends = curves["validation_loss"]
    axes.set_yscale("log")
    axes.set_ylim(0.95 * ends.min(), 4 * ends.min())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))


STUDY = Study(
    "origin-live",
    "the origin's table with a controller that acts, and the noise scale over its 200 epochs",
    plan,
    from_runs(tables),
    order=4.7,
    figures=draw,
)
