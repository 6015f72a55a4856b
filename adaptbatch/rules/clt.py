"""The CLT rule: keeps the standard error of the batch gradient at a chosen fraction of its length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from adaptbatch import estimate
from adaptbatch.records import Decision, Evidence, NoiseEstimate, Progress, Response
from adaptbatch.rules.base import Limits, growth, in_python, require_memory, require_positive
from adaptbatch.rules.compose import Composable

Channel = Literal["typical", "pooled"]
AtFloor = Literal["grow", "hold"]

# Fewer effective windows than this are no evidence, whatever their variance says.
MIN_EFFECTIVE_WINDOWS = 8.0
# A shrink waits this many dead times: too small a batch can cost the run, too large a one costs examples.
SHRINK_DWELL = 3.0
# The noise floor is diagnosed where B went up with n nearly in proportion and no size was near large enough.
FLOOR_ELASTICITY = 0.7
FLOOR_EXCESS = 1.5
# Standard errors at which the product of consecutive gradients overrules the elasticity.
FLOOR_Z = 2.0


@dataclass(frozen=True)
class RelativeStandardError(Composable):
    """Keeps the relative standard error of the batch gradient at ``theta`` (the CLT rule, a two-sided norm test).

    Tests the linear statistic ``D(n) = phi(n) tr(Sigma) - theta^2 |G|^2``, unbiased where the ratio ``B`` is not::

        grow    if D(n)  >  z_grow   SE(D(n))    at the present size n
        shrink  if D(n') < -z_shrink SE(D(n'))   at the smaller size n' it would go to

    A shrink therefore lands where the same data already say "still quiet enough", which is the hysteresis. After every
    change it waits ``dead_time`` examples, three times that before it shrinks; it moves at most by the factors of
    :class:`Limits`.

    The moments are those of the *typical* channel, in which no window weighs more than ten ordinary ones
    (:mod:`~adaptbatch.estimate.typical`). What that cuts off, the *tail*, is reported and does not move the batch:
    in the two-networks study growing after catastrophic gradients did not keep a run from the next one. :class:`Guard`
    is for those who want to answer.

    When it is wrong: at the noise floor of a fixed learning rate ``B / n`` does not depend on ``n``, and the rule runs
    to ``max_steps``; it says ``noise_floor`` there, and holds with ``at_floor="hold"``. Gradients with infinite
    variance have a typical noise scale below the one of their moments. Signal-to-noise is not stability: where training
    breaks now and then, the ordinary step may be quiet at any batch.

    Args:
        theta: Wanted ``sqrt(tr(Sigma) / n) / |G|`` [1]; 1 is the knee where steps and examples both cost twice their
            minimum, 0.5 is four times the batch.
        memory: Half-life of the evidence [examples]; None: ``max(500 b, 10 n)``.
        dead_time: Examples to wait after a change; None: half the memory.
        z_grow: Standard errors of evidence a growth needs.
        z_shrink: Standard errors of evidence a shrink needs.
        channel: ``"typical"``, or ``"pooled"`` for the plain moments.
        at_floor: ``"grow"`` or ``"hold"``: what to do once the noise floor is diagnosed.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Byrd, Chin, Nocedal & Wu 2012 (norm test); McCandlish et al. 2018, arXiv:1812.06162 (noise scale).

    Example:
        >>> RelativeStandardError(theta=0.5).memory is None
        True
    """

    theta: float = 1.0
    memory: float | None = None
    dead_time: float | None = None
    z_grow: float = 2.33
    z_shrink: float = 3.0
    channel: Channel = "typical"
    at_floor: AtFloor = "grow"
    closed_loop: ClassVar[bool] = True
    pools: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive("theta", self.theta, "1.0 lets the error equal the gradient's length")
        require_memory(self.memory)
        if self.dead_time is not None and not (self.dead_time >= 0.0 and math.isfinite(self.dead_time)):
            raise ValueError(
                f"dead_time must be finite and not negative, got dead_time = {self.dead_time!r}; None takes memory / 2."
            )
        for name, value in (("z_grow", self.z_grow), ("z_shrink", self.z_shrink)):
            if not (value >= 0.0 and math.isfinite(value)):
                raise ValueError(f"{name} must be finite and not negative, got {name} = {value!r}; 2.33 is one in 100.")
        for name, word, words in (("channel", self.channel, Channel), ("at_floor", self.at_floor, AtFloor)):
            if word not in get_args(words):
                raise ValueError(f"{name} must be one of {get_args(words)}, got {name} = {word!r}.")
        in_python(self)

    def decide(self, evidence: Evidence, progress: Progress, limits: Limits) -> Decision:
        """See the class; the reason tells which test or bound decided."""
        pair = evidence.pooled if self.channel == "pooled" else evidence.typical
        k, batch = progress.accumulation_steps, progress.global_batch
        target = estimate.required_batch(pair, self.theta, progress.population)
        wait = self._dead_examples(progress)
        if not pair.effective_windows >= MIN_EFFECTIVE_WINDOWS:
            return Decision(k, target, "undecided")
        wanted = math.ceil(target / progress.step_examples) if math.isfinite(target) else math.inf
        noisy = self._noisy(pair, batch, progress.population)
        if noisy and self._at_floor(evidence.response):
            steps, _ = growth(k, wanted, limits)
            held = self.at_floor == "hold" or progress.examples_since_change < wait
            return Decision(k if held else steps, target, "noise_floor")
        if progress.examples_since_change < wait:
            return Decision(k, target, "undecided")
        if noisy:
            steps, reason = growth(k, wanted, limits)
            lost = pair.grad_sq_norm <= 0.0 and reason != "at_max"
            return Decision(steps, target, "signal_lost" if lost else reason)
        if wanted > k:
            return Decision(k, target, "undecided")
        if k <= limits.lower:
            return Decision(k, target, "at_min" if wanted < limits.lower else "hold")
        smaller = int(max(limits.lower, wanted, math.floor(limits.max_shrink * k)))
        ready = progress.examples_since_change >= SHRINK_DWELL * wait
        if smaller < k and ready and self._quiet(pair, smaller * progress.step_examples, progress.population):
            return Decision(smaller, target, "at_min" if wanted < smaller == limits.lower else "shrink")
        return Decision(k, target, "hold")

    def _noisy(self, pair: NoiseEstimate, batch: float, population: float) -> bool:
        excess, error = estimate.excess_error(pair, batch, self.theta, population)
        # A batch of the whole population has no error left to halve.
        return excess > self.z_grow * error and batch < population

    def _quiet(self, pair: NoiseEstimate, batch: float, population: float) -> bool:
        excess, error = estimate.excess_error(pair, batch, self.theta, population)
        return excess < -self.z_shrink * error

    def _at_floor(self, response: Response) -> bool:
        """Whether growing made ``B`` grow alike; consecutive gradients, where measured, have a veto."""
        rose = response.elasticity > FLOOR_ELASTICITY
        never_enough = response.least_error_sq > FLOOR_EXCESS * self.theta**2
        return rose and never_enough and not response.consecutive > -FLOOR_Z

    def _dead_examples(self, progress: Progress) -> float:
        if self.dead_time is not None:
            return self.dead_time
        return 0.5 * estimate.memory_examples(self.memory, progress.micro_batch_examples, progress.global_batch)
