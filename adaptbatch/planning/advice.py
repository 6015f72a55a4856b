"""``plan``: from the noise of one run to a batch, with what it saves, what it costs, and how sure that is. No torch."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from adaptbatch.planning.curves import (
    TimeModel,
    critical_scale,
    integrated_noise,
    measured_seconds,
    read_windows,
    speed_table,
)
from adaptbatch.records import NoiseEstimate
from adaptbatch.rules.base import require_positive

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Seconds over the least that a smaller batch may take: the optimum is flat, examples are not free.
TIE = 1.02
# Powers of two that a plan lists unless told: up to so many times the critical batch.
BEYOND = 16.0
MOST_POWERS = 24
# A critical batch below it is none: every batch is beyond it.
SMALLEST = 1e-9


@dataclass(frozen=True)
class Recommendation:
    """A batch, and why.

    Attributes:
        batch: ``n`` [examples].
        accumulation_steps: ``k`` on each device.
        devices: That share a window.
        reason: What it saves, what it costs in examples, how sure that is: one sentence.
    """

    batch: float
    accumulation_steps: int
    devices: int
    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, eq=False)
class Plan:
    """What :func:`adaptbatch.plan` found: shows itself in a terminal and in a notebook.

    Attributes:
        table: A row a batch, see :func:`~adaptbatch.planning.curves.speed_table`.
        recommended: The batch to take.
        noise: Signal and noise integrated over the run; their ratio is ``B``.
        critical: The critical batch ``calibration B`` with its interval, ``(value, low, high)`` [examples].
        calibration: Factor between ``B`` and the critical batch [1].
        seconds: The time model; None where there is none, and ``notes`` say why.
        unit: What weights count.
        notes: What it assumes and lacks, a sentence each.
    """

    table: pd.DataFrame
    recommended: Recommendation
    noise: NoiseEstimate
    critical: tuple[float, float, float]
    calibration: float
    seconds: TimeModel | None
    unit: str
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        names = ["batch", "k", "steps (interval)", f"{self.unit} (interval)", "seconds", "efficiency"]
        rows = [names, *(_texts(row) for _, row in self.table.iterrows())]
        widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
        lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
        marks = [" ", *(">" if n == self.recommended.batch else " " for n in self.table["batch"])]
        shown = [f"{mark} {line}" for mark, line in zip(marks, lines, strict=True)]
        return "\n".join([self.recommended.reason, "", *shown, "", *self.notes])

    def _repr_html_(self) -> str:
        names = ["batch", "k", "steps (interval)", f"{self.unit} (interval)", "seconds", "efficiency"]
        shown = pd.DataFrame([_texts(row) for _, row in self.table.iterrows()], columns=names)
        notes = "".join(f"<p><small>{html.escape(note)}</small></p>" for note in self.notes)
        return f"<p><b>{html.escape(self.recommended.reason)}</b></p>{shown.to_html(index=False)}{notes}"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw steps, examples and seconds over the batch, with their intervals (needs the ``plot`` extra).

        Args:
            ax: Where to draw; None: a figure of its own.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        from adaptbatch.reporting.plot import draw_plan

        return draw_plan(self, ax)


def plan(
    history: Any,
    batches: Iterable[float] | None = None,
    devices: int | None = None,
    *,
    micro_batch: float | None = None,
    seconds_per_step: float | None = None,
    seconds_per_example: float | None = None,
    seconds_per_sync: float = 0.0,
    measured_on: int = 1,
    calibration: float = 1.0,
    confidence: float = 0.95,
) -> Plan:
    """How many steps, examples and seconds each batch would take for what a run did, and which one to take.

    From the noise scale ``B`` integrated over the run (:func:`~adaptbatch.planning.curves.integrated_noise`)::

        S / S_min = 1 + B / n        E / E_min = 1 + n / B        seconds = S (fixed + sync + per_example n / devices)

    It assumes that rate and warm-up are tuned at every batch, and that one step along a noisy gradient tells of all.
    The critical batch that is measured (:func:`adaptbatch.critical_batch`) may be a few times ``B``: ``calibration``
    takes that factor.

    With a time model the recommended batch is the smallest within 2 % of the least time; without one the nearest to the
    critical batch, where steps and examples both cost twice their minimum.

    When it is wrong: beyond what was run. The noise is that of this run's path; at another batch or rate the path, and
    with it ``B``, may be another, and what only a long run shows (a floor, an instability) no curve knows.

    Args:
        history: A history, its DataFrame, or the place of its Parquet or CSV file.
        batches: ``n`` to compare [examples]; None: powers of two times the smallest window.
        devices: That would share a window; None: as many as in the run.
        micro_batch: Examples of one backward pass on one device; None: the run's.
        seconds_per_step: Of a window whatever its size [s]; None: fitted, see
            :func:`~adaptbatch.planning.curves.measured_seconds`.
        seconds_per_example: Of an example on one device beside that [s]; None: fitted.
        seconds_per_sync: Of a window's synchronisation on several devices beside that [s].
        measured_on: Devices of the run.
        calibration: The critical batch over ``B`` [1], taken as exact.
        confidence: Coverage of the intervals, in (0, 1).

    Raises:
        TypeError: If ``history`` is no run.
        ValueError: If it holds no evidence, or an argument is out of range.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162; the critical batch of language models, measured: Merrill et al. 2025,
        arXiv:2505.23971.

    Example:
        >>> rows = pd.DataFrame({"noise_trace": [90.0, 110.0] * 50, "grad_sq_norm": [2.1, 1.9] * 50})
        >>> rows = rows.assign(global_batch=32.0, accumulation_steps=2, examples_seen=32.0 * (rows.index + 1))
        >>> found = plan(rows, seconds_per_step=0.064, seconds_per_example=0.001)
        >>> found.recommended.batch, found.recommended.accumulation_steps
        (64.0, 4)
        >>> found.table[["batch", "steps_factor", "examples_factor"]].round(2).head(3)
           batch  steps_factor  examples_factor
        0   16.0          4.13             1.32
        1   32.0          2.56             1.64
        2   64.0          1.78             2.28
    """
    _check(devices, measured_on, confidence, seconds_per_sync)
    for name, value in (
        ("micro_batch", micro_batch),
        ("seconds_per_step", seconds_per_step),
        ("seconds_per_example", seconds_per_example),
        ("calibration", calibration),
    ):
        if value is not None:
            require_positive(name, value, _WAYS_OUT[name])
    listed = None if batches is None else _listed(batches)
    windows = read_windows(history)
    pair = integrated_noise(windows)
    critical = critical_scale(pair, calibration, confidence)
    devices = measured_on if devices is None else devices
    each = micro_batch or float((windows["global_batch"] / windows["accumulation_steps"]).median()) / measured_on
    seconds, lacks = _time_model(windows, seconds_per_step, seconds_per_example, seconds_per_sync, measured_on)
    sizes = listed or _powers(each * devices, critical[0], float(windows["global_batch"].max()))
    tables = [speed_table((scale,) * 3, sizes, each, devices, seconds) for scale in critical]
    chosen, *ends = (_choice(table, scale) for table, scale in zip(tables, critical, strict=True))
    table = speed_table(critical, sizes, each, devices, seconds)
    unit = str(windows.attrs.get("unit", "examples"))
    batch, steps = float(table["batch"][chosen]), int(table["accumulation_steps"][chosen])
    present = (float(windows["global_batch"].median()), measured_on)
    reason = "; ".join(
        [
            _cost(table.iloc[chosen], devices, unit),
            _beside(critical[0], (batch, devices), present, seconds, unit),
            _sure([sizes[row] for row in (chosen, *ends)], confidence),
        ]
    )
    return Plan(
        table=table,
        recommended=Recommendation(batch, steps, devices, f"{reason}."),
        noise=pair,
        critical=critical,
        calibration=float(calibration),
        seconds=seconds,
        unit=unit,
        notes=(_evidence(windows, critical, calibration, unit), _ASSUMES, *lacks),
    )


def _check(devices: object, measured_on: object, confidence: float, seconds_per_sync: float) -> None:
    for name, count in (("devices", devices), ("measured_on", measured_on)):
        if count is None and name == "devices":
            continue
        if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {name} = {count!r}; 8 for eight.")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got confidence = {confidence!r}; 0.95 is usual.")
    if not (isinstance(seconds_per_sync, Real) and 0.0 <= seconds_per_sync < math.inf):
        raise ValueError(
            f"seconds_per_sync must be at least 0 and finite, got seconds_per_sync = {seconds_per_sync!r}; 0.0 where "
            f"it hides behind the backward pass."
        )


def _listed(batches: Iterable[float]) -> list[float]:
    sizes = sorted({float(one) for one in batches})
    if not sizes or not all(0.0 < one < math.inf for one in sizes):
        raise ValueError(
            f"batches must be positive and finite numbers of examples, got batches = {sizes}; None takes powers of two."
        )
    return sizes


def _powers(smallest: float, critical: float, largest: float) -> list[float]:
    powers = math.ceil(math.log2(max(BEYOND * critical, largest, 8.0 * smallest) / smallest))
    return [smallest * 2**power for power in range(min(powers, MOST_POWERS) + 1)]


def _time_model(
    windows: pd.DataFrame, step: float | None, example: float | None, sync: float, measured_on: int
) -> tuple[TimeModel | None, tuple[str, ...]]:
    """Of one device; or why there is none."""
    # The run's own devices share its examples, and its fixed part holds their synchronisation.
    shared = sync if measured_on > 1 else 0.0
    try:
        there = measured_seconds(
            windows, None if step is None else step + shared, None if example is None else example / measured_on
        )
    except ValueError as error:
        return None, (f"Without a time model: {error}",)
    return TimeModel(max(there.fixed - shared, 0.0), there.per_example * measured_on, sync), ()


def _choice(table: pd.DataFrame, critical: float) -> int:
    """The row to take."""
    # Without an upper end there is no least time either: the largest is never wrong about steps.
    if math.isinf(critical):
        return len(table) - 1
    if table["seconds_factor"].notna().all():
        return int((table["seconds_factor"] <= TIE).to_numpy().argmax())
    return int(np.abs(np.log(table["batch"].to_numpy() / max(critical, SMALLEST))).argmin())


def _cost(row: pd.Series, devices: int, unit: str) -> str:
    steps, examples = (
        f"{row[name]:.2g} times the least {word} ({_short(row[f'{name}_low'])} to {_short(row[f'{name}_high'])})"
        for name, word in (("steps_factor", "steps"), ("examples_factor", unit))
    )
    k = int(row["accumulation_steps"])
    return f"Take {row['batch']:,.0f} {unit} a step (k = {k} on {_devices(devices)}): {steps} and {examples}"


def _beside(
    critical: float, chosen: tuple[float, int], present: tuple[float, int], seconds: TimeModel | None, unit: str
) -> str:
    """What a batch on so many devices saves and costs beside the run's own."""
    if chosen == present:
        return "it is what the run had"
    steps = (1.0 + critical / chosen[0]) / (1.0 + critical / present[0])
    parts = [f"{_short(steps)} of the steps", f"{_short(steps * chosen[0] / present[0])} of the {unit}"]
    if seconds is not None:
        parts.append(f"{_short(steps * seconds.seconds(*chosen) / seconds.seconds(*present))} of the seconds")
    return f"beside the run's usual {present[0]:,.0f} on {_devices(present[1])} that is {', '.join(parts)}"


