"""meter.py: one line in a loop that is not ours measures what the controller measures, and changes nothing."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import adaptbatch as ab
from tests import reference
from tests.accumulate.test_distributed import sharded_model, sharding
from tests.models import batches, sgd, small_model, squared
from tests.processes import spawn

MEASURED = [
    *("examples_seen", "backward_passes", "accumulation_steps", "global_batch", "grad_sq_norm"),
    *("noise_trace", "noise_scale", "noise_scale_low", "noise_scale_high", "relative_error", "noise_scale_typical"),
    *("noise_scale_metric", "tail_excess", "tail_share", "batch_grad_norm", "lr", "beta2", "optimizer_step"),
]


def same_rows(meter: ab.NoiseMeter, controller: ab.BatchController, rtol: float = 1e-6) -> None:
    ours, theirs = meter.history.to_pandas(), controller.history.to_pandas()
    pd.testing.assert_frame_equal(ours[MEASURED], theirs[MEASURED], check_exact=False, rtol=rtol, atol=1e-9)
    assert ours["reason"].tolist() == theirs["reason"].tolist()
    assert ours["noise_scale"].notna().any()


def halve(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.mul_(0.5)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.5))


def plain(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Sequence[Tensor],
    k: int,
    clip: float | None = None,
    weigh: Callable[[float], None] | None = None,
    set_to_none: bool = True,
) -> None:
    """A hand-written loop; ``weigh`` tells what a micro-batch counts in one that weighs its losses."""
    for start in range(0, len(data), k):
        window = data[start : start + k]
        n = sum(len(x) for x in window)
        for x in window:
            if weigh is not None:
                weigh(len(x))
            share = len(x) / n if weigh is not None else 1.0 / len(window)
            (squared(model, x) * share).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


def controlled(model: nn.Module, data: Sequence[Tensor], k: int, clip: float | None = None, **options: Any) -> Any:
    controller = ab.BatchController(model, adam(model), rule=ab.Fixed(k), **options)
    for x in controller.micro_batches(data):
        controller.backward(squared(model, x), weight=len(x))
        if controller.step_due:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            controller.step()
    return controller


class TestRows:
    @pytest.mark.parametrize("clip", [None, 0.05])
    @pytest.mark.parametrize("options", [{}, {"metric": "adam"}, {"population": 500.0}, {"ghost": True}])
    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_equal_micro_batches(self, options: dict[str, Any], clip: float | None, set_to_none: bool):
        """The last window is a partial one."""
        model = small_model()
        twin, data = copy.deepcopy(model), batches([4] * 26)
        meter = ab.NoiseMeter(model, optimizer := adam(model), **options)
        plain(model, optimizer, data, k=4, clip=clip, set_to_none=set_to_none)
        controller = controlled(twin, data, 4, clip, **options)
        same_rows(meter, controller)
        assert len(meter.history) == 7

    @pytest.mark.parametrize("clip", [None, 0.05])
    @pytest.mark.parametrize("ghost", [False, True])
    def test_unequal_micro_batches_that_are_weighed(self, clip: float | None, ghost: bool):
        model = small_model()
        twin, data = copy.deepcopy(model), batches([4, 2, 5, 3, 1, 6, 2] * 4)[:26]
        meter = ab.NoiseMeter(model, optimizer := adam(model), ghost=ghost)
        plain(model, optimizer, data, k=3, clip=clip, weigh=meter.weight)
        # The last window is a short one, which a meter cannot know: its memory is by a hair another.
        same_rows(meter, controlled(twin, data, 3, clip, ghost=ghost), rtol=1e-5)

    def test_one_micro_batch_of_measured_examples(self):
        model = small_model()
        twin, data = copy.deepcopy(model), batches([6] * 10)
        meter = ab.NoiseMeter(model, optimizer := adam(model), ghost=True)
        plain(model, optimizer, data, k=1, clip=0.1)
        same_rows(meter, controlled(twin, data, 1, 0.1, ghost=True))

    def test_losses_that_are_not_divided_leave_the_noise_scale(self):
        model = small_model()
        twin, data = copy.deepcopy(model), batches([4] * 20)
        tables = []
        for net, divisor in ((model, 1.0), (twin, 4.0)):
            meter = ab.NoiseMeter(net, torch.optim.SGD(net.parameters(), lr=0.0))
            for index, x in enumerate(data, start=1):
                (squared(net, x) / divisor).backward()
                if index % 4 == 0:
                    meter._optimizer.step()
                    meter._optimizer.zero_grad()
            tables.append(meter.history.to_pandas())
        np.testing.assert_allclose(tables[0]["noise_scale"], tables[1]["noise_scale"], rtol=1e-9)
        np.testing.assert_allclose(tables[0]["noise_trace"], 16.0 * tables[1]["noise_trace"], rtol=1e-9)

    @pytest.mark.filterwarnings("ignore:NoiseMeter. a window of one micro-batch")
    def test_windows_of_varying_length(self):
        """As of a loop that grows its accumulation itself; clipped, so that each is measured before."""
        model, data = small_model(), batches([4] * 21)
        twin = copy.deepcopy(model)
        meter = ab.NoiseMeter(model, optimizer := adam(model))
        controller = ab.BatchController(twin, adam(twin), rule=ab.rules.Replay([1, 2, 3, 4, 5, 6]))
        taken = iter(data)
        for k in (1, 2, 3, 4, 5, 6):
            for _ in range(k):
                x = next(taken)
                (squared(model, x) / k).backward()
                controller.backward(squared(twin, x), weight=len(x))
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
            controller.step()
        columns = [name for name in MEASURED if name not in ("tail_excess", "tail_share")]
        ours, theirs = meter.history.to_pandas()[columns], controller.history.to_pandas()[columns]
        pd.testing.assert_frame_equal(ours, theirs, check_exact=False, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("clip", [None, 0.05])
    @pytest.mark.parametrize("fused", [False, True])
    def test_a_grad_scaler_with_steps_that_it_skips(self, clip: float | None, fused: bool):
        """A fused optimizer is called all the same, and told to skip."""
        data = batches([4] * 40, dtype=torch.float32)
        data[9][0] = float("inf")
        data[-1][0] = float("inf")
        model = small_model(dtype=torch.float32)
        twin = copy.deepcopy(model)
        scaler, other = (torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3) for _ in range(2))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.5), fused=fused)
        meter = ab.NoiseMeter(model, optimizer, scaler=scaler)
        for index, x in enumerate(data, start=1):
            scaler.scale(squared(model, x) / 4).backward()
            if index % 4 == 0:
                if clip is not None:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        meter.close()
        controller = controlled(twin, data, 4, clip, scaler=other)
        ours, theirs = meter.history.to_pandas(), controller.history.to_pandas()
        assert ours["skipped"].sum() == theirs["skipped"].sum() == 2
        same_rows(meter, controller, rtol=1e-4)


class TestUntouched:
    @pytest.mark.parametrize("ghost", [False, True])
    def test_parameters_optimizer_and_random_numbers(self, ghost: bool):
        outcomes = []
        for measured in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 1))
            optimizer = adam(model)
            meter = ab.NoiseMeter(model, optimizer, ghost=ghost) if measured else None
            for index, x in enumerate(batches([4] * 30, dtype=torch.float32), start=1):
                (model(x).square().mean() / 3).backward()
                if index % 3 == 0:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                    optimizer.step()
                    optimizer.zero_grad()
            outcomes.append([*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())])
            outcomes[-1].append(torch.get_rng_state())
            assert meter is None or meter.history.to_pandas()["noise_trace"].notna().all()
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*outcomes, strict=True))

    @pytest.mark.parametrize("dropped", [False, True])
    def test_close_leaves_no_trace(self, dropped: bool):
        model = small_model()
        optimizer = adam(model)

        def hooks() -> list[int]:
            mine = [len(p._backward_hooks or ()) for p in model.parameters()]
            steps = [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]
            return mine + steps + [len(module._forward_pre_hooks) for module in model.modules()]

        before = hooks()
        meter = ab.NoiseMeter(model, optimizer)
        plain(model, optimizer, batches([4] * 8), k=2)
        assert hooks() != before
        if dropped:
            del meter
            gc.collect()
        else:
            history = meter.history
            meter.close()
            meter.close()
            assert len(history) == 4
        assert hooks() == before
        plain(model, optimizer, batches([4] * 8), k=2)


class TestOtherPasses:
    def test_gradients_that_are_added_to_nothing_do_not_count(self):
        model, data = small_model(), batches([4] * 12)
        twin = copy.deepcopy(model)
        meter = ab.NoiseMeter(model, optimizer := adam(model))
        for index, x in enumerate(data, start=1):
            torch.autograd.grad(squared(model, x), list(model.parameters()))
            (squared(model, x) / 4).backward()
            torch.autograd.grad(squared(model, x), list(model.parameters()))
            if index % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()
        same_rows(meter, controlled(twin, data, 4))

    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_a_window_that_was_dropped_is_no_part_of_the_next(self, set_to_none: bool):
        model, data = small_model(), batches([4] * 8)
        twin = copy.deepcopy(model)
        meter = ab.NoiseMeter(model, optimizer := adam(model))
        squared(model, data[0]).backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        plain(model, optimizer, data, k=4)
        controller = controlled(twin, data, 4)
        ours, theirs = meter.history.to_pandas(), controller.history.to_pandas()
        np.testing.assert_allclose(ours["noise_trace"], theirs["noise_trace"], rtol=1e-9)
        assert ours["accumulation_steps"].tolist() == [4, 4]

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("how", ["cleared", "skipped by the scaler"])
    def test_the_weight_that_was_said_outlasts_the_window_before_it(self, how: str):
        """That window is found to be over when the pass begins whose weight is known by then."""
        model, data = small_model(dtype=torch.float32), batches([4, 2, 3, 5], dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if how != "cleared" else None
        optimizer = adam(model)
        meter = ab.NoiseMeter(model, optimizer, scaler=scaler)
        for low, high in ((0, 2), (2, 4)):
            for x in data[low:high]:
                meter.weight(10 * len(x))
                loss = squared(model, x * (math.inf if scaler and low == 0 else 1.0))
                (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is not None:
                scaler.step(optimizer)
                scaler.update()
            elif low == 2:
                optimizer.step()
            optimizer.zero_grad()
        rows = meter.history.to_pandas()
        assert rows["global_batch"].tolist() == ([80.0] if scaler is None else [60.0, 80.0])
        assert math.isfinite(rows["noise_trace"].iloc[-1])

    def test_branches_in_between_leave_the_rows(self):
        """Their backward passes, on the measured parameters, are no windows of the loop."""
        tables = []
        for asked in (False, True):
            model, data = small_model(), batches([4] * 24)
            meter = ab.NoiseMeter(model, optimizer := adam(model))
            plain(model, optimizer, data[:12], k=4, weigh=meter.weight)
            if asked:
                loss = lambda net, x: (squared(net, x), len(x))  # noqa: E731
                check = lambda net, x=data[0]: squared(net, x)  # noqa: E731
                pair, options = (model, optimizer), {"examples": 32, "repeats": 2, "progress": False}
                ab.critical_batch(pair, data, loss, check, (1, 2), **options)
            plain(model, optimizer, data[12:], k=4, weigh=meter.weight)
            tables.append(meter.history.to_pandas().drop(columns="wall_seconds"))
        pd.testing.assert_frame_equal(*tables, check_exact=True)

    def test_a_pass_that_failed_costs_its_window_only(self):
        model, data = small_model(), batches([4] * 12)
        meter = ab.NoiseMeter(model, optimizer := adam(model))

        def fail(grad: Tensor) -> None:
            raise KeyError("mine")

        squared(model, data[0]).backward()
        hidden = model[0](data[1])
        hidden.register_hook(fail)
        with pytest.raises(KeyError, match="mine"):
            model[1:](hidden).square().mean().backward()
        (squared(model, data[1]) / 2).backward()
        with pytest.warns(RuntimeWarning, match=r"a backward pass began before the last one had ended, after an error"):
            optimizer.step()
        optimizer.zero_grad()
        plain(model, optimizer, data, k=4)
        table = meter.history.to_pandas()
        assert table["noise_trace"].isna().tolist() == [True, False, False, False]

    def test_a_reentrant_checkpoint_around_all_is_one_pass(self):
        model, data = small_model(), batches([4] * 12)
        twin = copy.deepcopy(model)
        meter = ab.NoiseMeter(model, optimizer := adam(model))
        for index, x in enumerate(data, start=1):
            (checkpoint(model, x.clone().requires_grad_(), use_reentrant=True).square().mean() / 4).backward()
            if index % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()
        controller = ab.BatchController(twin, adam(twin), rule=ab.Fixed(4))
        for x in controller.micro_batches(data):
            controller.backward(twin(x).square().mean(), weight=len(x))
            if controller.step_due:
                controller.step()
        same_rows(meter, controller)

    def test_parts_of_one_gradient_are_no_micro_batches(self):
        """Two reentrant checkpoints back-propagate one after the other, each its own parameters."""
        model, optimizer_of = small_model(), adam
        meter = ab.NoiseMeter(model, optimizer := optimizer_of(model))
        for x in batches([4] * 2):
            hidden = checkpoint(model[:2], x.requires_grad_(), use_reentrant=True)
            checkpoint(model[2:], hidden, use_reentrant=True).square().mean().backward()
        with pytest.warns(RuntimeWarning, match=r"gradients of different parameters, as parts|within it as reentrant"):
            optimizer.step()
        assert meter.history.to_pandas()["noise_trace"].isna().all()

    @pytest.mark.parametrize("where", ["within", "before", "hook", "data"])
    def test_what_else_writes_to_gradients_is_said(self, where: str):
        model, data = small_model(), batches([4] * 4)
        meter = ab.NoiseMeter(model, optimizer := adam(model))
        if where == "before":
            for p in model.parameters():
                p.grad = torch.ones_like(p)
        if where == "hook":
            model[0].weight.register_post_accumulate_grad_hook(halve)
        for x in data:
            (squared(model, x) / 4).backward()
            if where == "within":
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            if where == "data":
                for p in model.parameters():
                    p.grad.data.mul_(10.0)
        with pytest.warns(RuntimeWarning, match=r"something else than the measured backward passes writes to \.grad"):
            optimizer.step()
        optimizer.zero_grad()
        assert meter.history.to_pandas()["noise_trace"].isna().all()

    @pytest.mark.filterwarnings("error")
    def test_gradients_that_are_filled_with_zeros_are_none(self):
        """In the first window, too: what somebody left there was cleared."""
        model, data = small_model(), batches([4] * 8)
        twin = copy.deepcopy(model)
        squared(model, data[0]).backward()
        model.zero_grad(set_to_none=False)
        meter = ab.NoiseMeter(model, optimizer := adam(model))
        plain(model, optimizer, data, k=4, set_to_none=False)
        same_rows(meter, controlled(twin, data, 4))

    def test_an_evaluation_in_between_counts_no_examples(self):
        model, data = small_model(), batches([4] * 12)
        meter = ab.NoiseMeter(model, optimizer := adam(model))
        for index, x in enumerate(data, start=1):
            (squared(model, x) / 4).backward()
            if index % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                model(batches([50])[0])
        assert meter.history.to_pandas()["global_batch"].tolist() == [16.0] * 3

    def test_what_thaws_within_a_window_costs_one_and_is_measured_from_the_next_on(self):
        model, data = small_model(), batches([4] * 16)
        model[0].requires_grad_(False)
        twin = copy.deepcopy(model)
        meter = ab.NoiseMeter(model, optimizer := adam(model))
        controller = ab.BatchController(twin, adam(twin), rule=ab.Fixed(4))

        def window(part: list[Tensor]) -> None:
            for x in part:
                (squared(model, x) / 4).backward()
                controller.backward(squared(twin, x), weight=len(x))
            optimizer.step()
            optimizer.zero_grad()
            controller.step()

        window(data[:4])
        for net in (model, twin):
            net[0].requires_grad_(True)
        with pytest.warns(RuntimeWarning, match="something else than the measured backward passes"):
            window(data[4:8])
        window(data[8:12])
        window(data[12:])
        ours, theirs = meter.history.to_pandas()["noise_trace"], controller.history.to_pandas()["noise_trace"]
        assert ours.isna().tolist() == [False, True, False, False]
        np.testing.assert_allclose(ours[2:], theirs[2:], rtol=1e-9)

    def test_a_parameter_that_takes_anothers_place_is_measured(self):
        x = batches([4])[0]
        one, other = nn.Linear(4, 1).double(), nn.Linear(4, 1).double()
        model = nn.ModuleList([one, other])
        optimizer = torch.optim.SGD(one.parameters(), lr=0.0)
        meter = ab.NoiseMeter(model, optimizer)
        for head in (one, other):
            optimizer.param_groups[0]["params"] = list(head.parameters())
            # What is hooked is looked up at the end of a step.
            optimizer.step()
            for scale in (1.0, 2.0):
                (head(scale * x).square().mean() / 2).backward()
            optimizer.step()
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in head.parameters()))
            optimizer.zero_grad()
            assert meter.history.to_pandas()["batch_grad_norm"].iloc[-1] == pytest.approx(norm, rel=1e-6)

    def test_a_step_that_takes_its_backward_pass_along(self):
        """As trainers do: the last backward pass, and clipping, within optimizer.step(closure)."""
        model, data = small_model(), batches([4] * 24)
        twin = copy.deepcopy(model)
        meter = ab.NoiseMeter(model, optimizer := adam(model))
        for start in range(0, 24, 4):
            for x in data[start : start + 3]:
                (squared(model, x) / 4).backward()

            def closure(x: Tensor = data[start + 3]) -> Tensor:
                loss = squared(model, x) / 4
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                return loss

            optimizer.step(closure)
            optimizer.zero_grad()
        same_rows(meter, controlled(twin, data, 4, 0.1))


def replicated(rank: int, synced: str, clip: float | None) -> dict[str, Any]:
    """A hand-written DDP loop of unequal ranks: rank 1 has larger micro-batches."""
    data = batches([4 + 2 * rank] * 24, seed=rank)
    model = DistributedDataParallel(small_model())
    meter = ab.NoiseMeter(model, optimizer := adam(model))
    for start in range(0, len(data), 3):
        for index, x in enumerate(data[start : start + 3]):
            quiet = synced == "last" and index < 2
            with model.no_sync() if quiet else nullcontext():
                (squared(model, x) / 3).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return meter.history.to_pandas().to_dict("list")


class TestSeveralRanks:
    @pytest.mark.parametrize(("synced", "clip"), [("last", None), ("last", 0.05), ("every", 0.05)])
    def test_the_rows_are_those_of_one_process_with_all_cells(self, tmp_path: Path, synced: str, clip: float | None):
        """The mean over ranks of means over micro-batches: each a cell of equal weight, a sixth of thirty examples."""
        first, second = (pd.DataFrame(rows)[MEASURED] for rows in spawn(replicated, tmp_path, synced, clip))
        pd.testing.assert_frame_equal(first, second, check_exact=True)
        model = small_model()
        optimizer, rows = adam(model), []
        ranks = [batches([4 + 2 * rank] * 24, seed=rank) for rank in (0, 1)]
        for start in range(0, 24, 3):
            cells = []
            for x in [x for data in ranks for x in data[start : start + 3]]:
                gradients = torch.autograd.grad(squared(model, x), list(model.parameters()))
                cells.append((5.0, torch.cat([g.reshape(-1) for g in gradients]).numpy()))
            trace, signal = reference.anova(cells)
            rows.append((trace, signal))
            mean = np.mean([g for _, g in cells], axis=0)
            parts = torch.from_numpy(mean).split([p.numel() for p in model.parameters()])
            for p, part in zip(model.parameters(), parts, strict=True):
                p.grad = part.reshape(p.shape).clone()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        expected = np.array(rows)
        np.testing.assert_allclose(first["noise_trace"], expected[:, 0], rtol=1e-6)
        np.testing.assert_allclose(first["grad_sq_norm"], expected[:, 1], rtol=1e-6, atol=1e-12)
        assert first["global_batch"].tolist() == [30.0] * 8


def sharded(rank: int) -> str:
    model = sharded_model(half=False)
    with pytest.raises(ValueError, match="sharded") as refused:
        ab.NoiseMeter(model, sgd(model))
    return str(refused.value)


@sharding
def test_a_sharded_model_is_refused(tmp_path: Path):
    for message in spawn(sharded, tmp_path):
        assert "must not be sharded for a NoiseMeter, got fully_shard" in message
        assert "use a BatchController with rule=Fixed(k), or DistributedDataParallel" in message


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
class TestTrainers:
    """Scripts that know nothing of it, but for one line."""

    @pytest.mark.parametrize("k", [1, 4])
    def test_lightning(self, tmp_path: Path, k: int):
        import lightning

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = small_model(dtype=torch.float32)
                self.meter: ab.NoiseMeter | None = None

            def training_step(self, batch: Tensor, index: int) -> Tensor:
                return squared(self.net, batch)

            def configure_optimizers(self) -> torch.optim.Optimizer:
                optimizer = adam(self)
                self.meter = ab.NoiseMeter(self, optimizer, ghost=k == 1)
                return optimizer

        data, module = batches([4] * 48, dtype=torch.float32), Module()
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            accumulate_grad_batches=k,
            gradient_clip_val=0.05,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, torch.utils.data.DataLoader(torch.cat(list(data)), batch_size=4))
        assert module.meter is not None
        controller = controlled(small_model(dtype=torch.float32), data, k, 0.05, ghost=k == 1)
        same_rows(module.meter, controller, rtol=1e-4)
        assert ab.plan(module.meter.history, micro_batch=4.0).recommended.batch > 0.0

    def test_transformers(self, tmp_path: Path):
        from transformers import Trainer, TrainingArguments

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = small_model(dtype=torch.float32)

            def forward(self, x: Tensor) -> dict[str, Tensor]:
                return {"loss": squared(self.net, x)}

        data, model = batches([4] * 16, dtype=torch.float32), Net()
        optimizer = adam(model)
        meter = ab.NoiseMeter(model, optimizer)
        arguments = TrainingArguments(
            tmp_path,
            num_train_epochs=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            max_grad_norm=0.05,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
        )
        rows = [{"x": x} for x in torch.cat(list(data))]
        collate = lambda items: {"x": torch.stack([item["x"] for item in items])}  # noqa: E731
        Trainer(model, arguments, train_dataset=rows, data_collator=collate, optimizers=(optimizer, None)).train()
        same_rows(meter, controlled(small_model(dtype=torch.float32), data, 4, 0.05), rtol=1e-4)

    def test_a_compiled_model(self):
        model, data = small_model(), batches([4] * 12)
        twin = copy.deepcopy(model)
        whole = torch.compile(model, backend="eager")
        meter = ab.NoiseMeter(whole, optimizer := adam(model))
        plain(whole, optimizer, data, k=4, clip=0.05)
        same_rows(meter, controlled(twin, data, 4, 0.05))


class TestWords:
    def test_one_micro_batch_says_how_to_measure(self):
        model = small_model()
        meter = ab.NoiseMeter(model, optimizer := adam(model))
        with pytest.warns(RuntimeWarning, match=r"one micro-batch holds no evidence .* ghost=True\)\.") as found:
            plain(model, optimizer, batches([4] * 5), k=1)
        assert len(found) == 1
        assert meter.history.to_pandas()["noise_trace"].isna().all()

    def test_the_first_clipping_after_none(self):
        model, data = small_model(), batches([4] * 24)
        meter = ab.NoiseMeter(model, optimizer := adam(model))
        plain(model, optimizer, data[:8], k=4)
        with pytest.warns(RuntimeWarning, match=r"changed before its length was measured, by clipping"):
            plain(model, optimizer, data[8:12], k=4, clip=0.01)
        plain(model, optimizer, data[12:], k=4, clip=0.01)
        assert meter.history.to_pandas()["noise_trace"].isna().tolist() == [False, False, True, False, False, False]

    def test_weights_for_some(self):
        model, data = small_model(), batches([4] * 4)
        meter = ab.NoiseMeter(model, optimizer := adam(model))
        meter.weight(4)
        squared(model, data[0]).backward()
        squared(model, data[1]).backward()
        with pytest.warns(RuntimeWarning, match=r"meter\.weight\(\) was called for some micro-batches"):
            optimizer.step()

    def test_what_cannot_be_measured_is_said_once(self):
        model, data = small_model(), batches([4] * 4)
        meter = ab.NoiseMeter(model, optimizer := adam(model))

        def windows() -> None:
            for _ in range(3):
                meter.weight(4)
                for x in data:
                    squared(model, x).backward()
                optimizer.step()
                optimizer.zero_grad()

        with pytest.warns(RuntimeWarning) as found:
            windows()
        assert [str(one.message)[:28] for one in found] == ["NoiseMeter: meter.weight() w"]
        assert meter.history.to_pandas()["noise_trace"].isna().all()

    def test_a_model_that_shows_no_examples(self):
        model = nn.ParameterList([nn.Parameter(torch.ones(3))])
        meter = ab.NoiseMeter(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.warns(RuntimeWarning, match=r"weights count micro-batches\. Say what each counts"):
            model[0].square().sum().backward()
        model[0].square().sum().backward()
        optimizer.step()
        assert meter.history.to_pandas()["global_batch"].tolist() == [2.0]

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"population": 0.5}, ValueError, "population must be at least 1 example, got population = 0.5"),
            ({"scaler": 3}, ValueError, "scaler must be a torch.amp.GradScaler or None, got int"),
            ({"metric": "l1"}, ValueError, r"metric must be one of \('euclidean', 'adam'\), got metric = 'l1'"),
            ({"unit": "2"}, ValueError, "unit must be a word for what weights count"),
            ({"ghost": True, "metric": "adam"}, ValueError, "metric must be 'euclidean' with ghost=True"),
        ],
    )
    def test_refuses(self, options: dict[str, Any], error: type[Exception], message: str):
        model = small_model()
        with pytest.raises(error, match=message):
            ab.NoiseMeter(model, adam(model), **options)
        assert not any(p._backward_hooks for p in model.parameters())

    def test_refuses_what_is_no_pair(self):
        model = small_model()
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module and optimizer a torch\.optim"):
            ab.NoiseMeter(adam(model), model)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"weight must be positive and finite, got weight = 0"):
            ab.NoiseMeter(model, adam(model)).weight(0)

    def test_explains(self):
        model = small_model()
        meter = ab.NoiseMeter(model, optimizer := adam(model))
        plain(model, optimizer, batches([4] * 200), k=4)
        assert "noise scale" in meter.explain()
