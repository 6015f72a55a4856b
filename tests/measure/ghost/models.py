"""Networks with every kind of layer whose examples can be told apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Twice(nn.Module):
    """One layer, called twice, on inputs that differ."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


class LanguageModel(nn.Module):
    """Embedding, LayerNorm, Linear; the head is tied to the embedding or has its own weight."""

    def __init__(self, tied: bool, positions: bool = False, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=padding_idx)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.positions = nn.Embedding(5, 4) if positions else None
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        if self.positions is not None:
            h = h + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.mix(self.norm(h)).tanh() + h)


class TwoEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(6, 3), nn.Embedding(6, 3)
        self.right.weight = self.left.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.left(tokens).tanh() * self.right(tokens.flip(1)) + self.left(tokens + 1)


def tied_pair(first: nn.Module, second: nn.Module, *names: str) -> nn.Sequential:
    for name in names:
        setattr(second, name, getattr(first, name))
    return nn.Sequential(first, nn.Tanh(), second)


TOKENS = torch.tensor([[1, 2, 2, 1], [0, 0, 0, 0], [3, 1, 4, 2]])
CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "rows": lambda: (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)), torch.randn(6, 5)),
    "sequence, Gram": lambda: (nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 9)), torch.randn(4, 2, 9)),
    "sequence, direct": lambda: (nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)), torch.randn(4, 7, 3)),
    "four axes": lambda: (nn.Linear(3, 2), torch.randn(4, 2, 3, 3)),
    "conv1d": lambda: (nn.Sequential(nn.Conv1d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)),
                       torch.randn(4, 3, 7)),
    "conv2d, Gram": lambda: (nn.Conv2d(4, 6, 3, stride=2), torch.randn(3, 4, 4, 4)),
    "conv2d, direct": lambda: (nn.Conv2d(2, 3, (2, 1), stride=(1, 2), padding=(1, 0)), torch.randn(3, 2, 6, 7)),
    "conv2d, same": lambda: (nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(3, 1)), torch.randn(3, 2, 5, 6)),
    "conv2d, valid": lambda: (nn.Conv2d(2, 3, 2, padding="valid", bias=False), torch.randn(3, 2, 5, 6)),
    "conv2d, depthwise": lambda: (nn.Conv2d(4, 8, 3, groups=4, padding=1), torch.randn(3, 4, 5, 5)),
    "conv1d, circular": lambda: (nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), torch.randn(3, 2, 5)),
    "conv2d, reflect": lambda: (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), torch.randn(3, 2, 5, 6)),
    "conv3d": lambda: (nn.Conv3d(2, 4, 2, groups=2), torch.randn(3, 2, 3, 4, 3)),
    "norm of rows": lambda: (nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)), torch.randn(4, 3)),
    "norm of positions": lambda: (nn.LayerNorm(5, eps=0.1), torch.randn(4, 3, 5)),
    "norm of two axes": lambda: (nn.LayerNorm((2, 5), bias=False), torch.randn(4, 3, 2, 5)),
    "norm without affine": lambda: (nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5, elementwise_affine=False)),
                                    torch.randn(4, 3)),
    "tokens": lambda: (nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2)), TOKENS),
    "one token": lambda: (nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2)), torch.tensor([1, 2, 1])),
    "padding": lambda: (nn.Embedding(7, 4, padding_idx=2), TOKENS),
    "sparse": lambda: (nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 2)), TOKENS),
    "in place": lambda: (nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)), torch.randn(6, 5)),
    "linear twice": lambda: (Twice(nn.Linear(4, 4)), torch.randn(5, 4)),
    "linear twice, positions": lambda: (Twice(nn.Linear(4, 4)), torch.randn(5, 3, 4)),
    "conv twice": lambda: (Twice(nn.Conv2d(2, 2, 3, padding=1)), torch.randn(3, 2, 4, 4)),
    "norm twice": lambda: (Twice(nn.LayerNorm(4)), torch.randn(5, 3, 4)),
    "tied linears": lambda: (tied_pair(nn.Linear(4, 4), nn.Linear(4, 4), "weight"), torch.randn(5, 4)),
    "tied linears and biases": lambda: (tied_pair(nn.Linear(4, 4), nn.Linear(4, 4), "weight", "bias"),
                                        torch.randn(5, 3, 4)),
    "tied bias only": lambda: (tied_pair(nn.Linear(4, 4), nn.LayerNorm(4), "bias"), torch.randn(5, 4)),
    "tied convs": lambda: (tied_pair(nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 3, groups=2, stride=2), "weight"),
                           torch.randn(3, 4, 8)),
    "tied embeddings": lambda: (TwoEmbeddings(), TOKENS),
    "untied language model": lambda: (LanguageModel(tied=False), TOKENS),
    "tied language model": lambda: (LanguageModel(tied=True), TOKENS),
    "tied language model, padding": lambda: (LanguageModel(tied=True, padding_idx=2), TOKENS),
}  # fmt: skip
