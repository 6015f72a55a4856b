"""Numbers that know where they come from. Neither torch nor adaptbatch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from studies.engine.results import RESULTS, read_table

NEVER = "∞"


class LedgerError(LookupError):
    """A number of the paper has no place in the results, or more than one."""


def holds(sentence: str, condition: bool) -> None:
    """Stop the build where the results no longer say what the text does."""
    if not condition:
        raise LedgerError(f"The results do not say that {sentence}; the text must change with them.")


@dataclass(frozen=True)
class Number:
    """What stands in the text, and where it was read.

    Attributes:
        text: As printed.
        source: For the reader: table, row, column, or how it was computed from them.
        cell: Table, conditions on the row, column; None for what is computed.
    """

    text: str
    source: str
    cell: tuple[str, Mapping[str, object], str] | None = None


@dataclass(frozen=True)
class Table:
    """A table of the paper: texts, the first column to the left, and the file it was made from."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    source: str


def shown(value: float, form: str) -> str:
    """A value as the paper prints it; what is NaN is not known.

    Example:
        >>> [shown(value, ".2f") for value in (1.0149, -0.5, -0.001, float("inf"), float("nan"))]
        ['1.01', '−0.50', '0.00', '∞', '–']
    """
    if math.isnan(value):
        return "–"
    if not math.isfinite(value):
        return NEVER
    text = f"{value:{form}}"
    # What rounds to zero has no sign.
    return (text.lstrip("-") if not any(digit in text for digit in "123456789") else text).replace("-", "−")


def spread(value: float, low: float, high: float, form: str) -> str:
    """A value with its interval.

    Example:
        >>> never = float("inf")
        >>> spread(1.014, 1.011, 1.018, ".2f"), spread(1.4, 0.5, never, ".1f"), spread(never, never, never, ".1f")
        ('1.01 (1.01 to 1.02)', '1.4 (0.5 to ∞)', 'never')
    """
    if low == math.inf:
        return "never"
    return f"{shown(value, form)} ({shown(low, form)} to {shown(high, form)})"


@dataclass
class Ledger:
    """Reads the committed tables and keeps account of every number that is taken from them."""

    results: Path = RESULTS
    numbers: dict[str, Number] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)

    def frame(self, place: str) -> pd.DataFrame:
        """The table at ``study/name``.

        Raises:
            LedgerError: If it is not there.
        """
        path = self.results / f"{place}.parquet"
        if not path.is_file():
            study = place.split("/")[0]
            raise LedgerError(f"{path} is missing: run `python -m studies run {study}`, or `report {study}`, first.")
        return read_table(path)

    def rows(self, place: str, where: Mapping[str, object]) -> pd.DataFrame:
        """The rows of a table where every column has the given value.

        Raises:
            LedgerError: If a column is missing.
        """
        frame = self.frame(place)
        for column, value in where.items():
            if column not in frame:
                raise LedgerError(f"{place} must have the column {column!r}; it has {list(frame.columns)}.")
            frame = frame[frame[column] == value]
        return frame

    def row(self, place: str, where: Mapping[str, object]) -> pd.Series:
        """The one row of a table where every column has the given value.

        Raises:
            LedgerError: If there is none, or more than one.
        """
        frame = self.rows(place, where)
        if len(frame) != 1:
            raise LedgerError(f"{place} must have one row where {dict(where)}, it has {len(frame)}.")
        return frame.iloc[0]

    def add(self, name: str, text: str, source: str, cell: tuple[str, Mapping[str, object], str] | None = None) -> None:
        """A number that was computed from a table; ``source`` says how.

        Raises:
            LedgerError: If the name is taken.
        """
        if name in self.numbers:
            raise LedgerError(f"name must be new, got {name!r} again.")
        self.numbers[name] = Number(text, source, cell)

    def cell(self, name: str, place: str, column: str, form: str, **where: object) -> None:
        """One cell."""
        value = self.row(place, where)[column]
        text = value if isinstance(value, str) else shown(float(value), form)
        self.add(name, text, _said(place, column, where), (place, where, column))

    def interval(self, name: str, place: str, column: str, form: str, **where: object) -> None:
        """One cell with the bounds beside it: the columns ``column low`` and ``column high``, or ``low``, ``high``."""
        row = self.row(place, where)
        low, high = (f"{column} {end}" if f"{column} {end}" in row else end for end in ("low", "high"))
        text = spread(*(float(row[at]) for at in (column, low, high)), form)
        self.add(name, text, _said(place, column, where), (place, where, column))

    def table(self, name: str, place: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table made from the file at ``place``."""
        self.tables[name] = Table(columns, rows, place)


def _said(place: str, column: str, where: Mapping[str, object]) -> str:
    return f"{place}: {', '.join(f'{key} = {value}' for key, value in where.items())}: {column}"
