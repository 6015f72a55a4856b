"""The contract under any sequence of calls, and every public argument given a wrong value."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import adaptbatch as ab
from tests.models import batches, equal_state, sgd, small_model, squared
from tests.searches import costly


class Unsized:
    """A loader without a length, which fails where an item is an exception."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[torch.Tensor]:
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            yield item


class Sized(Unsized):
    def __len__(self) -> int:
        return len(self.items)


class Contract(RuleBasedStateMachine):
    """A controller beside a model of what it promises: a list of the window's examples, and a plain optimizer.

    The last layer's bias is added to the optimizer under way; the loss scale, if there is one, has another owner too.
    """

    @initialize(
        steps=st.lists(st.integers(1, 4), min_size=1, max_size=4), consecutive=st.booleans(), scaled=st.booleans()
    )
    def start(self, steps: list[int], consecutive: bool, scaled: bool) -> None:
        self.steps, self.consecutive, self.limits = steps, consecutive, ab.Limits()
        self.k = steps[0]
        self.ours, self.twin = small_model(), small_model()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) if scaled else None
        self.added = False
        self.optimizer, self.plain = self.sgd(self.ours), self.sgd(self.twin)
        self.controller = self.make(self.ours, self.optimizer)
        # Of each micro-batch: its examples, whether the first layer was frozen, whether the bias was there.
        self.window: list[tuple[torch.Tensor, bool, bool]] = []
        self.frozen = self.rewritten = self.left = False
        self.handles: list[Any] = []
        self.taken, self.rows, self.turn, self.seen = 0, 0, 0, 0
        self.finished = self.broken = self.interrupted = False
        self.clips: list[float] = []
        self.saved: dict[str, Any] | None = None

    def sgd(self, model: nn.Module) -> torch.optim.Optimizer:
        bias = model[2].bias.requires_grad_(self.added)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p is not bias], lr=0.05, momentum=0.9)
        if self.added:
            optimizer.add_param_group({"params": [bias]})
        return optimizer

    def make(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> ab.BatchController:
        return ab.BatchController(
            model,
            optimizer,
            rule=ab.rules.Replay(self.steps),
            consecutive=self.consecutive,
            limits=self.limits,
            scaler=self.scaler,
        )

    def bound(self) -> None:
        """Between windows the size of the next one is within the limits, whatever came before."""
        if not (self.window or self.broken):
            self.k = min(max(self.k, self.limits.lower), self.limits.max_steps)

    @property
    def due(self) -> bool:
        return self.finished or len(self.window) >= self.k

    @rule(size=st.integers(1, 5), seed=st.integers(0, 99), poison=st.sampled_from([0.0] * 8 + [math.nan, math.inf]))
    def backward(self, size: int, seed: int, poison: float) -> None:
        self.hear(batches([size], seed)[0] + poison)

    def hear(self, x: torch.Tensor) -> None:
        call = lambda: self.controller.backward(squared(self.ours, x), weight=len(x))  # noqa: E731
        if self.broken or self.due or self.rewritten:
            with pytest.raises(RuntimeError, match=r"discard_window\(\)|a step is due"):
                call()
            return
        call()
        self.window.append((x, self.frozen, self.added))

    @rule(
        sizes=st.lists(st.integers(1, 3), min_size=1, max_size=5),
        fault=st.sampled_from(["none", "loader", "body before", "body after"]),
        at=st.integers(0, 4),
        sized=st.booleans(),
    )
    def epoch(self, sizes: list[int], fault: str, at: int, sized: bool) -> None:
        """A loop over a loader, which raises, or which an interrupt leaves; whoever goes on goes on with the window."""
        items: list[Any] = batches(sizes, at)
        # Every item before an error of the loader is handed out.
        failing = [*items[:at], OSError("disk"), *items[at:]] if fault == "loader" else items
        fails = fault == "loader" or (fault != "none" and at < len(items))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if fails:
                with pytest.raises((OSError, KeyboardInterrupt)):
                    self.loop((Sized if sized else Unsized)(failing), fault, at, len(items))
            else:
                self.loop((Sized if sized else Unsized)(failing), fault, at, len(items))
        pending = self.left and self.held
        self.left = fails
        told = [str(one.message) for one in caught]
        assert any("left within a window" in one for one in told) == bool(pending), told
        assert all(
            "left within a window" in one or "no item had its backward" in one or "stays open" in one for one in told
        ), told

    def loop(self, loader: Unsized, fault: str, at: int, count: int) -> None:
        self.held = len(self.window)
        for index, x in enumerate(self.controller.micro_batches(loader)):
            if fault == "body before" and index == at:
                raise KeyboardInterrupt
            heard = len(self.window)
            self.hear(x)
            # A window that was due before, or cannot be heard, is not ended by the data's end.
            self.finished |= len(self.window) > heard and index == count - 1 and fault != "loader"
            if fault == "body after" and index == at:
                raise KeyboardInterrupt
            if self.controller.step_due:
                self.step()

    @rule(frozen=st.booleans())
    def freeze_or_thaw(self, frozen: bool) -> None:
        """The first layer is trained, or not, from the next micro-batch on."""
        self.frozen = frozen
        self.ours[0].requires_grad_(not frozen)

    @precondition(lambda self: self.window and not (self.due or self.broken))
    @rule(factor=st.sampled_from([0.0, 0.5]))
    def write_past_the_counters(self, factor: float) -> None:
        for g in self.gradients:
            g.data.mul_(factor)
            self.rewritten = True

    @property
    def gradients(self) -> list[torch.Tensor]:
        """Those that a write makes wrong: what is not finite is skipped whatever is done to it."""
        found = [p.grad for p in self.ours.parameters() if p.grad is not None]
        return found if all(torch.isfinite(g).all() for g in found) and any(g.any() for g in found) else []

    @precondition(lambda self: not self.added)
    @rule()
    def add_param_group(self) -> None:
        """The last bias is trained from the next micro-batch on."""
        self.added = True
        for model, optimizer in ((self.ours, self.optimizer), (self.twin, self.plain)):
            model[2].bias.requires_grad_(True)
            optimizer.add_param_group({"params": [model[2].bias]})

    @precondition(lambda self: self.scaler is not None)
    @rule(scale=st.none() | st.sampled_from([1.0, 2.0**16]), poison=st.sampled_from([1.0, math.inf]))
    def update_the_scaler(self, scale: float | None, poison: float) -> None:
        """Another owner of the loss scale: sets it, or steps another network through it, which overflows or not."""
        assert self.scaler is not None
        weight = nn.Parameter(torch.ones(1))
        other = torch.optim.SGD([weight], lr=0.5)
        self.scaler.scale(weight.sum() * poison).backward()
        if scale is not None:
            self.scaler.update(scale)
            return
        self.scaler.step(other)
        self.scaler.update()
        assert weight.item() == (0.5 if poison == 1.0 else 1.0)

    @precondition(lambda self: self.scaler and self.window and not (self.due or self.broken or self.rewritten))
    @rule()
    def unscale_by_hand(self) -> None:
        """Within the window, at whose end the controller does so itself."""
        assert self.scaler is not None
        # By one it changes nothing.
        if self.gradients and self.scaler.get_scale() != 1.0:
            self.scaler.unscale_(self.optimizer)
            self.rewritten = True

    @precondition(lambda self: not self.due)
    @rule()
    def step_of_a_plain_loop(self) -> None:
        if self.window:
            with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) was called within an open window"):
                self.optimizer.step()

    @rule()
    def late_hook(self) -> None:
        """One that changes nothing, so that the twin needs none; it makes ours hook anew."""
        if not self.frozen:
            self.handles.append(self.ours[0].weight.register_hook(lambda g: g * 1.0))

    @precondition(lambda self: not (self.due or self.broken or self.rewritten))
    @rule()
    def fail_in_backward(self) -> None:
        """An error raised by the backward pass itself leaves a window that can only be discarded."""
        x = batches([2])[0]
        loss = squared(self.ours, x)
        torch.autograd.grad(loss, [p for p in self.ours.parameters() if p.requires_grad])
        with pytest.raises(RuntimeError, match="second time"):
            self.controller.backward(loss, weight=2)
        self.broken = True

    @rule()
    def close_window(self) -> None:
        if self.broken:
            with pytest.raises(RuntimeError, match=r"last backward\(\) failed"):
                self.controller.close_window()
            return
        if self.rewritten and not self.due:
            with pytest.raises(RuntimeError, match=r"close_window\(\) found gradients that were changed"):
                self.controller.close_window()
            return
        self.controller.close_window()
        self.finished = bool(self.window)

    @precondition(lambda self: self.due and not (self.broken or self.rewritten or self.interrupted))
    @rule()
    def interrupt_in_step(self) -> None:
        """Just before the update, where it may as well have been within."""

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        if all(torch.isfinite(x).all() for x, *_ in self.window):
            handle = self.optimizer.register_step_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                self.controller.step()
            handle.remove()
            self.interrupted = True

    @precondition(lambda self: self.due and not (self.broken or self.rewritten or self.interrupted))
    @rule(length=st.floats(0.01, 10.0))
    def clip(self, length: float) -> None:
        """As in any loop; the twin is clipped in its step."""
        # A window that was loaded is put in place for whoever asks whether it is due.
        assert self.controller.step_due
        nn.utils.clip_grad_norm_([p for p in self.ours.parameters() if p.grad is not None], length)
        self.clips.append(length)

    @rule()
    def step(self) -> None:
        if not self.due or self.broken:
            with pytest.raises(RuntimeError, match=r"step\(\) is early"):
                self.controller.step()
            return
        if self.rewritten:
            with pytest.raises(RuntimeError, match=r"changed within the window.*discard_window"):
                self.controller.step()
            return
        if self.interrupted:
            with pytest.raises(RuntimeError, match=r"interrupted within the optimizer's step.*discard_window\(\)"):
                self.controller.step()
            return
        whole = torch.cat([x for x, *_ in self.window])
        finite = bool(torch.isfinite(whole).all())
        self.controller.step()
        if finite:
            for x, frozen, added in self.window:
                self.twin[0].requires_grad_(not frozen)
                self.twin[2].bias.requires_grad_(added)
                (squared(self.twin, x) * (len(x) / len(whole))).backward()
            self.twin.requires_grad_(True)
            for length in self.clips:
                nn.utils.clip_grad_norm_(self.twin.parameters(), length)
            self.plain.step()
            self.plain.zero_grad()
            self.taken += 1
        row = self.controller.history.to_pandas().iloc[-1]
        assert row["skipped"] == (not finite)
        assert row["accumulation_steps"] == len(self.window)
        assert row["global_batch"] == len(whole)
        assert (row["reason"] == "nonfinite") <= (not finite)
        self.seen += len(whole)
        self.rows += 1
        self.turn += 1
        self.k = self.steps[min(self.turn, len(self.steps) - 1)]
        self.window, self.clips, self.finished = [], [], False
        self.bound()

    @rule()
    def discard_window(self) -> None:
        self.controller.discard_window()
        self.window, self.clips, self.finished, self.broken, self.rewritten = [], [], False, False, False
        self.interrupted = False
        self.bound()

    @rule(smallest=st.none() | st.integers(1, 3), more=st.integers(0, 2))
    def set_limits(self, smallest: int | None, more: int) -> None:
        self.limits = ab.Limits(min_steps=smallest, max_steps=(smallest or 1) + more)
        self.controller.limits = self.limits
        assert self.controller.limits == ab.Limits(min_steps=smallest or 1, max_steps=self.limits.max_steps)
        self.bound()

    @rule()
    def set_wrong_limits(self) -> None:
        before = self.controller.limits
        with pytest.raises(ValueError, match="limits must be a Limits, got 4"):
            self.controller.limits = 4
        assert self.controller.limits == before

    @rule()
    def save(self) -> None:
        if self.broken or self.rewritten or self.interrupted or (self.due and self.scaler):
            with pytest.raises(RuntimeError, match=r"discard_window|too late in a due window"):
                self.controller.state_dict()
            return
        parts = (self.ours, self.optimizer, self.controller, self.twin, self.plain)
        self.saved = {"parts": copy.deepcopy([part.state_dict() for part in parts])}
        names = ("taken", "turn", "seen", "finished", "k", "added")
        self.saved |= {name: getattr(self, name) for name in names} | {
            "window": list(self.window),
            "clips": list(self.clips),
        }

    @precondition(lambda self: self.saved is not None)
    @rule(fresh=st.booleans())
    def load(self, fresh: bool) -> None:
        assert self.saved is not None
        # torch itself refuses an optimizer with other groups.
        if fresh or self.added != self.saved["added"]:
            fresh, self.added = True, self.saved["added"]
            self.controller.discard_window()
            self.controller.close()
            self.ours, self.twin = small_model(1), small_model(1)
            self.ours[0].requires_grad_(not self.frozen)
            self.rewritten = self.left = self.interrupted = False
            self.optimizer, self.plain = self.sgd(self.ours), self.sgd(self.twin)
            self.controller = self.make(self.ours, self.optimizer)
            self.rows = 0
        elif self.window or self.broken:
            with pytest.raises(RuntimeError, match=r"load_state_dict\(\) is for between windows"):
                self.controller.load_state_dict(copy.deepcopy(self.saved["parts"][2]))
            return
        parts = (self.ours, self.optimizer, self.controller, self.twin, self.plain)
        for part, state in zip(parts, copy.deepcopy(self.saved["parts"]), strict=True):
            part.load_state_dict(state)
        # Rows of windows that come again are cut.
        self.rows = max(0, min(self.rows, self.rows + self.saved["turn"] - self.turn)) if not fresh else 0
        for name in ("taken", "turn", "seen", "finished", "k"):
            setattr(self, name, self.saved[name])
        self.window, self.clips, self.broken = list(self.saved["window"]), list(self.saved["clips"]), False
        self.bound()

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "controller"):
            return
        assert self.controller.accumulation_steps == self.k
        if not (self.window or self.broken):
            assert self.limits.lower <= self.k <= self.limits.max_steps
        assert self.controller.step_due == (self.due and not self.broken)
        assert self.controller.examples_seen == self.seen
        assert len(self.controller.history) == self.rows
        for p, q in zip(self.ours.parameters(), self.twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)

    def teardown(self) -> None:
        if hasattr(self, "controller"):
            self.controller.discard_window()
            self.controller.close()
            for handle in self.handles:
                handle.remove()
            assert not any(p._backward_hooks for p in self.ours.parameters())


