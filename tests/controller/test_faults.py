"""What real programs do to an open window: right to rounding, or refused by a sentence that is true and a way on."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

import adaptbatch as ab
from tests.models import batches, equal_state, sgd, small_model, squared


def controlled(steps: int, **options) -> ab.BatchController:
    model = small_model()
    return ab.BatchController(model, sgd(model), rule=ab.Fixed(steps), **options)


def goes_on(c: ab.BatchController) -> None:
    """The way on works: after discard_window() the next window is a plain mean."""
    c.discard_window()
    dtype = next(c.model.parameters()).dtype
    twin = small_model(dtype=dtype)
    twin.load_state_dict(c.model.state_dict())
    plain = torch.optim.SGD(twin.parameters(), lr=1.0)
    plain.load_state_dict(copy.deepcopy(c.optimizer.state_dict()))
    data = batches([4] * c.accumulation_steps, seed=7, dtype=dtype)
    for x in data:
        c.backward(squared(c.model, x), weight=4)
    c.step()
    squared(twin, torch.cat(data)).backward()
    plain.step()
    for p, q in zip(c.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


# --- A. a loss scale with several owners -----------------------------------------------------------------------------


def two_networks(steps: int, init_scale: float = 1024.0, **scaling) -> tuple[list, torch.amp.GradScaler]:
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, **scaling)
    models = [small_model(seed, dtype=torch.float32) for seed in (0, 1)]
    return [ab.BatchController(m, sgd(m), rule=ab.Fixed(steps), scaler=scaler) for m in models], scaler


def update_of(call: Callable[[], object], model: nn.Module) -> list[Tensor]:
    before = [p.detach().clone() for p in model.parameters()]
    call()
    return [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]


class TestOneScalerForTwoNetworks:
    def expected(self, c: ab.BatchController, x: Tensor) -> list[Tensor]:
        gradients = torch.autograd.grad(squared(c.model, x), list(c.model.parameters()))
        return [c.optimizer.param_groups[0]["lr"] * g for g in gradients]

    def test_both_normalised_then_both_stepped(self):
        (a, b), _ = two_networks(1)
        x = batches([4], dtype=torch.float32)[0]
        for c in (a, b):
            c.backward(squared(c.model, x), weight=4)
        wanted = [self.expected(c, x) for c in (a, b)]
        for c, want in zip((a, b), wanted, strict=True):
            torch.testing.assert_close(update_of(c.step, c.model), want, rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize("event", ["growth", "overflow", "update by hand"])
    def test_the_scale_changes_within_the_others_window(self, event: str):
        (a, b), scaler = two_networks(2, growth_interval=1)
        data = batches([4, 4], dtype=torch.float32)
        a.backward(squared(a.model, data[0]), weight=4)
        before = scaler.get_scale()
        if event == "update by hand":
            scaler.update(128.0)
        else:
            for x in data:
                b.backward(squared(b.model, x) * (float("inf") if event == "overflow" else 1.0), weight=4)
            b.step()
        assert scaler.get_scale() != before
        a.backward(squared(a.model, data[1]), weight=4)
        want = self.expected(a, torch.cat(data))
        torch.testing.assert_close(update_of(a.step, a.model), want, rtol=1e-5, atol=1e-8)
        row = a.history.to_pandas().iloc[0]
        length = sum((w / a.optimizer.param_groups[0]["lr"]).square().sum() for w in want).sqrt()
        assert row["batch_grad_norm"] == pytest.approx(float(length), rel=1e-4)

    def test_an_overflow_after_the_other_has_stepped_is_still_skipped(self):
        (a, b), _ = two_networks(1)
        x = batches([4], dtype=torch.float32)[0]
        a.backward(squared(a.model, x), weight=4)
        b.backward(squared(b.model, x) * float("inf"), weight=4)
        a.step()
        assert not any(u.any() for u in update_of(b.step, b.model))
        assert b.history.to_pandas()["skipped"].tolist() == [True]

    def test_a_window_goes_on_without_the_scalers_state(self):
        c, x = two_networks(2)[0][0], batches([4, 4], dtype=torch.float32)
        c.backward(squared(c.model, x[0]), weight=4)
        state, want = c.state_dict(), self.expected(c, torch.cat(x))
        fresh = torch.amp.GradScaler("cpu", init_scale=4.0)
        other = ab.BatchController(c.model, sgd(c.model), rule=ab.Fixed(2), scaler=fresh)
        c.discard_window()
        other.load_state_dict(state)
        other.backward(squared(c.model, x[1]), weight=4)
        torch.testing.assert_close(update_of(other.step, c.model), want, rtol=1e-5, atol=1e-8)

    def test_a_trainer_that_scales_is_told(self):
        c, scaler = two_networks(2)[0][0], None
        scaler = c._stepper._scaler
        assert scaler is not None
        x = batches([4], dtype=torch.float32)[0]
        with c.observe(squared(c.model, x), weight=4) as loss:
            scaler.scale(loss).backward()
        scaler.update(2.0)
        with pytest.raises(RuntimeError, match=r"loss scale was updated within the window.*discard_window\(\)"):
            c.observe(squared(c.model, x), weight=4).__enter__()

    def test_unscaled_by_hand_is_refused_and_goes_on(self):
        """The scaler still knows of it after the refusal."""
        (c, _), scaler = two_networks(2)
        x = batches([4, 4], dtype=torch.float32)
        c.backward(squared(c.model, x[0]), weight=4)
        scaler.unscale_(c.optimizer)
        with pytest.raises(RuntimeError, match=r"changed within the window, by zero_grad\(\), unscale_\(\), clipping"):
            c.backward(squared(c.model, x[1]), weight=4)
        c.discard_window()
        want = self.expected(c, torch.cat(x))
        for one in x:
            c.backward(squared(c.model, one), weight=4)
        torch.testing.assert_close(update_of(c.step, c.model), want, rtol=1e-5, atol=1e-8)

    def test_unscaled_by_hand_where_it_is_done_is_refused_by_the_scaler_and_goes_on(self):
        """As a plain loop with clipping does."""
        (c, _), scaler = two_networks(2)
        x = batches([4, 4], dtype=torch.float32)
        want = self.expected(c, torch.cat(x))
        for one in x:
            c.backward(squared(c.model, one), weight=4)
        with pytest.raises(RuntimeError, match="has already been called"):
            scaler.unscale_(c.optimizer)
        torch.testing.assert_close(update_of(c.step, c.model), want, rtol=1e-5, atol=1e-8)


# --- B. a trainable set that changes ---------------------------------------------------------------------------------


class Heads(nn.Module):
    """A trunk and two heads; the loss runs through both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(4, 3).double()
        self.heads = nn.ModuleList(nn.Linear(3, 1).double() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trunk(x).tanh()
        return sum(head(hidden) for head in self.heads)  # type: ignore[return-value]


def thawed(model: Heads, which: int) -> None:
    for index, head in enumerate(model.heads):
        head.requires_grad_(index == which)


@pytest.mark.parametrize("ghost", [False, True])
def test_heads_that_take_turns_within_a_window(ghost: bool):
    ours, twin = Heads(), Heads()
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, twin))
    sizes = [4, 28]
    c = ab.BatchController(ours, optimizer, rule=ab.Fixed(2), ghost=ghost)
    for index, x in enumerate(batches(sizes)):
        for model in (ours, twin):
            thawed(model, index)
        c.backward(squared(ours, x), weight=len(x))
        (squared(twin, x) * (len(x) / 32)).backward()
    c.step()
    plain.step()
    for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    # What was measured is the same analysis of variance, of gradients that lack the frozen head.
    cells = []
    twin = Heads()
    for index, x in enumerate(batches(sizes)):
        thawed(twin, index)
        g = (
            torch.autograd.grad(squared(twin, x), list(twin.parameters()), allow_unused=True, materialize_grads=True)
            if (all(p.requires_grad for p in twin.parameters()))
            else _gradients(twin, x)
        )
        cells.append(torch.cat([one.flatten() for one in g]))
    n = torch.tensor(sizes, dtype=torch.float64)
    mean = (n[:, None] * torch.stack(cells)).sum(0) / n.sum()
    row = c.history.to_pandas().iloc[0]
    assert row["batch_grad_norm"] == pytest.approx(float(mean.norm()), rel=1e-6)
    if not ghost:
        trace = float((n * torch.stack([(g - mean).square().sum() for g in cells])).sum())
        assert row["noise_trace"] == pytest.approx(trace, rel=1e-5)


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    found = dict(zip(trained, torch.autograd.grad(squared(model, x), trained), strict=True))
    return [found.get(p, torch.zeros_like(p)) for p in model.parameters()]


