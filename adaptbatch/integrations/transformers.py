"""Adaptive accumulation in the Trainer of Hugging Face's transformers: a mixin, and the script stays what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_callback import ExportableState, TrainerCallback

from adaptbatch.controller import BatchController
from adaptbatch.estimate import Listen
from adaptbatch.integrations.shared import examples_of, refuse
from adaptbatch.measure.sensor import Metric
from adaptbatch.rules import Limits, Rule

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

IGNORED = -100


class AdaptiveAccumulationMixin(Trainer):
    """Chooses the accumulation steps of every window of ``Trainer.train`` from the measured gradient noise.

    Between two optimizer steps, a *window*, the Trainer takes ``k`` batches of its loader as micro-batches of any
    sizes, for any ``k``, and steps on exactly the weighted mean over the window's target tokens (or examples); an
    epoch's last window ends with the epoch. Clipping, loss scaling and checkpoints see whole windows.

    ``global_step``, logging, saving and evaluation count optimizer steps. What plans the training in advance counts
    micro-batches, so that the same data are used for any ``k``: ``max_steps``, the warm-up, and the learning-rate
    scheduler, which is stepped once a micro-batch. Until the last window ``state.max_steps`` and the progress bar show
    that bound.

    A window whose gradients are not finite is recorded as ``nonfinite`` and moves nothing: the Trainer steps, but finds
    no gradients (an fp16 scaler skips by itself). Neither a guard nor a coupling of the learning rate can be had.

    A checkpoint holds the controller's state (without the gradient that ``consecutive`` remembers) and the place in the
    data; ``resume_from_checkpoint`` goes on there.

    Args:
        args, kwargs: The Trainer's own. ``compute_loss`` and ``compute_loss_func`` are called with
            ``num_items_in_batch=None`` and return the mean over their micro-batch.
        rule, limits, metric, population, ghost, consecutive, listen: Those of
            :class:`~adaptbatch.controller.BatchController`.
        weight: Target tokens (or examples) that a micro-batch's mean loss is over, of its inputs; None: labels that are
            not -100, shifted if the model's loss shifts them, and where labels are no integers, examples. In one
            process a micro-batch of weight zero is left out.
        skip_nonfinite: Whether a window that is not finite moves nothing (one host read before each step).
        unit: What weights count, for whoever reads.

    Attributes:
        controller: The controller of the running or last ``train``, for its ``history`` and ``explain()``; None before.

    Raises:
        ValueError: With accumulation by the Trainer, DeepSpeed, ``DataParallel`` or an optimizer that steps within the
            backward pass; and what the controller itself refuses.

    Example:
        ::

            class MyTrainer(AdaptiveAccumulationMixin, Trainer):
                pass

            trainer = MyTrainer(model, args, train_dataset=data, rule=ab.RelativeStandardError(theta=1.0))
            trainer.train()
            trainer.controller.history.to_pandas()
    """

    # How it works, by transformers 5.24. With gradient_accumulation_steps = 1 the Trainer asks get_batch_samples() for
    # one batch, gives it to training_step(), clips, steps, and clears the gradients. Here the one batch is a window of
    # k. An epoch asks as often as the loader has batches, so that asking in vain at its end does no harm.

    def __init__(
        self,
        *args: Any,
        rule: Rule | None = None,
        limits: Limits | None = None,
        metric: Metric = "euclidean",
        population: float | None = None,
        ghost: bool = False,
        consecutive: bool = False,
        weight: Callable[[Mapping[str, Any]], float] | None = None,
        skip_nonfinite: bool = True,
        unit: str = "examples",
        listen: Listen = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        refuse("AdaptiveAccumulationMixin", _refusals(self))
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
        }
        self._weigh = self._target_items if weight is None else weight
        self._skips_nonfinite, self._withheld = skip_nonfinite, False
        self._taken = 0
        self._stepped_schedule = 0
        self._saved: dict[str, Any] | None = None
        self._windows = AdaptiveAccumulationState(self)
        self.add_callback(self._windows)

    # --- a run --------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; afterwards no hook of the controller is left, its history is."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._end()

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_train_epochs: int, resume_from_checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        """Where to start, in epochs and micro-batches. The Trainer would take one micro-batch for each step it made."""
        self._taken, self._saved = 0, None
        found: tuple[int, int] = super()._init_training_state(
            max_steps, steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        # Restored by the Trainer, on request, it would be a new one that knows nobody.
        self.remove_callback(AdaptiveAccumulationState)
        self.add_callback(self._windows)
        if not self.state.global_step:
            return found
        stored: Any = self.state.stateful_callbacks
        saved = stored.setdefault(AdaptiveAccumulationState.__name__, self._windows.state())["attributes"]["saved"]
        if saved is None:
            # A checkpoint of the plain Trainer: one micro-batch a step.
            self._taken = self.state.global_step
            return found
        self._taken, self._saved = int(saved["taken"]), saved["controller"]
        epochs, within = divmod(self._taken, steps_per_epoch)
        return epochs, 0 if self.args.ignore_data_skip else within

    def _begin(self) -> None:
        """Model and optimizer are prepared, and loaded from the checkpoint if there is one."""
        self._end()
        # The Trainer steps on what it has: the controller is not asked before a step.
        prepared: Any = self.optimizer
        self.controller = BatchController(
            self.model_wrapped,
            getattr(prepared, "optimizer", prepared),
            scaler=self.accelerator.scaler,
            skip_nonfinite=False,
            **self._options,
        )
        self.controller.expect_trainer()
        if self._saved is not None:
            self.controller.load_state_dict(self._saved)
        self._stepped_schedule = self._taken

    def _end(self) -> None:
        if self.controller is not None:
            # After an error there may be half a window.
            with suppress(RuntimeError):
                self.controller.discard_window()
            self.controller.close()

    # --- a window -----------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """The next window, as one batch; none at an epoch's end."""
        left = self.state.max_steps - self._taken
        steps = min(self._required().accumulation_steps, left)
        batches, _ = super().get_batch_samples(epoch_iterator, steps, device)
        self._taken += len(batches)
        weights = _on_host([self._weigh(batch) for batch in batches])
        cells = list(zip(batches, weights, strict=True))
        if self.accelerator.num_processes == 1:
            cells = [(batch, weight) for batch, weight in cells if weight != 0.0]
        return [_Window(cells)] if cells else [], None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a window's micro-batches; ``.grad`` is their exact mean afterwards.

        Returns:
            The mean loss of the window.
        """
        controller = self._required()
        cells: list[tuple[Any, float]] = inputs.cells
        losses: list[Tensor] = []
        for index, (batch, weight) in enumerate(cells, start=1):
            with controller.micro_batch(last=index == len(cells)), self._hearing(controller, weight):
                losses.append(weight * super().training_step(model, batch))
            if index > 1:
                # The Trainer counts those of the first.
                self._track_num_input_tokens(batch)  # type: ignore[no-untyped-call]
        # Unscaled later, where the Trainer clips or steps.
        scaled = self.accelerator.scaler is not None
        self._withheld = self._skips_nonfinite and not scaled and controller.withhold_nonfinite()
        if self._taken >= self.state.max_steps:
            # The last window: from now on it is known how many there are.
            self.state.max_steps = self.state.global_step + 1
        return torch.stack(losses).sum() / sum(weight for _, weight in cells)

    @contextmanager
    def _hearing(self, controller: BatchController, weight: float) -> Iterator[None]:
        """The Trainer's backward pass, within its own training_step() or that of another class, is heard."""
        accelerator, backward = self.accelerator, self.accelerator.backward

        def heard(loss: Tensor, **kwargs: Any) -> None:
            with controller.observe(loss, weight) as weighted:
                backward(weighted, **kwargs)

        accelerator.backward = heard
        try:
            yield
        finally:
            accelerator.backward = backward

    def _end_window(self, loader: Any) -> None:
        """After the optimizer's step, the scheduler's one step and the clearing of the gradients."""
        skipped = self._withheld or self.accelerator.optimizer_step_was_skipped
        self._required().record_step(skipped=skipped)
        for _ in range(self._taken - self._stepped_schedule - 1):
            self._step_schedule(skipped)
        self._stepped_schedule = self._taken
        with suppress(TypeError):
            self.state.epoch = self._taken / len(loader)

    def _step_schedule(self, skipped: bool) -> None:
        if not skipped and self.lr_scheduler is not None and not _by_metrics(self.lr_scheduler):
            self.lr_scheduler.step()

    def floating_point_ops(self, inputs: Any) -> int:
        """Those of all micro-batches of a window."""
        batches = [batch for batch, _ in inputs.cells] if isinstance(inputs, _Window) else [inputs]
        return sum(super(AdaptiveAccumulationMixin, self).floating_point_ops(batch) for batch in batches)

    def _target_items(self, batch: Mapping[str, Any]) -> Any:
        labels = batch.get("shift_labels", batch.get("labels"))
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return examples_of(batch)
        shifts = "shift_labels" not in batch and self._shifts()
        return (labels[..., 1:] if shifts else labels).ne(IGNORED).sum()

    def _shifts(self) -> bool:
        """Whether the model's loss shifts its labels."""
        model: Any = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        # The Trainer goes by names that end in ForCausalLM, and misses GPT2LMHeadModel.
        causal = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        aligned = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return bool(self._loss_shifts_labels or (causal and not aligned))

    def _required(self) -> BatchController:
        if self.controller is None:
            raise RuntimeError("no training has started: the controller is made in train().")
        return self.controller


