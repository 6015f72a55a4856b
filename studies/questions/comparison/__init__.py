"""The main study: does a batch that follows the measured noise help, where, and compared with what?

Pre-registered, before any of its reported runs (tuning runs are on seeds of their own):

* Tasks: a *noisy* 80-layer residual VAE (branches normalised, skips not scaled) and a *calm* one (branches scaled by
  1/sqrt(L)), each on MNIST (hyper-parameters are tuned there), Fashion-MNIST and Shuttle (hyper-parameters are carried
  over). Class 0, on Shuttle the anomalies, is not trained on.
* Every arm has the same number of trials over the same learning rates (:mod:`studies.engine.tuning`), chosen by
  ``final`` (:mod:`studies.engine.reduce`) on tuning seeds, reported on fresh ones. Budgets are in examples.
* Target of a task: 1.05 times the median ``final`` of its best fixed batch. Examples to target: of the first evaluation
  whose mean with the four before is at or below it, infinite if there is none.
* W1: adaptive (theta = 1) is not inferior to the best fixed batch, tuned for itself, in examples to target, with a
  margin of 10 %, on at least 80 % of the tasks: the upper end of the 95 % interval of the ratio is below 1.10.
* W2: adaptive has a lower regret than every fixed batch when hyper-parameters are carried over to another data set, or
  reaches the best fixed batch's loss at a lower cost that includes the trials.
* W3: adaptive does not diverge more often than the largest fixed batch, at the rate at which the smallest spikes.
* W4: neither a replay of its recorded batches on another seed nor a learning rate that follows them does what it does:
  else the claim is about a schedule or a rate, not about feedback.

A claim is supported if its whole interval says so, not supported if the whole interval says the contrary, else
undecided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

import adaptbatch as ab
from studies.engine.arms import Arm, Follow, Warmup
from studies.engine.reduce import recorded_steps
from studies.engine.runner import Run
from studies.engine.sweep import SHARED, Found, Options, Study, from_runs
from studies.engine.training import Task
from studies.engine.tuning import Range, best_of, trials
from studies.output import verdicts
from studies.questions.comparison.figure import draw

Network = Literal["noisy", "calm"]
Params = Mapping[str, float]

ANOMALIES: dict[str, int] = {"mnist": 0, "fashion": 0, "shuttle": 1, "digits": 0}
LR = Range(1e-4, 1e-1)
MICRO_BATCH = 64
BATCHES = (64, 128, 256, 512, 1024)
TUNING_SEED = 1000


@dataclass(frozen=True)
class Scale:
    """Sizes of a preset."""

    examples: int
    widths: tuple[int, int]
    layers: int
    trials: int
    tuning_seeds: int
    seeds: int
    stress_seeds: int
    home: str = "mnist"
    away: tuple[str, ...] = ("fashion", "shuttle")


SCALES: dict[str, Scale] = {
    "smoke": Scale(2_000, (16, 8), 8, trials=2, tuning_seeds=1, seeds=2, stress_seeds=2, home="digits", away=()),
    "laptop": Scale(128_000, (64, 16), 80, trials=8, tuning_seeds=1, seeds=5, stress_seeds=10),
    "paper": Scale(10_800_000, (128, 32), 80, trials=20, tuning_seeds=3, seeds=20, stress_seeds=30),
}


def task(network: Network, data: str, scale: Scale) -> Task:
    """An 80-layer residual VAE on a data set without its anomalies."""
    shared = Task(
        data,
        scale.examples,
        MICRO_BATCH,
        probe_examples=512,
        probe_every=scale.examples // 100,
        depth=scale.layers,
        widths=scale.widths,
        anomaly=ANOMALIES[data],
    )
    if network == "calm":
        return shared
    # Four of the layers are projections without a skip.
    return replace(shared, depth=scale.layers + 4, residual="identity", norm="branch")


@dataclass(frozen=True)
class Method:
    """A way to train that is tuned: its learning rate and at most one knob of its own.

    Attributes:
        name: Of the arm.
        make: The arm at given hyper-parameters.
        knob: Range of ``params["knob"]``; None: the learning rate alone.
        networks: Where it is a method of its own.
    """

    name: str
    make: Callable[[Params], Arm]
    knob: Range | None = None
    networks: tuple[Network, ...] = ("noisy", "calm")

    def arm(self, params: Params) -> Arm:
        """Its arm, under its name."""
        return replace(self.make(params), name=self.name)


def fixed(batch: int) -> ab.rules.Rule:
    """A fixed batch."""
    return ab.Fixed(batch // MICRO_BATCH)


SMALL = fixed(BATCHES[0])
METHODS: tuple[Method, ...] = (
    *(Method(f"fixed {n}", lambda p, n=n: Arm("", fixed(n), p["lr"])) for n in BATCHES),  # type: ignore[misc]
    Method("adaptive", lambda p: Arm("", ab.RelativeStandardError(), p["lr"])),
    Method("adaptive, theta", lambda p: Arm("", ab.RelativeStandardError(p["knob"]), p["lr"]), Range(0.25, 2.0)),
    Method("adaptive, clip", lambda p: Arm("", ab.RelativeStandardError(), p["lr"], clip=p["knob"]), Range(1.0, 1e3)),
    Method(
        "adaptive, sqrt rate",
        lambda p: Arm("", ab.RelativeStandardError(), p["lr"], coupling=ab.LearningRate("sqrt", 2 * MICRO_BATCH)),
    ),
    Method("warmup", lambda p: Arm("", SMALL, p["lr"], schedule=Warmup(p["knob"])), Range(2e3, 1e5)),
    Method("ramp", lambda p: Arm("", ab.Ramp(1, 16, p["knob"]), p["lr"]), Range(1e4, 1e5)),
    Method("clip", lambda p: Arm("", SMALL, p["lr"], clip=p["knob"]), Range(1.0, 1e3)),
    Method("beta2", lambda p: Arm("", SMALL, p["lr"], beta2=1 - p["knob"]), Range(1e-4, 1e-1)),
    Method("radam", lambda p: Arm("", SMALL, p["lr"], optimizer="radam")),
    Method("rezero", lambda p: Arm("", SMALL, p["lr"], residual="rezero")),
    Method("scaled branches", lambda p: Arm("", SMALL, p["lr"], residual="scaled"), networks=("noisy",)),
)
ADAPTIVE = "adaptive"
TRANSFERRED = (*(f"fixed {n}" for n in BATCHES), ADAPTIVE, "warmup", "clip")
STRESSED = (*(f"fixed {n}" for n in BATCHES), ADAPTIVE, "warmup", "clip", "radam", "rezero", "scaled branches")
# At which the smallest batch spikes on the noisy network, and what else the stressed arms are given.
STRESS_LR, STRESS_KNOBS = 1e-2, {"warmup": 2e4, "clip": 100.0}


def points(method: Method, scale: Scale) -> list[dict[str, float]]:
    """A method's trials: the same learning rates for every method."""
    return trials({"lr": LR} | ({"knob": method.knob} if method.knob else {}), scale.trials)


