"""A training that is only measured: what the meter's rows say, and branches that begin along it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import adaptbatch as ab
from studies.engine.runner import Run
from studies.engine.training import Problem

# Micro-batches of a window.
STEPS = 2
CHANNELS = {"euclidean": "noise_scale", "adam": "noise_scale_metric", "typical": "noise_scale_typical"}
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

    points: tuple[float, ...] = (0.15, 0.4, 0.8)
    steps: tuple[int, ...] = (2, 4, 8, 16, 32)
    windows: int = 16
    repeats: int = 3


NONE = Branches(points=())


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
