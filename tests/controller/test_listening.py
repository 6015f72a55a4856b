"""Listening to some windows only: training is the same to the bit, rows say what is not known, nothing is missed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

import adaptbatch as ab
from adaptbatch.measure.probe import GradientProbe
from tests.models import adamw, batches, equal_state, run, sgd, small_model, squared
from tests.processes import WORLD, spawn

OWN = ("grad_sq_norm", "noise_trace")


def fixed(model: nn.Module, listen: Any, **options: Any) -> ab.BatchController:
    return ab.BatchController(model, adamw(model), rule=ab.Fixed(3), listen=listen, **options)


class TestTraining:
    @pytest.mark.parametrize("options", [{}, {"ghost": True}, {"metric": "adam"}, {"skip_nonfinite": False}])
    def test_is_the_same_to_the_bit_and_rows_are_those_of_the_windows_measured(self, options):
        some, every = (small_model(dtype=torch.float32) for _ in range(2))
        data = batches([4, 6, 5] * 16, dtype=torch.float32)
        with fixed(some, 0.25, **options) as ours, fixed(every, 1.0, **options) as whole:
            run(ours, data)
            run(whole, data)
        assert equal_state(some, every)
        found, expected = (one.history.to_pandas() for one in (ours, whole))
        measured = np.arange(16) % 4 == 0
        assert np.isfinite(expected[list(OWN)].to_numpy()).all()
        assert np.isnan(found.loc[~measured, list(OWN)].to_numpy()).all()
        # Of single examples they are sums in float32, in whatever order they come.
        for name in OWN:
            assert found[name][measured].to_numpy() == pytest.approx(expected[name][measured].to_numpy(), rel=1e-6)
        for name in ("loss", "batch_grad_norm", "applied_grad_norm", "lr", "examples_seen"):
            assert found[name].to_numpy() == pytest.approx(expected[name].to_numpy(), rel=1e-12)

    def test_windows_that_are_not_measured_take_no_norm_of_a_micro_batch(self, monkeypatch):
        taken = []
        real = GradientProbe.take_sq_norm
        monkeypatch.setattr(GradientProbe, "take_sq_norm", lambda probe: taken.append(1) or real(probe))
        with fixed(small_model(), 0.25) as controller:
            run(controller, batches([4] * 24))
        assert len(taken) == 2 * 3

    def test_resumes_within_a_window_that_is_not_measured(self):
        data, whole, first, second = batches([4] * 24), *(small_model() for _ in range(3))
        with fixed(whole, 0.5) as controller:
            run(controller, data)
        expected = controller.history.to_pandas()
        before = fixed(first, 0.5)
        for x in data[:11]:
            before.backward(squared(first, x), weight=4)
            if before.step_due:
                before.step()
        assert not before._sensor.listens
        assert before._window.micro_batches == 2
        after = fixed(second, 0.5)
        for part, other in ((first, second), (before.optimizer, after.optimizer), (before, after)):
            other.load_state_dict(part.state_dict())
        run(after, data[11:])
        assert equal_state(whole, second)
        rest = after.history.to_pandas()
        assert rest["noise_scale"].to_numpy() == pytest.approx(expected["noise_scale"][3:].to_numpy(), rel=1e-12)
        assert rest["noise_trace"].isna().tolist() == expected["noise_trace"][3:].isna().tolist()

    def test_an_overflow_is_seen_and_skipped(self):
        data = batches([4] * 18, dtype=torch.float32)
        data[7] = torch.full((4, 4), math.inf)
        model = small_model(dtype=torch.float32)
        scaler = GradScaler("cpu", init_scale=1024.0)
        with fixed(model, 0.25, scaler=scaler) as controller:
            run(controller, data)
        rows = controller.history.to_pandas()
        assert rows["skipped"].tolist() == [False, False, True, False, False, False]
        assert all(p.isfinite().all() for p in model.parameters())

    def test_a_loss_without_a_gradient_is_refused(self):
        model = small_model()
        frozen = small_model(1).requires_grad_(False)
        with fixed(model, 0.25) as controller:
            run(controller, batches([4] * 3))
            loss = squared(frozen, batches([4])[0]).requires_grad_()
            with pytest.raises(RuntimeError, match="no hook heard a gradient in this backward pass"):
                controller.backward(loss, weight=4)

    def test_the_noise_of_layers_is_not_asked_of_a_window_nobody_listens_to(self):
        model = small_model()
        with ab.BatchController(model, sgd(model), rule=ab.Fixed(1), ghost=True, listen=0.5) as controller:
            controller.backward(squared(model, batches([4])[0]), weight=4)
            assert set(controller.layer_noise()) == {name for name, _ in model.named_parameters()}
            controller.step()
            controller.backward(squared(model, batches([4])[0]), weight=4)
            with pytest.raises(RuntimeError, match=r"nobody listens to this window: listen=1.0 measures all"):
                controller.layer_noise()
            controller.step()

    def test_a_backward_beside_it_is_refused_once_due(self):
        model, x = small_model(), batches([4])[0]
        with fixed(model, 0.25) as controller:
            run(controller, batches([4] * 3))
            for _ in range(3):
                controller.backward(squared(model, x), weight=4)
            squared(model, x).backward()
            with pytest.raises(RuntimeError, match="another backward"):
                controller.step()
            controller.discard_window()

    def test_settled_it_measures_one_window_in_four_at_most_and_finds_the_same_noise(self):
        class Point(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.full((400,), 0.1))

        found = {}
        for listen in ("auto", 1.0):
            generator, model = torch.Generator().manual_seed(3), Point()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            rule = ab.RelativeStandardError(memory=4000.0)
            with ab.BatchController(model, optimizer, rule=rule, listen=listen) as controller:
                for _ in range(300):
                    while not controller.step_due:
                        x = torch.randn(16, 400, generator=generator)
                        controller.backward((model.w - x).square().sum(dim=1).mean() / 2, weight=16)
                    controller.step()
            found[listen] = controller.history.to_pandas()
        measured = found["auto"]["noise_trace"].notna()
        assert measured[:16].all()
        assert measured[-100:].mean() == 0.25
        # B = 400 / 4 = 100.
        for rows in found.values():
            last = rows.iloc[-1]
            assert last["noise_scale_low"] < 100.0 < last["noise_scale_high"]
            assert last["noise_scale_high"] / last["noise_scale_low"] < 1.5


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"listen": 0.0}, r"listen must be 'auto' or a share of windows in \(0, 1\], got listen = 0.0"),
            ({"listen": math.nan}, r"listen must be 'auto' or a share .*got listen = nan"),
            ({"listen": "some"}, r"listen must be 'auto' or a share .*got listen = 'some'"),
            ({"listen": True}, r"listen must be 'auto' or a share .*got listen = True"),
            ({"listen": 0.5, "guard": ab.Guard()}, r"listen must be 'auto' or 1.0 with guard, .* got listen = 0.5"),
            ({"listen": 0.5, "consecutive": True}, r"listen must be 'auto' or 1.0 with consecutive"),
            ({"listen": 0.5, "rule": ab.rules.NormTest()}, r"listen must be 'auto' or 1.0 with NormTest"),
            ({"listen": 0.5, "rule": ab.rules.InnerProductTest()}, r"'auto' or 1.0 with InnerProductTest"),
        ],
    )
    def test_are_refused_by_name(self, options, message):
        model = small_model()
        with pytest.raises(ValueError, match=message):
            ab.BatchController(model, sgd(model), **options)

    @pytest.mark.parametrize(
        ("options", "listens"),
        [
            ({}, "auto"),
            ({"rule": ab.Pareto(price=100.0) | ab.rules.NoiseScale()}, "auto"),
            ({"rule": ab.Fixed(2)}, 1.0),
            ({"rule": ab.rules.NormTest()}, 1.0),
            ({"rule": ab.Pareto(price=100.0) | ab.rules.NormTest()}, 1.0),
            ({"guard": ab.Guard()}, 1.0),
            ({"consecutive": True}, 1.0),
        ],
    )
    def test_auto_measures_all_where_single_windows_count(self, options, listens):
        model = small_model()
        with ab.BatchController(model, sgd(model), **options) as controller:
            assert controller._listen == listens


def train_on_ranks(rank: int) -> dict[Any, Any]:
    found = {}
    for listen in (0.5, 1.0):
        model = DistributedDataParallel(small_model())
        with ab.BatchController(model, sgd(model), rule=ab.Fixed(2), listen=listen) as controller:
            run(controller, batches([4, 5, 6, 3] * 4, seed=rank))
        found[listen] = (
            [p.detach().numpy() for p in model.module.parameters()],
            controller.history.to_pandas()[["noise_trace", "batch_grad_norm"]].to_numpy(),
        )
        if listen == 0.5:
            found["shards"] = controller.history.to_pandas()["shard_ratio"].notna().any()
    return found


def test_ranks_listen_to_the_same_windows(tmp_path: Path):
    ranks = spawn(train_on_ranks, tmp_path)
    assert len(ranks) == WORLD
    for found in ranks:
        (some, rows), (every, all_rows) = found[0.5], found[1.0]
        assert all((p == q).all() for p, q in zip(some, every, strict=True))
        assert np.isnan(rows[:, 0]).tolist() == [False, True] * 4
        assert rows[::2] == pytest.approx(all_rows[::2], rel=1e-12)
        # One window in sixteen says how much the ranks' data differ, and is one of those.
        assert found["shards"]
        assert rows[:, 1] == pytest.approx(all_rows[:, 1], rel=1e-12)
