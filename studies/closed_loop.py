"""The rules in closed loop with a noise scale that is known: how often, how well and how late does ``k`` follow?

A window of ``k`` micro-batches is drawn from the exact distribution of its squared norms for Gaussian examples in
``DIMENSION`` equal directions, with ``|G| = 1`` (times a factor) and ``tr(Sigma) = B |G|^2``. The parameters do not
respond: this is the controller alone, a second or two for a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import joblib
import numpy as np
import pandas as pd

import adaptbatch as ab

CELL, DIMENSION, EXAMPLES = 32, 20, 3e6
LIMITS = ab.Limits(max_steps=256)


@dataclass(frozen=True)
class Profile:
    """A course of the noise scale, and of the gradient's length, over training from ``u = 0`` to ``1``.

    Attributes:
        name: In tables and figures.
        noise_scale: ``B(u)`` [examples].
        length: ``|G|(u)``; the decision must not depend on it.
    """

    name: str
    noise_scale: Callable[[float], float]
    length: Callable[[float], float] = lambda u: 1.0


PROFILES = (
    Profile("ramp x32", lambda u: 64 * 32**u),
    Profile("step x16", lambda u: 128 * (16 if u > 0.5 else 1)),
    Profile("hump x32", lambda u: 64 * 32 ** (1 - abs(2 * u - 1))),
    Profile("constant", lambda u: 400),
    Profile("constant, |G| over 6 decades", lambda u: 400, lambda u: 10 ** (3 - 6 * u)),
)


def simulate(rule: ab.Rule, profile: Profile, seed: int, examples: float = EXAMPLES) -> pd.DataFrame:
    """One run: a row for each window with its size, the true noise scale and the decision's reason."""
    rng, tracker, changed, rows = np.random.default_rng(seed), ab.NoiseTracker(), -math.inf, []
    at = ab.Progress(accumulation_steps=2, cell_examples=CELL)
    while at.examples_seen < examples:
        u = at.examples_seen / examples
        window = draw_window(rng, at.accumulation_steps, profile.noise_scale(u), profile.length(u))
        seen = at.examples_seen + window.global_batch
        at = replace(at, window=at.window + 1, examples_seen=seen, examples_since_change=seen - changed)
        memory = ab.noise.memory_examples(rule.memory, CELL, window.global_batch)
        tracker = tracker.update(ab.noise.estimate(window), window.global_batch, memory)
        decision = ab.decide(rule, tracker.estimate(), at, LIMITS)
        rows.append((seen, at.accumulation_steps, profile.noise_scale(u), decision.reason))
        changed = seen if decision.accumulation_steps != at.accumulation_steps else changed
        at = replace(at, accumulation_steps=decision.accumulation_steps)
    table = pd.DataFrame(rows, columns=["examples_seen", "accumulation_steps", "true_noise_scale", "reason"])
    return table.assign(profile=profile.name, rule=repr(rule), seed=seed)


def draw_window(rng: np.random.Generator, cells: int, noise_scale: float, length: float) -> ab.Measurement:
    """The squared norms of ``cells`` micro-batches of Gaussian examples: chi-squares, no vectors."""
    n, per_direction = cells * CELL, length**2 * noise_scale / DIMENSION
    along = (length + math.sqrt(per_direction / n) * rng.standard_normal()) ** 2
    mean_sq = along + per_direction / n * rng.chisquare(DIMENSION - 1)
    within = per_direction * rng.chisquare(DIMENSION * (cells - 1))
    return ab.Measurement(within + n * mean_sq, mean_sq, float(n), cells)


def measure(run: pd.DataFrame) -> dict[str, float]:
    """Switches, reversals, rms log error of ``k``, lag and share of windows at the limits of one run.

    The error is against the smallest batch with relative error at most 1 that the limits allow, over windows after the
    first twentieth of the examples; the lag is the delay of the true noise scale that makes this error smallest.
    """
    k, moves = run["accumulation_steps"].to_numpy(), np.diff(run["accumulation_steps"])
    directions = np.sign(moves[moves != 0])
    return {
        "switches": len(directions),
        "reversals": int((np.diff(directions) != 0).sum()),
        "rms log error": _rms_log_error(run, delay=0.0),
        "lag": _lag(run),
        "at limits": float(np.isin(k, [2, LIMITS.max_steps]).mean()),
    }


def _rms_log_error(run: pd.DataFrame, delay: float) -> float:
    seen = run["examples_seen"].to_numpy()
    wanted = np.interp(seen - delay, seen, run["true_noise_scale"]) / CELL
    error = np.log(run["accumulation_steps"].to_numpy() / np.clip(wanted, 2, LIMITS.max_steps))
    return float(np.sqrt(np.mean(error[seen > 0.05 * seen[-1]] ** 2)))


def _lag(run: pd.DataFrame) -> float:
    delays = np.linspace(0.0, 0.2 * run["examples_seen"].iloc[-1], 81)
    return float(delays[np.argmin([_rms_log_error(run, delay) for delay in delays])])


def run_study(rules: Sequence[ab.Rule], seeds: int, workers: int) -> pd.DataFrame:
    """All windows of every rule on every profile and seed."""
    jobs = [(rule, profile.name, seed) for rule in rules for profile in PROFILES for seed in range(seeds)]
    tables = joblib.Parallel(n_jobs=workers)(joblib.delayed(_named)(*job) for job in jobs)
    return pd.concat(tables, ignore_index=True)


def _named(rule: ab.Rule, name: str, seed: int) -> pd.DataFrame:
    # A profile holds functions, which do not travel to another process; its name does.
    return simulate(rule, next(profile for profile in PROFILES if profile.name == name), seed)


def table(windows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, and the worst seed's switches, for each rule and profile."""
    runs = [
        {"rule": rule, "profile": profile, "seed": seed} | measure(run)
        for (rule, profile, seed), run in windows.groupby(["rule", "profile", "seed"], sort=False)
    ]
    by = pd.DataFrame(runs).groupby(["rule", "profile"], sort=False)
    means = by[["switches", "reversals", "rms log error", "lag", "at limits"]].mean()
    return means.assign(**{"most switches": by["switches"].max()}).reset_index()
