"""Micro-batches as they are handed out: which is a window's last, where ranks end together, where the loader stands."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_leaves

from adaptbatch.accumulate.ranks import Ranks

Item = TypeVar("Item")

_UNKNOWN: Any = object()
_MISSING: Any = object()


class Stream:
    """Hands out the items of a loader, each in its own scope.

    Attributes:
        last: Whether the item at hand is the last that this rank has; it ends a window of any size.
        closes: Whether the item at hand ends its window, as far as known before it.
        used: Whether the present scope had its backward; None outside of scopes.
        unused: Micro-batches of this rank that were left over because another rank had no more.
    """

    def __init__(self, ranks: Ranks, fills: Callable[[], bool], pending: Callable[[], int]) -> None:
        self._ranks = ranks
        self._fills = fills
        self._pending = pending
        self.last, self.closes = False, True
        self.used: bool | None = None
        self.unused = 0
        self._ended = False
        self._iteration: object | None = None
        self._open: _Scope | None = None
        self._loader: Any = None
        self._snapshot: Any = None

    def items(self, loader: Iterable[Item]) -> Iterator[Item]:
        """The items of ``loader``, one ahead only where that is needed to know the last; all ranks end together."""
        mine = self._begin(loader)
        source = _Source(loader, looks_ahead=self._ranks.several)
        length = self._common_length(loader)
        if not self._ranks.everyone(not self._ranks.several or source.peek()):
            self._report(source)
            self._iteration = None
            return
        had_backward, any_backward = False, False
        try:
            while source.peek():
                item = source.take()
                self.last, self._snapshot = False, None
                if self._ranks.several or not self._fills():
                    self._snapshot = _state_of(loader) if source.needs_look else None
                    self.last = self._is_last(source, length)
                scope = self._enter()
                try:
                    yield item
                    self._require_newest(mine)
                    had_backward = bool(self.used)
                finally:
                    scope.close()
                any_backward |= had_backward
                if self._ended or (self.last and self._ranks.lockstep):
                    self._report(source)
                    break
            self._snapshot = self._iteration = None
            if source.handed:
                self._report_end(source, had_backward, any_backward)
        finally:
            if self._iteration in (None, mine):
                self.last = False

    def _begin(self, loader: Iterable[Any]) -> object:
        """A new iteration takes the place of one that was left within an item, by a break or an error."""
        if self._iteration is not None:
            if self._open is not None:
                self._open.close()
            if pending := self._pending():
                warnings.warn(
                    f"the iteration before was left within a window, which goes on with the {pending} micro-batches "
                    f"that it holds; discard_window() first would begin a new one.",
                    stacklevel=3,
                )
        self._iteration, self._loader, self._snapshot, self._ended = object(), loader, None, False
        return self._iteration

    def _require_newest(self, mine: object) -> None:
        if self._iteration is not mine:
            raise RuntimeError(
                "this iteration of micro_batches() was left for a newer one; one such iteration ends before the next "
                "begins."
            )

    @contextmanager
    def scope(self, last: bool) -> Iterator[None]:
        """The scope of one micro-batch in a hand-written loop."""
        self.last = last
        try:
            opened = self._enter()
            try:
                yield
            finally:
                opened.close()
        finally:
            self.last = False

    def _enter(self) -> _Scope:
        if self.used is not None:
            raise RuntimeError(
                "micro_batch() scopes must not be nested; micro_batches(loader) opens one for each item, and one such "
                "iteration ends before the next begins."
            )
        self.used, self.closes = False, self.last or self._fills()
        self._open = _Scope(self, self._ranks.micro_batch(self.closes) if self._ranks.several else None)
        return self._open

    def leave(self) -> None:
        """No item is at hand."""
        self.used, self.closes = None, True

    def forget(self) -> None:
        """The window was discarded: the micro-batch at hand may have its backward once more."""
        if self.used:
            self.used = False

    def end(self) -> None:
        """Some rank has no next micro-batch: hand out no more of this loader."""
        self._ended = True

    def loader_state_dict(self) -> Any:
        """The loader's state as of the item handed out last, not the one that was looked at.

        Raises:
            RuntimeError: If no loader with a ``state_dict()`` was iterated.
        """
        if not hasattr(self._loader, "state_dict"):
            raise RuntimeError(
                f"loader_state_dict() needs micro_batches(loader) of a loader with state_dict(), got "
                f"{type(self._loader).__name__}; torchdata's StatefulDataLoader has one."
            )
        if isinstance(self._snapshot, Exception):
            raise self._snapshot
        return self._loader.state_dict() if self._snapshot is None else self._snapshot

    def _common_length(self, loader: Iterable[Any]) -> int | None:
        """The items that every rank has, where they go in lockstep and know it in advance."""
        if not self._ranks.lockstep:
            return None
        least = self._ranks.least(_length(loader))
        return least if least >= 0 else None

    def _is_last(self, source: _Source, length: int | None) -> bool:
        if not self._ranks.lockstep:
            return source.at_end()
        if length is not None:
            return source.handed >= length or not source.peek()
        return not self._ranks.everyone(source.peek())

    def _report_end(self, source: _Source, had_backward: bool, any_backward: bool) -> None:
        """The last item had no backward, which is what ends a window, or was not known to be the last."""
        pending = self._pending()
        if not any_backward:
            warnings.warn(
                "no item had its backward(), and nothing was accumulated; call controller.backward(loss, weight) in "
                "place of loss.backward().",
                stacklevel=3,
            )
        elif pending and not had_backward:
            warnings.warn(
                f"the last item had no backward(), which would have ended its window: that stays open with {pending} "
                f"micro-batches. Leave empty micro-batches out of the loader, or call close_window() and step().",
                stacklevel=3,
            )
        elif pending and source.handed != source.length >= 0:
            warnings.warn(
                f"the loader ended after {source.handed} items, len(loader) is {source.length}: its last window stays "
                f"open with {pending} micro-batches. Give it the right length or none, or call close_window() and "
                f"step().",
                stacklevel=3,
            )

    def _report(self, source: _Source) -> None:
        if not source.peek():
            return
        count = max(source.length - source.handed, 1)
        self.unused += count
        warnings.warn(
            f"rank {self._ranks.rank}: at least {count} micro-batches are left over, since another rank has no more; "
            f"give every rank as many (DistributedSampler does).",
            stacklevel=3,
        )


class _Scope:
    """The scope of one item; closed by a newer iteration too, where an error's traceback holds its own."""

    def __init__(self, stream: Stream, synchronising: AbstractContextManager[None] | None) -> None:
        if synchronising is not None:
            synchronising.__enter__()
        self._stream, self._synchronising, self._is_open = stream, synchronising, True

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._stream.leave()
            if self._synchronising is not None:
                self._synchronising.__exit__(None, None, None)


