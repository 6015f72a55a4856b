"""The fixed batches of the live study: their rates and warm-ups, and what is reported of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import adaptbatch as ab
from studies.engine.arms import Arm
from studies.engine.runner import Run
from studies.engine.sweep import Found
from studies.engine.tuning import Search, carried, together
from studies.questions.live.setting import HOME, PASS, Scale, Setting, Tuned, labelled, search


def fixed_arm(setting: Setting, scale: Scale, n: int, warmup: float = 0.0) -> Callable[[float], Arm]:
    """The arm of a fixed batch at a rate, in as few passes of at most :data:`PASS` examples as there can be."""
    return lambda lr: Arm(f"fixed {n}", ab.Fixed(math.ceil(n / PASS)), lr, setting.schedule(scale, warmup))


def searched(setting: Setting, scale: Scale, n: int, found: Found) -> dict[float, Search]:
    """For the rate of a fixed batch, by the share of the examples over which it warms up.

    Grids, or where a setting has none what :func:`studies.engine.tuning.carried` gives from what is best at home, none
    while that is not known.
    """

    def over(share: float, rates: tuple[float, ...]) -> Search:
        suffix = f", warm-up {share:.0%}" if share else ""
        return search(setting, scale, f"fixed {n}{suffix}", fixed_arm(setting, scale, n, share), n, rates)

    grids = {share: rates for share, (batches, rates) in scale.grids.items() if n in batches}
    if setting.whole:
        return {share: over(share, rates) for share, rates in grids.items()}
    best = _tried(HOME, scale, n, found)
    return carried(best[0], over, list(grids), found) if best else {}


def reported(
    setting: Setting, scale: Scale, n: int, seeds: range, found: Found, warmups: Sequence[float] | None = None
) -> dict[Tuned, list[Run]]:
    """A fixed batch's runs, last those that count, after those at better rates that diverged on a reported seed.

    By rate and the share of its warm-up, one of ``warmups`` or of all; empty before they are tuned.
    """
    runs: dict[Tuned, list[Run]] = {}
    for lr, share in _tried(setting, scale, n, found, warmups):
        arm = fixed_arm(setting, scale, n, share)(lr)
        runs[lr, share] = own = [labelled("final", setting, scale, arm, seed, n) for seed in seeds]
        if not any(row["diverged"] for run in own if (row := found.get(run)) is not None):
            break
    return runs


def _tried(setting: Setting, scale: Scale, n: int, found: Found, warmups: Sequence[float] | None = None) -> list[Tuned]:
    """Best first; empty before all are."""
    searches = searched(setting, scale, n, found)
    return list(together({share: own for share, own in searches.items() if warmups is None or share in warmups}, found))


def ranked(setting: Setting, scale: Scale, n: int, found: Found) -> list[Tuned]:
    """What a fixed batch takes once it is tuned, and reported so far, and what it would take next; empty before."""
    takes = list(reported(setting, scale, n, range(scale.seeds), found))[-1:]
    tried = _tried(setting, scale, n, found)
    return [own for one in takes for own in tried[tried.index(one) :]]