TestContract = Contract.TestCase
TestContract.settings = costly(60, stateful_step_count=30, deadline=None)


def build(**options: Any) -> Callable[[], object]:
    model = small_model()
    return lambda: ab.BatchController(model, sgd(model), **options)


def limit(limits: Any, **options: Any) -> Callable[[], object]:
    controller: Any = build(**options)()
    return lambda: setattr(controller, "limits", limits)


WRONG: list[tuple[str, Callable[[], object], str]] = [
    ("population", build(population=0), r"population must be at least 1 example, got population = 0"),
    ("population nan", build(population=math.nan), r"population must be at least 1 example, got population = nan"),
    ("metric", build(metric="fisher"), r"metric must be one of \('euclidean', 'adam'\), got metric = 'fisher'"),
    ("sync", build(sync="never"), r"sync must be one of \('last', 'every'\), got sync = 'never'"),
    ("scaler", build(scaler=2.0), r"scaler must be a torch\.amp\.GradScaler or None, got float"),
    ("min_steps", lambda: ab.Limits(min_steps=0), r"min_steps must be .* got min_steps = 0"),
    ("max_steps", lambda: ab.Limits(max_steps=0), r"max_steps must be .* got max_steps = 0"),
    ("max_steps float", lambda: ab.Limits(max_steps=2.5), r"max_steps must be .* got max_steps = 2\.5"),
    ("limits", lambda: ab.Limits(min_steps=4, max_steps=2), r"min_steps must not exceed max_steps"),
    ("max_growth", lambda: ab.Limits(max_growth=1.0), r"max_growth must be finite and above 1, got max_growth = 1\.0"),
    ("max_shrink", lambda: ab.Limits(max_shrink=1.0), r"max_shrink must be in \(0, 1\), got max_shrink = 1\.0"),
    ("theta", lambda: ab.RelativeStandardError(theta=0.0), r"theta must be .* got theta = 0\.0"),
    ("theta nan", lambda: ab.RelativeStandardError(theta=math.nan), r"theta must be .* got theta = nan"),
    ("memory", lambda: ab.RelativeStandardError(memory=-1.0), r"memory must be .* got memory = -1\.0"),
    ("dead_time", lambda: ab.RelativeStandardError(dead_time=-1.0), r"dead_time must be .* got dead_time = -1\.0"),
    ("fixed", lambda: ab.Fixed(0), r"accumulation_steps must be .* got accumulation_steps = 0"),
    ("replay", lambda: ab.rules.Replay([]), r"accumulation_steps must .* got"),
    ("one step", build(limits=ab.Limits(min_steps=1)), r"min_steps must be at least 2 for RelativeStandardError"),
    ("limits of another kind", build(limits={"max_steps": 4}), r"limits must be a Limits, got \{'max_steps': 4\}; Lim"),
    ("new limits", limit((1, 4)), r"limits must be a Limits, got \(1, 4\); Limits\(max_steps=64\) allows up to 64"),
    ("new limits none", limit(None), r"limits must be a Limits, got None"),
    ("new limits of one", limit(ab.Limits(max_steps=1)), r"max_steps must be at least 2 for RelativeStandardError"),
    ("new one step", limit(ab.Limits(min_steps=1)), r"min_steps must be at least 2 for RelativeStandardError"),
    ("unit", lambda: ab.ScheduleDriver(_scheduler(), unit=0), r"unit must be .* got unit = 0"),
]


