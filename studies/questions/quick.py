"""The main job: does an 80-layer residual VAE on MNIST gain from a batch that follows the gradient noise?

Four arms in the same loop, on one seed, with the same examples. The network is the well-behaved one of the pilots
(branches scaled by 1/sqrt(L), width 128 to 32, code 16, Adam at 3e-3), chosen because it learns within this budget:
its validation loss ends far below that of the mean image, where a collapsed VAE stays. It does not need a large batch:
fixed 4096 is expected to lose for want of updates, and fixed 256 need not be the optimum either. Micro-batches of 32
give the controller room on both sides of 256.

What this job cannot show, with one seed and one rate: that a controller beats the best fixed batch. It shows that the
batch it finds by itself beats the three it is shown beside.
"""

from __future__ import annotations

import adaptbatch as ab
from studies import data
from studies.engine.arms import Arm, Warmup
from studies.engine.runner import Run
from studies.engine.training import Task

NAME = "quick"
MICRO_BATCH = 32
TASK = Task(data="mnist", examples=130_000, micro_batch=MICRO_BATCH)

ARMS = (
    Arm("fixed 256", ab.Fixed(256 // MICRO_BATCH), lr=3e-3),
    # About 3e-3 times the root of the ratio of the batches, the usual rule for Adam.
    Arm("fixed 4096", ab.Fixed(4096 // MICRO_BATCH), lr=1e-2, max_steps=128),
    Arm("warmup 256", ab.Fixed(256 // MICRO_BATCH), lr=3e-3, schedule=Warmup(18_000)),
    Arm("adaptive", ab.RelativeStandardError(theta=1.0), lr=3e-3, max_steps=128),
)


def mean_image_loss() -> float:
    """Squared error on the probe set of the mean training image: what a collapsed network reaches."""
    mnist = data.load(TASK.data)
    probe = mnist.test_inputs[: TASK.probe_examples]
    return float(((probe - mnist.train_inputs.mean(axis=0)) ** 2).sum(axis=1).mean())


def runs(seed: int = 0, examples: int = TASK.examples) -> list[Run]:
    """The study's runs, all arms on one seed."""
    task = Task(data=TASK.data, examples=examples, micro_batch=TASK.micro_batch)
    return [Run(NAME, task, arm, seed) for arm in ARMS]
