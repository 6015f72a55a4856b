r"""The learning rate and Adam's second moment follow the batch, if asked to. Floats only, no torch.

A batch gradient of ``n`` examples has ``E|g_n|^2 = |G|^2 + phi(n) tr(Sigma)``. Three things were chosen for a batch
``n0`` and may follow when ``n`` leaves it: the learning rate (with the square root of ``n``, with ``n``, or with the
gain ``E|g_n0|^2 / E|g_n|^2``), the half-life of the second moment, and the second moment itself, which still knows the
old batch. Nothing is coupled by default: a growing batch at a fixed learning rate is an implicit decay, and a
stabiliser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from adaptbatch.estimate import inverse_size
from adaptbatch.records import NoiseEstimate
from adaptbatch.schema import Positive, PositiveOrNan

Scaling = Literal["none", "sqrt", "linear", "gain", "sqrt_gain"]
Beta2 = Literal["fixed", "half-life"]

#: Below a half-life of 7 steps the second moment is the gradient's own; above 7000 it lags behind the training.
BETA2_RANGE = (0.9, 0.9999)


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What one optimizer step changes, and all that the next adjustment has to know: plain floats, for a checkpoint.

    ``Adjustment(**dataclasses.asdict(adjustment))`` is the same value.

    Attributes:
        lr_factor: Multiplies every group's learning rate for this step; 1 leaves it.
        beta2_exponent: Each group's ``beta2`` becomes ``half_life_beta2(beta2, beta2_exponent)``; 1 leaves it. An
            exponent, so that groups may differ.
        second_moment_factor: Multiplies the second moment once, before this step; 1 leaves it.
        batch: ``n`` it was made for [examples]; NaN before the first.
        reference_batch: ``n0`` [examples]; NaN before the first.
    """

    lr_factor: Positive = 1.0
    beta2_exponent: Positive = 1.0
    second_moment_factor: Positive = 1.0
    batch: PositiveOrNan = math.nan
    reference_batch: PositiveOrNan = math.nan


UNTOUCHED = Adjustment()


@dataclass(frozen=True)
class LearningRate:
    """Couples the learning rate and the second moment to the batch; as it stands it adjusts nothing.

    With ``n`` the batch, ``n0`` the reference and ``r(n) = E|g_n0|^2 / E|g_n|^2 = (B/n0 + 1) / (B/n + 1)``, the
    learning rate moves towards ``lr * factor``::

        none  1        sqrt  sqrt(n / n0)        linear  n / n0        gain  r(n)        sqrt_gain  sqrt(r(n))

    ``gain`` is the number of steps at ``n0`` that one step at ``n`` is worth, at most ``1 + B/n0``: for SGD. Its root
    is for Adam, which already divides by the gradient's size.

    When it is wrong: ``sqrt`` and ``linear`` ignore that a batch beyond the noise scale averages noise that is no
    longer there; ``gain`` is as good as the pooled evidence, and holds still where there is none. After a growth the
    rescaled second moment meets a first moment that still holds the old noise: for the ``1/(1 - beta1)`` steps of its
    memory, updates are longer, by at most the root of the growth.

    Args:
        scaling: The line above.
        reference_batch: ``n0``, the batch that the learning rate and ``beta2`` were chosen for [examples]; None: the
            batch of the first step.
        max_factor: Cap on the factor and on its inverse [1].
        max_change: Largest ratio of the factors of two consecutive steps, both ways; the first step counts from 1.
        beta2: ``"half-life"`` keeps the memory of the second moment in *examples*, ``beta2^(n / n0)``.
        rescale_second_moment: When the batch goes from ``m`` to ``n``, multiply the second moment by
            ``E|g_n|^2 / E|g_m|^2``, which it would otherwise take ``1/(1 - beta2)`` steps to learn.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        sqrt: Malladi et al. 2022, arXiv:2205.10287. linear: Goyal et al. 2017, arXiv:1706.02677. gain: Johnson et al.
        2020 (AdaScale), arXiv:2007.05105. sqrt_gain: Qiao et al. 2021 (AdaptDL), arXiv:2008.12260. half-life: Marek
        et al. 2025, arXiv:2507.07101.

    Example:
        >>> coupling = LearningRate("sqrt", reference_batch=256, max_change=4.0)
        >>> coupling.adjust(1024, NoiseEstimate(1.0, 256.0)).lr_factor
        2.0
        >>> LearningRate("gain", 256, max_change=4.0).adjust(1024, NoiseEstimate(1.0, 256.0)).lr_factor
        1.6
    """

    scaling: Scaling = "none"
    reference_batch: float | None = None
    max_factor: float = 4.0
    max_change: float = 1.1
    beta2: Beta2 = "fixed"
    rescale_second_moment: bool = False

    def __post_init__(self) -> None:
        _require_one_of("scaling", self.scaling, get_args(Scaling))
        _require_one_of("beta2", self.beta2, get_args(Beta2))
        if self.reference_batch is not None:
            _require_batch("reference_batch", self.reference_batch, "None takes the batch of the first step")
        if not self.max_factor >= 1.0:
            raise ValueError(f"max_factor must be at least 1, got max_factor = {self.max_factor!r}; inf is no cap.")
        if not self.max_change > 1.0:
            raise ValueError(f"max_change must be above 1, got max_change = {self.max_change!r}; inf is no limit.")

    def adjust(
        self,
        batch: float,
        evidence: NoiseEstimate,
        previous: Adjustment = UNTOUCHED,
        population: float = math.inf,
    ) -> Adjustment:
        """The adjustment for a step at ``batch``.

        Args:
            batch: ``n = k b W`` of the window as it was decided [examples]; a window that the end of the data cut
                short keeps it, as its learning rate would in a plain loop.
            evidence: Pooled moments; unknown ones leave the gain where it was and the second moment alone.
            previous: The adjustment of the last step that was taken.
            population: Examples in the data set, or infinity.

        Raises:
            ValueError: If ``batch`` is not positive and finite.
        """
        _require_batch("batch", batch, "it is accumulation_steps x micro-batch x ranks")
        first = math.isnan(previous.batch)
        reference = self.reference_batch or (batch if first else previous.reference_batch)
        rescaled = math.nan
        if self.rescale_second_moment and not first:
            rescaled = sq_norm_ratio(evidence, batch, previous.batch, population)
        return Adjustment(
            lr_factor=self._slewed(self._wanted(batch, reference, evidence, previous, population), previous),
            beta2_exponent=float(batch / reference) if self.beta2 == "half-life" else 1.0,
            second_moment_factor=1.0 if math.isnan(rescaled) else rescaled,
            batch=float(batch),
            reference_batch=float(reference),
        )

    def _wanted(
        self, batch: float, reference: float, evidence: NoiseEstimate, previous: Adjustment, population: float
    ) -> float:
        """The factor before cap and slew."""
        if self.scaling == "none":
            return 1.0
        if self.scaling in ("gain", "sqrt_gain"):
            gain = sq_norm_ratio(evidence, reference, batch, population)
            if math.isnan(gain):
                return previous.lr_factor
            return gain if self.scaling == "gain" else math.sqrt(gain)
        return batch / reference if self.scaling == "linear" else math.sqrt(batch / reference)

    def _slewed(self, wanted: float, previous: Adjustment) -> float:
        # Capped first: a factor inside the cap then never leaves it on the way.
        capped = _clamp(wanted, 1.0 / self.max_factor, self.max_factor)
        return float(_clamp(capped, previous.lr_factor / self.max_change, previous.lr_factor * self.max_change))


