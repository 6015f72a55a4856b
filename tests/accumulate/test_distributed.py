"""distributed.py: several real processes train as one; they agree, end together, and fail with words."""

from __future__ import annotations

import os
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import adaptbatch as ab
from adaptbatch.checkpoint import STATE_VERSION
from adaptbatch.records import WindowCounts
from adaptbatch.state import State
from tests import reference
from tests.models import batches, sgd, small_model, squared
from tests.processes import WORLD, spawn, start_ranks

# Faults of torch, without this package too: 2.6 asks for the streams of a GPU, and gloo of 2.7 sums where FSDP2 wants
# the mean of float32.
sharding = pytest.mark.skipif(torch.__version__ < "2.8", reason="FSDP2 of torch 2.6 and 2.7 is broken on CPUs")

REPLICATED_OR_SHARDED = [pytest.param(False, id="replicated"), pytest.param(True, id="sharded", marks=sharding)]

# Micro-batches of each rank, unequal; of the second rank fewer. Replay([2, 1, 3, 2]) cuts them into windows.
SIZES = [[4, 7, 3, 5, 2, 6, 1, 5, 3, 4], [3, 3, 8, 2, 4, 4, 2]]
STEPS = [2, 1, 3, 2]
# Windows as they should come out: rank 1's data end in the fourth, which is shorter there, and both stop.
WINDOWS = [[(0, 2), (2, 3), (3, 6), (6, 8)], [(0, 2), (2, 3), (3, 6), (6, 7)]]


def shards(rank: int) -> list[Tensor]:
    return batches(SIZES[rank], seed=rank)


def train(model: nn.Module, data: list[Tensor], **options: Any) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught, ab.BatchController(model, sgd(model), **options) as controller:
        warnings.simplefilter("always")
        for x in controller.micro_batches(data):
            controller.backward(squared(model, x), weight=len(x))
            if controller.step_due:
                controller.step()
        unused = controller.unused_micro_batches
    return {
        "rows": controller.history.to_pandas(),
        "explained": controller.explain(),
        "unused": unused,
        "warnings": [str(one.message) for one in caught],
    }


def replicated(rank: int, sync: str, bucket_view: bool) -> dict[str, Any]:
    model = DistributedDataParallel(small_model(), gradient_as_bucket_view=bucket_view)
    data = shards(rank) if sync == "last" else shards(rank)[:7]
    found = train(model, data, rule=ab.rules.Replay(STEPS), sync=sync)
    return found | {"parameters": [p.detach() for p in model.parameters()]}


def sharded_model(half: bool) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = small_model(dtype=torch.float32 if half else torch.float64)
    in_half = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    policy = in_half if half else {}
    fully_shard(model[0], **policy)
    fully_shard(model, **policy)
    return model


def sharded(rank: int, sync: str, half: bool) -> dict[str, Any]:
    model = sharded_model(half)
    data = [x.float() for x in shards(rank)] if half else shards(rank)
    found = train(model, data, rule=ab.rules.Replay(STEPS), sync=sync)
    found |= {"parameters": [p.full_tensor().detach() for p in model.parameters()]}
    if half:
        found |= {f"hand-written, {scale}": hand_written_in_half(rank, sync, scale) for scale in ("expected", "mean")}
    return found


def hand_written_in_half(rank: int, sync: str, scale: str) -> list[Tensor]:
    """Parameters after a loop of FSDP2 alone: each loss times its weight over ``reference``, then one exact division.

    The reference is the weight that a full window is expected to have, as in the controller, or what it has.
    """
    model, data = sharded_model(half=True), [x.float() for x in shards(rank)]
    optimizer, cell = sgd(model), sum(sizes[0] for sizes in SIZES) / WORLD
    loop = State(ab.records.Progress(world_size=WORLD))
    for steps, (low, high) in zip(STEPS, WINDOWS[1], strict=True):
        loop = replace(loop, progress=replace(loop.progress, accumulation_steps=steps))
        each = sum(sum(sizes[low:high]) for sizes in SIZES) / WORLD
        reference = steps * cell if scale == "expected" else each
        for index in range(low, high):
            model.set_requires_gradient_sync(sync == "every" or index == high - 1)
            (squared(model, data[index]) * (len(data[index]) / reference)).backward()
        for p in model.parameters():
            p.grad.div_(each / reference)
        optimizer.step()
        optimizer.zero_grad()
        largest = sum(max(sizes[low:high]) for sizes in SIZES) / WORLD
        loop = loop.counted(WindowCounts(each * WORLD, WORLD * (high - low), largest))
        cell = loop.progress.micro_batch_examples
    return [p.full_tensor().detach() for p in model.parameters()]


