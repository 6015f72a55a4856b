"""Compile the paper, or one page of it to a picture, with typst: no TeX, no network, the same bytes every time."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import typst

from paper import contents
from paper.ledger import Ledger
from studies.engine import provenance
from studies.engine.results import RESULTS

HERE = Path(__file__).parent
ROOT = HERE.parent
OUT = HERE / "build"


def inputs(results: Path = RESULTS) -> dict[str, str]:
    """All that the text is filled with, for typst's ``sys.inputs``."""
    ledger = Ledger(results)
    contents.fill(ledger)
    data = {
        "numbers": {name: number.text for name, number in ledger.numbers.items()},
        "sources": {name: number.source for name, number in ledger.numbers.items()},
        "tables": {name: asdict(table) for name, table in ledger.tables.items()},
        "measured": {study: provenance.caption(study, results) for study in provenance.MEASURED},
    }
    return {"data": json.dumps(data, sort_keys=True)}


def compile_paper(form: str = "pdf", results: Path = RESULTS, **options: float) -> list[bytes]:
    """The paper as PDF (one item), or its pages as PNG.

    Args:
        form: ``"pdf"`` or ``"png"``.
        results: The committed tables.
        **options: Of ``typst.compile``, as ``ppi``.
    """
    made = typst.compile(
        str(HERE / "main.typ"),
        root=str(ROOT),
        format=form,
        ignore_system_fonts=True,
        sys_inputs=inputs(results),
        timestamp=0,
        **options,
    )
    return made if isinstance(made, list) else [made]


def build(out: Path = OUT) -> Path:
    """Write ``adaptbatch.pdf``, and say which of its numbers are of other code; the place of the file."""
    provenance.warn()
    out.mkdir(parents=True, exist_ok=True)
    place = out / "adaptbatch.pdf"
    place.write_bytes(compile_paper()[0])
    return place


def pages(out: Path = OUT, ppi: float = 110.0) -> list[Path]:
    """Write every page as a picture; the places of the files."""
    out.mkdir(parents=True, exist_ok=True)
    # A shorter paper than the last one leaves no page of that.
    for old in out.glob("page-*.png"):
        old.unlink()
    places = []
    for number, picture in enumerate(compile_paper("png", ppi=ppi), start=1):
        places.append(out / f"page-{number:02d}.png")
        places[-1].write_bytes(picture)
    return places
