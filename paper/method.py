"""The method in figures: bias, coverage, peers, known noise scales, cost."""

from __future__ import annotations

import math

import pandas as pd

from paper.ledger import Ledger, holds, shown, spread

# The design's own constants, as the text has them; a test compares them with the code's.
WEAK = "B / n = 20 (2500 by 4 x 32)"
CONSTANTS = {"z grow": 2.33, "z shrink": 3.0, "max shrink": 0.8}


def estimator(ledger: Ledger) -> None:
    """Bias, coverage, and the peers' estimators."""
    bias = ledger.frame("overhead/bias")
    ledger.add("bias.windows", shown(bias["windows"].iloc[0], ",.0f"), "overhead/bias: windows")
    ledger.add("bias.worst", f"{bias['bias %'].abs().max():.1f}%", "overhead/bias: largest of abs(bias %)")
    worst = shown(bias["bias in SE"].abs().max(), ".1f")
    ledger.add("bias.worst se", worst, "overhead/bias: largest of abs(bias in SE)")
    holds("no bias is beyond two standard errors", bool((bias["bias in SE"].abs() < 2.0).all()))
    coverage = ledger.frame("calibration/coverage")
    signal = coverage["B / n"].map(math.isfinite)
    alone, lost = coverage[signal & (coverage["r"] == 0)], coverage[~signal]
    correlated = coverage[signal & (coverage["r"] != 0)]
    ledger.add("coverage.r", f"{correlated['r'].iloc[0]:g}", "calibration/coverage: finite B / n, r not 0: r")
    ledger.add("coverage.correlated", _range(correlated["coverage"]), "calibration/coverage: r not 0: coverage")
    holds("the interval is short of its coverage where windows are correlated", correlated["coverage"].max() < 0.94)
    ledger.add("coverage.range", _range(alone["coverage"]), "calibration/coverage: finite B / n, r = 0: coverage")
    ledger.add("coverage.runs", shown(alone["runs"].iloc[0], ",.0f"), "calibration/coverage: runs")
    ledger.add("coverage.cases", str(len(alone)), "calibration/coverage: rows with finite B / n, r = 0")
    ledger.add("coverage.lost", _range(lost["unbounded"]), "calibration/coverage: infinite B / n: unbounded")
    error = ledger.frame("calibration/error")
    peers = error[~error["estimator"].str.startswith("adaptbatch")]
    known, said = peers.dropna(subset="further by"), "calibration/error: rows of peers' estimators"
    holds("no peer is closer to the truth by more than two standard errors", bool((known["further by"] >= -2.0).all()))
    ledger.add("peers.comparisons", str(len(known)), f"{said} with further by")
    ledger.add("peers.same", str(int((known["further by"] == 0.0).sum())), f"{said} with further by = 0")
    unbounded = {"estimator": "adaptbatch", "setting": WEAK, "windows": 30}
    ledger.cell("peers.infinite", "calibration/error", "infinite", ".1%", **unbounded)
    open_ = peers[peers["further by"].isna()]
    holds("only the weakest signal is not compared", set(open_["setting"]) == {WEAK} and set(open_["windows"]) == {30})
    clipped = unbounded | {"estimator": "fairscale AdaScale"}
    ledger.cell("peers.clipped", "calibration/error", "rms", ".2f", **clipped)
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
    ledger.cell("loop.ramp rms", table, error, ".2f", rule="CLT", profile=ramp)
    holds("it never turns back on the ramp", ledger.row(table, {"rule": "CLT", "profile": ramp})["reversals"] == 0)
    _loops(ledger, table, error)


def _loops(ledger: Ledger, table: str, error: str) -> None:
    """The rule beside published ones that follow the noise scale."""
    found = ledger.frame(table)
    off, changes = (found.pivot_table(index="rule", columns="profile", values=name) for name in (error, "switches"))
    rows = [[rule, *(f"{off.loc[rule, one]:.2f}, {changes.loc[rule, one]:,.0f}" for one in PROFILES)] for rule in RULES]
    ledger.table("loops", table, ["rule", *PROFILES], rows)
    ramp, step, constant, hard = PROFILES
    others = ["CABS", "noise scale"]
    holds("rules that follow it are as close on the ramp", off.loc[others, ramp].max() < off.loc["CLT", ramp] + 0.02)
    holds("they are closer after a step", off.loc[others, step].max() < off.loc["CLT", step])
    holds("they are closer where nothing changes", off.loc[others, constant].max() < off.loc["CLT", constant])
    holds("the rule changes far less often", changes.loc["CLT", ramp] < 0.15 * changes.loc[others, ramp].min())
    holds("they do not bear catastrophes", off.loc[others, hard].min() > 5 * off.loc["CLT", hard])


# Of the table that compares them.
RULES = ("CLT", "CLT, pooled", "CABS", "noise scale", "DiveBatch", "norm test", "norm test, debiased", "cosine")
PROFILES = ("ramp x32", "step x16", "constant", "ramp x32, catastrophes")


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
        "less": "adaptbatch, one window in four",
        "ddp": "adaptbatch, DDP",
        "ddp less": "adaptbatch, DDP, one window in four",
        "ghost": "adaptbatch, ghost norms",
        "ghost less": "adaptbatch, ghost norms, one window in four",
        "metric": "adaptbatch, Adam's metric",
        "metric less": "adaptbatch, Adam's metric, one window in four",
        "clipping": "adaptbatch, clipping",
        "amp": "adaptbatch, AMP",
        "one less": "adaptbatch, one window in four, one parameter, k = 8",
        "adascale": "fairscale AdaScale",
        "gnts": "torch-gqc GNTS",
        "gns": "torch-gqc GNS",
    }.items():
        ledger.interval(f"cost.{name}", "overhead/cost", "ratio", ".3f", contender=contender)
    measured = {"network": "80 layers", "measured": 1.0}
    for name, part in (("agree", "norms agree"), ("untouched", "untouched")):
        ledger.interval(f"cost.{name}", "overhead/profile", "share", ".2%", part=part, **measured)
    ratios = table.set_index("contender")["ratio"]
    holds("listening less costs less", ratios["adaptbatch, one window in four"] < ratios["adaptbatch"])


def _range(values: pd.Series) -> str:
    return f"{values.min():.1%} to {values.max():.1%}"
