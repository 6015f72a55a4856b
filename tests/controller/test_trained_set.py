"""A trainable set that changes within a window or between two: right to rounding, or refused with a way on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import adaptbatch as ab
from tests.controller.programs import goes_on
from tests.models import batches, sgd, small_model, squared


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


def test_heads_that_take_turns_have_no_metric_in_their_window():
    """As many parameters as before, but others, whose second moments are warm: its micro-batches have no one metric."""
    model = Heads()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.9))
    c = ab.BatchController(model, optimizer, rule=ab.Fixed(2), metric="adam")
    turns = [0] * 24 + [1] * 24 + [0]
    for which, x in zip(turns, batches([8] * len(turns)), strict=True):
        thawed(model, which)
        c.backward(squared(model, x), weight=8)
        if c.step_due:
            c.step()
    assert "metric_weighted" in c._sensor.sums
    thawed(model, 1)
    c.backward(squared(model, x), weight=8)
    assert "metric_weighted" not in c._sensor.sums
    c.step()
    assert c.history.to_pandas()["noise_trace"].notna().all()


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
