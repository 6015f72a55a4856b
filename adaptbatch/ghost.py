"""The sensor for one micro-batch a window: squared gradient norms of single examples, without their gradients.

A layer's gradient on one example is a short sum of outer products, ``sum_t delta_t x_t^T``, of what went into the layer
and what came back to it; its norm follows from inner products of the factors, which the backward pass has at hand.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer
from torch.utils.hooks import unserializable_hook

# Elements of the largest intermediate; more examples than fit are taken in turns.
CHUNK = 2**24
# Micro-batches from one check to the next, of all parameters and of one of them in turn: primes, so that a penalty of
# any period, first in its window or not, meets one.
ALL_EVERY, ONE_EVERY = 251, 31
WAY_OUT = "use Limits(min_steps=2) without ghost=True, whose micro-batch cells measure any layer."


class GhostProbe:
    """Squared gradient norms of the examples in one micro-batch, from hooks on the outputs of the model's layers.

    If ``L = sum_i l_i`` is what was back-propagated, entry ``i`` is ``|grad l_i|^2``. A layer that sees rows ``x_t``
    and hears back ``delta_t = dL/dy_t`` has, for one example with positions ``t``::

        Linear, Conv    |sum_t delta_t x_t^T|^2 = sum_{t,u} (delta_t . delta_u) (x_t . x_u),   a Conv's x_t its patches
        bias            |sum_t delta_t|^2
        LayerNorm       |sum_t delta_t * xhat_t|^2
        Embedding       sum_{t,u} [id_t = id_u] (delta_t . delta_u)

    Where a module is called again, or a weight shared, the sums run over all its uses, cross terms included.

    Every layer's output must have the examples first. Not noticed, hence the caller's part: a loss that couples the
    examples, as a contrastive one does, and an input that all examples share (an embedding of positions) and that is
    by chance as long as the micro-batch. BatchNorm is refused. The first micro-batch is checked: each parameter's
    gradient is rebuilt from what was heard and must be the one that autograd delivers. So is every 251st, and every
    31st for one parameter in turn, where a penalty that begins later shows.

    The input of a layer is held from its forward to its backward pass, inside activation checkpoints too; compiled
    models are not heard.

    Source:
        Goodfellow 2015, arXiv:1510.01799 (rows); Bu et al. 2022, arXiv:2205.10683 (the cheaper of the two forms).

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> probe = GhostProbe()
        >>> probe.attach(layer, torch.optim.SGD(layer.parameters()))
        >>> loss = layer(torch.tensor([[3.0, 4.0], [0.0, 2.0]])).sum()
        >>> with probe.listening():
        ...     loss.backward()
        >>> probe.take_example_sq_norms()
        tensor([26.,  5.], dtype=torch.float64)
        >>> probe.layer_sq_norms()["weight"]
        tensor([25.,  4.], dtype=torch.float64)
        >>> probe.close()
    """

    def __init__(self) -> None:
        self.parameters: list[Parameter] = []
        self._names: list[str] = []
        self._kinds: list[tuple[int, torch.device, torch.dtype]] = []
        self._layers: dict[nn.Module, _Layer] = {}
        self._batch_norms: list[_Owner] = []
        self._record = _Record()

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Hook the layers of the optimizer's trainable parameters, again where these were replaced, moved or frozen.

        Raises:
            ValueError: If there is none, or one belongs to a layer whose examples cannot be told apart.
            RuntimeError: If the optimizer holds parameters that ``model`` does not have.
        """
        groups = optimizer.param_groups
        parameters = list(dict.fromkeys(p for group in groups for p in group["params"] if p.requires_grad))
        if not parameters:
            raise ValueError("optimizer must hold at least one parameter with requires_grad=True, got none to train.")
        present = {id(p) for p in model.parameters()}
        if foreign := [tuple(p.shape) for p in parameters if id(p) not in present]:
            raise RuntimeError(
                f"the optimizer holds parameters that the model does not have, of shapes {foreign[:3]}: no layer is "
                f"heard for them, and after load_state_dict(assign=True) its steps would train nothing. Put the "
                f"model's parameters into optimizer.param_groups, or {WAY_OUT}"
            )
        kinds = [(id(p), p.device, p.dtype) for p in parameters]
        if kinds != self._kinds:
            self._hook_all(model, parameters)
            self._kinds = kinds
        for owner in self._batch_norms:
            _require_separable(owner)

    def _hook_all(self, model: nn.Module, parameters: list[Parameter]) -> None:
        """Tell every layer which of its parameters count; hook new ones, unhook those that are gone."""
        names = {id(p): name for name, p in model.named_parameters()}
        index = {id(p): i for i, p in enumerate(parameters)}
        owners = _owners(model, index)
        shared = _shared(owners)
        self.parameters, self._names = parameters, [names[id(p)] for p in parameters]
        self._batch_norms = [owner for owner in owners if isinstance(owner.module, _BatchNorm)]
        # Layers that are frozen now are hooked too: they may thaw between a forward pass and the next attach().
        hearable = {owner.module: owner for owner in owners if type(owner.module).forward in _TERM_OF}
        for module in self._layers.keys() - hearable.keys():
            self._layers.pop(module).close()
        for module, owner in hearable.items():
            layer = self._layers.get(module) or _Layer(owner.label, module, self._record)
            layer.counted, layer.shared = owner.counted, not shared.isdisjoint(owner.counted.values())
            self._layers[module] = layer
        self._record.prepare(self._layers.values(), parameters)

    def is_attached(self, optimizer: Optimizer) -> bool:
        """Whether the layers that count are those of what the optimizer trains now."""
        trained = dict.fromkeys(p for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
        return [(id(p), p.device, p.dtype) for p in trained] == self._kinds

    @property
    def silent(self) -> bool:
        """Whether no gradient arrived in the last backward pass."""
        return not self._record.examples

    @property
    def elsewhere(self) -> bool:
        """Set where a gradient was computed in a pass that is not listened to."""
        return self._record.elsewhere

    @elsewhere.setter
    def elsewhere(self, value: bool) -> None:
        self._record.elsewhere = value

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to one backward pass; forget what an earlier one left behind."""
        self._record.clear()
        self._record.open = True
        try:
            yield
        finally:
            self._record.open = False

    @torch.no_grad()
    def take_example_sq_norms(self) -> Tensor:
        """Squared gradient norm of each example in the micro-batch just heard, over all parameters.

        Returns:
            ``(m,)`` in float64 (float32 on mps) on the device, not read by the host; in squared units of the gradient
            as back-propagated: with a mean loss, ``1 / m^2`` of the examples' own.

        Raises:
            RuntimeError: If no layer was heard or, in a micro-batch that is checked, a parameter's gradient is not what
                its layers account for.
        """
        record = self._record
        record.require_heard()
        if record.check is not None and record.check.passed(self._names):
            record.check.close()
            record.check = None
        return record.example_sq_norms()

    @torch.no_grad()
    def layer_sq_norms(self) -> dict[str, Tensor]:
        """The same ``(m,)`` split by parameter, by its first name in the model; zero where a layer took no part.

        Raises:
            RuntimeError: If no layer was heard in the last micro-batch.
        """
        self._record.require_heard()
        found = self._record.parameter_sq_norms()
        zero = torch.zeros_like(next(iter(found.values())))
        return {name: found.get(index, zero) for index, name in enumerate(self._names)}

    def close(self) -> None:
        """Remove every hook; nothing is left on the model or its parameters."""
        for layer in self._layers.values():
            layer.close()
        self._record.close()
        self._record = _Record()
        self._layers, self._batch_norms, self._kinds, self._names, self.parameters = {}, [], [], [], []


# --- what is heard ------------------------------------------------------------------------------------------------


class _Layer:
    """The forward hook of one module: every output that will be differentiated gets a :class:`_Call`."""

    def __init__(self, label: str, module: nn.Module, record: _Record) -> None:
        self.label = label
        self.module = module
        self.record = record
        self.counted: dict[str, int] = {}
        # Several uses of one parameter must be added before their norm is taken.
        self.shared = False
        self.repeated = False
        self._turn = 0
        self.write: Callable[[Tensor, Tensor], None] | None = None
        self._last: Callable[[], _Call | None] = lambda: None
        self._handle = module.register_forward_hook(self, prepend=True, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if not output.requires_grad or not any(p.requires_grad for p in module._parameters.values() if p is not None):
            return
        x: Tensor = args[0] if args else kwargs["input"]
        # Without its graph: that of an x which is changed in place afterwards would lead back to this output.
        call = _Call(self, x.detach())
        # A forward pass within a backward pass is a checkpoint's, of a call that is known already.
        if not self.record.open and (last := self._last()) is not None and last.pending:
            self.repeated = True
        self._last = weakref.ref(call)
        output.register_hook(call)  # type: ignore[no-untyped-call]

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
        if delta.dim() < _output_axes(self.module):
            raise RuntimeError(
                f"{self.label} returned {tuple(delta.shape)}, which has no axis of examples; give it a micro-batch, "
                f"or {WAY_OUT}"
            )
        if self.record.check is not None:
            self.record.check.heard(delta)
        wide = torch.promote_types(delta.dtype, torch.float32)
        x, delta = x.to(wide) if x.is_floating_point() else x, delta.to(wide)
        term_of = partial(_TERM_OF[type(self.module).forward], self.module)
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


class _Call:
    """One call of a layer, and the hook on its output; lets go of the input once it is heard."""

    __slots__ = ("__weakref__", "_layer", "_x")

    def __init__(self, layer: _Layer, x: Tensor) -> None:
        self._layer = layer
        self._x: Tensor | None = x

    @property
    def pending(self) -> bool:
        return self._x is not None

    def __call__(self, delta: Tensor | None) -> None:
        # torch.autograd.grad() fires tensor hooks too: listen during the controller's own backward only. A gradient
        # of None is a zero that autograd did not spell out.
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


class _Record:
    """All that one micro-batch left."""

    def __init__(self) -> None:
        self.open = False
        self.elsewhere = False
        self.examples = 0
        self.check: _Check | None = None
        self.turn = 0
        self._first = ""
        self._parameters: list[Parameter] = []
        self._boards: list[_RowBoard] = []
        self._waiting: dict[int, list[_Term]] = {}
        self._sq_norms: dict[int, Tensor] = {}

    def prepare(self, layers: Collection[_Layer], parameters: list[Parameter]) -> None:
        """Boards for the layers that may see rows, and a check of the first micro-batch."""
        self.close()
        self._parameters = parameters
        self.check = _Check(self, parameters, range(len(parameters)))
        boards: dict[tuple[torch.device, torch.dtype], _RowBoard] = {}
        for layer in layers:
            layer.write = None
            if layer.counted and not layer.shared and type(layer.module).forward is nn.Linear.forward:
                p = parameters[next(iter(layer.counted.values()))]
                key = (p.device, torch.promote_types(p.dtype, torch.float32))
                layer.write = boards.setdefault(key, _RowBoard(*key)).writer(layer.counted)
        self._boards = list(boards.values())

    def clear(self) -> None:
        self.turn += 1
        self.examples = 0
        self._waiting.clear()
        self._sq_norms.clear()
        if self.check is not None:
            self.check.clear()
        elif chosen := self._due():
            self.check = _Check(self, self._parameters, chosen)

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

    def add(self, index: int, terms: Iterator[_Term], wait: bool) -> None:
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


class _RowBoard:
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
        inputs, deltas = _wide(self._norms).square()
        found: Tensor = ((inputs + self._biases) * deltas).sum(0)
        return found

    def parameter_sq_norms(self) -> dict[int, Tensor]:
        inputs, deltas = _wide(self._norms).square()
        found: dict[int, Tensor] = {}
        for counted, x, delta in zip(self._layers, inputs, deltas, strict=True):
            sq_norms = {"weight": x * delta, "bias": delta}
            found |= {index: sq_norms[name] for name, index in counted.items()}
        return found


class _Check:
    """Each parameter's gradient rebuilt from what was heard, beside the one that autograd delivers."""

    def __init__(self, record: _Record, parameters: list[Parameter], chosen: Iterable[int]) -> None:
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

    def add(self, index: int, term: _Term) -> None:
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


class _Rows(NamedTuple):
    """``sum_t rows_t``: a bias or the scale of a LayerNorm."""

    rows: Tensor  # (m, positions, n)

    def sq_norms(self) -> Tensor:
        return _wide(torch.linalg.vector_norm(self.rows.sum(1), dim=1)).square()

    def gradient(self, shape: torch.Size) -> Tensor:
        return self.rows.sum((0, 1)).reshape(shape)

    def sq_scale(self) -> Tensor:
        return self.rows.square().sum()


class _Outer(NamedTuple):
    """``sum_t deltas_t inputs_t^T`` in each group: the weight of a Linear or a Conv."""

    deltas: Tensor  # (m, groups, positions, outputs)
    inputs: Tensor  # (m, groups, positions, inputs)

    def sq_norms(self) -> Tensor:
        groups, positions, outputs = self.deltas.shape[1:]
        inputs = self.inputs.shape[-1]
        # Multiplications an example: positions^2 (outputs + inputs) against positions outputs inputs.
        gram = positions * (outputs + inputs) <= outputs * inputs
        form, entries = (gram_sq_norms, 2 * positions**2) if gram else (direct_sq_norms, outputs * inputs)
        step = max(1, CHUNK // (groups * entries))
        pairs = zip(torch.split(self.deltas, step), torch.split(self.inputs, step), strict=True)
        return torch.cat([form(deltas, inputs) for deltas, inputs in pairs])

    def gradient(self, shape: torch.Size) -> Tensor:
        return torch.einsum("mgto,mgti->goi", self.deltas, self.inputs).reshape(shape)

    def sq_scale(self) -> Tensor:
        return (self.deltas.square().sum(-1) * self.inputs.square().sum(-1)).sum()


class _Lookup(NamedTuple):
    """``sum_t e(id_t) deltas_t^T`` with unit vectors ``e``: the weight of an Embedding."""

    ids: Tensor  # (m, positions, 1)
    deltas: Tensor  # (m, positions, d)

    def sq_norms(self) -> Tensor:
        same = self.ids == self.ids.mT
        return _wide((self.deltas @ self.deltas.mT * same).sum((1, 2)).clamp_min(0.0))

    def gradient(self, shape: torch.Size) -> Tensor:
        deltas = self.deltas.flatten(0, 1)
        return deltas.new_zeros(shape).index_add_(0, self.ids.flatten(), deltas)

    def sq_scale(self) -> Tensor:
        return self.deltas.square().sum()


_Term = _Rows | _Outer | _Lookup


def sq_norms_of_sum(terms: Sequence[_Term]) -> Tensor:
    """``|sum of the terms|^2`` by example: those of a kind are one with more positions, two kinds have a cross term."""
    kinds = {type(term): [other for other in terms if type(other) is type(term)] for term in terms}
    joined = {
        kind: kind(*(torch.cat(parts, dim=-2) for parts in zip(*same, strict=True))) for kind, same in kinds.items()
    }
    total = torch.stack([term.sq_norms() for term in joined.values()]).sum(0)
    if len(joined) == 1:
        return total
    outer, lookup = joined[_Outer], joined[_Lookup]
    assert isinstance(outer, _Outer)
    assert isinstance(lookup, _Lookup)
    return (total + 2 * _cross(outer, lookup)).clamp_min(0.0)


def _cross(outer: _Outer, lookup: _Lookup) -> Tensor:
    """``sum_{s,t} (delta_s)_{id_t} (x_s . delta_t)`` by example: a tied head and its embedding."""
    deltas, inputs = outer.deltas[:, 0], outer.inputs[:, 0]
    picked = deltas.gather(2, lookup.ids.mT.expand(-1, deltas.shape[1], -1))
    return _wide((picked * (inputs @ lookup.deltas.mT)).sum((1, 2)))


def gram_sq_norms(deltas: Tensor, inputs: Tensor) -> Tensor:
    """``sum_{t,u} (delta_t . delta_u)(x_t . x_u)`` by example, from ``(m, groups, positions, n)``."""
    return _wide(((deltas @ deltas.mT) * (inputs @ inputs.mT)).sum((1, 2, 3)).clamp_min(0.0))


def direct_sq_norms(deltas: Tensor, inputs: Tensor) -> Tensor:
    """The same, as ``|sum_t delta_t x_t^T|^2``."""
    return _wide(torch.linalg.vector_norm(deltas.mT @ inputs, dim=(1, 2, 3))).square()


def _wide(values: Tensor) -> Tensor:
    """float64 where the device has it: the square of a float32 norm above 1e19 overflows."""
    return values if values.device.type == "mps" else values.double()


# --- the layers ---------------------------------------------------------------------------------------------------


def _linear(module: nn.Module, name: str, x: Tensor, delta: Tensor) -> _Term:
    if name == "bias":
        return _Rows(_positions(delta))
    return _Outer(_positions(delta)[:, None], _positions(x)[:, None])


def _positions(x: Tensor) -> Tensor:
    """``(m, ..., n)`` as ``(m, positions, n)``."""
    return x.reshape(len(x), -1, x.shape[-1])


def _conv(module: nn.Module, name: str, x: Tensor, delta: Tensor) -> _Term:
    assert isinstance(module, _ConvNd)
    if name == "bias":
        return _Rows(delta.flatten(2).mT)
    deltas = _grouped(delta, module.groups).flatten(3)
    return _Outer(deltas.mT, _patches(module, x))


def _grouped(x: Tensor, groups: int) -> Tensor:
    """``(m, channels, ...)`` as ``(m, groups, channels / groups, ...)``."""
    return x.reshape(len(x), groups, -1, *x.shape[2:])


def _patches(conv: _ConvNd, x: Tensor) -> Tensor:
    """What each filter sees at each position: ``(m, groups, positions, inputs of a filter)``."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = _grouped(F.pad(x, conv._reversed_padding_repeated_twice, mode=mode), conv.groups)
    for axis, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), 3):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (m, groups, channels, *positions, *offsets): the channels go to the offsets.
    space = len(conv.kernel_size)
    return x.movedim(2, 2 + space).flatten(2 + space).flatten(2, 1 + space)


def _layer_norm(module: nn.Module, name: str, x: Tensor, delta: Tensor) -> _Term:
    assert isinstance(module, nn.LayerNorm)
    if name == "weight":
        delta = delta * F.layer_norm(x, module.normalized_shape, eps=module.eps)
    return _Rows(_positions(delta.flatten(-len(module.normalized_shape))))


def _embedding(module: nn.Module, name: str, x: Tensor, delta: Tensor) -> _Term:
    assert isinstance(module, nn.Embedding)
    ids, deltas = x.reshape(len(x), -1, 1), _positions(delta)
    return _Lookup(ids, deltas if module.padding_idx is None else deltas * (ids != module.padding_idx))


# By the function that computes them: subclasses that keep it are heard too.
_TERM_OF: Mapping[Any, Callable[[nn.Module, str, Tensor, Tensor], _Term]] = {
    nn.Linear.forward: _linear,
    nn.Conv1d.forward: _conv,
    nn.Conv2d.forward: _conv,
    nn.Conv3d.forward: _conv,
    nn.LayerNorm.forward: _layer_norm,
    nn.Embedding.forward: _embedding,
}


def _output_axes(module: nn.Module) -> int:
    """Axes of the output for a micro-batch of single positions."""
    if isinstance(module, _ConvNd):
        return 2 + len(module.kernel_size)
    return 1 + (len(module.normalized_shape) if isinstance(module, nn.LayerNorm) else 1)


def _form(module: nn.Module, name: str) -> tuple[type[_Term], int]:
    """Kind of the gradient of one parameter, and its groups."""
    if name == "bias" or isinstance(module, nn.LayerNorm):
        return _Rows, 1
    return (_Lookup, 1) if isinstance(module, nn.Embedding) else (_Outer, getattr(module, "groups", 1))


# --- owners of parameters, and refusals ---------------------------------------------------------------------------


class _Owner(NamedTuple):
    """A module, and by their names in it the indices of those of its own parameters that are counted."""

    label: str
    module: nn.Module
    counted: dict[str, int]


def _owners(model: nn.Module, index: Mapping[int, int]) -> list[_Owner]:
    """The modules of the model, none of them one that is refused; ``index`` is by identity of the parameter."""
    owners = []
    for path, module in model.named_modules():
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        counted = {name: index[id(p)] for name, p in own if id(p) in index}
        owners.append(_Owner(f"{path or 'the model'} ({type(module).__name__})", module, counted))
        _require_separable(owners[-1])
    return owners


def _require_separable(owner: _Owner) -> None:
    if reason := _reason_against(owner.module, owner.counted.keys()):
        raise ValueError(
            f"{owner.label} {reason}: the gradient of its trainable parameters {sorted(owner.counted)} cannot be split "
            f"by example here; {WAY_OUT}"
        )


def _reason_against(module: nn.Module, counted: Set[str]) -> str | None:
    if isinstance(module, _BatchNorm) and (counted or module.training or module.running_mean is None):
        # Without trainable parameters too: it couples the gradients of the layers before it.
        return "couples the examples of a micro-batch, unless it is frozen and in eval() mode"
    if not counted:
        return None
    if type(module).forward not in _TERM_OF:
        return "is not a Linear, Conv, LayerNorm or Embedding"
    if counted - {"weight", "bias"}:
        return "has parameters besides weight and bias"
    if any(module.get_parameter(name).is_complex() for name in counted):
        return "is complex"
    if getattr(module, "scale_grad_by_freq", False):
        return "scales a token's gradient by its frequency in the micro-batch"
    return None


def _shared(owners: list[_Owner]) -> set[int]:
    """Indices of the parameters with several owners, whose uses must be added before their norm is taken."""
    uses: dict[int, list[tuple[_Owner, str]]] = {}
    for owner in owners:
        for name, index in owner.counted.items():
            uses.setdefault(index, []).append((owner, name))
    shared = {index: group for index, group in uses.items() if len(group) > 1}
    for group in shared.values():
        forms = {_form(owner.module, name) for owner, name in group}
        if len(forms) > 1 and forms != {(_Outer, 1), (_Lookup, 1)}:
            raise ValueError(
                f"{', '.join(owner.label for owner, _ in group)} share a parameter, but not the form of its gradient; "
                f"only layers of one kind (and number of groups), or a Linear and an Embedding, can share one here; "
                f"{WAY_OUT}"
            )
    return set(shared)
