"""Whether ``.grad`` is still what the window accumulated in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from adaptbatch.accumulate.gradients import HALF, gradient_norms, gradient_stamps

# All gradients are looked at in a training's first windows, where a habit shows, and in one of so many.
FIRST, EVERY = 2, 256
# Else one part of them after the other, and what no version counter sees, and all counters, at one of so many
# micro-batches: a sliver of a window, however many they are. Primes, so that every part is looked at after the first
# micro-batch of a window, the second and so on.
PARTS, SELDOM = 31, 11
# So few, of so few entries in all, are looked at whole: it costs no more.
HANDFUL, SMALL = 8, 65_536


class GradientSeal:
    """Notices whatever writes to gradients between two backward passes of a window.

    Version counters see every write but those through ``.data``, NumPy and the like; norms see these, unless they leave
    the length as it is. Of sharded gradients (FSDP2) each rank looks at its own part, once they are synchronised: those
    that fully_shard holds before are in no ``.grad``, and out of reach of what would write there.

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
        self._closes, self._reads = 0, True
        self._known: Sequence[Parameter] = ()
        self._watched: Sequence[Parameter] = ()
        self._stamps: list[tuple[int, int] | None] = []
        self._part: Sequence[Parameter] = ()
        self._norms: _Norms = []

    def close(self, parameters: Sequence[Parameter], turn: int, reads: bool = True) -> None:
        """Take note of ``.grad`` as it is.

        Args:
            parameters: All that the optimizer steps.
            turn: Windows before this one.
            reads: Whether norms on the CPU become numbers at once.
        """
        self._closes, self._reads = self._closes + 1, reads
        self._known = parameters
        whole = checks_all(turn) or _are_few(parameters)
        part = parameters if whole else parameters[self._closes % PARTS % len(parameters) :: PARTS]
        seldom = whole or self._closes % SELDOM == 0
        self._watched = parameters if seldom else part
        self._stamps = gradient_stamps(self._watched)
        self._part = part if seldom else ()
        self._norms = _norms(self._part, reads)

    def stamped(self, parameters: Sequence[Parameter]) -> bool:
        """Whether the same tensors are in ``.grad``, and no operation of torch wrote to them; reads no value.

        Parameters that were added since have none.
        """
        added = [] if len(parameters) == len(self._known) else set(parameters).difference(self._known)
        return gradient_stamps(self._watched) == self._stamps and all(p.grad is None for p in added)

    def rewritten(self) -> bool | Tensor:
        """Whether something else wrote to the part that is looked at: on a GPU a scalar that is not read."""
        return _differ(self._norms, _norms(self._part, self._reads))


def _are_few(parameters: Sequence[Parameter]) -> bool:
    return len(parameters) < HANDFUL and sum(p.numel() for p in parameters) <= SMALL


def _norms(parameters: Sequence[Parameter], reads: bool) -> _Norms:
    """As numbers where that costs no wait."""
    return [one.tolist() if reads and one.device.type == "cpu" else one for one in gradient_norms(parameters)]


def _differ(then: _Norms, now: _Norms) -> bool | Tensor:
    if [len(norms) for norms in then] != [len(norms) for norms in now]:
        return True
    differ: bool | Tensor = False
    for a, b in zip(then, now, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            differ = ((a != b) & ~(a.isnan() & b.isnan())).any() | differ
        elif any(x != y and not (x != x and y != y) for x, y in zip(a, b, strict=True)):
            return True
    return differ


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


# Of each device and type.
_Norms = list[list[float] | Tensor]