def expected(windows: list[list[tuple[int, int]]]) -> tuple[nn.Module, pd.DataFrame]:
    """One process that sees the same examples, and the analysis of variance of the same cells."""
    model = small_model()
    optimizer, rows = sgd(model), []
    for ranges in zip(*windows, strict=True):
        cells = [x for rank, (low, high) in enumerate(ranges) for x in shards(rank)[low:high]]
        measured = []
        for x in cells:
            gradients = torch.autograd.grad(squared(model, x), list(model.parameters()))
            measured.append((float(len(x)), torch.cat([g.reshape(-1) for g in gradients]).numpy()))
        trace, signal = reference.anova(measured)
        loss = squared(model, torch.cat(cells))
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
        n = float(sum(map(len, cells)))
        rows.append((n, loss.item(), trace, signal, norm.item(), norm.item()))
    columns = ["global_batch", "loss", "noise_trace", "grad_sq_norm", "batch_grad_norm", "applied_grad_norm"]
    return model, pd.DataFrame(rows, columns=columns)


class TestEqualsOneProcess:
    @pytest.mark.parametrize(("sync", "bucket_view"), [("last", False), ("last", True), ("every", False)])
    def test_replicated(self, tmp_path, sync, bucket_view):
        ranks = spawn(replicated, tmp_path, sync, bucket_view)
        model, rows = expected(WINDOWS if sync == "last" else [WINDOWS[1], WINDOWS[1]])
        for rank, found in enumerate(ranks):
            for p, q in zip(found["parameters"], model.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
            pd.testing.assert_frame_equal(found["rows"][list(rows)], rows, rtol=1e-6)
            steps = [high - low for low, high in WINDOWS[rank if sync == "last" else 1]]
            assert found["rows"]["accumulation_steps"].tolist() == steps
            assert found["rows"]["backward_passes"].iloc[-1] == sum(steps)
        if sync == "last":
            assert [found["unused"] for found in ranks] == [2, 0]
            assert "rank 0: at least 2 micro-batches are left over" in ranks[0]["warnings"][0]
            assert not ranks[1]["warnings"]

    @sharding
    @pytest.mark.parametrize("sync", ["last", "every"])
    def test_sharded(self, tmp_path, sync):
        """FSDP2 gathers in every forward pass: ranks end in lockstep, after seven micro-batches."""
        ranks = spawn(sharded, tmp_path, sync, False)
        model, rows = expected([WINDOWS[1], WINDOWS[1]])
        for found in ranks:
            for p, q in zip(found["parameters"], model.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
            pd.testing.assert_frame_equal(found["rows"][list(rows)], rows, rtol=1e-6)
        assert [found["unused"] for found in ranks] == [3, 0]

    @sharding
    @pytest.mark.parametrize("sync", ["last", "every"])
    def test_sharded_in_mixed_precision(self, tmp_path, sync):
        """Local bfloat16 gradients, squared norms in float32: near the exact ones, and the same on both ranks.

        Parameters are those of a hand-written loop of the same policy that scales its losses alike; with other scales
        bfloat16 rounds otherwise, 8 bits of each gradient.
        """
        ranks = spawn(sharded, tmp_path, sync, True)
        _, rows = expected([WINDOWS[1], WINDOWS[1]])
        started = list(small_model(dtype=torch.float32).parameters())
        for found in ranks:
            ours, alike, other = (
                found[name] for name in ("parameters", "hand-written, expected", "hand-written, mean")
            )
            for p, same, near, start in zip(ours, alike, other, started, strict=True):
                torch.testing.assert_close(p, same, rtol=1e-6, atol=1e-7)
                assert (p - near).norm() < 2**-7 * (p - start).norm()
        first, second = (found["rows"] for found in ranks)
        pd.testing.assert_series_equal(first["noise_trace"], second["noise_trace"], check_exact=True)
        # bfloat16 keeps 8 bits of every gradient; the first window starts from the same parameters.
        assert first["noise_trace"].iloc[0] == pytest.approx(rows["noise_trace"].iloc[0], rel=0.05)
        assert first["loss"].iloc[0] == pytest.approx(rows["loss"].iloc[0], rel=0.05)


def by_example(rank: int, metric: str) -> dict[str, Any]:
    """Ghost norms, or Adam's metric, of replicas that each have half of the examples."""
    torch.manual_seed(0)
    model = DistributedDataParallel(small_model())
    x = batches([8] * 30)
    options = {"metric": "adam"} if metric else {"ghost": True}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.5))
    with ab.BatchController(model, optimizer, rule=ab.Fixed(2), **options) as controller:
        for item in controller.micro_batches(x):
            half = item[4 * rank : 4 * rank + 4]
            controller.backward(squared(model, half), weight=4)
            if controller.step_due:
                controller.step()
    return {"rows": controller.history.to_pandas()}


