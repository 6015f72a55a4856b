"""One window of the overhead study, by every way to run it: hand-written, with the controller, with its peers."""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import adaptbatch as ab
from studies.engine.networks import Autoencoder
from studies.engine.ranks import Loss

Window = Callable[[Sequence[Tensor]], None]
LossOf = Callable[[Tensor], Tensor]
STEPS = 8


def _adam(model: torch.nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=1e-4)


def _accumulate(
    model: Autoencoder, optimizer: Any, loss: LossOf | None = None, before_step: Callable[[], object] = lambda: None
) -> Window:
    loss = loss or model.loss

    def window(batches: Sequence[Tensor]) -> None:
        for x in batches:
            (loss(x) / len(batches)).backward()
        before_step()
        optimizer.step()
        optimizer.zero_grad()

    return window


def hand_written(model: Autoencoder) -> Window:
    """The accumulation loop that everyone writes."""
    return _accumulate(model, _adam(model))


def empty_hooks(model: Autoencoder) -> Window:
    """The same with a hook on each parameter that does nothing: the floor for anything that listens."""
    for p in model.parameters():
        p.register_hook(lambda grad: None)
    return hand_written(model)


def adaptbatch(
    model: Autoencoder,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    loss: LossOf | None = None,
    clips: bool = False,
    trained: torch.nn.Module | None = None,
    checked: bool = True,
    **options: Any,
) -> Window:
    """The controller with the CLT rule, held at this window size: everything is measured, tested and recorded."""
    limits = ab.Limits(min_steps=STEPS, max_steps=STEPS)
    rule, optimizer, loss = ab.RelativeStandardError(), optimizer or _adam(model), loss or model.loss
    controller = ab.BatchController(trained or model, optimizer, rule=rule, limits=limits, **options)
    if not checked:
        _switch_off_checks(controller)

    # One epoch of many windows, as in training: ranks vote at its start, not at each window's.
    endless: Iterator[Tensor] = iter(())

    def window(batches: Sequence[Tensor]) -> None:
        nonlocal endless
        if controller.examples_seen == 0:
            endless = controller.micro_batches(itertools.cycle(batches))
        for x in endless:
            controller.backward(loss(x), weight=len(x))
            if controller.step_due:
                if clips:
                    clip(model)
                controller.step()
                return

    return window


def _switch_off_checks(controller: Any) -> None:
    """Nobody looks whether gradients were written to, or the optimizer stepped, by somebody else."""
    for name in ("_close_seal", "require_first", "require_untouched"):
        setattr(controller._accumulator, name, lambda *_, **__: None)
    controller._stepper.gate.close()


def adaptbatch_unchecked(model: Autoencoder) -> Window:
    """The controller without its checks, which is not to be had: what they cost."""
    return adaptbatch(model, checked=False)


def adaptbatch_ghost(model: Autoencoder) -> Window:
    """The same, every example measured on its own."""
    return adaptbatch(model, ghost=True)


def adaptbatch_metric(model: Autoencoder) -> Window:
    """The same, in Adam's metric too, which is warm after ten steps at this ``beta2``."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.99))
    for _ in range(10):
        model.loss(torch.rand(2, 784)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return adaptbatch(model, optimizer, metric="adam")


def clip(model: Autoencoder) -> Tensor:
    """The usual clipping by norm."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def clipping(model: Autoencoder) -> Window:
    """The hand-written loop with clipping."""
    return _accumulate(model, _adam(model), before_step=lambda: clip(model))


def adaptbatch_clipping(model: Autoencoder) -> Window:
    """The controller with clipping, which makes it measure the norm once more, after it."""
    return adaptbatch(model, clips=True)


def _autocast(model: Autoencoder) -> LossOf:
    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model.loss(x)

    return loss