def _sure(choices: list[float], confidence: float) -> str:
    low, high = min(choices), max(choices)
    if low == high:
        return f"the whole {confidence:.0%} interval of the noise scale says the same"
    return f"over the {confidence:.0%} interval of the noise scale it would be {low:,.0f} to {high:,.0f}"


def _evidence(windows: pd.DataFrame, critical: tuple[float, float, float], calibration: float, unit: str) -> str:
    share = float(np.isfinite(windows["noise_trace"].to_numpy(float)).mean())
    value, low, high = (f"{scale:,.0f}" if math.isfinite(scale) else "unbounded" for scale in critical)
    source = "the noise scale" if calibration == 1.0 else f"{calibration:.3g} times the noise scale"
    return (
        f"Critical batch {value} {unit} ({low} to {high}): {source}, integrated over {len(windows):,} windows, "
        f"{share:.0%} of them measured."
    )


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count:,} devices"


def _short(value: float) -> str:
    return "unbounded" if math.isinf(value) else f"{value:.2g}" if value < 100.0 else f"{value:,.0f}"


def _texts(row: pd.Series) -> list[str]:
    """A row for people."""

    def known(value: float, form: str) -> str:
        return "-" if math.isnan(value) else format(value, form)

    steps, examples = (
        f"{_short(row[name])} ({_short(row[f'{name}_low'])} to {_short(row[f'{name}_high'])})"
        for name in ("steps_factor", "examples_factor")
    )
    times = known(row["seconds_factor"], ".3g"), known(row["efficiency"], ".0%")
    return [f"{row['batch']:,.0f}", f"{row['accumulation_steps']:.0f}", steps, examples, *times]


_ASSUMES = (
    "Assumes that a step of n goes 1 / (1 + B / n) of the way of one without noise, rate and warm-up tuned at each n."
)
_WAYS_OUT = {
    "micro_batch": "None takes the run's",
    "seconds_per_step": "None fits it to the run",
    "seconds_per_example": "None fits it to the run",
    "calibration": "critical_batch(...).calibration is a measured one",
}