def scaled(rank: int, shards_parameters: bool) -> dict[str, Any]:
    """GradScaler on several ranks; the third window overflows on rank 1 only."""
    from torch.distributed.fsdp import fully_shard

    model: nn.Module = small_model(dtype=torch.float32)
    if shards_parameters:
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    data = batches([4] * 10, seed=rank, dtype=torch.float32)
    if rank == 1:
        data[5] = torch.full((4, 4), float("inf"))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = train(model, data, rule=ab.Fixed(2), scaler=scaler)
    full = [p.full_tensor() if shards_parameters else p for p in model.parameters()]
    return found | {"parameters": [p.detach() for p in full], "scale": scaler.get_scale()}


class TestScaler:
    @pytest.mark.parametrize("shards_parameters", REPLICATED_OR_SHARDED)
    def test_an_overflow_on_one_rank_is_skipped_on_all(self, tmp_path, shards_parameters):
        ranks = spawn(scaled, tmp_path, shards_parameters)
        twin = small_model(dtype=torch.float32)
        optimizer = sgd(twin)
        for window in (0, 1, 3, 4):
            cells = [
                x for rank in range(2) for x in batches([4] * 10, rank, torch.float32)[2 * window : 2 * window + 2]
            ]
            squared(twin, torch.cat(cells)).backward()
            optimizer.step()
            optimizer.zero_grad()
        for found in ranks:
            assert found["rows"]["skipped"].tolist() == [False, False, True, False, False]
            assert found["rows"]["reason"].iloc[2] == "nonfinite"
            assert found["scale"] == 512.0
            for p, q in zip(found["parameters"], twin.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


class TestOptions:
    @pytest.mark.parametrize("metric", ["", "adam"], ids=["ghost", "adam"])
    def test_equal_one_process_with_the_same_cells(self, tmp_path, metric):
        ranks = spawn(by_example, tmp_path, metric)
        model = small_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.5))
        options = {"metric": "adam"} if metric else {"ghost": True}
        cells = [half for x in batches([8] * 30) for half in x.split(4)]
        with ab.BatchController(model, optimizer, rule=ab.Fixed(4), **options) as controller:
            for x in controller.micro_batches(cells):
                controller.backward(squared(model, x), weight=len(x))
                if controller.step_due:
                    controller.step()
        expected = controller.history.to_pandas()
        for name in ("noise_trace", "grad_sq_norm", "noise_scale", "noise_scale_metric", "loss"):
            for found in ranks:
                assert found["rows"][name].to_numpy() == pytest.approx(expected[name].to_numpy(), rel=1e-5, nan_ok=True)
        assert expected["noise_scale_metric"].notna().any() == bool(metric)


