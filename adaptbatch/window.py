"""One window's sums, open on the device and finished on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adaptbatch.loop import Heard
from adaptbatch.records import Measurement


@dataclass
class SquaredNorms:
    """``Q`` and ``|g|^2`` of the open window in one metric, on the device."""

    weighted: Tensor | None = None
    batch: Tensor | None = None

    def add(self, weighted: Tensor) -> None:
        """Add one micro-batch's part of ``Q``."""
        self.weighted = weighted if self.weighted is None else self.weighted + weighted


@dataclass
class OpenWindow:
    """The open window; its sums stay on the device.

    Each loss is back-propagated times ``weight / reference``: the weight of all micro-batches that are expected makes
    the accumulated gradient the mean already when they arrive, and keeps it near a mean's size when others do.
    ``pieces`` counts what was measured on its own: the micro-batches, or their examples. ``extra`` holds what only some
    windows measure, by the name of its :class:`~adaptbatch.records.Measurement` field.
    """

    reference: float = 1.0
    weight: float = 0.0
    largest: float = 0.0
    cells: int = 0
    pieces: int = 0
    due: bool = False
    broken: bool = False
    norms: SquaredNorms = field(default_factory=SquaredNorms)
    in_metric: SquaredNorms | None = None
    loss_sum: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    def add(self, sq_norm: Tensor, loss: Tensor, weight: float, in_metric: Tensor | None = None) -> None:
        """Add one micro-batch; norms are of the gradient as back-propagated, ``weight / reference`` of the mean's.

        By example ``sq_norm`` is ``(m,)``, of each example's share in that gradient, ``1 / reference`` times its own.
        ``in_metric`` is the scalar in the optimizer's metric.
        """
        by_example = sq_norm.dim() == 1
        factor = self.reference**2 / weight
        self.norms.add(sq_norm.sum() * self.reference**2 if by_example else sq_norm * factor)
        if in_metric is not None and self.in_metric is not None:
            self.in_metric.add(in_metric * factor)
        loss = loss.to(sq_norm) * weight
        self.loss_sum = loss if self.loss_sum is None else self.loss_sum + loss
        self.weight += weight
        self.largest = max(self.largest, weight)
        self.cells += 1
        self.pieces += len(sq_norm) if by_example else 1

    def finished(self, lr: float | Tensor) -> FinishedWindow:
        """The finished window's scalars, on their way to the host in one copy, a learning rate on the device too."""
        named = {"weighted": self.norms.weighted, "batch": self.norms.batch, "loss_sum": self.loss_sum, **self.extra}
        if self.in_metric is not None:
            named |= {"metric_weighted": self.in_metric.weighted, "metric_batch": self.in_metric.batch}
        if isinstance(lr, Tensor):
            named["lr"] = lr
        scalars = {name: value for name, value in named.items() if value is not None}
        values = torch.stack([scalars["weighted"], *(v.to(scalars["weighted"]) for v in list(scalars.values())[1:])])
        host = None if isinstance(lr, Tensor) else float(lr)
        counts = (self.weight, self.cells, self.pieces)
        return FinishedWindow(*counts, tuple(scalars), HostCopy(values), lr=host, largest=self.largest)


@dataclass
class FinishedWindow:
    """A finished window whose numbers are, or will be, on the host.

    ``steps`` is its accumulation steps, 0 if the data's end cut it short; ``row`` its history row while that waits.
    """

    global_batch: float
    cells: int
    pieces: int
    names: Sequence[str]
    values: HostCopy
    lr: float | None = None
    lr_factor: float = 1.0
    largest: float = math.nan
    steps: int = 0
    row: int | None = None

    def named(self) -> Mapping[str, float]:
        """The scalars by name; waits for them."""
        return dict(zip(self.names, self.values.read(), strict=True))

    @property
    def measurement(self) -> Measurement:
        """Its Euclidean squared norms, and what else was measured."""
        return self._measurement(self.named(), "")

    @property
    def heard(self) -> Heard:
        """All its numbers."""
        named = self.named()
        in_metric = self._measurement(named, "metric_") if "metric_weighted" in named else None
        return Heard(self._measurement(named, ""), in_metric, self.loss, self.learning_rate, self.steps)

    def _measurement(self, named: Mapping[str, float], prefix: str) -> Measurement:
        # What else was measured is Euclidean.
        more = ("radial_sq_norms", "consecutive_product") if prefix == "" else ()
        norms = named[f"{prefix}weighted"], named[f"{prefix}batch"]
        return Measurement(*norms, self.global_batch, self.pieces, **{name: named.get(name, math.nan) for name in more})

    @property
    def learning_rate(self) -> float:
        """As it was applied."""
        return self.lr_factor * (self.named()["lr"] if self.lr is None else self.lr)

    @property
    def loss(self) -> float:
        """Weighted mean over the window."""
        return self.named()["loss_sum"] / self.global_batch


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
