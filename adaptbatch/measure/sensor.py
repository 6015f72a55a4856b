"""What measures a window: the probe, the optimizer's metric, and copies of gradients where something asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from adaptbatch.accumulate.gradients import Stepped, gradient_sq_norm
from adaptbatch.accumulate.ranks import Ranks
from adaptbatch.accumulate.window import Window
from adaptbatch.checks import require_examples
from adaptbatch.measure.copies import PreviousGradient, WindowGradients
from adaptbatch.measure.ghost import GhostProbe
from adaptbatch.measure.probe import SILENT, GradientProbe
from adaptbatch.measure.sums import Kept, SavedWindow, Sums
from adaptbatch.optimizer.learning_rate import Adjustment
from adaptbatch.optimizer.second_moment import metric_scales, require_metric
from adaptbatch.records import Measurement

Metric = Literal["euclidean", "adam"]


class Sensor:
    """Turns backward passes into the :class:`~adaptbatch.measure.sums.Sums` of a window; never changes ``.grad``.

    Args:
        model, optimizer: What is trained.
        metric: ``"adam"`` measures in the optimizer's metric too, once its second moment is warm.
        ghost: Measure examples instead of micro-batches.
        consecutive: Measure the inner product with the gradient of the window before.
        keep_gradients: Keep the window's gradients, for their parts along the mean.
        ranks: Who trains ``model``; None: this process alone.

    Attributes:
        sums: Of the open window.
        listens: Whether its micro-batches are measured, and not only the mean that they leave.

    Raises:
        ValueError: If these do not go together, or the optimizer has no second moment for ``metric``.

    Example:
        >>> import torch
        >>> weight = Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> sensor = Sensor(nn.ParameterList([weight]), optimizer)
        >>> sensor.open(Adjustment())
        >>> with sensor.listening():
        ...     loss = weight.square().sum() / 2
        ...     loss.backward()
        >>> sensor.take(loss, weight=1.0, reference=1.0)
        >>> sensor.measure_accumulated(reference=1.0)
        >>> sensor.sums["batch"].item(), sensor.sums["weighted"].item()
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
        consecutive: bool = False,
        keep_gradients: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = Ranks(model) if ranks is None else ranks
        _require_together(metric, ghost, consecutive, keep_gradients, self._ranks)
        if metric == "adam":
            require_metric(optimizer)
        self._model, self._optimizer, self.metric = model, optimizer, metric
        self._stepped = Stepped(optimizer)
        self._probe: GradientProbe | GhostProbe = GhostProbe() if ghost else GradientProbe()
        self._keep_gradients = keep_gradients
        self._kept: WindowGradients | None = None
        self._previous = PreviousGradient() if consecutive else None
        self._scales: Sequence[Tensor] | None = None
        self.sums = Sums()
        self.listens = True
        self.attach()

    # --- hooks ----------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Hook what the optimizer trains, again where it was replaced; see the probes."""
        self._probe.attach(self._model, self._optimizer)
        self._ranks.require_synchronised(self._probe.parameters)
        self._stepped.forget()

    def follow(self) -> bool:
        """Within a window: hook what was thawed, added or hooked by somebody else since its last micro-batch.

        Returns:
            Whether anything had to be hooked.

        Raises:
            RuntimeError: If a parameter changed its type or device, which its gradient so far has not.
        """
        if self._probe.is_attached(self._optimizer):
            return False
        before = {one: kind for one, *kind in self._probe.kinds}
        self.attach()
        now = {one: kind for one, *kind in self._probe.kinds}
        if any(before.get(one, kind) != kind for one, kind in now.items()):
            raise RuntimeError(
                "parameters changed their type or device within the window, as by model.double() or model.to(), and "
                "its gradients with them; do so between windows. discard_window() goes on without this one."
            )
        if self._scales is not None and list(before) != list(now):
            # Its micro-batches would be in two metrics.
            self._scales = None
            self.sums.pop("metric_weighted", None)
        return True

    def close(self) -> None:
        """Remove every hook."""
        self._probe.close()

    # --- a window -------------------------------------------------------------------------------------------------

    def open(self, applied: Adjustment, steps_taken: int = 0, listens: bool = True) -> None:
        """A window of which nothing is measured so far, in the metric of the step before.

        Args:
            applied: The adjustment of the last step.
            steps_taken: Optimizer steps so far, for an optimizer that counts them on a GPU: nothing waits for it.
            listens: Whether its micro-batches are measured.
        """
        self.sums, self.listens = Sums(), listens
        self._kept = WindowGradients() if self._keep_gradients else None
        if isinstance(self._probe, GradientProbe) and self.metric == "adam":
            steps = steps_taken if self._counts_on_device() else None
            self._scales = metric_scales(self._optimizer, self._probe.parameters, applied, steps)
            self._probe.use_metric(self._scales)

    def _counts_on_device(self) -> bool:
        """Whether reading the optimizer's own step counts would stall the device."""
        counts = (self._optimizer.state.get(p, {}).get("step") for p in self._probe.parameters)
        return any(isinstance(count, Tensor) and count.device.type != "cpu" for count in counts)

    @contextmanager
    def listening(self, sums: bool = False, synchronises: bool = False) -> Iterator[None]:
        """Around one backward pass.

        Args:
            sums: Measure this rank's own mean too; in a window's last, synchronising micro-batch.
            synchronises: Whether the pass averages gradients over ranks, in place.
        """
        self.begin(sums, synchronises)
        try:
            yield
        finally:
            self.end_pass()

    def watch(self, on_gradient: Callable[[], None]) -> None:
        """Have ``on_gradient`` called before each gradient, in whoever's backward pass."""
        self._probe.on_gradient = on_gradient

    def begin(self, sums: bool = False, synchronises: bool = False) -> None:
        """:meth:`listening` begins."""
        if not self.listens:
            # Its hooks return at once, and leave word that they were called.
            self._probe.elsewhere = False
        elif isinstance(self._probe, GradientProbe):
            self._probe.begin(sums and not self._ranks.sharded, synchronises)
        else:
            self._probe.begin()

    def end_pass(self) -> None:
        """:meth:`listening` ends."""
        self._probe.end()

    @property
    def silent(self) -> bool:
        """Whether no gradient arrived in the last backward pass."""
        return self._probe.silent if self.listens else not self._probe.elsewhere

    @property
    def elsewhere(self) -> bool:
        """Whether a gradient was computed in a pass that was not listened to, since the window's was accumulated."""
        return self._probe.elsewhere

    def sq_norm(self) -> Tensor | None:
        """Squared norm of the micro-batch gradient just heard, not read; None of single examples, or of none."""
        return self._probe.take_sq_norm() if self.listens and isinstance(self._probe, GradientProbe) else None

    def take(
        self,
        loss: Tensor | None,
        weight: float,
        reference: float,
        sq_norm: Tensor | None = None,
    ) -> None:
        """Add the micro-batch just measured to the sums.

        Args:
            loss: Its mean; None: not known.
            weight: Of it; what was back-propagated is ``weight / reference`` of its mean's gradient.
            reference: Of the window.
            sq_norm: As :meth:`sq_norm` gave it; None: it is taken here.

        Raises:
            RuntimeError: If nothing was measured, or not all of it.
            ValueError: If ``weight`` is not the number of examples, with ghost norms.
        """
        probe, sums = self._probe, self.sums
        factor = reference**2 / weight
        if not self.listens:
            if self.silent:
                raise RuntimeError(SILENT)
            sums.cells += 1 if isinstance(probe, GradientProbe) else round(weight)
        elif isinstance(probe, GradientProbe):
            sq_norm = probe.take_sq_norm() if sq_norm is None else sq_norm
            sums.add("weighted", sq_norm, factor)
            sums.cells += 1
            in_metric = probe.sq_norm_in_metric()
            if in_metric is not None and self._scales is not None:
                sums.add("metric_weighted", in_metric, factor)
        else:
            sq_norms = probe.take_example_sq_norms()
            require_examples(weight, len(sq_norms))
            # Of each example's share in that gradient, 1 / reference times its own.
            sq_norm = sq_norms.sum()
            sums.add("weighted", sq_norm, reference**2)
            sums.cells += len(sq_norms)
        if loss is not None:
            # One element may come with dimensions.
            mean = loss.detach() if loss.dim() == 0 else loss.detach().reshape(())
            sums.add("loss_sum", mean, weight)

    def keep(self, weight: float, reference: float, total: float) -> None:
        """What is kept of the gradient accumulated so far, where a rule or the ranks ask for it.

        Args:
            weight: Of the micro-batch just taken.
            reference: Of the window.
            total: Of all its micro-batches so far.
        """
        if self._kept is not None:
            self._kept.add(self._stepped(), weight)
        if self.listens and isinstance(self._probe, GradientProbe) and (own := self._probe.sum_sq_norm()) is not None:
            self.sums["rank_sq_norms"] = own * (reference**2 / total)

    def rescale(self, factor: float) -> None:
        """The accumulated gradient was divided by ``factor``, and so is what is kept of it."""
        if self._kept is not None and factor != 1.0:
            self._kept.divide(factor)

    def measure_accumulated(self, reference: float) -> None:
        """Measure what all micro-batches left in ``.grad``, before it is divided: this rank's part of it.

        Args:
            reference: Of the window.
        """
        parameters = self._stepped()
        if isinstance(self._probe, GradientProbe):
            self._probe.require_all_heard()
        self.sums["batch"] = gradient_sq_norm(parameters, ranks=self._ranks)
        if self._scales is not None:
            self.sums["metric_batch"] = gradient_sq_norm(self._probe.parameters, self._scales, self._ranks)
        if self._kept is not None:
            self.sums["radial_sq_norms"] = self._kept.radial_sq_norms(parameters, reference)
            self._kept = None
        if self._previous is not None and (product := self._previous.product(parameters)) is not None:
            self.sums["consecutive_product"] = product / self._ranks.world_size

    def end(self, scale: Tensor | None = None) -> None:
        """``.grad`` is the mean now: keep it for the next window, and notice gradients of others.

        Args:
            scale: The loss scale that it has; None: none.
        """
        if self._previous is not None:
            self._previous.keep(self._stepped(), 1.0 if scale is None else scale)
        self._probe.elsewhere = False

    def layer_measurements(self, window: Window) -> dict[str, Measurement]:
        """Each parameter's part of a due ``window`` of one micro-batch, by name; reads the host.

        Raises:
            RuntimeError: If examples are not measured, or the window has several micro-batches.
        """
        if not self.listens:
            raise RuntimeError("nobody listens to this window: listen=1.0 measures all, so that each can be asked.")
        if not isinstance(self._probe, GhostProbe) or window.micro_batches != 1:
            raise RuntimeError(
                f"the noise of single layers needs ghost=True and a window of one micro-batch, got "
                f"{type(self._probe).__name__} and {window.micro_batches}; use rule=Fixed(1)."
            )
        named = self._probe.layer_sq_norms()
        factor = window.reference / (1.0 if window.scale is None else float(window.scale))
        parts = [0.0 if p.grad is None else float(gradient_sq_norm([p])) for p in self._probe.parameters]
        # By now .grad may have a loss scale, or not any more, or be clipped: the parts are those of what was measured.
        unit = float(self.sums["batch"]) / sum(parts) if any(parts) else 0.0
        return {
            name: Measurement(float(sq_norms.sum()) * factor**2, unit * part, window.weight, self.sums.cells)
            for (name, sq_norms), part in zip(named.items(), parts, strict=True)
        }

    # --- checkpoint -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Copies of what no checkpoint of model and optimizer holds: gradients that are kept, and the one before."""
        kept, before = self._kept, self._previous
        copies = None if before is None else [None if g is None else g.detach().clone() for g in before.gradients]
        sums = None if kept is None else {"sums": [list(s) for s in kept.sums], "weights": list(kept.weights)}
        return {"kept": sums, "previous": copies}

    def load(self, state: SavedWindow) -> None:
        """Put back what :meth:`state_dict` held."""
        if self._kept is not None:
            self._kept = self._kept_from(state.kept)
        previous = state.previous or ()
        if self._previous is not None and len(previous) == len(self._stepped()):
            self._previous.gradients = _beside(previous, self._stepped())

    def restore(self, sums: Sums, applied: Adjustment, steps_taken: int) -> None:
        """Go on in a window of these sums; the optimizer's state must be that of the checkpoint by now."""
        self.open(applied, steps_taken, "weighted" in sums)
        self.sums = sums
        if self._scales is None:
            for name in ("metric_weighted", "metric_batch"):
                self.sums.pop(name, None)
        self._probe.elsewhere = False

    def _kept_from(self, state: Kept | None) -> WindowGradients | None:
        """None where the window began without keeping them: its parts along the mean are not known."""
        if state is None:
            return None
        kept = WindowGradients()
        kept.weights, kept.sums = list(state.weights), [_beside(sums, self._stepped()) for sums in state.sums]
        return kept

    def forget(self) -> None:
        """As if nothing had been measured before: the gradient of the window before is no longer known."""
        self._kept = None
        if self._previous is not None:
            self._previous.forget()


def _require_together(metric: Metric, ghost: bool, consecutive: bool, keep_gradients: bool, ranks: Ranks) -> None:
    if metric not in get_args(Metric):
        raise ValueError(f"metric must be one of {get_args(Metric)}, got metric = {metric!r}.")
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
    if keep_gradients and ranks.several:
        raise ValueError(
            "rule must not keep the window's gradients on several ranks, where a window's mean is known only after "
            "they are synchronised; use a rule of squared norms, such as NormTest."
        )
    if ranks.sharded and (ghost or consecutive or metric != "euclidean"):
        raise ValueError(
            f"model must not be sharded for ghost norms, consecutive gradients or Adam's metric, got fully_shard with "
            f"ghost = {ghost}, consecutive = {consecutive}, metric = {metric!r}; leave them out, or use "
            f"DistributedDataParallel."
        )


def _beside(gradients: Sequence[Tensor | None], parameters: Sequence[Parameter]) -> list[Tensor | None]:
    """``gradients`` on the devices of their parameters."""
    return [None if g is None else g.to(p.device) for g, p in zip(gradients, parameters, strict=True)]