def adaptive(rank: int, shift: float) -> dict[str, Any]:
    torch.manual_seed(rank)
    data = [torch.randn(8, 4, dtype=torch.float64) + shift * rank for _ in range(400)]
    model = DistributedDataParallel(small_model())
    rule = ab.RelativeStandardError(theta=0.3, memory=500.0, dead_time=200.0)
    return train(model, data, rule=rule)


def fixed(rank: int, shift: float) -> dict[str, Any]:
    torch.manual_seed(rank)
    data = [torch.randn(8, 4, dtype=torch.float64) + shift * rank for _ in range(200)]
    return train(DistributedDataParallel(small_model()), data, rule=ab.Fixed(4))


class TestDecisions:
    def test_all_ranks_decide_alike_and_one_micro_batch_each_is_evidence(self, tmp_path):
        first, second = (found["rows"] for found in spawn(adaptive, tmp_path, 0.0))
        pd.testing.assert_frame_equal(
            first.drop(columns="wall_seconds"), second.drop(columns="wall_seconds"), check_exact=True
        )
        assert first["accumulation_steps"].iloc[0] == 1
        assert first["accumulation_steps"].nunique() > 2

    def test_shards_that_differ_are_reported(self, tmp_path):
        alike, shifted = tmp_path / "alike", tmp_path / "shifted"
        alike.mkdir()
        shifted.mkdir()
        same, other = spawn(fixed, alike, 0.0)[0], spawn(fixed, shifted, 1.0)[0]
        assert same["rows"]["shard_ratio"].iloc[-1] < 3.0 < other["rows"]["shard_ratio"].iloc[-1]
        assert "the ranks' data differ" in other["explained"]
        assert "the ranks' data differ" not in same["explained"]

    def test_a_rank_with_other_limits_is_found(self, tmp_path):
        with pytest.raises(
            Exception, match=r"rank \d disagrees with the others: it takes \d accumulation steps, the mean"
        ):
            spawn(disagreeing, tmp_path)

    def test_limits_change_under_way_without_a_gradient_that_is_not_synchronised(self, tmp_path):
        """In the scope of a first micro-batch, which went unsynchronised for a window of three; then after a step."""
        ranks, twin = spawn(relimited, tmp_path), small_model()
        optimizer = sgd(twin)
        for low, high in ((0, 3), (3, 4), (4, 5), (5, 7)):
            squared(twin, torch.cat([x for r in range(2) for x in batches([4] * 7, r)[low:high]])).backward()
            optimizer.step()
            optimizer.zero_grad()
        for found in ranks:
            assert found["rows"]["accumulation_steps"].tolist() == [3, 1, 1, 2]
            for p, q in zip(found["parameters"], twin.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def relimited(rank: int) -> dict[str, Any]:
    model = DistributedDataParallel(small_model())
    controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(3))
    for index, x in enumerate(controller.micro_batches(batches([4] * 7, seed=rank))):
        if index == 0:
            controller.limits = ab.Limits(max_steps=1)
        controller.backward(squared(model, x), weight=len(x))
        if controller.step_due:
            controller.step()
        if index == 4:
            controller.limits = ab.Limits(min_steps=2, max_steps=2)
    return {"rows": controller.history.to_pandas(), "parameters": [p.detach() for p in model.parameters()]}


def disagreeing(rank: int) -> None:
    train(DistributedDataParallel(small_model()), shards(0), rule=ab.Fixed(1 + rank))


def dying(rank: int, folder: str) -> None:
    model = DistributedDataParallel(small_model())
    controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
    for index, x in enumerate(controller.micro_batches(shards(0))):
        if rank == 1 and index > 2:
            # After the backward pass, where the sums of the window are exchanged.
            controller._ranks.sum = lambda *_: os._exit(0)  # type: ignore[method-assign]
        try:
            controller.backward(squared(model, x), weight=len(x))
        except RuntimeError as error:
            torch.save(str(error), f"{folder}/message.pt")
            # A gloo group with a dead member may abort the process that takes it down.
            os._exit(0)
        if controller.step_due:
            controller.step()


