"""The open window: what ``.grad`` holds, of how many micro-batches, and what may happen to it next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from adaptbatch.schema import Flag, Natural, Positive, none_or, refuse, tensor


@dataclass
class Window:
    """The open window, as far as ``.grad`` goes: nothing of it is measured.

    Each loss is back-propagated times ``weight / reference``: the weight of all micro-batches that are expected makes
    the accumulated gradient the mean already when they arrive, and keeps it near a mean's size when others do.

    Attributes:
        reference: That weight [examples].
        weight, largest: Sum of the micro-batches' weights, and the largest; over ranks once they are shared.
        micro_batches, all_micro_batches: Of this rank, and of all.
        due: Whether ``.grad`` is its mean.
        ended: Whether the data ended with it.
        broken: Whether a backward pass of it has begun and not ended.
        stepped: Whether its step has begun.
        synced: Whether its last backward pass synchronised the ranks.
        unscales: Whether the mean is without the loss scale.
        scale: The loss scale of a GradScaler.
    """

    reference: Positive = 1.0
    weight: Positive = 0.0
    largest: Positive = 0.0
    micro_batches: Natural = 0
    all_micro_batches: Natural = 0
    due: Flag = False
    ended: Flag = False
    scale: Annotated[Tensor | None, none_or(tensor(scalar=True))] = None
    broken: bool = False
    stepped: bool = False
    synced: bool = True
    unscales: bool = True

    def add(self, weight: float) -> None:
        """One micro-batch more."""
        self.weight += weight
        self.largest = max(self.largest, weight)
        self.micro_batches += 1
        self.all_micro_batches += 1

    def own(self) -> dict[str, float]:
        """What all ranks' windows sum up."""
        return {"weight": self.weight, "largest": self.largest, "micro_batches": self.micro_batches}

    def share(self, total: Mapping[str, float], world_size: int) -> None:
        """The window of all ranks, of the sums of :meth:`own`; ``largest`` is their mean."""
        self.weight, self.largest = total["weight"], total["largest"] / world_size
        self.all_micro_batches = round(total["micro_batches"])

    @staticmethod
    def require_whole(name: str, saved: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless it is one of a single process, whose parts go together."""
        count, weight = saved["micro_batches"], saved["weight"]
        if saved["all_micro_batches"] != count:
            expected = f"be {name}['micro_batches'] = {count!r}"
            refuse(f"{name}['all_micro_batches']", expected, saved["all_micro_batches"])
        if saved["largest"] > weight:
            refuse(f"{name}['largest']", f"be at most {name}['weight'] = {weight!r}", saved["largest"])
