"""The sensor: hooks that hear the gradient of one micro-batch before it is added to ``.grad``.

A tensor hook sees each parameter's micro-batch gradient once per backward, tied uses summed, and keeps only its norm:
no copy of a gradient, no read by the host. What is heard stays on the device until the window ends. Of a sharded
parameter (FSDP2) the hook is on the unsharded one, so that on every rank it is the local gradient that is heard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle, unserializable_hook

from adaptbatch.accumulate.gradients import norm_dtype, sum_of_squares
from adaptbatch.accumulate.ranks import is_sharded
from adaptbatch.measure.norms import NormBuffer, scaled

# Gradients of at most this many elements wait for the end of the backward pass and are measured in one go: one by one,
# each would cost as much as a large one. Together they are a sliver of the model.
SMALL = 1024
_NO_HOOKS = {None: None}
_Kind = tuple[torch.device, torch.dtype]


class GradientProbe:
    """Squared norms of micro-batch gradients, from one hook on each trainable parameter of an optimizer.

    Attributes:
        parameters: Those that are hooked.
        kinds: Of each its id, device and type, as it was hooked.
        elsewhere: Set where a gradient was computed in a pass that is not listened to.
        on_gradient: Called before each gradient, listened to or not; None: nobody is.

    Example:
        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> probe = GradientProbe()
        >>> probe.attach(nn.ParameterList([weight]), torch.optim.SGD([weight]))
        >>> with probe.listening():
        ...     (weight.square().sum() / 2).backward()
        >>> probe.take_sq_norm().item()
        25.0
        >>> probe.close()
    """

    def __init__(self) -> None:
        self.parameters: list[Parameter] = []
        self.elsewhere = False
        self.on_gradient: Callable[[], None] | None = None
        self._in_model: set[int] = set()
        # Where the model holds them: the module's parameters, the name in them.
        self._places: list[tuple[Mapping[str, Parameter | None], str, Parameter]] = []
        self.kinds: list[tuple[int, torch.device, torch.dtype]] = []
        self._handles: list[RemovableHandle] = []
        self._own: list[tuple[Parameter, RemovableHandle]] = []
        # All that the optimizer holds; what of it was frozen, and has no hook; of each kind that has one, a parameter.
        self._held: list[int] = []
        self._frozen: list[Parameter] = []
        self._samples: list[tuple[Parameter, _Kind]] = []
        # Hooks of any kind, of anybody, when ours were found to be the last.
        self._registered = -1
        self._buffers: list[NormBuffer] = []
        self._metric_buffers: list[NormBuffer] = []
        self._sum_buffers: list[NormBuffer] = []
        self._sums = False
        self._shard_hooks: dict[int, Callable[[Tensor], None]] = {}
        self._unsharded: dict[int, Tensor] = {}
        self._scales: Sequence[Tensor] | None = None
        self._heard: list[int] = []
        self._open = False

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Hook the optimizer's trainable parameters, again where they were replaced, moved, frozen or unfrozen.

        Raises:
            ValueError: If there is none.
            RuntimeError: If the optimizer holds parameters that ``model`` had and has no longer.
        """
        if self._is_unchanged(optimizer):
            return
        held = [p for group in optimizer.param_groups for p in group["params"]]
        parameters = list(dict.fromkeys(p for p in held if p.requires_grad))
        if not parameters:
            raise ValueError("optimizer must hold at least one parameter with requires_grad=True, got none to train.")
        present = {id(p) for p in model.parameters()}
        # fully_shard shows its unsharded parameters instead while it holds them.
        if any(id(p) in self._in_model and id(p) not in present and not is_sharded(p) for p in parameters):
            raise RuntimeError(
                "the optimizer holds parameters that the model no longer has, as after load_state_dict(assign=True): "
                "its steps would train nothing. Put the model's new parameters into optimizer.param_groups."
            )
        # Only of parameters that are held here, so that no id is used again.
        self._in_model = present & {id(p) for p in parameters}
        kinds = [(id(p), p.device, p.dtype) for p in parameters]
        if kinds != self.kinds or not self._is_last():
            self.close()
            self.parameters, self.kinds = parameters, kinds
            self._hook_all()
            self._watch_shards(model)
        self._held, self._frozen = [id(p) for p in held], [p for p in held if not p.requires_grad]
        self._places = [
            (module._parameters, name, p)
            for module in model.modules()
            for name, p in module._parameters.items()
            if p is not None and id(p) in self._in_model
        ]

    def is_attached(self, optimizer: Optimizer) -> bool:
        """Whether all that the optimizer trains now has its hook, which is the last to see a gradient.

        What was frozen since may have one too: it is silent.
        """
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        same = held == self._held and all((p.device, norm_dtype(p.dtype)) == kind for p, kind in self._samples)
        return same and not any(p.requires_grad for p in self._frozen) and self._is_last()

    def _is_unchanged(self, optimizer: Optimizer) -> bool:
        """Whether model and optimizer hold the parameters that are hooked, as they were: walks no module."""
        return (
            bool(self._handles)
            and not self._shard_hooks
            and self.is_attached(optimizer)
            and all(held.get(name) is p for held, name, p in self._places)
            and all(
                p.requires_grad and (p.device, p.dtype) == kind[1:]
                for p, kind in zip(self.parameters, self.kinds, strict=True)
            )
        )

    def _is_last(self) -> bool:
        """Whether no hook of somebody else changes a gradient after it is measured."""
        registered = RemovableHandle.next_id
        if registered != self._registered:
            if any(next(reversed(p._backward_hooks or _NO_HOOKS)) != handle.id for p, handle in self._own):
                return False
            self._registered = registered
        return True

    def _hook_all(self) -> None:
        """One hook a parameter, and one buffer of norms for each device and type."""
        places: dict[_Kind, list[int]] = {}
        for index, p in enumerate(self.parameters):
            places.setdefault((p.device, norm_dtype(p.dtype)), []).append(index)
        self._samples = [(self.parameters[members[0]], kind) for kind, members in places.items()]
        for (device, dtype), members in places.items():
            buffer, metric_buffer, sum_buffer = (NormBuffer(len(members), device, dtype) for _ in range(3))
            self._buffers.append(buffer)
            self._metric_buffers.append(metric_buffer)
            self._sum_buffers.append(sum_buffer)
            for slot, index in enumerate(members):
                small = self.parameters[index].numel() <= SMALL
                notes = [one.hold if small else one.writer(slot) for one in (buffer, metric_buffer, sum_buffer)]
                hook = self._hook(index, *notes)
                if is_sharded(self.parameters[index]):
                    self._shard_hooks[index] = hook
                else:
                    handle = self.parameters[index].register_hook(hook)  # type: ignore[no-untyped-call]
                    self._own.append((self.parameters[index], handle))
                    self._handles.append(handle)

    def _watch_shards(self, model: nn.Module) -> None:
        """Hook what fully_shard gathers, when it first does: a sharded parameter's own hooks never fire."""
        place = {id(self.parameters[index]): index for index in self._shard_hooks}
        for module in model.modules():
            named = {name: place[id(p)] for name, p in module._parameters.items() if id(p) in place}
            if named:
                self._handles.append(module.register_forward_pre_hook(partial(self._hook_unsharded, named)))

    def _hook_unsharded(self, named: Mapping[str, int], module: nn.Module, _: Any) -> None:
        for name, index in named.items():
            p = module._parameters[name]
            if p is None or is_sharded(p) or self._unsharded.get(index) is p:
                continue
            self._unsharded[index] = p
            self._handles.append(p.register_hook(self._shard_hooks[index]))  # type: ignore[no-untyped-call]

    def require_all_heard(self) -> None:
        """After a window: no sharded parameter received a gradient unheard.

        Raises:
            RuntimeError: If one did, since its module was never called.
        """
        unheard = [i for i in self._shard_hooks if i not in self._unsharded and self.parameters[i].grad is not None]
        if unheard:
            raise RuntimeError(
                f"{len(unheard)} sharded parameters received a gradient that no hook heard: their modules are used "
                f"without being called. Call the module that holds a weight, or shard its parent only."
            )

    def _hook(
        self,
        index: int,
        note: Callable[[Tensor], None],
        note_in_metric: Callable[[Tensor], None],
        note_sum: Callable[[Tensor], None],
    ) -> Callable[[Tensor], None]:
        heard = self._heard.append

        def hear(grad: Tensor) -> None:
            if self.on_gradient is not None:
                self.on_gradient()
            # torch.autograd.grad() fires tensor hooks too: listen during the controller's own backward only.
            if not self._open:
                self.elsewhere = True
                return
            heard(index)
            # With create_graph=True it would record what is measured.
            grad = grad.detach() if grad.requires_grad else grad
            note(grad)
            if self._scales is not None:
                note_in_metric(scaled(grad, self._scales[index]))
            if self._sums:
                # Before it is synchronised, .grad holds what this rank accumulated.
                so_far = self.parameters[index].grad
                note_sum(grad if so_far is None else so_far + grad)

        # A parameter that goes to another process goes without it, and without a warning.
        silent: Callable[[Tensor], None] = unserializable_hook(hear)  # type: ignore[no-untyped-call]
        return silent

    def use_metric(self, scales: Sequence[Tensor] | None) -> None:
        """Measure in a second metric too: the norm of each parameter's gradient times its scale; None ends it.

        Args:
            scales: One tensor for each of :attr:`parameters`, in their order and of their shapes.
        """
        self._scales = scales

    @contextmanager
    def listening(self, sums: bool = False, synchronises: bool = False) -> Iterator[None]:
        """Listen to one backward pass; arguments are those of :meth:`begin`."""
        self.begin(sums, synchronises)
        try:
            yield
        finally:
            self.end()

    def begin(self, sums: bool = False, synchronises: bool = False) -> None:
        """Listen from now on; forget what an earlier pass left behind.

        Args:
            sums: Measure the accumulated gradient too, as this rank has it before it is synchronised.
            synchronises: Whether the pass averages gradients over ranks, in place.
        """
        self._heard.clear()
        buffers = self._buffers + ([] if self._scales is None else self._metric_buffers) + (self._sum_buffers * sums)
        for buffer in buffers:
            buffer.clear(copies=synchronises)
        self._open, self._sums = True, sums

    def end(self) -> None:
        """Listen no longer."""
        self._open = False

    @property
    def silent(self) -> bool:
        """Whether no gradient arrived in the last backward pass."""
        return not self._heard

    def take_sq_norm(self) -> Tensor:
        """Squared norm of the micro-batch gradient just heard: a float64 scalar on the device, not read.

        Raises:
            RuntimeError: If no hook was called, or one was called twice: the parts of a gradient that arrive one by
                one have no norm of their sum.
        """
        heard = self._heard.copy()
        self._heard.clear()
        if not heard:
            raise RuntimeError(SILENT)
        if len(set(heard)) != len(heard):
            raise RuntimeError(
                "a parameter received its gradient in several parts within one backward pass, as reentrant activation "
                "checkpointing does for a shared parameter; use checkpoint(..., use_reentrant=False)."
            )
        return sum_of_squares([buffer.norms() for buffer in self._buffers])

    def sq_norm_in_metric(self) -> Tensor | None:
        """The same in the second metric; None without one."""
        return None if self._scales is None else sum_of_squares([buffer.norms() for buffer in self._metric_buffers])

    def sum_sq_norm(self) -> Tensor | None:
        """That of the accumulated gradient, if it was listened to."""
        return sum_of_squares([buffer.norms() for buffer in self._sum_buffers]) if self._sums else None

    def close(self) -> None:
        """Remove every hook; nothing is left on the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._buffers, self._metric_buffers, self.kinds, self.parameters = [], [], [], [], []
        self._sum_buffers, self._shard_hooks, self._unsharded, self._own, self._places = [], {}, {}, [], []
        self._registered = -1
        self._scales = None


SILENT = (
    "no hook heard a gradient in this backward pass: the loss does not reach a parameter of the optimizer, or "
    "gradients bypass autograd (fused accumulation into main_grad)."
)
