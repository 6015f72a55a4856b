"""A controller's state as a checkpoint, and back: everything that its next decision and its open window depend on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Annotated, Any

from adaptbatch.accumulate.window import Window
from adaptbatch.measure.result import PendingResult
from adaptbatch.measure.sums import SavedWindow, Sums
from adaptbatch.optimizer.learning_rate import Adjustment
from adaptbatch.records import Decision, WindowResult
from adaptbatch.schema import Count, Sum, refuse, require_keys, restored, saved, shown, whole
from adaptbatch.state import State

if TYPE_CHECKING:
    from adaptbatch.controller import BatchController

STATE_VERSION = 8


@dataclass(frozen=True)
class Checkpoint:
    """What :meth:`~adaptbatch.controller.BatchController.state_dict` holds."""

    version: Annotated[int, whole(STATE_VERSION)]
    optimizer_step: Count
    backward_passes: Count
    wall_seconds: Sum
    skips_in_a_row: Count
    loop: State
    # The words of a rule of one's own are its own.
    decision: Decision
    adjustment: Adjustment
    late_window: WindowResult | None
    window: Window | None
    sensor: SavedWindow

    @staticmethod
    def require_whole(name: str, saved: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless its parts are of one moment."""
        decided, k = saved["decision"]["accumulation_steps"], saved["loop"]["progress"]["accumulation_steps"]
        if k != decided:
            expected = f"be {name}['decision']['accumulation_steps'] = {decided!r}"
            refuse(f"{name}['loop']['progress']['accumulation_steps']", expected, k)
        window, sensor = saved["window"], saved["sensor"]
        for part in ("gradients", "sums"):
            if (sensor[part] is None) != (window is None):
                none = window is None
                expected = "None, as state['window'] is" if none else "of the micro-batches of state['window']"
                refuse(f"{name}['sensor'][{part!r}]", f"be {expected}", sensor[part])
        count = 0 if window is None else window["micro_batches"]
        for part, kept in (sensor["kept"] or {}).items():
            if len(kept) != count:
                expected = f"hold one for each of the {count} micro-batches, {name}['window']['micro_batches']"
                refuse(f"{name}['sensor']['kept'][{part!r}]", expected, kept)
        if window is not None:
            _require_sums(name, window, sensor, saved["loop"]["progress"]["listens"])


def _require_sums(name: str, window: Mapping[str, Any], sensor: Mapping[str, Any], listens: bool) -> None:
    """Of a due window the sums hold what was measured of its mean."""
    sums, due = sensor["sums"], window["due"]
    if ("batch" in sums) != due:
        expected = f"hold 'batch' where {name}['window']['due'] is True, and only there"
        refuse(f"{name}['sensor']['sums']", expected, sorted(sums))
    if "weighted" in sums and not listens:
        expected = f"hold no 'weighted' where {name}['loop']['progress']['listens'] is False"
        refuse(f"{name}['sensor']['sums']", expected, sorted(sums))
    needed = (
        {"loss_sum"}
        | ({"weighted"} if listens else set())
        | ({"metric_batch"} if due and "metric_weighted" in sums else set())
    )
    require_keys(f"{name}['sensor']['sums']", sums, needed | sums.keys())
    if sensor["cells"] < window["micro_batches"]:
        expected = f"be at least {name}['window']['micro_batches'] = {window['micro_batches']!r}"
        refuse(f"{name}['sensor']['cells']", expected, sensor["cells"])


def take(controller: BatchController) -> dict[str, Any]:
    """See :meth:`~adaptbatch.controller.BatchController.state_dict`."""
    c = controller
    c._require_resumable("state_dict()")
    if c._window.micro_batches:
        c._require_open()
    c._restore()
    is_open = c._window.micro_batches > 0
    if is_open and not c._window.due:
        c._accumulator.require_untouched("state_dict()")
    sums = c._sensor.sums
    measured = {
        "gradients": c._accumulator.copies(),
        "sums": sums.copies() if is_open else None,
        "cells": sums.cells if is_open else 0,
        **c._sensor.state_dict(),
    }
    return {
        "version": STATE_VERSION,
        "optimizer_step": c._optimizer_step,
        "backward_passes": c._backward_passes,
        "wall_seconds": time.perf_counter() - c._started,
        "skips_in_a_row": c._skips_in_a_row,
        "loop": saved(c._state),
        "decision": saved(c._decision),
        "adjustment": saved(c._stepper.applied),
        "late_window": None if c._late is None else saved(c._late.result),
        "window": saved(c._window) if is_open else None,
        "sensor": measured,
    }


