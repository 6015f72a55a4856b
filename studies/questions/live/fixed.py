"""The fixed batches of the live study: their rates and warm-ups, and what is reported of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import adaptbatch as ab
from studies.engine.arms import Arm
from studies.engine.runner import Run
from studies.engine.sweep import Found
from studies.engine.tuning import Search, together
from studies.questions.live.setting import PASS, WARMUP, Scale, Setting, Tuned, labelled, search


def fixed_arm(setting: Setting, scale: Scale, n: int, warmup: float = 0.0) -> Callable[[float], Arm]:
    """The arm of a fixed batch at a rate, in as few passes of at most :data:`PASS` examples as there can be."""
    return lambda lr: Arm(f"fixed {n}", ab.Fixed(math.ceil(n / PASS)), lr, setting.schedule(scale, warmup))


def fixed_searches(setting: Setting, scale: Scale, warmup: float = 0.0) -> dict[int, Search]:
    """Of every fixed batch, for its rate; with a warm-up of those for which one is tried."""
    known = {0.0: (scale.batches, scale.rates), WARMUP: (scale.warm_batches, scale.warm_rates)}
    batches, rates = known.get(warmup, (scale.long_batches, scale.long_rates))
    suffix = f", warm-up {warmup:.0%}" if warmup else ""
    return {
        n: search(setting, scale, f"fixed {n}{suffix}", fixed_arm(setting, scale, n, warmup), n, rates) for n in batches
    }


def reported(
    setting: Setting, scale: Scale, n: int, seeds: range, found: Found, warmups: Sequence[float] | None = None
) -> dict[Tuned, list[Run]]:
    """A fixed batch's runs, last those that count, after those at better rates that diverged on a reported seed.

    By rate and the share of its warm-up, one of ``warmups`` or of all; empty before they are tuned.
    """
    runs: dict[Tuned, list[Run]] = {}
    for lr, share in _tried(setting, scale, n, found, warmups or scale.warmups):
        arm = fixed_arm(setting, scale, n, share)(lr)
        runs[lr, share] = own = [labelled("final", setting, scale, arm, seed, n) for seed in seeds]
        if not any(row["diverged"] for run in own if (row := found.get(run)) is not None):
            break
    return runs


def _tried(setting: Setting, scale: Scale, n: int, found: Found, warmups: Sequence[float]) -> list[Tuned]:
    """Best first; empty before all are."""
    by_share = {share: fixed_searches(setting, scale, share) for share in warmups}
    return list(together({share: searches[n] for share, searches in by_share.items() if n in searches}, found))


def ranked(setting: Setting, scale: Scale, n: int, found: Found) -> list[Tuned]:
    """What a fixed batch takes once it is tuned, and reported so far, and what it would take next."""
    takes = next(reversed(reported(setting, scale, n, range(scale.seeds), found)))
    tried = _tried(setting, scale, n, found, scale.warmups)
    return tried[tried.index(takes) :]