def _scheduler() -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(sgd(small_model()), step_size=1)


@pytest.mark.parametrize(("call", "message"), [pytest.param(*case[1:], id=case[0]) for case in WRONG])
def test_a_wrong_value_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (0, r"weight must be positive and finite, got weight = 0; skip an empty micro-batch"),
        (-1.0, r"weight must be positive and finite, got weight = -1\.0"),
        (math.nan, r"weight must be positive and finite, got weight = nan"),
        (math.inf, r"weight must be positive and finite, got weight = inf"),
        (True, r"weight must be positive and finite, got weight = True"),
        (torch.tensor(4), r"weight must be a Python number, got a tensor"),
    ],
    ids=str,
)
def test_a_wrong_weight_is_refused_and_loses_nothing(weight, message):
    ours, twin = small_model(), small_model()
    data = batches([4, 3])
    controller, plain = (ab.BatchController(model, sgd(model), rule=ab.Fixed(2)) for model in (ours, twin))
    controller.backward(squared(ours, data[0]), weight=4)
    with pytest.raises(ValueError, match=message):
        controller.backward(squared(ours, data[1]), weight=weight)
    controller.backward(squared(ours, data[1]), weight=3)
    for x in data:
        plain.backward(squared(twin, x), weight=len(x))
    controller.step()
    plain.step()
    assert equal_state(ours, twin)