@pytest.mark.parametrize("event", ["thaw", "freeze", "add group"])
@pytest.mark.parametrize("close", [False, True], ids=["full", "partial"])
def test_parameters_come_and_go_within_a_window(event: str, close: bool):
    """The mean over the window's examples, in which a parameter counts for what reached it."""
    ours, twin = Heads(), Heads()
    made = []
    for model in (ours, twin):
        held = list(model.parameters()) if event != "add group" else [*model.trunk.parameters()]
        made.append(torch.optim.SGD(held, lr=0.1))
        model.heads.requires_grad_(event == "freeze")
        model.trunk.requires_grad_(True)
    c = ab.BatchController(ours, made[0], rule=ab.Fixed(8 if close else 2))
    total = 4 + 7
    for index, x in enumerate(batches([4, 7])):
        if index == 1:
            for model, optimizer in zip((ours, twin), made, strict=True):
                if event == "add group":
                    optimizer.add_param_group({"params": list(model.heads.parameters())})
                model.heads.requires_grad_(event != "freeze")
        c.backward(squared(ours, x), weight=len(x))
        (squared(twin, x) * (len(x) / total)).backward()
    if close:
        c.close_window()
    c.step()
    made[1].step()
    for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"consecutive": True}], ids=["plain", "consecutive"])