def plan(options: Options, found: Found) -> list[Run]:
    """Tuning; the tuned arms on fresh seeds; controls of the adaptive arm; other data; the stress rate."""
    scale = SCALES[options.preset]
    seeds = range(options.seeds or scale.seeds)
    home, *away = options.data or (scale.home, *scale.away)
    runs = [run for network in _NETWORKS for method in _of(network) for run in tuning(method, network, home, scale)]
    for network in _NETWORKS:
        best = {m.name: chosen for m in _of(network) if (chosen := choose(m, network, home, scale, found)) is not None}
        for name, params in best.items():
            runs += [labelled("final", network, home, scale, _METHOD[name].arm(params), s, name) for s in seeds]
        if "fixed 64" in best:
            lower = replace(_METHOD["fixed 64"].arm(best["fixed 64"]), lr=best["fixed 64"]["lr"] / 4, name="lower rate")
            runs += [labelled("final", network, home, scale, lower, s, "lower rate") for s in seeds]
        if ADAPTIVE in best:
            arm = _METHOD[ADAPTIVE].arm(best[ADAPTIVE])
            runs += [run for s in seeds for run in _controls(arm, network, home, scale, s, len(seeds), found)]
        for data in away:
            names = [name for name in TRANSFERRED if name in best]
            runs += [
                labelled("away", network, data, scale, _METHOD[n].arm(best[n]), s, n) for n in names for s in seeds
            ]
    stress = range(options.seeds or scale.stress_seeds)
    for name in STRESSED:
        arm = _METHOD[name].arm({"lr": STRESS_LR, "knob": STRESS_KNOBS.get(name, _NAN)})
        runs += [labelled("stress", "noisy", home, scale, arm, s, name) for s in stress]
    return runs


