"""Adaptive accumulation in Lightning's own loop: one callback, and nothing else of a training script changes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch import Tensor
from torch.optim import LBFGS
from torch.utils.hooks import RemovableHandle

from adaptbatch.controller import BatchController
from adaptbatch.estimate import Listen
from adaptbatch.integrations.shared import examples_of, refuse
from adaptbatch.measure.sensor import Metric
from adaptbatch.rules import Limits, Rule


class AdaptiveAccumulation(L.Callback):
    """Chooses the accumulation steps of every window of ``Trainer.fit`` from the measured gradient noise.

    Between two optimizer steps, a *window*, Lightning takes ``k`` batches of its loader as micro-batches of any sizes,
    for any ``k``, and steps on exactly the weighted mean over the window's examples; an epoch's last window ends with
    the epoch. ``trainer.global_step``, schedulers with ``interval="step"``, clipping and precision plugins count and
    see whole windows. ``training_step`` returns the mean loss, as ever.

    A checkpoint holds the controller's state, and in one process the gradients of an open window too.

    A window whose gradients are not finite is recorded as ``nonfinite`` and moves nothing: Lightning steps, but finds
    no gradients (the scaler of ``precision="16-mixed"`` skips by itself). Schedulers count it. Neither a guard nor a
    coupling of the learning rate can be had.

    ``trainer.estimated_stepping_batches`` counts every batch as a step, since nobody knows the windows in advance, and
    for the same reason Lightning may warn that a checkpoint of an epoch's end was one of its middle.

    Args:
        rule, limits, metric, population, ghost, consecutive, listen, process_group: Those of
            :class:`~adaptbatch.controller.BatchController`.
        weight: Examples (or tokens) that a batch's mean loss is over, as a Python number; None: the first dimension of
            the first tensor in the batch.
        skip_nonfinite: Whether a window that is not finite moves nothing (one host read before each step).
        unit: What weights count, for whoever reads.

    Attributes:
        controller: The controller of the running or last ``fit``, for its ``history`` and ``explain()``; None before.

    Raises:
        ValueError: When ``fit`` starts, under manual optimization, several optimizers, LBFGS, a training step that
            draws its own batches, accumulation by the Trainer, another callback or a strategy (DeepSpeed); and what
            the controller itself refuses.

    Example:
        ::

            accumulation = AdaptiveAccumulation(rule=ab.RelativeStandardError(theta=1.0))
            L.Trainer(max_epochs=3, callbacks=[accumulation]).fit(module, loader)
            accumulation.controller.history.to_pandas()
    """

    # How it works, by Lightning 2.6 (loops/training_epoch_loop.py, loops/optimization/automatic.py). The loop reads
    # trainer.accumulate_grad_batches = d live, by modulo of the batch's index i in the epoch: it steps if
    # (i + 1) % d == 0 or the batch is the last, clears gradients before the backward pass if i % d == 0, and divides
    # the loss by d. So d = i + 1 steps and d = i + 2 does not; both clear gradients at i = 0 only, where a window
    # always begins. d stays until the next batch starts: schedulers and validation still ask whether this one stepped.

    def __init__(
        self,
        *,
        rule: Rule | None = None,
        limits: Limits | None = None,
        metric: Metric = "euclidean",
        population: float | None = None,
        ghost: bool = False,
        consecutive: bool = False,
        process_group: Any = None,
        weight: Callable[[Any], float] | None = None,
        skip_nonfinite: bool = True,
        unit: str = "examples",
        listen: Listen = "auto",
    ) -> None:
        self._skips_nonfinite, self._withheld = skip_nonfinite, False
        self.controller: BatchController | None = None
        self._options: dict[str, Any] = {
            "rule": rule,
            "limits": limits,
            "metric": metric,
            "population": population,
            "ghost": ghost,
            "consecutive": consecutive,
            "unit": unit,
            "listen": listen,
            "process_group": process_group,
        }
        self._weigh = examples_of if weight is None else weight
        self._weight = 0.0
        self._heard = 0
        self._stepped = False
        self._scaler: Any = None
        self._scale = 1.0
        self._running = False
        self._saved: dict[str, Any] | None = None
        self._scope, self._hearing = ExitStack(), ExitStack()
        self._hook: RemovableHandle | None = None

    # --- a run --------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        refuse("AdaptiveAccumulation", _refusals(trainer, pl_module))
        # Before the others, which then see the loss as the step returned it.
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [self, *(one for one in callbacks if one is not self)]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The first hook after the checkpoint's optimizer states have been loaded; callbacks have theirs before.
        optimizer = trainer.optimizers[0]
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        # Lightning steps on what it has: the controller is not asked before a step.
        self.controller = BatchController(
            trainer.strategy.model or pl_module, optimizer, scaler=self._scaler, skip_nonfinite=False, **self._options
        )
        self.controller.expect_trainer()
        self._heard = 0
        if self._saved is not None:
            self.controller.load_state_dict(self._saved["controller"])
            self._heard = int(self._saved["heard"])
        self._warn_of_plans(trainer)
        self._hook = optimizer.register_step_post_hook(self._note_step)
        self._running = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Checkpoints of the end come after this.
        self._saved = self.state_dict()
        self._end(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not self._running or self.controller is None:
            return
        for scope in (self._hearing, self._scope):
            scope.__exit__(type(exception), exception, exception.__traceback__)
        # A checkpoint of the failure has the parameters of the last step: its window's gradients are incomplete.
        self._saved = None
        with suppress(RuntimeError):
            self.controller.discard_window()
            self._heard = 0
            self._saved = self.state_dict()
        self._end(trainer)

    def _warn_of_plans(self, trainer: L.Trainer) -> None:
        """A schedule of so many steps, planned from ``estimated_stepping_batches``, counts batches and gets windows."""
        planned = float(trainer.estimated_stepping_batches)
        for config in trainer.lr_scheduler_configs:
            horizons = [getattr(config.scheduler, name, None) for name in ("total_steps", "T_max", "total_iters")]
            if config.interval == "step" and planned in horizons and planned > 1.0:
                warnings.warn(
                    f"{type(config.scheduler).__name__} was planned for {planned:.0f} steps, one a batch, and is "
                    f"stepped once a window of several: it ends early in its course. Plan it in windows where their "
                    f'number is known, or step it by epochs (interval="epoch").',
                    stacklevel=2,
                )

    def _end(self, trainer: L.Trainer) -> None:
        self._running = False
        if self._hook is not None:
            self._hook.remove()
        if self.controller is not None:
            self.controller.close()
        # What the next fit() finds is what the Trainer was given.
        trainer.accumulate_grad_batches = 1

    # --- a micro-batch ------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        controller = self._required()
        progress = trainer.fit_loop.epoch_loop.batch_progress
        last = bool(progress.is_last_batch or progress.current.ready == trainer.num_training_batches)
        closes = last or self._heard + 1 >= controller.accumulation_steps
        trainer.accumulate_grad_batches = batch_idx + 1 if closes else batch_idx + 2
        self._stepped = False
        self._weight = self._weigh(batch)
        self._scope.enter_context(controller.micro_batch(last=last))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        # The very tensor that is back-propagated next, divided by d and, under a scaler, with the loss scale.
        divisor = trainer.accumulate_grad_batches
        mean = loss.detach() * divisor
        if self._scaler is not None:
            mean = mean / self._scaler.scale(torch.ones((), device=loss.device))
        mean.requires_grad_()
        weighted = self._hearing.enter_context(self._required().observe(mean, self._weight))
        # It cannot be replaced, but multiplied by what observe() multiplies by.
        factor = 1.0 if weighted is mean else torch.autograd.grad(weighted, mean)[0]
        loss.mul_(divisor * factor)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._hearing.close()
        self._heard += 1
        if self._required().step_due:
            self._withhold()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        # A training_step that returned None in the window's last micro-batch: Lightning steps all the same.
        controller = self._required()
        if self._heard and not controller.step_due:
            controller.close_window()
            self._withhold()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._scope.close()
        if isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
            outputs["loss"].mul_(trainer.accumulate_grad_batches)
        controller = self._required()
        if not controller.step_due:
            return
        trainer.optimizers[0].zero_grad()
        controller.record_step(skipped=self._skipped())
        self._heard = 0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """An epoch that was stopped within a window: Lightning clears its gradients at the next epoch's start."""
        self._scope.close()
        if not self._heard:
            return
        warnings.warn(
            f"the epoch was stopped within a window: {self._heard} of {self._required().accumulation_steps} "
            f"micro-batches are dropped; stop where trainer.global_step has moved to use them.",
            stacklevel=2,
        )
        self._required().discard_window()
        self._heard = 0

    def _withhold(self) -> None:
        """Lightning unscales, clips and steps after this."""
        self._withheld = self._skips_nonfinite and self._scaler is None and self._required().withhold_nonfinite()
        self._scale = 1.0 if self._scaler is None else self._scaler.get_scale()

    def _note_step(self, *_: Any) -> None:
        self._stepped = True

    def _skipped(self) -> bool:
        """Whether the optimizer did not step, or fused with the scaler's check found no finite gradients."""
        # trainer.global_step counts such a step all the same.
        return (
            self._withheld or not self._stepped or (self._scaler is not None and self._scaler.get_scale() < self._scale)
        )

    def _required(self) -> BatchController:
        if self.controller is None:
            raise RuntimeError("no fit has started: the controller is made in Trainer.fit().")
        return self.controller

    # --- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The controller's state, for Lightning's checkpoint; empty before the first ``fit``.

        Raises:
            RuntimeError: Within a window of several ranks, and between the backward pass that closes a window and
                ``on_train_batch_end``, where this callback comes first.
        """
        if self._running:
            return {"controller": self._required().state_dict(), "heard": self._heard}
        return {} if self._saved is None else self._saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state for the ``fit`` that starts next."""
        self._saved = state_dict or None


