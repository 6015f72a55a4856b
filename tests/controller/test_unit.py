"""The unit of the weights, wherever a person reads."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pandas as pd
import pytest

import adaptbatch as ab
from adaptbatch.reporting.html import notebook
from adaptbatch.reporting.loggers import ProgressLine
from tests.models import batches, sgd, small_model, squared


def trained(unit: str = "tokens") -> ab.BatchController:
    model = small_model()
    c = ab.BatchController(model, sgd(model), unit=unit, guard=ab.Guard())
    for x in c.micro_batches(batches([4] * 80)):
        c.backward(squared(c.model, x), weight=300)
        if c.step_due:
            c.step()
    return c


def test_no_text_speaks_of_examples(tmp_path: Path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    c = trained()
    assert "example" not in c.explain()
    assert "After 24,000 tokens the noise scale is" in c.explain()
    axes = c.history.plot()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens seen", "tokens")
    matplotlib.pyplot.close(axes.figure)
    text = notebook(c.history.to_pandas())
    assert "<th>tokens</th>" in text
    assert "<th>examples</th>" not in text
    page = c.history.to_html(tmp_path / "page.html").read_text()
    assert '"tokens seen"' in page
    assert "examples seen" not in page
    # The heads of both tables.
    assert len(re.findall(r"<th[^>]*>\s*tokens\b", page)) == 2
    assert not re.findall(r"<th[^>]*>\s*examples\b", page)


def test_a_stored_table_keeps_it(tmp_path: Path):
    pytest.importorskip("pyarrow")
    trained().history.to_parquet(tmp_path / "run.parquet")
    table = pd.read_parquet(tmp_path / "run.parquet")
    assert table.attrs["unit"] == "tokens"
    assert '"tokens seen"' in ab.report(table, tmp_path / "page.html").read_text()


def test_the_progress_line():
    pytest.importorskip("tqdm")
    line = ProgressLine(48_000, package="tqdm", file=io.StringIO(), unit="tokens")
    for row in trained().history:
        line.log(row)
    line.close()
    assert line.text.startswith("50% 24,000 of 48,000 tokens  loss")


def test_examples_are_the_default_and_decisions_do_not_depend_on_it():
    tokens, examples = trained(), trained("examples")
    assert "After 24,000 examples" in examples.explain()
    columns = ["accumulation_steps", "reason", "noise_scale", "target_batch"]
    assert tokens.history.to_pandas()[columns].equals(examples.history.to_pandas()[columns])


@pytest.mark.parametrize("unit", ["", "<b>", "tok3ns", 7, None, "a,b"])
def test_what_is_no_word_is_refused(unit):
    with pytest.raises(ValueError, match=r"unit must be a word for what weights count, in the plural, got unit = "):
        trained(unit)
    with pytest.raises(ValueError, match="unit must be a word"):
        ProgressLine(unit=unit)


def test_ghost_norms_count_examples():
    model = small_model()
    with pytest.raises(ValueError, match=r"unit must be 'examples' with ghost=True.*got unit = 'tokens'"):
        ab.BatchController(model, sgd(model), ghost=True, rule=ab.Fixed(1), unit="tokens")