def amp(model: Autoencoder) -> Window:
    """The hand-written loop of the PyTorch documentation: autocast (bfloat16 on a CPU) and GradScaler."""
    optimizer, scaler, loss = _adam(model), torch.amp.GradScaler("cpu"), _autocast(model)

    def window(batches: Sequence[Tensor]) -> None:
        for x in batches:
            scaler.scale(loss(x) / len(batches)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return window


def adaptbatch_amp(model: Autoencoder) -> Window:
    """The controller with the same."""
    return adaptbatch(model, loss=_autocast(model), scaler=torch.amp.GradScaler("cpu"))


def compiled(model: Autoencoder) -> Window:
    """The hand-written loop with a compiled loss."""
    return _accumulate(model, _adam(model), torch.compile(model.loss))


def adaptbatch_compiled(model: Autoencoder) -> Window:
    """The controller with the same."""
    return adaptbatch(model, loss=torch.compile(model.loss))


def ddp_loop(model: Autoencoder) -> Window:
    """The loop of the PyTorch documentation: no_sync() in all micro-batches but the last."""
    trained, optimizer = DistributedDataParallel(Loss(model)), _adam(model)

    def window(batches: Sequence[Tensor]) -> None:
        with trained.no_sync():
            for x in batches[:-1]:
                (trained(x) / len(batches)).backward()
        (trained(batches[-1]) / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return window


def adaptbatch_ddp(model: Autoencoder) -> Window:
    """The controller with the same."""
    trained = DistributedDataParallel(Loss(model))
    return adaptbatch(model, loss=trained, trained=trained)


def fairscale_adascale(model: Autoencoder) -> Window:
    """fairscale's AdaScale: noise and signal from micro-batches, a gain for the learning rate."""
    from fairscale.optim import AdaScale

    return _accumulate(model, AdaScale(_adam(model), world_size=1, num_gradients_to_accumulate=STEPS))


def _gqc(model: Autoencoder, wrapper: str, state: str) -> Window:
    """A torch-gqc wrapper made to draw every micro-batch: a tolerance that is never met, a limit that is."""
    import gradient_quality_control as gqc

    optimizer = getattr(gqc, wrapper)(_adam(model), max_batch_draws=STEPS)
    for group in optimizer.param_groups:
        group[state] = 0.0

    def window(batches: Sequence[Tensor]) -> None:
        with warnings.catch_warnings():
            # The variance of the first norm alone; the wrapper goes on.
            warnings.filterwarnings("ignore", message="var\\(\\): degrees of freedom")
            for x in batches:
                model.loss(x).backward()
                stepped = optimizer.step()
        assert stepped, f"{wrapper} did not step after {len(batches)} draws"

    return window


def gqc_norm_threshold(model: Autoencoder) -> Window:
    """torch-gqc's flagship: accumulate until the gradient's norm is below a threshold."""
    return _gqc(model, "OptimizerWrapperGNTS", "gradient_norm_threshold")


def gqc_noise_scale(model: Autoencoder) -> Window:
    """torch-gqc's noise scale: the variance of the gradients' norms."""
    return _gqc(model, "OptimizerWrapperGNS", "noise_tolerance")


CONTENDERS: dict[str, tuple[Callable[[Autoencoder], Window], str | None]] = {
    "hand-written loop": (hand_written, None),
    "empty hooks": (empty_hooks, None),
    "adaptbatch": (adaptbatch, None),
    "adaptbatch, no checks": (adaptbatch_unchecked, None),
    "adaptbatch, ghost norms": (adaptbatch_ghost, None),
    "adaptbatch, Adam's metric": (adaptbatch_metric, None),
    "loop with clipping": (clipping, None),
    "adaptbatch, clipping": (adaptbatch_clipping, None),
    "loop with AMP": (amp, None),
    "adaptbatch, AMP": (adaptbatch_amp, None),
    "compiled loop": (compiled, None),
    "adaptbatch, compiled": (adaptbatch_compiled, None),
    "fairscale AdaScale": (fairscale_adascale, "fairscale"),
    "torch-gqc GNTS": (gqc_norm_threshold, "gradient_quality_control"),
    "torch-gqc GNS": (gqc_noise_scale, "gradient_quality_control"),
}

# Each rank's, in processes of their own.
DDP_CONTENDERS: dict[str, Callable[[Autoencoder], Window]] = {
    "loop with DDP": ddp_loop,
    "adaptbatch, DDP": adaptbatch_ddp,
}

# What a contender is compared with; the hand-written loop if it is not here. Of the controller without its checks the
# ratio falls short of one by what they cost.
BASELINES = {
    "adaptbatch, no checks": "adaptbatch",
    "adaptbatch, clipping": "loop with clipping",
    "adaptbatch, AMP": "loop with AMP",
    "adaptbatch, compiled": "compiled loop",
    "adaptbatch, DDP": "loop with DDP",
    # Measured in processes of its own.
    "loop with DDP": "loop with DDP",
}


def baseline(contender: str) -> str:
    """The loop without a controller that ``contender`` is compared with."""
    return BASELINES.get(contender, "hand-written loop")


def available() -> dict[str, Callable[[Autoencoder], Window]]:
    """The contenders whose package is installed."""
    return {name: make for name, (make, module) in CONTENDERS.items() if not module or importlib.util.find_spec(module)}
