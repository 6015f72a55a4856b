"""Waiting for what another process does: for its condition and a bounded time, never for a guess."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def until(find: Callable[[], Found], what: str, seconds: float = 120.0) -> Found:
    """What ``find()`` returns, once that is true.

    Raises:
        TimeoutError: If it is not after ``seconds``; names ``what``.
    """
    deadline = time.monotonic() + seconds
    while not (found := find()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.02)
    return found
