"""The rules in closed loop with a noise scale that is known: how often, how well and how late does ``k`` follow?

A window of ``k`` micro-batches is drawn from the exact distribution of its squared norms for Gaussian examples in
``DIMENSION`` equal directions, with ``|G| = 1`` (times a factor) and ``tr(Sigma) = B |G|^2``. What is beyond that is
explicit: examples of Student's t are cells' vectors, and at the noise floor the parameters are a vector too, moved by
gradient descent. Nowhere else do they respond: this is the controller alone, a few seconds for a run.

The loss is that of the valley in which CABS is derived, ``|G|^2 = 2 loss / lr`` at ``lr = 1``; a window takes
``STEP_SECONDS + EXAMPLE_SECONDS n``; the examples are a stream, without a population.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import joblib
import numpy as np
import pandas as pd

import adaptbatch as ab
from adaptbatch import estimate
from adaptbatch.records import WindowCounts, WindowResult
from adaptbatch.state import State

CELL, DIMENSION, EXAMPLES = 32, 20, 3e6
LIMITS = ab.Limits(max_steps=256)
# In the units of EXAMPLE_SECONDS, one update costs as much as 400 examples.
STEP_SECONDS, EXAMPLE_SECONDS = 0.4, 0.001
# Learning rate times curvature along each direction of the valley. At the stationary point of gradient descent B / n is
# FLOOR whatever n: each direction has |G_i|^2 = (s_i^2 / n) r_i / (2 - r_i).
RATES = np.geomspace(0.04, 1.3, DIMENSION)
FLOOR = 1.0 / float(np.mean(RATES / (2.0 - RATES)))
# A catastrophic window's gradients are longer by a factor between these.
CATASTROPHE = (1e3, 1e4)


@dataclass(frozen=True)
class Profile:
    """A course of the noise scale, and of the gradient's length, over training from ``u = 0`` to ``1``.

    Attributes:
        name: In tables and figures.
        noise_scale: ``B(u)`` [examples].
        length: ``|G|(u)``; the decision must not depend on it.
        moving: Whether a rule has something to follow.
        floor: Whether the parameters respond, from ``B(0)`` on: descent in a valley, which ends where ``B = FLOOR n``.
        student: Degrees of freedom of the examples' multivariate t, infinite for Gaussian ones.
        catastrophes: Share of windows whose gradients are a thousand to ten thousand times longer.
    """

    name: str
    noise_scale: Callable[[float], float]
    length: Callable[[float], float] = lambda u: 1.0
    moving: bool = False
    floor: bool = False
    student: float = math.inf
    catastrophes: float = 0.0

    def truth(self, u: float, batch: float) -> float:
        """The noise scale that a rule is compared to [examples]."""
        return FLOOR * batch if self.floor else self.noise_scale(u)


PROFILES = (
    Profile("ramp x32", lambda u: 64 * 32**u, moving=True),
    Profile("step x16", lambda u: 128 * (16 if u > 0.5 else 1), moving=True),
    Profile("hump x32", lambda u: 64 * 32 ** (1 - abs(2 * u - 1)), moving=True),
    Profile("constant", lambda u: 400),
    Profile("constant, |G| over 6 decades", lambda u: 400, lambda u: 10 ** (3 - 6 * u)),
    Profile("noise floor", lambda u: 64, floor=True),
    Profile("fast rise x32", lambda u: 64 * 32 ** min(max(10 * u - 3, 0), 1)),
    Profile("Student's t, 5 degrees", lambda u: 400, student=5.0),
    Profile("Student's t, 3 degrees", lambda u: 400, student=3.0),
    Profile("Student's t, 2.2 degrees", lambda u: 400, student=2.2),
    Profile("catastrophes", lambda u: 400, catastrophes=1 / 400),
    Profile("ramp x32, catastrophes", lambda u: 64 * 32**u, catastrophes=1 / 400),
)

# Where a rule has a knob for the batch it looks for, it is set to n = B, with the noise that |g|^2 contains counted in:
# tr(Sigma) / (n |g|^2) is 1/2 at n = B, the cosine of two halves 1/3. Pareto and Goodput look for sqrt(400 B).
RULES: dict[str, ab.rules.Rule] = {
    "CLT": ab.RelativeStandardError(),
    "CLT, pooled": ab.RelativeStandardError(channel="pooled"),
    "CLT, holds at floor": ab.RelativeStandardError(at_floor="hold"),
    "CLT, guarded": ab.RelativeStandardError(),
    "CLT, listens less": ab.RelativeStandardError(),
    "standard error": ab.StandardError(reference_batch=400),
    "CLT or standard error": ab.RelativeStandardError() | ab.StandardError(reference_batch=400),
    "norm test": ab.rules.NormTest(theta=math.sqrt(0.5)),
    "norm test, debiased": ab.rules.NormTest(theta=1.0, debiased=True, grow_only=False),
    "inner product": ab.rules.InnerProductTest(nu=math.sqrt(0.5)),
    "cosine": ab.rules.CosineSimilarity(target=1 / 3),
    "CABS": ab.rules.CABS(scale=0.5),
    "noise scale": ab.rules.NoiseScale(),
    "Pareto": ab.Pareto(price=STEP_SECONDS / EXAMPLE_SECONDS),
    "goodput": ab.rules.Goodput(initial_batch=2 * CELL),
    "DiveBatch": ab.rules.DiveBatch(delta=1.0, epoch_examples=50_000),
}
# Rules that are run with one; nothing is there to be skipped.
GUARDS = {"CLT, guarded": ab.Guard(max_skips=0)}
# Those that do not measure every window.
LISTENS: dict[str, ab.estimate.Listen] = {"CLT, listens less": "auto"}
DEFAULT = "CLT"


COLUMNS = (
    "examples_seen",
    "accumulation_steps",
    "true_noise_scale",
    "reason",
    "listened",
    "noise_scale_low",
    "noise_scale_high",
)


def simulate(
    rule: ab.rules.Rule,
    profile: Profile,
    seed: int,
    examples: float = EXAMPLES,
    consecutive: bool = False,
    guard: ab.Guard | None = None,
    listen: ab.estimate.Listen = 1.0,
) -> pd.DataFrame:
    """One run: a row for each window with its size, the true noise scale and its interval, and the decision's reason.

    Args:
        rule: Decides from what it would hear in training.
        profile: What the truth is.
        seed: Of all draws.
        examples: Length of the run.
        consecutive: Whether the inner product of consecutive gradients is measured.
        guard: Overrules the rule upwards.
        listen: How many windows are measured.
    """
    rng, state, rows = np.random.default_rng(seed), State(ab.records.Progress(accumulation_steps=2)), []
    position, last = _start(profile), np.full(DIMENSION, math.nan)
    while state.progress.examples_seen < examples:
        u, k = state.progress.examples_seen / examples, state.progress.accumulation_steps
        mean, variance = _moments(profile, u, position)
        window, gradient = draw_window(rng, k, mean, variance, profile.student)
        if profile.catastrophes > 0.0 and rng.random() < profile.catastrophes:
            factor = math.exp(rng.uniform(*np.log(CATASTROPHE)))
            window, gradient = longer(window, factor), factor * gradient
        listened = state.progress.listens
        if not listened:
            window = replace(window, weighted_sq_norms=math.nan, radial_sq_norms=math.nan)
        if consecutive:
            window, last = replace(window, consecutive_product=float(gradient @ last)), gradient
        if position is not None:
            position = position - gradient
        n = window.global_batch
        result = WindowResult(window, loss=0.5 * float(mean @ mean), lr=1.0)
        counts = WindowCounts(n, k, step_seconds=STEP_SECONDS, seconds=EXAMPLE_SECONDS * n)
        state, evidence, decision = state.advance(counts, [result], rule, LIMITS, guard, listen)
        truth, interval = profile.truth(u, n), estimate.noise_scale_interval(evidence.typical)
        rows.append((state.progress.examples_seen, k, truth, decision.reason, listened, *interval))
    return pd.DataFrame(rows, columns=COLUMNS)


def _start(profile: Profile) -> np.ndarray | None:
    """Where descent begins: ``|G|^2 = tr(Sigma) / B(0)``, alike in all directions; None where nothing responds."""
    return 1.0 / (math.sqrt(profile.noise_scale(0.0)) * RATES) if profile.floor else None


def _moments(profile: Profile, u: float, position: np.ndarray | None) -> tuple[np.ndarray, float]:
    """``G`` and the variance of an example's gradient along each direction."""
    if position is not None:
        return RATES * position, 1.0
    mean, length = np.zeros(DIMENSION), profile.length(u)
    mean[0] = length
    return mean, length**2 * profile.noise_scale(u) / DIMENSION


