"""A loss scale with several owners: right to rounding, or refused by a sentence that is true and a way on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import adaptbatch as ab
from tests.controller.programs import update_of
from tests.models import batches, sgd, small_model, squared


def two_networks(steps: int, init_scale: float = 1024.0, **scaling) -> tuple[list, torch.amp.GradScaler]:
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, **scaling)
    models = [small_model(seed, dtype=torch.float32) for seed in (0, 1)]
    return [ab.BatchController(m, sgd(m), rule=ab.Fixed(steps), scaler=scaler) for m in models], scaler


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