def sq_norm_ratio(evidence: NoiseEstimate, batch: float, other: float, population: float = math.inf) -> float:
    """``E|g_batch|^2 / E|g_other|^2``: how much longer, squared, a gradient of ``batch`` examples is.

    ``(|G|^2 + phi(n) tr(Sigma)) / (|G|^2 + phi(m) tr(Sigma))``, both moments read as at least zero. It lies between 1
    (all signal) and ``m / n`` (all noise), and is held there for a finite population too, where a lost signal would
    leave nothing at all.

    Args:
        evidence: Pooled moments.
        batch: ``n`` [examples].
        other: ``m`` [examples].
        population: Examples in the data set, or infinity.

    Returns:
        The ratio [1]; NaN where the moments are unknown or both zero.

    Example:
        >>> sq_norm_ratio(NoiseEstimate(grad_sq_norm=1.0, noise_trace=300.0), batch=300, other=100)
        0.5
        >>> sq_norm_ratio(NoiseEstimate(grad_sq_norm=-0.1, noise_trace=300.0), batch=400, other=100)
        0.25
    """
    signal, trace = max(evidence.grad_sq_norm, 0.0), max(evidence.noise_trace, 0.0)
    above = signal + inverse_size(batch, population) * trace
    below = signal + inverse_size(other, population) * trace
    if math.isnan(evidence.noise_trace + evidence.grad_sq_norm) or above + below == 0.0:
        return math.nan
    return _clamp(above / below if below > 0.0 else math.inf, *sorted((1.0, other / batch)))


def half_life_beta2(reference: float, batch_ratio: float) -> float:
    """``beta2^(n / n0)``: the decay per step that leaves the half-life in examples where it was.

    Held in :data:`.BETA2_RANGE`, widened to ``reference`` itself, so that a ratio of 1 changes nothing.

    Args:
        reference: ``beta2`` at the reference batch [1], in [0, 1).
        batch_ratio: ``n / n0`` [1].

    Source:
        Marek et al. 2025, arXiv:2507.07101.

    Example:
        >>> round(half_life_beta2(0.999, 16.0), 4), half_life_beta2(0.999, 1000.0), half_life_beta2(0.999, 1.0)
        (0.9841, 0.9, 0.999)
    """
    low, high = BETA2_RANGE
    return _clamp(reference**batch_ratio, min(low, reference), max(high, reference))


def _clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _require_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {name} = {value!r}.")


def _require_batch(name: str, value: float, way_out: str) -> None:
    if not (value > 0.0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {name} = {value!r}; {way_out}.")
