"""What hears a window: the probe, the optimizer's metric, and copies of gradients where something asks for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from adaptbatch.accumulate.ranks import Ranks, local_part, require_one_mean, unique_share
from adaptbatch.accumulate.window import OpenWindow, SquaredNorms
from adaptbatch.checks import require_examples
from adaptbatch.measure.copies import PreviousGradient, WindowGradients
from adaptbatch.measure.ghost import GhostProbe
from adaptbatch.measure.norms import batch_gradient_sq_norm, divide_gradients_, gradient_norm, gradient_stamps
from adaptbatch.measure.probe import GradientProbe
from adaptbatch.measure.seal import GradientSeal, checks_all, rounding
from adaptbatch.optimizer.learning_rate import Adjustment
from adaptbatch.optimizer.second_moment import metric_scales, require_metric
from adaptbatch.records import Measurement

Metric = Literal["euclidean", "adam"]

# Times the expected weight that a micro-batch may have before the window's reference follows it.
HEAVY = 4.0


class Sensor:
    """Turns backward passes into the sums of an :class:`~adaptbatch.accumulate.window.OpenWindow`.

    Args:
        model, optimizer: What is trained.
        metric: ``"adam"`` measures in the optimizer's metric too, once its second moment is warm.
        ghost: Measure examples instead of micro-batches.
        phase: Measure the inner product with the gradient of the window before.
        keep_gradients: Keep the window's gradients, for their parts along the mean.
        ranks: Who trains ``model``; None: this process alone.

    Raises:
        ValueError: If these do not go together, or the optimizer has no second moment for ``metric``.

    Example:
        >>> import torch
        >>> weight = Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> sensor = Sensor(nn.ParameterList([weight]), optimizer)
        >>> window = sensor.open_window(1.0, Adjustment())
        >>> with sensor.observing(window, weight.square().sum() / 2, weight=1.0) as weighted:
        ...     weighted.backward()
        >>> _ = sensor.complete(window)
        >>> window.norms.batch.item(), window.norms.weighted.item()
        (25.0, 25.0)
        >>> sensor.close()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        metric: Metric = "euclidean",
        ghost: bool = False,
        phase: bool = False,
        keep_gradients: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = Ranks(model) if ranks is None else ranks
        if metric not in get_args(Metric):
            raise ValueError(f"metric must be one of {get_args(Metric)}, got metric = {metric!r}.")
        if metric == "adam":
            require_metric(optimizer)
        if ghost and metric != "euclidean":
            raise ValueError(
                f"metric must be 'euclidean' with ghost=True, got metric = {metric!r}: norms of single examples are "
                f"known without their coordinates. Use one of the two."
            )
        if ghost and keep_gradients:
            raise ValueError(
                "ghost must be False for a rule that keeps the window's gradients, got ghost = True: their cells are "
                "whole micro-batches."
            )
        if keep_gradients and metric != "euclidean":
            raise ValueError(
                f"metric must be 'euclidean' for a rule that keeps the window's gradients, got metric = {metric!r}: "
                f"their inner products are Euclidean."
            )
        if keep_gradients and self._ranks.several:
            raise ValueError(
                "rule must not keep the window's gradients on several ranks, where a window's mean is known only after "
                "they are synchronised; use a rule of squared norms, such as NormTest."
            )
        if self._ranks.sharded and (ghost or phase or metric != "euclidean"):
            raise ValueError(
                f"model must not be sharded for ghost norms, the phase or Adam's metric, got fully_shard with ghost = "
                f"{ghost}, phase = {phase}, metric = {metric!r}; leave them out, or use DistributedDataParallel."
            )
        self._model, self._optimizer, self.metric = model, optimizer, metric
        self._probe: GradientProbe | GhostProbe = GhostProbe() if ghost else GradientProbe()
        self._keep_gradients = keep_gradients
        self._kept: WindowGradients | None = None
        self._previous = PreviousGradient() if phase else None
        self._scales: Sequence[Tensor] | None = None
        self._seal = GradientSeal()
        self._held: list[Parameter] = []
        self._turn = 0
        self._checks_first = True
        self._mean_stamps: list[tuple[int, int] | None] | None = None
        self.attach()
        # Only a device is worth sparing a read.
        self.reads_now = self._probe.parameters[0].device.type == "cpu"

    @property
    def parameters(self) -> list[Parameter]:
        """All that the optimizer steps: one that is frozen or thawed within a window is part of its gradient."""
        groups = self._optimizer.param_groups
        if sum(len(group["params"]) for group in groups) != len(self._held):
            self._held = list(dict.fromkeys(p for group in groups for p in group["params"]))
        return self._held

    def attach(self) -> None:
        """Hook what the optimizer trains, again where it was replaced; see the probes."""
        self._probe.attach(self._model, self._optimizer)
        self._ranks.require_synchronised(self._probe.parameters)
        self._held = []
        self._kinds = {p: (p.device, p.dtype) for p in self._probe.parameters}

    def follow(self, window: OpenWindow) -> None:
        """Within a window: hook what was thawed, added or hooked by somebody else since its last micro-batch.

        Raises:
            RuntimeError: If a parameter changed its type or device, which its gradient so far has not.
        """
        if self._probe.is_attached(self._optimizer):
            return
        before = self._kinds
        trained = list(self._probe.parameters)
        self.attach()
        if any(before.get(p, kind) != kind for p, kind in self._kinds.items()):
            raise RuntimeError(
                "parameters changed their type or device within the window, as by model.double() or model.to(), and "
                "its gradients with them; do so between windows. discard_window() goes on without this one."
            )
        self._checks_first = True
        if self._scales is not None and trained != self._probe.parameters:
            # Its micro-batches would be in two metrics.
            self._scales, window.in_metric = None, None

    @torch.no_grad()
    def make_room(self, window: OpenWindow, weight: float, expected: float) -> None:
        """Raise the reference of a window whose first micro-batches were light: a heavy one's loss is not blown up.

        By a power of two, so that nothing is rounded.

        Args:
            window: Of one process.
            weight: Of the micro-batch to come.
            expected: What a micro-batch of the window was expected to weigh.
        """
        if weight <= HEAVY * expected:
            return
        factor = 2.0 ** math.ceil(math.log2(weight / expected))
        window.reference *= factor
        if window.cells:
            divide_gradients_(self.parameters, factor)
            if self._kept is not None:
                self._kept.divide(factor)
            self._close_seal()

    def require_clear(self) -> None:
        """Before a window: whatever is left in ``.grad`` is zero, as of a ``zero_grad()`` that fills, and goes.

        Raises:
            RuntimeError: If it is not.
        """
        left = [p for p in self.parameters if p.grad is not None]
        if left and not self._sq_norm() == 0.0:
            raise RuntimeError(
                "gradients are left from before this window and would enter its mean; call optimizer.zero_grad() "
                "first. step() clears them itself."
            )
        for p in left:
            p.grad = None

    def open_window(
        self, reference: float, applied: Adjustment, steps_taken: int = 0, *, turn: int | None = None
    ) -> OpenWindow:
        """A window that is expected to weigh ``reference``, measured in the metric of the step before.

        Args:
            reference: The weight a full window of equal micro-batches will have: the division at its end is by one.
            applied: The adjustment of the last step.
            steps_taken: Optimizer steps so far, for an optimizer that counts them on a GPU: nothing waits for it.
            turn: Windows before this one; None: one more than last time.
        """
        self._turn = self._turn + 1 if turn is None else turn
        window = OpenWindow(reference=reference)
        self._kept = WindowGradients() if self._keep_gradients else None
        if isinstance(self._probe, GradientProbe) and self.metric == "adam":
            steps = steps_taken if self._counts_on_device() else None
            self._scales = metric_scales(self._optimizer, self._probe.parameters, applied, steps)
            self._probe.use_metric(self._scales)
            window.in_metric = None if self._scales is None else SquaredNorms()
        return window

    def _counts_on_device(self) -> bool:
        """Whether reading the optimizer's own step counts would stall the device."""
        counts = (self._optimizer.state.get(p, {}).get("step") for p in self._probe.parameters)
        return any(isinstance(count, Tensor) and count.device.type != "cpu" for count in counts)

    @contextmanager
    def observing(
        self, window: OpenWindow, loss: Tensor, weight: float, *, sums: bool = False, synchronises: bool = False
    ) -> Iterator[Tensor]:
        """Measure one backward pass through the loss it yields, which adds to ``window``, broken if that fails.

        Args:
            window: Open.
            loss: Mean over the micro-batch.
            weight: Of the micro-batch.
            sums: Measure this rank's own mean too; in a window's last, synchronising micro-batch.
            synchronises: Whether the pass averages gradients over ranks, in place.
        """
        scale = weight / window.reference
        window.broken = True
        sums = sums and isinstance(self._probe, GradientProbe) and not self._ranks.sharded
        probe = self._probe
        with probe.listening(sums, synchronises) if isinstance(probe, GradientProbe) else probe.listening():
            yield loss if scale == 1.0 else loss * scale
        self._require_gradient(window)
        in_metric = None
        if isinstance(self._probe, GradientProbe):
            sq_norm, in_metric = self._probe.take_sq_norm(), self._probe.sq_norm_in_metric()
            self._check_first(window, sq_norm, synchronises)
        else:
            sq_norm = self._probe.take_example_sq_norms()
            require_examples(weight, len(sq_norm))
        window.broken = False
        self._close_seal()
        window.add(sq_norm, loss.detach(), weight, in_metric)
        if self._kept is not None:
            self._kept.add(self.parameters, weight)
        if sums and isinstance(self._probe, GradientProbe) and (own := self._probe.sum_sq_norm()) is not None:
            window.extra["rank_sq_norms"] = own * (window.reference**2 / window.weight)

    def _require_gradient(self, window: OpenWindow) -> None:
        """Refuse a backward pass that left nothing; a window that it did not touch goes on.

        Raises:
            RuntimeError: If no gradient arrived, or something took all of them away.
        """
        if self._ranks.sharded:
            return
        if self._probe.silent:
            window.broken = window.cells > 0 and not self._seal.stamped(self.parameters)
        elif all(p.grad is None for p in self.parameters):
            raise RuntimeError(
                "no parameter has a gradient after the backward pass, though all were computed: a hook used them up, "
                "as an optimizer in the backward pass does. Take it out, the controller steps once a window; "
                "discard_window()."
            )

    def _check_first(self, window: OpenWindow, sq_norm: Tensor, synchronises: bool) -> None:
        """Of a window's first micro-batch, the norm that was measured must be that of ``.grad``."""
        if window.cells or synchronises or self._ranks.sharded:
            return
        parameters = self.parameters
        if self._checks_first or checks_all(self._turn) or any(p._post_accumulate_grad_hooks for p in parameters):
            self._checks_first = False
            arrived = batch_gradient_sq_norm(parameters)
            off = (arrived - sq_norm).abs() > rounding(parameters, 1) * torch.maximum(arrived, sq_norm)
            self._suspect(window, off, _MISMATCH)

    def _suspect(self, window: OpenWindow, wrong: Tensor, message: str) -> None:
        """Refuse at once where the host knows; on a GPU at the window's end, whose numbers it reads anyhow."""
        if self.reads_now:
            if wrong:
                raise RuntimeError(message)
            return
        before = window.extra.get("suspect")
        window.extra["suspect"] = wrong.double() if before is None else before + wrong

    def rounding(self, micro_batches: int) -> float:
        """How far the squared norm of a mean of so many may be off, relatively."""
        # Communication in half precision rounds on the way.
        return 0.03 if self._ranks.several else rounding(self.parameters, micro_batches)

    def _close_seal(self) -> None:
        self._seal.close(self.parameters, self._turn)

    def require_untouched(self, window: OpenWindow, call: str, *, stamps: bool = True) -> None:
        """Refuse an open window whose gradients something else has written to since they were measured.

        Args:
            window: With at least one micro-batch.
            call: Who asks.
            stamps: False where DDP may lay out its buckets anew, as between two backward passes.

        Raises:
            RuntimeError: If another backward pass, ``zero_grad()`` or clipping did, or a write through ``.data``.
        """
        message = f"{call} {_TOUCHED}"
        if stamps and not self._seal.stamped(self.parameters):
            raise RuntimeError(message)
        self._suspect(window, self._seal.rewritten(), message)

    def complete(self, window: OpenWindow, note: Mapping[str, float] | None = None) -> dict[str, float]:
        """Make ``.grad`` the exact mean of ``window`` over all ranks, and measure it.

        Args:
            window: With all its micro-batches; unless it ``unscales``, ``.grad`` has its loss scale and keeps it.
            note: Numbers to be summed over the ranks in the same all-reduce.

        Returns:
            The sums of ``note``.
        """
        parameters, note = self.parameters, dict(note or {})
        scaled = not window.unscales
        if isinstance(self._probe, GradientProbe):
            self._probe.require_all_heard()
        window.norms.batch = self._sq_norm()
        if window.in_metric is not None:
            window.in_metric.batch = self._sq_norm(self._scales)
        if self._kept is not None:
            window.extra["radial_sq_norms"] = self._kept.radial_sq_norms(parameters, window.reference)
            self._kept = None
        if self._previous is not None and (product := self._previous.product(parameters)) is not None:
            window.extra["consecutive_product"] = product / self._ranks.world_size
        self._unscale(window, scaled)
        if self._ranks.several:
            # Each rank's part is of the same mean where DDP holds it whole.
            one_mean = not self._ranks.sharded
            spread: dict[str, float | Tensor] = {"sq_batch": window.norms.batch.square()} if one_mean else {}
            note = window.share(self._ranks, {**note, **spread})
            if one_mean:
                require_one_mean(self._ranks, float(window.norms.batch), note["sq_batch"])
        divisor = window.weight / (self._ranks.world_size * window.reference)
        divide_gradients_(parameters, divisor)
        window.divide(divisor)
        if self._previous is not None:
            self._previous.keep(parameters, window.scale if scaled and window.scale is not None else 1.0)
        self._mark_mean()
        return note

    def _mark_mean(self) -> None:
        """``.grad`` is the mean now; what changes it from here on is clipping, or wrong."""
        self._mean_stamps = gradient_stamps(self.parameters)
        self._close_seal()
        self._probe.elsewhere = False

    def _unscale(self, window: OpenWindow, scaled: bool) -> None:
        """Take the loss scale out of all that was heard, and out of what was measured now if ``.grad`` has it."""
        if window.scale is None:
            return
        square = window.scale.double().square()
        for norms in (window.norms, window.in_metric):
            if norms is not None and norms.weighted is not None and norms.batch is not None:
                norms.weighted = norms.weighted / square
                norms.batch = norms.batch / square if scaled else norms.batch
        for name, power in (("radial_sq_norms", 2), ("rank_sq_norms", 2), ("consecutive_product", 1)):
            if name in window.extra and (power == 2 or scaled):
                window.extra[name] = window.extra[name] / window.scale.double() ** power

    def applied_sq_norm(self, window: OpenWindow) -> Tensor | None:
        """``|g|^2`` of what is in ``.grad`` now, on all ranks; None where nothing wrote to it since it is the mean.

        Sharded it is always measured, in an all-reduce of one number.

        Raises:
            RuntimeError: If it was emptied, or another backward pass added to it.
        """
        before, now = self._mean_stamps, gradient_stamps(self.parameters)
        # A write past the counters is looked for only where that costs no wait. Of a sharded gradient no counter sees
        # what clipping does (fused operations on DTensors), and ranks whose shards differ must not decide apart.
        sharded, world = self._ranks.sharded, self._ranks.world_size
        if not sharded and now == before and not (self.reads_now and self._seal.rewritten()):
            return None
        if before is not None and any(b is not None and a is None for a, b in zip(now, before, strict=False)):
            raise RuntimeError(_EMPTIED)
        if self._probe.elsewhere:
            raise RuntimeError(_ADDED)
        own = self._sq_norm()
        # All ranks of DDP hold the same mean.
        own = own.new_tensor(self._ranks.sum({"own": own})["own"]) if sharded else own * world
        assert window.norms.batch is not None
        self._suspect(window, (own == 0.0) & (window.norms.batch.to(own) > 0.0), _EMPTIED)
        return own

    def _sq_norm(self, scales: Sequence[Tensor] | None = None) -> Tensor:
        """This rank's part of ``|.grad|^2``; the parts sum up to it over the ranks."""
        if not self._ranks.sharded:
            sq_norm = batch_gradient_sq_norm(self.parameters if scales is None else self._probe.parameters, scales)
            return sq_norm / self._ranks.world_size if self._ranks.several else sq_norm
        terms = [
            unique_share(p, self._ranks.world_size) * gradient_norm(local_part(p.grad)).double().square()
            for p in self.parameters
            if p.grad is not None
        ]
        return torch.stack(terms).sum()

    def layer_measurements(self, window: OpenWindow) -> dict[str, Measurement]:
        """Each parameter's part of a normalised ``window`` of one micro-batch, by name; reads the host.

        Raises:
            RuntimeError: If examples are not measured, or the window has several micro-batches.
        """
        if not isinstance(self._probe, GhostProbe) or window.cells != 1:
            raise RuntimeError(
                f"the noise of single layers needs ghost=True and a window of one micro-batch, got "
                f"{type(self._probe).__name__} and {window.cells}; use rule=Fixed(1)."
            )
        found = {}
        for (name, sq_norms), p in zip(self._probe.layer_sq_norms().items(), self._probe.parameters, strict=True):
            scale = 1.0 if window.scale is None else float(window.scale)
            weighted = float(sq_norms.sum()) * (window.reference / scale) ** 2
            batch = 0.0 if p.grad is None else float(batch_gradient_sq_norm([p]))
            found[name] = Measurement(weighted, batch, window.weight, window.pieces)
        return found

    def state_dict(self, window: OpenWindow) -> dict[str, Any]:
        """Copies of what no checkpoint of model and optimizer holds: the open window's gradients, and the one before.

        Args:
            window: Not normalised; one without micro-batches has no gradients.
        """
        kept = self._kept
        return {
            "gradients": [_copy(p.grad) for p in self.parameters] if window.cells else None,
            "kept": None if kept is None else {"sums": [list(s) for s in kept.sums], "weights": list(kept.weights)},
            "previous": None if self._previous is None else [_copy(g) for g in self._previous.gradients],
        }

    def require_fit(self, state: Mapping[str, Any]) -> None:
        """Refuse the gradients of an open window of another model; hooks nothing, and changes nothing.

        Raises:
            ValueError: If they are not of the parameters that are trained now.
        """
        own = [tuple(p.shape) for p in self.parameters]
        named = {} if state["gradients"] is None else {"['gradients']": state["gradients"]}
        if state["kept"] is not None:
            named |= {f"['kept']['sums'][{index}]": sums for index, sums in enumerate(state["kept"]["sums"])}
        for name, gradients in named.items():
            shapes = [None if g is None else tuple(g.shape) for g in gradients]
            if len(shapes) != len(own) or any(s not in (None, mine) for s, mine in zip(shapes, own, strict=True)):
                raise ValueError(
                    f"state['sensor']{name} must be of the {len(own)} parameters that are trained here, of shapes "
                    f"{own}, got shapes {shapes}; load the state into the model that it was saved with."
                )

    def load_state_dict(self, state: Mapping[str, Any], window: OpenWindow, applied: Adjustment, steps: int) -> None:
        """Put back what :meth:`state_dict` holds and :meth:`require_fit` has seen.

        The optimizer's state must be that of the checkpoint by now.
        """
        self.attach()
        gradients = state["gradients"]
        if gradients is not None:
            metric = self.open_window(window.reference, applied, steps).in_metric
            window.in_metric = None if metric is None else window.in_metric
            # Parameters that were added since it was found to fit have none.
            for p, gradient in zip(self.parameters, gradients, strict=False):
                p.grad = None if gradient is None else gradient.to(p.device, p.dtype, copy=True)
        self._close_seal()
        # Whether what was saved of a due window had been clipped is not known: it is measured.
        self._mean_stamps, self._probe.elsewhere = None, False
        if self._kept is not None:
            self._kept = self._kept_from(state["kept"])
        previous = state["previous"] or ()
        if self._previous is not None and len(previous) == len(self.parameters):
            self._previous.gradients = _beside(previous, self.parameters)

    def _kept_from(self, state: Mapping[str, Any] | None) -> WindowGradients | None:
        """None where the window began without keeping them: its parts along the mean are not known."""
        if state is None:
            return None
        kept = WindowGradients()
        kept.weights, kept.sums = list(state["weights"]), [_beside(sums, self.parameters) for sums in state["sums"]]
        return kept

    def forget(self) -> None:
        """As if nothing had been heard before: the gradient of the window before is no longer known."""
        self._kept = None
        if self._previous is not None:
            self._previous.forget()

    def close(self) -> None:
        """Remove every hook."""
        self._probe.close()


