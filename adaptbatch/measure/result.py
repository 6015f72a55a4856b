"""A finished window's numbers, on their way to the host in one copy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from adaptbatch.accumulate.window import Window
from adaptbatch.measure.sums import Sums
from adaptbatch.records import Measurement, WindowResult


@dataclass
class PendingResult:
    """What was measured in a finished window, on the host as soon as somebody asks.

    Attributes:
        global_batch: Its weights' sum [examples].
        cells: What was measured on its own.
        names: Of the numbers in ``values``.
        values: The sums.
        micro_batches: Of all ranks.
        lr: Learning rate of the optimizer; None: on the device, among the numbers.
        steps: Its accumulation steps, 0 if the data's end cut it short.
        lr_factor: Of a coupling, known once it stepped.
        row: Of the history, which waits for these numbers; None: nothing waits.
    """

    global_batch: float
    cells: int
    names: Sequence[str]
    values: HostCopy
    micro_batches: int
    lr: float | None
    steps: int
    lr_factor: float = 1.0
    row: int | None = None

    @classmethod
    def of(cls, sums: Sums, window: Window, lr: float | Tensor, steps: int) -> PendingResult:
        """Send the sums, and a learning rate on the device, on their way."""
        # A rate on the host already would have to wait for the device on its way there.
        on_host = None if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)
        scalars = sums if on_host is not None else sums | {"lr": torch.as_tensor(lr)}
        first, *others = names = sorted(scalars, key="batch".__ne__)
        one = scalars[first]
        values = torch.stack([one, *(scalars[name].to(one) for name in others)])
        return cls(window.weight, sums.cells, names, HostCopy(values), window.all_micro_batches, on_host, steps)

    @classmethod
    def restored(cls, result: WindowResult) -> PendingResult:
        """One that has arrived already; its history row is another run's."""
        counts = result.measurement.global_batch, result.measurement.cells
        arrived = cls(*counts, (), HostCopy.of(()), 0, result.lr, 0)
        arrived._measured = result
        return arrived

    @property
    def result(self) -> WindowResult:
        """All its numbers; waits for them."""
        measured = self._measured
        return measured if self.lr_factor == 1.0 else replace(measured, lr=self.lr_factor * measured.lr)

    def disbelieve(self) -> None:
        """Its gradient is not that of its measurements: both are evidence of nothing."""
        measured = self._measured.measurement
        unknown = replace(measured, weighted_sq_norms=math.nan, batch_sq_norm=math.nan)
        self._measured = replace(self._measured, measurement=unknown, in_metric=None, applied_sq_norm=math.nan)

    @cached_property
    def suspect(self) -> bool:
        """Whether its gradients are not those that were measured."""
        return self._named.get("suspect", 0.0) > 0.0

    @cached_property
    def _named(self) -> Mapping[str, float]:
        return dict(zip(self.names, self.values.read(), strict=True))

    @cached_property
    def _measured(self) -> WindowResult:
        named = self._named
        return WindowResult(
            self._measurement(named, ""),
            self._measurement(named, "metric_") if "metric_batch" in named else None,
            named.get("loss_sum", math.nan) / self.global_batch,
            named["lr"] if self.lr is None else self.lr,
            self.steps,
            named.get("applied_sq_norm", named["batch"]),
        )

    def _measurement(self, named: Mapping[str, float], prefix: str) -> Measurement:
        # What else was measured is Euclidean.
        more = ("radial_sq_norms", "consecutive_product", "rank_sq_norms") if prefix == "" else ()
        norms = named.get(f"{prefix}weighted", math.nan), named[f"{prefix}batch"]
        return Measurement(*norms, self.global_batch, self.cells, **{name: named.get(name, math.nan) for name in more})


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
