"""controller.py: rows are the analysis of variance of the cells, now or one window late."""

from __future__ import annotations

import copy
import math

import pandas as pd
import pytest
import torch
from torch import nn

import adaptbatch as ab
from adaptbatch.reporting.history import COLUMNS
from tests import reference
from tests.models import adaptive, batches, equal_state, run, sgd, small_model, squared


class TestMeasurement:
    @pytest.mark.parametrize("sizes", [[8, 8, 8, 8], [9, 4, 2], [1, 1]], ids=str)
    def test_rows_equal_the_analysis_of_variance_of_the_cells(self, sizes):
        model, data = small_model(), batches(sizes)
        parameters = list(model.parameters())
        cells = []
        for x in data:
            gradients = torch.autograd.grad(squared(model, x), parameters)
            cells.append((float(len(x)), torch.cat([g.reshape(-1) for g in gradients]).numpy()))
        trace, signal = reference.anova(cells, population=100)
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(len(sizes)), population=100)
        run(controller, data)
        row = controller.history.to_pandas().iloc[0]
        assert row["noise_trace"] == pytest.approx(trace, rel=1e-5)
        assert row["grad_sq_norm"] == pytest.approx(signal, rel=1e-5)
        assert row["loss"] == pytest.approx(squared(small_model(), torch.cat(data)).item(), rel=1e-12)
        assert row["noise_scale"] == pytest.approx(max(trace, 0) / signal if signal > 0 else math.inf, rel=1e-4)

    def test_finds_the_batch_of_a_known_noise_scale(self):
        """Loss |w - x|^2 / 2 with a still w: G = w - mean(x), tr(Sigma) = 1, so that B = 1 / |G|^2 = 100."""
        generator = torch.Generator().manual_seed(6)

        class Point(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.full((25,), 0.02))

        model = Point()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with ab.BatchController(
            model, optimizer, rule=ab.RelativeStandardError(memory=4000.0), listen=1.0
        ) as controller:
            for _ in range(600):
                while not controller.step_due:
                    x = torch.randn(8, 25, generator=generator) / 5
                    controller.backward((model.w - x).square().sum(dim=1).mean() / 2, weight=8)
                controller.step()
        table = controller.history.to_pandas()
        last = table.iloc[-1]
        assert last["noise_scale_low"] < 100 < last["noise_scale_high"]
        assert 70 < last["global_batch"] < 140
        assert set(table["reason"]) <= {"undecided", "grow", "growth_limited", "hold", "shrink", "signal_lost"}
        assert table["accumulation_steps"].iloc[0] == 2

    def test_one_micro_batch_holds_no_evidence(self):
        model = small_model()
        with ab.BatchController(model, sgd(model), rule=ab.Fixed(1)) as controller:
            run(controller, batches([4, 4]))
        table = controller.history.to_pandas()
        columns = [
            "grad_sq_norm",
            "noise_trace",
            "noise_scale",
            "noise_scale_low",
            "noise_scale_high",
            "relative_error",
        ]
        assert table[columns].isna().all(axis=None)
        assert table["loss"].notna().all()

    def test_history_is_the_documented_table(self, tmp_path):
        model = small_model()
        with ab.BatchController(model, sgd(model), rule=ab.Fixed(2)) as controller:
            run(controller, batches([4, 4, 4]))
            run(controller, batches([5, 5]))
        table = controller.history.to_pandas()
        assert list(table.columns) == list(COLUMNS)
        assert {name: str(kind) for name, kind in table.dtypes.items()} == COLUMNS
        assert table["optimizer_step"].tolist() == [1, 2, 3]
        assert table["examples_seen"].tolist() == [8, 12, 22]
        assert table["backward_passes"].tolist() == [2, 3, 5]
        assert table["accumulation_steps"].tolist() == [2, 1, 2]
        assert (table["wall_seconds"].diff().dropna() > 0).all()
        assert table["lr"].eq(0.05).all()
        controller.history.to_parquet(tmp_path / "history.parquet")
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "history.parquet"), table)
        assert repr(controller.history) == "History(3 windows)"

    def test_a_partial_window_does_not_set_the_size_of_a_micro_batch(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
        decisions = run(controller, batches([8, 8, 1]))
        assert [decision.target_batch for decision in decisions] == [16.0, 16.0]

    def test_a_partial_window_is_no_size_of_the_climb(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(4))
        climbs = []
        for x in controller.micro_batches(batches([4] * 10)):
            controller.backward(squared(model, x), weight=len(x))
            if controller.step_due:
                controller.step()
                climbs.append(controller._state.climb)
        assert climbs[0] != climbs[1] == climbs[2]

    def test_a_tensor_learning_rate_is_recorded(self):
        model = small_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.125), capturable=False, foreach=False)
        controller = ab.BatchController(model, optimizer, rule=ab.Fixed(2))
        run(controller, batches([3, 3]))
        assert controller.history.to_pandas()["lr"].tolist() == [0.125]


