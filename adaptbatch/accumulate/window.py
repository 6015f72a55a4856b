"""One window's sums, open on the device and finished on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptbatch.accumulate.ranks import Ranks
from adaptbatch.records import Measurement
from adaptbatch.state import Heard


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
    ``cells`` counts this rank's micro-batches, ``all_cells`` those of all ranks, ``pieces`` what was measured on its
    own: the micro-batches, or their examples. ``due`` says that ``.grad`` is its mean, ``ended`` that the data ended
    with it, ``stepped`` that its step has begun. ``scale`` is a GradScaler's, ``unscales`` whether the mean is without
    it.
    ``extra`` holds what only some windows measure, by the name of its :class:`~adaptbatch.records.Measurement` field.
    """

    reference: float = 1.0
    weight: float = 0.0
    largest: float = 0.0
    cells: int = 0
    all_cells: int = 0
    pieces: int = 0
    due: bool = False
    ended: bool = False
    broken: bool = False
    stepped: bool = False
    synced: bool = True
    unscales: bool = True
    scale: Tensor | None = None
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
        # One element may come with dimensions.
        loss = loss.reshape(()).to(sq_norm) * weight
        self.loss_sum = loss if self.loss_sum is None else self.loss_sum + loss
        self.weight += weight
        self.largest = max(self.largest, weight)
        self.cells += 1
        self.all_cells += 1
        self.pieces += len(sq_norm) if by_example else 1

    def share(self, ranks: Ranks, note: Mapping[str, float | Tensor]) -> dict[str, float]:
        """Make the sums those of all ranks, in one all-reduce; ``|g|^2`` is a rank's part of it before.

        Args:
            ranks: Several.
            note: More numbers to be summed.

        Returns:
            The sums of ``note``.
        """
        own = {"weight": self.weight, "largest": self.largest, "all_cells": self.cells, "pieces": self.pieces}
        total = ranks.sum({**own, **self._scalars(), **note})
        self.weight, self.largest = total["weight"], total["largest"] / ranks.world_size
        self.all_cells, self.pieces = round(total["all_cells"]), round(total["pieces"])
        host = {name: torch.tensor(value, dtype=torch.float64) for name, value in total.items()}
        self.norms = SquaredNorms(host["weighted"], host["batch"])
        if self.in_metric is not None:
            self.in_metric = SquaredNorms(host["metric_weighted"], host["metric_batch"])
        self.loss_sum = host["loss_sum"]
        self.extra = {name: host[name] for name in self.extra}
        return {name: total[name] for name in note}

    def divide(self, divisor: float) -> None:
        """What was measured of the accumulated gradient becomes that of the mean, ``1 / divisor`` times as long."""
        if divisor == 1.0:
            return
        for norms in (self.norms, self.in_metric):
            if norms is not None and norms.batch is not None:
                norms.batch = norms.batch / divisor**2
        if "consecutive_product" in self.extra:
            self.extra["consecutive_product"] = self.extra["consecutive_product"] / divisor

    def _scalars(self) -> dict[str, Tensor]:
        named = {"weighted": self.norms.weighted, "batch": self.norms.batch, "loss_sum": self.loss_sum, **self.extra}
        if self.in_metric is not None:
            named |= {"metric_weighted": self.in_metric.weighted, "metric_batch": self.in_metric.batch}
        return {name: value for name, value in named.items() if value is not None}

    def state_dict(self) -> dict[str, Any]:
        """Its sums, and of a due one what was measured of the mean; the gradients are the sensor's."""
        in_metric = None if self.in_metric is None else self.in_metric.weighted
        measured = {name: value for name, value in self._scalars().items() if name not in _SUMS}
        return {name: getattr(self, name) for name in _OPEN} | {
            "weighted": self.norms.weighted,
            "metric_weighted": in_metric,
            "loss_sum": self.loss_sum,
            "scale": self.scale,
            "measured": measured if self.due else None,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> OpenWindow:
        """The window whose :meth:`state_dict` this is."""
        sums = {name: None if state[name] is None else state[name].to(device) for name in _SUMS}
        window = cls(**{name: state[name] for name in _OPEN}, loss_sum=sums["loss_sum"], scale=sums["scale"])
        window.norms = SquaredNorms(sums["weighted"])
        measured = {name: value.to(device) for name, value in (state["measured"] or {}).items()}
        window.norms.batch = measured.pop("batch", None)
        if sums["metric_weighted"] is not None:
            window.in_metric = SquaredNorms(sums["metric_weighted"], measured.pop("metric_batch", None))
        window.extra = measured
        return window

    def finished(self, lr: float | Tensor) -> FinishedWindow:
        """The finished window's scalars, on their way to the host in one copy, a learning rate on the device too."""
        scalars = self._scalars()
        # One on the host already would have to wait for the device on its way there.
        host = None if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)
        if host is None:
            scalars["lr"] = torch.as_tensor(lr)
        values = torch.stack([scalars["weighted"], *(v.to(scalars["weighted"]) for v in list(scalars.values())[1:])])
        counts = (self.weight, self.cells, self.pieces)
        finished = FinishedWindow(*counts, tuple(scalars), HostCopy(values), lr=host)
        finished.largest, finished.all_cells, finished.ended = self.largest, self.all_cells, self.ended
        return finished


_OPEN = ("reference", "weight", "largest", "cells", "all_cells", "pieces", "due", "ended")
_SUMS = ("weighted", "metric_weighted", "loss_sum", "scale")


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
    all_cells: int = 0
    ended: bool = False
    steps: int = 0
    row: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """What pooling it later needs, in plain numbers; waits for them."""
        numbers = [self.global_batch, float(self.pieces), *self.values.read()]
        state = {"names": list(self.names), "numbers": numbers, "lr": self.lr}
        return state | {"lr_factor": self.lr_factor, "steps": self.steps}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> FinishedWindow:
        """The window whose :meth:`state_dict` this is; its history row is another run's."""
        n, pieces, *values = state["numbers"]
        counts, named = (n, 0, int(pieces)), (tuple(state["names"]), HostCopy.of(values))
        return cls(*counts, *named, lr=state["lr"], lr_factor=state["lr_factor"], steps=state["steps"])

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
        more = ("radial_sq_norms", "consecutive_product", "rank_sq_norms") if prefix == "" else ()
        norms = named[f"{prefix}weighted"], named[f"{prefix}batch"]
        return Measurement(*norms, self.global_batch, self.pieces, **{name: named.get(name, math.nan) for name in more})

    @property
    def applied_sq_norm(self) -> float:
        """``|g|^2`` as the optimizer got it, after clipping."""
        named = self.named()
        return named.get("applied_sq_norm", named["batch"])

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
            # By itself it would record the current device's stream, which need not be the one that copies.
            self._event.record(torch.cuda.current_stream(scalars.device))

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