def test_a_group_is_added_between_a_load_and_the_next_micro_batch(options: dict):
    """As in gradual unfreezing: the optimizer is rebuilt as it was saved, and grows again."""
    ours, twin, x = Heads(), Heads(), batches([4, 7])
    for model in (ours, twin):
        model.heads.requires_grad_(False)
    ours.heads[0].requires_grad_(True)
    held = [*ours.trunk.parameters(), *ours.heads[0].parameters()]
    c = ab.BatchController(ours, torch.optim.SGD(held, lr=0.1), rule=ab.Fixed(2), **options)
    c.backward(squared(ours, x[0]), weight=4)
    other = ab.BatchController(ours, torch.optim.SGD(held, lr=0.1), rule=ab.Fixed(2), **options)
    other.load_state_dict(c.state_dict())
    c.discard_window()
    c.close()
    ours.heads[1].requires_grad_(True)
    other.optimizer.add_param_group({"params": list(ours.heads[1].parameters())})
    other.backward(squared(ours, x[1]), weight=7)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    for index, one in enumerate(x):
        for which in range(index + 1):
            twin.heads[which].requires_grad_(True)
        (squared(twin, one) * (len(one) / 11)).backward()
    other.step()
    plain.step()
    for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_a_group_is_added_while_gradients_are_kept():
    """What reached it is along the mean too."""
    model, x = Heads(), batches([4, 4, 4])
    model.heads[1].requires_grad_(False)
    held = [*model.trunk.parameters(), *model.heads[0].parameters()]
    rule, limits = ab.rules.InnerProductTest(), ab.Limits(min_steps=3, max_steps=3)
    c = ab.BatchController(model, torch.optim.SGD(held, lr=0.1), rule=rule, limits=limits)
    cells = []
    for index, one in enumerate(x):
        if index == 1:
            model.heads[1].requires_grad_(True)
            c.optimizer.add_param_group({"params": list(model.heads[1].parameters())})
        cells.append(torch.cat([g.flatten() for g in _gradients(model, one)]))
        c.backward(squared(model, one), weight=4)
    mean = torch.stack(cells).mean(0)
    want = sum(4 * float(g @ mean) ** 2 for g in cells) / float(mean @ mean)
    assert float(c._sensor.sums["radial_sq_norms"]) == pytest.approx(want, rel=1e-9)
    c.step()


def test_a_parameter_that_takes_anothers_place_within_a_window_has_its_mean():
    torch.manual_seed(0)
    one, other = nn.Linear(4, 1).double(), nn.Linear(4, 1).double()
    model = nn.ModuleList([one, other])
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    c = ab.BatchController(model, optimizer, rule=ab.Fixed(2))
    x = torch.randn(4, 4, dtype=torch.float64)
    c.backward(one(x).square().mean(), weight=12)
    optimizer.param_groups[0]["params"] = list(other.parameters())
    c.backward(other(x).square().mean(), weight=4)
    alone = torch.autograd.grad(other(x).square().mean(), list(other.parameters()))
    for p, gradient in zip(other.parameters(), alone, strict=True):
        torch.testing.assert_close(p.grad, 0.25 * gradient)


def test_a_thawed_parameter_that_is_not_finite_is_not_stepped():
    model = Heads()
    model.heads.requires_grad_(False)
    c = ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=0.1), rule=ab.Fixed(2))
    x = batches([4, 4])
    c.backward(squared(model, x[0]), weight=4)
    model.heads.requires_grad_(True)
    hidden = model.trunk(x[1]).tanh().detach() * float("nan")
    c.backward(model.heads[0](hidden).mean(), weight=4)
    c.step()
    assert c.history.to_pandas()["skipped"].tolist() == [True]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_adapters_that_alternate_are_reached():
    """One adapter a micro-batch, as with several LoRA adapters: the loss reaches the one that is trained."""
    model = Heads()
    model.trunk.requires_grad_(False)
    thawed(model, 0)
    c = ab.BatchController(model, torch.optim.SGD(model.heads.parameters(), lr=0.1), rule=ab.Fixed(2))
    for index, x in enumerate(batches([4] * 4)):
        thawed(model, index % 2)
        c.backward(squared(model, x), weight=4)
        if c.step_due:
            c.step()
    assert len(c.history) == 2


def test_a_model_that_changes_its_type_within_a_window_is_refused_by_name():
    model = small_model(dtype=torch.float32)
    c = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
    x = batches([4, 4])
    c.backward(squared(model, x[0].float()), weight=4)
    model.double()
    with pytest.raises(RuntimeError, match=r"changed their type or device within the window.*model\.double\(\)"):
        c.backward(squared(model, x[1]), weight=4)
    goes_on(c)


# --- D. what is measured is what arrives -----------------------------------------------------------------------------


def mask(g: Tensor) -> Tensor:
    return g * (torch.arange(g.numel()).reshape(g.shape) % 3 == 0)


