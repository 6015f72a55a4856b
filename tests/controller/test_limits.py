"""controller.py: limits, and the rate that follows the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import adaptbatch as ab
from tests import reference
from tests.models import adamw, batches, run, sgd, small_model, split, squared


class TestCoupling:
    """The learning rate follows the batch for the time of a step, and nobody else notices."""

    COUPLING = ab.LearningRate("sqrt", reference_batch=8, max_change=4.0)

    def test_equals_a_loop_with_the_scaled_rate(self):
        data = batches([8] * 6)
        coupled, plain = small_model(), small_model()
        optimizer = torch.optim.SGD(coupled.parameters(), lr=0.05)
        controller = ab.BatchController(
            coupled, optimizer, rule=ab.rules.Replay([1, 4, 1]), learning_rate=self.COUPLING
        )
        run(controller, data)
        by_hand = torch.optim.SGD(plain.parameters(), lr=0.05)
        for window, rate in zip(split(data, [1, 4, 1]), (0.05, 0.1, 0.05), strict=True):
            by_hand.param_groups[0]["lr"] = rate
            reference.hand_written_loop(plain, by_hand, squared, [window])
        for p, q in zip(coupled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        assert optimizer.param_groups[0]["lr"] == 0.05
        rows = controller.history.to_pandas()
        assert rows["lr_factor"].tolist() == [1.0, 2.0, 1.0]
        assert rows["lr"].tolist() == pytest.approx([0.05, 0.1, 0.05])
        assert rows["beta2"].isna().all()

    def test_a_partial_window_keeps_the_rate_of_a_full_one(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(4), learning_rate=self.COUPLING)
        run(controller, batches([8] * 5))
        assert controller.history.to_pandas()["lr_factor"].tolist() == [2.0, 2.0]

    def test_the_second_moment_and_its_decay_are_in_the_history(self):
        model = small_model()
        coupling = ab.LearningRate(reference_batch=8, beta2="half-life", rescale_second_moment=True)
        controller = ab.BatchController(model, adamw(model), rule=ab.rules.Replay([2, 4]), learning_rate=coupling)
        run(controller, batches([8] * 6))
        rows = controller.history.to_pandas()
        assert rows["beta2"].tolist() == pytest.approx([0.999**2, 0.999**4])
        assert rows["second_moment_factor"].iloc[0] == 1.0
        assert 0.5 <= rows["second_moment_factor"].iloc[1] < 1.0

    def test_nothing_is_coupled_by_default(self):
        model = small_model()
        controller = ab.BatchController(model, adamw(model), rule=ab.rules.Replay([1, 4]))
        run(controller, batches([8] * 5))
        rows = controller.history.to_pandas()
        assert (rows[["lr_factor", "second_moment_factor"]] == 1.0).all(axis=None)
        assert (rows["beta2"] == 0.999).all()

    def test_a_checkpoint_carries_it(self):
        model = small_model()
        make = lambda: ab.BatchController(  # noqa: E731
            model, sgd(model), rule=ab.Fixed(4), learning_rate=ab.LearningRate("sqrt", reference_batch=8)
        )
        first, second = make(), make()
        run(first, batches([8] * 4))
        second.load_state_dict(first.state_dict())
        run(second, batches([8] * 4))
        assert second.history.to_pandas()["lr_factor"].tolist() == pytest.approx([1.1**2])

    def test_an_optimizer_without_a_second_moment_is_refused(self):
        model = small_model()
        with pytest.raises(ValueError, match=r"optimizer must be one with a second moment .* got SGD"):
            ab.BatchController(model, sgd(model), learning_rate=ab.LearningRate(rescale_second_moment=True))


class TestLimits:
    """Changed under way: an open window keeps its size, the next one is within the new limits."""

    @staticmethod
    def made(**options: object) -> ab.BatchController:
        model = small_model()
        return ab.BatchController(model, sgd(model), **options)

    def test_between_windows_the_next_size_is_bounded_at_once(self):
        controller = self.made(rule=ab.rules.Replay([4, 4, 4, 4]))
        run(controller, batches([4] * 4))
        controller.limits = ab.Limits(max_steps=3)
        assert controller.accumulation_steps == 3
        assert "the rule wants more and max_steps does not allow it" in controller.explain()
        controller.limits = ab.Limits(max_steps=8)
        # More room is for the rule to take, at its next decision.
        assert controller.accumulation_steps == 3
        run(controller, batches([4] * 7))
        assert controller.history.to_pandas()["accumulation_steps"].tolist() == [4, 3, 4]

    def test_an_open_window_keeps_its_size(self):
        controller = self.made(rule=ab.rules.Replay([3, 3, 3]))
        data = batches([4] * 3)
        controller.backward(squared(controller.model, data[0]), weight=4)
        controller.limits = ab.Limits(min_steps=5)
        for x in data[1:]:
            assert controller.accumulation_steps == 3
            controller.backward(squared(controller.model, x), weight=4)
        decision = controller.step()
        assert (decision.accumulation_steps, decision.reason) == (5, "at_min")

    def test_an_open_scope_keeps_its_size(self):
        """It said already whether its backward synchronises."""
        controller = self.made(rule=ab.Fixed(2))
        for x in controller.micro_batches(batches([4] * 3)):
            controller.limits = ab.Limits(max_steps=1)
            assert controller.accumulation_steps == (2 if len(controller.history) == 0 else 1)
            controller.backward(squared(controller.model, x), weight=4)
            if controller.step_due:
                controller.step()
        assert controller.history.to_pandas()["accumulation_steps"].tolist() == [2, 1]

    def test_a_discarded_window_is_no_longer_open(self):
        controller = self.made(rule=ab.Fixed(4))
        controller.backward(squared(controller.model, batches([4])[0]), weight=4)
        controller.limits = ab.Limits(max_steps=2)
        controller.discard_window()
        assert controller.accumulation_steps == 2

    def test_a_checkpoint_is_brought_within_them(self):
        controller = self.made(rule=ab.Fixed(4))
        run(controller, batches([4] * 4))
        other = self.made(rule=ab.Fixed(4), limits=ab.Limits(max_steps=2))
        other.load_state_dict(controller.state_dict())
        assert other.accumulation_steps == 2
        other.load_state_dict(other.state_dict())

    def test_a_closed_loop_rule_decides_from_the_size_that_they_allow(self):
        controller = self.made(rule=ab.RelativeStandardError(theta=0.01, memory=100.0, dead_time=0.0))
        run(controller, batches([4] * 400))
        grown = controller.accumulation_steps
        assert grown > 8
        controller.limits = ab.Limits(max_steps=8, max_growth=1.5)
        assert controller.accumulation_steps == 8
        assert controller.state_dict()["loop"]["changed_at"] == controller.examples_seen
        run(controller, batches([4] * 80))
        assert controller.history.to_pandas()["accumulation_steps"].iloc[-5:].max() == 8

    def test_before_the_first_window_it_is_no_change_of_size(self):
        controller = self.made(rule=ab.RelativeStandardError())
        controller.limits = ab.Limits(min_steps=4)
        assert controller.accumulation_steps == 4
        assert np.isneginf(controller.state_dict()["loop"]["changed_at"])

    def test_wrong_ones_change_nothing(self):
        controller = self.made()
        before = controller.limits
        with pytest.raises(ValueError, match="min_steps must be at least 2 for RelativeStandardError on one rank"):
            controller.limits = ab.Limits(min_steps=1)
        assert controller.limits == before