_TOUCHED = (
    "found gradients that were changed within the window, by zero_grad(), unscale_(), clipping, a write through .data, "
    "a change of type or another backward pass: its mean and its noise would be wrong. The controller unscales and "
    "clears gradients, clipping waits until step_due is true, and other losses are kept off these parameters by "
    "requires_grad_(False). discard_window() goes on without this window."
)
_MISMATCH = (
    "the gradient that arrived in .grad is not the one that was measured: something changes it in between, such as a "
    "hook of register_post_accumulate_grad_hook or one that registers itself in each pass. Change gradients in a hook "
    "of Tensor.register_hook, which is measured, or once step_due is true; discard_window() goes on."
)
_EMPTIED = (
    "the due window's gradients are gone, by zero_grad() or as after a step of somebody else: step() would train "
    "nothing. The controller clears gradients itself; discard_window() goes on without this window."
)
_ADDED = (
    "another backward pass added to the due window's mean: the update would be of another loss. Keep other losses off "
    "these parameters by requires_grad_(False), or put them into the loss of backward(); discard_window() goes on."
)


def _copy(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.detach().clone()


def _beside(gradients: Sequence[Tensor | None], parameters: Sequence[Parameter]) -> list[Tensor | None]:
    """``gradients`` on the devices of their parameters."""
    return [None if g is None else g.to(p.device) for g, p in zip(gradients, parameters, strict=True)]
