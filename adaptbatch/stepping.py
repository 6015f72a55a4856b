"""The optimizer's step: through the loop's GradScaler, under a coupling's adjustment for the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from adaptbatch.checks import require_plain_step, require_scaler
from adaptbatch.learning_rate import UNTOUCHED, Adjustment, LearningRate
from adaptbatch.noise import NoiseTracker
from adaptbatch.optimizer_state import require_coupling, scaled_step


class Stepper:
    """Takes the steps of one optimizer.

    Args:
        optimizer: Of the loop.
        scaler: The loop's GradScaler; None: losses are not scaled.
        coupling: Of the learning rate to the batch; None couples nothing.

    Attributes:
        applied: The adjustment of the last step, which undoes itself after it.

    Raises:
        ValueError: If ``scaler`` is none, or the optimizer has not what ``coupling`` needs.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> stepper = Stepper(torch.optim.SGD([weight], lr=0.5))
        >>> stepper.scaled(weight.sum()).backward()
        >>> stepper.step(32.0, NoiseTracker(), float("inf")) == UNTOUCHED, weight.item()
        (True, 0.5)
    """

    def __init__(
        self, optimizer: Optimizer, scaler: GradScaler | None = None, coupling: LearningRate | None = None
    ) -> None:
        require_scaler(scaler)
        require_plain_step(optimizer)
        if coupling is not None:
            require_coupling(optimizer, coupling)
        self._optimizer, self._scaler, self._coupling = optimizer, scaler, coupling
        self.applied = UNTOUCHED
        # Whether the scaler has looked for infinities since its last update.
        self._looked = False

    def scaled(self, loss: Tensor) -> Tensor:
        """What is back-propagated in place of ``loss``."""
        return loss if self._scaler is None else self._scaler.scale(loss)

    def loss_scale(self, device: torch.device) -> Tensor | None:
        """The scale until the next :meth:`update`, on the device: reading it would wait."""
        return None if self._scaler is None else self._scaler.scale(torch.ones((), device=device))

    def unscale_(self) -> None:
        """Take the scale out of ``.grad``, once a step.

        Raises:
            RuntimeError: If that was done already, by whom else.
        """
        if self._scaler is None:
            return
        try:
            self._scaler.unscale_(self._optimizer)
        except RuntimeError as error:
            raise RuntimeError(
                f"the scaler refuses to unscale the window's gradients: {error} normalize_() unscales them; leave "
                f"scaler.unscale_(), scaler.step() and scaler.update() to the controller."
            ) from error
        self._looked = True

    def step(self, batch: float, pooled: NoiseTracker, population: float) -> Adjustment:
        """Step, under the coupling's adjustment for ``batch``.

        Args:
            batch: As it was decided [examples].
            pooled: The evidence that the coupling may use.
            population: Examples in the data set.

        Returns:
            What was adjusted.
        """
        if self._coupling is None:
            self._step()
            return UNTOUCHED
        adjustment = self._coupling.adjust(batch, pooled.estimate(), self.applied, population)
        with scaled_step(self._optimizer, adjustment, self.applied):
            self._step()
        self.applied = adjustment
        return adjustment

    def _step(self) -> None:
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._looked = True

    def update(self) -> None:
        """Once a window, stepped or skipped: the scaler grows or backs off."""
        if self._scaler is None:
            return
        if not self._looked:
            self._scaler.unscale_(self._optimizer)
        self._scaler.update()
        self._looked = False

    def abandon(self) -> None:
        """The window comes to nothing; a scaler that has unscaled it may unscale the next one."""
        if self._looked:
            self.update()