class AdaptiveAccumulationState(TrainerCallback, ExportableState):
    """Tells the mixin when a training begins and a window ends, and carries its state into checkpoints.

    Args:
        trainer: Whose it is.
    """

    def __init__(self, trainer: AdaptiveAccumulationMixin | None = None) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._required()._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._required()._end_window(kwargs.get("train_dataloader"))

    def state(self) -> dict[str, Any]:
        """What goes into ``trainer_state.json``; nothing before a window has ended.

        Raises:
            RuntimeError: Within a window.
        """
        trainer = self._trainer
        saved = None
        if trainer is not None and trainer.controller is not None and trainer._taken:
            trainer.controller._require_between_windows("state()")
            controller = trainer.controller.state_dict()
            # Gradients are no JSON; of a window that is over only ``consecutive`` would use them.
            controller["sensor"] = dict.fromkeys(controller["sensor"]) | {"cells": 0}
            saved = {"taken": trainer._taken, "controller": controller}
        return {"args": {}, "attributes": {"saved": saved}}

    def _required(self) -> AdaptiveAccumulationMixin:
        if self._trainer is None:
            raise RuntimeError("this callback belongs to AdaptiveAccumulationMixin: use that, do not add it yourself.")
        return self._trainer


class _Window(dict[str, Any]):
    """The inputs of a window's first micro-batch, for whoever looks at them, and all of them with their weights."""

    def __init__(self, cells: list[tuple[Any, float]]) -> None:
        super().__init__(cells[0][0])
        self.cells = cells


