"""All that is known between two windows, as one pure value: what the controller holds and the simulator runs.

``state.advance(counts, results, rule, limits)`` is a window's whole arithmetic: count it, pool what was measured,
decide. Floats only, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from adaptbatch import estimate
from adaptbatch.estimate.climb import Climb
from adaptbatch.estimate.listening import Listen, listens
from adaptbatch.estimate.typical import TypicalTracker
from adaptbatch.records import (
    Decision,
    Evidence,
    Measurement,
    NoiseEstimate,
    Progress,
    Reason,
    Response,
    WindowCounts,
    WindowResult,
)
from adaptbatch.rules import Guard, Limits, Rule, decide
from adaptbatch.schema import ROW, Moment, Number, Sum, number, refuse

# Half of what is known of a window's seconds is of the last hundred windows.
SECONDS_DECAY = 2.0 ** (-1.0 / 100.0)
# Half of what is known of the size of unequal micro-batches is of the last two hundred.
MICRO_BATCHES_DECAY = 2.0 ** (-1.0 / 200.0)


@dataclass(frozen=True, slots=True)
class Seconds:
    """Decayed sums over windows: their number, their examples, the seconds of their steps and of the rest."""

    windows: Sum = 0.0
    examples: Sum = 0.0
    step: Sum = 0.0
    rest: Sum = 0.0

    def update(self, counts: WindowCounts) -> Seconds:
        """One window later."""
        return Seconds(
            SECONDS_DECAY * self.windows + 1.0,
            SECONDS_DECAY * self.examples + counts.global_batch,
            SECONDS_DECAY * self.step + counts.step_seconds,
            SECONDS_DECAY * self.rest + counts.seconds,
        )


@dataclass(frozen=True, slots=True)
class State:
    """The state of a training loop between two windows: progress, the channels of evidence, the last change.

    Attributes:
        progress: Where the training stands; ``accumulation_steps`` is the size of the window to come.
        micro_batches_known: Micro-batches that ``progress.micro_batch_examples`` is the mean of, decayed.
        unequal: 0: micro-batches are equal; 1: but for those of the last window; 2: they are of any size.
        pooled: Euclidean moments.
        metric: Moments in the optimizer's metric, for the decision once there are any.
        typical: The typical and the tail channel, in the metric of the decision.
        climb: The response to growing.
        products: Inner products of consecutive gradients, each in units of its window's own ``Q / n``.
        shards: How much the ranks' data differ.
        window: The last finite window, in the metric of the decision.
        changed_at: Examples seen when ``k`` last changed.
        loss_sum, loss_weight: Decayed sums over windows.
        lr: Of the last window measured.
        seconds: What a window takes.

    Example:
        >>> from adaptbatch import RelativeStandardError
        >>> state = State(Progress(accumulation_steps=2))
        >>> window = Measurement(weighted_sq_norms=640.0, batch_sq_norm=4.0, global_batch=128.0, cells=2)
        >>> counts, result = WindowCounts(128.0, micro_batches=2), WindowResult(window)
        >>> state, evidence, decision = state.advance(counts, [result], RelativeStandardError(), Limits())
        >>> decision.accumulation_steps, decision.reason, state.progress.examples_seen, evidence.pooled.noise_trace
        (2, 'undecided', 128.0, 128.0)
    """

    progress: Progress
    micro_batches_known: Sum = 0.0
    unequal: Annotated[int, number("be 0, 1 or 2", lambda x: x in (0, 1, 2))] = 0
    pooled: estimate.NoiseTracker = field(default_factory=estimate.NoiseTracker)
    metric: estimate.NoiseTracker = field(default_factory=estimate.NoiseTracker)
    typical: TypicalTracker = field(default_factory=TypicalTracker)
    climb: Climb = field(default_factory=Climb)
    products: estimate.NoiseTracker = field(default_factory=estimate.NoiseTracker)
    shards: estimate.ShardTracker = field(default_factory=estimate.ShardTracker)
    window: Annotated[Measurement | None, ROW] = None
    changed_at: Moment = -math.inf
    loss_sum: Number = 0.0
    loss_weight: Sum = 0.0
    lr: Number = math.nan
    seconds: Annotated[Seconds, ROW] = field(default_factory=Seconds)

    def advance(
        self,
        counts: WindowCounts,
        results: Sequence[WindowResult],
        rule: Rule,
        limits: Limits,
        guard: Guard | None = None,
        listen: Listen = 1.0,
    ) -> tuple[State, Evidence, Decision]:
        """The state one window later, the evidence, and the decision that was made on it.

        Args:
            counts: Of the window that ended.
            results: What has reached the host since the last call, oldest first: that window's own, or of one before.
                Those that are not finite are evidence of nothing, but for a guard.
            rule, limits, guard: How the next window's size is decided.
            listen: How many windows are measured, see :func:`~adaptbatch.estimate.listens`.
        """
        state = self.counted(counts, all(result.measurement.finite for result in results))
        memory = state.memory(rule)
        for result in results:
            if result.measurement.finite:
                state = state.measured(result, memory)
            elif guard is not None:
                state = state.spoiled(result.measurement.global_batch, memory)
        evidence = state.evidence()
        decision = decide(rule, evidence, state.progress, limits, guard)
        return state.sized(decision.accumulation_steps, evidence, listen), evidence, decision

    def counted(self, counts: WindowCounts, finite: bool = True) -> State:
        """The state after a window, before its measurements are pooled.

        Args:
            counts: Of the window.
            finite: Whether all gradients that arrived were finite.
        """
        at, n = self.progress, counts.global_batch
        seen = at.examples_seen + n
        size, known, unequal = self._micro_batch_size(counts)
        progress = replace(
            at,
            window=at.window + 1,
            examples_seen=seen,
            micro_batch_examples=size,
            examples_since_change=seen - self.changed_at,
            finite=finite,
        )
        seconds = self.seconds.update(counts)
        return replace(self, progress=progress, micro_batches_known=known, unequal=unequal, seconds=seconds)

    def _micro_batch_size(self, counts: WindowCounts) -> tuple[float, float, int]:
        """What one micro-batch weighs, of how many that is known, and whether they are unequal.

        Equal ones say it at once. Of unequal ones, token counts say, it is their mean over many windows: one window's
        own would have the batch, and all that follows it, jump with chance. The end of the data, which cuts a window
        short or its last micro-batch, says nothing; where the end is not known, at one micro-batch a window, nor does a
        window that is unlike those before and after it.
        """
        at, total, count = self.progress, counts.global_batch, counts.micro_batches
        mean, known = total / count, at.micro_batch_examples
        weight = MICRO_BATCHES_DECAY**count * self.micro_batches_known
        equal = count > 1 and counts.largest * count == total
        if math.isnan(known):
            return mean, float(count), int(count > 1 and not equal)
        if count < at.accumulation_steps * at.world_size:
            return known, self.micro_batches_known, self.unequal
        if self.unequal < 2 and (equal or mean == known):
            return mean, weight + count if mean == known else float(count), 0
        if counts.ended or counts.largest == known:
            return known, self.micro_batches_known, self.unequal
        if self.unequal == 0:
            return known, self.micro_batches_known, 1
        return (weight * known + total) / (weight + count), weight + count, 2

    def memory(self, rule: Rule) -> float:
        """Half-life of the evidence for the window just counted [examples]."""
        return estimate.memory_examples(rule.memory, self.progress.micro_batch_examples, self.progress.global_batch)

    def measured(self, result: WindowResult, memory: float) -> State:
        """The state with one finite window's measurements pooled."""
        at, euclidean = self.progress, result.measurement
        n, phi = euclidean.global_batch, estimate.inverse_size(euclidean.global_batch, at.population)
        window, typical, climb = self.comparable(result), self.typical, self.climb
        if self.metric.weight == 0.0 and (first := result.in_metric) is not None and first.finite and first.listened:
            # Another unit: what was known in the old one does not carry over.
            window, typical, climb = first, TypicalTracker(), Climb()
        unusual = typical if window is not None and typical.stands_out(window, phi) else None
        pair = estimate.estimate_window(euclidean, at.population)
        pooled, metric = _pool(self.pooled, pair, euclidean, phi, memory, unusual), self.metric
        if window is not None and window is result.in_metric:
            pair = estimate.estimate_window(window, at.population)
            metric = _pool(metric, pair, window, phi, memory, unusual)
        if window is not None:
            steps = window.cells if result.steps is None else result.steps
            typical = typical.update(pair, window, memory, phi)
            climb = climb.update(pair, steps, n) if steps else climb
        decay = 2.0 ** (-n / memory)
        # A loss that is not a number, as of labels that are all ignored, would stay in the sum for ever.
        weight = n if math.isfinite(result.loss) else 0.0
        return replace(
            self,
            pooled=pooled,
            metric=metric,
            typical=typical,
            climb=climb,
            products=self._products(euclidean, memory),
            shards=self.shards.update(euclidean, at.world_size),
            window=(window if window.listened else None) if window is not None else self.window,
            loss_sum=decay * self.loss_sum + (n * result.loss if weight else 0.0),
            loss_weight=decay * self.loss_weight + weight,
            lr=result.lr,
        )

    def comparable(self, result: WindowResult) -> Measurement | None:
        """The window in the unit of what is known so far: Euclidean, until there are moments in the metric.

        From then on one without it has none: a parameter was thawed whose second moment is not warm.
        """
        if self.metric.weight == 0.0:
            return result.measurement
        return result.in_metric if result.in_metric is not None and result.in_metric.finite else None

    def euclidean(self) -> State:
        """The state where no window will have a metric any more: what is known in its unit would stay for ever."""
        if self.metric.weight == 0.0:
            return self
        fresh = estimate.NoiseTracker()
        return replace(self, metric=fresh, typical=TypicalTracker(), climb=Climb(), window=None)

    def spoiled(self, batch: float, memory: float) -> State:
        """The state after a window of ``batch`` examples without a finite gradient, where a guard counts it."""
        return replace(self, typical=self.typical.exceeded(batch, memory))

    def _products(self, window: Measurement, memory: float) -> estimate.NoiseTracker:
        """Inner products one window later, each in units of its own window: the sign is what counts."""
        unit = window.mean_sq_norm
        if not (unit > 0.0 and math.isfinite(window.consecutive_product)):
            return self.products
        product = NoiseEstimate(window.consecutive_product / unit, 0.0, degrees_of_freedom=1.0)
        return self.products.update(product, window.global_batch, memory)

    def evidence(self) -> Evidence:
        """All that a rule may know."""
        seconds = self.seconds
        decisive = self.metric if self.metric.weight > 0.0 else self.pooled
        return Evidence(
            pooled=decisive.estimate(),
            typical=self.typical.estimate(),
            level=self.typical.level,
            tail=self.typical.tail(),
            response=Response(self.climb.elasticity(), self.climb.least_error_sq(), self.consecutive()),
            window=self.window,
            loss=self.loss_sum / self.loss_weight if self.loss_weight > 0.0 else math.nan,
            lr=self.lr,
            step_seconds=seconds.step / seconds.windows if seconds.windows > 0.0 else math.nan,
            example_seconds=seconds.rest / seconds.examples if seconds.examples > 0.0 else math.nan,
        )

    def consecutive(self) -> float:
        """Mean of ``<g_t, g_{t-1}>`` in its standard errors; NaN before eight windows of it."""
        pair = self.products.estimate()
        if not (pair.effective_windows >= 8.0 and pair.var_grad_sq_norm > 0.0):
            return math.nan
        return pair.grad_sq_norm / math.sqrt(pair.var_grad_sq_norm)

    def limited(self, decision: Decision, limits: Limits) -> tuple[State, Decision]:
        """The state whose next window, decided already, is brought within new ``limits``."""
        wanted = decision.accumulation_steps
        steps = limits.clamp(wanted)
        if steps == wanted:
            return self, decision
        reason: Reason = "at_max" if wanted > steps else "at_min"
        return self.sized(steps), replace(decision, accumulation_steps=steps, reason=reason)

    def sized(self, steps: int, evidence: Evidence | None = None, listen: Listen = 1.0) -> State:
        """The state whose next window has ``steps`` micro-batches, and is measured where the evidence asks for it."""
        at = self.progress
        # The first size is no change of one.
        changed = steps != at.accumulation_steps and at.window > 0
        measured = changed or evidence is None or listens(listen, evidence.typical, at)
        if (steps, measured) == (at.accumulation_steps, at.listens):
            return self
        progress = replace(at, accumulation_steps=steps, listens=measured)
        return replace(self, progress=progress, changed_at=at.examples_seen if changed else self.changed_at)

    @staticmethod
    def require_whole(name: str, saved: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless what was counted and measured goes together."""
        seen, window = saved["progress"]["examples_seen"], saved["window"]
        if saved["changed_at"] > seen:
            expected = f"be at most {name}['progress']['examples_seen'] = {seen!r}"
            refuse(f"{name}['changed_at']", expected, saved["changed_at"])
        for index, value in enumerate(window[:2]):
            if not math.isfinite(value):
                refuse(f"{name}['window'][{index}]", "be a finite number", value)


def _pool(
    tracker: estimate.NoiseTracker,
    pair: NoiseEstimate,
    window: Measurement,
    phi: float,
    memory: float,
    unusual: TypicalTracker | None,
) -> estimate.NoiseTracker:
    """One window later: of its own pair, or of its length where nobody listened; ``unusual`` knows what it is not."""
    n = window.global_batch
    if window.listened:
        return tracker.update(pair, n, memory, unusual is not None)
    trace = None if unusual is None else unusual.usual_trace(window, phi)
    return tracker.update_length(window.batch_sq_norm, window.cells - 1.0, phi, n, memory, trace)
