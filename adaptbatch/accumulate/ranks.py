"""Several ranks as one: who synchronises when, and the one small all-reduce of a window.

Alone, all of it is a no-op.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

Sync = Literal["last", "every"]

# Communication hooks after which .grad is the ranks' mean but for rounding.
_ROUNDING_HOOKS = {"allreduce_hook", "bf16_compress_hook", "fp16_compress_hook"}


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
        self._replicated = isinstance(self._model, DistributedDataParallel)
        if self._replicated and self._model.static_graph and sync == "last":
            warnings.warn(
                "DistributedDataParallel with static_graph=True cannot leave a backward pass unsynchronised: gradients "
                'are synchronised in every micro-batch, as with sync="every". Leave static_graph out to synchronise '
                "once a window.",
                stacklevel=3,
            )
            sync = "every"
        self._sync = sync
        self._reduced: set[int] | None = None
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
        """Around forward and backward of one micro-batch: gradients are synchronised in a window's last one.

        Raises:
            RuntimeError: Within ``ddp.join()``.
        """
        if self._replicated and self._model._join_config.enable:  # type: ignore[union-attr]
            raise RuntimeError(
                "ddp.join() must not be around micro_batches(), which ends the ranks together itself; leave it out."
            )
        quiet = not self.synchronises(last)
        with self._model.no_sync() if quiet and self._replicated else nullcontext():  # type: ignore[operator]
            if self.sharded:
                self._model.set_requires_gradient_sync(not quiet)  # type: ignore[operator]
            try:
                yield
            finally:
                # A backward pass outside of any scope synchronises.
                if self.sharded:
                    self._model.set_requires_gradient_sync(True)  # type: ignore[operator]

    def forget(self) -> None:
        """Drop what fully_shard has accumulated unsharded: no ``zero_grad()`` reaches it before it is synchronised."""
        for module in self._model.modules() if self.sharded else ():
            state: Any = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None  # type: ignore[operator]
            # Older versions of torch have one group.
            several = hasattr(state, "_fsdp_param_groups")
            groups = state._fsdp_param_groups if several else [getattr(state, "_fsdp_param_group", None)]
            for held in (one for group in groups if group is not None for one in group.fsdp_params):
                held.unsharded_accumulated_grad = None
                if hasattr(held, "_unsharded_param"):
                    held._unsharded_param.grad = None

    def require_synchronised(self, parameters: Sequence[Parameter]) -> None:
        """Refuse parameters that every rank would train on its own, and hooks that change what the ranks' mean is.

        Raises:
            RuntimeError: If DDP or FSDP2 does not synchronise one of ``parameters``, or a communication hook of DDP
                does more than round.
        """
        if self.sharded:
            self._refuse_apart(sum(not is_sharded(p) for p in parameters), "give them to fully_shard (ignored_params)")
        elif self._replicated:
            self._refuse_options()
            reduced = self._ids_of_reduced()
            way_out = "DDP synchronises what was trainable when it wrapped the model: wrap it anew"
            self._refuse_apart(sum(id(p) not in reduced for p in parameters), way_out)

    def _refuse_options(self) -> None:
        """Refuse what makes DDP deliver something else than the mean over the ranks, when it is due."""
        model: Any = self._model
        for name, given, way_out in (
            ("mixed_precision", model.mixed_precision, "use torch.autocast"),
            ("delay_all_reduce_named_params", model._delay_all_reduce_params, "leave it out"),
        ):
            if given:
                raise RuntimeError(
                    f"DistributedDataParallel's {name} must not be given: it changes when, or in what type, gradients "
                    f"are averaged, and not all of them are seen; {way_out}."
                )
        for hook, _ in getattr(model, "_comm_hooks", ()):
            if getattr(hook, "__qualname__", "") not in _ROUNDING_HOOKS:
                raise RuntimeError(
                    f"the communication hook {getattr(hook, '__qualname__', hook)!s} must be one of "
                    f"{sorted(_ROUNDING_HOOKS)}: another makes .grad something else than the mean over the ranks "
                    f"whose noise is measured. Register one of these, or none."
                )

    def _refuse_apart(self, count: int, way_out: str) -> None:
        if count:
            raise RuntimeError(
                f"{count} trained parameters are not synchronised, and every rank would train its own: {way_out}, or "
                f"freeze them."
            )

    def _ids_of_reduced(self) -> set[int]:
        """The parameters that DDP's reducer knows."""
        if self._reduced is None:
            model: Any = self._model
            ignored = model.parameters_to_ignore
            now = [p for name, p in model.module.named_parameters() if p.requires_grad and name not in ignored]
            if len(now) != model._get_ddp_logging_data()["num_parameter_tensors"]:
                # Frozen or thawed since: only its buckets tell.
                now = [p for bucket in model.reducer._get_zeros_like_grad_buckets() for p in bucket.parameters()]
            self._reduced = {id(p) for p in now}
        return self._reduced

    def synchronises(self, last: bool) -> bool:
        """Whether a micro-batch in such a scope synchronises."""
        return not self.several or last or self._sync == "every"

    def sum(self, named: Mapping[str, float | Tensor]) -> dict[str, float]:
        """Sums over the ranks, in one all-reduce.

        Args:
            named: Numbers and scalar tensors, under the same names on every rank.

        Raises:
            RuntimeError: If another rank died, or takes no part until the process group's timeout.
        """
        if not self.several:
            return {name: float(value) for name, value in named.items()}
        device = next(self._model.parameters()).device
        values = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in named.values()])
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


def unique_share(parameter: Parameter, world_size: int) -> float:
    """What a rank's squared norm of it counts in the sum over ranks: 1 over the copies of its shard."""
    shards = 1
    if is_sharded(parameter):
        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        shards = math.prod(size for size, place in zip(mesh.shape, placements, strict=True) if place.is_shard())
    return shards / world_size


def require_agreement(ranks: Ranks, own: Mapping[str, float], shared: Mapping[str, float]) -> None:
    """By construction all ranks decide alike, from the same numbers; this proves it in every window.

    Args:
        ranks: Several.
        own: ``steps``, its square ``sq_steps`` and ``digest``, whole numbers, of this rank.
        shared: Their sums.

    Raises:
        RuntimeError: If one rank's numbers are others.
    """
    world = ranks.world_size
    # Equal only if all are, by Cauchy and Schwarz, so that every rank raises; the digest may tell only one of them.
    if world * shared["sq_steps"] != shared["steps"] ** 2 or shared["digest"] != world * own["digest"]:
        raise RuntimeError(
            f"rank {ranks.rank} disagrees with the others: it takes {own['steps']:.0f} accumulation steps, the mean is "
            f"{shared['steps'] / world:g}. Give every rank the same rule, limits and checkpoint."
        )


def require_one_mean(ranks: Ranks, total: float, total_of_squares: float) -> None:
    """After a window's last backward pass, which synchronises, every rank holds the same mean.

    Args:
        ranks: Of DistributedDataParallel.
        total: Sum over the ranks of what each measured of it.
        total_of_squares: Sum of the squares of these.

    Raises:
        RuntimeError: If they are not equal, but for rounding of machines that differ; on every rank.
    """
    if ranks.world_size * total_of_squares > (1.0 + 1e-9) * total**2:
        raise RuntimeError(
            "ranks hold different gradients after the window's last backward pass, which was to synchronise them, and "
            "would train apart: leave no_sync() to the controller, which enters it itself, and call the wrapped model, "
            "not model.module. discard_window() goes on without this window."
        )