# --- weights ----------------------------------------------------------------------------------------------------


def _on_host(weights: list[Any]) -> list[float]:
    """One read for all that are tensors."""
    if any(isinstance(weight, Tensor) for weight in weights):
        values: list[float] = torch.stack([torch.as_tensor(weight) for weight in weights]).tolist()
        return [float(value) for value in values]
    return [float(weight) for weight in weights]


# --- refusals ---------------------------------------------------------------------------------------------------


def _refusals(trainer: Any) -> Iterable[tuple[bool, str]]:
    args = trainer.args
    yield (
        args.gradient_accumulation_steps != 1,
        f"chooses the accumulation steps, got gradient_accumulation_steps = {args.gradient_accumulation_steps}; leave "
        f"it at 1, and bound them with limits.",
    )
    yield (
        bool(trainer.is_deepspeed_enabled),
        "needs a Trainer that steps the optimizer itself, got DeepSpeed, which accumulates in its engine; use DDP.",
    )
    yield (
        args.n_gpu > 1,
        f"needs one process a GPU, got DataParallel on {args.n_gpu}; launch it with torchrun.",
    )
    yield (
        "lomo" in str(getattr(args.optim, "value", args.optim)),
        f"needs an optimizer that steps after the backward pass, got optim = {args.optim}; use another.",
    )
    yield (
        not hasattr(type(trainer), "_init_training_state"),
        "needs transformers 5: this release finds the place to resume at in another way.",
    )


def _by_metrics(scheduler: Any) -> bool:
    return isinstance(scheduler, ReduceLROnPlateau) or type(scheduler).__name__ == "GreedyLR"
