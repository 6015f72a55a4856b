"""Accelerate: windows of any size equal true large batches; its checkpoints carry the controller."""

from __future__ import annotations

import os
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import adaptbatch as ab
from tests import reference
from tests.models import LastDigits, batches, equal_state, sgd, small_model, split, squared
from tests.processes import spawn

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, DistributedType

from adaptbatch.integrations.accelerate import controller_for


def loader(examples: int = 42, dtype: torch.dtype = torch.float64) -> DataLoader:
    return DataLoader(TensorDataset(torch.cat(batches([examples], dtype=dtype))), batch_size=4)


def prepared(accelerator: Accelerator, seed: int = 0, dtype: torch.dtype = torch.float64, **options):
    model = small_model(seed, dtype)
    model, optimizer, data = accelerator.prepare(model, sgd(model), loader(dtype=dtype))
    return controller_for(accelerator, model, optimizer, **options), data


def train(controller: ab.BatchController, data, epochs: int = 1) -> None:
    for _ in range(epochs):
        for (x,) in controller.micro_batches(data):
            controller.backward(squared(controller.model, x), weight=len(x))
            if controller.step_due:
                controller.step()


def test_unequal_and_partial_windows_equal_true_large_batches():
    """Eleven micro-batches an epoch, the last one of two examples: windows of 2, 3, 1, 4 and 1, then 4, 4 and 3."""
    controller, data = prepared(Accelerator(cpu=True), rule=ab.rules.Replay([2, 3, 1, 4]))
    train(controller, data, epochs=2)
    micro = [x for (x,) in loader()]
    twin = small_model()
    windows = split(micro, [2, 3, 1, 4]) + split(micro, [4])
    reference.hand_written_loop(twin, sgd(twin), squared, windows)
    for p, q in zip(controller.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert controller.history.to_pandas()["accumulation_steps"].tolist() == [2, 3, 1, 4, 1, 4, 4, 3]
    assert controller.examples_seen == 84


# Micro-batches by their sizes, dealt to two ranks in turn: seven for the first, six for the second.
SIZES = [4, 7, 3, 5, 2, 6, 1, 5, 3, 4, 8, 2, 5]


def unequal() -> DataLoader:
    data = torch.cat(batches([sum(SIZES)]))
    return DataLoader(TensorDataset(data), batch_sampler=[list(part) for part in torch.arange(len(data)).split(SIZES)])


def ranked(rank: int, even_batches: bool) -> dict[str, Any]:
    # What torchrun sets, and Accelerate asks for though the group exists.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=even_batches))
    plain = small_model()
    model, optimizer, data = accelerator.prepare(plain, sgd(plain), loader() if even_batches else unequal())
    controller, seen = controller_for(accelerator, model, optimizer, rule=ab.rules.Replay([2, 3, 4])), []
    for _ in range(2):
        windows: list[list[torch.Tensor]] = [[]]
        for (x,) in controller.micro_batches(data):
            windows[-1].append(x)
            controller.backward(squared(model, x), weight=len(x))
            if controller.step_due:
                controller.step()
                windows.append([])
        seen += windows[:-1]
    rows = controller.history.to_pandas()
    found = {"seen": seen, "rows": rows, "parameters": [p.detach() for p in plain.parameters()]}
    return found | {"kind": type(model), "unused": controller.unused_micro_batches, "left": len(windows[-1])}


@pytest.mark.parametrize(
    ("even_batches", "windows"),
    [
        (False, [[2, 3, 2, 4, 3], [2, 3, 1, 4, 2]]),
        # Forty-two examples in fours: Accelerate fills up the last two micro-batches from the beginning.
        (True, [[2, 3, 1, 4, 2], [2, 3, 1, 4, 2]]),
    ],
    ids=["unequal", "even"],
)
def test_two_ranks_equal_one_process_that_sees_the_same_examples(tmp_path, even_batches, windows):
    """Micro-batches that differ in size and in number from rank to rank; each epoch ends within a window."""
    ranks, twin = spawn(ranked, tmp_path, even_batches), small_model()
    reference.hand_written_loop(
        twin, sgd(twin), squared, [a + b for a, b in zip(*(r["seen"] for r in ranks), strict=True)]
    )
    for found, expected in zip(ranks, windows, strict=True):
        assert found["kind"] is DistributedDataParallel
        assert [len(window) for window in found["seen"]] == expected
        assert found["rows"]["accumulation_steps"].tolist() == expected
        assert (found["unused"], found["left"]) == (0, 0)
        for p, q in zip(found["parameters"], twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    first, second = (found["rows"] for found in ranks)
    shared = ["global_batch", "examples_seen", "noise_trace", "grad_sq_norm", "loss", "target_batch", "reason"]
    pd.testing.assert_frame_equal(first[shared], second[shared], check_exact=True)
    assert first["examples_seen"].iloc[-1] == 2 * (48 if even_batches else sum(SIZES))


def test_its_checkpoints_carry_the_controller(tmp_path):
    accelerator = Accelerator(cpu=True)
    controller, data = prepared(accelerator, dtype=torch.float32, rule=LastDigits())
    train(controller, data, epochs=3)
    accelerator.save_state(str(tmp_path))
    done = len(controller.history)
    train(controller, data, epochs=2)
    other_accelerator = Accelerator(cpu=True)
    other, other_data = prepared(other_accelerator, seed=1, dtype=torch.float32, rule=LastDigits())
    other_accelerator.load_state(str(tmp_path))
    train(other, other_data, epochs=2)
    assert equal_state(controller.model, other.model)
    expected = controller.history.to_pandas().iloc[done:].drop(columns="wall_seconds").reset_index(drop=True)
    pd.testing.assert_frame_equal(other.history.to_pandas().drop(columns="wall_seconds"), expected, check_exact=True)


@pytest.fixture
def fresh_state():
    """Accelerate keeps one precision for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_state")
def test_bfloat16_autocast_is_measured():
    """The layers compute in bfloat16; norms are near those of float32, as 8 bits of every gradient allow."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, plain = small_model(dtype=torch.float32), small_model(dtype=torch.float32)
    inside = []
    model[0].register_forward_hook(lambda module, args, output: inside.append(output.dtype))
    model, optimizer = accelerator.prepare(model, sgd(model))
    data = [(x,) for x in batches([32] * 2, dtype=torch.float32)]
    rows = []
    for controller in (
        controller_for(accelerator, model, optimizer, rule=ab.Fixed(2)),
        ab.BatchController(plain, sgd(plain), rule=ab.Fixed(2)),
    ):
        train(controller, data)
        rows.append(controller.history.to_pandas().iloc[0])
    assert set(inside) == {torch.bfloat16}
    assert rows[0]["batch_grad_norm"] == pytest.approx(rows[1]["batch_grad_norm"], rel=0.02)
    assert rows[0]["batch_grad_norm"] != rows[1]["batch_grad_norm"]


@pytest.mark.parametrize("before", [True, False])
def test_a_meter_in_a_loop_that_accelerate_accumulates(before: bool):
    """Its optimizer stepped by the wrapper, wherever the line stands; the rows are those of a controller's loop."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    plain, twin = small_model(), small_model()
    optimizer, data = sgd(plain), loader(96)
    meter = ab.NoiseMeter(plain, optimizer) if before else None
    model, optimizer, data = accelerator.prepare(plain, optimizer, data)
    if meter is None:
        meter = ab.NoiseMeter(model, optimizer)
    for (x,) in data:
        with accelerator.accumulate(model):
            accelerator.backward(squared(model, x))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
    controller = ab.BatchController(twin, sgd(twin), rule=ab.Fixed(4))
    for (x,) in controller.micro_batches(loader(96)):
        controller.backward(squared(twin, x), weight=len(x))
        if controller.step_due:
            nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
            controller.step()
    ours, theirs = meter.history.to_pandas(), controller.history.to_pandas()
    assert equal_state(plain, twin)
    columns = ["accumulation_steps", "global_batch", "examples_seen", "noise_trace", "grad_sq_norm", "noise_scale"]
    pd.testing.assert_frame_equal(ours[columns], theirs[columns], check_exact=False, rtol=1e-6)
    meter.close()


def test_accumulation_of_its_own_is_refused():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(4, 3)
    with pytest.raises(
        ValueError, match=r"accelerator must not accumulate itself, got gradient_accumulation_steps = 2"
    ):
        controller_for(accelerator, model, sgd(model))


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "XLA"])
def test_what_has_a_loop_of_its_own_is_refused(monkeypatch, kind):
    accelerator, model = Accelerator(cpu=True), nn.Linear(4, 3)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])
    with pytest.raises(ValueError, match=rf"to the loop, got distributed_type = {kind}; use DDP or FSDP2"):
        controller_for(accelerator, model, sgd(model))
