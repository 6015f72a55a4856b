"""What hears a window: the probe, the optimizer's metric, and copies of gradients where something asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from adaptbatch.checks import require_examples
from adaptbatch.ghost import GhostProbe
from adaptbatch.gradients import PreviousGradient, WindowGradients
from adaptbatch.learning_rate import Adjustment
from adaptbatch.optimizer_state import metric_scales, require_metric
from adaptbatch.probe import GradientProbe, batch_gradient_sq_norm, divide_gradients_
from adaptbatch.records import Measurement
from adaptbatch.window import OpenWindow, SquaredNorms

Metric = Literal["euclidean", "adam"]


class Sensor:
    """Turns backward passes into the sums of an :class:`~adaptbatch.window.OpenWindow`.

    Args:
        model, optimizer: What is trained.
        metric: ``"adam"`` measures in the optimizer's metric too, once its second moment is warm.
        ghost: Measure examples instead of micro-batches.
        phase: Measure the inner product with the gradient of the window before.
        keep_gradients: Keep the window's gradients, for their parts along the mean.

    Raises:
        ValueError: If these do not go together, or the optimizer has no second moment for ``metric``.

    Example:
        >>> import torch
        >>> weight = Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> sensor = Sensor(nn.ParameterList([weight]), optimizer)
        >>> window = sensor.open_window(1.0, Adjustment())
        >>> sensor.hear(window, weight.square().sum() / 2, weight=1.0)
        >>> sensor.normalize_(window)
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
    ) -> None:
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
        self._model, self._optimizer, self._metric = model, optimizer, metric
        self._probe: GradientProbe | GhostProbe = GhostProbe() if ghost else GradientProbe()
        self._keep_gradients = keep_gradients
        self._kept: WindowGradients | None = None
        self._previous = PreviousGradient() if phase else None
        self._scales: Sequence[Tensor] | None = None
        self.attach()

    @property
    def parameters(self) -> list[Parameter]:
        """The parameters that are measured."""
        return self._probe.parameters

    def attach(self) -> None:
        """Hook what the optimizer trains, again where it was replaced; see the probes."""
        self._probe.attach(self._model, self._optimizer)

    def open_window(self, reference: float, applied: Adjustment, steps_taken: int = 0) -> OpenWindow:
        """A window that is expected to weigh ``reference``, measured in the metric of the step before.

        Args:
            reference: The weight a full window of equal micro-batches will have: the division at its end is by one.
            applied: The adjustment of the last step.
            steps_taken: Optimizer steps so far, for an optimizer that counts them on a GPU: nothing waits for it.
        """
        window = OpenWindow(reference=reference)
        self._kept = WindowGradients() if self._keep_gradients else None
        if isinstance(self._probe, GradientProbe) and self._metric == "adam":
            steps = steps_taken if self._counts_on_device() else None
            self._scales = metric_scales(self._optimizer, self.parameters, applied, steps)
            self._probe.use_metric(self._scales)
            window.in_metric = None if self._scales is None else SquaredNorms()
        return window

    def _counts_on_device(self) -> bool:
        """Whether reading the optimizer's own step counts would stall the device."""
        counts = (self._optimizer.state.get(p, {}).get("step") for p in self.parameters)
        return any(isinstance(count, Tensor) and count.device.type != "cpu" for count in counts)

    def hear(self, window: OpenWindow, loss: Tensor, weight: float) -> None:
        """Back-propagate one micro-batch and add what was heard to ``window``, which is broken if that fails."""
        scale = weight / window.reference
        window.broken = True
        with self._probe.listening():
            (loss if scale == 1.0 else loss * scale).backward()  # type: ignore[no-untyped-call]
        in_metric = None
        if isinstance(self._probe, GradientProbe):
            sq_norm, in_metric = self._probe.take_sq_norm(), self._probe.sq_norm_in_metric()
        else:
            sq_norm = self._probe.take_example_sq_norms()
            require_examples(weight, len(sq_norm))
        window.broken = False
        window.add(sq_norm, loss.detach(), weight, in_metric)
        if self._kept is not None:
            self._kept.add(self.parameters, weight)

    def normalize_(self, window: OpenWindow) -> None:
        """Make ``.grad`` the exact mean of ``window``, and measure it."""
        divide_gradients_(self.parameters, window.weight / window.reference)
        window.norms.batch = batch_gradient_sq_norm(self.parameters)
        if window.in_metric is not None:
            window.in_metric.batch = batch_gradient_sq_norm(self.parameters, self._scales)
        if self._kept is not None:
            window.extra["radial_sq_norms"] = self._kept.radial_sq_norms(self.parameters, window.reference)
            self._kept = None
        if self._previous is not None and (product := self._previous.product(self.parameters)) is not None:
            window.extra["consecutive_product"] = product

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
        for (name, sq_norms), p in zip(self._probe.layer_sq_norms().items(), self.parameters, strict=True):
            weighted = float(sq_norms.sum()) * window.reference**2
            batch = 0.0 if p.grad is None else float(batch_gradient_sq_norm([p]))
            found[name] = Measurement(weighted, batch, window.weight, window.pieces)
        return found

    def forget(self) -> None:
        """As if nothing had been heard before: the gradient of the window before is no longer known."""
        self._kept = None
        if self._previous is not None:
            self._previous.forget()

    def close(self) -> None:
        """Remove every hook."""
        self._probe.close()
