"""A small language model on the characters of a public-domain text: the origin's own first example, in one class."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studies import data
from studies.engine.arms import Arm

Order = Literal["pre", "post"]


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each on a residual branch.

    ``order="pre"`` normalises the branch's input, ``"post"`` the sum, as the first transformers did.
    """

    def __init__(self, width: int, heads: int, order: Order) -> None:
        super().__init__()
        self.heads, self.pre = heads, order == "pre"
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.to_qkv, self.from_heads = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attention(self, h: Tensor) -> Tensor:
        """Of all heads, each position on itself and those before it."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in self.to_qkv(h).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.from_heads(mixed.transpose(-2, -3).flatten(-2))
        return out

    def forward(self, h: Tensor) -> Tensor:
        for norm, branch in zip(self.norms, (self.attention, self.feed), strict=True):
            h = h + branch(norm(h)) if self.pre else norm(h + branch(h))
        return h


class CharacterModel(nn.Module):
    """A decoder-only transformer with learned positions.

    Args:
        vocabulary: Characters.
        context: Positions [characters].
        width, layers, heads: Of the blocks.
        order: Where they are normalised.

    Raises:
        ValueError: If ``order`` is unknown or ``width`` no multiple of ``heads``.

    Example:
        >>> model = CharacterModel(vocabulary=63, context=8, width=16, layers=2, heads=2)
        >>> model.loss(torch.randint(63, (4, 9))).shape
        torch.Size([])
    """

    def __init__(
        self,
        vocabulary: int,
        context: int = 64,
        width: int = 64,
        layers: int = 3,
        heads: int = 4,
        order: Order = "pre",
    ) -> None:
        super().__init__()
        if order not in get_args(Order):
            raise ValueError(f"order must be one of {get_args(Order)}, got order = {order!r}.")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width = {width}, heads = {heads}.")
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, order) for _ in range(layers)))
        # Post-LN ends normalised.
        self.norm = nn.LayerNorm(width) if order == "pre" else nn.Identity()
        self.head = nn.Linear(width, vocabulary)
        for table in (self.embed, self.place):
            nn.init.normal_(table.weight, std=0.02 if order == "pre" else 1.0 / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[-1], device=x.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.embed(x) + self.place(positions))))
        return logits

    def loss(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean cross-entropy of each character from those before it [nats], over ``[sequences, context + 1]``.

        Nothing is sampled: ``generator`` is for the shape of the call.
        """
        return F.cross_entropy(self(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


@dataclass(frozen=True)
class LanguageTask:
    """What every arm of a language study shares.

    Attributes:
        data: Name of a text in :mod:`studies.data`.
        examples: Budget [characters].
        micro_batch: Sequences of one backward pass.
        context: Their length [characters].
        width, layers, heads, order: Of :class:`CharacterModel`.
        probe_examples: Sequences of the probe set, spread over the validation books.
        probe_every: Characters between two evaluations.
    """

    data: str
    examples: int
    micro_batch: int = 4
    context: int = 64
    width: int = 64
    layers: int = 3
    heads: int = 4
    order: Order = "pre"
    probe_examples: int = 256
    probe_every: int = 25_000

    def problem(self, arm: Arm, device: str) -> NextCharacter:
        """A new model and the text."""
        text = data.text(self.data)
        model = CharacterModel(len(text.vocabulary), self.context, self.width, self.layers, self.heads, self.order)
        train, validation, test = (
            torch.from_numpy(part.astype(np.int64)).to(device) for part in (text.train, text.validation, text.test)
        )
        probe = sequences(validation, self.context)
        spread = torch.linspace(0, len(probe) - 1, min(self.probe_examples, len(probe))).long()
        return NextCharacter(model.to(device), self, train, probe[spread], sequences(test, self.context))

    def collapsed_loss(self) -> float:
        """Cross-entropy of the validation books under the frequencies of the training books' characters."""
        text = data.text(self.data)
        kinds = len(text.vocabulary)
        known, met = (np.bincount(part, minlength=kinds) for part in (text.train, text.validation))
        return float(-(met / met.sum()) @ np.log((known + 1) / (known + 1).sum()))


@dataclass(frozen=True)
class NextCharacter:
    """A language model and its text."""

    network: CharacterModel
    task: LanguageTask
    train: Tensor
    probe: Tensor
    test: Tensor

    def micro_batches(self, seed: int) -> Iterator[Tensor]:
        """The text cut at a new random place each pass, in a new random order, until the budget is spent."""
        generator = torch.Generator().manual_seed(seed)
        left = math.ceil(self.task.examples / self.task.context)
        while left > 0:
            start = int(torch.randint(self.task.context, (), generator=generator))
            cut = sequences(self.train[start:], self.task.context)
            order = torch.randperm(len(cut), generator=generator)[:left]
            yield from (cut[index] for index in order.split(self.task.micro_batch))
            left -= len(order)

    def weight(self, x: Tensor) -> float:
        """Its predicted characters."""
        return len(x) * self.task.context

    def evaluate(self) -> float:
        """Mean loss on the probe set."""
        return mean_loss(self.network, self.probe)

    def score(self) -> dict[str, float]:
        """Mean loss on the test books."""
        return {"test_loss": mean_loss(self.network, self.test)}


def sequences(text: Tensor, context: int) -> Tensor:
    """``[sequences, context + 1]``: the text in pieces of ``context``, each with the character that follows it.

    Example:
        >>> sequences(torch.arange(8), 3).tolist()
        [[0, 1, 2, 3], [3, 4, 5, 6]]
    """
    return text.unfold(0, context + 1, context)


@torch.no_grad()
def mean_loss(model: CharacterModel, x: Tensor) -> float:
    """Mean loss over sequences, in pieces that fit a small memory."""
    return float(sum(model.loss(part) * len(part) for part in x.split(256)) / len(x))
