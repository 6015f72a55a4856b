"""The controller in an Accelerate loop: made from what ``accelerator.prepare`` returned, saved with its state."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from adaptbatch.controller import BatchController

_OWN_LOOP = {DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA}


def controller_for(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, **options: Any) -> BatchController:
    """A controller for a prepared model and optimizer; the loop is the plain one.

    ``controller.backward`` takes the place of ``accelerator.backward`` and of ``accelerator.accumulate``, whose windows
    go by a running count of batches that does not follow a change of their size. The controller synchronises ranks,
    scales the loss and steps the optimizer itself: clip with ``torch.nn.utils.clip_grad_norm_`` once
    ``step_due`` is true, and drive schedulers that were not prepared by :class:`~adaptbatch.ScheduleDriver`.
    ``accelerator.save_state`` and ``load_state`` carry its state.

    Args:
        accelerator: That prepared both, without accumulation of its own.
        model: As prepared.
        optimizer: As prepared.
        options: Those of :class:`~adaptbatch.controller.BatchController`, without ``scaler``.

    Raises:
        ValueError: If ``accelerator`` accumulates itself, or hands the loop to DeepSpeed, Megatron-LM or XLA; and what
            the controller refuses.

    Example:
        >>> import torch
        >>> accelerator = Accelerator(cpu=True)
        >>> model = nn.Linear(2, 1)
        >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> controller_for(accelerator, model, optimizer).accumulation_steps
        2
    """
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"accelerator must not accumulate itself, got gradient_accumulation_steps = "
            f"{accelerator.gradient_accumulation_steps}; leave it at 1, the controller chooses the steps."
        )
    if accelerator.distributed_type in _OWN_LOOP:
        raise ValueError(
            f"accelerator must leave the optimizer's step to the loop, got distributed_type = "
            f"{accelerator.distributed_type.value}; use DDP or FSDP2."
        )
    own = getattr(optimizer, "optimizer", optimizer)
    controller = BatchController(model, own, scaler=accelerator.scaler, **options)
    accelerator.register_for_checkpointing(controller)
    return controller
