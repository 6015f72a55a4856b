"""What the paper says in figures, section by section, from the committed tables. Neither torch nor adaptbatch."""

from __future__ import annotations

import math
from collections.abc import Callable

from paper import acting, comparison, findings, method
from paper.ledger import Ledger, spread
from studies.output.verdicts import VERDICTS, counted

# Studies whose claims were written down before their runs.
CLAIMED = (
    "live",
    "transformer",
    "bursts",
    "planning",
    "comparison",
    "sensitivity",
    "momentum",
    "depth",
    "frontier",
    "favourable",
)


def fill(ledger: Ledger) -> None:
    """All numbers and tables of the paper.

    Raises:
        LedgerError: If a table is missing, or a sentence of the paper does not hold any more.
    """
    for section in SECTIONS:
        section(ledger)


def claims(ledger: Ledger) -> None:
    """The claims of all studies: how often each holds, and every place with its interval."""
    rows, places = [], []
    for study in CLAIMED:
        table = ledger.frame(f"{study}/claims")
        rows += [list(row.values()) for row in counted(table)]
        for row in table.to_dict("records"):
            bounds = (float(row.get(end, math.nan)) for end in ("value", "low", "high"))
            own = [str(row["claim"]), str(row["what"]), str(row.get("where", "noisy"))]
            places.append([*own, spread(*bounds, ".2f"), str(row["interval"]), str(row["verdict"])])
    ledger.table("claims", "*/claims", ["", "claim", *VERDICTS, "values"], rows)
    ledger.table("places", "*/claims", ["", "claim", "where", "value (bounds)", "of", "verdict"], places)


SECTIONS: tuple[Callable[[Ledger], None], ...] = (
    method.estimator,
    method.decision,
    method.cost,
    acting.live,
    acting.transformer,
    acting.opening,
    acting.bursts,
    acting.planning,
    comparison.protocol,
    comparison.arms,
    findings.origin,
    findings.depth,
    findings.sensitivity,
    findings.momentum,
    findings.frontier,
    findings.favourable,
    claims,
)
