"""Which windows are measured: all while the noise scale is not known well, else as few as it takes to stay so.

A window nobody listens to has no work done in its backward passes; its ``|g|^2`` is known all the same, and enters the
pooled moments (:meth:`.NoiseTracker.update_length`). So what listening less costs shows in the noise scale's own
variance, and the share of windows follows from that.
"""

from __future__ import annotations

import math
from typing import Literal

from adaptbatch.estimate.moments import noise_scale_error
from adaptbatch.records import NoiseEstimate, Progress

Listen = float | Literal["auto"]

#: Relative standard error of the noise scale above which every window is measured; at half of it one in two is, then
#: one in four. Decisions are tests at two to three standard errors, and a step of ``k`` is worth some ten percent.
KNOWN = 0.2
#: At most one window in so many is left to speak for the others.
RAREST = 4
#: Windows measured after each change of ``k``.
AFTER_CHANGE = 8
#: Windows worth of evidence below which its own variance is not to be believed.
LEAST_WINDOWS = 16.0


def listens(listen: Listen, evidence: NoiseEstimate, progress: Progress) -> bool:
    """Whether the window to come is measured.

    Args:
        listen: A share of windows, evenly spread from the first on; or ``"auto"``.
        evidence: Pooled, of the channel that decides.
        progress: After the decision.

    Example:
        >>> known = NoiseEstimate(4.0, 400.0, 0.01, 100.0, 0.0, degrees_of_freedom=90.0, effective_windows=30.0)
        >>> [listens("auto", known, Progress(window, 6400.0, 2, 32.0)) for window in range(4)]
        [True, False, False, False]
        >>> [listens(0.5, known, Progress(window)) for window in range(4)]
        [True, False, True, False]
    """
    turn = progress.window
    if listen != "auto":
        # The first of each stretch, so that what is looked at every 16th or 256th window is heard.
        return math.ceil((turn + 1) * listen) > math.ceil(turn * listen)
    since = progress.examples_since_change / progress.global_batch
    if evidence.effective_windows < LEAST_WINDOWS or since < AFTER_CHANGE:
        return True
    error, every = noise_scale_error(evidence), 1
    while every < RAREST and every * error < KNOWN:
        every *= 2
    return turn % every == 0
