"""controller.py: every refusal by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import adaptbatch as ab
from tests import reference
from tests.models import batches, run, sgd, small_model, squared


class TestLoop:
    def test_the_last_item_closes_the_window_whatever_the_loader(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(4))
        run(controller, (x for x in batches([2] * 6)))
        assert controller.history.to_pandas()["accumulation_steps"].tolist() == [4, 2]
        assert list(controller.micro_batches([])) == []

    def test_a_skipped_last_item_leaves_the_window_open_for_the_next_epoch(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(3))
        data = batches([2, 2, 2])

        def epoch() -> None:
            for index, x in enumerate(controller.micro_batches(data)):
                if index < 2:
                    controller.backward(squared(model, x), weight=len(x))

        with pytest.warns(UserWarning, match="stays open with 2 micro-batches"):
            epoch()
        assert not controller.step_due
        run(controller, data[:1])
        assert controller.history.to_pandas()["global_batch"].tolist() == [6]

    def test_breaking_out_leaves_the_controller_usable(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
        for x in controller.micro_batches(batches([2] * 5)):
            controller.backward(squared(model, x), weight=len(x))
            break
        with pytest.warns(UserWarning, match="goes on with the 1 micro-batches that it holds"):
            run(controller, batches([2] * 3))
        assert controller.history.to_pandas()["accumulation_steps"].tolist() == [2, 2]

    def test_a_hand_written_loop(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(4))
        for x in batches([2, 3]):
            with controller.micro_batch():
                controller.backward(squared(model, x), weight=len(x))
        assert not controller.step_due
        controller.close_window()
        assert controller.step_due
        controller.step()
        assert controller.history.to_pandas()["accumulation_steps"].tolist() == [2]
        controller.close_window()
        assert not controller.step_due, "an empty window has nothing to step"

    def test_a_failed_backward_can_be_discarded(self):
        model, twin = small_model(), small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
        data = batches([2, 2, 2])
        controller.backward(squared(model, data[0]), weight=2)

        def explode(grad: Tensor) -> None:
            raise MemoryError("boom")

        handle = model[0].weight.register_hook(explode)
        with pytest.raises(MemoryError, match="boom"):
            controller.backward(squared(model, data[1]), weight=2)
        handle.remove()
        with pytest.raises(RuntimeError, match=r"last backward\(\) failed, .* discard_window\(\)"):
            controller.backward(squared(model, data[1]), weight=2)
        for call in (controller.close_window, controller.state_dict):
            with pytest.raises(RuntimeError, match=r"last backward\(\) failed"):
                call()
        controller.discard_window()
        run(controller, data[1:])
        reference.hand_written_loop(twin, sgd(twin), squared, [data[1:]])
        assert len(controller.history) == 1
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def _early_step(c: ab.BatchController, x: Tensor) -> None:
    c.backward(squared(c.model, x), weight=4)
    c.step()


def _due_backward(c: ab.BatchController, x: Tensor) -> None:
    for _ in range(3):
        c.backward(squared(c.model, x), weight=4)


def _two_backwards(c: ab.BatchController, x: Tensor) -> None:
    with c.micro_batch():
        c.backward(squared(c.model, x), weight=4)
        c.backward(squared(c.model, x), weight=4)


def _nested(c: ab.BatchController, x: Tensor) -> None:
    with c.micro_batch(), c.micro_batch():
        pass


def _layers(c: ab.BatchController, x: Tensor) -> None:
    for _ in range(2):
        c.backward(squared(c.model, x), weight=4)
    c.layer_noise()


def _foreign_gradient(c: ab.BatchController, x: Tensor) -> None:
    squared(c.model, x).backward()
    c.backward(squared(c.model, x), weight=4)


MISUSE = {
    "early step": (_early_step, RuntimeError, r"step\(\) is early: the window has 1 of 2 micro-batches; wait for"),
    "early norm": (lambda c, x: c.grad_norm, RuntimeError, r"grad_norm is early: the window has 0 of 2"),
    "early record": (lambda c, x: c.record_step(), RuntimeError, r"record_step\(\) is early: the window has 0 of 2"),
    "early withholding": (lambda c, x: c.withhold_nonfinite(), RuntimeError, r"withhold_nonfinite\(\) is early"),
    "early layers": (lambda c, x: c.layer_noise(), RuntimeError, r"layer_noise\(\) is early: the window has 0 of 2"),
    "layers of micro-batches": (_layers, RuntimeError, r"noise of single layers needs ghost=True and a window of one"),
    "due backward": (_due_backward, RuntimeError, r"a step is due: call step\(\) before the next backward\(\)"),
    "two backwards": (_two_backwards, RuntimeError, r"one micro-batch takes one backward\(\): add its losses"),
    "nested scopes": (_nested, RuntimeError, r"micro_batch\(\) scopes must not be nested"),
    "left gradients": (_foreign_gradient, RuntimeError, r"gradients are left from before this window .*zero_grad"),
    "zero weight": (
        lambda c, x: c.backward(squared(c.model, x), weight=0),
        ValueError,
        r"weight must be positive and finite, got weight = 0; skip an empty micro-batch",
    ),
    "infinite weight": (lambda c, x: c.backward(squared(c.model, x), math.inf), ValueError, r"got weight = inf"),
    "nan weight": (lambda c, x: c.backward(squared(c.model, x), math.nan), ValueError, r"got weight = nan"),
    "tensor weight": (
        lambda c, x: c.backward(squared(c.model, x), torch.tensor(4.0)),
        ValueError,
        r"weight must be a Python number, got a tensor",
    ),
    "vector loss": (
        lambda c, x: c.backward(c.model(x).square().sum(-1), 4),
        ValueError,
        r"loss must be a scalar tensor with a graph, .* got shape \(4,\), requires_grad=True",
    ),
    "detached loss": (
        lambda c, x: c.backward(squared(c.model, x).detach(), 4),
        ValueError,
        r"loss must be a scalar .* got shape \(\), requires_grad=False",
    ),
    "float loss": (lambda c, x: c.backward(1.5, 4), ValueError, r"loss must be a scalar tensor .* got 1.5"),
    "foreign loss": (
        lambda c, x: c.backward(torch.ones((), requires_grad=True) * 2, 4),
        RuntimeError,
        r"no hook heard a gradient in this backward pass: the loss does not reach a parameter",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_refused(call, error, message):
    model = small_model()
    controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
    with pytest.raises(error, match=message):
        call(controller, batches([4])[0])


def test_construction_refuses_what_cannot_work(monkeypatch):
    model = small_model()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match=r"population must be at least 1 example, got population = 0; None: unlimited"):
        ab.BatchController(model, optimizer, population=0)
    with pytest.raises(ValueError, match=r"scaler must be a torch\.amp\.GradScaler or None, got bool without"):
        ab.BatchController(model, optimizer, scaler=False)
    with pytest.raises(ValueError, match=r"min_steps must be at least 2 for RelativeStandardError on one rank"):
        ab.BatchController(model, optimizer, limits=ab.Limits(min_steps=1))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 4)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    with pytest.raises(
        ValueError, match=r"model must synchronise its gradients in a world of 4 ranks, got a plain Seq"
    ):
        ab.BatchController(model, optimizer)
    monkeypatch.undo()
    model.requires_grad_(False)
    for untrained in (optimizer, torch.optim.SGD([{"params": []}], lr=0.1)):
        with pytest.raises(ValueError, match=r"optimizer must hold at least one parameter with requires_grad=True"):
            ab.BatchController(model, untrained)


def test_defaults_are_the_documented_ones():
    model = small_model()
    controller = ab.BatchController(model, sgd(model))
    assert controller.rule == ab.RelativeStandardError(theta=1.0)
    assert controller.limits == ab.Limits(min_steps=2, max_steps=64, max_growth=2.0, max_shrink=0.8)
    assert controller.accumulation_steps == 2
    assert np.isneginf(controller.state_dict()["loop"]["changed_at"])
