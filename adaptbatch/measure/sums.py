"""What is measured in a window, summed on the device by name; the table says what each of it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from adaptbatch.accumulate.gradients import wide_dtype
from adaptbatch.schema import GRADIENTS, Count, each, named, none_or, number, tensor


@dataclass(frozen=True)
class Quantity:
    """How a quantity follows its gradients.

    Attributes:
        scale: Power of the loss scale it has.
        mean: Power of the divisor by which it becomes that of the mean.
        accumulated: Whether it is read off ``.grad``, and not off the gradients on their way there.
    """

    scale: int = 0
    mean: int = 0
    accumulated: bool = False


QUANTITIES: dict[str, Quantity] = {
    "weighted": Quantity(scale=2),
    "batch": Quantity(scale=2, mean=2, accumulated=True),
    "metric_weighted": Quantity(scale=2),
    "metric_batch": Quantity(scale=2, mean=2, accumulated=True),
    # Along the mean, whose own scale is divided out.
    "radial_sq_norms": Quantity(scale=2),
    "rank_sq_norms": Quantity(scale=2),
    "consecutive_product": Quantity(scale=1, mean=1, accumulated=True),
    "loss_sum": Quantity(),
    # Of the mean, as it is stepped on.
    "applied_sq_norm": Quantity(),
    # Above zero: the gradients are not those that were measured.
    "suspect": Quantity(),
}


class Sums(dict[str, Tensor]):
    """The sums of the open window by the names of :data:`QUANTITIES`: scalars on the device, none of them read.

    Attributes:
        cells: How many gradients ``weighted`` is summed over: of micro-batches, or of their examples.

    Example:
        Gradients of length 2 and 4, back-propagated under a loss scale of 2, whose sum is to be halved:

        >>> sums = Sums(cells=2)
        >>> for length in (4.0, 8.0):
        ...     sums.add("weighted", torch.tensor(length * length))
        >>> sums["batch"] = torch.tensor(144.0)
        >>> sums.unscale(torch.tensor(2.0), accumulated=True)
        >>> sums.divide(2.0)
        >>> {name: value.item() for name, value in sums.items()}
        {'weighted': 20.0, 'batch': 9.0}
    """

    def __init__(self, named: Mapping[str, Tensor] | None = None, cells: int = 0) -> None:
        super().__init__(named or {})
        self.cells = cells

    def add(self, name: str, value: Tensor, factor: float = 1.0) -> None:
        """Add ``factor * value`` to what is there, in place."""
        there = self.get(name)
        if there is None:
            self[name] = value.to(wide_dtype(value.device)) * factor
        else:
            there.add_(value.to(there.device), alpha=factor)

    def copies(self) -> dict[str, Tensor]:
        """What is there now, whatever is added later."""
        return {name: value.clone() for name, value in self.items()}

    def unscale(self, scale: Tensor | None, accumulated: bool) -> None:
        """Take the loss scale out.

        Args:
            scale: Of the window; None: there is none.
            accumulated: Whether ``.grad`` still had it.
        """
        if scale is None:
            return
        for name, quantity in QUANTITIES.items():
            if name in self and quantity.scale and (accumulated or not quantity.accumulated):
                self[name] = self[name] / scale.double() ** quantity.scale

    def divide(self, divisor: float) -> None:
        """What was measured of the accumulated gradient becomes that of the mean, ``1 / divisor`` times as long."""
        if divisor == 1.0:
            return
        for name, quantity in QUANTITIES.items():
            if name in self and quantity.mean:
                self[name] = self[name] / divisor**quantity.mean

    def share(self, total: Mapping[str, float]) -> None:
        """The sums of all ranks."""
        self.cells = round(total["cells"])
        for name in self:
            self[name] = torch.tensor(total[name], dtype=torch.float64)


@dataclass(frozen=True)
class Kept:
    """Of a rule that keeps gradients: what was in ``.grad`` after each micro-batch, and what these weigh."""

    sums: Annotated[Any, each(GRADIENTS)]
    weights: Annotated[Any, each(number("be a positive, finite number", lambda x: 0.0 < x < float("inf")))]


@dataclass(frozen=True)
class SavedWindow:
    """What of an open window no checkpoint of model and optimizer holds, and the gradient of the window before."""

    gradients: Annotated[Any, none_or(GRADIENTS)]
    sums: Annotated[Any, none_or(named(tensor(scalar=True), known=QUANTITIES))]
    cells: Count
    kept: Kept | None
    previous: Annotated[Any, none_or(GRADIENTS)]
