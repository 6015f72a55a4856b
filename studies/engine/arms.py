"""Arms as values: how the batch, the rate, the optimizer and the network of a run are chosen."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import adaptbatch as ab
from studies.engine.networks import Norm, Residual


class Schedule(Protocol):
    """A factor of the learning rate, in examples, so that the batch does not change what it means."""

    def factor(self, examples_seen: float) -> float:
        """Factor of a step that ends after ``examples_seen`` examples."""
        ...


@dataclass(frozen=True)
class Constant:
    """No schedule."""

    def factor(self, examples_seen: float) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True)
class Warmup:
    """Linear from zero over the first ``examples``."""

    examples: float

    def factor(self, examples_seen: float) -> float:
        """``examples_seen / examples``, at most 1."""
        return min(examples_seen / self.examples, 1.0)


@dataclass(frozen=True)
class Decay:
    """Linear to zero at the end of the budget, after a linear warm-up.

    Attributes:
        examples: The budget.
        warmup: Examples of the warm-up; 0: none.

    Example:
        >>> [Decay(100, warmup=20).factor(seen) for seen in (10, 20, 60, 100)]
        [0.5, 1.0, 0.5, 0.0]
    """

    examples: float
    warmup: float = 0.0

    def factor(self, examples_seen: float) -> float:
        """Of a step that ends there."""
        up = examples_seen / self.warmup if self.warmup else math.inf
        return max(0.0, min(1.0, up, (self.examples - examples_seen) / (self.examples - self.warmup)))


@dataclass(frozen=True)
class Follow:
    """What a recorded run did to its batch, done to the rate instead: ``(n_0 / n)^power`` at the same examples.

    Attributes:
        ends: Examples seen at the end of each recorded window.
        batches: ``n`` of each.
        reference: ``n_0``, at which the rate is the arm's own.
        power: 1/2 is what a batch does to Adam's update in noise, 1 what it does to that of gradient descent.
    """

    ends: tuple[float, ...]
    batches: tuple[float, ...]
    reference: float
    power: float = 0.5

    def factor(self, examples_seen: float) -> float:
        """That of the recorded window in which the step ends."""
        window = min(bisect.bisect_left(self.ends, examples_seen), len(self.ends) - 1)
        return (self.reference / self.batches[window]) ** self.power


@dataclass(frozen=True)
class Arm:
    """What the arms of a study differ in.

    Attributes:
        name: Its name in tables and figures.
        rule: How it chooses the accumulation steps.
        lr: The learning rate that ``schedule`` multiplies.
        schedule: Of the learning rate.
        max_steps: Largest number of accumulation steps.
        optimizer: A key of :data:`OPTIMIZERS`.
        beta1, beta2: Of those of the Adam family.
        clip: Largest norm of the gradient; None: not clipped.
        guard: Of the controller.
        coupling: Of the controller: the learning rate that follows the batch.
        residual, norm: Of the network, in place of the task's.
        ghost: Whether single examples are measured, in place of micro-batches.
    """

    name: str
    rule: ab.rules.Rule
    lr: float
    schedule: Schedule = Constant()
    max_steps: int = 64
    optimizer: str = "adam"
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float | None = None
    guard: ab.Guard | None = None
    coupling: ab.LearningRate | None = None
    residual: Residual | None = None
    norm: Norm | None = None
    ghost: bool = False

    def learning_rate(self, examples_seen: float) -> float:
        """Learning rate of a step that ends after ``examples_seen`` examples."""
        return self.lr * self.schedule.factor(examples_seen)

    def build_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Its optimizer.

        Raises:
            ValueError: If its name is unknown.
        """
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {list(OPTIMIZERS)}, got optimizer = {self.optimizer!r}.")
        return OPTIMIZERS[self.optimizer](list(parameters), self)


def _adam(p: Any, arm: Arm) -> torch.optim.Optimizer:
    return torch.optim.Adam(p, lr=arm.lr, betas=(arm.beta1, arm.beta2), fused=True)


OPTIMIZERS: Mapping[str, Callable[[Any, Arm], torch.optim.Optimizer]] = {
    "adam": _adam,
    "adamw": lambda p, arm: torch.optim.AdamW(p, lr=arm.lr, betas=(arm.beta1, arm.beta2), weight_decay=0.1, fused=True),
    "radam": lambda p, arm: torch.optim.RAdam(p, lr=arm.lr, betas=(arm.beta1, arm.beta2)),
    "sgd": lambda p, arm: torch.optim.SGD(p, lr=arm.lr),
    "momentum": lambda p, arm: torch.optim.SGD(p, lr=arm.lr, momentum=arm.beta1),
    "adagrad": lambda p, arm: torch.optim.Adagrad(p, lr=arm.lr),
    "adadelta": lambda p, arm: torch.optim.Adadelta(p, lr=arm.lr),
    "rmsprop": lambda p, arm: torch.optim.RMSprop(p, lr=arm.lr, alpha=arm.beta2),
}
