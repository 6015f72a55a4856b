"""What a controller measures beyond squared norms of micro-batches: the optimizer's metric, products, radial parts."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptbatch as ab
from adaptbatch.measure.sensor import Sensor
from adaptbatch.optimizer.second_moment import metric_scales
from tests import reference
from tests.models import batches, equal_state, run, small_model, squared


def gradient(model: nn.Module, x: Tensor) -> np.ndarray:
    rows = torch.autograd.grad(squared(model, x), list(model.parameters()))
    return torch.cat([g.reshape(-1) for g in rows]).double().numpy()


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.9, 0.99)),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.99)),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2, betas=(0.9, 0.99)),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2, betas=(0.9, 0.99)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


class TestMetric:
    @pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_equals_the_analysis_of_variance_of_scaled_gradients(self, make):
        """Per window, with the second moment of the step before; unequal micro-batches."""
        model = small_model()
        optimizer = make(model.parameters())
        controller = ab.BatchController(model, optimizer, rule=ab.Fixed(3), metric="adam")
        data = batches([5, 3, 4] * 14)
        warm = 0
        for t in range(14):
            window = data[3 * t : 3 * t + 3]
            scales = metric_scales(optimizer, list(model.parameters()))
            if scales is not None:
                flat = torch.cat([s.reshape(-1) for s in scales]).double().numpy()
                expected = reference.measurement([(len(x), flat * gradient(model, x)) for x in window])
            for x in window:
                controller.backward(squared(model, x), weight=len(x))
            controller.step()
            heard = controller._state.window
            if scales is None:
                assert math.isnan(controller.history.to_pandas()["noise_scale_metric"].iloc[-1])
                continue
            warm += 1
            assert heard.weighted_sq_norms == pytest.approx(expected.weighted_sq_norms, rel=1e-9)
            assert heard.batch_sq_norm == pytest.approx(expected.batch_sq_norm, rel=1e-9)
        assert warm >= 3
        last = controller.history.to_pandas().iloc[-1]
        assert math.isfinite(last["noise_scale_metric"])
        assert last["noise_scale_metric"] != last["noise_scale"]

    def test_the_euclidean_columns_do_not_notice(self):
        data = batches([4, 4] * 30)
        tables = []
        for metric in ("euclidean", "adam"):
            model = small_model()
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99))
            controller = ab.BatchController(model, optimizer, rule=ab.Fixed(2), metric=metric)
            run(controller, data)
            tables.append(controller.history.to_pandas())
        columns = ["loss", "grad_sq_norm", "noise_trace", "noise_scale", "noise_scale_low", "noise_scale_high"]
        np.testing.assert_array_equal(tables[0][columns], tables[1][columns])

    def test_the_decision_is_made_in_it(self):
        """One coordinate is signal and one all noise of tenfold size, which Adam divides by."""
        model = nn.Linear(2, 1, bias=False).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.99))
        generator = torch.Generator().manual_seed(0)

        def loss(m: nn.Module, x: Tensor) -> Tensor:
            return m(x).mean()

        data = [torch.randn(8, 2, generator=generator, dtype=torch.float64) for _ in range(6400)]
        data = [torch.stack([1.0 + 0.5 * x[:, 0], 10.0 * x[:, 1]], dim=1) for x in data]
        rule, limits = ab.RelativeStandardError(memory=1e6), ab.Limits(min_steps=4, max_steps=4)
        controller = ab.BatchController(model, optimizer, metric="adam", rule=rule, limits=limits)
        run(controller, data, loss=loss)
        row = controller.history.to_pandas().iloc[-1]
        # Signal 1, noise 0.25 and 100 for each example; v is the square of the batch gradient, 1 and 100 / 32.
        # |G|^2 of one window has a relative standard error of sqrt(2) B / n = 4.4; of 1600 windows, 0.11.
        assert row["noise_scale"] == pytest.approx(100.25, rel=0.4)
        expected = 0.25 + 100 / (100 / 32) ** 0.5
        assert row["noise_scale_metric"] == pytest.approx(expected, rel=0.3)
        assert controller._state.evidence().pooled == controller._state.metric.estimate()

    def test_where_the_optimizer_counts_on_a_device_the_controllers_count_serves(self, monkeypatch):
        """What a GPU does: the same scales, without a read."""
        data = batches([4, 4] * 30)
        tables = []
        for on_device in (False, True):
            monkeypatch.setattr(Sensor, "_counts_on_device", lambda self, answer=on_device: answer)
            model = small_model()
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99))
            controller = ab.BatchController(model, optimizer, rule=ab.Fixed(2), metric="adam")
            run(controller, data)
            tables.append(controller.history.to_pandas()["noise_scale_metric"])
        assert tables[0].notna().sum() > 10
        np.testing.assert_array_equal(*tables)

    def test_a_parameter_that_is_thawed_late_changes_no_unit(self):
        """Its second moment is cold: for a hundred windows there is no metric, and no Euclidean window in its place."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
        model[1].bias.requires_grad_(False)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        rule, guard = ab.RelativeStandardError(0.5), ab.Guard()
        c = ab.BatchController(model, optimizer, rule=rule, metric="adam", guard=guard, limits=ab.Limits(max_steps=8))
        generator = torch.Generator().manual_seed(1)

        def train(windows: int) -> None:
            while len(c.history) < windows:
                x = 1.0 + torch.randn(4, 4, generator=generator, dtype=torch.float64)
                c.backward((model(x) - x[:, :2]).square().mean(), weight=4)
                if c.step_due:
                    c.step()

        train(300)
        before = c.history.to_pandas().iloc[-1]
        model[1].bias.requires_grad_(True)
        train(390)
        rows = c.history.to_pandas().iloc[300:]
        assert not rows["skipped"].any()
        for column in ("noise_scale_typical", "noise_scale_metric"):
            assert (rows[column] == before[column]).all()
        train(420)
        assert c.history.to_pandas()["noise_scale_metric"].iloc[-1] != before["noise_scale_metric"]

    def test_training_is_untouched(self):
        data = batches([6, 6] * 20)
        heard, plain = small_model(), small_model()
        adam = lambda m: torch.optim.Adam(m.parameters(), betas=(0.9, 0.99))  # noqa: E731
        run(ab.BatchController(heard, adam(heard), rule=ab.Fixed(1), metric="adam"), data)
        reference.hand_written_loop(plain, adam(plain), squared, [[x] for x in data])
        assert equal_state(heard, plain)

    def test_a_checkpoint_goes_on_to_the_bit(self):
        data = batches([4, 4] * 40)
        model = small_model()
        make = lambda m: ab.BatchController(  # noqa: E731
            m, torch.optim.Adam(m.parameters(), betas=(0.9, 0.99)), metric="adam", rule=ab.Fixed(2), consecutive=False
        )
        controller = make(model)
        run(controller, data[:40])
        other_model = copy.deepcopy(model)
        other = make(other_model)
        other.optimizer.load_state_dict(copy.deepcopy(controller.optimizer.state_dict()))
        other.load_state_dict(copy.deepcopy(controller.state_dict()))
        run(controller, data[40:])
        run(other, data[40:])
        rows = [
            c.history.to_pandas().drop(columns="wall_seconds").iloc[-10:].reset_index(drop=True)
            for c in (controller, other)
        ]
        np.testing.assert_array_equal(rows[0]["noise_scale_metric"], rows[1]["noise_scale_metric"])
        assert rows[0].drop(columns="reason").equals(rows[1].drop(columns="reason"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"metric": "taxicab"}, r"metric must be one of \('euclidean', 'adam'\), got metric = 'taxicab'"),
            ({"metric": "adam"}, r'optimizer must be one with a second moment .* got SGD; use metric="euclidean"'),
        ],
        ids=["name", "sgd"],
    )
    def test_refusals(self, arguments, message):
        model = small_model()
        with pytest.raises(ValueError, match=message):
            ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=0.1), **arguments)

    def test_not_with_ghost_norms(self):
        model = small_model()
        with pytest.raises(ValueError, match=r"metric must be 'euclidean' with ghost=True, got metric = 'adam'"):
            ab.BatchController(model, torch.optim.Adam(model.parameters()), metric="adam", ghost=True)


