"""Where the time that the controller adds to a window goes: each of its parts on a clock of its own.

===========  ===========================================================================================
hooks        Python's part of a hook on each parameter; that autograd calls it is in the row of empty hooks
norms        of each gradient, and of the mean
norms agree  the first micro-batch's norm is that of ``.grad``, no mean is longer than its parts
untouched    whether somebody else wrote to ``.grad``, thawed, froze or added a parameter
sums         a window's sums on the device, and the division by its weight
backward()   the rest of it: weights, references, the window's state
step()       the rest of it
decision     pooling, estimate, rule
record       the row of the history
===========  ===========================================================================================

What hands out the micro-batches, a generator, is in the loop's part. On a CPU nothing is asynchronous: the seconds
within a function are what it costs, but for what it drives out of the caches. On the 80-layer network most of what is
added is norms, which read every gradient once more. Once one window in four is measured that is a third of it, and the
rest is host work that a layer's weights and activations have driven out of the caches since the micro-batch before:
:meth:`backward` and :meth:`step` do the same for the model of one parameter in a sixth of the time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pandas as pd
import torch

from adaptbatch import BatchController, History
from adaptbatch.accumulate.accumulator import Accumulator
from adaptbatch.measure.norms import NormBuffer
from adaptbatch.measure.probe import GradientProbe
from adaptbatch.measure.sensor import Sensor
from adaptbatch.measure.sums import Sums
from adaptbatch.optimizer.step import Stepper
from adaptbatch.sizing import SizedLoop
from adaptbatch.state import State
from studies.device.timing import median_interval
from studies.questions.overhead.contenders import EVERY, adaptbatch
from studies.questions.overhead.settings import SETTINGS

LOOP = "forward, backward, optimizer"
# What each part is made of; what has no part of its own belongs to the one that calls it.
PARTS: dict[str, tuple[tuple[type, str], ...]] = {
    "hooks": ((GradientProbe, "_hook"),),
    "norms": (
        (NormBuffer, "writer"),
        (NormBuffer, "hold"),
        (Sensor, "sq_norm"),
        (Sensor, "measure_accumulated"),
    ),
    "norms agree": ((Accumulator, "require_first"), (SizedLoop, "_require_consistent")),
    "untouched": (
        (Accumulator, "seal"),
        (Accumulator, "require_untouched"),
        (Accumulator, "require_arrived"),
        (Accumulator, "require_clear"),
        (Accumulator, "applied_sq_norm"),
        (Sensor, "attach"),
        (Sensor, "follow"),
    ),
    "sums": (
        (Sensor, "begin"),
        (Sensor, "take"),
        (Sensor, "keep"),
        (Sums, "unscale"),
        (Sums, "divide"),
        (Accumulator, "divide"),
    ),
    "backward()": ((BatchController, "backward"),),
    "step()": ((BatchController, "step"),),
    "decision": ((State, "advance"),),
    "record": ((History, "append"), (History, "fill")),
    LOOP: ((torch.Tensor, "backward"), (Stepper, "_step")),
}
# They make what is called later, once for each parameter.
MAKERS = {(GradientProbe, "_hook"), (NormBuffer, "writer")}
NETWORKS = ("80 layers", "one parameter, k = 8")


class Clock:
    """Seconds of each part, without those of the parts that it calls.

    Example:
        >>> clock = Clock(LOOP)
        >>> clock.timed("hooks", clock.timed("norms", lambda x: 2 * x))(3)
        6
        >>> sorted(clock.take())
        ['forward, backward, optimizer', 'hooks', 'norms']
    """

    def __init__(self, outermost: str) -> None:
        self._part, self._since = outermost, time.perf_counter()
        self._seconds: Counter[str] = Counter()
        self._own = 0.0
        self._own = self._costs()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose seconds are those of ``part``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            outer = self._enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._enter(outer)
                self._seconds[part] -= self._own

        return call

    def _enter(self, part: str) -> str:
        now, outer = time.perf_counter(), self._part
        self._seconds[outer] += now - self._since
        self._part, self._since = part, now
        return outer

    def _costs(self, calls: int = 20_000) -> float:
        """Seconds of a call that is timed, to be taken off."""
        nothing = self.timed(self._part, lambda: None)
        began = time.perf_counter()
        for _ in range(calls):
            nothing()
        return (time.perf_counter() - began) / calls

    def take(self) -> dict[str, float]:
        """Seconds since the last time."""
        self._enter(self._part)
        found, self._seconds = dict(self._seconds), Counter()
        return found


@contextmanager
def clocked(clock: Clock) -> Iterator[None]:
    """Controllers that are made within have their parts timed."""
    patches = [
        mock.patch.object(owner, name, _timed(clock, part, owner, name))
        for part, functions in PARTS.items()
        for owner, name in functions
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()


def _timed(clock: Clock, part: str, owner: type, name: str) -> Callable[..., Any]:
    function = getattr(owner, name)
    if (owner, name) in MAKERS:
        return lambda *args, **kwargs: clock.timed(part, function(*args, **kwargs))
    return clock.timed(part, function)


def measure(windows: int = 100, networks: Sequence[str] = NETWORKS) -> pd.DataFrame:
    """Microseconds of a window and share of it, by network, share of windows that are measured, and part.

    Medians over windows, with their 95 % bootstrap intervals; of one window in :data:`EVERY` over turns of so many.
    """
    rows: list[dict[str, object]] = []
    for network in networks:
        for listen in (1.0, 1.0 / EVERY):
            found = pd.DataFrame(_windows(network, listen, windows)).fillna(0.0)
            share = found.div(found.sum(axis=1), axis=0)
            for part in PARTS:
                middle, low, high = median_interval(share[part].to_numpy())
                row = {"network": network, "measured": listen, "part": part, "us": 1e6 * found[part].median()}
                rows.append(row | {"share": middle, "low": low, "high": high})
    return pd.DataFrame(rows)


def _windows(network: str, listen: float, windows: int) -> Iterator[dict[str, float]]:
    setting, turn = SETTINGS[network], round(1.0 / listen)
    batches, clock = setting.micro_batches(), Clock(LOOP)
    with clocked(clock):
        window = adaptbatch(setting.network(), steps=len(batches), listen=listen)
        # Its first windows are checked whole.
        for _ in range(4 * EVERY):
            window(batches)
        clock.take()
        for _ in range(windows):
            # All that differ.
            for _ in range(turn):
                window(batches)
            yield {part: seconds / turn for part, seconds in clock.take().items()}