_NETWORKS: tuple[Network, ...] = ("noisy", "calm")
_METHOD = {method.name: method for method in METHODS}
_NAN = float("nan")


def _of(network: Network) -> list[Method]:
    return [method for method in METHODS if network in method.networks]


def labelled(
    stage: str, network: Network, data: str, scale: Scale, arm: Arm, seed: int, method: str, trial: int = -1
) -> Run:
    """A run of the comparison with its labels."""
    labels = {"stage": stage, "network": network, "data": data, "method": method, "trial": trial, "lr": arm.lr}
    return Run(SHARED, task(network, data, scale), arm, seed, tuple(labels.items()))


def tuning(method: Method, network: Network, data: str, scale: Scale) -> Iterator[Run]:
    """A method's trials on the tuning seeds."""
    for index, params in enumerate(points(method, scale)):
        for seed in range(TUNING_SEED, TUNING_SEED + scale.tuning_seeds):
            yield labelled("tune", network, data, scale, method.arm(params), seed, method.name, index)


def choose(method: Method, network: Network, data: str, scale: Scale, found: Found) -> dict[str, float] | None:
    """The trial with the smallest mean ``final`` over the tuning seeds; None before all are finished."""
    return best_of(points(method, scale), [found.get(run) for run in tuning(method, network, data, scale)])


def _controls(
    arm: Arm, network: Network, data: str, scale: Scale, seed: int, seeds: int, found: Found
) -> Iterator[Run]:
    """What is not feedback: the batches recorded on the seed before, in other hands."""
    recorded = found.get(labelled("final", network, data, scale, arm, (seed - 1) % seeds, ADAPTIVE))
    if recorded is None:
        return
    k = recorded_steps(recorded)
    ends, batches = np.cumsum(k) * float(MICRO_BATCH), k * float(MICRO_BATCH)
    start = fixed(2 * MICRO_BATCH)
    mean = max(2, round(recorded["mean_batch"] / MICRO_BATCH))
    follow = Follow(tuple(ends.tolist()), tuple(batches.tolist()), reference=2.0 * MICRO_BATCH)
    # The same stretches of constant k, in a random order.
    stretches = np.split(k, np.flatnonzero(np.diff(k)) + 1)
    order = np.random.default_rng(seed).permutation(len(stretches))
    shuffled = np.concatenate([stretches[index] for index in order])
    variants = {
        "replay": replace(arm, rule=ab.rules.Replay(tuple(k.tolist()))),
        "rate follows root": replace(arm, rule=start, schedule=follow),
        "rate follows": replace(arm, rule=start, schedule=replace(follow, power=1.0)),
        "constant mean": replace(arm, rule=ab.Fixed(mean)),
        "random switching": replace(arm, rule=ab.rules.Replay(tuple(shuffled.tolist()))),
    }
    for name, variant in variants.items():
        yield labelled("control", network, data, scale, replace(variant, name=name), seed, name)


STUDY = Study(
    "comparison",
    "adaptive against fixed batches, warmup, clipping and more, all tuned alike",
    plan,
    from_runs(verdicts.tables),
    order=2,
    figures=draw,
)