@dataclass(frozen=True)
class Keeps:
    """A rule that asks for the window's gradients."""

    closed_loop = True
    memory = None
    keeps_gradients = True

    def decide(
        self, evidence: ab.records.Evidence, progress: ab.records.Progress, limits: ab.Limits
    ) -> ab.records.Decision:
        return ab.records.Decision(3, math.nan, "hold")


def test_radial_parts_are_measured_where_a_rule_asks():
    model = small_model()
    controller = ab.BatchController(
        model, torch.optim.SGD(model.parameters(), lr=0.1), rule=Keeps(), limits=ab.Limits(min_steps=3)
    )
    for window in (batches([5, 3, 4], seed=1), batches([2, 7, 4], seed=2)):
        cells = [(float(len(x)), gradient(model, x)) for x in window]
        n = sum(w for w, _ in cells)
        mean = sum(w * g for w, g in cells) / n
        expected = sum(w * (g @ mean) ** 2 for w, g in cells) / (mean @ mean)
        run(controller, window)
        assert controller._state.window.radial_sq_norms == pytest.approx(expected, rel=1e-9)


def test_radial_parts_are_euclidean():
    model = small_model()
    with pytest.raises(ValueError, match="metric must be 'euclidean' for a rule that keeps the window's gradients"):
        ab.BatchController(model, torch.optim.Adam(model.parameters()), rule=Keeps(), metric="adam")


