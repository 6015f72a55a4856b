"""Batch size that adapts to gradient noise.

The house: ``probe`` hears gradients, ``noise`` weighs noise against signal, ``rules`` decides, ``controller`` acts.
"""

from adaptbatch import noise
from adaptbatch.controller import BatchController
from adaptbatch.history import History
from adaptbatch.learning_rate import LearningRate
from adaptbatch.noise import NoiseTracker
from adaptbatch.records import Decision, Measurement, NoiseEstimate, Progress
from adaptbatch.rules import Fixed, Limits, Ramp, RelativeStandardError, Replay, Rule, decide

__version__ = "0.1.0.dev1"

__all__ = [
    "BatchController",
    "Decision",
    "Fixed",
    "History",
    "LearningRate",
    "Limits",
    "Measurement",
    "NoiseEstimate",
    "NoiseTracker",
    "Progress",
    "Ramp",
    "RelativeStandardError",
    "Replay",
    "Rule",
    "decide",
    "noise",
]
