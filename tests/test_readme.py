"""README.md: its code runs, its numbers are the committed results', its test line is what CI runs."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

import adaptbatch as ab
from adaptbatch.records import Reason
from studies.output import readme

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def namespace() -> dict[str, object]:
    """What a user's script has before the README's lines: a model, an optimizer, a loader with a partial last batch."""
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(70, 5), torch.randn(70, 1))
    model = nn.Linear(5, 1)
    return {
        "torch": torch,
        "ab": ab,
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters()),
        "loader": torch.utils.data.DataLoader(data, batch_size=8, shuffle=True),
        "loss_fn": nn.functional.mse_loss,
        "epochs": 3,
    }


def test_the_loop_runs_and_every_example_is_used():
    names = namespace()
    exec(BLOCKS[0], names)
    table = names["df"]
    assert table["examples_seen"].iloc[-1] == 3 * 70
    assert table["backward_passes"].iloc[-1] == 3 * 9
    assert table["reason"].notna().all()


def test_the_loop_in_parts_runs_and_every_example_is_used():
    names = namespace()
    exec(BLOCKS[1], names)
    assert names["controller"].history.to_pandas()["examples_seen"].iloc[-1] == 70
    assert math.isfinite(float(names["norm"]))
    assert not any(p._backward_hooks for p in names["model"].parameters())


@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize("program", BLOCKS[2:], ids=lambda program: f"{len(program)} characters")
def test_every_further_block_is_a_whole_program(program):
    exec(program, {})


def test_the_numbers_are_the_committed_results():
    assert readme.fill(TEXT) == TEXT, "run `python -m studies readme`"


def test_a_missing_section_is_refused():
    with pytest.raises(ValueError, match=r"README\.md must have the markers of the section 'quick'"):
        readme.fill("no markers here")


def test_the_columns_and_reasons_are_documented():
    for name in ab.history.COLUMNS:
        assert f"`{name}`" in TEXT
    for reason in get_args(Reason):
        assert f"`{reason}`" in TEXT


def test_every_option_names_a_test_that_is_there():
    table = TEXT.split("<!-- options: begin -->")[1].split("<!-- options: end -->")[0]
    named = re.findall(r"`(test_\w+)` \|$", table, re.MULTILINE)
    assert len(named) == table.count("\n|") - 2
    files = ("test_distributed.py", "test_distributed_options.py", "test_controller.py")
    there = set(re.findall(r"def (test_\w+)\(", "".join((ROOT / "tests" / name).read_text() for name in files)))
    assert set(named) <= there
