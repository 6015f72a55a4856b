"""What the transformer study says of the start: whether post-LN is noisier there, from rows of known noise."""

from __future__ import annotations

from itertools import product

import pandas as pd
import pytest

from studies.output import opening

EXAMPLES = (10_000.0, 50_000.0, 1_000_000.0)


def recorded(post: float, diverged: float = 0.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs whose early ``B / n`` is 1 with pre-LN and ``post`` with post-LN; at the largest rate one may diverge."""
    runs, curves = [], []
    for key, (order, lr, seed) in enumerate(product(("pre", "post"), (1e-3, 1e-1), range(3))):
        off = diverged if (order, lr, seed) == ("pre", 1e-1, 0) else 0.0
        runs.append({"key": key, "arm": "rate warm-up", "order": order, "lr": lr, "seed": seed, "diverged": off})
        level = (post if order == "post" else 1.0) * (1 + seed) * (1e6 if lr == 1e-1 and diverged else 1.0)
        # Four times and a quarter of the level: their geometric mean is the level; what is late does not count.
        for examples, times in zip(EXAMPLES, (4.0, 0.25, 1e3), strict=True):
            row = {"key": key, "examples_seen": examples, "noise_scale": 512 * times * level, "global_batch": 512.0}
            curves.append(row)
    return pd.DataFrame(runs), pd.DataFrame(curves)


def test_noise_is_the_geometric_mean_of_the_first_twentieth() -> None:
    table = opening.opening_noise(*recorded(post=2.0))
    found = table.set_index(["order", "lr", "seed"])["B / n"]
    assert len(found) == 12
    assert found["pre", 1e-3, 2] == pytest.approx(3.0)
    assert found["post", 1e-1, 0] == pytest.approx(2.0)


@pytest.mark.parametrize(("post", "verdict"), [(2.0, "supported"), (0.5, "not supported")])
@pytest.mark.parametrize("diverged", [0.0, 1.0])
def test_orders_are_compared_seed_by_seed_at_rates_at_which_neither_diverges(
    post: float, verdict: str, diverged: float
) -> None:
    (row,) = opening.noisier(opening.opening_noise(*recorded(post, diverged)))
    assert row["value"] == pytest.approx(1 / post)
    assert row["verdict"] == verdict


def test_one_order_says_nothing() -> None:
    table = opening.opening_noise(*recorded(2.0))
    assert opening.noisier(table[table["order"] == "post"]) == []
