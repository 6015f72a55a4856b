r"""Published rules that compute a batch from the moments: for the fewest examples, steps, seconds, or a bit of each.

All but the last two rest on one model: a step of ``n`` examples goes ``1 / (1 + B / n)`` of the way that a step without
noise would. They follow their number every window, both ways, without asking whether the evidence carries it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from adaptbatch import estimate
from adaptbatch.records import Decision, Evidence, Progress
from adaptbatch.rules.base import Limits, hold, in_python, require_memory, require_positive, towards
from adaptbatch.rules.compose import Composable


@dataclass(frozen=True)
class NoiseScale(Composable):
    """Follows the gradient noise scale: ``n = B``, rounded up to whole steps every window.

    At ``n = B`` steps and examples both cost twice their minimum. This is the target of
    :class:`~adaptbatch.RelativeStandardError` at ``theta = 1`` without its test.

    When it is wrong: the ratio of two noisy moments is biased and jumps where ``|G|^2`` is nearly lost; at the noise
    floor of a fixed learning rate it runs to ``max_steps``. The model behind ``B`` is a step along the gradient in a
    well-conditioned valley.

    Args:
        memory: Half-life of the evidence [examples]; None: ``max(500 b, 10 n)``.

    Raises:
        ValueError: If ``memory`` is not positive and finite.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162.

    Example:
        >>> from adaptbatch.records import NoiseEstimate
        >>> at = Progress(accumulation_steps=4, micro_batch_examples=64)
        >>> NoiseScale().decide(Evidence(pooled=NoiseEstimate(4.0, 1600.0)), at, Limits())
        Decision(accumulation_steps=7, target_batch=400.0, reason='grow')
    """

    memory: float | None = None
    closed_loop: ClassVar[bool] = True
    pools: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_memory(self.memory)
        in_python(self)

    def decide(self, evidence: Evidence, progress: Progress, limits: Limits) -> Decision:
        """The noise scale; ``undecided`` while it is unknown."""
        scale = estimate.noise_scale(evidence.pooled)
        return towards(scale, progress, limits, lost=math.isinf(scale))


@dataclass(frozen=True)
class Pareto(Composable):
    """Trades steps for examples at a fixed ``price``: ``n = sqrt(price B)``.

    Minimises ``(price + n) (1 + B / n)``, the cost of an update in examples over the way it goes. With a price in time,
    ``c0 / c1`` of ``c0 + c1 n`` seconds, it is the optimum of :class:`.Goodput`.

    When it is wrong: as :class:`.NoiseScale`, of which it feels the square root. On one device ``c0`` is the optimizer
    alone, and the best batch is the smallest that fills the device.

    Args:
        price: What one update costs beside its examples [examples].
        memory: Half-life of the evidence [examples]; None: ``max(500 b, 10 n)``.

    Raises:
        ValueError: If ``price`` or ``memory`` is not positive and finite.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162 (adaptive batch sizes).

    Example:
        >>> from adaptbatch.records import NoiseEstimate
        >>> at = Progress(accumulation_steps=4, micro_batch_examples=64)
        >>> Pareto(price=900).decide(Evidence(pooled=NoiseEstimate(4.0, 1600.0)), at, Limits(max_growth=9.0))
        Decision(accumulation_steps=10, target_batch=600.0, reason='grow')
    """

    price: float
    memory: float | None = None
    closed_loop: ClassVar[bool] = True
    pools: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive("price", self.price, "c0 / c1 for a window of c0 + c1 n seconds")
        require_memory(self.memory)
        in_python(self)

    def decide(self, evidence: Evidence, progress: Progress, limits: Limits) -> Decision:
        """The geometric mean of price and noise scale; ``undecided`` while that is unknown."""
        scale = estimate.noise_scale(evidence.pooled)
        return towards(math.sqrt(self.price * scale), progress, limits, lost=math.isinf(scale))


@dataclass(frozen=True)
class Goodput(Composable):
    """Chooses the size with the most progress a second: throughput times statistical efficiency.

    Over the sizes that the limits allow, at least ``n0 = initial_batch``::

        goodput(n) = n / (c0 + c1 n) * (B + n0) / (B + n)

    Moves only where the best size promises ``improvement`` times the present goodput. Without ``n0`` and whole steps
    the best batch is ``sqrt(B c0 / c1)``.

    When it is wrong: as :class:`NoiseScale`; where the seconds of a window are not ``c0 + c1 n``, as with a loader that
    cannot keep up. The published rule scales the learning rate by AdaScale's gain, which this one leaves to a coupling.

    Args:
        initial_batch: ``n0``, the batch that the learning rate was chosen for [examples]; none smaller is used.
        step_seconds: ``c0``, seconds of a window whatever its size [s]; None takes what was measured.
        example_seconds: ``c1``, seconds for each example beside that [s]; None takes what was measured.
        improvement: Smallest ratio of goodputs worth a change [1].
        memory: Half-life of the evidence [examples]; None: ``max(500 b, 10 n)``.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Qiao et al. 2021 (Pollux), arXiv:2008.12260.

    Example:
        >>> from adaptbatch.records import NoiseEstimate
        >>> at = Progress(accumulation_steps=4, micro_batch_examples=64)
        >>> rule = Goodput(initial_batch=128, step_seconds=0.9, example_seconds=0.001)
        >>> rule.decide(Evidence(pooled=NoiseEstimate(4.0, 1600.0)), at, Limits(max_growth=9.0))
        Decision(accumulation_steps=9, target_batch=576.0, reason='grow')
    """

    initial_batch: float
    step_seconds: float | None = None
    example_seconds: float | None = None
    improvement: float = 1.05
    memory: float | None = None
    closed_loop: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive("initial_batch", self.initial_batch, "the batch that the learning rate was chosen for")
        for name, seconds in (("step_seconds", self.step_seconds), ("example_seconds", self.example_seconds)):
            if seconds is not None:
                require_positive(name, seconds, "None measures it")
        if not (self.improvement >= 1.0 and math.isfinite(self.improvement)):
            raise ValueError(
                f"improvement must be finite and at least 1, got improvement = {self.improvement!r}; 1.05 is 5 %."
            )
        require_memory(self.memory)
        in_python(self)

    def decide(self, evidence: Evidence, progress: Progress, limits: Limits) -> Decision:
        """The best size where it is enough better; ``undecided`` while ``B`` or the seconds are unknown."""
        k, each = progress.accumulation_steps, progress.step_examples
        scale = estimate.noise_scale(evidence.pooled)
        c0 = evidence.step_seconds if self.step_seconds is None else self.step_seconds
        c1 = evidence.example_seconds if self.example_seconds is None else self.example_seconds
        if not (each > 0.0 and scale >= 0.0 and c0 >= 0.0 and c1 >= 0.0 and c0 + c1 > 0.0):
            return towards(math.nan, progress, limits)
        least = limits.clamp(math.ceil(self.initial_batch / each - 1e-9))
        best = max(range(least, limits.max_steps + 1), key=lambda steps: self._goodput(steps * each, scale, c0, c1))
        present, promised = (self._goodput(steps * each, scale, c0, c1) for steps in (k, best))
        if k >= least and promised < self.improvement * present:
            return hold(progress)
        return towards(best * each, progress, limits, lost=math.isinf(scale))

    def _goodput(self, n: float, scale: float, c0: float, c1: float) -> float:
        efficiency = 1.0 if math.isinf(scale) else (scale + self.initial_batch) / (scale + n)
        return n / (c0 + c1 * n) * efficiency


@dataclass(frozen=True)
class CABS(Composable):
    """Couples the batch to the learning rate: ``n = scale lr tr(Sigma) / (loss - loss_floor)``.

    At a rate of one over the curvature the gain that a step guarantees is largest for each example at ``n = 2 B``; the
    squared gradient in it is read off the loss, ``|G|^2 = 2 (loss - loss_floor) / lr`` in a quadratic valley.

    When it is wrong: for any optimizer but gradient descent without momentum, whose rate means something else; where
    the floor of the loss is not known, as in regression or with an evidence bound.

    Args:
        scale: Factor for losses in other units [1].
        loss_floor: The smallest loss there is, such as 0 for cross-entropy.
        memory: Half-life of the evidence [examples]; None: ``max(500 b, 10 n)``.

    Raises:
        ValueError: If an argument is not finite, or ``scale`` or ``memory`` not positive.

    Source:
        Balles, Romero & Hennig 2017, arXiv:1612.05086.

    Example:
        >>> from adaptbatch.records import NoiseEstimate
        >>> at = Progress(accumulation_steps=4, micro_batch_examples=64)
        >>> CABS().decide(Evidence(pooled=NoiseEstimate(4.0, 1600.0), loss=0.5, lr=0.125), at, Limits())
        Decision(accumulation_steps=7, target_batch=400.0, reason='grow')
    """

    scale: float = 1.0
    loss_floor: float = 0.0
    memory: float | None = None
    closed_loop: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive("scale", self.scale, "1.0 is the paper's")
        if not math.isfinite(self.loss_floor):
            raise ValueError(f"loss_floor must be finite, got loss_floor = {self.loss_floor!r}; 0.0 for cross-entropy.")
        require_memory(self.memory)
        in_python(self)

    def decide(self, evidence: Evidence, progress: Progress, limits: Limits) -> Decision:
        """The coupled batch; ``undecided`` while a part is unknown, or the loss is not above its floor."""
        left = evidence.loss - self.loss_floor
        if not left > 0.0:
            return towards(math.nan, progress, limits)
        target = self.scale * evidence.lr * max(evidence.pooled.noise_trace, 0.0) / left
        return towards(target, progress, limits)


@dataclass(frozen=True)
class DiveBatch(Composable):
    """Sets the batch to ``delta`` times the gradient diversity of the data set, once a pass.

    Over the ``N`` examples of a pass::

        n = delta N Delta,      Delta = sum_i |g_i|^2 / |sum_i g_i|^2,      N Delta = 1 + (1 - 1/N) B

    from the unbiased moments, with a half-life that gives the evidence the mean age of a pass. A pass ends with the
    window that takes the examples seen past a multiple of ``epoch_examples``.

    When it is wrong: as :class:`NoiseScale`, whose multiple it is once ``B`` is far above 1. Where the parameters move
    much in a pass, it mixes gradients of different places. A pass whose last window is not finite decides nothing.

    Args:
        delta: Batch in units of ``N Delta`` [1].
        epoch_examples: Examples of one pass over the data set, or between two decisions on a stream [examples].
        grow_only: Whether to keep the present size where the new one is smaller.

    Raises:
        ValueError: If ``delta`` or ``epoch_examples`` is not positive and finite.

    Source:
        Chen, Wang & Sundaram 2025, arXiv:2509.16173; gradient diversity: Yin et al. 2018, arXiv:1706.05699.

    Example:
        >>> from adaptbatch.records import Measurement, NoiseEstimate
        >>> evidence = Evidence(pooled=NoiseEstimate(1.0, 799.0), window=Measurement(1.0, 1.0, 256.0, 4))
        >>> for seen in (49_920, 50_176, 50_432):
        ...     at = Progress(examples_seen=seen, accumulation_steps=4, micro_batch_examples=64)
        ...     print(DiveBatch(delta=0.5, epoch_examples=50_000).decide(evidence, at, Limits()))
        Decision(accumulation_steps=4, target_batch=256.0, reason='hold')
        Decision(accumulation_steps=7, target_batch=400.0, reason='grow')
        Decision(accumulation_steps=4, target_batch=256.0, reason='hold')
    """

    delta: float
    epoch_examples: float
    grow_only: bool = False
    closed_loop: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive("delta", self.delta, "1.0 takes the diversity itself")
        require_positive("epoch_examples", self.epoch_examples, "len(dataset) is usual")
        in_python(self)

    @property
    def memory(self) -> float:
        """Half-life whose mean age is half a pass, as of the paper's sums over one [examples]."""
        return 0.5 * math.log(2.0) * self.epoch_examples

    def decide(self, evidence: Evidence, progress: Progress, limits: Limits) -> Decision:
        """The new size where a pass has just ended, else ``hold``; ``undecided`` while the diversity is unknown."""
        scale = estimate.noise_scale(evidence.pooled)
        if evidence.window is None or math.isnan(scale):
            return towards(math.nan, progress, limits)
        before = progress.examples_seen - evidence.window.global_batch
        if progress.examples_seen // self.epoch_examples == before // self.epoch_examples:
            return hold(progress)
        target = self.delta * (1.0 + (1.0 - 1.0 / progress.population) * scale)
        return towards(target, progress, limits, lost=math.isinf(scale), shrinks=not self.grow_only)
