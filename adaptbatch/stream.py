"""Micro-batches as they are handed out: which is a window's last, where ranks end together, where the loader stands."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from adaptbatch.distributed import Ranks

Item = TypeVar("Item")

_UNKNOWN, _MISSING = object(), object()


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
        self._loader: Any = None
        self._snapshot: Any = None

    def items(self, loader: Iterable[Item]) -> Iterator[Item]:
        """The items of ``loader``, one ahead where that is needed to know the last; all ranks end together."""
        items, self._loader, self._snapshot, self._ended = iter(loader), loader, None, False
        length = self._common_length(loader)
        upcoming: Any = next(items, _MISSING)
        if not self._ranks.everyone(upcoming is not _MISSING):
            self._report(loader, 0, upcoming)
            return
        handed, heard, any_heard = 0, False, False
        try:
            while True:
                upcoming = next(items, _MISSING) if upcoming is _UNKNOWN else upcoming
                if upcoming is _MISSING:
                    break
                item, upcoming, handed = upcoming, _UNKNOWN, handed + 1
                self.last, self._snapshot = False, None
                # Where the window is full anyhow, one process leaves the loader where it stands.
                if self._ranks.several or not self._fills():
                    self._snapshot = _state_of(loader)
                    upcoming = next(items, _MISSING)
                    self.last = self._is_last(upcoming, handed, length)
                with self._scope():
                    yield item
                    heard = bool(self.used)
                any_heard |= heard
                if self._ended or (self.last and self._ranks.lockstep):
                    self._report(loader, handed, upcoming)
                    break
            self._snapshot = None
            if not heard:
                self._report_unheard(any_heard)
        finally:
            self.last = False

    @contextmanager
    def scope(self, last: bool) -> Iterator[None]:
        """The scope of one micro-batch in a hand-written loop."""
        self.last = last
        try:
            with self._scope():
                yield
        finally:
            self.last = False

    @contextmanager
    def _scope(self) -> Iterator[None]:
        if self.used is not None:
            raise RuntimeError(
                "micro_batch() scopes must not be nested; micro_batches(loader) opens one for each item, and one such "
                "iteration ends before the next begins."
            )
        self.used, self.closes = False, self.last or self._fills()
        try:
            with self._ranks.micro_batch(self.closes):
                yield
        finally:
            self.used, self.closes = None, True

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

    def _is_last(self, upcoming: object, handed: int, length: int | None) -> bool:
        missing = upcoming is _MISSING
        if not self._ranks.lockstep:
            return missing
        if length is not None:
            return missing or handed >= length
        return not self._ranks.everyone(not missing)

    def _report_unheard(self, any_heard: bool) -> None:
        """The last item had no backward, which is what ends a window."""
        if not any_heard:
            warnings.warn(
                "no item had its backward(), and nothing was accumulated; call controller.backward(loss, weight) in "
                "place of loss.backward().",
                stacklevel=3,
            )
        elif pending := self._pending():
            warnings.warn(
                f"the last item had no backward(), which would have ended its window: that stays open with {pending} "
                f"micro-batches. Leave empty micro-batches out of the loader, or call close_window() and step().",
                stacklevel=3,
            )

    def _report(self, loader: Iterable[Any], handed: int, upcoming: object) -> None:
        if upcoming is _MISSING:
            return
        count = max(_length(loader) - handed, 1)
        self.unused += count
        warnings.warn(
            f"rank {self._ranks.rank}: at least {count} micro-batches are left over, since another rank has no more; "
            f"give every rank as many (DistributedSampler does).",
            stacklevel=3,
        )


def _length(loader: Iterable[Any]) -> int:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return -1


def _state_of(loader: Any) -> Any:
    try:
        return loader.state_dict() if hasattr(loader, "state_dict") else None
    except Exception as error:
        # Wrappers have the method for loaders that have no state: that concerns only who asks for it.
        return error
