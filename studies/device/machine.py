"""The device at hand: which it is, whether it still answers, and how long something takes on it."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import adaptbatch


def prepare(device: str | None) -> str:
    """The device, initialised.

    Args:
        device: ``"cuda"`` or ``"cpu"``; None: a GPU if there is one.

    Raises:
        RuntimeError: If there is none of that kind.
    """
    found = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if found == "cuda":
        torch.cuda.init()
        torch.ones(8, 8, device=found).mm(torch.ones(8, 8, device=found)).sum().item()
    # Images of some vendors turn TF32 on by an environment variable.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(1)
    return found


def stamp(device: str) -> dict[str, str]:
    """What every row says of the device and the versions."""
    name = f"CPU, {platform.machine()}"
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return {"device": name, "torch": str(torch.__version__), "adaptbatch": adaptbatch.__version__}


def healthy(device: str) -> bool:
    """Whether the device still runs kernels in this process, which ends with some errors."""
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


def synchronize(device: str) -> None:
    """Wait for all that was launched."""
    if device == "cuda":
        torch.cuda.synchronize()


class Stopwatch:
    """Seconds of what is done inside: on a GPU between two events, on a CPU by the clock.

    Example:
        >>> watch = Stopwatch("cpu")
        >>> with watch:
        ...     time.sleep(0.001)
        >>> watch.seconds >= 0.001
        True
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        synchronize(self._device)
        if self._device == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._started
        if self._device == "cuda":
            self._events[1].record()
            self._events[1].synchronize()
            self.seconds = self._events[0].elapsed_time(self._events[1]) / 1e3


@contextmanager
def deterministic() -> Iterator[None]:
    """Only kernels that give the same bits twice."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
