"""A study under torchrun: every run is trained by all ranks together, which share each micro-batch."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
LossOf = Callable[[Tensor, torch.Generator], Tensor]


def world_size() -> int:
    """Ranks that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process among them."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def group() -> Iterator[None]:
    """The process group of a command, where torchrun started several."""
    if world_size() == 1:
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
        # A rank that leaves while another still talks, or a replica that outlives its group, aborts in gloo's threads.
        gc.collect()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def agreed(value: T) -> T:
    """What rank 0 says, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def share(x: Tensor) -> Tensor:
    """This rank's part of a micro-batch.

    Raises:
        ValueError: If there are more ranks than examples.
    """
    if len(x) < world_size():
        raise ValueError(f"a micro-batch must have an example for each of {world_size()} ranks, got {len(x)}.")
    return x[rank() :: world_size()]


class Loss(nn.Module):
    """A network's loss as a module: DistributedDataParallel synchronises what is computed in forward()."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, codes: torch.Generator | None = None) -> Tensor:
        return self.network.loss(x, codes)


def synchronised(network: Any) -> tuple[nn.Module, LossOf]:
    """The model for the controller and the loss to back-propagate: plain in one process."""
    if world_size() == 1:
        return network, network.loss
    model = DistributedDataParallel(Loss(network))
    return model, model
