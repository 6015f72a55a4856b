"""A loop whose windows a rule sizes: what is known, the limits, what is recorded, and what ranks tell each other."""

from __future__ import annotations

import math
import time
import zlib
from typing import Any

from adaptbatch.accumulate.ranks import require_agreement, require_one_mean
from adaptbatch.estimate.listening import Listen
from adaptbatch.loop import WindowLoop
from adaptbatch.measure.result import PendingResult
from adaptbatch.optimizer.learning_rate import Adjustment
from adaptbatch.optimizer.second_moment import applied_beta2
from adaptbatch.records import Decision, WindowCounts
from adaptbatch.reporting.history import History, decision_row
from adaptbatch.rules import Guard, Limits, Rule
from adaptbatch.state import State

# Windows between two measurements of how much the ranks' data differ, each of which costs one more norm.
SHARDS_EVERY = 16
_SECONDS = ("step_seconds", "seconds")


class SizedLoop(WindowLoop):
    """Pools what finished windows said, has the rule decide on it, and keeps account.

    Made by :class:`~adaptbatch.BatchController`, whose arguments these are.
    """

    rule: Rule
    guard: Guard | None
    history: History
    _listen: Listen
    _limits: Limits
    _state: State
    _decision: Decision
    _by_example: bool
    # Whether a window is seen before its step, and a step left out where its gradients are not finite.
    _reads_first: bool
    _skips_nonfinite: bool
    _skips_in_a_row: int
    # On a GPU without the check before the step, nothing may wait for this window's numbers.
    _read_late: bool
    _late: PendingResult | None
    _seconds: tuple[float, ...]
    _shared: dict[str, float]
    _started: float
    _ended: float

    # --- the size of a window -----------------------------------------------------------------------------------------

    @property
    def accumulation_steps(self) -> int:
        """``k`` of the window that is open or comes next."""
        return self._state.progress.accumulation_steps

    @property
    def examples_seen(self) -> float:
        """Sum of all weights in finished windows, on all ranks, skipped ones included."""
        return self._state.progress.examples_seen

    @property
    def limits(self) -> Limits:
        """Bounds on ``k``, resolved for the rule and the ranks; assign others to change them under way.

        Every decision from now on keeps within the new ones. A window that is open keeps its ``k``. Between windows the
        size of the next one is brought within them at once; where they leave more room, it is taken decision by
        decision. They are no part of the state: a checkpoint is brought within those of the controller that loads it.
        On several ranks all assign the same, after the same step.

        Raises:
            ValueError: If they do not fit the rule; those before stay.
        """
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limits = self._resolved(limits)
        self._keep_within_limits()

    def _resolved(self, limits: Limits) -> Limits:
        if not isinstance(limits, Limits):
            raise ValueError(f"limits must be a Limits, got {limits!r}; Limits(max_steps=64) allows up to 64 steps.")
        return limits.resolve(self.rule, world_size=self._ranks.world_size, by_example=self._by_example)

    def _keep_within_limits(self) -> None:
        """Between windows; a scope that waits for its backward has decided already whether it synchronises."""
        if not (self._window.micro_batches or self._window.broken or self._stream.used is False):
            self._state, self._decision = self._state.limited(self._decision, self._limits)

    @property
    def _known_weight(self) -> float:
        return self._state.progress.micro_batch_examples

    @property
    def _turn(self) -> int:
        return self._state.progress.window

    @property
    def _listens(self) -> bool:
        return self._state.progress.listens

    @property
    def _measures_shards(self) -> bool:
        return self._turn % SHARDS_EVERY == 0

    # --- the end of a window ------------------------------------------------------------------------------------------

    def _pending(self) -> PendingResult:
        """The due window's numbers, on their way."""
        window = self._window
        full = window.all_micro_batches == self.accumulation_steps * self._ranks.world_size
        lr = self.optimizer.param_groups[0]["lr"]
        return PendingResult.of(self._sensor.sums, window, lr, window.micro_batches if full else 0)

    def _skips(self, pending: PendingResult) -> bool:
        """Whether the step is left out: its gradients are not finite, or the guard says so."""
        skips = False
        if self._reads_first:
            self._require_consistent(pending)
        if self._reads_first and not pending.result.measurement.finite:
            # Norms above 1e19 overflow in float32 though the gradient is finite: such a step is taken, not measured.
            skips = not self._finite_everywhere() and (self._skips_nonfinite or self.guard is not None)
        elif self.guard is not None:
            measured = self._state.comparable(pending.result)
            level = self._state.typical.level
            skips = measured is not None and self.guard.skips(measured, level, self._skips_in_a_row)
        self._skips_in_a_row = self._skips_in_a_row + 1 if skips else 0
        return skips

    def _require_consistent(self, pending: PendingResult) -> None:
        """No mean is longer than the root mean square of its parts; and a single part is the mean."""
        if pending.suspect:
            raise RuntimeError(_SUSPECT)
        measured = pending.result.measurement
        margin = self._accumulator.rounding(pending.micro_batches)
        if measured.finite and measured.batch_sq_norm > (1.0 + margin) * measured.mean_sq_norm:
            raise RuntimeError(_INCONSISTENT)

    def _take_step(self) -> Adjustment:
        """The optimizer's step, for the batch as it was decided: a partial window's is no smaller."""
        at, window = self._state.progress, self._window
        known = at.micro_batch_examples
        each = window.weight / window.all_micro_batches if math.isnan(known) else known
        return self._stepper.step(at.accumulation_steps * each * at.world_size, self._state.pooled, at.population)

    def _finish(self, pending: PendingResult, applied: Adjustment, skipped: bool, began: float) -> Decision:
        """Count, pool, decide, record: floats only from here on."""
        window, now = self._window, time.perf_counter()
        self._accumulator.close()
        pending.lr_factor = applied.lr_factor
        seconds = self._timed(now - began, began - self._ended)
        self._ended = now
        arrived = [one for one in (self._late, pending) if one is not None]
        # The newest window stays behind until the next one ends where nothing may wait for it.
        self._late = arrived.pop() if self._read_late else None
        self._optimizer_step += not skipped
        counts = WindowCounts(window.weight, window.all_micro_batches, window.largest, window.ended, *seconds)
        results = [one.result for one in arrived]
        self._state, evidence, self._decision = self._state.advance(
            counts, results, self.rule, self.limits, self.guard, self._listen
        )
        row = decision_row(self._state, evidence, self._decision, window.weight)
        row |= self._account(applied, skipped) | {"accumulation_steps": window.micro_batches}
        self.history.append(row)
        pending.row = len(self.history) - 1
        for one in arrived:
            self.history.fill(one, self._state.progress.population)
        if not self._reads_first:
            # Too late to hold the step back, not too late to say so.
            for one in arrived:
                self._require_consistent(one)
        return self._decision

    def _account(self, applied: Adjustment, skipped: bool) -> dict[str, Any]:
        """The part of a row that is known without any measurement."""
        return {
            "optimizer_step": self._optimizer_step,
            "backward_passes": self._backward_passes,
            "wall_seconds": time.perf_counter() - self._started,
            "lr_factor": applied.lr_factor,
            "beta2": applied_beta2(self.optimizer, applied),
            "second_moment_factor": applied.second_moment_factor,
            "skipped": skipped,
        }

    def _settle(self) -> None:
        if self._late is not None:
            self.history.fill(self._late, self._state.progress.population)

    # --- several ranks ------------------------------------------------------------------------------------------------

    def _share_sums(self) -> None:
        window, sums, note = self._window, self._sensor.sums, self._note()
        spread = {"sq_batch": sums["batch"].square()}
        self._shared = self._ranks.sum({**window.own(), "cells": sums.cells, **sums, **spread, **note})
        window.share(self._shared, self._ranks.world_size)
        sums.share(self._shared)
        # Where DDP holds it whole, each rank's part is of the same mean.
        if not self._ranks.sharded:
            require_one_mean(self._ranks, self._shared["batch"], self._shared["sq_batch"])
        require_agreement(self._ranks, note, self._shared)
        if self._shared["more"] < self._ranks.world_size:
            self._stream.end()

    def _note(self) -> dict[str, float]:
        """What the ranks tell each other beside the sums: whether they go on, how long they took, that they agree."""
        k, decision = self.accumulation_steps, self._decision
        digest = zlib.crc32(repr((k, decision.target_batch, decision.reason, self.examples_seen)).encode())
        note = {"steps": k, "sq_steps": k**2, "digest": digest, "more": not self._stream.last}
        return {name: float(value) for name, value in note.items()} | dict(zip(_SECONDS, self._seconds, strict=True))

    def _timed(self, step: float, rest: float) -> tuple[float, ...]:
        """Seconds of the step and of the rest: of several ranks their mean, as they told it one window later."""
        self._seconds = (step, rest)
        if not self._ranks.several:
            return self._seconds
        return tuple(self._shared[name] / self._ranks.world_size for name in _SECONDS)


_SUSPECT = (
    "the window's gradients are not those that were measured: something adds to .grad or changes it beside the losses "
    "(zero_grad(), clipping or a write through .data within the window, a hook on accumulated gradients). Leave it "
    "out, or do it once step_due is true; discard_window() goes on without this window."
)
_INCONSISTENT = (
    "the window's mean gradient is longer than its micro-batches' gradients allow: something adds to .grad or changes "
    "it beside the losses that were measured (another loss, a penalty, a hook). Put it into the loss, or change "
    ".grad once step_due is true; discard_window() goes on without this window."
)
