"""Batch size that adapts to gradient noise.

The house: ``probe`` hears gradients, ``noise`` weighs noise against signal, ``rules`` decides, ``controller`` acts.
"""

from adaptbatch import noise
from adaptbatch.controller import BatchController
from adaptbatch.history import History
from adaptbatch.learning_rate import LearningRate
from adaptbatch.noise import NoiseTracker
from adaptbatch.page import report
from adaptbatch.records import Decision, Evidence, Measurement, NoiseEstimate, Progress, Response, Tail
from adaptbatch.rules import (
    CABS,
    AnyOf,
    CosineSimilarity,
    DiveBatch,
    Fixed,
    Goodput,
    Guard,
    InnerProductTest,
    Limits,
    NoiseScale,
    NormTest,
    Pareto,
    Ramp,
    RelativeStandardError,
    Replay,
    Rule,
    Schedule,
    Seesaw,
    StandardError,
    decide,
)
from adaptbatch.schedule import ScheduleDriver
from adaptbatch.watch import Logger, ProgressLine, TensorBoardLogger, WandbLogger

__version__ = "0.1.0"

__all__ = [
    "CABS",
    "AnyOf",
    "BatchController",
    "CosineSimilarity",
    "Decision",
    "DiveBatch",
    "Evidence",
    "Fixed",
    "Goodput",
    "Guard",
    "History",
    "InnerProductTest",
    "LearningRate",
    "Limits",
    "Logger",
    "Measurement",
    "NoiseEstimate",
    "NoiseScale",
    "NoiseTracker",
    "NormTest",
    "Pareto",
    "Progress",
    "ProgressLine",
    "Ramp",
    "RelativeStandardError",
    "Replay",
    "Response",
    "Rule",
    "Schedule",
    "ScheduleDriver",
    "Seesaw",
    "StandardError",
    "Tail",
    "TensorBoardLogger",
    "WandbLogger",
    "decide",
    "noise",
    "report",
]