class TestHooksOfOthers:
    @pytest.mark.parametrize("hook", [lambda g: g * 0.1, mask], ids=["scaled", "pruned"])
    @pytest.mark.parametrize("late", ["before", "after", "between windows", "within a window"])
    def test_a_tensor_hook_is_measured_whenever_it_was_registered(self, hook, late: str):
        def register(c: ab.BatchController) -> None:
            for p in c.model.parameters():
                p.register_hook(hook)

        model = small_model()
        if late == "before":
            for p in model.parameters():
                p.register_hook(hook)
        c = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
        if late == "after":
            register(c)
        data = batches([3] * 8)
        twin = small_model()
        for index, x in enumerate(data):
            if (late, index) in {("between windows", 2), ("within a window", 3)}:
                register(c)
            if index % 2 == 0:
                twin.load_state_dict(model.state_dict())
            c.backward(squared(model, x), weight=3)
            if c.step_due:
                c.step()
            if index == 7:
                cells = [
                    torch.cat(
                        [hook(g).flatten() for g in torch.autograd.grad(squared(twin, x), list(twin.parameters()))]
                    )
                    for x in data[6:]
                ]
        row = c.history.to_pandas().iloc[-1]
        mean = torch.stack(cells).mean(0)
        trace = float(sum(3 * (g - mean).square().sum() for g in cells))
        assert row["noise_trace"] == pytest.approx(trace, rel=1e-5)
        assert row["grad_sq_norm"] == pytest.approx(float(mean.square().sum()) - trace / 6, rel=1e-4, abs=1e-9)

    @pytest.mark.parametrize("steps", [1, 2])
    @pytest.mark.parametrize("windows_before", [0, 3])
    def test_a_hook_on_what_was_accumulated_is_refused(self, steps: int, windows_before: int):
        c = controlled(steps)
        data = batches([3] * steps * (windows_before + 1))
        for x in data[: steps * windows_before]:
            c.backward(squared(c.model, x), weight=3)
            if c.step_due:
                c.step()

        def halve(p: Parameter) -> None:
            p.grad.mul_(0.5)

        handles = [p.register_post_accumulate_grad_hook(halve) for p in c.model.parameters()]
        with pytest.raises(RuntimeError, match=r"is not the one that was measured.*register_post_accumulate_grad_hook"):
            c.backward(squared(c.model, data[-1]), weight=3)
        for handle in handles:
            handle.remove()
        goes_on(c)

    @pytest.mark.parametrize("index", range(4))
    def test_one_that_writes_to_a_single_parameter_in_place(self, index: int):
        """Autograd makes a small gradient .grad as it is: what is measured would be changed with it, the first time."""
        c = controlled(3)
        p = list(c.model.parameters())[index]

        def halve(p: Parameter) -> None:
            p.grad.mul_(0.5)

        handle = p.register_post_accumulate_grad_hook(halve)
        with pytest.raises(RuntimeError, match=r"is not the one that was measured.*register_post_accumulate_grad_hook"):
            c.backward(squared(c.model, batches([3])[0]), weight=3)
        handle.remove()
        goes_on(c)

    def test_one_that_only_looks_is_welcome(self):
        seen, c = [], controlled(2)
        for p in c.model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm()))
        for x in batches([3, 3]):
            c.backward(squared(c.model, x), weight=3)
        c.step()
        assert len(seen) == 2 * len(list(c.model.parameters()))

    @pytest.mark.parametrize("lazy", [1, 3])
    def test_a_gradient_penalty_is_measured_where_it_is_in_the_loss(self, lazy: int):
        """A double backward, in every micro-batch or now and then: hooks hear the sum, once."""

        def loss(model: nn.Module, x: Tensor, index: int) -> Tensor:
            x = x.clone().requires_grad_()
            plain = squared(model, x)
            if index % lazy:
                return plain
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            return plain + slope.square().sum(1).mean()

        c, x = controlled(3), batches([3, 3, 3])
        parameters = list(c.model.parameters())
        cells = []
        for index, one in enumerate(x):
            found = torch.autograd.grad(loss(c.model, one, index), parameters, allow_unused=True)
            cells.append(torch.cat([g.flatten() for g in found]))
            c.backward(loss(c.model, one, index), weight=3)
        c.step()
        mean = torch.stack(cells).mean(0)
        trace = float(sum(3 * (g - mean).square().sum() for g in cells)) / 2
        assert c.history.to_pandas()["noise_trace"].iloc[0] == pytest.approx(trace, rel=1e-5)

    def test_ghost_norms_miss_a_penalty_that_begins_late_and_say_so(self):
        c = controlled(1, ghost=True)
        for index, x in enumerate(batches([6] * 3)):
            loss = squared(c.model, x)
            if index == 2:
                loss = loss + 500.0 * sum(p.square().sum() for p in c.model.parameters())
            c.backward(loss, weight=6)
            if index < 2:
                c.step()
        with pytest.raises(RuntimeError, match=r"longer than its micro-batches' gradients allow.*a penalty"):
            c.step()
        goes_on(c)


