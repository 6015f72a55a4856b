"""How many examples a micro-batch has, as the model's call shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class ExampleCount:
    """The first dimension of the first tensor that a model was last called with, for gradients, before a backward pass.

    A call that failed, or led to no backward pass, is forgotten with the next. A trainer may call parts of the model
    and never the whole: then the part that is called first counts.

    Example:
        >>> import torch
        >>> model = nn.Linear(3, 1)
        >>> count = ExampleCount(model)
        >>> _ = model(torch.zeros(5, 3))
        >>> count.take(), count.take()
        (5, None)
        >>> count.close()
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: int | None = None
        hooks = [module.register_forward_pre_hook(self._called, with_kwargs=True) for module in model.modules()]
        self._whole, self._parts = hooks[0], hooks[1:]

    def _called(self, module: nn.Module, args: tuple[Any, ...], *kwargs: Mapping[str, Any]) -> None:
        # Taken off while the module is at its hooks, as by the collector, it is called without kwargs.
        if module is self._model:
            self._forget_parts()
            if torch.is_grad_enabled():
                self._seen = None
        # Of a call for evaluation no backward pass follows.
        if self._seen is None and torch.is_grad_enabled():
            self._seen = first_dimension((args, *kwargs))

    def take(self) -> int | None:
        """The number of examples since the last time; None where no call showed it."""
        seen, self._seen = self._seen, None
        return seen

    def _forget_parts(self) -> None:
        for handle in self._parts:
            handle.remove()
        self._parts = []

    def close(self) -> None:
        """Leave no hook."""
        self._whole.remove()
        self._forget_parts()


def first_dimension(batch: Any) -> int | None:
    """Of the first tensor in any nesting of mappings, lists and tuples; None where there is none.

    Example:
        >>> import torch
        >>> first_dimension({"name": "a", "pair": (torch.zeros(()), torch.zeros(3, 2))})
        3
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    if hasattr(batch, "values"):
        batch = batch.values()
    elif not isinstance(batch, (list, tuple)):
        return None
    return next((size for size in map(first_dimension, batch) if size is not None), None)
