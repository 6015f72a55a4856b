"""How far every estimator is from a noise scale that is known, on the same gradients."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from studies.questions.calibration.estimators import DIMENSION, ESTIMATORS, OURS, available, location
from studies.questions.overhead import one_thread

Array = NDArray[np.float64]
MICRO_BATCHES = 4


@dataclass(frozen=True)
class Setting:
    """A known truth and the micro-batches of every window.

    Attributes:
        name: In tables and figures.
        noise_scale: ``B`` [examples], with ``|G| = 1``.
        sizes: Examples of each micro-batch.
    """

    name: str
    noise_scale: float
    sizes: tuple[int, ...] = (32,) * MICRO_BATCHES

    @property
    def examples(self) -> int:
        """``n`` of one window."""
        return sum(self.sizes)

    def draw(self, rng: np.random.Generator) -> list[Tensor]:
        """One window's micro-batches ``[b, DIMENSION]`` of noise with ``tr(Sigma) = B``."""
        noise = rng.standard_normal((self.examples, DIMENSION)) * math.sqrt(self.noise_scale / DIMENSION)
        return list(torch.from_numpy(noise.astype(np.float32)).split(self.sizes))


SETTINGS = (
    Setting("B / n = 0.25", 32),
    Setting("B / n = 1", 128),
    Setting("B / n = 4", 512),
    Setting("B / n = 20 (2500 by 4 x 32)", 2500),
    # No peer promises these; a data set's end and batches of tokens bring them.
    Setting("B / n = 1, unequal (56, 40, 22, 10)", 128, sizes=(56, 40, 22, 10)),
)


@contextmanager
def _short_collections() -> Iterator[None]:
    """gns-pytorch collects garbage at each call; what already lives need not be looked at thousands of times."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def estimates(setting: Setting, windows: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """One repeat: every estimator on the same windows, read each time that one of ``windows`` has been heard.

    Returns:
        A row for each reading, with ``log(estimate / B)``; infinite where no signal is left.
    """
    rng, rows = np.random.default_rng(seed), []
    estimators = {name: ESTIMATORS[name][0](location(), setting.sizes) for name in available()}
    with one_thread(), _short_collections():
        for heard in range(1, max(windows) + 1):
            window = setting.draw(rng)
            for name, estimator in estimators.items():
                estimator.hear(window)
                if heard in windows:
                    ratio = estimator.noise_scale() / setting.noise_scale
                    log = math.log(ratio) if ratio > 0.0 else -math.inf
                    rows.append({"setting": setting.name, "windows": heard, "estimator": name, "log error": log})
    return [row | {"repeat": seed} for row in rows]


def error_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Bias and root mean square of ``log(estimate / B)``, with standard errors, of each estimator in each setting.

    ``further by`` compares with the controller on the same windows, in standard errors: below about -2 an estimator is
    closer to the truth than the controller. ``infinite`` is the share of repeats in which an estimate is 0 or infinite;
    then so is the root mean square.
    """
    table = []
    for (setting, windows), part in rows.groupby(["setting", "windows"], sort=False):
        wide = part.pivot_table(index="repeat", columns="estimator", values="log error")
        for name in part["estimator"].unique():
            row = {"setting": setting, "windows": windows, "estimator": name, "repeats": len(wide)}
            row |= _summary(wide[name].to_numpy(), wide[OURS].to_numpy())
            table.append(row | {"note": ESTIMATORS[name][2]})
    return pd.DataFrame(table)


def _summary(errors: Array, ours: Array) -> dict[str, float]:
    with np.errstate(invalid="ignore"):
        rms = math.sqrt(np.mean(errors**2))
        return {
            "bias": float(errors.mean()),
            "bias SE": _standard_error(errors),
            "rms": rms,
            # Of a square root: that of the mean square over twice the root.
            "rms SE": _standard_error(errors**2) / (2.0 * rms),
            "infinite": float(np.mean(np.isinf(errors))),
            "further by": further_by(errors, ours),
        }


def further_by(errors: Array, reference: Array) -> float:
    """Mean of ``errors^2 - reference^2`` over its standard error.

    0 where the two differ by single precision only; NaN where one is infinite.

    Example:
        >>> further_by(np.array([2.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0])).__round__(2)
        2.8
    """
    if np.allclose(errors, reference, rtol=0.0, atol=1e-4):
        return 0.0
    excess = errors**2 - reference**2
    return float(excess.mean()) / _standard_error(excess)


def _standard_error(values: Array) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))
