"""What one micro-batch leaves: the calls of its layers, their terms, and the check that nothing is missing."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import unserializable_hook

from adaptbatch.measure.ghost.layers import TERM_OF, WAY_OUT, output_axes
from adaptbatch.measure.ghost.terms import CHUNK, Term, sq_norms_of_sum, wide

# Micro-batches from one check to the next, of all parameters and of one of them in turn: primes, so that a penalty of
# any period, first in its window or not, meets one.
ALL_EVERY, ONE_EVERY = 251, 31


class Layer:
    """The forward hook of one module: every output that will be differentiated gets a :class:`Call`."""

    def __init__(self, label: str, module: nn.Module, record: Record) -> None:
        self.label = label
        self.module = module
        self.record = record
        self.counted: dict[str, int] = {}
        # Several uses of one parameter must be added before their norm is taken.
        self.shared = False
        self.repeated = False
        self._turn = 0
        self.write: Callable[[Tensor, Tensor], None] | None = None
        self._last: Callable[[], Call | None] = lambda: None
        self._handle = module.register_forward_hook(self, prepend=True, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> None:
        if len(kwargs_and_output) == 1:
            # Taken off while the module was at its hooks, as by the collector: torch hands out no kwargs then.
            return
        kwargs, output = kwargs_and_output
        if not output.requires_grad or not any(p.requires_grad for p in module._parameters.values() if p is not None):
            return
        x: Tensor = args[0] if args else kwargs["input"]
        # Without its graph: that of an x which is changed in place afterwards would lead back to this output.
        call = Call(self, x.detach())
        # A forward pass within a backward pass is a checkpoint's, of a call that is known already.
        if not self.record.open and (last := self._last()) is not None and last.pending:
            self.repeated = True
        self._last = weakref.ref(call)
        output.register_hook(call)

    @property
    def __name__(self) -> str:
        # What torch.jit.script asks a hook for first.
        raise AttributeError(
            "a model whose ghost norms are measured cannot be scripted, its hooks are no part of it; call "
            "controller.close() first."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles of the model take its hooks along: this one does nothing, wherever it is loaded.
        return getattr, (nullcontext(), "__exit__")

    def hear(self, x: Tensor, delta: Tensor) -> None:
        """Note one call: input ``x``, gradient ``delta`` of the output."""
        record = self.record
        if delta.shape[0] != record.examples:
            record.admit(self.label, delta)
        if self._turn == record.turn and not self.multiple:
            raise RuntimeError(
                f"{self.label} was called again within one backward pass, as reentrant activation checkpointing does; "
                f"use checkpoint(..., use_reentrant=False)."
            )
        self._turn = record.turn
        if self.write is not None and x.dim() == 2 and not (self.repeated or record.checks(self.counted)):
            self.write(x, delta)
        else:
            self._hear_terms(x, delta)

    def _hear_terms(self, x: Tensor, delta: Tensor) -> None:
        if delta.dim() < output_axes(self.module):
            raise RuntimeError(
                f"{self.label} returned {tuple(delta.shape)}, which has no axis of examples; give it a micro-batch, "
                f"or {WAY_OUT}"
            )
        if self.record.check is not None:
            self.record.check.heard(delta)
        wide = torch.promote_types(delta.dtype, torch.float32)
        x, delta = x.to(wide) if x.is_floating_point() else x, delta.to(wide)
        term_of = partial(TERM_OF[type(self.module).forward], self.module)
        # The patches of a Conv have as many elements as its kernel times its input.
        elements = x.numel() // len(x) * math.prod(getattr(self.module, "kernel_size", ()))
        step = len(x) if self.multiple else max(1, CHUNK // elements)
        for name, index in self.counted.items():
            turns = zip(torch.split(x, step), torch.split(delta, step), strict=True)
            self.record.add(index, (term_of(name, *turn) for turn in turns), wait=self.multiple)

    @property
    def multiple(self) -> bool:
        return self.shared or self.repeated

    def close(self) -> None:
        self._handle.remove()


class Call:
    """One call of a layer, and the hook on its output; lets go of the input once it is heard."""

    __slots__ = ("__weakref__", "_layer", "_x")

    def __init__(self, layer: Layer, x: Tensor) -> None:
        self._layer = layer
        self._x: Tensor | None = x

    @property
    def pending(self) -> bool:
        return self._x is not None

    def __call__(self, delta: Tensor | None) -> None:
        # torch.autograd.grad() fires tensor hooks too: listen during the controller's own backward only. A gradient
        # of None is a zero that autograd did not spell out.
        if self._layer.record.on_gradient is not None:
            self._layer.record.on_gradient()
        self._layer.record.elsewhere |= not self._layer.record.open
        if not self._layer.record.open or not self._layer.counted or delta is None:
            return
        x, self._x = self._x, None
        if x is None:
            raise RuntimeError(
                f"{self._layer.label} was back-propagated a second time through one forward pass (retain_graph=True); "
                f"add the losses and back-propagate their sum."
            )
        self._layer.hear(x, delta)


class Record:
    """All that one micro-batch left."""

    def __init__(self) -> None:
        self.open = False
        self.elsewhere = False
        self.on_gradient: Callable[[], None] | None = None
        self.examples = 0
        self.check: Check | None = None
        self.turn = 0
        self._first = ""
        self._parameters: list[Parameter] = []
        self._boards: list[RowBuffer] = []
        self._waiting: dict[int, list[Term]] = {}
        self._sq_norms: dict[int, Tensor] = {}

    def prepare(self, layers: Collection[Layer], parameters: list[Parameter]) -> None:
        """Boards for the layers that may see rows, and a check of the first micro-batch."""
        self.close()
        self._parameters = parameters
        self.check = Check(self, parameters, range(len(parameters)))
        boards: dict[tuple[torch.device, torch.dtype], RowBuffer] = {}
        for layer in layers:
            layer.write = None
            if layer.counted and not layer.shared and type(layer.module).forward is nn.Linear.forward:
                p = parameters[next(iter(layer.counted.values()))]
                key = (p.device, torch.promote_types(p.dtype, torch.float32))
                layer.write = boards.setdefault(key, RowBuffer(*key)).writer(layer.counted)
        self._boards = list(boards.values())

    def clear(self) -> None:
        self.turn += 1
        self.examples = 0
        self._waiting.clear()
        self._sq_norms.clear()
        if self.check is not None:
            self.check.clear()
        elif chosen := self._due():
            self.check = Check(self, self._parameters, chosen)

    def _due(self) -> Sequence[int]:
        """The parameters that this micro-batch is checked for."""
        count = len(self._parameters)
        if self.turn % ALL_EVERY == 0:
            return range(count)
        return () if self.turn % ONE_EVERY else (self.turn // ONE_EVERY % count,)

    def checks(self, counted: Mapping[str, int]) -> bool:
        """Whether one of a layer's parameters is checked in this micro-batch."""
        return self.check is not None and not self.check.chosen.isdisjoint(counted.values())

    def admit(self, label: str, delta: Tensor) -> None:
        """The first layer heard says how many examples there are; the others must agree."""
        this = f"{label} returned {tuple(delta.shape)}"
        if self.examples:
            raise RuntimeError(
                f"the first axis of every layer's output must be the examples, got {self._first}, but {this}; put the "
                f"examples first (batch_first=True, no flattening of positions into them), or {WAY_OUT}"
            )
        self.examples, self._first = len(delta), this
        for board in self._boards:
            board.clear(self.examples)

    def add(self, index: int, terms: Iterator[Term], wait: bool) -> None:
        """Note one use of a parameter, some examples at a time; ``wait`` where other uses are added first."""
        sq_norms = []
        for term in terms:
            if self.check is not None:
                self.check.add(index, term)
            if wait:
                self._waiting.setdefault(index, []).append(term)
            else:
                sq_norms.append(term.sq_norms())
        if not wait:
            self._sq_norms[index] = torch.cat(sq_norms)

    def require_heard(self) -> None:
        if not self.examples:
            raise RuntimeError(
                "no layer was heard in this backward pass: the loss does not reach a parameter of the optimizer, the "
                "model is compiled (torch.compile), or the forward pass was before the layers were hooked."
            )

    def example_sq_norms(self) -> Tensor:
        """``(m,)``, summed over all parameters."""
        self._add_waiting()
        parts = [board.example_sq_norms() for board in self._boards] + list(self._sq_norms.values())
        device = parts[0].device
        return torch.stack([part.to(device) for part in parts]).sum(0)

    def parameter_sq_norms(self) -> dict[int, Tensor]:
        """``(m,)`` for each parameter that took part."""
        self._add_waiting()
        found: dict[int, Tensor] = {}
        for board in self._boards:
            found |= board.parameter_sq_norms()
        return found | self._sq_norms

    def _add_waiting(self) -> None:
        for index, terms in self._waiting.items():
            self._sq_norms[index] = sq_norms_of_sum(terms)
        self._waiting.clear()

    def close(self) -> None:
        if self.check is not None:
            self.check.close()


