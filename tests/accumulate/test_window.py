"""sums.py and window.py: what an open window adds up to."""

from __future__ import annotations

import pytest
import torch

from adaptbatch.accumulate.window import Window
from adaptbatch.measure.sums import Sums


@pytest.mark.parametrize("weights", [[4.0, 9.0, 2.0], [9.0, 4.0, 2.0], [2.0, 4.0, 9.0], [5.0]])
def test_a_window_knows_what_its_micro_batches_weigh(weights: list[float]):
    window = Window(reference=8.0)
    for weight in weights:
        window.add(weight)
    assert (window.weight, window.largest, window.micro_batches) == (sum(weights), max(weights), len(weights))
    window.share({"weight": 60.0, "largest": 16.0, "micro_batches": 7.0}, world_size=2)
    assert (window.weight, window.largest, window.all_micro_batches) == (60.0, 8.0, 7)


def test_what_is_read_off_grad_has_a_loss_scale_only_while_grad_has():
    for accumulated in (True, False):
        sums = Sums({"weighted": torch.tensor(64.0), "batch": torch.tensor(64.0), "loss_sum": torch.tensor(3.0)})
        sums["consecutive_product"] = torch.tensor(8.0)
        sums.unscale(torch.tensor(4.0), accumulated)
        expected = {"weighted": 4.0, "batch": 4.0, "loss_sum": 3.0, "consecutive_product": 2.0}
        expected |= {} if accumulated else {"batch": 64.0, "consecutive_product": 8.0}
        assert {name: value.item() for name, value in sums.items()} == expected
