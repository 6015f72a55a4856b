"""Results on disk: written whole or not at all, read by name. Neither torch nor adaptbatch."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).parents[1] / "results"
LABELS = ("study", "preset", "stage", "network", "data", "arm", "method", "trial", "knob", "value", "seed", "key")


class ResultsError(RuntimeError):
    """A file of results cannot be read."""


def load(name: str, *, curves: bool = False, folder: Path = RESULTS) -> pd.DataFrame:
    """A study's results as one tidy table.

    Args:
        name: Of the study.
        curves: The evaluations along every run, with the run's labels, in place of a row for each run.
        folder: Where studies have written; the committed results if not given.

    Raises:
        FileNotFoundError: If there are none of that name.
        ResultsError: If a file cannot be read.
    """
    if not (folder / name / "runs.parquet").is_file():
        there = sorted(path.parent.name for path in folder.glob("*/runs.parquet"))
        raise FileNotFoundError(f"name must be a study with results in {folder}, got name = {name!r}; there: {there}.")
    runs = read_table(folder / name / "runs.parquet")
    if not curves:
        return runs
    labels = runs[[column for column in LABELS if column in runs]]
    return labels.merge(read_table(folder / name / "curves.parquet"), on="key")


def read_table(path: Path) -> pd.DataFrame:
    """A table of results.

    Raises:
        ResultsError: If the file is not a whole Parquet file.
    """
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ResultsError(
            f"{path} is not a whole Parquet file ({error}); delete it, and what was in it will be run again."
        ) from error


def write_atomically(table: pd.DataFrame, path: Path) -> None:
    """Write a Parquet file beside its place, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: two processes may write the same table, and one of them may be killed.
    unfinished = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.unfinished")
    try:
        with unfinished.open("wb") as file:
            table.to_parquet(file, index=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def as_json(identity: object) -> object:
    """``identity`` as it comes back from a file."""
    return json.loads(json.dumps(identity))
