"""A run's rows, wherever they are."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd


def table_of(run: Any) -> pd.DataFrame | None:
    """The rows of a history, a DataFrame, or the place of a Parquet or CSV file; None of anything else.

    Example:
        >>> from adaptbatch import History
        >>> len(table_of(History())), table_of(3)
        (0, None)
    """
    if isinstance(run, pd.DataFrame):
        return run
    if isinstance(run, str | PathLike):
        place = Path(run)
        return pd.read_csv(place) if place.suffix == ".csv" else pd.read_parquet(place)
    if hasattr(run, "to_pandas"):
        table: pd.DataFrame = run.to_pandas()
        return table
    return None