def test_radial_parts_need_micro_batches():
    model = small_model()
    with pytest.raises(ValueError, match="ghost must be False for a rule that keeps the window's gradients"):
        ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=0.1), rule=Keeps(), ghost=True)


class TestPhase:
    def test_products_of_consecutive_gradients(self):
        model = small_model()
        controller = ab.BatchController(
            model, torch.optim.SGD(model.parameters(), lr=0.05), rule=ab.Fixed(2), consecutive=True
        )
        data, gradients = batches([4, 6] * 5), []
        for t in range(5):
            gradients.append(gradient(model, torch.cat(data[2 * t : 2 * t + 2])))
            for x in data[2 * t : 2 * t + 2]:
                controller.backward(squared(model, x), weight=len(x))
            controller.step()
        products = controller.history.to_pandas()["consecutive_product"]
        assert math.isnan(products[0])
        expected = [float(a @ b) for a, b in itertools.pairwise(gradients)]
        assert products[1:].tolist() == pytest.approx(expected, rel=1e-9)

    def test_off_by_default(self):
        model = small_model()
        controller = ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=0.05), rule=ab.Fixed(1))
        run(controller, batches([4, 4]))
        assert controller.history.to_pandas()["consecutive_product"].isna().all()

    @pytest.mark.parametrize(("rate", "sign"), [(1e-4, 1), (1.0, -1)], ids=["transient", "floor"])
    def test_its_sign_tells_a_transient_from_a_floor(self, rate: float, sign: int):
        """A quadratic bowl of curvature 1: far out at a tiny rate, or jittering about the minimum at rate 1."""
        theta = nn.Parameter(torch.full((20,), 100.0 if sign > 0 else 0.0, dtype=torch.float64))
        model = nn.ParameterList([theta])
        controller = ab.BatchController(model, torch.optim.SGD([theta], lr=rate), rule=ab.Fixed(2), consecutive=True)
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            for _ in range(2):
                target = torch.randn(4, 20, generator=generator, dtype=torch.float64)
                controller.backward(0.5 * (theta - target).square().sum(dim=-1).mean(), weight=4)
            controller.step()
        assert sign * controller._state.evidence().response.consecutive > 5.0