# --- refusals ---------------------------------------------------------------------------------------------------


def _refusals(trainer: L.Trainer, module: L.LightningModule) -> Iterable[tuple[bool, str]]:
    optimizers = trainer.optimizers
    others = (GradientAccumulationScheduler, StochasticWeightAveraging)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    beside = [type(callback).__name__ for callback in callbacks if isinstance(callback, others)]
    own = sum(isinstance(callback, AdaptiveAccumulation) for callback in callbacks)
    yield (
        not module.automatic_optimization,
        "needs automatic optimization, got automatic_optimization = False; call a BatchController in your "
        "training_step instead.",
    )
    yield (
        trainer.strategy.handles_gradient_accumulation,
        f"needs a strategy that leaves accumulation to Lightning, got {type(trainer.strategy).__name__}; DeepSpeed "
        f"fixes it when the engine is built, use DDP.",
    )
    yield (
        trainer.accumulate_grad_batches != 1,
        f"chooses the accumulation steps, got Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}); "
        f"leave it out, and bound them with limits.",
    )
    yield bool(beside), f"must not stand beside {beside}, which sets the accumulation steps too; use one of the two."
    yield own != 1, f"must be there once, got {own} of them."
    yield len(optimizers) != 1, f"needs one optimizer, got {len(optimizers)}; give it several parameter groups."
    yield (
        any(isinstance(optimizer, LBFGS) for optimizer in optimizers),
        "needs an optimizer with one backward pass a batch, got LBFGS.",
    )
    yield (
        "dataloader_iter" in inspect.signature(module.training_step).parameters,
        "has to know an epoch's last batch before its training_step, got one that takes dataloader_iter; take batch.",
    )
