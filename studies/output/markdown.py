"""Tables in Markdown, from tables of results. Neither torch nor adaptbatch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pandas as pd


def markdown(rows: list[dict[str, str]]) -> str:
    """A Markdown table, first column to the left, the others to the right."""
    names = list(rows[0])
    cells = [[row[name].replace("|", r"\|") for name in names] for row in rows]
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# What stands under a heading: a format of the row's columns, or a function of the row.
Cell = str | Callable[[pd.Series], str]


def table(frame: pd.DataFrame, cells: Mapping[str, Cell]) -> str:
    """A Markdown table of a frame's rows, by heading.

    Example:
        >>> print(table(pd.DataFrame({"mean n": [1024.0]}), {"mean batch": "{mean n:,.0f}"}))
        | mean batch |
        | --- |
        | 1,024 |
    """
    return markdown(
        [
            {heading: cell.format_map(row) if isinstance(cell, str) else cell(row) for heading, cell in cells.items()}
            for _, row in frame.iterrows()
        ]
    )


def interval(name: str, form: str = ".3f") -> str:
    """The format of a column with its bounds."""
    return f"{{{name}:{form}}} ({{{name} low:{form}}} to {{{name} high:{form}}})"


def known(name: str, form: str = ",.0f") -> Callable[[pd.Series], str]:
    """A column of numbers that may not be there."""
    return lambda row: number(row[name], form)


def number(value: float, form: str = ",.0f") -> str:
    """A dash where it is not finite."""
    return f"{value:{form}}" if math.isfinite(value) else "-"


def spread(values: pd.Series) -> str:
    """The smallest and the largest share."""
    return f"{values.min():.1%} to {values.max():.1%}"