class TestGuard:
    """Skips an exceedance, grows, holds; composes with an open-loop rule."""

    @staticmethod
    def outlying(model: nn.Module, x: Tensor) -> Tensor:
        return squared(model, x) * (1e4 if bool((x == 7.0).any()) else 1.0)

    def data(self, at: Sequence[int], length: int = 60) -> list[Tensor]:
        data = batches([4] * length)
        for i in at:
            data[i] = torch.full_like(data[i], 7.0)
        return data

    def controller(self, model: nn.Module, **arguments) -> ab.BatchController:
        return ab.BatchController(
            model, torch.optim.SGD(model.parameters(), lr=1e-3), rule=ab.Fixed(1), guard=ab.Guard(**arguments)
        )

    def test_the_step_is_left_out_and_the_batch_doubles(self):
        model = small_model()
        controller = self.controller(model)
        before = None
        for t, x in enumerate(controller.micro_batches(self.data([40]))):
            if t == 40:
                before = copy.deepcopy(model)
            controller.backward(self.outlying(model, x), weight=len(x))
            if controller.step_due:
                decision = controller.step()
                if t == 40:
                    assert equal_state(model, before)
                    # It grows when the next window has been usual again.
                    assert (decision.reason, decision.accumulation_steps) == ("guard", 1)
        rows = controller.history.to_pandas()
        assert rows["skipped"].tolist() == [t == 40 for t in range(len(rows))]
        assert (rows["accumulation_steps"].iloc[42:-1] == 2).all()
        assert (rows["reason"].iloc[42:-1] == "guard").all()

    def test_it_skips_no_more_than_it_may_in_a_row(self):
        model = small_model()
        controller = self.controller(model, max_skips=2)
        run(controller, self.data(range(40, 60), length=60), loss=self.outlying)
        skipped = controller.history.to_pandas()["skipped"]
        longest = (skipped.groupby((~skipped).cumsum()).sum()).max()
        assert longest == 2

    def test_what_it_may_skip_in_a_row_begins_anew_after_each_step(self):
        model = small_model()
        controller = self.controller(model, max_skips=1)
        run(controller, self.data([40, 50, 60], length=70), loss=self.outlying)
        assert controller.history.to_pandas()["skipped"].sum() == 3

    def test_a_checkpoint_knows_how_many_it_skipped_in_a_row(self):
        models = small_model(), small_model()
        first, second = (self.controller(model, max_skips=1) for model in models)
        data = self.data([40, 41], length=42)
        run(first, data[:41], loss=self.outlying)
        assert first.history.to_pandas()["skipped"].iloc[-1]
        second.load_state_dict(first.state_dict())
        for controller in (first, second):
            controller.backward(self.outlying(controller.model, data[41]), weight=4)
            controller.step()
            assert not controller.history.to_pandas()["skipped"].iloc[-1]

    def test_a_non_finite_gradient_is_answered_too(self):
        model = small_model()
        controller = self.controller(model)
        data = self.data([])
        data[40][0, 0] = math.nan
        run(controller, data)
        rows = controller.history.to_pandas()
        assert rows["skipped"].sum() == 1
        assert rows.loc[rows["skipped"], "reason"].tolist() == ["guard"]
        assert rows["accumulation_steps"].iloc[-2] == 2

    def test_it_skips_what_is_not_finite_whatever_the_controller_was_told(self):
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        controller = ab.BatchController(model, optimizer, rule=ab.Fixed(1), guard=ab.Guard(), skip_nonfinite=False)
        data = self.data([])
        data[40][0, 0] = math.nan
        run(controller, data)
        assert controller.history.to_pandas()["skipped"].sum() == 1
        assert all(p.isfinite().all() for p in model.parameters())

    def test_without_one_nothing_is_skipped(self):
        model = small_model()
        controller = ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=1e-3), rule=ab.Fixed(1))
        run(controller, self.data([40]), loss=self.outlying)
        assert not controller.history.to_pandas()["skipped"].any()


class TestExplain:
    def test_three_sentences_with_the_figures_of_the_history(self):
        model = small_model()
        controller = ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=1e-3))
        run(controller, batches([8] * 60))
        text, row = controller.explain(), controller.history.to_pandas().iloc[-1]
        measured, decided, careful = text.removesuffix(".").split(". ")
        assert f"the noise scale is {row['noise_scale']:,.0f} (95 %: {row['noise_scale_low']:,.0f} to" in measured
        assert f"RelativeStandardError takes {controller.accumulation_steps} micro-batches" in decided
        assert f"reason {row['reason']})" in decided
        assert "100% of the last 30 windows stood at min_steps = 2" in careful

    def test_an_unbounded_interval_is_a_caution(self):
        theta = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        controller = ab.BatchController(nn.ParameterList([theta]), torch.optim.SGD([theta], lr=0.0))
        generator = torch.Generator().manual_seed(0)
        for _ in range(60):
            x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
            controller.backward((x @ theta).mean(), weight=4)
            if controller.step_due:
                controller.step()
        assert "to unbounded)" in controller.explain()
        assert "does not tell the gradient's length from zero" in controller.explain()

    def test_before_the_first_window(self):
        model = small_model()
        text = ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=1e-3)).explain()
        assert text.startswith("No window has told anything about the noise yet.")
