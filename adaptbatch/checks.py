"""Refusals of bad input: each names the argument, its value, the bound and the way out."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def require_single_process(model: nn.Module) -> None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        raise ValueError(
            f"model must be trained by a single process, got a world of {torch.distributed.get_world_size()} ranks "
            f"({type(model).__name__}); this release measures one process."
        )


def checked_weight(weight: float) -> float:
    if isinstance(weight, Tensor):
        raise ValueError(
            "weight must be a Python number, got a tensor: reading it would stall the device; pass len(x)."
        )
    if isinstance(weight, bool) or not (0.0 < weight < math.inf):
        raise ValueError(f"weight must be positive and finite, got weight = {weight!r}; skip an empty micro-batch.")
    return float(weight)


def require_examples(weight: float, examples: int) -> None:
    if weight != examples:
        raise ValueError(
            f"weight must be the number of examples with ghost=True, got weight = {weight!r} for {examples} examples; "
            f"weigh tokens without ghost norms."
        )


def require_scalar_loss(loss: Tensor) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        kind = (
            f"shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}" if isinstance(loss, Tensor) else repr(loss)
        )
        raise ValueError(f"loss must be a scalar tensor with a graph, the mean over the micro-batch, got {kind}.")
