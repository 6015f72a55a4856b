"""The networks of the check, each a module that maps a micro-batch to its mean loss, and the loops that train them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adaptbatch as ab
from studies.engine.networks import Autoencoder

Window = Callable[[Sequence[Tensor]], None]
PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Residual(nn.Module):
    """The mean loss of the studies' residual autoencoder."""

    def __init__(self, depth: int, width: int, code: int, inputs: int) -> None:
        super().__init__()
        self.net = Autoencoder(depth, (width, width), code, "scaled", variational=False, inputs=inputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.net.loss(x)


class Block(nn.Module):
    """Causal attention and two linear layers, each normalised before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_a, self.norm_b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm_a(h)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0)
        q, k, v = (x.transpose(-3, -2) for x in qkv)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(-3, -2).flatten(-2))
        return h + self.down(F.gelu(self.up(self.norm_b(h))))


class Transformer(nn.Module):
    """Mean next-token loss of a small language model without positions, from ``(m, length + 1)`` ids."""

    def __init__(self, width: int, heads: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.norm(self.blocks(self.embed(ids[:, :-1]))))
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


class Perceptron(nn.Module):
    """Mean squared error of a multilayer perceptron against a fixed function of its input."""

    def __init__(self, inputs: int, width: int, layers: int) -> None:
        super().__init__()
        sizes = [inputs, *[width] * layers]
        hidden = [part for i, o in itertools.pairwise(sizes) for part in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, 8))

    def forward(self, x: Tensor) -> Tensor:
        target = torch.sin(3.0 * x[:, :8]) + 0.5 * x[:, 8:16].square()
        return (self.net(x) - target).square().sum(-1).mean()


class Convolutions(nn.Module):
    """Mean squared error of two convolutions and a linear layer, for norms of single examples."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.convolve = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2))
        self.head = nn.Linear(8 * ((side - 3) // 2 + 1) ** 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(self.convolve(x).flatten(1)) - x[:, 0, 0, :4]).square().sum(-1).mean()


@dataclass(frozen=True)
class Case:
    """A network and its data.

    Attributes:
        name: In tables.
        make: A new network, on the CPU.
        example_shape: Of one example.
        vocabulary: Of the ids that an example is made of; 0: of normal numbers.
        micro_batch: Examples.
        terms: Longest chain of additions of one example, in the forward and the backward pass and in its positions.
        positions: Over which an example's gradient is a sum.
    """

    name: str
    make: Callable[[], nn.Module]
    example_shape: tuple[int, ...]
    vocabulary: int
    micro_batch: int
    terms: int
    positions: int = 1

    def network(self, device: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A new one, the same for the same seed on any device."""
        torch.manual_seed(seed)
        return self.make().to(device, dtype)

    def batches(
        self, device: str, sizes: Sequence[int], seed: int = 1, dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """Micro-batches of ``sizes`` examples on the device."""
        generator = torch.Generator().manual_seed(seed)
        shape = (sum(sizes), *self.example_shape)
        if self.vocabulary:
            data = torch.randint(self.vocabulary, shape, generator=generator)
        else:
            data = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return list(data.to(device).split(list(sizes)))


def cases(tiny: bool) -> dict[str, Case]:
    """The deep, the usual and the wide network."""
    depth, width, pixels = (8, 16, 32) if tiny else (80, 128, 784)
    d, layers, length, vocabulary = (16, 1, 8, 32) if tiny else (256, 4, 64, 1024)
    wide, inputs = (32, 16) if tiny else (4096, 1024)
    found = (
        Case(
            "autoencoder",
            lambda: Residual(depth, width, 4 if tiny else 16, pixels),
            (pixels,),
            0,
            8 if tiny else 256,
            terms=2 * (depth * width + 2 * pixels),
        ),
        Case(
            "transformer",
            lambda: Transformer(d, 4, layers, vocabulary),
            (length + 1,),
            vocabulary,
            4 if tiny else 32,
            terms=2 * (layers * (12 * d + 2 * length) + vocabulary) + length,
            positions=length,
        ),
        Case(
            "wide MLP",
            lambda: Perceptron(inputs, wide, 3),
            (inputs,),
            0,
            8 if tiny else 1024,
            terms=2 * (inputs + 3 * wide),
        ),
    )
    return {case.name: case for case in found}


def adam(model: nn.Module, lr: Any = 1e-4, **options: Any) -> torch.optim.Adam:
    """Fused, so that it counts and skips on the device."""
    return torch.optim.Adam(model.parameters(), lr=lr, fused=True, **options)


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    """Around a forward pass."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


def hand_written(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: str, precision: str, scaler: Any = None
) -> Window:
    """The accumulation loop of the PyTorch documentation."""

    def window(batches: Sequence[Tensor]) -> None:
        for x in batches:
            with autocast(device, precision):
                loss = model(x) / len(batches)
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()

    return window


def controlled(controller: ab.BatchController, model: nn.Module, device: str, precision: str) -> Window:
    """The same with the controller, one long epoch of windows of one size."""
    endless: Iterator[Tensor] = iter(())

    def window(batches: Sequence[Tensor]) -> None:
        nonlocal endless
        if controller.examples_seen == 0:
            endless = controller.micro_batches(itertools.cycle(batches))
        for x in endless:
            with autocast(device, precision):
                loss = model(x)
            controller.backward(loss, weight=len(x))
            if controller.step_due:
                controller.step()
                return

    return window


def steady(steps: int) -> dict[str, Any]:
    """The usual rule, held at one size: everything is measured, tested and recorded."""
    limits = ab.Limits(min_steps=steps, max_steps=steps)
    return {"rule": ab.RelativeStandardError(), "limits": limits, "listen": 1.0}
