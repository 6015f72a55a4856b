"""Batch size that adapts to gradient noise.

A window of micro-batches is *accumulated* to the exact mean gradient and *measured* on the way; ``estimate`` weighs its
noise against its signal, ``rules`` decide how many micro-batches the next window takes, and the ``BatchController``
holds them together. ``optimizer`` takes the step, ``reporting`` shows what happened, ``integrations`` bring it into
trainers, ``planning`` says from what was measured which batch to take. Imports point down this list::

    planning.branches    controller, meter, integrations    reporting, planning    accumulate, measure, optimizer
    rules    estimate    records
"""

import importlib
from typing import TYPE_CHECKING, Any

from adaptbatch.controller import BatchController
from adaptbatch.meter import NoiseMeter
from adaptbatch.optimizer.learning_rate import LearningRate
from adaptbatch.optimizer.schedule import ScheduleDriver
from adaptbatch.reporting.history import History
from adaptbatch.rules import Fixed, Guard, Limits, Pareto, Ramp, RelativeStandardError, Schedule, StandardError

if TYPE_CHECKING:
    from adaptbatch.planning.advice import plan
    from adaptbatch.planning.branches import critical_batch
    from adaptbatch.reporting.html import report

__version__ = "0.1.0"

__all__ = [
    "BatchController",
    "Fixed",
    "Guard",
    "History",
    "LearningRate",
    "Limits",
    "NoiseMeter",
    "Pareto",
    "Ramp",
    "RelativeStandardError",
    "Schedule",
    "ScheduleDriver",
    "StandardError",
    "critical_batch",
    "plan",
    "report",
]


# They bring pandas and plotting libraries, and are loaded for whoever asks for one.
_LATE = {
    "critical_batch": "adaptbatch.planning.branches",
    "plan": "adaptbatch.planning.advice",
    "report": "adaptbatch.reporting.html",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
