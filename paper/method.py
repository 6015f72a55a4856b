"""The method in figures: bias, coverage, peers, known noise scales, cost."""

from __future__ import annotations

import math

import pandas as pd

from paper.ledger import Ledger, holds, shown, spread

# The design's own constants, as the text has them; a test compares them with the code's.
CONSTANTS = {"z grow": 2.33, "z shrink": 3.0, "max shrink": 0.8}


def estimator(ledger: Ledger) -> None:
    """Bias, coverage, and the peers' estimators."""
    bias = ledger.frame("overhead/bias")
    ledger.add("bias.windows", shown(bias["windows"].iloc[0], ",.0f"), "overhead/bias: windows")
    ledger.add("bias.worst", f"{bias['bias %'].abs().max():.1f} %", "overhead/bias: largest of abs(bias %)")
    ledger.add("bias.worst se", shown(bias["bias in SE"].abs().max(), ".1f"), "overhead/bias: largest abs(bias in SE)")
    coverage = ledger.frame("calibration/coverage")
    signal = coverage["B / n"].map(math.isfinite)
    alone, lost = coverage[signal & (coverage["r"] == 0)], coverage[~signal]
    ledger.add("coverage.range", _range(alone["coverage"]), "calibration/coverage: finite B / n, r = 0: coverage")
    ledger.add("coverage.runs", shown(alone["runs"].iloc[0], ",.0f"), "calibration/coverage: runs")
    ledger.add("coverage.cases", str(len(alone)), "calibration/coverage: rows with finite B / n, r = 0")
    ledger.add("coverage.lost", _range(lost["unbounded"]), "calibration/coverage: infinite B / n: unbounded")
    error = ledger.frame("calibration/error")
    peers = error[~error["estimator"].str.startswith("adaptbatch")]
    holds("no peer is closer to the truth by more than two standard errors", not (peers["further by"] < -2.0).any())
    ledger.add("peers.comparisons", str(len(peers)), "calibration/error: rows of peers' estimators")
    last = error[error["windows"] == error["windows"].max()]
    settings = list(last["setting"].unique())
    wide = last.pivot_table(index="estimator", columns="setting", values="rms", sort=False, dropna=False)
    rows = [[str(name), *(shown(float(wide.loc[name, one]), ".3f") for one in settings)] for name in wide.index]
    ledger.table("rms", "calibration/error", ["estimator", *settings], rows)
    ledger.add("rms.windows", str(last["windows"].iloc[0]), "calibration/error: largest windows")
    ledger.add("rms.repeats", str(last["repeats"].iloc[0]), "calibration/error: repeats")
    noisy = {"network": "noisy", "arm": "fixed 512"}
    ledger.cell("tail.share", "two-networks/designs", "top 5 % share", ".0%", **noisy)


def decision(ledger: Ledger) -> None:
    """The rule against known noise scales, and its constants."""
    for name, value in CONSTANTS.items():
        ledger.add(f"const.{name}", f"{value:g}", f"the code: {name}")
    hard, ramp = "ramp x32, catastrophes", "ramp x32"
    table, error = "closed-loop/table", "rms log error"
    ledger.cell("loop.pooled rms", table, error, ".2f", rule="CLT, pooled", profile=hard)
    ledger.cell("loop.typical rms", table, error, ".2f", rule="CLT", profile=hard)
    ledger.cell("loop.ramp switches", table, "switches", ".0f", rule="CLT", profile=ramp)
    ledger.cell("loop.ramp reversals", table, "reversals", ".1f", rule="CLT", profile=ramp)
    ledger.cell("loop.ramp rms", table, error, ".2f", rule="CLT", profile=ramp)


def cost(ledger: Ledger) -> None:
    """What a window costs."""
    table = ledger.frame("overhead/cost")
    rows = [
        [
            str(row["contender"]),
            spread(row["ratio"], row["ratio low"], row["ratio high"], ".3f"),
            shown(row["host reads"], ".0f"),
            shown(row["extra bytes"] / 1e6, ",.1f"),
        ]
        for row in table.to_dict("records")
    ]
    ledger.table("cost", "overhead/cost", ["one window", "time (95 %)", "host reads", "MB allocated"], rows)
    for name, contender in {
        "plain": "adaptbatch",
        "ddp": "adaptbatch, DDP",
        "adascale": "fairscale AdaScale",
        "gnts": "torch-gqc GNTS",
        "gns": "torch-gqc GNS",
    }.items():
        ledger.interval(f"cost.{name}", "overhead/cost", "ratio", ".3f", contender=contender)
    ddp = ledger.row("overhead/cost", {"contender": "adaptbatch, DDP"})
    holds("DDP costs more than five percent", ddp["ratio"] > 1.05)


def _range(values: pd.Series) -> str:
    return f"{values.min():.1%} to {values.max():.1%}"
