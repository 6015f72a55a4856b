"""Squared gradient norms of single examples, without their gradients: one micro-batch a window is evidence.

A layer's gradient on one example is a short sum of outer products, ``sum_t delta_t x_t^T``, of what went into the layer
and what came back to it; its norm follows from inner products of the factors, which the backward pass has at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from adaptbatch.measure.ghost.layers import TERM_OF, WAY_OUT, Owner, owners_of, require_separable, shared_among
from adaptbatch.measure.ghost.record import Layer, Record


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
        self.kinds: list[tuple[int, torch.device, torch.dtype]] = []
        self._layers: dict[nn.Module, Layer] = {}
        self._batch_norms: list[Owner] = []
        self._record = Record()

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
        if kinds != self.kinds:
            self._hook_all(model, parameters)
            self.kinds = kinds
        for owner in self._batch_norms:
            require_separable(owner)

    def _hook_all(self, model: nn.Module, parameters: list[Parameter]) -> None:
        """Tell every layer which of its parameters count; hook new ones, unhook those that are gone."""
        names = {id(p): name for name, p in model.named_parameters()}
        index = {id(p): i for i, p in enumerate(parameters)}
        owners = owners_of(model, index)
        shared = shared_among(owners)
        self.parameters, self._names = parameters, [names[id(p)] for p in parameters]
        self._batch_norms = [owner for owner in owners if isinstance(owner.module, _BatchNorm)]
        # Layers that are frozen now are hooked too: they may thaw between a forward pass and the next attach().
        hearable = {owner.module: owner for owner in owners if type(owner.module).forward in TERM_OF}
        for module in self._layers.keys() - hearable.keys():
            self._layers.pop(module).close()
        for module, owner in hearable.items():
            layer = self._layers.get(module) or Layer(owner.label, module, self._record)
            layer.counted, layer.shared = owner.counted, not shared.isdisjoint(owner.counted.values())
            self._layers[module] = layer
        self._record.prepare(self._layers.values(), parameters)

    def is_attached(self, optimizer: Optimizer) -> bool:
        """Whether the layers that count are those of what the optimizer trains now."""
        trained = dict.fromkeys(p for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
        return [(id(p), p.device, p.dtype) for p in trained] == self.kinds

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

    @property
    def on_gradient(self) -> Callable[[], None] | None:
        """What is called before each gradient, listened to or not."""
        return self._record.on_gradient

    @on_gradient.setter
    def on_gradient(self, call: Callable[[], None] | None) -> None:
        self._record.on_gradient = call

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to one backward pass."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def begin(self) -> None:
        """Listen from now on; forget what an earlier pass left behind."""
        self._record.clear()
        self._record.open = True

    def end(self) -> None:
        """Listen no longer."""
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
        on_gradient, self._record = self._record.on_gradient, Record()
        self._record.on_gradient = on_gradient
        self._layers, self._batch_norms, self.kinds, self._names, self.parameters = {}, [], [], [], []


# --- what is heard ------------------------------------------------------------------------------------------------
