"""What the controller costs: time against the hand-written loop and the peers, memory, and reads by the host.

One window (8 micro-batches of 256, the 80-layer network at width 128, unless the row says another) of every contender
in turn, in one process, again and again; the ratio to the hand-written loop is taken within each round, so that a slow
moment of the machine slows both. Where one window in four is measured, a round is four windows, and their mean counts.
Peers that are not installed are left out (they live in the ``peers`` extra).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from studies.device.timing import median_interval
from studies.questions.overhead.contenders import RANKS_CONTENDERS, Contender, available, baseline
from studies.questions.overhead.settings import SETTINGS

NETWORKS = 4
HOST_READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"}


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
    rows = []
    with one_thread():
        timers = {name: _Timer(one) for name, one in available().items()}
        names = list(timers)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                rows.append({"round": turn, "contender": name, "seconds": timers[name].seconds(turn)})
            report(turn + 1)
    return pd.DataFrame(rows)


class _Timer:
    """A contender with its networks, warm."""

    def __init__(self, contender: Contender) -> None:
        self.setting = SETTINGS[contender.setting]
        self.batches = self.setting.micro_batches()
        self.count = contender.windows * -(-self.setting.repeats // contender.windows)
        self.windows = [contender.make(self.setting.network()) for _ in range(NETWORKS)]
        for window in self.windows:
            # Whole turns of those that measure one in several.
            for _ in range(2 * contender.windows):
                window(self.batches)

    def seconds(self, turn: int) -> float:
        """Of one window in the mean."""
        window, batches = self.windows[turn % NETWORKS], self.batches
        started = time.perf_counter()
        for _ in range(self.count):
            window(batches)
        return (time.perf_counter() - started) / self.count


def measure_cost() -> pd.DataFrame:
    """Host reads and allocated bytes of one window, above its baseline's, for each contender."""
    counts = {}
    with one_thread():
        for name, contender in available().items():
            counts[name] = _cost(contender)
    rows = []
    for name, (reads, total) in counts.items():
        base_reads, base_total = counts[baseline(name)]
        rows.append({"contender": name, "host reads": reads - base_reads, "extra bytes": total - base_total})
    return pd.DataFrame(rows)


def _cost(contender: Contender) -> tuple[float, float]:
    """Host reads and bytes of a window in the mean."""
    setting = SETTINGS[contender.setting]
    window, batches = contender.make(setting.network()), setting.micro_batches()
    if (controller := getattr(window, "controller", None)) is not None:
        # As on a GPU: what the CPU looks at right away waits for the window's one read.
        controller._accumulator.suspicion.reads_now = False
    turn = range(contender.windows)
    # Optimizer state and first-window buffers come with the first window.
    for _ in turn:
        window(batches)
    with HostReads() as reads:
        for _ in turn:
            window(batches)
    with Allocations() as memory:
        for _ in turn:
            window(batches)
    return reads.count / contender.windows, memory.total / contender.windows


def ratios(seconds: pd.DataFrame) -> pd.DataFrame:
    """Median time and median ratio to the contender's own baseline within a round, with a bootstrap interval."""
    wide = seconds.pivot_table(index="round", columns="contender", values="seconds")
    ratio = pd.DataFrame({name: wide[name] / wide[baseline(name)] for name in wide})
    rows = []
    for name in seconds["contender"].unique():
        middle, low, high = median_interval(ratio[name].dropna().to_numpy())
        row = {"contender": name, "window ms": 1e3 * wide[name].median()}
        rows.append(row | {"ratio": middle, "ratio low": low, "ratio high": high})
    return pd.DataFrame(rows)


def measure_ranks_time(rounds: int) -> pd.DataFrame:
    """The rows of :func:`measure_time` for DDP and FSDP2: two gloo processes, one thread each.

    Each rank has the whole window's micro-batches, so that one backward pass is as long as in the other rows.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder, rounds), nprocs=2)
        return pd.read_parquet(f"{folder}/seconds.parquet")


def _rank(rank: int, folder: str, rounds: int) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    rows = []
    with one_thread():
        timers = {name: _Timer(one) for name, one in RANKS_CONTENDERS.items()}
        names = list(timers)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                dist.barrier()
                rows.append({"round": turn, "contender": name, "seconds": timers[name].seconds(turn)})
    if rank == 0:
        pd.DataFrame(rows).to_parquet(f"{folder}/seconds.parquet")
    dist.barrier()
    dist.destroy_process_group()


def all_reduce_seconds(
    ranks: Sequence[int] = (8, 512, 16_384), numbers: int = 16, latency: float = 10e-6, bandwidth: float = 25e9
) -> pd.DataFrame:
    """What a window's one all-reduce costs on paper, by the latency-bandwidth model of collectives.

    A message of ``m`` bytes takes ``alpha + m / beta`` between two ranks. A tree (reduce, then broadcast) takes
    ``T = 2 ceil(log2 W) (alpha + m / beta)``; a ring, which libraries use for large messages only,
    ``2 (W - 1) (alpha + m / (W beta))`` (Thakur, Rabenseifner and Gropp 2005, section 4). The default ``alpha`` and
    ``beta`` are assumptions for a cluster network, not measurements: give your own.

    Args:
        ranks: ``W``.
        numbers: Doubles in the message; the controller sends 16 or 17.
        latency: ``alpha`` [s].
        bandwidth: ``beta`` [bytes / s].

    Example:
        >>> all_reduce_seconds([8]).round(8).to_dict("records")
        [{'ranks': 8, 'tree us': 60.03072, 'ring us': 140.00896}]
    """
    size = 8 * numbers
    rows = []
    for world in ranks:
        tree = 2 * math.ceil(math.log2(world)) * (latency + size / bandwidth)
        ring = 2 * (world - 1) * (latency + size / (world * bandwidth))
        rows.append({"ranks": world, "tree us": 1e6 * tree, "ring us": 1e6 * ring})
    return pd.DataFrame(rows)
