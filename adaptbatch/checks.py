"""Refusals of bad input: each names the argument, its value, the bound and the way out."""

from __future__ import annotations

import math

from torch import Tensor


def require_scaler(scaler: object) -> None:
    missing = [name for name in ("scale", "unscale_", "step", "update") if not hasattr(scaler, name)]
    if scaler is not None and missing:
        raise ValueError(
            f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__} without {missing}; without "
            f"loss scaling (bfloat16, float32) leave it out."
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
