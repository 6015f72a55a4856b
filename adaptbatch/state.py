"""All that is known between two windows, as one pure value: what the controller holds and the simulator runs.

``counted`` takes note of a finished window, ``heard`` pools what was measured in it, ``decided`` asks the rule. Floats
only, no torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from typing import Any, Self

from adaptbatch import estimate
from adaptbatch.estimate.climb import Climb
from adaptbatch.estimate.typical import TypicalTracker
from adaptbatch.records import Decision, Evidence, Measurement, NoiseEstimate, Progress, Reason, Response
from adaptbatch.rules import Guard, Limits, Rule, decide
from adaptbatch.schema import require_loop

# Half of what is known of a window's seconds is of the last hundred windows.
SECONDS_DECAY = 2.0 ** (-1.0 / 100.0)
# Half of what is known of the size of unequal micro-batches is of the last two hundred.
CELLS_DECAY = 2.0 ** (-1.0 / 200.0)


@dataclass(frozen=True, slots=True)
class Heard:
    """One finished window's numbers, when they have reached the host.

    Attributes:
        measurement: Squared norms, Euclidean.
        in_metric: The same in the optimizer's metric; None without one, or while it is not warm.
        loss: Weighted mean loss.
        lr: Learning rate as applied.
        steps: Its accumulation steps, 0 for a window that the end of the data cut short; None: its cells.
    """

    measurement: Measurement
    in_metric: Measurement | None = None
    loss: float = math.nan
    lr: float = math.nan
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class Loop:
    """The state of a training loop between two windows: progress, the channels of evidence, the last change.

    Attributes:
        progress: Where the training stands; ``accumulation_steps`` is the size of the window to come.
        cells_known: Micro-batches that ``progress.cell_examples`` is the mean of, decayed.
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
        lr: Of the last window heard.
        seconds_each: Decayed sums of windows, examples, step seconds and other seconds.

    Example:
        >>> from adaptbatch import RelativeStandardError
        >>> loop = Loop(Progress(accumulation_steps=2))
        >>> window = Measurement(weighted_sq_norms=640.0, batch_sq_norm=4.0, global_batch=128.0, cells=2)
        >>> loop = loop.counted(window.global_batch, cells=2).heard(Heard(window), memory=1e5)
        >>> loop, decision = loop.decided(RelativeStandardError(), Limits())
        >>> decision.accumulation_steps, decision.reason, loop.progress.examples_seen
        (2, 'undecided', 128.0)
    """

    progress: Progress
    cells_known: float = 0.0
    unequal: int = 0
    pooled: estimate.NoiseTracker = field(default_factory=estimate.NoiseTracker)
    metric: estimate.NoiseTracker = field(default_factory=estimate.NoiseTracker)
    typical: TypicalTracker = field(default_factory=TypicalTracker)
    climb: Climb = field(default_factory=Climb)
    products: estimate.NoiseTracker = field(default_factory=estimate.NoiseTracker)
    shards: estimate.ShardTracker = field(default_factory=estimate.ShardTracker)
    window: Measurement | None = None
    changed_at: float = -math.inf
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    lr: float = math.nan
    seconds_each: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)

    def counted(
        self,
        global_batch: float,
        cells: int,
        largest: float = math.nan,
        ended: bool = False,
        finite: bool = True,
        step_seconds: float = 0.0,
        seconds: float = 0.0,
    ) -> Loop:
        """The loop after a window of ``cells`` micro-batches on all ranks, before its numbers are pooled.

        Args:
            global_batch: Its weights' sum [examples].
            cells: Its micro-batches; fewer than were decided where the data ended.
            largest: Weight of the largest of them, over ranks the mean; NaN: not known.
            ended: Whether the data ended with it, so that its last micro-batch may be a short one.
            finite: Whether all gradients that arrived were finite.
            step_seconds: Time of the optimizer's step [s].
            seconds: Time of the rest [s].
        """
        at = self.progress
        seen = at.examples_seen + global_batch
        cell, cells_known, unequal = self._sized_cells(global_batch, cells, largest, ended)
        progress = replace(
            at,
            window=at.window + 1,
            examples_seen=seen,
            cell_examples=cell,
            examples_since_change=seen - self.changed_at,
            finite=finite,
        )
        each = (1.0, global_batch, step_seconds, seconds)
        times = tuple(SECONDS_DECAY * old + new for old, new in zip(self.seconds_each, each, strict=True))
        return replace(self, progress=progress, cells_known=cells_known, unequal=unequal, seconds_each=times)

    def _sized_cells(self, global_batch: float, cells: int, largest: float, ended: bool) -> tuple[float, float, int]:
        """What one micro-batch weighs, of how many that is known, and whether they are unequal.

        Equal ones say it at once. Of unequal ones, token counts say, it is their mean over many windows: one window's
        own would have the batch, and all that follows it, jump with chance. The end of the data, which cuts a window
        short or its last micro-batch, says nothing; where the end is not known, at one micro-batch a window, nor does a
        window that is unlike those before and after it.
        """
        at, mean = self.progress, global_batch / cells
        known, weight = at.cell_examples, CELLS_DECAY**cells * self.cells_known
        equal = cells > 1 and largest * cells == global_batch
        if math.isnan(known):
            return mean, float(cells), int(cells > 1 and not equal)
        if cells < at.accumulation_steps * at.world_size:
            return known, self.cells_known, self.unequal
        if self.unequal < 2 and (equal or mean == known):
            return mean, weight + cells if mean == known else float(cells), 0
        if ended or largest == known:
            return known, self.cells_known, self.unequal
        if self.unequal == 0:
            return known, self.cells_known, 1
        return (weight * known + global_batch) / (weight + cells), weight + cells, 2

    def memory(self, rule: Rule) -> float:
        """Half-life of the evidence for the window just counted [examples]."""
        return estimate.memory_examples(rule.memory, self.progress.cell_examples, self.progress.global_batch)

    def heard(self, window: Heard, memory: float) -> Loop:
        """The loop with one finite window's numbers pooled."""
        population, euclidean = self.progress.population, window.measurement
        n = euclidean.global_batch
        pooled = self.pooled.update(estimate.estimate_window(euclidean, population), n, memory)
        decay = 2.0 ** (-n / memory)
        # A loss that is not a number, as of labels that are all ignored, would stay in the sum for ever.
        heard = n if math.isfinite(window.loss) else 0.0
        loop = replace(
            self,
            pooled=pooled,
            shards=self.shards.update(euclidean, self.progress.world_size),
            loss_sum=decay * self.loss_sum + (n * window.loss if heard else 0.0),
            loss_weight=decay * self.loss_weight + heard,
            lr=window.lr,
        )._phased(euclidean, memory)
        in_metric = window.in_metric
        if in_metric is None or not in_metric.finite:
            return loop if self.comparable(window) is None else loop._weighed(window, euclidean, memory)
        if self.metric.weight == 0.0:
            # Another unit: what was known in the old one does not carry over.
            loop = replace(loop, typical=TypicalTracker(), climb=Climb())
        pair = estimate.estimate_window(in_metric, population)
        return replace(loop, metric=loop.metric.update(pair, n, memory))._weighed(window, in_metric, memory)

    def comparable(self, window: Heard) -> Measurement | None:
        """The window in the unit of what is known so far: Euclidean, until there are moments in the metric.

        From then on one without it has none: a parameter was thawed whose second moment is not warm.
        """
        if self.metric.weight == 0.0:
            return window.measurement
        return window.in_metric if window.in_metric is not None and window.in_metric.finite else None

    def euclidean(self) -> Loop:
        """The loop where no window will have a metric any more: what is known in its unit would stay for ever."""
        if self.metric.weight == 0.0:
            return self
        fresh = estimate.NoiseTracker()
        return replace(self, metric=fresh, typical=TypicalTracker(), climb=Climb(), window=None)

    def spoiled(self, batch: float, memory: float) -> Loop:
        """The loop after a window of ``batch`` examples without a finite gradient, where a guard counts it."""
        return replace(self, typical=self.typical.exceeded(batch, memory))

    def _weighed(self, heard: Heard, window: Measurement, memory: float) -> Loop:
        """The channels of the decision, one window later."""
        pair = estimate.estimate_window(window, self.progress.population)
        steps = window.cells if heard.steps is None else heard.steps
        return replace(
            self,
            typical=self.typical.update(pair, window, memory),
            climb=self.climb.update(pair, steps, window.global_batch) if steps else self.climb,
            window=window,
        )

    def _phased(self, window: Measurement, memory: float) -> Loop:
        """The phase one window later, each product in units of its own window: the sign is what counts."""
        unit = window.mean_sq_norm
        if not (unit > 0.0 and math.isfinite(window.consecutive_product)):
            return self
        product = NoiseEstimate(window.consecutive_product / unit, 0.0, degrees_of_freedom=1.0)
        return replace(self, products=self.products.update(product, window.global_batch, memory))

    def evidence(self) -> Evidence:
        """All that a rule may know."""
        windows, examples, step_seconds, seconds = self.seconds_each
        decisive = self.metric if self.metric.weight > 0.0 else self.pooled
        return Evidence(
            pooled=decisive.estimate(),
            typical=self.typical.estimate(),
            level=self.typical.level,
            tail=self.typical.tail(),
            response=Response(self.climb.elasticity(), self.climb.least_error_sq(), self.phase()),
            window=self.window,
            loss=self.loss_sum / self.loss_weight if self.loss_weight > 0.0 else math.nan,
            lr=self.lr,
            step_seconds=step_seconds / windows if windows > 0.0 else math.nan,
            example_seconds=seconds / examples if examples > 0.0 else math.nan,
        )

    def phase(self) -> float:
        """Mean of ``<g_t, g_{t-1}>`` in its standard errors; NaN before eight windows of it."""
        pair = self.products.estimate()
        if not (pair.effective_windows >= 8.0 and pair.var_grad_sq_norm > 0.0):
            return math.nan
        return pair.grad_sq_norm / math.sqrt(pair.var_grad_sq_norm)

    def decided(self, rule: Rule, limits: Limits, guard: Guard | None = None) -> tuple[Loop, Decision]:
        """The loop with the next window's size, and why it has it."""
        decision = decide(rule, self.evidence(), self.progress, limits, guard)
        return self._sized(decision.accumulation_steps), decision

    def limited(self, decision: Decision, limits: Limits) -> tuple[Loop, Decision]:
        """The loop whose next window, decided already, is brought within new ``limits``."""
        wanted = decision.accumulation_steps
        steps = limits.clamp(wanted)
        if steps == wanted:
            return self, decision
        reason: Reason = "at_max" if wanted > steps else "at_min"
        return self._sized(steps), replace(decision, accumulation_steps=steps, reason=reason)

    def _sized(self, steps: int) -> Loop:
        at = self.progress
        # The first size is no change of one.
        changed = steps != at.accumulation_steps and at.window > 0
        progress = replace(at, accumulation_steps=steps)
        return replace(self, progress=progress, changed_at=at.examples_seen if changed else self.changed_at)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries, for a checkpoint."""
        state = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in _TRACKERS:
            state[name] = state[name].state_dict()
        # A list: torch.distributed.checkpoint wants the same keys in every state.
        window = [] if self.window is None else list(astuple(self.window))
        return state | {
            "progress": asdict(self.progress),
            "window": window,
            "seconds_each": list(self.seconds_each),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """The loop whose :meth:`state_dict` this is.

        Raises:
            ValueError: If a key is unknown or missing, at any depth, or has a value that it cannot have.
        """
        require_loop("state", state)
        values = dict(state) | {name: kind.from_state_dict(state[name]) for name, kind in _TRACKERS.items()}
        values["progress"] = Progress(**state["progress"])
        values["window"] = Measurement(*state["window"]) if state["window"] else None
        values["seconds_each"] = tuple(float(value) for value in state["seconds_each"])
        return cls(**values)


_TRACKERS: dict[str, Any] = {
    "pooled": estimate.NoiseTracker,
    "metric": estimate.NoiseTracker,
    "typical": TypicalTracker,
    "climb": Climb,
    "products": estimate.NoiseTracker,
    "shards": estimate.ShardTracker,
}
