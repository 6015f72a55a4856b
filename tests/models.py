"""Small models, batches and loops that many tests train with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adaptbatch as ab


def small_model(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def squared(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 0.5).square().sum(dim=-1).mean()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def batches(sizes: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 4, generator=generator, dtype=dtype) for size in sizes]


def run(
    controller: ab.BatchController, data: Sequence[Tensor], loss: Callable[[nn.Module, Tensor], Tensor] = squared
) -> list[ab.records.Decision]:
    decisions = []
    for x in controller.micro_batches(data):
        controller.backward(loss(controller.model, x), weight=len(x))
        if controller.step_due:
            decisions.append(controller.step())
    return decisions


def equal_state(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def split(data: Sequence[Tensor], steps: Sequence[int]) -> list[list[Tensor]]:
    """The windows that ``steps`` cut ``data`` into; the last entry holds, the last window may be partial."""
    windows, left = [], list(data)
    while left:
        k = steps[min(len(windows), len(steps) - 1)]
        windows.append(left[:k])
        left = left[k:]
    return windows


class TiedLanguageModel(nn.Module):
    """Embedding and output share one weight; optionally sparse, without the output layer then."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, sparse=sparse)
        self.out = nn.Linear(4, 7, bias=False)
        if not sparse:
            self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.embedding(tokens).tanh())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, shared: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first if shared else nn.Linear(4, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(lambda h: self.first(h).tanh(), x, use_reentrant=self.reentrant)
        return checkpoint(lambda h: self.second(h).tanh(), x, use_reentrant=self.reentrant)


@dataclass(frozen=True)
class LastDigits:
    """A user's own rule: the size hangs on the last digits of the evidence, so that one lost bit would show."""

    closed_loop = True
    memory = 100.0

    def decide(
        self, evidence: ab.records.Evidence, progress: ab.records.Progress, limits: ab.Limits
    ) -> ab.records.Decision:
        if math.isnan(evidence.pooled.noise_trace):
            return ab.records.Decision(2, math.nan, "undecided")
        return ab.records.Decision(2 + int(1e12 * evidence.pooled.noise_trace) % 4, math.nan, "hold")


def adaptive(model: nn.Module) -> tuple[ab.BatchController, torch.optim.Optimizer]:
    optimizer = adamw(model)
    return ab.BatchController(model, optimizer, rule=LastDigits()), optimizer
