"""What is trained in the transformer's study: a model and a budget, fixed batches and their rates, arms that adapt."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import adaptbatch as ab
from studies.engine.arms import Arm, Decay, Schedule
from studies.engine.language import LanguageTask, Order
from studies.engine.runner import Run
from studies.engine.sweep import TUNING_SEEDS, Found
from studies.engine.tuning import Search, carried, together
from studies.questions.live import Method, Tuned

NAME = "transformer"
CONTEXT = 64
MICRO_BATCH = 4 * CONTEXT
START = 2 * MICRO_BATCH
PASS = 2048
WARMUP = 100_000.0
BATCHES = (256, 512, 1024, 1536, 2048, 3072, 4096, 8192)
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
# Shares of the budget that a fixed batch may warm up over beside the usual tenth, and for which batches and rates.
LONG_WARMUPS = (0.3, 0.5, 0.7)
LONG_BATCHES = BATCHES[1:]
LONG_RATES = (5.66e-3, 8e-3)
# Three decades, for the role of the warm-up.
WIDE_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class Scale:
    """Sizes of a preset."""

    million: int
    seeds: int
    width: int = 64
    layers: int = 3
    batches: tuple[int, ...] = BATCHES
    rates: tuple[float, ...] = RATES
    wide_rates: tuple[float, ...] = WIDE_RATES
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    long_warmups: tuple[float, ...] = LONG_WARMUPS

    @property
    def longer_shares(self) -> tuple[float, ...]:
        """Shares that longer budgets have to choose: there the usual warm-up is less than a tenth."""
        return (0.0, 0.1, *self.long_warmups)


SCALES: dict[str, Scale] = {
    "smoke": Scale(5_000, 2, 16, 1, (512, 2048), (4e-3, 8e-3), (4e-3,), (1000,), ()),
    "laptop": Scale(1_000_000, 8),
    "paper": Scale(1_000_000, 20, width=384, layers=6),
}


@dataclass(frozen=True)
class Setting:
    """A model and a budget.

    Attributes:
        millions: Budget [million characters], of a preset's millions.
        order: Where the blocks are normalised.
    """

    millions: float
    order: Order = "pre"

    def budget(self, scale: Scale) -> int:
        """Characters."""
        return round(self.millions * scale.million)

    def task(self, scale: Scale, batch: int) -> LanguageTask:
        """What its arms share; ``batch`` characters a pass."""
        budget = self.budget(scale)
        return LanguageTask(
            "kjv",
            budget,
            batch // CONTEXT,
            CONTEXT,
            width=scale.width,
            layers=scale.layers,
            order=self.order,
            probe_every=budget // 40,
        )

    def schedule(self, scale: Scale, warmup: bool = True, share: float = 0.0) -> Schedule:
        """Of the learning rate; the warm-up is a tenth of a million whatever the budget, or a ``share`` of it."""
        usual = WARMUP * scale.million / 1e6 if warmup else 0.0
        return Decay(self.budget(scale), share * self.budget(scale) or usual)


SMALL = Setting(1)
POST = Setting(1, "post")
MIDDLE = Setting(4)
LARGE = Setting(16)
LARGE_SEEDS = 3


def adaptive_arm(method: Method, setting: Setting, scale: Scale, lr: float) -> Arm:
    """A method's arm at the rate of the batch that it starts from."""
    return replace(method.arm(lr, setting.schedule(scale)), optimizer="adamw", beta2=0.99)


def fixed_run(setting: Setting, scale: Scale, n: int, own: Tuned, seed: int) -> Run:
    """A reported run of a fixed batch, of its rate and the share of its warm-up, 0 for the usual one."""
    return labelled("final", setting, scale, fixed_arm(setting, scale, n, *own), seed, n)


def searched(setting: Setting, scale: Scale, n: int, found: Found) -> dict[float, Search]:
    """For the rate of a fixed batch, by the share of its warm-up, 0 for the usual one.

    At one million a grid, and longer warm-ups for some batches; for longer budgets what
    :func:`studies.engine.tuning.carried` gives from the best of these, none while that is not known.
    """

    def over(share: float, rates: tuple[float, ...]) -> Search:
        return Search(rates, lambda lr: trials(setting, scale, fixed_arm(setting, scale, n, lr, share), n))

    if setting.millions != 1:
        best = tuned(SMALL, scale, n, found)
        return {} if best is None else carried(best, over, scale.longer_shares, found)
    longer = scale.long_warmups if n in LONG_BATCHES else ()
    return {0.0: over(0.0, scale.rates)} | {share: over(share, LONG_RATES) for share in longer}


def trials(setting: Setting, scale: Scale, arm: Arm, batch: int = 0) -> list[Run]:
    """An arm's runs on the tuning seeds."""
    return [labelled("tune", setting, scale, arm, seed, batch) for seed in scale.tuning_seeds]


def tuned(setting: Setting, scale: Scale, n: int, found: Found) -> Tuned | None:
    """A fixed batch's best rate and share on the tuning seeds; None before all are finished."""
    return best_of_all(searched(setting, scale, n, found), found)


def ranked(setting: Setting, scale: Scale, n: int, found: Found) -> list[Tuned]:
    """All that was tried for a fixed batch, the best first; empty before all are finished."""
    return list(together(searched(setting, scale, n, found), found))


def best_of_all(searches: dict[float, Search], found: Found) -> Tuned | None:
    """The best rate and share; None before all are finished."""
    return next(iter(together(searches, found)), None)


def fixed_arm(setting: Setting, scale: Scale, n: int, lr: float, share: float) -> Arm:
    """A fixed batch in passes of at most :data:`PASS` characters."""
    rule, schedule = ab.Fixed(math.ceil(n / PASS)), setting.schedule(scale, share=share)
    return Arm(f"fixed {n}", rule, lr, schedule, optimizer="adamw", beta2=0.99)


def labelled(stage: str, setting: Setting, scale: Scale, arm: Arm, seed: int, batch: int = 0) -> Run:
    """A run with its labels; ``batch`` is that of a fixed batch."""
    task = setting.task(scale, batch // math.ceil(batch / PASS) if batch else MICRO_BATCH)
    labels = {"stage": stage, "order": setting.order, "millions": setting.millions}
    labels |= {"method": arm.name, "lr": arm.lr, "fixed": int(batch > 0)}
    labels["warmup"] = getattr(arm.schedule, "warmup", 0.0) / setting.budget(scale)
    return Run(NAME, task, arm, seed, tuple(labels.items()))
