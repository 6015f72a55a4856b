"""``python -m paper``: build the paper, look at its pages, ask where a number comes from."""

from __future__ import annotations

from pathlib import Path

import tyro

from paper import contents
from paper.ledger import Ledger

app = tyro.extras.SubcommandApp()


@app.command
def build(out: Path = Path(__file__).parent / "build") -> None:
    """Write adaptbatch.pdf from the committed results."""
    from paper import build as builder

    print(builder.build(out))


@app.command
def pages(out: Path = Path(__file__).parent / "build", ppi: float = 110.0) -> None:
    """Write every page as a PNG, to look at."""
    from paper import build as builder

    for place in builder.pages(out, ppi):
        print(place)


@app.command
def reference(out: Path = Path(__file__).parent / "build") -> None:
    """Write the API reference as HTML, from the docstrings."""
    from paper.reference import build as build_reference

    print(build_reference(out / "reference"))


@app.command
def numbers() -> None:
    """Every number of the text, with the row and the column of the table that it was read from."""
    ledger = Ledger()
    contents.fill(ledger)
    for name, number in sorted(ledger.numbers.items()):
        print(f"{name:<44} {number.text:<28} {number.source}")


if __name__ == "__main__":
    app.cli(prog="python -m paper", description=__doc__)
