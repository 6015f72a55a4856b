"""history.py: a table with the documented columns, whatever is put in and whenever it arrives."""

from __future__ import annotations

import math

import pytest

from adaptbatch.reporting.history import COLUMNS, History

ROW = {name: {"int64": 3, "float64": 0.5, "bool": True, "str": "hold"}[kind] for name, kind in COLUMNS.items()}


def test_rows_come_back_as_they_went_in():
    history = History()
    rows = [ROW, ROW | {"reason": "grow", "skipped": False, "noise_scale_high": math.inf}]
    for row in rows:
        history.append(row)
    assert [dict(row) for row in history] == rows
    table = history.to_pandas()
    assert {name: str(kind) for name, kind in table.dtypes.items()} == COLUMNS
    assert table.to_dict("records") == rows


def test_what_arrives_late_is_settled_before_it_is_read():
    history = History(settle=lambda: history.amend(0, {"loss": 7.0}))
    history.append(ROW | {"loss": math.nan})
    assert history.to_pandas()["loss"].tolist() == [7.0]
    assert [row["loss"] for row in history] == [7.0]


@pytest.mark.parametrize("row", [{"loss": 1.0}, ROW | {"surplus": 1.0}], ids=["missing", "unknown"])
def test_a_row_with_other_columns_is_refused(row):
    history = History()
    with pytest.raises(ValueError, match=r"row must have exactly the history's columns, differs in \{"):
        history.append(row)
    assert len(history) == 0


def test_an_empty_history_is_a_table_too():
    table = History().to_pandas()
    assert len(table) == 0
    assert {name: str(kind) for name, kind in table.dtypes.items()} == COLUMNS
