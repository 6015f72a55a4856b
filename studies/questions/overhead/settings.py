"""What is trained in one window of the overhead study: networks, and their micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from studies import data
from studies.engine.language import CharacterModel
from studies.engine.networks import Autoencoder

STEPS = 8
MICRO_BATCH, WIDTH = 256, 128


class Small(nn.Module):
    """A linear layer of one parameter tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 1, bias=False)

    def loss(self, x: Tensor) -> Tensor:
        """Mean squared output."""
        return self.layer(x).square().mean()


class Wide(nn.Module):
    """One hidden layer of 4096, all whose time and memory is in a few large parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 784))

    def loss(self, x: Tensor) -> Tensor:
        """Mean squared error of the reconstruction."""
        return (self.layers(x) - x).square().mean()


@dataclass(frozen=True)
class Setting:
    """What is trained in one window.

    Attributes:
        network: Makes it.
        micro_batches: Of one window.
        repeats: Windows that are timed together, where one is too short for a clock.
    """

    network: Callable[[], Any]
    micro_batches: Callable[[], list[Tensor]]
    repeats: int = 1


def _deep() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(depth=80, widths=(WIDTH, WIDTH), code=16, residual="scaled")


def _language() -> CharacterModel:
    torch.manual_seed(0)
    return CharacterModel(vocabulary=63)


def _images(micro_batch: int = MICRO_BATCH) -> list[Tensor]:
    images = torch.from_numpy(data.load("mnist").train_inputs[: STEPS * micro_batch])
    return list(images.split(micro_batch))


def _noise(steps: int) -> list[Tensor]:
    return list(torch.randn(steps, 32, 16, generator=torch.Generator().manual_seed(0)))


def _characters() -> list[Tensor]:
    return list(torch.randint(63, (STEPS, 16, 65), generator=torch.Generator().manual_seed(0)))


SETTINGS = {
    "80 layers": Setting(_deep, _images),
    "one parameter, k = 8": Setting(Small, partial(_noise, 8), repeats=40),
    "one parameter, k = 2": Setting(Small, partial(_noise, 2), repeats=80),
    "transformer": Setting(_language, _characters),
    "wide MLP": Setting(Wide, partial(_images, 32)),
}