def draw_window(
    rng: np.random.Generator, cells: int, mean: np.ndarray, variance: float, student: float = math.inf
) -> tuple[ab.records.Measurement, np.ndarray]:
    """The squared norms of ``cells`` micro-batches, and their mean gradient.

    For Gaussian examples the cells' deviations are independent of their mean ``g`` and as large in every direction:
    their sums of squares along ``g`` and across it are chi-squares with ``K - 1`` and ``(d - 1)(K - 1)`` degrees of
    freedom. Examples of a multivariate t are Gaussian ones with a random scale each, and so are cells given the scales.

    Args:
        rng: Of all draws.
        cells: ``K``.
        mean: ``G``.
        variance: Of one example along each direction, so that ``tr(Sigma) = d variance``.
        student: Degrees of freedom, above 2.
    """
    n, d = float(cells * CELL), len(mean)
    if math.isfinite(student):
        scales = (student - 2.0) / rng.chisquare(student, size=(cells, CELL))
        deviations = np.sqrt(variance * scales.mean(axis=1) / CELL)
        each = mean + deviations[:, None] * rng.standard_normal((cells, d))
        gradient = each.mean(axis=0)
        sq_norm = float(gradient @ gradient)
        total, radial = CELL * float(np.sum(each**2)), CELL * float(np.sum((each @ gradient) ** 2)) / sq_norm
    else:
        gradient = mean + math.sqrt(variance / n) * rng.standard_normal(d)
        sq_norm = float(gradient @ gradient)
        radial = n * sq_norm + variance * rng.chisquare(cells - 1)
        total = radial + variance * rng.chisquare((d - 1) * (cells - 1))
    return ab.records.Measurement(total, sq_norm, n, cells, radial), gradient


