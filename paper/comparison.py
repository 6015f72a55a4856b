"""The main study in figures."""

from __future__ import annotations

import pandas as pd
from scipy import stats

from paper.ledger import Ledger, holds, shown, spread
from studies.output.verdicts import SWEEP

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


def arms(ledger: Ledger) -> None:
    """Arms at home, and the numbers of the text about them."""
    table = ledger.frame("comparison/arms")
    home = table[table["data"] == HOME]
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
    _same_runs(ledger)
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
    for arm in ("adaptive", "fixed 128", "fixed 64", "warmup", "clip"):
        ledger.interval(f"together.{arm}", "comparison/together", "of best fixed", ".2f", arm=arm)
    holds("there are six tasks", set(ledger.frame("comparison/together")["tasks"]) == {6})
    holds("W1 fails on the calm network", ledger.row("comparison/claims", where)["verdict"] == "not supported")
    what = "final, adaptive / constant mean, is below 1"
    where = {"claim": "W4", "what": what, "where": f"calm, {HOME}"}
    ledger.interval("calm.w4 constant", "comparison/claims", "value", ".3f", **where)
    diverged = table[table["arm"] == "adaptive"]
    ledger.add(
        "together.diverged",
        f"{diverged['diverged'].sum():.0f} of {diverged['seeds'].sum():.0f}",
        f"{place}: arm = adaptive: sum of diverged, of seeds",
    )
    _noise_along(ledger)
    _stress(ledger)
    _budget(ledger)
    _auroc(ledger)


def _ended(own: pd.Series) -> list[str]:
    ratio = spread(*(float(own[f"of best fixed{end}"]) for end in ("", " low", " high")), ".2f")
    return [ratio, f"{own['diverged']:.0f} of {own['seeds']:.0f}", shown(own["auroc"], ".3f")]


def _same_runs(ledger: Ledger) -> None:
    """Where the controller acted, and where its runs are those of the fixed batch of its floor."""
    runs = ledger.frame("comparison/runs")
    runs = runs[runs["stage"].isin(["final", "away"])].set_index(["network", "data", "arm", "seed"]).sort_index()
    ours, floor = (runs.xs(arm, level="arm") for arm in ("adaptive", "fixed 128"))
    for data in (HOME, "fashion"):
        one, other = ours.loc["calm", data]["final"], floor.loc["calm", data]["final"]
        holds(f"adaptive's runs are fixed 128's on calm {data}", bool((one == other).all()))
    diverged = [set(part.index[part["diverged"]]) for part in (ours.loc["noisy", HOME], floor.loc["noisy", HOME])]
    holds("adaptive and fixed 128 diverge on the same seeds", diverged[0] == diverged[1])
    acted = ours.loc["calm", "shuttle"]["mean_batch"]
    said = "comparison/runs: arm = adaptive, network = calm, data = shuttle: mean_batch, smallest to largest"
    ledger.add("calm.shuttle batch", f"{acted.min():.0f} to {acted.max():.0f}", said)
    held = ours.sort_index().drop(("calm", "shuttle"))["mean_batch"]
    holds("elsewhere it stays near its floor", bool((held < 145).all()))


