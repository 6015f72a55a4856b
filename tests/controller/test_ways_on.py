"""Programs that go wrong within a window, and go on: no update twice, no gradient lost, no row twice."""

from __future__ import annotations

import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.nn import functional as F

import adaptbatch as ab
from tests.controller.programs import controlled, goes_on
from tests.models import batches, equal_state, sgd, small_model, squared

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
