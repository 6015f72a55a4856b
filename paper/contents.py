"""What the paper says in figures, section by section, from the committed tables. Neither torch nor adaptbatch."""

from __future__ import annotations

import math
from collections.abc import Callable

from paper import comparison, findings, method
from paper.ledger import Ledger, spread

# Studies whose claims were written down before their runs.
CLAIMED = ("comparison", "sensitivity", "depth", "frontier", "favourable")


def fill(ledger: Ledger) -> None:
    """All numbers and tables of the paper.

    Raises:
        LedgerError: If a table is missing, or a sentence of the paper does not hold any more.
    """
    for section in SECTIONS:
        section(ledger)


def claims(ledger: Ledger) -> None:
    """The claims of all studies in one table."""
    rows = []
    for study in CLAIMED:
        for row in ledger.frame(f"{study}/claims").to_dict("records"):
            bounds = (float(row.get(end, math.nan)) for end in ("value", "low", "high"))
            where = str(row.get("where", "noisy"))
            rows.append([str(row["claim"]), str(row["what"]), where, spread(*bounds, ".2f"), str(row["verdict"])])
    ledger.table("claims", "*/claims", ["", "claim", "where", "value (95 %)", "verdict"], rows)


SECTIONS: tuple[Callable[[Ledger], None], ...] = (
    method.estimator,
    method.decision,
    method.cost,
    comparison.protocol,
    comparison.arms,
    findings.origin,
    findings.depth,
    findings.sensitivity,
    findings.frontier,
    findings.favourable,
    claims,
)
