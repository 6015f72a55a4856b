"""What branches say: losses of repeats in, the critical batch and its reasons out. No torch."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from adaptbatch.estimate import noise_scale, noise_scale_interval
from adaptbatch.planning.curves import LEAST_WINDOWS, Floats, integrated_noise
from adaptbatch.records import NoiseEstimate

# Steps of the largest batch below which a branch says little of it.
FEW_STEPS = 10


@dataclass(frozen=True, eq=False)
class CriticalBatch:
    """What :func:`adaptbatch.critical_batch` measured.

    Attributes:
        table: A row for each length and batch: ``examples`` of the branch, ``accumulation_steps``, ``batch`` and
            ``steps`` taken, mean ``loss`` over the repeats, its ``difference`` to the smallest batch
            with ``standard_error`` paired over repeats, the one-sided bound ``difference_high``, whether that is
            ``within`` the tolerance, and whether the other bound is above it, ``worse``.
        critical: Largest batch within it, in the longest branches [examples].
        excluded: Smallest batch above that which is shown to be worse by more [examples]; infinite where none is.
        accumulation_steps: ``k`` of the critical batch.
        noise: Signal and noise integrated over the branches of the smallest batch that measures any.
        notes: What it lacks and where it may mislead, a sentence each.
    """

    table: pd.DataFrame
    critical: float
    excluded: float
    accumulation_steps: int
    noise: NoiseEstimate
    notes: tuple[str, ...]

    @property
    def noise_scale(self) -> float:
        """``B`` at the branches [examples]; NaN where they are too short to tell."""
        return noise_scale(self.noise)

    @property
    def calibration(self) -> float:
        """The critical batch over ``B`` [1], for ``plan(calibration=...)``."""
        scale = self.noise_scale
        return self.critical / scale if scale > 0.0 else math.nan

    @property
    def theta(self) -> float:
        """The ``theta`` of :class:`~adaptbatch.RelativeStandardError` whose batch is the critical one [1]."""
        return 1.0 / math.sqrt(self.calibration) if self.calibration > 0.0 else math.nan

    def __repr__(self) -> str:
        low, high = noise_scale_interval(self.noise)
        bound = "none shown to be worse" if math.isinf(self.excluded) else f"{self.excluded:,.0f} is shown to be worse"
        first = (
            f"Critical batch {self.critical:,.0f} ({bound}), {self.calibration:.2g} times the noise scale of "
            f"{self.noise_scale:,.0f} ({low:,.0f} to {high:,.0f})."
        )
        return "\n".join([first, "", self.table.to_string(index=False, float_format="{:.5g}".format), "", *self.notes])

    def _repr_html_(self) -> str:
        first, *_ = repr(self).split("\n", 1)
        notes = "".join(f"<p><small>{html.escape(note)}</small></p>" for note in self.notes)
        return f"<p><b>{html.escape(first)}</b></p>{self.table.to_html(index=False)}{notes}"


def judge(
    losses: Mapping[tuple[int, int], Sequence[float]],
    windows: pd.DataFrame,
    weight: float,
    tolerance: float,
    confidence: float,
) -> CriticalBatch:
    """The table of all branches, and what the longest say.

    Args:
        losses: By accumulation steps and micro-batches of the branch, one of each repeat in their order.
        windows: Of the branches that measure the noise.
        weight: Of one micro-batch [examples].
        tolerance: As a share of the smallest batch's loss [1].
        confidence: One-sided.

    Example:
        >>> losses = {(1, 8): [1.0, 1.1, 0.9], (2, 8): [1.001, 1.101, 0.902], (4, 8): [1.2, 1.31, 1.1]}
        >>> found = judge(losses, pd.DataFrame({"noise_trace": []}), weight=16.0, tolerance=0.01, confidence=0.95)
        >>> found.critical, found.excluded, found.table["within"].tolist()
        (32.0, 64.0, [True, True, False])
    """
    sizes = sorted({size for size, _ in losses})
    rows = []
    for size, count in sorted(losses, key=lambda key: key[::-1]):
        smallest = np.array(losses[sizes[0], count])
        allowed = tolerance * abs(float(smallest.mean()))
        own = {"accumulation_steps": size, "batch": size * weight, "steps": count // size}
        compared = _compared(np.array(losses[size, count]), smallest, allowed, confidence, size == sizes[0])
        rows.append({"examples": count * weight} | own | compared)
    table = pd.DataFrame(rows)
    last = table[table["examples"] == table["examples"].max()]
    best = last[last["within"]].iloc[-1]
    worse = last[(last["batch"] > best["batch"]) & last["worse"]]
    noise = NoiseEstimate(math.nan, math.nan)
    if np.isfinite(windows["noise_trace"].to_numpy(float)).sum() >= LEAST_WINDOWS:
        noise = integrated_noise(windows)
    found = CriticalBatch(
        table=table,
        critical=float(best["batch"]),
        excluded=float(worse["batch"].min()) if len(worse) else math.inf,
        accumulation_steps=int(best["accumulation_steps"]),
        noise=noise,
        notes=(),
    )
    return replace(found, notes=_notes(found))


def _compared(
    losses: Floats, smallest: Floats, allowed: float, confidence: float, own: bool
) -> dict[str, float | bool]:
    """Losses of repeats beside those of the smallest batch in the same repeats; one that diverged is worse than all."""
    from scipy.special import stdtrit

    difference = losses - smallest
    if not np.isfinite(difference).all():
        unknown = {"loss": math.inf, "difference": math.inf, "standard_error": math.nan}
        return unknown | {"difference_high": math.inf, "within": own, "worse": not own}
    mean, error = float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(len(difference))
    reach = float(stdtrit(len(difference) - 1, confidence)) * error
    return {
        "loss": float(losses.mean()),
        "difference": mean,
        "standard_error": error,
        "difference_high": mean + reach,
        "within": own or mean + reach <= allowed,
        "worse": mean - reach > allowed,
    }


def _notes(found: CriticalBatch) -> tuple[str, ...]:
    """What to be careful about."""
    table, notes = found.table, []
    lengths = table["examples"].unique()
    last = table[table["examples"] == lengths[-1]]
    if found.critical == last["batch"].max():
        notes.append("No batch was too large: the critical one is at least this; compare larger ones.")
    if found.critical == last["batch"].min():
        notes.append("Only the smallest batch passed, by definition: compare smaller ones, or more repeats.")
    better = last[last["difference_high"] < 0.0]
    if len(better):
        notes.append(
            f"Batch {better['batch'].iloc[-1]:,.0f} ends lower than the smallest: a larger batch anneals, which a "
            f"short branch takes for progress; compare longer ones, or a lower rate."
        )
    for length in lengths[:-1]:
        short = table[(table["examples"] == length) & table["within"]]["batch"].max()
        if short != found.critical:
            notes.append(
                f"After {length:,.0f} examples the critical batch was {short:,.0f}: the shorter the branch, the more "
                f"of it is annealing. Believe the longer one, or take longer ones."
            )
    if last["steps"].min() < FEW_STEPS:
        notes.append(
            f"The largest batch took {last['steps'].min()} steps only: at least {FEW_STEPS} tell how it trains."
        )
    if not math.isfinite(found.calibration):
        notes.append("The branches are too short to measure the noise scale: no calibration.")
    return tuple(notes)
