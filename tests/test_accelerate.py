"""Accelerate: windows of any size equal true large batches; its checkpoints carry the controller."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import adaptbatch as ab
from adaptbatch.integrations.accelerate import controller_for
from tests import reference
from tests.test_controller import LastDigits, batches, equal_state, sgd, small_model, split, squared


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
    controller, data = prepared(Accelerator(cpu=True), rule=ab.Replay([2, 3, 1, 4]))
    train(controller, data, epochs=2)
    micro = [x for (x,) in loader()]
    twin = small_model()
    windows = split(micro, [2, 3, 1, 4]) + split(micro, [4])
    reference.hand_written_loop(twin, sgd(twin), squared, windows)
    for p, q in zip(controller.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert controller.history.to_pandas()["accumulation_steps"].tolist() == [2, 3, 1, 4, 1, 4, 4, 3]
    assert controller.examples_seen == 84


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


def test_bfloat16_autocast_is_measured():
    # The state that Accelerate keeps for a process allows one precision.
    Accelerator._shared_state = {}
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "bf16"
    model = small_model(dtype=torch.float32)
    model, optimizer = accelerator.prepare(model, sgd(model))
    controller = controller_for(accelerator, model, optimizer, rule=ab.Fixed(2))
    assert model(batches([4], dtype=torch.float32)[0]).dtype == torch.float32
    train(controller, [(x,) for x in batches([4] * 4, dtype=torch.float32)])
    assert (controller.history.to_pandas()["batch_grad_norm"] > 0.0).all()


def test_accumulation_of_its_own_is_refused():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(4, 3)
    with pytest.raises(
        ValueError, match=r"accelerator must not accumulate itself, got gradient_accumulation_steps = 2"
    ):
        controller_for(accelerator, model, sgd(model))
