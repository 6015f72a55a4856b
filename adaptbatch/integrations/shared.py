"""What the integrations share: refusals, and the examples of a batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from adaptbatch.measure.examples import first_dimension


def refuse(name: str, problems: Iterable[tuple[bool, str]]) -> None:
    """Raise the first problem that is one.

    Args:
        name: Of what refuses.
        problems: Whether it is one, and what it says after the name.

    Raises:
        ValueError: Named after it.
    """
    for refused, problem in problems:
        if refused:
            raise ValueError(f"{name} {problem}")


def examples_of(batch: Any) -> int:
    """The first dimension of the first tensor in ``batch``, in any nesting of mappings, lists and tuples.

    Raises:
        ValueError: If there is none.

    Example:
        >>> import torch
        >>> examples_of({"name": "a", "pair": (torch.zeros(()), torch.zeros(3, 2))})
        3
    """
    size = first_dimension(batch)
    if size is None:
        raise ValueError(
            f"weight must be given for a batch without a tensor that has a dimension, got {type(batch).__name__}; a "
            f"function of the batch: weight=lambda batch: ..."
        )
    return size