class TestLateReading:
    """What a GPU does without the check before the step: numbers reach the host, and the decision, one window late."""

    @staticmethod
    def late(model: nn.Module) -> ab.BatchController:
        controller, _ = adaptive(model)
        controller._read_late = True
        return controller

    def test_decides_from_the_window_before_and_completes_every_row(self):
        data = batches([4, 3, 5] * 40)
        model = small_model()
        controller = self.late(model)
        run(controller, data)
        table = controller.history.to_pandas()
        assert table[["loss", "lr"]].notna().all(axis=None)
        full = table["accumulation_steps"] > 1
        assert table.loc[full, ["grad_sq_norm", "noise_trace"]].notna().all(axis=None)
        assert math.isnan(table["noise_scale"].iloc[0])
        assert table["accumulation_steps"].nunique() > 2
        # The pooled pair after window t is that of windows up to t - 1: row 1 knows row 0 alone.
        first = table.iloc[0]
        ratio = first["noise_trace"] / first["grad_sq_norm"]
        assert table["noise_scale"].iloc[1] == pytest.approx(ratio if first["grad_sq_norm"] > 0 else math.inf)

    def test_resumes_with_the_window_that_waits(self):
        data = batches([4, 4] * 30)
        model = small_model()
        controller = self.late(model)
        run(controller, data[:20])
        other_model = copy.deepcopy(model)
        other = self.late(other_model)
        other.optimizer.load_state_dict(copy.deepcopy(controller.optimizer.state_dict()))
        other.load_state_dict(copy.deepcopy(controller.state_dict()))
        done = len(controller.history)
        run(controller, data[20:])
        run(other, data[20:])
        assert equal_state(model, other_model)
        expected = controller.history.to_pandas().iloc[done:].drop(columns="wall_seconds").reset_index(drop=True)
        pd.testing.assert_frame_equal(
            other.history.to_pandas().drop(columns="wall_seconds"), expected, check_exact=True
        )

    def test_a_waiting_window_is_not_lost_where_nothing_waits(self):
        """A state saved on a GPU, loaded where windows are read at once: the waiting one is pooled with the next."""
        data = batches([4, 4] * 6)
        model = small_model()
        controller = self.late(model)
        run(controller, data[:8])
        prompt, _ = adaptive(model)
        prompt.load_state_dict(controller.state_dict())
        before = controller.state_dict()["loop"]["pooled"]["weight"]
        run(prompt, data[8:10])
        windows_since = sum(row["accumulation_steps"] - 1 for row in [*controller.history, *prompt.history][-2:])
        assert prompt.state_dict()["loop"]["pooled"]["weight"] == pytest.approx(before + windows_since, rel=0.2)
        assert prompt.state_dict()["late_window"] is None


