"""The checkpoint's format, declared once: by the types of the fields that it holds. No torch.

A field of a dataclass is saved if its type says how::

    weight: Sum                                  a number that may be no other; all such types are below
    pooled: NoiseTracker                         a dataclass: a mapping of its own saved fields
    recent: tuple[Sum, ...]                      a list
    window: Annotated[Measurement | None, ROW]   a dataclass of numbers: a list of them, empty for None
    late: WindowResult | None                    None, or as without it

What belongs to several fields together is checked by a static method ``require_whole(name, saved)`` of the dataclass.
All is checked before anything is made of it, and whatever is refused is named by its place.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

#: A check of a value by name; it raises ``ValueError`` by that name.
Check = Callable[[str, Any], None]
Record = TypeVar("Record")
#: Marks a dataclass of numbers that is saved as a list of them: one key for all, whatever they are.
ROW = "row"


def saved(record: Any) -> dict[str, Any]:
    """Plain numbers, texts, lists, mappings and tensors of a dataclass, for a checkpoint.

    Example:
        >>> from adaptbatch.records import Decision
        >>> saved(Decision(4, 250.0, "grow"))
        {'accumulation_steps': 4, 'target_batch': 250.0, 'reason': 'grow'}
    """
    kind: Any = type(record)
    return {name: codec.save(getattr(record, name)) for name, codec in _codecs(kind).items()}


def restored(kind: type[Record], state: Any, name: str = "state") -> Record:
    """The dataclass of which ``state`` is what :func:`saved` gave.

    Args:
        kind: Its class.
        state: What was saved.
        name: Of ``state``, for errors.

    Raises:
        ValueError: If a key is unknown or missing, at any depth, or a value is none that it can have.

    Example:
        >>> from adaptbatch.records import Decision
        >>> restored(Decision, {"accumulation_steps": 0, "target_batch": 250.0, "reason": "grow"})
        Traceback (most recent call last):
        ValueError: state['accumulation_steps'] must be a whole number of at least 1, below 2^62, got 0; load a state \
as state_dict() returned it.
    """
    codec = _record(kind)
    codec.check(name, state)
    record: Record = codec.load(state)
    return record


def require_keys(name: str, given: Any, expected: Iterable[str]) -> None:
    """Raise ``ValueError`` by name unless it is a mapping with exactly the ``expected`` keys."""
    if not isinstance(given, Mapping):
        refuse(name, "be a mapping", given)
    expected = set(expected)
    unknown, missing = sorted(given.keys() - expected, key=str), sorted(expected - given.keys())
    if unknown or missing:
        raise ValueError(f"{name} must have exactly the known keys, got unknown {unknown} and missing {missing}.")


def refuse(name: str, expected: str, value: Any) -> None:
    """Raise the error of a value that cannot be."""
    raise ValueError(f"{name} must {expected}, got {shown(value)}; load a state as state_dict() returned it.")


def shown(value: Any) -> str:
    """A value in an error: of a tensor its type and shape."""
    if hasattr(value, "is_floating_point"):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return reprlib.repr(value)


# --- how a type is saved ----------------------------------------------------------------------------------------------


class _Codec(NamedTuple):
    check: Check
    save: Callable[[Any], Any]
    load: Callable[[Any], Any]


@cache
def _codecs(kind: Any) -> dict[str, _Codec]:
    """Of the saved fields of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    found = ((item.name, _codec(hints[item.name])) for item in fields(kind))
    return {name: codec for name, codec in found if codec is not None}


