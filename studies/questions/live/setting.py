"""What is trained in the live study: a network, a data set and a kind of rate, fixed batches and those that adapt."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import adaptbatch as ab
from studies.engine import sweep
from studies.engine.arms import Arm, Constant, Decay, Schedule, Warmup
from studies.engine.networks import Residual
from studies.engine.runner import Run
from studies.engine.training import Task
from studies.engine.tuning import Search
from studies.questions import comparison

NAME = "live"
MICRO_BATCH = 16
START = 2 * MICRO_BATCH
PASS = 128
# Of the examples, and for which batches and rates it is tried: not for 16 and 32, as 64 gains 0.4 % by it, 384 7 %.
WARMUP = 0.05
WARM_BATCHES = (64, 96, 128, 192, 256, 384, 512, 1024)
WARM_RATES = (8e-3, 1.6e-2, 3.2e-2)
LONG_WARMUPS = (0.2, 0.4)
LONG_BATCHES = (64, 96, 128, 192, 256, 384, 512, 1024)
LONG_RATES = (3.2e-2, 6.4e-2)
# Of an arm after a warm-up.
TUNED_RATES = (1.6e-2,)
BATCHES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 1024)
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)

Rate = Literal["decaying", "constant"]
Tuned = tuple[float, float]  # a learning rate, and the share of the examples over which it warms up


@dataclass(frozen=True)
class Scale(sweep.Scale):
    """And which batches and rates are tried."""

    batches: tuple[int, ...] = BATCHES
    rates: tuple[float, ...] = RATES
    warm_batches: tuple[int, ...] = WARM_BATCHES
    warm_rates: tuple[float, ...] = WARM_RATES
    long_warmups: tuple[float, ...] = LONG_WARMUPS
    long_batches: tuple[int, ...] = LONG_BATCHES
    long_rates: tuple[float, ...] = LONG_RATES

    @property
    def grids(self) -> dict[float, tuple[tuple[int, ...], tuple[float, ...]]]:
        """By the share of the examples that a fixed batch may warm up over: which may, and at which rates."""
        longer = dict.fromkeys(self.long_warmups, (self.long_batches, self.long_rates))
        return {0.0: (self.batches, self.rates), WARMUP: (self.warm_batches, self.warm_rates), **longer}


SCALES: dict[str, Scale] = {
    "smoke": Scale(2_000, (16, 8), 8, 2, (1000,), "digits", (32, 128, 512), (2e-3, 8e-3), (128,), (8e-3,), ()),
    "laptop": Scale(128_000, (64, 16), 80, seeds=8),
    "paper": Scale(10_800_000, (128, 32), 80, seeds=20),
}


@dataclass(frozen=True)
class Setting:
    """One task: a network, a data set and a kind of rate.

    Attributes:
        network: ``calm``: branches scaled by 1/sqrt(L); ``rezero`` and ``noisy scaled``: the noisy network, whose
            branches are normalised, made trainable.
        data: Data set; None: the preset's home.
        rate: Of the learning rate.
        whole: Whether fixed batches have a grid of their own and all arms are run, or those of :data:`FEW` beside
            fixed batches whose rates are looked for from those at home.
    """

    network: str
    data: str | None = None
    rate: Rate = "decaying"
    whole: bool = False

    def task(self, scale: Scale, micro_batch: int) -> Task:
        """What its arms share."""
        calm = self.network == "calm"
        shared = comparison.task("calm" if calm else "noisy", self.data or scale.home, scale)
        residual: Residual = "rezero" if self.network == "rezero" else "scaled"
        return replace(shared, micro_batch=micro_batch, probe_every=scale.examples // 50, residual=residual)

    def schedule(self, scale: Scale, warmup: float = 0.0) -> Schedule:
        """Of the learning rate, which may warm up over a share of the examples."""
        if self.rate == "decaying":
            return Decay(scale.examples, warmup * scale.examples)
        return Warmup(warmup * scale.examples) if warmup else Constant()


HOME = Setting("calm", whole=True)


@dataclass(frozen=True)
class Method:
    """A closed or open loop that starts from a small batch.

    Attributes:
        name: Of its arms, before how the rate follows.
        rule: How it chooses the batch.
        coupled: Whether the rate follows the root of the batch.
        ghost: Whether single examples are measured, so that one micro-batch is enough.
        start: The batch it starts from, whose tuned rate it takes [examples].
    """

    name: str
    rule: ab.rules.Rule
    coupled: bool = True
    ghost: bool = False
    start: int = START

    @property
    def label(self) -> str:
        """Name of its arm."""
        return f"{self.name}, root" if self.coupled else self.name

    def arm(self, lr: float, schedule: Schedule, name: str | None = None) -> Arm:
        """Its arm at a rate that is meant for :attr:`start`."""
        coupling = ab.LearningRate("sqrt", self.start) if self.coupled else None
        return Arm(name or self.label, self.rule, lr, schedule, coupling=coupling, ghost=self.ghost)


def labelled(
    stage: str, setting: Setting, scale: Scale, arm: Arm, seed: int, batch: int = 0, method: str | None = None
) -> Run:
    """A run with its labels; ``batch`` is that of a fixed batch."""
    task = setting.task(scale, batch // math.ceil(batch / PASS) if batch else MICRO_BATCH)
    labels = {"stage": stage, "network": setting.network, "data": task.data, "rate": setting.rate}
    labels |= {"method": method or arm.name, "lr": arm.lr, "fixed": int(batch > 0)}
    labels["warmup"] = getattr(arm.schedule, "warmup", 0.0) / scale.examples
    return Run(NAME, task, arm, seed, tuple(labels.items()))


def restaged(run: Run, stage: str) -> Run:
    """The same run in another place of the study."""
    return replace(run, labels=(*run.labels, ("stage", stage)))


def search(
    setting: Setting,
    scale: Scale,
    name: str,
    make: Callable[[float], Arm],
    batch: int = 0,
    rates: tuple[float, ...] | None = None,
) -> Search:
    return Search(
        rates or scale.rates,
        lambda lr: [labelled("tune", setting, scale, make(lr), seed, batch, name) for seed in scale.tuning_seeds],
    )