def longer(window: ab.records.Measurement, factor: float) -> ab.records.Measurement:
    """The window, had every gradient in it been ``factor`` times longer."""
    return replace(
        window,
        weighted_sq_norms=factor**2 * window.weighted_sq_norms,
        batch_sq_norm=factor**2 * window.batch_sq_norm,
        radial_sq_norms=factor**2 * window.radial_sq_norms,
    )


def measure(run: pd.DataFrame) -> dict[str, float]:
    """Switches, reversals, rms log error of ``k``, lag and shares of windows of one run.

    The error is against the smallest batch with relative error at most 1 that the limits allow, over windows after the
    first twentieth of the examples; the lag is the delay of the true noise scale that makes this error smallest. Shares
    are of windows at the limits, of those whose decision was ``noise_floor`` or ``guard``, of those that were measured,
    and of those after the first twentieth whose 95 % interval holds the true noise scale.
    """
    late = run[run["examples_seen"] > 0.05 * run["examples_seen"].iloc[-1]]
    low, high = late["noise_scale_low"], late["noise_scale_high"]
    k, moves = run["accumulation_steps"].to_numpy(), np.diff(run["accumulation_steps"])
    directions = np.sign(moves[moves != 0])
    return {
        "switches": len(directions),
        "reversals": int((np.diff(directions) != 0).sum()),
        "rms log error": _rms_log_error(run, delay=0.0),
        "lag": _lag(run),
        "at limits": float(np.isin(k, [2, LIMITS.max_steps]).mean()),
        "noise floor": float((run["reason"] == "noise_floor").mean()),
        "guard": float((run["reason"] == "guard").mean()),
        "measured": float(run["listened"].mean()),
        "covered": float(late["true_noise_scale"].between(low, high).mean()),
    }


def _rms_log_error(run: pd.DataFrame, delay: float) -> float:
    seen = run["examples_seen"].to_numpy()
    wanted = np.interp(seen - delay, seen, run["true_noise_scale"]) / CELL
    error = np.log(run["accumulation_steps"].to_numpy() / np.clip(wanted, 2, LIMITS.max_steps))
    return float(np.sqrt(np.mean(error[seen > 0.05 * seen[-1]] ** 2)))


def _lag(run: pd.DataFrame) -> float:
    delays = np.linspace(0.0, 0.2 * run["examples_seen"].iloc[-1], 81)
    return float(delays[np.argmin([_rms_log_error(run, delay) for delay in delays])])


def run_study(seeds: int, workers: int, examples: float = EXAMPLES) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The measures of every rule on every profile and seed, a row for each run, and all windows of the default rule."""
    jobs = [(rule, profile.name, seed) for rule in RULES for profile in PROFILES for seed in range(seeds)]
    found = joblib.Parallel(n_jobs=workers)(joblib.delayed(_run)(*job, examples) for job in jobs)
    runs = pd.DataFrame([measures for measures, _ in found])
    return runs, pd.concat([windows for _, windows in found if windows is not None], ignore_index=True)


def _run(rule: str, profile: str, seed: int, examples: float) -> tuple[dict[str, str | float], pd.DataFrame | None]:
    # A profile holds functions, which do not travel to another process; its name does.
    truth = next(known for known in PROFILES if known.name == profile)
    names = {"rule": rule, "profile": profile, "seed": seed}
    windows = simulate(RULES[rule], truth, seed, examples, guard=GUARDS.get(rule), listen=LISTENS.get(rule, 1.0))
    return names | measure(windows), windows.assign(**names) if rule == DEFAULT else None


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, and the worst seed's switches, for each rule and profile.

    The error of ``k`` is its distance from ``n = B`` for every rule, also for one that looks for another batch (see
    :data:`RULES`); and at the noise floor from ``n = FLOOR n``, which no batch below ``max_steps`` is. Where nothing
    moves the lag means nothing.
    """
    by = runs.groupby(["rule", "profile"], sort=False)
    means = by[[name for name in runs if name not in ("rule", "profile", "seed")]].mean()
    return means.assign(**{"most switches": by["switches"].max()}).reset_index()