class RowBuffer:
    """Norms of inputs and output gradients, of the Linear layers that see one row an example: a row each.

    Written as they come, multiplied once: ``|grad W|^2 = |x|^2 |delta|^2`` and ``|grad b|^2 = |delta|^2``.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._layers: list[dict[str, int]] = []
        self._norms = self._biases = torch.empty(0)

    def clear(self, examples: int) -> None:
        """All norms zero, for so many examples."""
        shape = (2, len(self._layers), examples)
        if self._norms.shape == shape:
            self._norms.zero_()
            return
        self._norms = torch.zeros(shape, device=self._device, dtype=self._dtype)
        self._inputs, self._deltas = (rows.unbind() for rows in self._norms)
        if len(self._biases) != len(self._layers):
            # Waits for a device, and so not for each size.
            self._biases = torch.tensor([["bias" in counted] for counted in self._layers], device=self._device)

    def writer(self, counted: dict[str, int]) -> Callable[[Tensor, Tensor], None]:
        """What notes the call of one more layer."""
        row, weighs = len(self._layers), "weight" in counted
        self._layers.append(counted)

        def write(x: Tensor, delta: Tensor) -> None:
            torch.linalg.vector_norm(delta, 2, 1, dtype=self._dtype, out=self._deltas[row])
            if weighs:
                torch.linalg.vector_norm(x, 2, 1, dtype=self._dtype, out=self._inputs[row])

        return write

    def example_sq_norms(self) -> Tensor:
        inputs, deltas = wide(self._norms).square()
        found: Tensor = ((inputs + self._biases) * deltas).sum(0)
        return found

    def parameter_sq_norms(self) -> dict[int, Tensor]:
        inputs, deltas = wide(self._norms).square()
        found: dict[int, Tensor] = {}
        for counted, x, delta in zip(self._layers, inputs, deltas, strict=True):
            sq_norms = {"weight": x * delta, "bias": delta}
            found |= {index: sq_norms[name] for name, index in counted.items()}
        return found


class Check:
    """Each parameter's gradient rebuilt from what was heard, beside the one that autograd delivers."""

    def __init__(self, record: Record, parameters: list[Parameter], chosen: Iterable[int]) -> None:
        self._record = record
        self._parameters = parameters
        self.chosen = frozenset(chosen)
        self._handles = [parameters[i].register_hook(self._hook(i)) for i in self.chosen]  # type: ignore[no-untyped-call]
        self.clear()

    def clear(self) -> None:
        self._delivered: dict[int, Tensor] = {}
        self._rebuilt: dict[int, Tensor] = {}
        self._sq_scales: dict[int, Tensor] = {}
        self._rounding = 0.0

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def deliver(grad: Tensor | None) -> None:
            if self._record.open and grad is not None:
                _accumulate(self._delivered, index, grad.to_dense())

        # A parameter that goes to another process goes without it, and without a warning.
        silent: Callable[[Tensor], None] = unserializable_hook(deliver)  # type: ignore[no-untyped-call]
        return silent

    def heard(self, delta: Tensor) -> None:
        """Take note of the precision of one call."""
        self._rounding = max(self._rounding, _rounding(delta))

    def add(self, index: int, term: Term) -> None:
        if index not in self.chosen:
            return
        _accumulate(self._rebuilt, index, term.gradient(self._parameters[index].shape))
        _accumulate(self._sq_scales, index, term.sq_scale())

    def passed(self, names: list[str]) -> bool:
        """Whether all gradients agree; False where one is not finite, as while a loss scale is searched.

        Raises:
            RuntimeError: If one differs beyond rounding.
        """
        finite = True
        for index in self._delivered.keys() | self._rebuilt.keys():
            none = torch.zeros((), device=self._parameters[index].device)
            delivered, rebuilt = self._delivered.get(index, none), self._rebuilt.get(index, none)
            difference, size = float((rebuilt - delivered).norm()), float(delivered.norm())
            scale = float(self._sq_scales.get(index, none).sqrt()) + float(rebuilt.norm())
            finite = finite and math.isfinite(difference + scale)
            if difference > self._rounding * scale:
                raise RuntimeError(
                    f"the gradient of {names[index]!r} is not the sum over the calls of its layers (it has norm "
                    f"{size:.3g}, {difference:.3g} of it unaccounted for): the parameter is used outside its module, "
                    f"as in F.linear(h, layer.weight.t()) or a penalty in the loss, or a call was not heard, as of a "
                    f"layer added after attach(). Use parameters through their modules only, or {WAY_OUT}"
                )
        return finite

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.clear()


def _accumulate(sums: dict[int, Tensor], index: int, value: Tensor) -> None:
    sums[index] = sums[index] + value if index in sums else value


def _rounding(delta: Tensor) -> float:
    """Relative error that rounding explains: of storage in half precision, of TF32, or of a long sum."""
    eps = torch.finfo(delta.dtype).eps
    if delta.dtype == torch.float32 and delta.device.type == "cuda":
        eps = 2.0**-10
    return 64 * eps if eps < 1e-6 else 2 * eps


# --- one use of one parameter -------------------------------------------------------------------------------------
