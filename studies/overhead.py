"""What the controller costs: time against the hand-written loop and the peers, memory, and reads by the host.

One window (8 micro-batches of 256, the 80-layer network at width 128) of every contender in turn, in one process, again
and again; the ratio to the hand-written loop is taken within each round, so that a slow moment of the machine slows
both. Peers that are not installed are left out (they live in the ``peers`` extra).
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import adaptbatch as ab
from studies import data
from studies.networks import Autoencoder

Window = Callable[[Sequence[Tensor]], None]
STEPS, MICRO_BATCH, WIDTH = 8, 256, 128
NETWORKS = 4
HOST_READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"}


def _adam(model: torch.nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=1e-4)


def _accumulate(model: Autoencoder, optimizer: Any) -> Window:
    def window(batches: Sequence[Tensor]) -> None:
        for x in batches:
            (model.loss(x) / len(batches)).backward()
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


def adaptbatch(model: Autoencoder, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> Window:
    """The controller with the CLT rule, held at this window size: everything is measured, tested and recorded."""
    limits = ab.Limits(min_steps=STEPS, max_steps=STEPS)
    rule, optimizer = ab.RelativeStandardError(), optimizer or _adam(model)
    controller = ab.BatchController(model, optimizer, rule=rule, limits=limits, **options)

    def window(batches: Sequence[Tensor]) -> None:
        for x in controller.micro_batches(batches):
            controller.backward(model.loss(x), weight=len(x))
            if controller.step_due:
                controller.step()

    return window


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
    "adaptbatch, ghost norms": (adaptbatch_ghost, None),
    "adaptbatch, Adam's metric": (adaptbatch_metric, None),
    "fairscale AdaScale": (fairscale_adascale, "fairscale"),
    "torch-gqc GNTS": (gqc_norm_threshold, "gradient_quality_control"),
    "torch-gqc GNS": (gqc_noise_scale, "gradient_quality_control"),
}


class HostReads(TorchFunctionMode):
    """Counts what makes the host wait for a tensor: ``.item()`` and kin, in Python and below it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._below = _ScalarReads()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._below.count
        result = function(*args, **(kwargs or {}))
        # .item() dispatches a scalar read of its own: one read, counted once.
        self.count += getattr(function, "__name__", "") in HOST_READS or self._below.count > before
        return result

    def __enter__(self) -> HostReads:
        super().__enter__()
        self._below.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._below.__exit__(*error)
        super().__exit__(*error)


class _ScalarReads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.__name__.split(".")[0]
        self.count += name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")
        return operator(*args, **(kwargs or {}))


class Allocations(TorchDispatchMode):
    """Adds up the bytes of every tensor that an operator newly allocates, and keeps the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.large: dict[int, int] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        given = {_storage(x) for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage(tensor) not in given:
                size = tensor.untyped_storage().nbytes()
                self.total += size
                self.large[size] = self.large.get(size, 0) + 1
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def available() -> dict[str, Callable[[Autoencoder], Window]]:
    """The contenders whose package is installed."""
    return {name: make for name, (make, module) in CONTENDERS.items() if not module or importlib.util.find_spec(module)}


def micro_batches() -> list[Tensor]:
    """The window's data, the same for all."""
    images = torch.from_numpy(data.load("mnist").train_inputs[: STEPS * MICRO_BATCH])
    return list(images.split(MICRO_BATCH))


def network() -> Autoencoder:
    """The 80-layer network at width 128 throughout."""
    torch.manual_seed(0)
    return Autoencoder(depth=80, widths=(WIDTH, WIDTH), code=16, residual="scaled")


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread, as in the studies."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure_time(rounds: int, report: Callable[[int], None] = lambda done: None) -> pd.DataFrame:
    """Seconds of one window, one row for each contender and round; the order rotates from round to round.

    Every contender has several networks and takes them in turn: where a network happens to lie in memory makes a few
    per cent, and must not be counted for or against it.
    """
    batches, rows = micro_batches(), []
    with one_thread():
        windows = {name: [make(network()) for _ in range(NETWORKS)] for name, make in available().items()}
        for window in (window for several in windows.values() for window in several):
            window(batches)
            window(batches)
        names = list(windows)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                window = windows[name][turn % NETWORKS]
                started = time.perf_counter()
                window(batches)
                rows.append({"round": turn, "contender": name, "seconds": time.perf_counter() - started})
            report(turn + 1)
    return pd.DataFrame(rows)


def measure_cost() -> pd.DataFrame:
    """Host reads and allocated bytes of one window, above the hand-written loop's, for each contender."""
    batches, counts = micro_batches(), {}
    with one_thread():
        for name, make in available().items():
            window = make(network())
            # Optimizer state and first-window buffers come with the first window.
            window(batches)
            with HostReads() as reads:
                window(batches)
            with Allocations() as memory:
                window(batches)
            counts[name] = (reads.count, memory.total, max(memory.large))
    base_reads, base_total, _ = counts["hand-written loop"]
    return pd.DataFrame(
        [
            {"contender": name, "host reads": reads - base_reads, "extra bytes": total - base_total}
            for name, (reads, total, _) in counts.items()
        ]
    )


def ratios(seconds: pd.DataFrame) -> pd.DataFrame:
    """Median time and median ratio to the hand-written loop within a round, with a bootstrap interval."""
    wide = seconds.pivot_table(index="round", columns="contender", values="seconds")
    ratio = wide.div(wide["hand-written loop"], axis=0)
    draws = np.random.default_rng(0).integers(len(ratio), size=(2000, len(ratio)))
    rows = []
    for name in seconds["contender"].unique():
        medians = np.median(ratio[name].to_numpy()[draws], axis=1)
        low, high = np.quantile(medians, [0.025, 0.975])
        rows.append(
            {
                "contender": name,
                "window ms": 1e3 * wide[name].median(),
                "ratio": ratio[name].median(),
                "ratio low": low,
                "ratio high": high,
            }
        )
    return pd.DataFrame(rows)
