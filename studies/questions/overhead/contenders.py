"""One window of the overhead study, by every way to run it: hand-written, with the controller, with its peers.

On other networks than the 80-layer one three ways are enough. A model of one parameter shows the host's part: nothing
else takes time there.
"""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import adaptbatch as ab
from studies.engine.networks import Autoencoder
from studies.engine.ranks import Loss
from studies.questions.overhead.settings import SETTINGS, STEPS

Window = Callable[[Sequence[Tensor]], None]
LossOf = Callable[[Tensor], Tensor]
#: Of a settled ``listen="auto"``: one window in so many is measured.
EVERY = 4


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


class Epoch:
    """One of many windows, as in training, of a length that is known, as a DataLoader's is."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.cycle(self._batches)

    def __len__(self) -> int:
        return 10**9


def adaptbatch(
    model: Autoencoder,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    loss: LossOf | None = None,
    clips: bool = False,
    trained: torch.nn.Module | None = None,
    steps: int | None = None,
    listen: ab.estimate.Listen = 1.0,
    **options: Any,
) -> Window:
    """The controller with the CLT rule, held at this window size: everything is measured, tested and recorded."""
    limits, options["listen"] = ab.Limits(min_steps=steps or STEPS, max_steps=steps or STEPS), listen
    rule, optimizer, loss = ab.RelativeStandardError(), optimizer or _adam(model), loss or model.loss
    controller = ab.BatchController(trained or model, optimizer, rule=rule, limits=limits, **options)

    # Ranks vote at an epoch's start, not at each window's.
    epoch: Iterator[Tensor] = iter(())

    def window(batches: Sequence[Tensor]) -> None:
        nonlocal epoch
        if controller.examples_seen == 0:
            epoch = controller.micro_batches(Epoch(batches))
        for x in epoch:
            controller.backward(loss(x), weight=len(x))
            if controller.step_due:
                if clips:
                    clip(model)
                controller.step()
                return

    # For whoever counts its reads as those of a GPU.
    window.controller = controller  # type: ignore[attr-defined]
    return window


def adaptbatch_ghost(model: Autoencoder, **options: Any) -> Window:
    """The same, every example measured on its own."""
    return adaptbatch(model, ghost=True, **options)


def adaptbatch_metric(model: Autoencoder, **options: Any) -> Window:
    """The same, in Adam's metric too, which is warm after ten steps at this ``beta2``."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.99))
    for _ in range(10):
        model.loss(torch.rand(2, 784)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return adaptbatch(model, optimizer, metric="adam", **options)


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


def adaptbatch_ddp(model: Autoencoder, **options: Any) -> Window:
    """The controller with the same."""
    trained = DistributedDataParallel(Loss(model))
    return adaptbatch(model, loss=trained, trained=trained, **options)


def _sharded(model: Autoencoder) -> Loss:
    trained = Loss(model)
    fully_shard(trained)
    return trained


def fsdp_loop(model: Autoencoder) -> Window:
    """The loop with FSDP2, gradients reduced in the last micro-batch."""
    trained = _sharded(model)
    optimizer = _adam(trained)

    def window(batches: Sequence[Tensor]) -> None:
        for index, x in enumerate(batches):
            trained.set_requires_gradient_sync(index == len(batches) - 1)
            (trained(x) / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return window


def adaptbatch_fsdp(model: Autoencoder, **options: Any) -> Window:
    """The controller with the same."""
    trained = _sharded(model)
    return adaptbatch(model, _adam(trained), loss=trained, trained=trained, **options)


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


@dataclass(frozen=True)
class Contender:
    """One way to run a window.

    Attributes:
        make: Of the network.
        baseline: The row it is compared with.
        module: That must be installed.
        setting: Of :data:`SETTINGS`.
        windows: That it takes in a round: all that differ.
    """

    make: Callable[[Any], Window]
    baseline: str = "hand-written loop"
    module: str | None = None
    setting: str = "80 layers"
    windows: int = 1


def _less(make: Callable[..., Window], baseline: str = "hand-written loop", setting: str = "80 layers") -> Contender:
    """The controller as it is once the noise scale is known: one window in :data:`EVERY` is measured."""
    return Contender(partial(make, listen=1.0 / EVERY), baseline, setting=setting, windows=EVERY)


def _elsewhere(setting: str) -> dict[str, Contender]:
    """The loop, and the controller listening to all windows and to few, on another network."""
    loop = f"loop, {setting}"
    ours = partial(adaptbatch, steps=len(SETTINGS[setting].micro_batches()))
    return {
        loop: Contender(hand_written, loop, setting=setting),
        f"adaptbatch, {setting}": Contender(ours, loop, setting=setting),
        f"adaptbatch, one window in four, {setting}": _less(ours, loop, setting),
    }


CONTENDERS = {
    "hand-written loop": Contender(hand_written),
    "empty hooks": Contender(empty_hooks),
    "adaptbatch": Contender(adaptbatch),
    "adaptbatch, one window in four": _less(adaptbatch),
    "adaptbatch, ghost norms": Contender(adaptbatch_ghost),
    "adaptbatch, ghost norms, one window in four": _less(adaptbatch_ghost),
    "adaptbatch, Adam's metric": Contender(adaptbatch_metric),
    "adaptbatch, Adam's metric, one window in four": _less(adaptbatch_metric),
    "loop with clipping": Contender(clipping),
    "adaptbatch, clipping": Contender(adaptbatch_clipping, "loop with clipping"),
    "loop with AMP": Contender(amp),
    "adaptbatch, AMP": Contender(adaptbatch_amp, "loop with AMP"),
    "compiled loop": Contender(compiled),
    "adaptbatch, compiled": Contender(adaptbatch_compiled, "compiled loop"),
    "fairscale AdaScale": Contender(fairscale_adascale, module="fairscale"),
    "torch-gqc GNTS": Contender(gqc_norm_threshold, module="gradient_quality_control"),
    "torch-gqc GNS": Contender(gqc_noise_scale, module="gradient_quality_control"),
    **{name: one for setting in SETTINGS if setting != "80 layers" for name, one in _elsewhere(setting).items()},
}

# Each rank's, in processes of their own.
RANKS_CONTENDERS = {
    "loop with DDP": Contender(ddp_loop, "loop with DDP"),
    "adaptbatch, DDP": Contender(adaptbatch_ddp, "loop with DDP"),
    "adaptbatch, DDP, one window in four": _less(adaptbatch_ddp, "loop with DDP"),
    "loop with FSDP2": Contender(fsdp_loop, "loop with FSDP2"),
    "adaptbatch, FSDP2": Contender(adaptbatch_fsdp, "loop with FSDP2"),
    "adaptbatch, FSDP2, one window in four": _less(adaptbatch_fsdp, "loop with FSDP2"),
}


def baseline(contender: str) -> str:
    """The row that ``contender`` is compared with."""
    known = (CONTENDERS | RANKS_CONTENDERS).get(contender)
    return "hand-written loop" if known is None else known.baseline


def available() -> dict[str, Contender]:
    """The contenders whose package is installed."""
    return {name: one for name, one in CONTENDERS.items() if not one.module or importlib.util.find_spec(one.module)}