def unscoped(rank: int, shards_parameters: bool) -> dict[str, Any]:
    """A hand-written loop: one window in scopes, one after a scope without any, where every backward synchronises."""
    from torch.distributed.fsdp import fully_shard

    model: nn.Module = small_model()
    if shards_parameters:
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
    for index, x in enumerate(batches([4] * 6, seed=rank)):
        with controller.micro_batch() if index in (0, 1, 2) else nullcontext():
            controller.backward(squared(model, x), weight=len(x))
        if controller.step_due:
            controller.step()
    full = [p.full_tensor() if shards_parameters else p for p in model.parameters()]
    return {"rows": controller.history.to_pandas(), "parameters": [p.detach() for p in full]}


class TestWithoutScopes:
    @pytest.mark.parametrize("shards_parameters", REPLICATED_OR_SHARDED)
    def test_a_backward_outside_of_a_scope_synchronises(self, tmp_path, shards_parameters):
        ranks, twin = spawn(unscoped, tmp_path, shards_parameters), small_model()
        optimizer = sgd(twin)
        for low in (0, 2, 4):
            squared(twin, torch.cat([x for r in range(2) for x in batches([4] * 6, r)[low : low + 2]])).backward()
            optimizer.step()
            optimizer.zero_grad()
        for found in ranks:
            for p, q in zip(found["parameters"], twin.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)

    def test_the_shards_are_not_judged_by_gradients_that_are_averaged_already(self, tmp_path):
        """Two micro-batches that both synchronise: what a rank accumulated is not its own, and is not measured."""
        rows = spawn(all_unscoped, tmp_path)[0]["rows"]
        assert rows["noise_trace"].notna().all()
        assert rows["shard_ratio"].isna().all()


def all_unscoped(rank: int) -> dict[str, Any]:
    model = DistributedDataParallel(small_model())
    controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
    for x in batches([4] * 4, seed=rank):
        controller.backward(squared(model, x), weight=len(x))
        if controller.step_due:
            controller.step()
    return {"rows": controller.history.to_pandas()}


def bookkeeping(rank: int) -> dict[str, Any]:
    """A clipped training of two ranks; what one knows of the seconds; one that synchronises each."""
    model = DistributedDataParallel(small_model())
    controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(2), consecutive=True)
    clipped(controller, model, [half.split(4)[rank] for half in batches([8] * 12)], slow=0.01 * rank)
    found: dict[str, Any] = {"rows": controller.history.to_pandas(), "seconds": controller._state.seconds}
    model = DistributedDataParallel(small_model())
    every = ab.BatchController(model, sgd(model), rule=ab.Fixed(2), sync="every")
    clipped(every, model, batches([4] * 8, seed=rank))
    found["shard_ratio"] = every.history.to_pandas()["shard_ratio"]
    model = DistributedDataParallel(small_model())
    epochs = ab.BatchController(model, sgd(model), rule=ab.Fixed(1))
    for _ in range(2):
        clipped(epochs, model, batches([4] * 5, seed=rank))
    found["windows"] = len(epochs.history)
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = DistributedDataParallel(small_model(dtype=torch.float32))
        scaled = ab.BatchController(model, sgd(model), rule=ab.Fixed(2), scaler=scaler)
        clipped(scaled, model, batches([4] * 80, seed=rank, dtype=torch.float32))
        found["scaled" if scaler else "unscaled"] = scaled.history.to_pandas()["shard_ratio"].to_numpy()
    model = DistributedDataParallel(small_model())
    # Of one size so far, on the way to two.
    rule = ab.Fixed(2) if rank == 0 else ab.Ramp(2, 64, examples=1e6)
    try:
        clipped(ab.BatchController(model, sgd(model), rule=rule), model, batches([4] * 8, seed=rank))
    except RuntimeError as error:
        found["error"] = str(error)
    return found


