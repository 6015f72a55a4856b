r"""A learning rate schedule that ends on the budget, whatever the batch did on the way.

A scheduler that is stepped once an optimizer step is planned for a number of steps that nobody knows when the batch
varies: a cosine of 100 steps, run at ``k = 4``, stops after 25 at 85 % of its learning rate. Planned and stepped in
examples it ends where it should. What else is set per step, and so means something else when a step holds ``n``
examples in place of the ``n0`` it was chosen for:

* A moving average of the weights, ``decay`` per step, looks back ``n / n0`` times as far. ``decay ** (n / n0)`` keeps
  its horizon in examples:

  >>> round(0.999 ** (512 / 32), 3)
  0.984

* Decoupled weight decay (AdamW) multiplies the weights by ``1 - lr * weight_decay`` per step, that is by
  ``(1 - lr * weight_decay) ** (1 / n)`` per example. Over 64,000 examples, at 32 and at 512 a step:

  >>> round((1 - 1e-4) ** (64_000 / 32), 3), round((1 - 1e-4) ** (64_000 / 512), 3)
  (0.819, 0.988)

  ``weight_decay * n / n0`` keeps it per example, to first order in ``lr * weight_decay``.
* Adam's moments remember ``1 / (1 - beta)`` steps, whatever these hold. ``LearningRate(beta2="half-life")`` keeps the
  second one's memory in examples; nothing here touches ``beta1``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, OneCycleLR, ReduceLROnPlateau

from adaptbatch.schema import require_keys

STATE_VERSION = 1

# examples_seen is a sum of floats and unit often a quotient: an exact multiple may come out a rounding error short.
_SLACK = 1e-9


class ScheduleDriver:
    """Steps a learning rate scheduler in examples: ``floor(examples_seen / unit)`` calls so far, whatever the windows.

    Plan the scheduler for ``budget / unit`` calls, with any number of examples as the ``unit``: the micro-batch, or the
    batch that the schedule was made for. After the same examples the learning rate is then that of a plain loop with
    one call a ``unit``, to the last bit; every window has the rate of its beginning. What is left of a ``unit`` counts
    with the next window. A window that was skipped counts too: its examples are spent.

    The count is the scheduler's own (``last_epoch``), so its checkpoint holds all there is, and a call made elsewhere
    is not made again.

    When it is wrong: with a ``unit`` of one example a large window makes thousands of calls, microseconds each.

    Args:
        scheduler: Any torch scheduler that is stepped without arguments; it is stepped here and nowhere else.
        unit: Examples for one call, in the unit of the weights; ``budget / calls`` need not be whole.
        total_steps: Calls after which the scheduler rests. None: the total of a ``OneCycleLR``, which would raise on
            the next call, and no bound for others. ``CosineAnnealingLR`` climbs again after its ``T_max``: give that.

    Raises:
        TypeError: If ``scheduler`` is not a torch scheduler, or is ``ReduceLROnPlateau``.
        ValueError: If ``unit`` or ``total_steps`` is out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> budget, unit = 12_800, 32
        >>> scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=budget // unit)
        >>> driver = ScheduleDriver(scheduler, unit=unit)
        >>> optimizer.step()  # a window of 6,410 examples
        >>> driver.advance_to(6_410)
        >>> driver.steps, round(optimizer.param_groups[0]["lr"], 3)
        (200, 0.55)
    """

    def __init__(self, scheduler: LRScheduler, *, unit: float, total_steps: int | None = None) -> None:
        _require_scheduler(scheduler)
        if not 0.0 < unit < math.inf:
            raise ValueError(f"unit must be positive and finite, got unit = {unit!r}; the micro-batch is one choice.")
        self.scheduler = scheduler
        self.unit = float(unit)
        self.total_steps = _total_steps(scheduler, total_steps)

    @property
    def steps(self) -> int:
        """Calls so far."""
        scheduler = self.scheduler
        while isinstance(scheduler, ChainedScheduler):  # it keeps no count; those in it are stepped together
            scheduler = scheduler._schedulers[0]
        return scheduler.last_epoch

    def advance_to(self, examples_seen: float) -> None:
        """Make the calls that are due, right after the controller's ``step()``: ``controller.examples_seen``.

        A call is due a billionth of ``examples_seen`` before its multiple of ``unit``: rounding must not delay it.

        Args:
            examples_seen: Examples since the start of training [examples].

        Raises:
            ValueError: If ``examples_seen`` is negative or not finite, or the scheduler is further than that.
        """
        if not 0.0 <= examples_seen < math.inf:
            raise ValueError(f"examples_seen must be finite and not negative, got examples_seen = {examples_seen!r}.")
        due = math.floor(examples_seen / self.unit * (1.0 + _SLACK))
        due = due if self.total_steps is None else min(due, self.total_steps)
        if self.steps > due:
            raise ValueError(
                f"examples_seen must not fall behind the scheduler, got examples_seen = {examples_seen!r}, worth {due} "
                f"calls at unit = {self.unit!r}, after {self.steps} calls; call scheduler.step() nowhere else, keep "
                f"unit for the whole training, and add the examples of an earlier stage to examples_seen."
            )
        with self._no_step_expected():
            for _ in range(due - self.steps):
                self.scheduler.step()

    @contextmanager
    def _no_step_expected(self) -> Iterator[None]:
        """Where all windows so far were skipped, the scheduler is right to go before the optimizer's first step."""
        # Entered only then: catch_warnings makes Python repeat every warning that it shows once.
        if getattr(self.scheduler.optimizer, "_opt_called", False):
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before", UserWarning)
            yield

    def state_dict(self) -> dict[str, Any]:
        """What a resumed driver must agree with, in plain numbers; the schedule itself is in the scheduler's state."""
        return {"version": STATE_VERSION, "unit": self.unit, "total_steps": self.total_steps, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that this driver goes on where :meth:`state_dict` was taken; call it after the scheduler's own.

        Raises:
            ValueError: If a key is unknown or missing, or a value differs from this driver's.
        """
        own = self.state_dict()
        require_keys("state", state, own)
        for name, way_out in _WAYS_OUT.items():
            if state[name] != own[name]:
                raise ValueError(f"state[{name!r}] must be {own[name]!r}, got {state[name]!r}; {way_out}.")


_WAYS_OUT = {
    "version": "it was saved by another release of adaptbatch, load it with that one",
    "unit": "make the driver with the unit that it was saved with, whatever the micro-batch is now",
    "total_steps": "make the driver and its scheduler with the total that they were saved with",
    "steps": "load the scheduler's own state first",
}


def _require_scheduler(scheduler: LRScheduler) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            "scheduler must be stepped without arguments, got ReduceLROnPlateau, which counts validations and no "
            "examples; call its step(metric) after each validation, without a driver."
        )
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(
            f"scheduler must be a torch.optim.lr_scheduler.LRScheduler, got {type(scheduler).__name__}; of a wrapped "
            f"one (accelerate) pass the scheduler inside."
        )


def _total_steps(scheduler: LRScheduler, wanted: int | None) -> int | None:
    own = scheduler.total_steps if isinstance(scheduler, OneCycleLR) else None
    if wanted is None:
        return own
    if wanted < 1 or wanted != int(wanted) or (own is not None and wanted > own):
        bound = "" if own is None else f", and at most the {own} of OneCycleLR"
        raise ValueError(
            f"total_steps must be a whole number of at least 1{bound}, got total_steps = {wanted!r}; None: the "
            f"scheduler's own, or no bound."
        )
    return int(wanted)
