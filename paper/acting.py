"""The studies in which the controller acts, and is a plan true, in figures: live, transformer, bursts, planning."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from paper.ledger import Ledger, holds, shown, spread

_LIVE = {
    "root": "theta 0.7, root",
    "theta 1": "theta 1, root",
    "pareto": "pareto 128, root",
    "pareto 1024": "pareto 1024, root",
    "ghost": "ghost, theta 1, root",
    "tuned": "theta 0.7, root, tuned",
}
PRIMARY, RATIO = "theta 0.7, root", "updates ratio"
# Longest warm-ups that fixed batches had to choose at first, as shares of the budget.
FIRST = {"live": 0.05, "transformer": 0.1}
_UNCOUPLED = ("theta 0.7", "theta 1", "pareto 128")


def live(ledger: Ledger) -> None:
    """Updates at equal examples and equal loss, over the frontier of tuned fixed batches."""
    place = "live/arms"
    arms = ledger.frame(place)
    _against_frontier(ledger, "live", place, arms)
    for name, arm in _LIVE.items():
        ledger.interval(f"live.{name}", place, "updates ratio", ".2f", arm=arm)
    adaptive = arms[~arms["fixed"]].set_index("arm")
    said = f"{place}: smallest and largest updates ratio of {', '.join(_UNCOUPLED)}"
    uncoupled = adaptive.loc[list(_UNCOUPLED), "updates ratio"]
    ledger.add("live.uncoupled", f"{uncoupled.min():.2f} to {uncoupled.max():.2f}", said)
    ledger.interval("live.loss", place, "loss ratio", ".2f", arm="theta 0.7, root")
    ledger.interval("live.before", "live/before", "updates ratio", ".2f", arm="theta 0.7, root")
    _warmed(ledger, "live", 192, {"network": "calm", "data": "mnist", "rate": "decaying"})
    ledger.add("live.short", f"{FIRST['live']:.0%}", "the code: WARMUP of studies/questions/live")
    ledger.add("live.theta", "0.7", "the code: RelativeStandardError(0.7) of studies/questions/live")
    ledger.cell("live.seeds", place, "seeds", ".0f", arm="theta 0.7, root")
    ledger.cell("live.last", place, "last n", ",.0f", arm="theta 0.7, root")
    holds("every adaptive run of the live study is live", bool((adaptive["live"] == adaptive["seeds"]).all()))
    holds("none of them diverges", bool((adaptive["diverged"] == 0).all()))
    holds("without a coupling all are behind the frontier", bool((uncoupled > 1).all()))
    holds("and behind what is coupled", bool(uncoupled.min() > adaptive.loc[PRIMARY, RATIO]))
    claims = ledger.frame("live/claims")
    verdict = claims.set_index(["claim", "what"])["verdict"]
    holds("V3 is supported", set(verdict["V3"]) == {"supported"})
    holds("V1 is not supported", set(verdict["V1"]) == {"not supported"})
    holds("V4 is undecided", set(verdict["V4"]) == {"undecided"})
    _ratio(ledger, "live.over mean", "constant mean", "supported")
    _ratio(ledger, "live.over ramp", "ramp 2 to 16, root", "supported")
    _ratio(ledger, "live.over replay", "replay", "undecided")


def _against_frontier(ledger: Ledger, name: str, place: str, arms: pd.DataFrame) -> None:
    """The table of all arms of one task."""
    head = ["arm", "updates", "mean batch", "changes of k", "loss", "updates ratio (95 %)"]
    rows = [
        [
            str(row["arm"]),
            shown(row["updates"], ",.0f"),
            shown(row["mean n"], ",.0f"),
            "–" if row["fixed"] else shown(row["changes"], ".0f"),
            shown(row["loss"], ".2f"),
            "–"
            if row["fixed"]
            else spread(row["updates ratio"], row["updates ratio low"], row["updates ratio high"], ".2f"),
        ]
        for row in arms.to_dict("records")
    ]
    ledger.table(name, place, head, rows)


def transformer(ledger: Ledger) -> None:
    """The same on a language model, what its noise scale does, and the controls."""
    place, where = "transformer/arms", {"order": "pre", "millions": 1}
    arms = ledger.rows(place, where)
    _against_frontier(ledger, "transformer", place, arms)
    named = {"root": "theta 0.7, root", "theta 1": "theta 1, root", "pareto": "pareto 2048, root"}
    named |= {"tuned": "theta 0.7, root, tuned"}
    for name, arm in named.items():
        ledger.interval(f"transformer.{name}", place, "updates ratio", ".2f", arm=arm, **where)
    ledger.interval("transformer.before", "transformer/before", "updates ratio", ".2f", arm="theta 0.7, root", **where)
    ledger.interval("transformer.loss", place, "loss ratio", ".2f", arm="theta 0.7, root", **where)
    ledger.cell("transformer.seeds", place, "seeds", ".0f", arm="theta 0.7, root", **where)
    for name, arm in {"mean": "constant mean", "replay": "replay"}.items():
        ledger.interval(f"transformer.over {name}", place, "over", ".2f", arm=arm, **where)
    for shape in ("linear", "exponential"):
        ledger.interval(f"transformer.over {shape}", place, "over", ".2f", arm=f"{shape} ramp, root", **where)
    adaptive = arms[~arms["fixed"]].set_index("arm")
    alone = adaptive.loc[["theta 0.7", "theta 1", "pareto 2048"], "updates ratio"]
    said = f"{place}: smallest and largest updates ratio of theta 0.7, theta 1, pareto 2048"
    ledger.add("transformer.uncoupled", f"{alone.min():.2f} to {alone.max():.2f}", said)
    holds("every adaptive run of the transformer is live", bool((adaptive["live"] == adaptive["seeds"]).all()))
    holds("none of its runs diverges", bool((arms["diverged"] == 0).all()))
    holds("without a coupling all are behind what is coupled", bool(alone.min() > adaptive.loc[PRIMARY, RATIO]))
    claims = ledger.frame("transformer/claims")
    verdict = {str(claim): set(part["verdict"]) for claim, part in claims.groupby("claim")}
    holds("L1 is nowhere supported", "supported" not in verdict["L1"])
    holds("L4 and L6 are supported", verdict["L4"] | verdict["L6"] == {"supported"})
    own = ledger.rows("transformer/runs", {"stage": "final", "arm": PRIMARY, **where})["key"]
    curves = ledger.frame("transformer/curves")
    scale = curves[curves["key"].isin(own)].sort_values("examples_seen").groupby("key")["noise_scale"]
    for name, at in {"early": 1, "late": -1}.items():
        said = f"transformer/curves: median noise_scale of theta 0.7, root at evaluation {at} of each run, from 0"
        ledger.add(f"transformer.B {name}", f"{scale.nth(at).median():,.0f}", said)
    holds("its noise scale grows more than tenfold", scale.nth(-1).median() > 10.0 * scale.nth(1).median())
    _warmed(ledger, "transformer", 2048, where)
    tried = ledger.rows("transformer/runs", {"stage": "final", "fixed": 1, **where})
    tried = tried[tried["warmup"] > FIRST["transformer"]]
    shares = tried.groupby(tried["arm"].str.removeprefix("fixed ").astype(int))["warmup"].first()
    holds("larger batches want longer warm-ups", shares.is_monotonic_increasing and shares.iloc[0] < shares.iloc[-1])


def opening(ledger: Ledger) -> None:
    """What replaces the warm-up of the rate on the language model, and how noisy its start is."""
    place, early = "transformer/warm-up", "transformer/opening"
    for name, way in {"nothing": "none", "large": "large batch first", "absolute": "standard error"}.items():
        for order in ("post", "pre"):
            found = {"order": order, "opening": way}
            ledger.interval(f"opening.{order} {name}", place, "of rate warm-up", ".3f", **found)
    noise = ledger.frame(early)
    calm = noise[noise.groupby(["order", "lr"])["diverged"].transform("max") == 0]["B / n"]
    said = f"{early}: smallest and largest B / n, rates at which none diverges"
    ledger.add("opening.noise", f"{calm.min():.2f} to {calm.max():.2f}", said)
    what = "early B / n of pre-LN over that of post-LN is below 1"
    ledger.interval("opening.pre over post", "transformer/claims", "value", ".2f", what=what)
    holds("early gradients are not noisy", calm.max() < 1.0)
    claims = ledger.rows("transformer/claims", {"claim": "L3"})
    replaced = claims[claims["where"].str.startswith("post-LN")]["verdict"]
    holds("that a batch replaces the warm-up is undecided", set(replaced) == {"undecided"})
    rows = ledger.rows("transformer/runs", {"stage": "warm-up", "arm": "standard error"})
    holds("the absolute rule moves in every run", bool((rows["changes"] > 1).all()))
    post = ledger.rows(place, {"order": "post"})
    holds("all openings like the same rate", len(set(post["lr"])) == 1)
    holds("as many rates are good", len(set(post["rates within a tenth"])) == 1)


def _warmed(ledger: Ledger, study: str, batch: int, where: Mapping[str, object]) -> None:
    """The best mean tuning loss of a fixed batch with the warm-up that it had at first, and with any; its share."""
    tried = ledger.rows(f"{study}/runs", {"stage": "tune", "arm": f"fixed {batch}", **where})
    means = tried.groupby(["warmup", "lr"])["final"].mean()
    shares = means.index.get_level_values("warmup")
    first, longer = means[shares <= FIRST[study]], shares[shares > FIRST[study]]
    said = f"{study}/runs: stage = tune, arm = fixed {batch}: shortest and longest warmup above {FIRST[study]}"
    ledger.add(f"{study}.longer", f"{longer.min():.0%} to {longer.max():.0%}", said)
    said = f"{study}/runs: stage = tune, arm = fixed {batch}: smallest mean of final"
    ledger.add(f"{study}.first {batch}", shown(first.min(), ".2f"), f"{said}, warmup up to {FIRST[study]}")
    ledger.add(f"{study}.best {batch}", shown(means.min(), ".2f"), said)
    ledger.add(f"{study}.share {batch}", f"{means.idxmin()[0]:.0%}", f"{said}: its warmup")


def _ratio(ledger: Ledger, name: str, other: str, verdict: str) -> None:
    what = f"updates ratio of theta 0.7, root over that of {other} is below 1"
    row = ledger.row("live/claims", {"claim": "V5", "what": what})
    holds(f"{what}: {verdict}", row["verdict"] == verdict)
    ledger.interval(name, "live/claims", "value", ".2f", claim="V5", what=what)


def bursts(ledger: Ledger) -> None:
    """The absolute relation, and what averaging does, on the noisy network at a rate at which it spikes."""
    place = "bursts/arms"
    arms = ledger.frame(place)
    rows = [
        [
            str(row["arm"]),
            "updates" if row["stage"] == "updates" else "examples",
            shown(row["updates"], ",.0f"),
            shown(row["diverged"], ".0f"),
            shown(row["runs with spikes"], ".0f"),
            spread(row["final"], row["final low"], row["final high"], ".1f"),
        ]
        for row in arms.to_dict("records")
    ]
    head = ["arm", "at equal", "updates", "diverged", "runs that spike", "final (95 %)"]
    ledger.table("bursts", place, head, rows)
    ledger.cell("bursts.warmup spikes", place, "runs with spikes", ".0f", stage="rules", arm="warm-up")
    named = {
        "64": ("examples", "fixed 64"),
        "1024": ("examples", "fixed 1024"),
        "absolute": ("rules", "standard error"),
    }
    for name, (stage, arm) in named.items():
        ledger.cell(f"bursts.{name} diverged", place, "diverged", ".0f", stage=stage, arm=arm)
        ledger.cell(f"bursts.{name} spikes", place, "runs with spikes", ".0f", stage=stage, arm=arm)
    ledger.cell("bursts.seeds", place, "seeds", ".0f", stage="rules", arm="standard error")
    ledger.cell("bursts.absolute batch", place, "mean n", ",.0f", stage="rules", arm="standard error")
    claims = ledger.frame("bursts/claims")
    o1 = claims[claims["claim"] == "O1"]
    holds("averaging helps at equal examples", set(o1.loc[o1["where"] == "equal examples", "verdict"]) == {"supported"})
    holds("and is undecided at equal updates", set(o1.loc[o1["where"] == "equal updates", "verdict"]) == {"undecided"})
    verdicts = {str(claim): set(part["verdict"]) for claim, part in claims.groupby("claim")}
    holds(
        "nothing claimed of the absolute rule is supported",
        not any("supported" in verdicts[c] for c in ("O3", "O4", "O5")),
    )
    o2 = claims[claims["claim"] == "O2"].set_index("what")["verdict"]
    lowered = {word: set(o2[o2.index.str.contains(f" {word} ")]) for word in ("spikes", "diverged")}
    holds("a lowered rate lowers divergence", lowered["diverged"] == {"supported"})
    holds("of spikes that is undecided", lowered["spikes"] == {"undecided"})
    dear = claims[(claims["claim"] == "C2") & claims["what"].str.contains("1024")]
    holds("1024 ends higher than the lowered rate", set(dear["verdict"]) == {"not supported"})
    where = {"claim": "C2", "what": str(dear["what"].iloc[0])}
    ledger.interval("bursts.dear", "bursts/claims", "value", ".2f", **where)


def planning(ledger: Ledger) -> None:
    """What one run foretells of every other batch, beside what tuned ones took."""
    place, task = "planning/predictions", "calm, mnist"
    found = ledger.rows(place, {"task": task})
    rows = [
        [
            shown(row["batch"], ",.0f"),
            shown(row["updates"], ",.0f"),
            spread(row["predicted"], row["low"], row["high"], ",.0f"),
            shown(row["updates"] / row["predicted"], ".2f"),
            shown(row["calibrated"], ",.0f"),
        ]
        for row in found.to_dict("records")
    ]
    ledger.table("planning", place, ["batch", "updates", "foretold (95 %)", "ratio", "calibrated"], rows)
    ledger.cell("planning.start", place, "start", ".0f", task=task, batch=64)
    ledger.cell("planning.B", place, "B", ".0f", task=task, batch=64)
    off = found["updates"] / found["predicted"]
    said = f"{place}: smallest and largest updates over predicted of {task}"
    ledger.add("planning.off", f"{off.min():.2f} to {off.max():.2f}", said)
    before = ledger.rows("planning/before", {"task": task}).set_index("batch")
    late = before["updates"] / before["predicted"]
    for batch in (512, 1024):
        said = f"planning/before: updates over predicted, batch = {batch}"
        ledger.add(f"planning.before {batch}", f"{late[batch]:.2f}", said)
    counted = ledger.rows("planning/runs", {"task": task, "stage": "final"})
    runs = counted.groupby("batch")[["lr", "warmup"]].first()
    holds(
        "batches of 64 and more have a warm-up, smaller ones none", list(runs["warmup"] > 0) == list(runs.index >= 64)
    )
    holds("without longer warm-ups only 512 and 1024 were late", set(late[late > 1.1].index) == {512, 1024})
    holds("by half as many updates again and more", bool((late[[512, 1024]] > 1.5).all()))
    _language_plan(ledger)
    claims = ledger.frame("planning/claims")
    for claim, words in {"P1": "as a factor, is below", "P1 calibrated": "calibrated"}.items():
        what = str(claims.loc[claims["what"].str.contains(words), "what"].iloc[0])
        for name, where in {claim: task, f"{claim} text": "transformer"}.items():
            ledger.interval(f"planning.{name}", "planning/claims", "value", ".2f", what=what, where=where)
    verdicts = claims.set_index(["what", "where"])["verdict"]
    holds(
        "P1 is supported on both",
        set(verdicts[verdicts.index.get_level_values(0).str.contains("is below 1.5")]) == {"supported"},
    )
    calibrated = verdicts[verdicts.index.get_level_values(0).str.contains("calibrated")]
    holds(
        "calibrated it is on one only",
        calibrated.droplevel(0).to_dict() == {task: "supported", "transformer": "not supported"},
    )
    holds(
        "P3 is supported on 1, 8 and 64 devices", set(claims.loc[claims["claim"] == "P3", "verdict"]) == {"supported"}
    )
    what = "time of the recommended batch over the best's, devices: 1, is below 1.10"
    ledger.interval("planning.P3", "planning/claims", "value", ".2f", what=what, where="transformer")
    for channel in ("euclidean", "adam", "typical"):
        what = f"critical batch over B, {channel}: scatter is below 2"
        for name, where in {channel: task, f"{channel} text": "transformer"}.items():
            ledger.interval(f"planning.{name}", "planning/claims", "value", ".1f", what=what, where=where)


def _language_plan(ledger: Ledger) -> None:
    """The same on the language model, in a sentence."""
    place, where = "planning/predictions", {"task": "transformer"}
    found = ledger.rows(place, where)
    off = found["updates"] / found["predicted"]
    ledger.add("planning.text", f"{off.min():.2f} to {off.max():.2f}", f"{place}: updates over predicted, transformer")
    for name, column in {"text start": "start", "text B": "B"}.items():
        ledger.cell(f"planning.{name}", place, column, ",.0f", batch=256, **where)
    holds("two tasks are finished", list(ledger.frame(place)["task"].unique()) == ["calm, mnist", "transformer"])
    # The manual's words.
    holds("up to a fifth fewer", abs(off.min() - 0.8) < 0.02)
    holds("its larger batches need fewer updates than foretold", bool((off[found["batch"] > 512] < 1.0).all()))
