"""Whether ``.grad`` is still what the window accumulated in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from adaptbatch.probe import HALF, batch_gradient_sq_norm, gradient_stamps

# Writes that no version counter sees are looked for in all gradients of a training's first windows, where a habit
# shows, and of one in so many; else in one part of them after the other.
FIRST, EVERY, PARTS = 2, 256, 32


class GradientSeal:
    """Notices whatever writes to gradients between two backward passes of a window.

    Version counters see every write but those through ``.data``, NumPy and the like; norms see these.

    Example:
        >>> weight, seal = Parameter(torch.ones(2)), GradientSeal()
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> seal.close([weight], turn=0)
        >>> seal.stamped([weight]), bool(seal.rewritten())
        (True, False)
        >>> weight.grad.data.mul_(0.5)
        tensor([1.5000, 2.0000])
        >>> seal.stamped([weight]), bool(seal.rewritten())
        (True, True)
    """

    def __init__(self) -> None:
        self._stamps: list[tuple[int, int] | None] = []
        self._part: Sequence[Parameter] = ()
        self._sq_norm: Tensor | None = None

    def close(self, parameters: Sequence[Parameter], turn: int) -> None:
        """Take note of ``.grad`` as it is.

        Args:
            parameters: All that the optimizer steps.
            turn: Windows before this one, which say what part of the norms is taken.
        """
        self._stamps = gradient_stamps(parameters)
        present = [p for p in parameters if p.grad is not None]
        # A handful is looked at whole: it costs no more.
        parts = 1 if checks_all(turn) else max(1, min(PARTS, len(present) // 4))
        self._part = present[turn % parts :: parts]
        self._sq_norm = self._norm()

    def stamped(self, parameters: Sequence[Parameter]) -> bool:
        """Whether the same tensors are in ``.grad``, and no operation of torch wrote to them; reads no value.

        Parameters that were added since have none.
        """
        added = len(parameters) - len(self._stamps)
        return gradient_stamps(parameters) == self._stamps + [None] * added

    def rewritten(self) -> Tensor:
        """Whether something else wrote to the part that is looked at: a scalar on the device, not read."""
        then, now = self._sq_norm, self._norm()
        if then is None or now is None:
            return torch.tensor(then is not now)
        return (then != now) & ~(then.isnan() & now.isnan())

    def _norm(self) -> Tensor | None:
        present = [p for p in self._part if p.grad is not None]
        return batch_gradient_sq_norm(present) if present else None


def checks_all(turn: int) -> bool:
    """Whether the window with this index has all its gradients checked."""
    return turn < FIRST or turn % EVERY == 0


def rounding(parameters: Sequence[Parameter], micro_batches: int) -> float:
    """How far a squared norm of the accumulated gradient may be off by the rounding of its sums, relatively.

    Example:
        >>> rounding([Parameter(torch.ones(2))], 4) < 1e-3 < rounding([Parameter(torch.ones(2).half())], 4)
        True
    """
    eps = max((torch.finfo(p.dtype).eps for p in parameters if p.dtype in HALF), default=0.0)
    # Norms are of float32 at least, whose long sums are pairwise.
    return 1e-4 + 4.0 * (micro_batches + 1) * eps