@pytest.mark.parametrize(
    "loss",
    [lambda model: model(batches([4])[0]), lambda model: torch.zeros(()), lambda model: 1.0],
    ids=["not a scalar", "no graph", "a number"],
)
def test_a_wrong_loss_is_refused(loss):
    model = small_model()
    controller = ab.BatchController(model, sgd(model))
    with pytest.raises(
        ValueError, match="loss must be a scalar tensor with a graph, the mean over the micro-batch, got"
    ):
        controller.backward(loss(model), weight=4)


def test_a_model_without_a_trainable_parameter_is_refused():
    model = small_model()
    optimizer = sgd(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="optimizer must hold at least one parameter with requires_grad=True"):
        ab.BatchController(model, optimizer)


class TestGradients:
    def test_zero_gradients_are_no_evidence_of_anything(self):
        """A flat loss: neither signal nor noise; no division by zero, no endless growth."""
        model = small_model()
        controller = ab.BatchController(model, sgd(model), limits=ab.Limits(max_steps=8))
        for x in batches([4] * 64):
            controller.backward(0.0 * squared(model, x), weight=4)
            if controller.step_due:
                controller.step()
        rows = controller.history.to_pandas()
        assert (rows["batch_grad_norm"] == 0.0).all()
        assert set(rows["reason"]) <= {"undecided", "signal_lost", "hold", "at_max"}

    def test_all_from_one_example(self):
        """Micro-batches that repeat one example: no noise at all, so the smallest window is enough."""
        model = small_model()
        controller = ab.BatchController(model, sgd(model))
        x = batches([1])[0].expand(4, 4)
        for _ in range(60):
            controller.backward(squared(model, x), weight=4)
            if controller.step_due:
                controller.step()
        rows = controller.history.to_pandas()
        assert (rows["accumulation_steps"] == 2).all()
        assert rows["noise_trace"].abs().max() < 1e-6 * rows["grad_sq_norm"].max()