def _noise_along(ledger: Ledger) -> None:
    """The noise scale of an ordinary window, on which the calm network's adaptive runs decided."""
    runs, curves = ledger.frame("comparison/runs"), ledger.frame("comparison/curves")
    chosen = (runs["stage"] == "final") & (runs["network"] == "calm") & (runs["arm"] == "adaptive")
    keys = runs.loc[chosen & (runs["data"] == HOME), "key"]
    own = curves[curves["key"].isin(keys) & curves["noise_scale_typical"].notna()]
    early = own[own["examples_seen"] <= 0.05 * own["examples_seen"].max()].groupby("key")["noise_scale_typical"].last()
    late = own.groupby("key")["noise_scale_typical"].last()
    said = "comparison/curves: adaptive, calm: median over seeds of the noise_scale_typical"
    ledger.add("calm.B early", shown(early.median(), ".0f"), f"{said} at a twentieth of the examples")
    ledger.add("calm.B late", shown(late.median(), ".0f"), f"{said} at the end")
    holds("the noise scale is below the smallest window", max(early.median(), late.median()) < 128)


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
    table = ledger.frame("comparison/stress").set_index("arm")
    larger = [arm for arm in table.index if arm in ("adaptive", "fixed 128", "fixed 256", "fixed 512", "fixed 1024")]
    others = [arm for arm in table.index if arm in ("warmup", "clip", "rezero", "scaled branches")]
    holds("nothing diverges at the larger batches", len(larger) == 5 and not table.loc[larger, "diverged"].any())
    holds("nothing diverges with the other cures", len(others) == 4 and not table.loc[others, "diverged"].any())
    holds("all of RAdam's runs diverge", table.loc["radam", "diverged"] == 1.0)
    for name, arm in (("small", "fixed 64"), ("adaptive", "adaptive")):
        ledger.cell(f"stress.{name} spikes", "comparison/stress", "spikes", ".1f", arm=arm)
    claim = ledger.frame("comparison/claims").set_index("claim").loc["W3"]
    holds("W3 is undecided", claim["verdict"] == "undecided")
    ledger.interval("stress.w3", "comparison/claims", "value", ".2f", claim="W3")


def _budget(ledger: Ledger) -> None:
    """What to expect of so many trials, on the calm network."""
    place, few = "comparison/budget", 2
    table = ledger.frame(place)
    expected = table.set_index(["network", "method", "trials"])["expected"].sort_index()
    ledger.add("budget.few", str(few), "the code: _budget of paper/comparison.py")
    for name, network, method in (
        ("calm adaptive", "calm", "adaptive"),
        ("calm sweep", "calm", SWEEP),
        ("calm smallest", "calm", "fixed 64"),
        ("calm floor", "calm", "fixed 128"),
        ("noisy adaptive", "noisy", "adaptive"),
        ("noisy sweep", "noisy", SWEEP),
    ):
        ledger.cell(f"budget.{name}", place, "expected", ".1f", network=network, method=method, trials=few)
    sweep = expected["calm", SWEEP]
    needed = int((sweep <= expected["calm", "adaptive", few]).idxmax())
    ledger.add("budget.needed", str(needed), f"{place}: smallest trials of {SWEEP} with expected at most adaptive's")
    several = range(1, 9)
    for network in ("noisy", "calm"):
        ours, theirs, known = (expected[network, method].loc[several] for method in ("adaptive", SWEEP, "fixed 64"))
        holds(f"adaptive is ahead of the sweep at any number of trials ({network})", bool((ours < theirs).all()))
        holds(f"who knows the best batch is ahead of adaptive ({network})", bool((known < ours).all()))
    close = abs(expected["calm", "adaptive", few] - expected["calm", "fixed 128", few])
    holds("the fixed batch of the floor has the same curve", close < 0.1)
    ledger.cell("budget.noisy fresh", "comparison/arms", "final", ".1f", arm="adaptive", network="noisy", data=HOME)


def _auroc(ledger: Ledger) -> None:
    """Differences of AUROC to the smallest fixed batch, paired by seed, Student's interval."""
    runs = ledger.frame("comparison/runs")
    home = runs[(runs["stage"] == "final") & (runs["data"] == HOME)]
    wide = home.pivot_table(index=["network", "seed"], columns="arm", values="auroc")
    for name, network, arm in (("calm", "calm", "adaptive"), ("noisy", "noisy", "adaptive"), ("clip", "noisy", "clip")):
        own = wide.loc[network]
        test = stats.ttest_1samp(own[arm] - own["fixed 64"], 0.0)
        bounds = test.confidence_interval(0.95)
        said = f"comparison/runs: stage = final, network = {network}: auroc of {arm} less that of fixed 64, by seed"
        ledger.add(f"auroc.{name}", spread((own[arm] - own["fixed 64"]).mean(), bounds.low, bounds.high, ".3f"), said)
        if name == "calm":
            holds("AUROC is lower with the controller on the calm network", bounds.high < 0)
        if name == "clip":
            holds("AUROC is higher with clipping on the noisy network", bounds.low > 0)
