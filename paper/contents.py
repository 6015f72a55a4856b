"""What the paper says in figures, section by section, from the committed tables. Neither torch nor adaptbatch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd

from paper.ledger import Ledger, LedgerError, shown, spread

# The design's own constants, as the text has them; a test compares them with the code's.
CONSTANTS = {"z grow": 2.33, "z shrink": 3.0, "max shrink": 0.8}


def fill(ledger: Ledger) -> None:
    """All numbers and tables of the paper.

    Raises:
        LedgerError: If a table is missing, or a sentence of the paper does not hold any more.
    """
    for section in SECTIONS:
        section(ledger)


def holds(sentence: str, condition: bool) -> None:
    """Stop the build where the results no longer say what the text does."""
    if not condition:
        raise LedgerError(f"The results do not say that {sentence}; the text must change with them.")


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


HOME = "mnist"


def protocol(ledger: Ledger) -> None:
    """Sizes of the comparison, from its runs."""
    runs = ledger.frame("comparison/runs")
    final, tune = runs[(runs["stage"] == "final") & (runs["data"] == HOME)], runs[runs["stage"] == "tune"]
    for name, column, form in (("examples", "task_examples", ",.0f"), ("micro batch", "task_micro_batch", ".0f")):
        values = final[column].astype(float).unique()
        holds(f"all runs have the same {column}", len(values) == 1)
        ledger.add(f"protocol.{name}", shown(values[0], form), f"comparison/runs: stage = final: {column}")
    trials = tune.groupby(["network", "method"]).size()
    holds("every method has the same trials", len(set(trials)) == 1)
    ledger.add("protocol.trials", str(trials.iloc[0]), "comparison/runs: stage = tune: rows of a method")
    ledger.add("protocol.runs", f"{_all_runs(ledger):,}", "*/runs: different keys")
    ledger.add("protocol.seeds", str(final["seed"].nunique()), "comparison/runs: stage = final: seeds")
    stressed = runs[runs["stage"] == "stress"]
    ledger.add("protocol.stress seeds", str(stressed["seed"].nunique()), "comparison/runs: stage = stress: seeds")


def _all_runs(ledger: Ledger) -> int:
    """Training runs of all studies, shared ones once."""
    places = sorted(path.parent.name for path in ledger.results.glob("*/runs.parquet"))
    return len(set().union(*(ledger.frame(f"{study}/runs")["key"] for study in places)))


def comparison(ledger: Ledger) -> None:
    """Arms at home, and the numbers of the text about them."""
    arms = ledger.frame("comparison/arms")
    home = arms[arms["data"] == HOME]
    wide = {name: part.set_index("arm") for name, part in home.groupby("network", sort=False)}
    rows = []
    for arm in home["arm"].unique():
        row = [str(arm)]
        for network in ("noisy", "calm"):
            own = wide[network].loc[arm] if arm in wide[network].index else None
            row += ["–"] * 3 if own is None else _ended(own)
        rows.append(row)
    head = ["noisy: of best fixed", "diverged", "AUROC", "calm: of best fixed", "diverged", "AUROC"]
    ledger.table("arms", "comparison/arms", ["arm", *head], rows)
    place = "comparison/arms"
    calm, noisy = ({"network": network, "data": HOME} for network in ("calm", "noisy"))
    best = home[home["best fixed"]].set_index("network")["arm"]
    ledger.add("calm.best", best["calm"].split()[1], f"{place}: network = calm, data = {HOME}, best fixed: arm")
    holds("the smallest fixed batch is the best on the calm network", best["calm"] == "fixed 64")
    own = ledger.row(place, {"arm": "adaptive", **calm})
    within = f"{own['of best fixed high'] - 1:.1%}"
    ledger.add("calm.within", within, f"{place}: arm = adaptive, network = calm, data = {HOME}: of best fixed high - 1")
    ledger.interval("calm.adaptive", place, "of best fixed", ".3f", arm="adaptive", **calm)
    for name, arm in (("clip", "clip"), ("rezero", "rezero"), ("scaled", "scaled branches")):
        ledger.interval(f"noisy.{name}", place, "of best fixed", ".2f", arm=arm, **noisy)
    ledger.interval("noisy.adaptive clip", place, "of best fixed", ".2f", arm="adaptive, clip", **noisy)
    ledger.cell("noisy.adaptive diverged", place, "diverged", ".0f", arm="adaptive", **noisy)
    same = wide["noisy"].loc[["adaptive", "fixed 128"], "diverged"]
    holds("adaptive diverges as often as fixed 128", len(set(same)) == 1)
    where = {"claim": "W1", "where": f"calm, {HOME}"}
    ledger.interval("calm.w1", "comparison/claims", "value", ".2f", **where)
    for name in ("fashion", "shuttle"):
        ledger.interval(f"calm.w1 {name}", "comparison/claims", "value", ".2f", claim="W1", where=f"calm, {name}")
    verdicts = ledger.frame("comparison/claims").set_index(["claim", "where"])["verdict"]
    holds("W1 fails on calm Fashion-MNIST", verdicts["W1", "calm, fashion"] == "not supported")
    holds("W1 holds on calm Shuttle", verdicts["W1", "calm, shuttle"] == "supported")
    holds("W2 holds at home on the calm network", verdicts["W2", "calm, home"] == "supported")
    controls = wide["calm"].loc[["adaptive", "constant mean", "replay", "rate follows", "rate follows root"], "final"]
    holds("the controls end where adaptive does, on the calm network", float(controls.max() - controls.min()) < 1e-9)
    for arm in ("adaptive", "fixed 128", "warmup", "clip"):
        ledger.interval(f"together.{arm}", "comparison/together", "of best fixed", ".2f", arm=arm)
    holds("there are six tasks", set(ledger.frame("comparison/together")["tasks"]) == {6})
    holds("W1 fails on the calm network", ledger.row("comparison/claims", where)["verdict"] == "not supported")
    what = "final, adaptive / constant mean, is below 1"
    where = {"claim": "W4", "what": what, "where": f"calm, {HOME}"}
    ledger.interval("calm.w4 constant", "comparison/claims", "value", ".3f", **where)
    _noise_along(ledger)
    _stress(ledger)


def _ended(own: pd.Series) -> list[str]:
    ratio = spread(*(float(own[f"of best fixed{end}"]) for end in ("", " low", " high")), ".2f")
    return [ratio, f"{own['diverged']:.0f} of {own['seeds']:.0f}", shown(own["auroc"], ".3f")]


def _noise_along(ledger: Ledger) -> None:
    """The noise scale that the calm network's adaptive runs measured."""
    runs, curves = ledger.frame("comparison/runs"), ledger.frame("comparison/curves")
    chosen = (runs["stage"] == "final") & (runs["network"] == "calm") & (runs["arm"] == "adaptive")
    keys = runs.loc[chosen & (runs["data"] == HOME), "key"]
    own = curves[curves["key"].isin(keys) & curves["noise_scale"].notna()]
    early = own[own["examples_seen"] <= 0.05 * own["examples_seen"].max()].groupby("key")["noise_scale"].last()
    late = own.groupby("key")["noise_scale"].last()
    said = "comparison/curves: adaptive, calm: median over seeds of the noise_scale"
    ledger.add("calm.B early", shown(early.median(), ".0f"), f"{said} at a twentieth of the examples")
    ledger.add("calm.B late", shown(late.median(), ".0f"), f"{said} at the end")


