"""A wrong that only the device knows of: refused at once where that costs no wait, else with the window's numbers."""

from __future__ import annotations

import torch
from torch import Tensor


class Suspicion:
    """What a check found, on the device.

    Args:
        reads_now: Whether reading a number costs nothing, as on the CPU.

    Attributes:
        found: Above zero where a check that could not be read did; None: there was none.

    Example:
        >>> suspicion = Suspicion(reads_now=False)
        >>> suspicion.refuse_if(torch.tensor(1.0) > 2.0, "wrong")
        >>> suspicion.take()
        tensor(0., dtype=torch.float64)
    """

    def __init__(self, reads_now: bool) -> None:
        self.reads_now = reads_now
        self.found: Tensor | None = None

    def refuse_if(self, wrong: bool | Tensor, message: str) -> None:
        """Refuse at once where the host knows; on a GPU at the window's end, whose numbers it reads anyhow.

        Raises:
            RuntimeError: With ``message``.
        """
        if self.reads_now:
            if wrong:
                raise RuntimeError(message)
            return
        self.found = torch.as_tensor(wrong).double() if self.found is None else self.found + wrong

    def take(self) -> Tensor | None:
        """What was found since the last time."""
        found, self.found = self.found, None
        return found
