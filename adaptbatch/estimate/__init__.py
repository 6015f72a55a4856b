r"""Where the noise is estimated: squared norms in; noise, signal and their uncertainty out. Floats only, no torch.

::

    sqrt(tr(Sigma) / n)           the standard error of the gradient of n examples (CLT)
    B = tr(Sigma) / |G|^2         the noise scale: the batch whose error is as long as the gradient

=========  ============================================================================================================
moments    one window: ``tr(Sigma)`` and ``|G|^2`` by analysis of variance; standard errors, noise scale, wanted batch
tracker    ``NoiseTracker``: windows pooled with a decay in examples, and the variances of what is pooled
interval   Fieller's confidence interval for the noise scale
typical    ``TypicalTracker``: what an ordinary window says, and how far the others stand out
listening  which windows are measured, as few as it takes to know the noise scale
climb      how the noise answered when the batch grew: a noise floor, or a noise scale that rises by itself
shards     whether the ranks draw from one population
=========  ============================================================================================================
"""

from adaptbatch.estimate.interval import noise_scale_interval
from adaptbatch.estimate.listening import Listen, listens
from adaptbatch.estimate.moments import (
    batch_with_error,
    estimate_window,
    excess_error,
    inverse_size,
    noise_scale,
    relative_error,
    required_batch,
    standard_error,
)
from adaptbatch.estimate.shards import ShardTracker
from adaptbatch.estimate.tracker import NoiseTracker, memory_examples
from adaptbatch.estimate.typical import TypicalTracker

__all__ = [
    "Listen",
    "NoiseTracker",
    "ShardTracker",
    "TypicalTracker",
    "batch_with_error",
    "estimate_window",
    "excess_error",
    "inverse_size",
    "listens",
    "memory_examples",
    "noise_scale",
    "noise_scale_interval",
    "relative_error",
    "required_batch",
    "standard_error",
]
