"""The optimizer's step: through the loop's GradScaler, under a coupling's adjustment for the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from adaptbatch.checks import require_plain_step, require_scaler
from adaptbatch.estimate import NoiseTracker
from adaptbatch.optimizer.learning_rate import UNTOUCHED, Adjustment, LearningRate
from adaptbatch.optimizer.second_moment import require_coupling, scaled_step


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
        >>> stepper.scaled(weight.sum(), scale=None).backward()
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
        # A scaler that is switched off neither scales nor unscales.
        enabled = scaler is not None and getattr(scaler, "is_enabled", lambda: True)()
        self._optimizer, self._scaler, self._coupling = optimizer, scaler if enabled else None, coupling
        self.applied = UNTOUCHED
        self.gate = StepGate(optimizer)
        # The scaler's state as of the window's opening.
        self._opened: _Stamp = None
        self._unscaled = False

    def scaled(self, loss: Tensor, scale: Tensor | None) -> Tensor:
        """What is back-propagated in place of ``loss`` in a window of that loss scale."""
        return loss if scale is None else loss * scale.to(loss.device)

    def loss_scale(self, device: torch.device) -> Tensor | None:
        """The scale of the window that opens now, on the device: reading it would wait.

        All its micro-batches have it, whatever another owner of the scaler does meanwhile.
        """
        self._unscaled = False
        if self._scaler is None:
            return None
        scale = self._scaler.scale(torch.ones((), device=device))
        self._opened = self._stamp()
        return scale

    def _stamp(self) -> _Stamp:
        """Which tensor the scale is in and how often it was written to: each ``update()`` writes."""
        scale = getattr(self._scaler, "_scale", None)
        return None if scale is None else (id(scale), scale._version)

    def require_scale(self) -> None:
        """Refuse, where a trainer scales the losses itself, a scale that changed within the window.

        Raises:
            RuntimeError: If somebody updated the scaler since the window opened.
        """
        if self._scaler is not None and self._opened is not None and self._stamp() != self._opened:
            raise RuntimeError(
                "the loss scale was updated within the window, whose gradients so far have another: the scaler's "
                "update() belongs to the end of a window. discard_window() goes on without this one."
            )

    def unscale_(self, scale: Tensor | None) -> None:
        """Take the window's ``scale`` out of ``.grad``, once a step.

        Raises:
            RuntimeError: If that was done already, by whom else.
        """
        if self._scaler is None or scale is None:
            return
        if self._opened is None or self._stamp() != self._opened:
            # The scaler divides by its own, which may be another by now, or another's than the checkpoint's.
            self._multiply(self._scaler.scale(torch.ones_like(scale)) / scale)
        try:
            self._scaler.unscale_(self._optimizer)
        except RuntimeError as error:
            raise RuntimeError(
                f"the scaler refuses to unscale the window's gradients: {error} The controller unscales them; leave "
                f"scaler.unscale_(), scaler.step() and scaler.update() to the controller."
            ) from error
        self._unscaled = True

    @torch.no_grad()
    def _multiply(self, factor: Tensor) -> None:
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(factor.to(p.grad))

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
        with self.gate.own():
            if self._scaler is None:
                self._optimizer.step()
                return
            if self._unscaled and not self._has_looked:
                # Another owner's update() made it forget that these are unscaled: it does so again.
                self._multiply(self._scaler.scale(torch.ones((), device=self._device)))
            self._scaler.step(self._optimizer)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._optimizer.param_groups[0]["params"][0].device
        return device

    @property
    def _has_looked(self) -> bool:
        """Whether the scaler has looked for infinities since its last update, whoever told it to."""
        states = getattr(self._scaler, "_per_optimizer_states", {})
        return bool(states.get(id(self._optimizer), {}).get("found_inf_per_device"))

    def update(self) -> None:
        """Once a window, stepped or skipped: the scaler grows or backs off."""
        if self._scaler is None:
            return
        if not self._has_looked:
            self._scaler.unscale_(self._optimizer)
        self._scaler.update()

    def abandon(self) -> None:
        """The window comes to nothing; a scaler that has unscaled it may unscale the next one."""
        if self._has_looked:
            self.update()

    def close(self) -> None:
        """Leave nothing on the optimizer."""
        self.gate.close()


class StepGate:
    """Notices steps of an optimizer that are not the controller's.

    Attributes:
        refuses: Why a step would be wrong now; None: it would not be.
        passed: Steps of somebody else since it was last set to zero.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
        >>> gate = StepGate(optimizer)
        >>> gate.refuses = "the window is open"
        >>> optimizer.step()
        Traceback (most recent call last):
        RuntimeError: the window is open
        >>> with gate.own():
        ...     optimizer.step()
        >>> gate.close()
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.refuses: str | None = None
        self.passed = 0
        self._own = False
        # Wrappers of optimizers may not be initialised as one.
        hooked = hasattr(optimizer, "_optimizer_step_pre_hooks")
        self._handle = optimizer.register_step_pre_hook(self._before) if hooked else None

    def _before(self, *_: object) -> None:
        if self._own:
            return
        if self.refuses is not None:
            raise RuntimeError(self.refuses)
        self.passed += 1

    @contextmanager
    def own(self) -> Iterator[None]:
        """The controller's own step."""
        self._own = True
        try:
            yield
        finally:
            self._own = False

    def close(self) -> None:
        """Leave nothing on the optimizer."""
        if self._handle is not None:
            self._handle.remove()


_Stamp = tuple[int, int] | None