def _codec(hint: Any) -> _Codec | None:
    """Of a type; None: it is not saved."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _row(parts[0]) if parts[1] == ROW else _leaf(parts[0], parts[1])
    if origin is tuple:
        return _list(_codec(parts[0]))
    if origin in (Union, UnionType):
        return _optional(_codec(_without_none(hint)))
    return _record(hint) if is_dataclass(hint) else None


def _without_none(hint: Any) -> Any:
    return next(part for part in get_args(hint) if part is not NoneType) if NoneType in get_args(hint) else hint


def _leaf(kind: Any, check: Check) -> _Codec:
    # One may have come as the other.
    convert = kind if kind in (int, float) else _same
    return _Codec(check, _same, convert)


def _record(kind: Any) -> _Codec:
    def check(name: str, value: Any) -> None:
        codecs = _codecs(kind)
        require_keys(name, value, codecs)
        for key, codec in codecs.items():
            codec.check(f"{name}[{key!r}]", value[key])
        getattr(kind, "require_whole", _nothing)(name, value)

    def load(value: Any) -> Any:
        return kind(**{name: codec.load(value[name]) for name, codec in _codecs(kind).items()})

    return _Codec(check, saved, load)


def _row(hint: Any) -> _Codec:
    kind, or_none = _without_none(hint), NoneType in get_args(hint)

    def check(name: str, value: Any) -> None:
        codecs = _codecs(kind)
        if not (isinstance(value, (list, tuple)) and (len(value) == len(codecs) or (or_none and not value))):
            none = " or none" if or_none else ""
            refuse(name, f"hold the {len(codecs)} numbers of a {kind.__name__}{none}", value)
        for index, (codec, one) in enumerate(zip(codecs.values(), value, strict=False)):
            codec.check(f"{name}[{index}]", one)

    def save(value: Any) -> list[Any]:
        return [] if value is None else list(saved(value).values())

    def load(value: Any) -> Any:
        loads = [codec.load for codec in _codecs(kind).values()]
        return kind(*(one(item) for one, item in zip(loads, value, strict=True))) if value else None

    return _Codec(check, save, load)


def _list(item: _Codec | None) -> _Codec | None:
    if item is None:
        return None
    load = item.load
    save = item.save
    return _Codec(each(item.check), lambda value: [save(one) for one in value], lambda value: tuple(map(load, value)))


def _optional(inner: _Codec | None) -> _Codec | None:
    if inner is None:
        return None
    save, load = inner.save, inner.load
    return _Codec(
        none_or(inner.check),
        lambda value: None if value is None else save(value),
        lambda value: None if value is None else load(value),
    )


def _same(value: Any) -> Any:
    return value


def _nothing(name: str, saved: Any) -> None:
    pass


# --- checks -----------------------------------------------------------------------------------------------------------


def number(expected: str, fits: Callable[[float], bool]) -> Check:
    """Of a real number that fits."""

    def check(name: str, value: Any) -> None:
        try:
            good = isinstance(value, Real) and not isinstance(value, bool) and fits(float(value))
        except OverflowError:
            good = False
        if not good:
            refuse(name, expected, value)

    return check


def whole(least: int) -> Check:
    """Of a whole number."""

    def check(name: str, value: Any) -> None:
        # The history's columns are of 64 bits.
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) < 2**62:
            refuse(name, f"be a whole number of at least {least}, below 2^62", value)

    return check


def instance(kind: type, expected: str) -> Check:
    """Of a value of that kind."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, kind):
            refuse(name, expected, value)

    return check


def tensor(scalar: bool) -> Check:
    """Of a floating-point tensor, known by what it can do."""

    def check(name: str, value: Any) -> None:
        is_one = hasattr(value, "is_floating_point") and value.is_floating_point() and not value.is_meta
        if not is_one or (scalar and value.dim() != 0):
            refuse(name, f"be a {'scalar ' if scalar else ''}floating-point tensor", value)

    return check


def none_or(known: Check) -> Check:
    """Of None, or of what is ``known``."""

    def check(name: str, value: Any) -> None:
        if value is not None:
            known(name, value)

    return check


def each(item: Check) -> Check:
    """Of a list of such items."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, (list, tuple)):
            refuse(name, "be a list", value)
        for index, one in enumerate(value):
            item(f"{name}[{index}]", one)

    return check


def named(item: Check, *, known: Iterable[str]) -> Check:
    """Of a mapping of such items by some of the ``known`` names."""
    names = set(known)

    def check(name: str, value: Any) -> None:
        require_keys(name, value, names & value.keys() if isinstance(value, Mapping) else names)
        for key, one in value.items():
            item(f"{name}[{key!r}]", one)

    return check


Number = Annotated[float, number("be a number", lambda x: True)]
Finite = Annotated[float, number("be a finite number", math.isfinite)]
Positive = Annotated[float, number("be a positive, finite number", lambda x: 0.0 < x < math.inf)]
PositiveOrNan = Annotated[
    float, number("be a positive, finite number or NaN", lambda x: not x <= 0.0 and x != math.inf)
]
Sum = Annotated[float, number("be a finite number of at least 0", lambda x: 0.0 <= x < math.inf)]
# Squares of large gradients overflow in a run that diverged, and its checkpoint must load.
Square = Annotated[float, number("be a number of at least 0, or NaN", lambda x: not x < 0.0)]
Extent = Annotated[float, number("be a number of at least 0", lambda x: x >= 0.0)]
Population = Annotated[float, number("be a number of at least 1", lambda x: x >= 1.0)]
Moment = Annotated[float, number("be a finite number or -inf", lambda x: x < math.inf)]
Count = Annotated[int, whole(0)]
Natural = Annotated[int, whole(1)]
Flag = Annotated[bool, instance(bool, "be True or False")]
#: Check of a list of gradients, None where a parameter has none.
GRADIENTS = each(none_or(tensor(scalar=False)))
