"""What a checkpoint holds: every key, and what it may be, checked whole before anything of it is used. No torch.

A check is a function of a name and a value that raises ``ValueError`` by that name. The tables below are the format.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

STATE_VERSION = 6

Check = Callable[[str, Any], None]


def require_state(state: Any) -> None:
    """Refuse what no :meth:`~adaptbatch.controller.BatchController.state_dict` can be.

    Raises:
        ValueError: If the version, a key at any depth, a value, or two values together are wrong; it names the place.
    """
    if not isinstance(state, Mapping):
        _refuse("state", "be a mapping", state)
    version = state.get("version")
    if isinstance(version, bool) or not isinstance(version, Integral) or version != STATE_VERSION:
        raise ValueError(
            f"state must have version {STATE_VERSION}, got version = {_shown(version)}; it was saved by another "
            f"release of adaptbatch, load it with that one."
        )
    _STATE("state", state)
    decided, k = state["decision"]["accumulation_steps"], state["loop"]["progress"]["accumulation_steps"]
    if k != decided:
        expected = f"be state['decision']['accumulation_steps'] = {decided!r}"
        _refuse("state['loop']['progress']['accumulation_steps']", expected, k)
    _require_whole_window(state["window"], state["sensor"])


def require_loop(name: str, state: Any) -> None:
    """The same for the state of a :class:`~adaptbatch.state.Loop`, which is called ``name``."""
    _LOOP(name, state)
    seen = state["progress"]["examples_seen"]
    if state["changed_at"] > seen:
        expected = f"be at most {name}['progress']['examples_seen'] = {seen!r}"
        _refuse(f"{name}['changed_at']", expected, state["changed_at"])


def require_keys(name: str, given: Any, expected: Iterable[str]) -> None:
    """Refuse what is no mapping with exactly the ``expected`` keys, by name."""
    if not isinstance(given, Mapping):
        _refuse(name, "be a mapping", given)
    expected = set(expected)
    unknown, missing = sorted(given.keys() - expected, key=str), sorted(expected - given.keys())
    if unknown or missing:
        raise ValueError(f"{name} must have exactly the known keys, got unknown {unknown} and missing {missing}.")


def _require_whole_window(window: Mapping[str, Any] | None, sensor: Mapping[str, Any]) -> None:
    """An open window is its sums and its gradients, of as many micro-batches."""
    cells = 0 if window is None else window["cells"]
    if (sensor["gradients"] is None) != (window is None):
        expected = "None, as state['window'] is" if window is None else "of the micro-batches of state['window']"
        _refuse("state['sensor']['gradients']", f"be {expected}", sensor["gradients"])
    for name, kept in (sensor["kept"] or {}).items():
        if len(kept) != cells:
            expected = f"hold one for each of the {cells} micro-batches, state['window']['cells']"
            _refuse(f"state['sensor']['kept'][{name!r}]", expected, kept)
    if window is None:
        return
    if window["due"] != ("batch" in (window["measured"] or ())) or (window["measured"] is None) == window["due"]:
        expected = "hold 'batch' where state['window']['due'] is True, and be None elsewhere"
        _refuse("state['window']['measured']", expected, window["measured"])
    if window["all_cells"] != cells:
        _refuse("state['window']['all_cells']", f"be state['window']['cells'] = {cells!r}", window["all_cells"])
    if window["largest"] > window["weight"]:
        expected = f"be at most state['window']['weight'] = {window['weight']!r}"
        _refuse("state['window']['largest']", expected, window["largest"])


def _require_moments(name: str, value: Any) -> None:
    _MOMENTS(name, value)
    if (value["weight"] > 0.0) != (value["weight_sq"] > 0.0):
        _refuse(f"{name}['weight_sq']", f"be above 0 where {name}['weight'] is", value["weight_sq"])


def _require_late(name: str, value: Any) -> None:
    """A finished window that was not pooled yet: its numbers, and what they are called."""
    _LATE(name, value)
    names, numbers = value["names"], value["numbers"]
    needed = {"weighted", "batch", "loss_sum"}
    needed |= {"metric_weighted", "metric_batch"} if "metric_weighted" in names else set()
    if not needed <= set(names) or len(set(names)) < len(names):
        _refuse(f"{name}['names']", f"be different and hold {sorted(needed)}", names)
    if value["lr"] is None and "lr" not in names:
        _refuse(f"{name}['lr']", f"be a number where {name}['names'] holds no 'lr'", None)
    if len(numbers) != len(names) + 2:
        _refuse(f"{name}['numbers']", f"hold 2 numbers and one for each of the {len(names)} names", numbers)
    _POSITIVE(f"{name}['numbers'][0]", numbers[0])
    _PIECES(f"{name}['numbers'][1]", numbers[1])


# --- checks -----------------------------------------------------------------------------------------------------------


def _refuse(name: str, expected: str, value: Any) -> None:
    raise ValueError(f"{name} must {expected}, got {_shown(value)}; load a state as state_dict() returned it.")


def _shown(value: Any) -> str:
    if hasattr(value, "is_floating_point"):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return reprlib.repr(value)


def _number(expected: str, fits: Callable[[float], bool]) -> Check:
    def check(name: str, value: Any) -> None:
        try:
            good = isinstance(value, Real) and not isinstance(value, bool) and fits(float(value))
        except OverflowError:
            good = False
        if not good:
            _refuse(name, expected, value)

    return check


def _whole(least: int) -> Check:
    def check(name: str, value: Any) -> None:
        # The history's columns are of 64 bits.
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) < 2**62:
            _refuse(name, f"be a whole number of at least {least}, below 2^62", value)

    return check


def _a(kind: type, expected: str) -> Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, kind):
            _refuse(name, expected, value)

    return check


def _tensor(scalar: bool) -> Check:
    """Known by what it can do: this room does not import torch."""

    def check(name: str, value: Any) -> None:
        is_one = hasattr(value, "is_floating_point") and value.is_floating_point() and not value.is_meta
        if not is_one or (scalar and value.dim() != 0):
            _refuse(name, f"be a {'scalar ' if scalar else ''}floating-point tensor", value)

    return check


def _none_or(known: Check) -> Check:
    def check(name: str, value: Any) -> None:
        if value is not None:
            known(name, value)

    return check


def _each(item: Check) -> Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, (list, tuple)):
            _refuse(name, "be a list", value)
        for index, one in enumerate(value):
            item(f"{name}[{index}]", one)

    return check


def _row(expected: str, *items: Check, or_empty: bool = False) -> Check:
    """A list of as many."""

    def check(name: str, value: Any) -> None:
        fits = isinstance(value, (list, tuple)) and (len(value) == len(items) or (or_empty and not value))
        if not fits:
            _refuse(name, expected, value)
        for index, one in enumerate(value):
            items[index](f"{name}[{index}]", one)

    return check


def _keys(**known: Check) -> Check:
    def check(name: str, value: Any) -> None:
        require_keys(name, value, known)
        for key, one in known.items():
            one(f"{name}[{key!r}]", value[key])

    return check


# --- the format -------------------------------------------------------------------------------------------------------

_NUMBER = _number("be a number", lambda x: True)
_FINITE = _number("be a finite number", math.isfinite)
_POSITIVE = _number("be a positive, finite number", lambda x: 0.0 < x < math.inf)
_POSITIVE_OR_NAN = _number("be a positive, finite number or NaN", lambda x: not x <= 0.0 and x != math.inf)
_SUM = _number("be a finite number of at least 0", lambda x: 0.0 <= x < math.inf)
# Squares of large gradients overflow in a run that diverged, and its checkpoint must load.
_SQUARE = _number("be a number of at least 0, or NaN", lambda x: not x < 0.0)
_EXAMPLES = _number("be a number of at least 0", lambda x: x >= 0.0)
_TURN = _number("be a finite number or -inf", lambda x: x < math.inf)
_PIECES = _number("be a whole number of at least 1", lambda x: x >= 1.0 and x == math.floor(x))
_FLAG = _a(bool, "be True or False")
_TEXT = _a(str, "be a text")
_SCALAR, _GRADIENTS = _tensor(scalar=True), _each(_none_or(_tensor(scalar=False)))


def _require_measured(name: str, value: Any) -> None:
    """Scalars by the names of what a window may measure."""
    if not isinstance(value, Mapping):
        _refuse(name, "be a mapping", value)
    for key, scalar in value.items():
        if key not in _MEASURED:
            _refuse(name, f"have keys of {sorted(_MEASURED)}", key)
        _SCALAR(f"{name}[{key!r}]", scalar)


_MEASURED = {"batch", "metric_batch", "radial_sq_norms", "consecutive_product", "rank_sq_norms", "suspect"}
_MOMENTS = _keys(
    weight=_SUM,
    weight_sq=_SUM,
    trace_mean=_FINITE,
    signal_mean=_FINITE,
    trace_trace=_SQUARE,
    trace_signal=_NUMBER,
    signal_signal=_SQUARE,
    lag_trace_trace=_NUMBER,
    lag_trace_signal=_NUMBER,
    lag_signal_signal=_NUMBER,
    last_trace=_NUMBER,
    last_signal=_NUMBER,
)
_LOOP = _keys(
    progress=_keys(
        window=_whole(0),
        examples_seen=_SUM,
        accumulation_steps=_whole(1),
        cell_examples=_POSITIVE_OR_NAN,
        world_size=_whole(1),
        examples_since_change=_EXAMPLES,
        population=_number("be a number of at least 1", lambda x: x >= 1.0),
        finite=_FLAG,
        by_example=_FLAG,
    ),
    cells_known=_SUM,
    unequal=_number("be 0, 1 or 2", lambda x: x in (0, 1, 2)),
    pooled=_require_moments,
    metric=_require_moments,
    products=_require_moments,
    typical=_keys(
        pooled=_require_moments,
        recent=_each(_SUM),
        trace_sum=_SQUARE,
        cut_sum=_SQUARE,
        excess=_SQUARE,
        episode_batch=_POSITIVE_OR_NAN,
        episode_examples=_EXAMPLES,
    ),
    # steps, batch, windows; the means of both moments, over all and over the last windows
    climb=_keys(rungs=_each(_row("hold the 7 numbers of a rung", *[_POSITIVE] * 3, *[_FINITE] * 4))),
    shards=_keys(between=_FINITE, between_df=_SUM, within=_FINITE, within_df=_SUM),
    window=_row(
        "hold the 7 numbers of a Measurement or none",
        *(_SUM, _SUM, _POSITIVE, _whole(1), _SQUARE, _NUMBER, _SQUARE),
        or_empty=True,
    ),
    changed_at=_TURN,
    loss_sum=_NUMBER,
    loss_weight=_SUM,
    lr=_NUMBER,
    seconds_each=_row("hold 4 numbers", *[_SUM] * 4),
)
_LATE = _keys(names=_each(_TEXT), numbers=_each(_NUMBER), lr=_none_or(_NUMBER), lr_factor=_POSITIVE, steps=_whole(0))
_STATE = _keys(
    version=_whole(STATE_VERSION),
    optimizer_step=_whole(0),
    backward_passes=_whole(0),
    wall_seconds=_SUM,
    skips_in_a_row=_whole(0),
    loop=require_loop,
    # The words of a rule of one's own are its own.
    decision=_keys(accumulation_steps=_whole(1), target_batch=_NUMBER, reason=_TEXT),
    adjustment=_keys(
        lr_factor=_POSITIVE,
        beta2_exponent=_POSITIVE,
        second_moment_factor=_POSITIVE,
        batch=_POSITIVE_OR_NAN,
        reference_batch=_POSITIVE_OR_NAN,
    ),
    late_window=_none_or(_require_late),
    window=_none_or(
        _keys(
            reference=_POSITIVE,
            weight=_POSITIVE,
            largest=_POSITIVE,
            cells=_whole(1),
            all_cells=_whole(1),
            pieces=_whole(1),
            due=_FLAG,
            ended=_FLAG,
            weighted=_SCALAR,
            metric_weighted=_none_or(_SCALAR),
            loss_sum=_SCALAR,
            scale=_none_or(_SCALAR),
            measured=_none_or(_require_measured),
        )
    ),
    sensor=_keys(
        gradients=_none_or(_GRADIENTS),
        kept=_none_or(_keys(sums=_each(_GRADIENTS), weights=_each(_POSITIVE))),
        previous=_none_or(_GRADIENTS),
    ),
)
