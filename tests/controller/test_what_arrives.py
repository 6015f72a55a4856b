"""Whatever else writes to gradients: what is measured is what arrives, or it is refused with a way on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import adaptbatch as ab
from tests.controller.programs import controlled, goes_on, update_of
from tests.models import batches, sgd, small_model, squared

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