class TestGhost:
    """Examples instead of micro-batches as cells: evidence from one micro-batch."""

    def test_one_micro_batch_equals_the_analysis_of_variance_of_its_examples(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(1), ghost=True)
        data = batches([9, 5, 7])
        for x in controller.micro_batches(data):
            gradients = reference.per_example_gradients(model, squared, x)
            trace, signal = reference.anova([(1.0, gradient) for gradient in gradients])
            controller.backward(squared(model, x), weight=len(x))
            controller.step()
            row = controller.history.to_pandas().iloc[-1]
            assert row["noise_trace"] == pytest.approx(trace, rel=1e-9)
            assert row["grad_sq_norm"] == pytest.approx(signal, rel=1e-9, abs=1e-12 * trace)

    def test_windows_of_several_unequal_micro_batches(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(3), ghost=True)
        data = batches([9, 5, 2])
        gradients = reference.per_example_gradients(model, squared, torch.cat(data))
        trace, signal = reference.anova([(1.0, gradient) for gradient in gradients])
        run(controller, data)
        row = controller.history.to_pandas().iloc[0]
        assert row["noise_trace"] == pytest.approx(trace, rel=1e-9)
        assert row["grad_sq_norm"] == pytest.approx(signal, rel=1e-9, abs=1e-12 * trace)
        assert row["accumulation_steps"] == 3

    def test_training_is_the_plain_loop_bit_for_bit(self):
        data = batches([8] * 6)
        heard, plain = small_model(), small_model()
        run(ab.BatchController(heard, sgd(heard), rule=ab.Fixed(1), ghost=True), data)
        reference.hand_written_loop(plain, sgd(plain), squared, [[x] for x in data])
        assert equal_state(heard, plain)

    def test_a_closed_loop_rule_starts_at_one_and_grows(self):
        """One direction of signal in noise: B far above the micro-batch, seen without a second one."""
        model = nn.Linear(4, 1, bias=False).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        rule = ab.RelativeStandardError(memory=400.0)
        controller = ab.BatchController(model, optimizer, rule=rule, limits=ab.Limits(max_steps=8), ghost=True)
        assert controller.limits.min_steps == 1
        generator = torch.Generator().manual_seed(0)
        data = [torch.randn(8, 4, generator=generator, dtype=torch.float64) + 0.1 for _ in range(300)]
        run(controller, data, loss=lambda m, x: m(x).mean())
        steps = controller.history.to_pandas()["accumulation_steps"]
        assert steps.iloc[0] == 1
        assert steps.iloc[-2] == 8

    def test_the_noise_of_single_layers_adds_up(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(1), ghost=True)
        (x,) = batches([9])
        gradients = reference.per_example_gradients(model, squared, x)
        controller.backward(squared(model, x), weight=9)
        layers = controller.layer_noise()
        assert list(layers) == [name for name, _ in model.named_parameters()]
        first = next(iter(model.parameters())).numel()
        trace, signal = reference.anova([(1.0, gradient[:first]) for gradient in gradients])
        assert layers["0.weight"].noise_trace == pytest.approx(trace, rel=1e-9)
        assert layers["0.weight"].grad_sq_norm == pytest.approx(signal, rel=1e-9, abs=1e-12 * trace)
        controller.step()
        row = controller.history.to_pandas().iloc[-1]
        assert sum(pair.noise_trace for pair in layers.values()) == pytest.approx(row["noise_trace"], rel=1e-9)
        assert sum(pair.grad_sq_norm for pair in layers.values()) == pytest.approx(row["grad_sq_norm"], rel=1e-6)

    def test_the_noise_of_single_layers_knows_the_population(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(1), ghost=True, population=12)
        controller.backward(squared(model, batches([9])[0]), weight=9)
        layers = controller.layer_noise()
        controller.step()
        row = controller.history.to_pandas().iloc[-1]
        assert sum(pair.noise_trace for pair in layers.values()) == pytest.approx(row["noise_trace"], rel=1e-9)
        assert sum(pair.grad_sq_norm for pair in layers.values()) == pytest.approx(row["grad_sq_norm"], rel=1e-9)

    @pytest.mark.parametrize("clips", [True, False])
    @pytest.mark.parametrize("unscales", [True, False], ids=["controller", "trainer"])
    def test_the_noise_of_single_layers_has_no_loss_scale_and_is_not_clipped(self, unscales, clips):
        layers = []
        for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
            model = small_model(dtype=torch.float32)
            controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(1), ghost=True, scaler=scaler)
            loss = squared(model, batches([9], dtype=torch.float32)[0])
            if unscales or scaler is None:
                controller.backward(loss, weight=9)
            else:
                with controller.observe(loss, weight=9) as weighted:
                    scaler.scale(weighted).backward()
                if clips:
                    scaler.unscale_(controller.optimizer)
            if clips and scaler is not None:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            layers.append(controller.layer_noise())
        for name, pair in layers[0].items():
            assert layers[1][name].noise_trace == pytest.approx(pair.noise_trace, rel=1e-4)
            assert layers[1][name].grad_sq_norm == pytest.approx(pair.grad_sq_norm, rel=1e-3, abs=1e-4)

    def test_the_noise_of_single_layers_needs_one_micro_batch(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(2), ghost=True)
        for x in batches([4, 4]):
            controller.backward(squared(model, x), weight=4)
        with pytest.raises(
            RuntimeError, match="needs ghost=True and a window of one micro-batch, got GhostProbe and 2"
        ):
            controller.layer_noise()

    def test_weights_are_examples(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), ghost=True)
        (x,) = batches([6])
        with pytest.raises(ValueError, match=r"weight must be the number of examples .* weight = 60.0 for 6 examples"):
            controller.backward(squared(model, x), weight=60)
        controller.discard_window()

    def test_batch_norm_is_refused(self):
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) couples the examples .*min_steps=2"):
            ab.BatchController(model, sgd(model), ghost=True)
