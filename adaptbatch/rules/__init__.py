r"""How many accumulation steps the next window takes: rules as frozen values, limits, and one ``decide``.

The CLT rule keeps the standard error of the batch gradient at a chosen fraction of its length::

    sqrt(tr(Sigma) / n) <= theta |G|      <=>      n >= B / theta^2,      B = tr(Sigma) / |G|^2

and tests that line, one-sided, before it moves. Every other way of choosing a batch is a value of the same type, one
idea a file. A rule sees finished windows only: stopping inside a window would condition the gradient on its own noise.
Floats only, no torch.

==============  ====================================================================================================
base            the protocol, the limits, ``decide``
clt             ``RelativeStandardError``, the default
standard_error  ``StandardError``, the absolute error; ``compose`` the largest of several rules
guard           ``Guard``, the answer to exceedances; composes with any rule
open_loop       ``Fixed``, ``Replay``, ``Ramp``, ``Schedule``, ``Seesaw``: no evidence enters
norm_tests      ``NormTest``, ``InnerProductTest``, ``CosineSimilarity``: published tests of one window's gradient
efficiency      ``NoiseScale``, ``Pareto``, ``Goodput``, ``CABS``, ``DiveBatch``: a batch computed from the moments
==============  ====================================================================================================
"""

from adaptbatch.rules.base import Limits, Rule, decide
from adaptbatch.rules.clt import RelativeStandardError
from adaptbatch.rules.compose import AnyOf
from adaptbatch.rules.efficiency import CABS, DiveBatch, Goodput, NoiseScale, Pareto
from adaptbatch.rules.guard import Guard
from adaptbatch.rules.norm_tests import CosineSimilarity, InnerProductTest, NormTest
from adaptbatch.rules.open_loop import Fixed, Ramp, Replay, Schedule, Seesaw
from adaptbatch.rules.standard_error import StandardError

__all__ = [
    "CABS",
    "AnyOf",
    "CosineSimilarity",
    "DiveBatch",
    "Fixed",
    "Goodput",
    "Guard",
    "InnerProductTest",
    "Limits",
    "NoiseScale",
    "NormTest",
    "Pareto",
    "Ramp",
    "RelativeStandardError",
    "Replay",
    "Rule",
    "Schedule",
    "Seesaw",
    "StandardError",
    "decide",
]