# --- G. the first micro-batch of a window ----------------------------------------------------------------------------


@pytest.mark.parametrize("heavy", [17, 64, 1000])
def test_no_loss_is_blown_up_far_beyond_its_mean(heavy: int):
    """Of equal micro-batches it is multiplied by ``1 / k``; of one that is heavier, by four times that at most."""
    c = controlled(8)
    for x in batches([4] * 8):
        c.backward(squared(c.model, x), weight=4)
    c.step()
    for weight in (4, heavy):
        loss = squared(c.model, batches([4])[0])
        with c.observe(loss, weight=weight) as weighted:
            weighted.backward()
        assert weighted.item() / loss.item() <= 4.0 / 8.0


def test_a_light_first_micro_batch_costs_no_window_of_the_loss_scale():
    """Token weights 1, 1024, 1024, 1024 in half precision: a plain loop of means overflows nowhere, nor does this."""
    torch.manual_seed(0)
    weight = Parameter(torch.ones(4))
    model = nn.ParameterList([weight])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    c = ab.BatchController(model, torch.optim.SGD([weight], lr=1e-6), rule=ab.Fixed(4), scaler=scaler)
    for _ in range(12):
        for tokens in (1, 1024, 1024, 1024):
            # The gradient passes through half precision on its way, as activations do under autocast.
            x = (weight * torch.rand(4)).half()
            c.backward(x.float().sum() * 0.25, weight=tokens)
        c.step()
    assert c.history.to_pandas()["skipped"].sum() == 0
    assert scaler.get_scale() == 2.0**16


# --- H. writes that no version counter sees, and steps that are not ours ---------------------------------------------

WRITES: dict[str, Callable[[Tensor], object]] = {
    "zero": lambda g: g.data.zero_(),
    "scale": lambda g: g.data.mul_(0.5),
    "clamp": lambda g: g.data.clamp_(-1e-3, 1e-3),
    "numpy": lambda g: g.detach().numpy().fill(1.0),
    "half of it": lambda g: g.data[:1].zero_(),
    "no_grad": lambda g: g.mul_(0.5),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("windows_before", [0, 5])
def test_a_write_to_an_open_windows_gradients_is_refused(write, windows_before: int):
    c = controlled(2)
    data = batches([3] * 2 * (windows_before + 1))
    for x in data[:-2]:
        c.backward(squared(c.model, x), weight=3)
        if c.step_due:
            c.step()
    c.backward(squared(c.model, data[-2]), weight=3)
    with torch.no_grad():
        for p in c.model.parameters():
            write(p.grad)
    with pytest.raises(RuntimeError, match=r"changed within the window.*a write through \.data.*discard_window\(\)"):
        c.backward(squared(c.model, data[-1]), weight=3)
    goes_on(c)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("windows_before", [0, 5])
def test_a_write_to_a_due_windows_mean_is_its_users(write, windows_before: int):
    """Clipping by another name: what the optimizer gets is what is recorded; nothing at all is refused."""
    c = controlled(2)
    for x in batches([3] * 2 * windows_before):
        c.backward(squared(c.model, x), weight=3)
        if c.step_due:
            c.step()
    for x in batches([3, 3]):
        c.backward(squared(c.model, x), weight=3)
    with torch.no_grad():
        for p in c.model.parameters():
            write(p.grad)
    # No momentum: the update is the gradient's.
    c.optimizer.state.clear()
    gradients = [p.grad for p in c.model.parameters()]
    left = float(torch.cat([g.flatten() for g in gradients]).norm())
    if left == 0.0:
        with pytest.raises(RuntimeError, match=r"gradients are gone.*discard_window\(\)"):
            c.step()
        goes_on(c)
        return
    applied = [c.optimizer.param_groups[0]["lr"] * g.clone() for g in gradients]
    torch.testing.assert_close(update_of(c.step, c.model), applied, rtol=1e-9, atol=1e-12)
    assert c.history.to_pandas()["applied_grad_norm"].iloc[-1] == pytest.approx(left, rel=1e-6)


@pytest.mark.parametrize("windows_before", [0, 5])
@pytest.mark.parametrize("at", [0, 1], ids=["within", "due"])
def test_another_networks_loss_that_reaches_these_parameters_is_refused(at: int, windows_before: int):
    """A discriminator's own loop back-propagates through the generator; requires_grad_(False) keeps it off."""
    c, judge = controlled(2), nn.Linear(3, 1).double()
    data = batches([3] * 2 * (windows_before + 1))
    for x in data[:-2]:
        c.backward(squared(c.model, x), weight=3)
        judge(c.model(x).detach()).mean().backward()
        if c.step_due:
            c.step()
    for x in data[-2:][: at + 1]:
        c.backward(squared(c.model, x), weight=3)
    judge(c.model(data[0])).mean().backward()
    with pytest.raises(RuntimeError, match=r"another backward pass.*off\s+these parameters by requires_grad_"):
        c.step() if at else c.backward(squared(c.model, data[-1]), weight=3)
    goes_on(c)


def test_an_interrupt_within_the_backward_pass_leaves_a_window_to_discard():
    c, x = controlled(2), batches([3, 3])

    def interrupt(_: Tensor) -> None:
        raise KeyboardInterrupt

    c.backward(squared(c.model, x[0]), weight=3)
    handle = c.model[0].weight.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        c.backward(squared(c.model, x[1]), weight=3)
    handle.remove()
    for call in (lambda: c.backward(squared(c.model, x[1]), weight=3), c.close_window, c.state_dict):
        with pytest.raises(RuntimeError, match=r"last backward\(\) failed.*discard_window\(\)"):
            call()
    goes_on(c)


def test_an_optimizer_step_left_in_the_loop_is_refused():
    c = controlled(2)
    x = batches([3, 3])
    before = [p.detach().clone() for p in c.model.parameters()]
    c.backward(squared(c.model, x[0]), weight=3)
    with pytest.raises(
        RuntimeError, match=r"optimizer\.step\(\) was called within an open window.*controller\.step\(\)"
    ):
        c.optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(c.model.parameters(), before, strict=True))
    c.backward(squared(c.model, x[1]), weight=3)
    c.optimizer.step()
    with pytest.raises(RuntimeError, match=r"has stepped since the window is due.*record_step\(\)"):
        c.step()
    c.optimizer.zero_grad()
    c.record_step()
    assert len(c.history) == 1
    c.close()
    assert not c.optimizer._optimizer_step_pre_hooks