def _stress(ledger: Ledger) -> None:
    rows = [
        [
            str(row["arm"]),
            spread(row["diverged"], row["diverged low"], row["diverged high"], ".2f"),
            f"{row['runs with spikes']:.0f} of {row['seeds']:.0f}",
            shown(row["spikes"], ".1f"),
            shown(row["mean n"], ",.0f"),
            shown(row["final"], ".1f"),
        ]
        for row in ledger.frame("comparison/stress").to_dict("records")
    ]
    head = ["arm", "diverged (95 %)", "runs with spikes", "spikes a run", "mean batch", "final loss"]
    ledger.table("stress", "comparison/stress", head, rows)
    runs = ledger.frame("comparison/runs")
    own = runs[(runs["stage"] == "stress") & (runs["arm"] == "fixed 64")]
    said = "comparison/runs: stage = stress, arm = fixed 64: sum of diverged"
    ledger.add("stress.small", str(int(own["diverged"].sum())), said)


def depth(ledger: Ledger) -> None:
    """How absolute and relative noise grow with depth, by architecture."""
    place = "depth/growth"
    powers = ledger.frame(place).set_index(["architecture", "updates", "quantity"])
    means = ledger.frame("depth/noise_by_depth").set_index(["architecture", "updates", "depth"])["noise_scale"]
    deepest, shallow = means.index.get_level_values("depth").max(), 10
    last = means.index.get_level_values("updates").max()
    rows = []
    for name in dict.fromkeys(powers.index.get_level_values("architecture")):
        row = [str(name)]
        for quantity in ("noise_trace", "noise_scale"):
            row.append(_power(powers, (name, 0, quantity)))
        row += [shown(float(means.get((name, 0, layers), math.nan)), ",.0f") for layers in (shallow, deepest)]
        row.append(_power(powers, (name, last, "noise_scale")))
        row += [shown(float(means.get((name, last, layers), math.nan)), ",.0f") for layers in (shallow, deepest)]
        rows.append(row)
    start = ["power of tr Σ", "power of B", f"B, {shallow}", f"B, {deepest}"]
    ledger.table("depth", place, ["", *start, "power of B, later", f"B, {shallow}", f"B, {deepest}"], rows)
    ledger.add("depth.updates", shown(float(last), ",.0f"), f"{place}: largest updates")
    for name, architecture, quantity in (
        ("residual trace", "residual", "noise_trace"),
        ("residual scale", "residual", "noise_scale"),
        ("branch scale", "branch-LN", "noise_scale"),
    ):
        where = {"architecture": architecture, "updates": 0, "quantity": quantity}
        ledger.interval(f"depth.{name}", place, "power", ".2f", **where)
    where = {"architecture": "branch-LN", "updates": last, "quantity": "noise_scale"}
    ledger.interval("depth.branch scale later", place, "power", ".2f", **where)
    holds("the relative noise of branch-LN falls with depth later", powers.loc[tuple(where.values()), "high"] < 0)
    start = powers.xs((0, "noise_trace"), level=("updates", "quantity"))
    holds("normalised branches grow by a power of three", bool((start.loc[["pre-LN", "branch-LN"], "power"] > 3).all()))
    verdicts = ledger.frame("depth/claims").set_index(["claim", "where"])["verdict"]
    for name in ("residual", "scaled", "rezero"):
        holds(f"the relative noise of {name} does not grow", verdicts["D2", name] == "not supported")
    holds("that of branch-LN does at first", verdicts["D2", "branch-LN"] == "supported")
    noise = ledger.frame("depth/noise")
    errors = pd.concat(
        (noise[f"estimated_{one}"] - noise[one]) / noise[f"se_{one}"] for one in ("noise_trace", "grad_sq_norm")
    )
    said = "depth/noise: (estimated_x - x) / se_x, x = noise_trace, grad_sq_norm"
    ledger.add("depth.checks", str(len(errors)), f"{said}: count")
    ledger.add("depth.estimates", f"{(errors.abs() < 2).mean():.0%}", f"{said}: share within 2")
    ledger.add("depth.examples", "512", "the code: SCALES of studies/depth.py: examples of the laptop preset")


