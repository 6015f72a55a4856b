"""The smaller studies in figures: origin, depth, sensitivity, frontier, the setting that theory favours."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from paper.ledger import Ledger, holds, shown, spread


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
    fall = powers.loc[("residual", last, "noise_scale")]
    holds("later the residual network's power is not known", fall["low"] < 0 < fall["high"])
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
    ledger.add("depth.examples", "512", "the code: SCALES of studies/questions/depth.py: examples of the laptop preset")


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
    s1 = verdicts.loc[verdicts["claim"] == "S1", "verdict"]
    holds("S1 is undecided everywhere", set(s1) == {"undecided"})
    inert = runs[(runs["stage"] == "knob") & (runs["network"] == "noisy") & (runs["knob"] == "theta")]
    alike = inert[inert["value"] >= 0.5].groupby("value")["final"].mean()
    said = "sensitivity/runs: knob = theta, network = noisy: values of at least 0.5"
    ledger.add("knobs.inert", str(len(alike)), said)
    holds("theta of a half and above is the same run on the noisy network", bool(np.ptp(alike) < 1e-9))
    holds("S2 is undecided everywhere", set(verdicts.loc[verdicts["claim"] == "S2", "verdict"]) == {"undecided"})


def frontier(ledger: Ledger) -> None:
    """The fixed batches' updates to an early target, the hyperbola, and where the methods lie."""
    methods = ledger.frame("frontier/methods")
    named = ("adaptive", "adaptive, theta", "adaptive, clip", "warmup", "ramp", "clip", "rezero")
    rows = [
        [
            str(row["network"]),
            str(row["arm"]),
            shown(row["reached"], ".0%"),
            shown(row["updates"], ",.0f"),
            shown(row["examples"], ",.0f"),
            spread(row["q"], row["q low"], row["q high"], ".2f"),
        ]
        for row in methods.to_dict("records")
        if row["arm"] in named or (row["arm"].startswith("fixed ") and row["arm"] != "fixed 4096")
    ]
    head = ["network", "arm", "reached", "updates", "examples", "q (95 %)"]
    ledger.table("frontier", "frontier/methods", head, rows)
    for network in ("noisy", "calm"):
        ledger.interval(f"frontier.{network} q", "frontier/methods", "q", ".2f", network=network, arm="adaptive")
        ledger.cell(f"frontier.{network} loss", "frontier/fit", "target", ".1f", network=network)
        own = methods[(methods["network"] == network) & methods["arm"].str.startswith("fixed ")]
        own = own[own["arm"] != "fixed 4096"].set_index("arm")
        said = f"frontier/methods: network = {network}, fixed 64 to 1024: updates, smallest to largest"
        ledger.add(f"frontier.{network} updates", _between(own["updates"], ".0f"), said)
        holds(f"updates hardly depend on the batch ({network})", own["updates"].max() < 2 * own["updates"].min())
        off = ((own["q low"] > 1) | (own["q high"] < 1)).sum()
        holds(f"most fixed batches are off their own hyperbola ({network})", off >= 3)
        for arm in ("ramp", "rezero", *(("clip",) if network == "noisy" else ())):
            inside = ledger.row("frontier/methods", {"network": network, "arm": arm})["q high"] < 1
            holds(f"{arm} is inside the frontier of the {network} network", inside)
    verdicts = ledger.frame("frontier/claims")["verdict"]
    holds("F1 is not supported", set(verdicts) == {"not supported"})


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
    broken = table[table["diverged"]]
    for name, kind in (("overflow", broken["best"].isna()), ("later", broken["best"].notna())):
        where = "no" if name == "overflow" else "a"
        said = f"{place}: diverged rows with {where} finite loss on the probe set"
        ledger.add(f"origin.{name}", str(int(kind.sum())), said)
    mild = table[(table["residual"] == "identity") & (table["norm"] == "branch") & (table["optimizer"] == "adam")]
    mild = mild.set_index("batch")["diverged"]
    holds("branch-normalised skips under Adam diverge at 256 only", bool(mild[256.0].any() and not mild[4096.0]))
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
    residual = {"row": "residual VAE, 4000"}
    for name, column, form in (
        ("train", "train loss", ".1f"),
        ("auroc", "AUROC", ".2f"),
        ("report train", "origin's train loss", ".1f"),
        ("report auroc", "origin's auroc", ".2f"),
    ):
        ledger.cell(f"t1.residual {name}", place, column, form, **residual)
    for name, row in (
        ("adaptive", "residual VAE, adaptive"),
        ("small", "residual VAE, 256"),
        ("scaled", "scaled residual VAE, 256"),
    ):
        for what, column, form in (
            ("train", "train loss", ".1f"),
            ("auroc", "AUROC", ".2f"),
            ("spikes", "spikes", ".0f"),
        ):
            ledger.cell(f"t1.{name} {what}", place, column, form, row=row)
    ledger.cell("t1.adaptive batch", place, "mean n", ".0f", row="residual VAE, adaptive")
    table = ledger.frame(place).set_index("row")
    holds("scaled branches end lowest, without a spike", table["train loss"].idxmin() == "scaled residual VAE, 256")
    both = table.loc[["residual VAE, adaptive", "residual VAE, 256"]]
    holds("both small batches end below 4000", both["train loss"].max() < table.loc["residual VAE, 4000", "train loss"])
    holds("nothing diverges in the table", not table["diverged"].any())
    plain, ours = ledger.row(place, {"row": "VAE, 256"}), ledger.row(place, residual)
    better = ours["train loss"] < plain["train loss"] and ours["AUROC"] > plain["AUROC"]
    holds("the residual network at 4000 is better than the plain one, as in the report", better)


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
    model = {end: 1.0 - float(table[f"attainable{end}"].iloc[0]) for end in ("", " low", " high")}
    said = f"{place}: 1 - attainable: mean over seeds, smallest to largest"
    text = f"{model['']:.1%} ({model[' high']:.1%} to {model[' low']:.1%})"
    ledger.add("favourable.attainable", text, said)
    holds("the model leaves about a percent", 0.005 < model[" high"] < model[" low"] < 0.015)
    for name, arm in (("pareto", "pareto"), ("pareto sqrt", "pareto, sqrt rate"), ("adaptive", "adaptive")):
        ledger.interval(f"favourable.{name}", place, "of best fixed", ".2f", arm=arm)
    best = table.loc[table["best fixed"], "arm"].iloc[0]
    ledger.add("favourable.best", best.split()[1], f"{place}: best fixed = True: arm")
    spent = ledger.row(place, {"arm": "pareto, sqrt rate"})
    seeds = int(spent["seeds"])
    missed = f"{seeds - round(seeds * spent['reached'])} of {seeds}"
    ledger.add("favourable.missed", missed, f"{place}: arm = pareto, sqrt rate: seeds that did not reach the target")
    ledger.cell("favourable.best final", place, "final", ".1f", arm=best)
    ledger.cell("favourable.pareto final", place, "final", ".1f", arm="pareto")
    verdicts = ledger.frame("favourable/claims").set_index(["claim", "what"])["verdict"]
    said = "cost to target, {} / best fixed, is below 1"
    holds("whether Pareto is cheaper is undecided", verdicts["F2", said.format("pareto")] == "undecided")
    coupled = verdicts["F2", said.format("pareto, sqrt rate")]
    holds("the coupled one is not cheaper", coupled == "not supported")


