"""Mixed precision and compiled models: the same training, the same numbers, nothing recompiled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

import adaptbatch as ab
from tests.models import adamw, batches, equal_state, run, sgd, small_model, squared


def scaled_loop(model: nn.Module, optimizer: torch.optim.Optimizer, windows: Sequence[Sequence[Tensor]]) -> GradScaler:
    """The accumulation loop of the PyTorch documentation."""
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for window in windows:
        for x in window:
            scaler.scale(squared(model, x) / len(window)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return scaler


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


class TestScaler:
    @pytest.mark.parametrize("optimizer", [sgd, adamw, fused])
    def test_training_is_the_documented_loop_bit_for_bit_and_numbers_are_unscaled(self, optimizer):
        data = batches([6] * 24, dtype=torch.float32)
        ours, twin, plain = (small_model(dtype=torch.float32) for _ in range(3))
        scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        with ab.BatchController(ours, optimizer(ours), rule=ab.Fixed(3), scaler=scaler) as controller:
            run(controller, data)
        theirs = scaled_loop(twin, optimizer(twin), [data[i : i + 3] for i in range(0, 24, 3)])
        assert equal_state(ours, twin)
        assert scaler.get_scale() == theirs.get_scale() > 2.0**10
        with ab.BatchController(plain, optimizer(plain), rule=ab.Fixed(3)) as unscaled:
            run(unscaled, data)
        found, expected = (one.history.to_pandas() for one in (controller, unscaled))
        for name in ("loss", "noise_trace", "grad_sq_norm", "batch_grad_norm", "noise_scale"):
            # Powers of two: scaling changes no bit of a gradient but where its norm is rounded.
            assert found[name].to_numpy() == pytest.approx(expected[name].to_numpy(), rel=1e-5, nan_ok=True)

    @pytest.mark.parametrize("optimizer", [sgd, adamw, fused])
    @pytest.mark.parametrize("which", [0, 1], ids=["first micro-batch", "last micro-batch"])
    def test_an_overflowing_window_is_skipped_for_everything(self, optimizer, which):
        data = batches([4] * 6, dtype=torch.float32)
        data[2 + which] = torch.full((4, 4), math.inf)
        model = small_model(dtype=torch.float32)
        scaler = GradScaler("cpu", init_scale=1024.0)
        controller = ab.BatchController(model, optimizer(model), rule=ab.Fixed(2), scaler=scaler)
        states = []
        for x in data:
            controller.backward(squared(model, x), weight=len(x))
            if controller.step_due:
                before = controller._state.pooled
                controller.step()
                states.append([p.detach().clone() for p in model.parameters()])
                if len(states) == 2:
                    assert controller._state.pooled == before
                    assert scaler.get_scale() == 512.0
        rows = controller.history.to_pandas()
        assert rows["skipped"].tolist() == [False, True, False]
        assert rows["optimizer_step"].tolist() == [1, 1, 2]
        assert rows["reason"].iloc[1] == "nonfinite"
        assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(states[1], states[2], strict=True))

    def test_an_overflow_is_recorded_whatever_the_controller_was_told(self):
        """``skip_nonfinite=False`` steps as a plain loop does, and a scaler leaves its step out."""
        data = batches([4] * 6, dtype=torch.float32)
        data[2] = torch.full((4, 4), math.inf)
        model = small_model(dtype=torch.float32)
        scaler = GradScaler("cpu", init_scale=1024.0)
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(2), scaler=scaler, skip_nonfinite=False)
        run(controller, data)
        rows = controller.history.to_pandas()
        assert rows["skipped"].tolist() == [False, True, False]
        assert rows["optimizer_step"].tolist() == [1, 1, 2]
        assert scaler.get_scale() == 512.0

    def test_clipping_sees_unscaled_gradients_and_both_norms_are_recorded(self):
        data = batches([4, 6], dtype=torch.float32)
        ours, twin = small_model(dtype=torch.float32), small_model(dtype=torch.float32)
        scaler = GradScaler("cpu", init_scale=1024.0)
        controller = ab.BatchController(ours, sgd(ours), rule=ab.Fixed(2), scaler=scaler)
        for x in data:
            controller.backward(squared(ours, x), weight=len(x))
        norm = controller.grad_norm
        nn.utils.clip_grad_norm_(ours.parameters(), 0.25)
        controller.step()
        optimizer = sgd(twin)
        squared(twin, torch.cat(data)).backward()
        expected = nn.utils.clip_grad_norm_(twin.parameters(), 0.25)
        optimizer.step()
        for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        row = controller.history.to_pandas().iloc[0]
        assert float(norm) == pytest.approx(float(expected), rel=1e-5)
        assert row["batch_grad_norm"] == pytest.approx(float(expected), rel=1e-5)
        assert row["applied_grad_norm"] == pytest.approx(0.25, rel=1e-4)

    @pytest.mark.parametrize("unscales", [True, False], ids=["controller", "trainer"])
    def test_no_number_has_the_loss_scale(self, unscales):
        """Whoever takes it out of ``.grad``; in the metric, along the mean and between windows too."""
        data = batches([4, 6, 3, 5] * 10, dtype=torch.float32)
        rows, windows = [], []
        for scaler in (GradScaler("cpu", init_scale=1024.0), None):
            for options in (
                {"metric": "adam", "consecutive": True, "rule": ab.Fixed(2)},
                {"rule": ab.rules.InnerProductTest(nu=2.0)},
            ):
                model = small_model(dtype=torch.float32)
                optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.5))
                limits = ab.Limits(min_steps=2, max_steps=2)
                controller = ab.BatchController(model, optimizer, scaler=scaler, limits=limits, **options)
                for x in data:
                    if unscales or scaler is None:
                        controller.backward(squared(model, x), weight=len(x))
                    else:
                        with controller.observe(squared(model, x), weight=len(x)) as weighted:
                            scaler.scale(weighted).backward()
                    if not controller.step_due:
                        continue
                    if unscales or scaler is None:
                        controller.step()
                    else:
                        scaler.step(optimizer)
                        scaler.update()
                        optimizer.zero_grad()
                        controller.record_step()
                rows.append(controller.history.to_pandas())
                windows.append(controller._state.window)
        names = ["loss", "noise_trace", "grad_sq_norm", "noise_scale_metric", "batch_grad_norm", "consecutive_product"]
        for found, expected in zip(rows[:2], rows[2:], strict=True):
            for name in names:
                assert found[name].to_numpy() == pytest.approx(expected[name].to_numpy(), rel=1e-3, nan_ok=True)
        for found, expected in zip(windows[:2], windows[2:], strict=True):
            assert astuple(found) == pytest.approx(astuple(expected), rel=1e-3, nan_ok=True)
        assert math.isfinite(rows[0]["noise_scale_metric"].iloc[-1])
        assert math.isfinite(windows[1].radial_sq_norms)

    def test_a_trainer_may_unscale_and_step_itself(self):
        """The parts that integrations are made of: observe, a mean that keeps the loss scale, record_step."""
        data = batches([4, 6, 3, 5], dtype=torch.float32)
        ours, twin = small_model(dtype=torch.float32), small_model(dtype=torch.float32)
        scaler = GradScaler("cpu", init_scale=1024.0)
        optimizer = sgd(ours)
        options = {"rule": ab.Fixed(2), "consecutive": True}
        controller = ab.BatchController(ours, optimizer, scaler=scaler, **options)
        for x in data:
            with controller.observe(squared(ours, x), weight=len(x)) as weighted:
                scaler.scale(weighted).backward()
            if controller.step_due:
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                controller.record_step()
        with ab.BatchController(twin, sgd(twin), **options) as plain:
            run(plain, data)
        for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        found, expected = (one.history.to_pandas() for one in (controller, plain))
        for name in ("loss", "noise_trace", "grad_sq_norm", "batch_grad_norm", "consecutive_product"):
            assert found[name].to_numpy() == pytest.approx(expected[name].to_numpy(), rel=1e-4, nan_ok=True)

    def test_a_step_that_a_guard_skips_leaves_the_scaler_fit_for_the_next(self):
        """A finite gradient a thousand times longer than usual: no step, and the scale does not fall for it."""
        model, scaler = small_model(dtype=torch.float32), GradScaler("cpu", init_scale=1024.0)
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(2), guard=ab.Guard(), scaler=scaler)
        data = batches([8] * 48, dtype=torch.float32)
        for index, x in enumerate(data):
            loss = squared(model, x) * (1000.0 if index in (40, 41) else 1.0)
            controller.backward(loss, weight=len(x))
            if controller.step_due:
                controller.step()
        rows = controller.history.to_pandas()
        assert rows["skipped"].to_numpy().nonzero()[0].tolist() == [20]
        assert scaler.get_scale() == 1024.0

    def test_a_disabled_scaler_changes_nothing(self):
        data = batches([4, 6, 3, 5], dtype=torch.float32)
        ours, twin = small_model(dtype=torch.float32), small_model(dtype=torch.float32)
        run(ab.BatchController(ours, sgd(ours), rule=ab.Fixed(2), scaler=GradScaler("cpu", enabled=False)), data)
        run(ab.BatchController(twin, sgd(twin), rule=ab.Fixed(2)), data)
        assert equal_state(ours, twin)

    def test_refuses_what_is_no_scaler(self):
        model = small_model()
        with pytest.raises(ValueError, match=r"scaler must be a torch\.amp\.GradScaler or None, got float without"):
            ab.BatchController(model, sgd(model), scaler=1024.0)


class TestBfloat16:
    @pytest.mark.parametrize("pure", [False, True], ids=["autocast", "pure"])
    def test_norms_are_those_of_the_gradients_in_float32(self, pure):
        data = batches([32] * 4, dtype=torch.float32)
        model = small_model(dtype=torch.bfloat16 if pure else torch.float32)
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(4))

        def loss(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=not pure):
                return squared(model, x.bfloat16() if pure else x)

        exact = 0.0
        for x in data:
            # A quarter of it, as it is back-propagated: a power of two, which rounds nothing.
            gradients = torch.autograd.grad(loss(x) / 4, list(model.parameters()))
            assert {g.dtype for g in gradients} == {torch.bfloat16 if pure else torch.float32}
            exact += len(x) * sum(float(g.double().square().sum()) for g in gradients) * 16
            controller.backward(loss(x), weight=len(x))
        controller.step()
        assert controller._state.window.weighted_sq_norms == pytest.approx(exact, rel=1e-6)

    def test_small_gradients_do_not_vanish_and_large_ones_do_not_overflow(self):
        """Squares of 1e-6 and 1e6 lie outside of float16, which is why norms are float32."""
        for size in (1e-4, 1e4):
            weight = nn.Parameter(torch.zeros(2000, dtype=torch.float16))
            model = nn.ParameterList([weight])
            controller = ab.BatchController(model, torch.optim.SGD([weight], lr=0.0), rule=ab.Fixed(1))
            controller.backward((weight.float() * size).sum(), weight=1)
            controller.step()
            expected = size * math.sqrt(2000)
            assert controller.history.to_pandas()["batch_grad_norm"].iloc[0] == pytest.approx(expected, rel=1e-2)


class TestCompile:
    @pytest.mark.parametrize("what", ["model", "loss"])
    def test_no_graph_break_and_no_recompilation(self, what):
        """Counted against the same loop without a controller, over windows of several sizes."""
        counts = {}
        for who in ("controller", "plain"):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            model = small_model(dtype=torch.float32)
            compiled = torch.compile(model, backend="aot_eager") if what == "model" else model
            loss = squared if what == "model" else torch.compile(squared, backend="aot_eager")
            data = batches([8] * 12, dtype=torch.float32)
            if who == "controller":
                with ab.BatchController(compiled, sgd(model), rule=ab.rules.Replay([1, 2, 3, 6])) as controller:
                    run(controller, data, loss)
                assert controller.history.to_pandas()["noise_trace"].iloc[-1] > 0.0
            else:
                for x in data:
                    loss(compiled, x).backward()
            counters = torch._dynamo.utils.counters
            counts[who] = (dict(counters["graph_break"]), counters["stats"]["unique_graphs"], counters["frames"]["ok"])
        torch._dynamo.reset()
        assert counts["controller"] == counts["plain"]
        assert counts["controller"][0] == {}
        assert counts["controller"][1] == 1
