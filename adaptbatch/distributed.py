"""Several ranks as one: who synchronises when, and the one small all-reduce of a window.

Alone, all of it is a no-op.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

Sync = Literal["last", "every"]


class Ranks:
    """The processes that train one model together, as the controller needs them.

    Args:
        model: Plain in one process; of several, wrapped in ``DistributedDataParallel`` or given to ``fully_shard``.
        process_group: Of the ranks that share each step; None: DDP's own, or the default group.
        sync: ``"last"`` synchronises gradients in a window's last micro-batch, ``"every"`` in each of them (for FSDP2
            where an unsharded gradient does not fit).

    Raises:
        ValueError: If ``sync`` is unknown, or several processes train a model that nothing synchronises.

    Example:
        >>> ranks = Ranks(nn.Linear(2, 2))
        >>> ranks.world_size, ranks.everyone(True), ranks.sum({"weight": 3.0})
        (1, True, {'weight': 3.0})
    """

    def __init__(self, model: nn.Module, process_group: Any = None, sync: Sync = "last") -> None:
        if sync not in get_args(Sync):
            raise ValueError(f"sync must be one of {get_args(Sync)}, got sync = {sync!r}.")
        # torch.compile(DDP(model)) hides it one level down.
        self._model = getattr(model, "_orig_mod", model)
        self._sync = sync
        self._replicated = isinstance(self._model, DistributedDataParallel)
        self.sharded = any(is_sharded(p) for p in self._model.parameters())
        self.several = self._replicated or self.sharded
        initialized = dist.is_available() and dist.is_initialized()
        if process_group is None and self._replicated:
            process_group = self._model.process_group
        self._group = process_group
        self.world_size = dist.get_world_size(process_group) if initialized else 1
        self.rank = dist.get_rank(process_group) if initialized else 0
        if self.world_size > 1 and not self.several:
            raise ValueError(
                f"model must synchronise its gradients in a world of {self.world_size} ranks, got a plain "
                f"{type(self._model).__name__}; wrap it in DistributedDataParallel or apply fully_shard first (FSDP1 "
                f"is not supported)."
            )
        if not self.several:
            self.world_size, self.rank = 1, 0
        # Collectives within a micro-batch pair up only where every rank has as many micro-batches.
        coupled = any(isinstance(module, nn.SyncBatchNorm) for module in self._model.modules())
        self.lockstep = self.several and (self.sharded or sync == "every" or coupled)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch: gradients are synchronised in a window's last one."""
        if self.sharded:
            self._model.set_requires_gradient_sync(last or self._sync == "every")  # type: ignore[operator]
        quiet = self._replicated and not last and self._sync == "last"
        with self._model.no_sync() if quiet else nullcontext():  # type: ignore[operator]
            yield

    def synchronises(self, last: bool) -> bool:
        """Whether a micro-batch in such a scope synchronises."""
        return not self.several or last or self._sync == "every"

    def sum(self, named: Mapping[str, float | Tensor]) -> dict[str, float]:
        """Sums over the ranks, in one all-reduce, which also finds ranks that go different ways.

        Args:
            named: Numbers and scalar tensors, under the same names on every rank.

        Raises:
            RuntimeError: If another rank died, or takes no part until the process group's timeout.
        """
        device = next((v.device for v in named.values() if isinstance(v, Tensor)), torch.device("cpu"))
        wide = torch.float32 if device.type == "mps" else torch.float64
        values = torch.stack([torch.as_tensor(v, dtype=wide, device=device) for v in named.values()])
        if self.several:
            self._all_reduce(values, dist.ReduceOp.SUM)
        return dict(zip(named, map(float, values.tolist()), strict=True))

    def everyone(self, flag: bool) -> bool:
        """Whether ``flag`` is true on every rank."""
        return bool(self.least(int(flag)))

    def least(self, value: int) -> int:
        """The smallest of all ranks' values."""
        if not self.several:
            return value
        values = torch.tensor([value], device=next(self._model.parameters()).device)
        self._all_reduce(values, dist.ReduceOp.MIN)
        return int(values)

    def _all_reduce(self, values: Tensor, op: Any) -> None:
        try:
            dist.all_reduce(values, op, self._group)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.world_size}: the window's all-reduce failed. Another rank died, or left "
                f"its loop alone (a break, or an error that was caught, on one rank only); see its log."
            ) from error


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; its package, half a second of import, is not loaded for the question."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of it, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def unique_shares(parameters: Sequence[Parameter], world_size: int) -> list[float]:
    """What a rank's squared norm of each parameter counts in the sum over ranks: 1 over the copies of its shard."""
    return [_shards(p) / world_size for p in parameters]


def _shards(parameter: Parameter) -> int:
    if not is_sharded(parameter):
        return 1
    count = 1
    for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):  # type: ignore[attr-defined]
        count *= size if placement.is_shard() else 1
    return count
