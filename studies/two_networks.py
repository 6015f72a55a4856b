"""Two networks, one rule: does the same default serve a noisy and a well-behaved 80-layer residual VAE on MNIST?

``noisy``: each branch normalised after its activation, unscaled skips, Adam at 1e-2, micro-batches of 256: at a fixed
batch of 256 the training loss spikes. ``calm``: branches scaled by 1/sqrt(L), Adam at 3e-3, micro-batches of 64. All
arms of a network share rate, examples and seeds; the adaptive arm is the default rule on both.

A spike is a micro-batch training loss above twice the running median of the 100 before it, after the first tenth of
training (:func:`studies.analysis.spike_flags`); counted by micro-batch in every arm, so that averaging hides none.
"""

from __future__ import annotations

from typing import Literal

import adaptbatch as ab
from studies.runner import Run
from studies.training import Arm, Task

STUDY = "two-networks"
Network = Literal["noisy", "calm"]

TASKS: dict[Network, Task] = {
    "noisy": Task("mnist", 600_000, micro_batch=256, probe_every=20_000, residual="identity", norm="branch"),
    "calm": Task("mnist", 600_000, micro_batch=64, probe_every=20_000),
}
RATES: dict[Network, float] = {"noisy": 1e-2, "calm": 3e-3}
BATCHES: dict[Network, tuple[int, ...]] = {"noisy": (256, 512, 1024, 4096), "calm": (64, 128, 256, 1024)}


def arms(network: Network) -> list[Arm]:
    """The fixed batches of a network, and the default rule."""
    micro_batch, lr = TASKS[network].micro_batch, RATES[network]
    fixed = [Arm(f"fixed {n}", ab.Fixed(n // micro_batch), lr=lr) for n in BATCHES[network]]
    return [*fixed, Arm("adaptive", ab.RelativeStandardError(), lr=lr)]


def runs(network: Network, seeds: int) -> list[Run]:
    """All arms on seeds ``0 .. seeds - 1``, seed by seed, so that an interrupted study is balanced."""
    study = f"{STUDY} {network}"
    return [Run(study, TASKS[network], arm, seed) for seed in range(seeds) for arm in arms(network)]
