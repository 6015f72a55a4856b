"""The main job: does an 80-layer residual VAE on MNIST gain from a batch that follows the gradient noise?

Four arms in the same loop, on one seed, with the same examples and a rate that decays linearly to zero: the setting of
:mod:`studies.questions.live` on its calm network, where micro-batches of 16 leave the controller room. The adaptive arm
is that study's primary one, ``theta 0.7`` with a rate that follows the root of the batch; its batch grows from 32 to
some hundreds, with a mean of about 200. So the fixed arms are 64, which ends at a lower loss for three times the
updates, 192, near its mean, and 384, near where it ends. Their rates and warm-ups are those that the live study found
best for each; the adaptive arm was not tuned, and has the rate of the batch it starts from.

What this job cannot show, with one seed: how many updates that saves. It shows that the batch moves, and where that
ends beside a tuned constant batch with as many updates; the live study has the ratio and its interval.
"""

from __future__ import annotations

import math
from dataclasses import replace

import adaptbatch as ab
from studies.engine.arms import Arm, Decay
from studies.engine.runner import Run
from studies.questions import live

NAME = "quick"
SCALE, SETTING = live.SCALES["laptop"], live.SETTINGS[0]
MICRO_BATCH = live.MICRO_BATCH
TASK = SETTING.task(SCALE, MICRO_BATCH)
ADAPTIVE = "adaptive"
# What live's tuning found: a fixed batch's rate and the share of its warm-up, and the rate of the adaptive arm's start.
TUNED = {64: (1.6e-2, 0.05), 192: (4.53e-2, 0.4), 384: (3.2e-2, 0.4)}
START_RATE = 8e-3
# A plan is drawn from the first: its windows of several sizes tell a step's seconds from an example's.
PLANNED = (ADAPTIVE, "fixed 192")


def passes(batch: int) -> int:
    """In how many backward passes of at most 128 examples a fixed batch is computed."""
    return math.ceil(batch / live.PASS)


def arms(examples: int = TASK.examples) -> list[tuple[Arm, int]]:
    """Each arm with its micro-batch."""
    decay = Decay(examples)
    fixed = [
        (Arm(f"fixed {n}", ab.Fixed(passes(n)), lr, Decay(examples, share * examples)), n // passes(n))
        for n, (lr, share) in TUNED.items()
    ]
    coupling = ab.LearningRate("sqrt", live.START)
    adaptive = Arm(ADAPTIVE, ab.RelativeStandardError(theta=0.7), START_RATE, decay, coupling=coupling)
    return [(adaptive, MICRO_BATCH), *fixed]


def runs(seed: int = 0, examples: int = TASK.examples) -> list[Run]:
    """The study's runs, all arms on one seed; the longest first."""
    task = replace(TASK, examples=examples, probe_every=max(1, examples // 50))
    return [Run(NAME, replace(task, micro_batch=size), arm, seed) for arm, size in arms(examples)]