class _Source:
    """The items of one loader, asked for as late as possible.

    A plain loop asks for an item when it is done with the one before, and so does this while the loader's length tells
    where it ends. Of one without a length, or with a state to go on from, the next item is asked for with this one in
    hand, unless its window is full anyhow.

    Attributes:
        handed: Items taken.
        length: ``len(loader)``; -1 where it has none.
        needs_look: Whether the end is only found by asking.
    """

    def __init__(self, loader: Iterable[Any], looks_ahead: bool) -> None:
        # One with a state may begin within its epoch, which its length does not say.
        stateful = not isinstance(_state_of(loader), Exception | None)
        self._items, self._upcoming = iter(loader), _UNKNOWN
        self._error: Exception | None = None
        self._in_hand: Any = None
        self.handed, self.length = 0, _length(loader)
        self.needs_look = looks_ahead or stateful or self.length < 0

    def peek(self) -> bool:
        """Whether there is another item.

        Raises:
            Exception: What the loader raised, once the items before it have been handed out.
        """
        if self._error is not None:
            raise self._error
        if self._upcoming is _UNKNOWN:
            self._upcoming = next(self._items, _MISSING)
        return self._upcoming is not _MISSING

    def take(self) -> Any:
        """The item that :meth:`peek` has seen."""
        self._in_hand, self._upcoming = self._upcoming, _UNKNOWN
        self.handed += 1
        return self._in_hand

    def at_end(self) -> bool:
        """Whether the item in hand is the last, as far as it can be known.

        Raises:
            RuntimeError: If looking for it wrote the next item over the one in hand.
        """
        if not self.needs_look:
            return self.handed == self.length
        try:
            missing = not self.peek()
        except Exception as error:
            # The item in hand is good; the error is for whoever asks for the next.
            self._error = error
            return False
        if not missing and _share_memory(self._in_hand, self._upcoming):
            raise RuntimeError(
                "the loader has no len() and yields one buffer again and again: the next item, looked at to know where "
                "the data end, overwrote the one in hand. Yield copies, or give the loader its length."
            )
        return missing


def _share_memory(one: Any, other: Any) -> bool:
    """Whether two items hold the same tensors or arrays."""
    if one is other:
        return bool(_addresses(one))
    return not _addresses(one).isdisjoint(_addresses(other))


def _addresses(item: Any) -> set[int]:
    leaves = tree_leaves(item)
    found = {leaf.data_ptr() for leaf in leaves if isinstance(leaf, Tensor) and leaf.numel()}
    return found | {leaf.__array_interface__["data"][0] for leaf in leaves if hasattr(leaf, "__array_interface__")}


def _length(loader: Iterable[Any]) -> int:
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return -1


def _state_of(loader: Any) -> Any:
    try:
        return loader.state_dict() if hasattr(loader, "state_dict") else None
    except Exception as error:
        # Wrappers have the method for loaders that have no state: that concerns only who asks for it.
        return error