def clipped(controller: ab.BatchController, model: nn.Module, data: list[Tensor], slow: float = 0.0) -> None:
    for x in controller.micro_batches(data):
        controller.backward(squared(model, x), weight=len(x))
        if controller.step_due:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            time.sleep(slow)
            controller.step()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(bookkeeping, tmp_path_factory.mktemp("bookkeeping"))


class TestBookkeeping:
    def test_clipping_and_the_phase_are_those_of_one_process(self, found):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(4), consecutive=True)
        clipped(controller, model, [half for x in batches([8] * 12) for half in x.split(4)])
        expected = controller.history.to_pandas()
        assert (expected["applied_grad_norm"] < 0.5 * expected["batch_grad_norm"]).all()
        for name in ("batch_grad_norm", "applied_grad_norm", "consecutive_product"):
            for rank in found:
                assert rank["rows"][name].to_numpy() == pytest.approx(expected[name].to_numpy(), rel=1e-6, nan_ok=True)

    def test_ranks_know_the_same_seconds(self, found):
        """Of their mean, whoever waits; a rule of seconds would have them disagree."""
        assert found[0]["seconds"] == found[1]["seconds"]

    def test_what_every_micro_batch_averages_is_no_ranks_own(self, found):
        for rank in found:
            assert rank["shard_ratio"].isna().all()

    def test_every_epoch_is_whole(self, found):
        assert [rank["windows"] for rank in found] == [10, 10]

    def test_the_loss_scale_is_in_no_ratio_of_shards(self, found):
        assert np.isfinite(found[0]["unscaled"][-1])
        assert found[0]["scaled"] == pytest.approx(found[0]["unscaled"], rel=1e-3, nan_ok=True)

    def test_a_rule_that_differs_is_found_before_the_sizes_do(self, found):
        for index, rank in enumerate(found):
            assert (
                f"rank {index} disagrees with the others: it takes 2 accumulation steps, the mean is 2" in rank["error"]
            )


class TestFaults:
    def test_a_rank_that_dies_is_named_within_the_timeout(self, tmp_path):
        start_ranks(dying, tmp_path, str(tmp_path), timeout=10.0)
        message = torch.load(tmp_path / "message.pt")
        assert "rank 0 of 2: the window's all-reduce failed. Another rank died" in message

    def test_parts_of_a_loop_and_checkpoints(self, tmp_path):
        for messages in spawn(by_hand, tmp_path):
            assert "close_window() is too late on several ranks" in messages[0]
            assert "state_dict() is for between windows on several ranks, got one with 1 of 3" in messages[1]
            assert "must not keep the window's gradients on several ranks" in messages[2]
            assert messages[3] == [STATE_VERSION, 0]


def by_hand(rank: int) -> list[Any]:
    """A hand-written loop: announces its last micro-batch, or is told that it should have."""
    model = DistributedDataParallel(small_model())
    messages: list[Any] = []
    controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(3))
    x = shards(rank)[0]
    with controller.micro_batch():
        controller.backward(squared(model, x), weight=len(x))
    for call in (controller.close_window, controller.state_dict):
        try:
            call()
        except RuntimeError as error:
            messages.append(str(error))
    controller.discard_window()
    try:
        ab.BatchController(model, sgd(model), rule=ab.rules.InnerProductTest())
    except ValueError as error:
        messages.append(str(error))
    rows = []
    for last in (False, True):
        with controller.micro_batch(last=last):
            controller.backward(squared(model, x), weight=len(x))
        rows.append(controller.step_due)
    controller.step()
    state = controller.state_dict()
    fresh = ab.BatchController(model, sgd(model), rule=ab.Fixed(3))
    fresh.load_state_dict(state)
    row = controller.history.to_pandas().iloc[0]
    assert rows == [False, True]
    assert fresh.examples_seen == row["global_batch"] == 2 * (4 + 3)
    return [*messages, [state["version"], int(state["window"] is not None)]]