def _power(powers: pd.DataFrame, key: tuple[object, ...]) -> str:
    if key not in powers.index:
        return "–"
    own = powers.loc[key]
    return spread(own["power"], own["low"], own["high"], ".2f")


def sensitivity(ledger: Ledger) -> None:
    """How wide the range of every knob is."""
    rows = [
        [
            str(row["network"]),
            str(row["knob"]),
            shown(row["values"], ".0f"),
            f"{row['best value']:g}",
            shown(row["share within 10 %"], ".0%"),
            shown(row["worst / best"], ".2f"),
        ]
        for row in ledger.frame("sensitivity/knobs").to_dict("records")
    ]
    head = ["network", "knob", "values", "best", "within 10 %", "worst / best"]
    ledger.table("knobs", "sensitivity/knobs", head, rows)
    for name, network, knob in (
        ("noisy warmup", "noisy", "warmup length"),
        ("noisy theta", "noisy", "theta"),
        ("calm warmup", "calm", "warmup length"),
        ("calm theta", "calm", "theta"),
    ):
        where = {"network": network, "knob": knob}
        ledger.cell(f"knobs.{name} share", "sensitivity/knobs", "share within 10 %", ".0%", **where)
    table = ledger.frame("sensitivity/knobs").set_index(["network", "knob"])["share within 10 %"]
    holds("warmup is the most sensitive on the noisy network", table["noisy"].idxmin() == "warmup length")
    runs = ledger.frame("sensitivity/runs")
    own = runs[(runs["stage"] == "knob") & (runs["network"] == "calm") & (runs["knob"] == "micro-batch")]
    for name, size in (("small", 32.0), ("usual", 64.0)):
        part = own[own["value"] == size]
        said = f"sensitivity/runs: stage = knob, network = calm, knob = micro-batch, value = {size:g}: mean of"
        ledger.add(f"knobs.{name} micro", f"{size:g}", said)
        ledger.add(f"knobs.{name} final", shown(part["final"].mean(), ".1f"), f"{said} final")
        if name == "small":
            ledger.add(f"knobs.{name} batch", shown(part["mean_batch"].mean(), ".0f"), f"{said} mean_batch")
    verdicts = ledger.frame("sensitivity/claims")
    holds("S2 is undecided everywhere", set(verdicts.loc[verdicts["claim"] == "S2", "verdict"]) == {"undecided"})