# --- K. errors have a way on -----------------------------------------------------------------------------------------


def test_a_pass_before_a_load_added_nothing_to_the_loaded_window():
    first, second = controlled(2), controlled(2)
    for x in batches([4, 4]):
        first.backward(squared(first.model, x), weight=4)
    squared(second.model, batches([4])[0]).backward()
    second.optimizer.zero_grad()
    second.load_state_dict(first.state_dict())
    for c in (first, second):
        c.step()
    assert equal_state(first.model, second.model)


def test_a_trainer_that_says_so_late_may_step():
    c = controlled(2)
    c.backward(squared(c.model, batches([4])[0]), weight=4)
    c.expect_trainer()
    c.optimizer.step()


def test_an_optimizer_in_the_backward_pass_is_named():
    c = controlled(2)

    def use_up(p: Parameter) -> None:
        with torch.no_grad():
            p.sub_(0.1 * p.grad)
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(use_up) for p in c.model.parameters()]
    with pytest.raises(RuntimeError, match=r"no parameter has a gradient after.*an optimizer in the backward pass"):
        c.backward(squared(c.model, batches([3])[0]), weight=3)
    for handle in handles:
        handle.remove()
    goes_on(c)


@pytest.mark.parametrize("ours", [False, True], ids=["before the window", "at its end"])
def test_gradients_that_are_filled_with_zeros_are_none(ours: bool):
    class Filling(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = False) -> None:
            super().zero_grad(set_to_none=False)

    models = small_model(), small_model()
    optimizers = [kind(m.parameters(), lr=0.1) for kind, m in zip((Filling, torch.optim.SGD), models, strict=True)]
    cs = [ab.BatchController(m, o, rule=ab.Fixed(2)) for m, o in zip(models, optimizers, strict=True)]
    if not ours:
        squared(models[0], batches([3])[0]).backward()
        optimizers[0].zero_grad()
    for x in batches([3] * 6):
        for c in cs:
            c.backward(squared(c.model, x), weight=3)
            if c.step_due:
                c.step()
    assert equal_state(*models)


def test_gradients_of_before_are_still_refused():
    c = controlled(2)
    squared(c.model, batches([3])[0]).backward()
    with pytest.raises(RuntimeError, match="gradients are left from before this window"):
        c.backward(squared(c.model, batches([3])[0]), weight=3)


@pytest.mark.parametrize("ghost", [False, True])
def test_a_loss_that_reaches_nothing_costs_no_good_micro_batch(ghost: bool):
    c, twin = controlled(2, ghost=ghost), controlled(2)
    x = batches([3, 3])
    stray = Parameter(torch.ones(1))
    c.backward(squared(c.model, x[0]), weight=3)
    with pytest.raises(RuntimeError, match="does not reach a parameter of the optimizer"):
        c.backward(stray.sum(), weight=3)
    c.backward(squared(c.model, x[1]), weight=3)
    c.step()
    for one in x:
        twin.backward(squared(twin.model, one), weight=3)
    twin.step()
    assert equal_state(c.model, twin.model)


def test_an_interrupt_within_the_step_applies_no_update_twice():
    class Interrupted(torch.optim.SGD):
        fails = True

        def step(self, closure=None):
            super().step(closure)
            if self.fails:
                raise KeyboardInterrupt

    model = small_model()
    optimizer = Interrupted(model.parameters(), lr=0.1)
    c = ab.BatchController(model, optimizer, rule=ab.Fixed(1))
    c.backward(squared(model, batches([3])[0]), weight=3)
    with pytest.raises(KeyboardInterrupt):
        c.step()
    moved = [p.detach().clone() for p in model.parameters()]
    for call in (c.step, c.state_dict):
        with pytest.raises(RuntimeError, match=r"interrupted within the optimizer's step.*discard_window\(\)"):
            call()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), moved, strict=True))
    optimizer.fails = False
    goes_on(c)