def put(controller: BatchController, state: Any) -> None:
    """See :meth:`~adaptbatch.controller.BatchController.load_state_dict`."""
    c = controller
    c._require_open()
    c._require_between_windows("load_state_dict()")
    _require_version(state)
    found = restored(Checkpoint, state)
    _require_fit(c, found.sensor)
    if found.window is not None and c._ranks.several:
        raise ValueError(
            f"state must be of between windows for several ranks, got one with {found.window.micro_batches} "
            f"micro-batches of an open window; save it right after step()."
        )
    # What the data set is and how it is measured belongs to this controller, not to the checkpoint.
    at, state = c._state.progress, found.loop if c._sensor.metric == "adam" else found.loop.euclidean()
    progress = replace(
        found.loop.progress, population=at.population, by_example=at.by_example, world_size=at.world_size
    )
    c._state = replace(state, progress=progress)
    c._decision, c._stepper.applied = found.decision, found.adjustment
    c._optimizer_step, c._backward_passes = found.optimizer_step, found.backward_passes
    c._skips_in_a_row = found.skips_in_a_row
    c._started = time.perf_counter() - found.wall_seconds
    c._ended = time.perf_counter()
    c._late = None if found.late_window is None else PendingResult.restored(found.late_window)
    _put_window(c, found)
    # Rows of windows that come again go.
    window = c._state.progress.window
    c._first_row = window - c.history.cut(window - c._first_row)
    c._keep_within_limits()


def _put_window(controller: BatchController, found: Checkpoint) -> None:
    """The open window; its gradients wait until model and optimizer are loaded as well."""
    c, device = controller, controller._accumulator.parameters()[0].device
    c._sensor.forget()
    c._restored = found.sensor
    if found.window is None:
        c._accumulator.close()
        return
    window, sums = found.window, found.sensor.sums
    window.scale = None if window.scale is None else window.scale.to(device)
    c._accumulator.window = window
    c._sensor.sums = Sums({name: value.to(device, copy=True) for name, value in sums.items()}, found.sensor.cells)
    if not window.due:
        c._guard_window()


def _require_version(state: Any) -> None:
    if not isinstance(state, Mapping):
        refuse("state", "be a mapping", state)
    version = state.get("version")
    if isinstance(version, bool) or not isinstance(version, Integral) or version != STATE_VERSION:
        raise ValueError(
            f"state must have version {STATE_VERSION}, got version = {shown(version)}; it was saved by another "
            f"release of adaptbatch, load it with that one."
        )


def _require_fit(controller: BatchController, sensor: SavedWindow) -> None:
    """Refuse the gradients of an open window of another model; hooks nothing, and changes nothing.

    Raises:
        ValueError: If they are not of the parameters that are trained now.
    """
    own = [tuple(p.shape) for p in controller._accumulator.parameters()]
    groups = {} if sensor.gradients is None else {"['gradients']": sensor.gradients}
    if sensor.kept is not None:
        groups |= {f"['kept']['sums'][{index}]": sums for index, sums in enumerate(sensor.kept.sums)}
    for name, gradients in groups.items():
        shapes = [None if g is None else tuple(g.shape) for g in gradients]
        if len(shapes) != len(own) or any(s not in (None, mine) for s, mine in zip(shapes, own, strict=True)):
            raise ValueError(
                f"state['sensor']{name} must be of the {len(own)} parameters that are trained here, of shapes {own}, "
                f"got shapes {shapes}; load the state into the model that it was saved with."
            )