def frontier(ledger: Ledger) -> None:
    """The fixed batches' hyperbola, and where the methods lie."""
    rows = [
        [
            str(row["network"]),
            str(row["arm"]),
            shown(row["reached"], ".0%"),
            shown(row["updates"], ",.0f"),
            shown(row["examples"], ",.0f"),
            spread(row["q"], row["q low"], row["q high"], ".2f"),
        ]
        for row in ledger.frame("frontier/methods").to_dict("records")
        if row["arm"] in ("adaptive", "adaptive, theta", "adaptive, clip", "warmup", "ramp", "clip", "rezero")
    ]
    head = ["network", "arm", "reached", "updates", "examples", "q (95 %)"]
    ledger.table("frontier", "frontier/methods", head, rows)
    for network in ("noisy", "calm"):
        ledger.interval(f"frontier.{network} S", "frontier/fit", "S_min", ",.0f", network=network)
        ledger.interval(f"frontier.{network} E", "frontier/fit", "E_min", ",.0f", network=network)
        ledger.interval(f"frontier.{network} q", "frontier/methods", "q", ".2f", network=network, arm="adaptive")
        ledger.cell(f"frontier.{network} loss", "frontier/fit", "target", ".1f", network=network)
    for network, arm in (("noisy", "rezero"), ("noisy", "clip"), ("calm", "adaptive, clip")):
        row = ledger.row("frontier/methods", {"network": network, "arm": arm})
        holds(f"{arm} is inside the frontier of the {network} network", row["q high"] < 1)


def origin(ledger: Ledger) -> None:
    """Which choices make the origin's instability appear, and its table."""
    place = "origin/choices"
    table = ledger.frame(place)
    settings = table[["optimizer", "batch", "lr"]].drop_duplicates().to_dict("records")
    rows = []
    for (residual, norm), part in table.groupby(["residual", "norm"], sort=False):
        row = [f"{residual}, {norm}"]
        for one in settings:
            own = part[(part["optimizer"] == one["optimizer"]) & (part["batch"] == one["batch"])]
            own = own[own["lr"] == one["lr"]].iloc[0]
            row.append("diverged" if own["diverged"] else shown(own["final"], ".0f"))
        rows.append(row)
    heads = [f"{one['optimizer']} {one['batch']:.0f}, {one['lr']:g}" for one in settings]
    ledger.table("choices", place, ["skip, normalisation", *heads], rows)
    counts = table.groupby("residual")["diverged"].agg(["sum", "size"])
    holds("only unscaled skips diverge", set(counts.index[counts["sum"] > 0]) == {"identity"})
    said = f"{place}: residual = identity: diverged"
    ledger.add("origin.diverged", f"{counts.loc['identity', 'sum']:.0f}", f"{said}: sum")
    ledger.add("origin.tried", f"{counts.loc['identity', 'size']:.0f}", f"{said}: rows")
    plain = table[(table["residual"] == "none") & (table["batch"] == 256)]["final"]
    ledger.add(
        "origin.plain", _between(plain, ".0f"), f"{place}: residual = none, batch = 256: final, smallest to largest"
    )
    spread = ledger.frame("origin/histograms").groupby(["network", "step"])["spread"].first()
    last = spread.index.get_level_values("step").max()
    for name, network in (("G2", "G2: residual AE"), ("G3", "G3: residual AE, large batch")):
        source = f"origin/histograms: network = {network}: spread at step"
        if name == "G2":
            ledger.add(f"origin.{name} first", shown(spread[network, 1], ".2g"), f"{source} 1")
        ledger.add(f"origin.{name} last", shown(spread[network, last], ".2g"), f"{source} {last}")
    ratio = spread["G3: residual AE, large batch", last] / spread["G2: residual AE", last]
    holds("the large batch's last histogram is as wide as the small one's", 0.9 < ratio < 1.1)
    _t1(ledger)


