"""window.py: the sums of an open window."""

from __future__ import annotations

import pytest
import torch

from adaptbatch.accumulate.window import OpenWindow


@pytest.mark.parametrize("weights", [[4.0, 9.0, 2.0], [9.0, 4.0, 2.0], [2.0, 4.0, 9.0], [5.0]])
def test_sums_over_micro_batches(weights: list[float]):
    window = OpenWindow(reference=8.0)
    for index, weight in enumerate(weights):
        # The norm of what was back-propagated, weight / reference of the mean's, which is index + 1.
        arrived = torch.tensor((weight / 8.0 * (index + 1.0)) ** 2, dtype=torch.float64)
        window.add(arrived, torch.tensor([2.0 + index]), weight)
    assert (window.weight, window.largest, window.cells) == (sum(weights), max(weights), len(weights))
    assert window.norms.weighted is not None
    assert window.loss_sum is not None
    assert window.norms.weighted.item() == pytest.approx(sum(w * (i + 1.0) ** 2 for i, w in enumerate(weights)))
    assert window.loss_sum.item() == pytest.approx(sum(w * (2.0 + i) for i, w in enumerate(weights)))