def test_an_optimizer_of_another_model_is_refused_when_the_controller_is_made():
    with pytest.raises(ValueError, match=r"optimizer must hold parameters of model, got .* none of which it has"):
        ab.BatchController(small_model(), sgd(small_model()))


def test_a_lazy_layer_is_named_before_it_has_a_shape():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"got 2 parameters of lazy layers without a shape; run one forward pass"):
        ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=0.1))


# --- L. hooks that others meet ---------------------------------------------------------------------------------------


def test_parameters_travel_to_other_processes_without_a_warning():
    c = controlled(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for p in c.model.parameters():
            torch.utils.hooks.warn_if_has_hooks(p)
        there = pickle.loads(pickle.dumps(c.model))
    assert not any(p._backward_hooks for p in there.parameters())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_a_model_can_be_scripted_once_its_ghost_norms_are_closed():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    ab.BatchController(model, sgd(model), rule=ab.Fixed(1), ghost=True).close()
    x = torch.randn(5, 4)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


# --- a history after a load ------------------------------------------------------------------------------------------


def test_a_load_cuts_the_rows_of_the_branch_that_is_left():
    c, data = controlled(1), batches([3] * 6)
    for x in data[:2]:
        c.backward(squared(c.model, x), weight=3)
        c.step()
    state = c.state_dict()
    for x in data[2:]:
        c.backward(squared(c.model, x), weight=3)
        c.step()
    c.load_state_dict(state)
    assert c.history.to_pandas()["optimizer_step"].tolist() == [1, 2]
    c.backward(squared(c.model, data[0]), weight=3)
    c.step()
    assert c.history.to_pandas()["optimizer_step"].tolist() == [1, 2, 3]
    fresh = controlled(1)
    fresh.load_state_dict(state)
    fresh.backward(squared(fresh.model, data[0]), weight=3)
    fresh.step()
    assert fresh.history.to_pandas()["optimizer_step"].tolist() == [3]
    fresh.load_state_dict(state)
    assert len(fresh.history) == 0


def test_the_functional_loss_of_the_docs_still_runs():
    model = nn.Linear(4, 2)
    c = ab.BatchController(model, torch.optim.AdamW(model.parameters()))
    for x in c.micro_batches([torch.randn(8, 4) for _ in range(4)]):
        c.backward(F.mse_loss(model(x), x[:, :2]), weight=len(x))
        if c.step_due:
            c.step()
    assert len(c.history) == 2


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("fault", ["written", "hook"])
def test_what_a_device_finds_late_is_refused_with_the_windows_numbers(fault: str, skip: bool):
    """As on a GPU, where nothing is read before the window's end: before the step where that is read, else after it."""
    c = controlled(2, skip_nonfinite=skip)
    c._accumulator.suspicion.reads_now = False
    before = [p.detach().clone() for p in c.model.parameters()]
    data = batches([3, 3])

    def halve(p: Parameter) -> None:
        p.grad = p.grad * 0.5

    hooked = list(c.model.parameters()) if fault == "hook" else []
    handles = [p.register_post_accumulate_grad_hook(halve) for p in hooked]
    c.backward(squared(c.model, data[0]), weight=3)
    if fault == "written":
        for p in c.model.parameters():
            p.grad.data.mul_(0.5)
    c.backward(squared(c.model, data[1]), weight=3)
    with pytest.raises(RuntimeError, match=r"adds to \.grad or changes it.*discard_window\(\)"):
        c.step()
    assert all(torch.equal(p, q) for p, q in zip(c.model.parameters(), before, strict=True)) == skip
    for handle in handles:
        handle.remove()
    goes_on(c)


def test_a_discarded_window_takes_its_suspicion_along():
    """As on a GPU: what was found and not yet read is of no other window."""
    c = controlled(3)
    c._accumulator.suspicion.reads_now = False
    first, second = batches([3, 3])
    c.backward(squared(c.model, first), weight=3)
    for p in c.model.parameters():
        p.grad.data.mul_(0.5)
    c.backward(squared(c.model, second), weight=3)
    goes_on(c)


def trained(c: ab.BatchController, windows: int) -> None:
    for x in batches([3] * windows * c.accumulation_steps):
        c.backward(squared(c.model, x), weight=3)
        if c.step_due:
            c.step()


def test_a_hook_on_what_was_accumulated_may_begin_late():
    """It was there before the controller, and did nothing; now it puts another tensor in place."""
    model, begun = small_model(), []

    def halve(p: Parameter) -> None:
        if begun:
            p.grad = p.grad * 0.5

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(halve)
    c = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
    trained(c, 5)
    begun.append(True)
    with pytest.raises(RuntimeError, match=r"the gradient that arrived in \.grad is not the one that was measured"):
        c.backward(squared(model, batches([3])[0]), weight=3)


@pytest.mark.parametrize("when", ["loaded", "hooked"])
def test_a_hook_that_no_list_shows_is_found_where_something_begins_anew(when: str):
    """On autograd's own node, after the first windows, in which all is looked at."""
    c = controlled(2)
    trained(c, 5)
    if when == "loaded":
        state, c = c.state_dict(), controlled(2)
        c.load_state_dict(state)
    else:
        for x in batches([3, 3]):
            c.backward(squared(c.model, x), weight=3)
            c.model[0].bias.register_hook(lambda grad: grad)
        c.step()
    weight = c.model[2].weight

    def halve(*_: object) -> None:
        weight.grad = weight.grad * 0.5

    node = weight.expand_as(weight).grad_fn.next_functions[0][0]
    node.register_hook(halve)
    with pytest.raises(RuntimeError, match=r"is not the one that was measured|found gradients that were changed"):
        c.backward(squared(c.model, batches([3])[0]), weight=3)


def test_what_is_withheld_is_gone_though_zero_grad_fills():
    class Filling(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = False) -> None:
            super().zero_grad(set_to_none=False)

    model = small_model()
    c = ab.BatchController(model, Filling(model.parameters(), lr=0.1), rule=ab.Fixed(1), skip_nonfinite=False)
    c.backward(math.nan * squared(model, batches([3])[0]), weight=3)
    assert c.withhold_nonfinite()
    assert all(p.grad is None for p in model.parameters())


def test_an_added_parameter_that_brings_a_gradient_is_refused():
    c = controlled(3)
    c.backward(squared(c.model, batches([3])[0]), weight=3)
    added = Parameter(torch.zeros(2, dtype=torch.float64))
    added.grad = torch.ones_like(added)
    c.optimizer.add_param_group({"params": [added]})
    with pytest.raises(RuntimeError, match=r"close_window\(\) found gradients that were changed within the window"):
        c.close_window()


def test_a_heavy_micro_batch_that_reaches_nothing_costs_no_good_one():
    c, twin = controlled(2), controlled(2)
    x, stray = batches([1, 512]), Parameter(torch.ones(1))
    c.backward(squared(c.model, x[0]), weight=1)
    with pytest.raises(RuntimeError, match="does not reach a parameter of the optimizer"):
        c.backward(stray.sum(), weight=512)
    for one in (c, twin):
        one.backward(squared(one.model, x[1 if one is c else 0]), weight=512 if one is c else 1)
    twin.backward(squared(twin.model, x[1]), weight=512)
    for one in (c, twin):
        one.step()
    for p, q in zip(c.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_parts_along_the_mean_do_not_depend_on_the_reference():
    """A light micro-batch first: the window's reference moves, and what was kept of its gradients with it."""
    model = small_model()
    c = ab.BatchController(
        model, sgd(model), rule=ab.rules.InnerProductTest(), limits=ab.Limits(min_steps=3, max_steps=3)
    )
    sizes = [1, 64, 60]
    data = batches(sizes)
    cells = [
        torch.cat([g.flatten() for g in torch.autograd.grad(squared(model, x), list(model.parameters()))]) for x in data
    ]
    for x, n in zip(data, sizes, strict=True):
        c.backward(squared(model, x), weight=n)
    mean = sum(n * g for n, g in zip(sizes, cells, strict=True)) / sum(sizes)
    want = sum(n * float(g @ mean) ** 2 for n, g in zip(sizes, cells, strict=True)) / float(mean @ mean)
    assert float(c._sensor.sums["radial_sq_norms"]) == pytest.approx(want, rel=1e-9)


def test_a_window_that_began_in_another_metric_is_not_in_the_metric():
    torch.manual_seed(0)
    model = small_model()
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.9))
    c = ab.BatchController(model, optimizer, rule=ab.Fixed(2), metric="adam")
    for index, x in enumerate(batches([4] * 60)):
        if index == 51:
            before = c.history.to_pandas()["noise_scale_metric"].iloc[-1]
            model[0].bias.requires_grad_(True)
        c.backward(squared(model, x), weight=4)
        if c.step_due:
            assert ("metric_weighted" not in c._sensor.sums) == (index >= 51 or len(c.history) < 10)
            c.step()
    assert c.history.to_pandas()["noise_scale_metric"].iloc[-1] == before


def test_who_watches_is_told_the_rows_after_a_load():
    class Rows:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def log(self, row: dict) -> None:
            self.steps.append(row["optimizer_step"])

        def close(self) -> None: ...

    c, rows, data = controlled(1), Rows(), batches([3] * 3)
    c.history.watch(rows)
    state = c.state_dict()
    for repeat in range(2):
        for x in data:
            c.backward(squared(c.model, x), weight=3)
            c.step()
        if repeat == 0:
            c.load_state_dict(state)
    assert rows.steps == [1, 2, 3, 1, 2, 3]