def momentum(ledger: Ledger) -> None:
    """Seven optimizers at a small and a large batch."""
    place = "momentum/optimizers"
    table, effects = ledger.frame(place), ledger.frame("momentum/effects").set_index("optimizer")
    small, large = sorted(table["batch"].unique())
    wide = table.set_index(["optimizer", "batch"])
    tried = ledger.frame("momentum/runs")
    trials = int(tried[tried["stage"] == "tune"].groupby(["method", "batch"]).size().iloc[0])
    rows = []
    for name in effects.index:
        row = [str(name), "yes" if effects.loc[name, "momentum"] else "no"]
        for batch in (small, large):
            own = wide.loc[(name, batch)]
            diverged = f" ({own['diverged']:.0f} of {own['seeds']:.0f})" if own["diverged"] else ""
            row += [f"{own['lr']:.1e}", f"{own['rates that work']:.0f}", shown(own["final"], ".1f") + diverged]
        rows.append([*row, spread(*(effects.loc[name, end] for end in ("ratio", "low", "high")), ".2f")])
    head = [f"{batch:.0f}: rate" if first else text for batch in (small, large) for first, text in HEADS]
    ledger.table("momentum", place, ["", "momentum", *head, f"{large:.0f} / {small:.0f}"], rows)
    ledger.add("momentum.trials", str(trials), "momentum/runs: stage = tune: rows of an optimizer and a batch")
    ledger.add("momentum.works", f"{WORKS:g}", "the code: WORKS of studies/questions/momentum.py")
    ledger.add("momentum.small", f"{small:.0f}", f"{place}: smallest batch")
    ledger.add("momentum.large", f"{large:.0f}", f"{place}: largest batch")
    works = table.pivot_table(index="optimizer", columns="batch", values="rates that work")
    holds("fewer rates work at the large batch", bool((works[large] <= works[small]).all()))
    trained = effects.drop("radam")
    text = " to ".join(shown(end, ".2f") for end in (trained["ratio"].min(), trained["ratio"].max()))
    said = "momentum/effects: ratio without RAdam's, smallest to largest"
    ledger.add("momentum.range", text, said)
    open_ = int(((trained["low"] < 1) & (trained["high"] > 1)).sum())
    ledger.add(
        "momentum.open", f"{open_} of {len(trained)}", "momentum/effects: intervals without RAdam's that hold one"
    )
    holds("the large batch costs every optimizer but RAdam loss", bool((trained["ratio"] > 1.1).all()))
    holds("RAdam diverges at the small batch", wide.loc[("radam", small), "diverged"] > 0)
    largest = tried[tried["stage"] == "tune"].groupby("method")["lr"].max()
    edge = [name for name in effects.index if wide.loc[(name, large), "lr"] == largest[name]]
    ledger.add(
        "momentum.edge", str(len(edge)), f"{place}: optimizers whose best rate at {large:.0f} is the largest tried"
    )
    holds("the edge concerns those without a bias correction", not {"adam", "adam without beta1"} & set(edge))
    claims = ledger.frame("momentum/claims")
    verdicts = [claims.loc[claims["claim"] == claim, "verdict"].tolist() for claim in ("M1", "M2")]
    holds("M1 is undecided, and M2 but for Adam", verdicts == [["undecided"] * 2, ["undecided", "supported"]])
    seeds = claims.loc[claims["claim"] == "M2", "seeds"].unique()
    ledger.add("momentum.limits seeds", f"{seeds.max():.0f}", "momentum/claims: claim = M2: seeds")
    what = f"largest rate that works at {small:.0f} / at {large:.0f}: adam / adam without beta1, is below 1"
    ledger.interval("momentum.limits", "momentum/claims", "value", ".2f", claim="M2", what=what)
    limits = ledger.frame("momentum/limits").pivot_table(index=["method", "seed"], columns="batch", values="largest")
    holds(
        "Adam keeps its rates at the large batch",
        bool(np.allclose(limits.loc["adam"][large], limits.loc["adam"][small])),
    )
    bare = limits.loc["adam without beta1"].dropna()
    holds("without momentum it loses the largest", bool((bare[large] < bare[small]).all()))
    for name, pair in (("descent", "momentum / sgd"), ("adam", "adam / adam without beta1")):
        what = f"loss at {large:.0f} / loss at {small:.0f}: {pair}, is below 1"
        ledger.interval(f"momentum.{name}", "momentum/claims", "value", ".2f", claim="M1", what=what)


# How far from the best loss a rate works; a test compares it with the study's own.
WORKS = 1.5
HEADS = ((True, ""), (False, "work"), (False, "final loss"))
