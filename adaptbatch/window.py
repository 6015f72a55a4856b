"""One window's sums, open on the device and finished on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptbatch.records import Measurement


@dataclass
class OpenWindow:
    """The open window; its sums stay on the device.

    Each loss is back-propagated times ``weight / reference``: the weight of all micro-batches that are expected makes
    the accumulated gradient the mean already when they arrive, and keeps it near a mean's size when others do.
    ``pieces`` counts what was measured on its own: the micro-batches, or their examples.
    """

    reference: float = 1.0
    weight: float = 0.0
    cells: int = 0
    pieces: int = 0
    due: bool = False
    broken: bool = False
    weighted_sq_norms: Tensor | None = None
    loss_sum: Tensor | None = None
    batch_sq_norm: Tensor | None = None

    def add(self, sq_norm: Tensor, loss: Tensor, weight: float) -> None:
        """Add one micro-batch; ``sq_norm`` is of the gradient as back-propagated, ``weight / reference`` of the mean's.

        By example it is ``(m,)``, of each example's share in that gradient, ``1 / reference`` times its own.
        """
        by_example = sq_norm.dim() == 1
        weighted = sq_norm.sum() * self.reference**2 if by_example else sq_norm * (self.reference**2 / weight)
        loss = loss.to(sq_norm) * weight
        self.weighted_sq_norms = weighted if self.weighted_sq_norms is None else self.weighted_sq_norms + weighted
        self.loss_sum = loss if self.loss_sum is None else self.loss_sum + loss
        self.weight += weight
        self.cells += 1
        self.pieces += len(sq_norm) if by_example else 1

    def finished(self, lr: float | Tensor) -> FinishedWindow:
        """The finished window's scalars, on their way to the host in one copy, a learning rate on the device too."""
        assert self.weighted_sq_norms is not None
        assert self.batch_sq_norm is not None
        assert self.loss_sum is not None
        scalars = [self.weighted_sq_norms, self.batch_sq_norm, self.loss_sum]
        if isinstance(lr, Tensor):
            values = HostCopy(torch.stack([*scalars, lr.to(scalars[0])]))
            return FinishedWindow(self.weight, self.cells, self.pieces, values)
        return FinishedWindow(self.weight, self.cells, self.pieces, HostCopy(torch.stack(scalars)), lr=float(lr))


@dataclass
class FinishedWindow:
    """A finished window whose numbers are, or will be, on the host; ``row`` is its history row while that waits."""

    global_batch: float
    cells: int
    pieces: int
    values: HostCopy
    lr: float | None = None
    lr_factor: float = 1.0
    row: int | None = None

    @property
    def measurement(self) -> Measurement:
        weighted_sq_norms, batch_sq_norm = self.values.read()[:2]
        return Measurement(weighted_sq_norms, batch_sq_norm, self.global_batch, self.pieces)

    @property
    def learning_rate(self) -> float:
        """As it was applied."""
        return self.lr_factor * (self.values.read()[3] if self.lr is None else self.lr)

    @property
    def loss(self) -> float:
        return self.values.read()[2] / self.global_batch


class HostCopy:
    """A few device scalars on their way to the host: copied without stalling the device, read when first asked for.

    On a GPU the copy goes into pinned memory beside the running kernels, and :meth:`read` waits for its event; one
    window later it has long passed.
    """

    def __init__(self, scalars: Tensor) -> None:
        self._values: list[float] | None = None
        self._event: torch.Event | None = None
        self._scalars = scalars
        if scalars.device.type == "cuda":
            self._scalars = torch.empty(scalars.shape, dtype=scalars.dtype, pin_memory=True)
            self._scalars.copy_(scalars, non_blocking=True)
            self._event = torch.Event(scalars.device.type)
            self._event.record()

    @classmethod
    def of(cls, values: Sequence[float]) -> HostCopy:
        """A copy that has arrived already."""
        copy = cls(torch.empty(0))
        copy._values = [float(value) for value in values]
        return copy

    def read(self) -> list[float]:
        """The values; the one place where the package waits for the device."""
        if self._values is None:
            if self._event is not None:
                self._event.synchronize()
            self._values = [float(value) for value in self._scalars.tolist()]
        return self._values