def _t1(ledger: Ledger) -> None:
    """The origin's table beside its own numbers."""
    place = "origin/T1"
    rows = []
    for row in ledger.frame(place).to_dict("records"):
        measured = [shown(row[name], ".1f") for name in ("train loss", "valid loss")]
        measured += [shown(row.get(f"AUROC, class {digit}", math.nan), ".2f") for digit in ("0.0", "1.0")]
        reported = [shown(row.get(f"origin's {name}", math.nan), form) for name, form in REPORTED]
        batch, spikes = shown(row["mean n"], ",.0f"), shown(row["spikes"], ",.0f")
        rows.append([str(row["row"]), shown(row["classes"], ".0f"), *measured, spikes, batch, *reported])
    head = ["", "classes", "train", "valid", "AUROC, 0", "AUROC, 1", "spikes", "mean batch"]
    ledger.table("t1", place, [*head, "report: train", "valid", "AUROC"], rows)
    for name, column, form in (("train", "train loss", ".1f"), ("auroc 0", "AUROC, class 0.0", ".2f")):
        ledger.cell(f"t1.plain {name}", place, column, form, row="VAE, 256")
    ledger.cell("t1.plain auroc 1", place, "AUROC, class 1.0", ".2f", row="VAE, 256")
    ledger.cell("t1.report plain", place, "origin's train loss", ".1f", row="VAE, 256")


# Of the report's table.
REPORTED = (("train loss", ".1f"), ("valid loss", ".1f"), ("auroc", ".2f"))


def _between(values: pd.Series, form: str) -> str:
    return " to ".join(dict.fromkeys(shown(value, form) for value in (values.min(), values.max())))


def favourable(ledger: Ledger) -> None:
    """The setting that theory favours."""
    place = "favourable/costs"
    table = ledger.frame(place)
    rows = [
        [
            str(row["arm"]),
            shown(row["reached"], ".0%"),
            shown(row["cost"] / 1e3, ",.0f"),
            spread(row["of best fixed"], row["of best fixed low"], row["of best fixed high"], ".2f"),
            shown(row["mean n"], ",.0f"),
        ]
        for row in table.to_dict("records")
    ]
    head = ["arm", "reached", "cost (thousands)", "of the best fixed (95 %)", "mean batch"]
    ledger.table("favourable", place, head, rows)
    attainable = float(table["attainable"].iloc[0])
    ledger.add("favourable.attainable", f"{1 - attainable:.1%}", f"{place}: 1 - attainable")
    for name, arm in (("pareto", "pareto"), ("pareto sqrt", "pareto, sqrt rate"), ("adaptive", "adaptive")):
        ledger.interval(f"favourable.{name}", place, "of best fixed", ".2f", arm=arm)
    best = table.loc[table["best fixed"], "arm"].iloc[0]
    ledger.add("favourable.best", best.split()[1], f"{place}: best fixed = True: arm")
    ledger.cell("favourable.best final", place, "final", ".1f", arm=best)
    ledger.cell("favourable.pareto final", place, "final", ".1f", arm="pareto")
    verdicts = ledger.frame("favourable/claims").set_index(["claim", "what"])["verdict"]
    said = "cost to target, {} / best fixed, is below 1"
    holds("whether Pareto is cheaper is undecided", verdicts["F2", said.format("pareto")] == "undecided")
    coupled = verdicts["F2", said.format("pareto, sqrt rate")]
    holds("the coupled one is not cheaper", coupled == "not supported")


# Studies whose claims were written down before their runs.
CLAIMED = ("comparison", "sensitivity", "depth", "frontier", "favourable")


def claims(ledger: Ledger) -> None:
    """The claims of all studies in one table."""
    rows = []
    for study in CLAIMED:
        for row in ledger.frame(f"{study}/claims").to_dict("records"):
            bounds = (float(row.get(end, math.nan)) for end in ("value", "low", "high"))
            where = str(row.get("where", "noisy"))
            rows.append([str(row["claim"]), str(row["what"]), where, spread(*bounds, ".2f"), str(row["verdict"])])
    ledger.table("claims", "*/claims", ["", "claim", "where", "value (95 %)", "verdict"], rows)


def _range(values: pd.Series) -> str:
    return f"{values.min():.1%} to {values.max():.1%}"


SECTIONS: tuple[Callable[[Ledger], None], ...] = (
    estimator,
    decision,
    cost,
    protocol,
    comparison,
    origin,
    depth,
    favourable,
    sensitivity,
    frontier,
    claims,
)
