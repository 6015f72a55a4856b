"""The numbers of README.md and of results/README.md: the text between two markers is never typed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from studies.engine.analysis import summary
from studies.engine.provenance import caption, warn
from studies.engine.results import RESULTS
from studies.output.verdicts import VERDICTS, counted

ROOT = Path(__file__).parents[2]


def fill(text: str, page: str = "README.md") -> str:
    """``text`` of a page with every generated section made anew.

    Raises:
        ValueError: If a section's markers are missing.
    """
    for name in PAGES[page]:
        pattern = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page} must have the markers of the section {name!r}; put them back where it belongs.")
        body = SECTIONS[name]()
        text = pattern.sub(lambda found, body=body: found[1] + body + "\n" + found[2], text)
    return text


def markdown(rows: list[dict[str, str]]) -> str:
    """A Markdown table, first column to the left, the others to the right."""
    names = list(rows[0])
    cells = [[row[name].replace("|", r"\|") for name in names] for row in rows]
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def short_section() -> str:
    """Whether it helps: where it does, where it does not, the claims, the loop, and trust."""
    arms = pd.read_parquet(RESULTS / "comparison" / "arms.parquet")
    runs = pd.read_parquet(RESULTS / "comparison" / "runs.parquet")
    found = [_verdicts(study) for study in CLAIMED]
    counts = {kind: sum(int(row[kind]) for rows in found for row in rows) for kind in VERDICTS}
    loop = pd.read_parquet(RESULTS / "closed-loop" / "table.parquet").query("rule == 'CLT'")
    coverage = pd.read_parquet(RESULTS / "calibration" / "coverage.parquet")
    alone = coverage[coverage["B / n"].map(math.isfinite) & (coverage["r"] == 0)]
    cost = pd.read_parquet(RESULTS / "overhead" / "cost.parquet").set_index("contender").loc["adaptbatch"]
    sentences = [
        _what_it_saves(),
        *_where_it_helps(arms, len(runs)),
        f"Of what all studies claimed before their runs, {counts['supported']} cases are supported, "
        f"{counts['not supported']} are not, and {counts['undecided']} are undecided.",
        f"A noise scale that is known it follows: over {len(loop)} profiles the root mean square of log(k / right k) "
        f"is {loop['rms log error'].min():.2f} to {loop['rms log error'].max():.2f}, with at most "
        f"{loop['reversals'].max():.1f} reversals a run ({_said('closed-loop')}).",
        f"On one CPU thread measuring takes {cost['ratio'] - 1:.1%} more time a step ({cost['ratio low'] - 1:.1%} to "
        f"{cost['ratio high'] - 1:.1%}; {_said('overhead')}), and the nominal 95 % interval covers the truth in "
        f"{_range(alone['coverage'])} of the cases ({_said('calibration')}).",
    ]
    return "\n".join(f"* {sentence}" for sentence in sentences)


def _said(study: str) -> str:
    """A study's caption within a sentence."""
    said = caption(study).rstrip(".")
    return said[:1].lower() + said[1:]


def quick_section() -> str:
    """The summary of the quick study."""
    results = pd.read_parquet(RESULTS / "quick" / "results.parquet")
    rows = [
        {
            "arm": row["arm"],
            "final validation loss": f"{row['final']:.1f}",
            "best": f"{row['best']:.1f}",
            "examples": f"{row['examples']:,.0f}",
            "updates": f"{row['updates']:,.0f}",
            "mean batch": f"{row['mean n']:,.0f}",
            "loss spikes": f"{row['spikes']:.0f}",
            "steps at limits": f"{row['limits']:.0%}" if row["limits"] else "-",
            "seconds": f"{row['wall s']:.0f}",
        }
        for _, row in summary(results).iterrows()
    ]
    run = results[results["arm"] == "adaptive"]
    first, last = run.iloc[len(run) // 4], run.iloc[-1]
    size = run["global_batch"].iloc[0] / run["accumulation_steps"].iloc[0]
    return (
        f"{markdown(rows)}\n\n"
        f"One seed, {len(results):,} optimizer steps in `studies/results/quick/results.parquet`. The adaptive arm "
        f"measured a noise scale of {_scale(first)} examples after {first['examples_seen']:,.0f} examples and "
        f"{_scale(last)} at the end (95 % intervals), and went from {run['accumulation_steps'].iloc[0]} to "
        f"{run['accumulation_steps'].iloc[-2]} micro-batches of {size:.0f}. {caption('quick')}"
    )


CLAIMED = (
    *("live", "planning", "comparison", "bursts", "origin-live"),
    *("sensitivity", "momentum", "depth", "frontier", "favourable"),
)


def comparison_section() -> str:
    """The comparison in words, and the verdicts on the claims of all studies."""
    arms = pd.read_parquet(RESULTS / "comparison" / "arms.parquet")
    runs = pd.read_parquet(RESULTS / "comparison" / "runs.parquet")
    rows = [row for study in CLAIMED for row in _verdicts(study)]
    return (
        f"{' '.join(_where_it_helps(arms, len(runs)))}\n\n"
        f"The claims of all studies, written down before their runs, by the number "
        f"of places (networks, data sets, architectures) where they hold; with every interval in the paper:\n\n"
        f"{markdown(rows)}"
    )


def _verdicts(study: str) -> list[dict[str, str]]:
    """A row for each claim of a study: in how many places it holds, the smallest and the largest figure."""
    path = RESULTS / study / "claims.parquet"
    if not path.is_file():
        return []
    rows = counted(pd.read_parquet(path))
    return [{"study": study, "claim": f"{row.pop('claim')}: {row.pop('what')}"} | row for row in rows]


def studies_section() -> str:
    """Every arm of the comparison at home."""
    arms = pd.read_parquet(RESULTS / "comparison" / "arms.parquet")
    home = arms[arms["data"] == "mnist"]
    ends = [
        {
            "network": row["network"],
            "arm": row["arm"],
            "final loss": f"{row['final']:.1f}",
            "of the best fixed (95 %)": f"{_ratio(row['of best fixed'])} ({_ratio(row['of best fixed low'])} to "
            f"{_ratio(row['of best fixed high'])})",
            "diverged": f"{row['diverged']:.0f} of {row['seeds']:.0f}",
            "spikes": f"{row['spikes']:.1f}",
            "mean batch": f"{row['mean n']:,.0f}",
            "AUROC": f"{row['auroc']:.3f}",
        }
        for _, row in home.iterrows()
    ]
    return f"The comparison's arms on MNIST, each at the rate that its trials chose:\n\n{markdown(ends)}"


def _where_it_helps(arms: pd.DataFrame, runs: int) -> list[str]:
    """The result in words, a sentence for each network, from the table."""
    sentences = []
    for network, part in arms[arms["data"] == "mnist"].groupby("network", sort=False):
        rows = part.set_index("arm")
        best, fixed = rows["of best fixed"].astype(float).idxmin(), part.loc[part["best fixed"], "arm"].iloc[0]
        own = rows.loc["adaptive"]
        where = "On the" if sentences else f"In {runs:,} runs of 80-layer networks, all arms tuned alike, on the"
        sentences.append(
            f"{where} {network} network the best fixed batch is {fixed.split()[1]}; adaptive ends at "
            f"{_ratio(own['of best fixed'])} of its loss with a mean batch of {own['mean n']:.0f} "
            f"({own['diverged']:.0f} of {own['seeds']:.0f} runs diverged), and the best arm, {best}, at "
            f"{_ratio(rows.loc[best, 'of best fixed'])}."
        )
    return sentences


def _what_it_saves() -> str:
    """The live study's primary claim beside what a sceptic asks: a constant batch, its own batches, no coupling."""
    claims = pd.read_parquet(RESULTS / "live" / "claims.parquet")
    arms = pd.read_parquet(RESULTS / "live" / "arms.parquet").set_index("arm")["updates ratio"]
    own = claims[claims["what"].str.contains("theta 0.7, root")]

    def of(text: str) -> str:
        row = own[own["what"].str.contains(text, regex=False)].iloc[0]
        return f"{row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f})"

    alone = arms[["theta 0.7", "theta 1", "pareto 128"]]
    return (
        f"On the calm 80-layer network (MNIST, micro-batches of 16, a learning rate that decays to zero), "
        f"`RelativeStandardError(0.7)` with `LearningRate('sqrt')` takes {of('to the frontier')} of the updates that "
        f"fixed batches need for the same loss from the same examples, each with its own tuned rate and a warm-up "
        f"where that is better. Beside a constant batch of its own mean and coupling it is {of('constant mean')}, "
        f"beside its own batches replayed on another seed {of('replay')}, beside one that grows by the clock "
        f"{of('ramp')}: what helps is that the batch grows, and the rule, which nobody tuned, finds how. Without the "
        f"coupling rules take {alone.min():.2f} to {alone.max():.2f}."
    )


def live_section() -> str:
    """Every arm against the frontier, and the claims."""
    arms = pd.read_parquet(RESULTS / "live" / "arms.parquet")
    ends = [
        {
            "network, data, rate": f"{row['network']}, {row['data']}, {row['rate']}",
            "arm": row["arm"],
            "updates": f"{row['updates']:,.0f}",
            "test loss": f"{row['loss']:.2f}",
            "updates, of a fixed batch of that loss (95 %)": _interval(row, "updates ratio"),
            "loss, of a fixed batch of these updates (95 %)": _interval(row, "loss ratio"),
            "live": f"{row['live']:.0f} of {row['seeds']:.0f}",
            "rate": f"{row['lr']:.2g}",
            "mean batch": f"{row['mean n']:,.0f}",
            "AUROC": f"{row['auroc']:.3f}",
        }
        for _, row in arms.iterrows()
    ]
    claims = pd.read_parquet(RESULTS / "live" / "claims.parquet")
    said = [
        {"claim": f"{row['claim']}: {row['what']}", "where": row["where"], "value (95 %)": _interval(row, "value")}
        | {"verdict": row["verdict"]}
        for _, row in claims.iterrows()
    ]
    return f"{_what_it_saves()}\n\n{markdown(ends)}\n\n{markdown(said)}"


def _interval(row: pd.Series, name: str) -> str:
    low, high = ("low", "high") if name == "value" else (f"{name} low", f"{name} high")
    return f"{row[name]:.3f} ({row[low]:.3f} to {row[high]:.3f})"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "not reached"


def _scale(row: pd.Series) -> str:
    return f"{row['noise_scale']:.0f} ({row['noise_scale_low']:.0f} to {row['noise_scale_high']:.0f})"


def loop_section() -> str:
    """How the default rule follows a noise scale that is known."""
    every = pd.read_parquet(RESULTS / "closed-loop" / "table.parquet")
    table = every[every["rule"] == "CLT"]
    rows = [
        {
            "true noise scale": row["profile"],
            "switches": f"{row['switches']:.1f}",
            "reversals": f"{row['reversals']:.1f}",
            "rms log error of k": f"{row['rms log error']:.2f}",
            "says noise_floor": f"{row['noise floor']:.0%}",
            "says guard": f"{row['guard']:.0%}",
        }
        for _, row in table.iterrows()
    ]
    rms = every.set_index(["rule", "profile"])["rms log error"]
    hard = "ramp x32, catastrophes"
    return (
        f"{markdown(rows)}\n\nWhere one window in four hundred has gradients a thousand to ten thousand times longer, "
        f"the plain moments freeze (rms {rms['CLT, pooled', hard]:.2f} on the ramp) and the typical channel follows "
        f"(rms {rms['CLT', hard]:.2f}). {caption('closed-loop')}"
    )


def networks_section() -> str:
    """The verdict on the two networks, and what other statistics would have said."""
    verdicts = pd.read_parquet(RESULTS / "two-networks" / "verdict.parquet")
    rows = [
        {
            "network": row["network"],
            "arm": row["arm"],
            "final validation loss": f"{row['final']:.1f}",
            "of the best fixed": f"{row['of best fixed']:.3f}",
            "paired (95 %)": f"{row['paired']:.3f} ({row['paired low']:.3f} to {row['paired high']:.3f})",
            "spikes": f"{row['spikes']:.0f}",
            "mean batch": f"{row['mean n']:,.0f}",
        }
        for _, row in verdicts.iterrows()
    ]
    others = pd.read_parquet(RESULTS / "two-networks" / "designs.parquet")
    said = [
        {"network": row["network"], "arm": row["arm"]}
        | {name: _number(row[name]) for name in ("pooled B", "typical B", "median of means B", "self-normalised t")}
        | {"top 5 % share": _share(row["top 5 % share"]), "tail index": _number(row["tail index"], ".2f")}
        | {name: _number(row[name]) for name in ("above 1e2", "above 1e4", "spikes")}
        for _, row in others.iterrows()
    ]
    text = f"{markdown(rows)}\n\n{_found(verdicts)}\n\n{_pilots()}\n\n"
    return f"{text}What each statistic says of the fixed arms (medians over seeds):\n\n{markdown(said)}"


def _pilots() -> str:
    """What an answer to the tail did where the batch spikes from the start."""
    pilots = pd.read_parquet(RESULTS / "two-networks" / "pilots.parquet")
    early = pilots[pilots["network"] == "80 residual layers, micro-batch 128"].groupby("design")
    alone, grown = (
        early.get_group(name) for name in ("fixed 256", "tail growth at 1e4, once usual again, one doubling")
    )
    ends = [f"a mean loss of {runs['final'].mean():.1f} with {runs['spikes'].sum()} spikes" for runs in (grown, alone)]
    return (
        f"Nor did it help to act on the tail. Started at the batch that spikes, with micro-batches of 128, and "
        f"answering a gradient a hundred times longer than usual with one doubling, {len(grown)} pilots ended at "
        f"{ends[0]}; left at 256, at {ends[1]}."
    )


def _found(verdicts: pd.DataFrame) -> str:
    """The verdict in words."""
    rows = verdicts.set_index(["network", "arm"])
    calm, noisy = (rows.loc[name, "adaptive"] for name in ("calm", "noisy"))
    meets = "meets" if noisy["meets"] and calm["meets"] else "does not meet"
    return (
        f"Calm: the default rule ends at {calm['of best fixed']:.3f} of the best fixed batch's loss, with a mean batch "
        f"of {calm['mean n']:,.0f}. Noisy: at {noisy['of best fixed']:.3f}, with {noisy['of smallest']:.1%} of the "
        f"spikes of fixed 256. That {meets} what was asked in "
        f"advance; but it does not show that the rule notices instability: its smallest window on the noisy network, "
        f"two micro-batches of 256, is quiet already, and it stays there."
    )


def _number(value: float, form: str = ",.0f") -> str:
    return f"{value:{form}}" if math.isfinite(value) else "-"


def _share(value: float) -> str:
    return _number(value, ".0%")


def calibration_section() -> str:
    """Coverage of the intervals, and the error of every estimator."""
    coverage = pd.read_parquet(RESULTS / "calibration" / "coverage.parquet")
    error = pd.read_parquet(RESULTS / "calibration" / "error.parquet")
    signal = coverage["B / n"].map(math.isfinite)
    lost, alone, chained = coverage[~signal], coverage[signal & (coverage["r"] == 0)], coverage[coverage["r"] > 0]
    most = error["windows"].max()
    last = error[error["windows"] == most]
    equal = last[~last["setting"].str.contains("unequal")]
    rows = []
    for name in last["estimator"].unique():
        own = equal[equal["estimator"] == name].set_index("setting")["rms"]
        rows.append({"estimator": name} | {setting: _rms(rms) for setting, rms in own.items()})
    peers = error[~error["estimator"].str.startswith("adaptbatch")]
    compared = peers["further by"].dropna()
    closer, finite = int((compared < -2.0).sum()), len(peers) - len(compared)
    return (
        f"Over {len(alone)} cases of {alone['runs'].iloc[0]:,} intervals each (B/n of 0.25, 1 and 4; Gaussian and "
        f"heavy-tailed; 10 to 100 windows) the nominal 95 % interval covers the true noise scale in "
        f"{_range(alone['coverage'])} of them, {alone['coverage'].mean():.1%} on average; where the errors of "
        f"consecutive windows are correlated by half, in {_range(chained['coverage'])}. Without any signal it is "
        f"unbounded in {_range(lost['unbounded'])}.\n\n"
        f"Root mean square of log(estimate / truth) after {most} windows, on the same gradients:\n\n"
        f"{markdown(rows)}\n\n"
        f"In {closer} of {len(compared)} comparisons a peer was closer to the truth than the controller by more than "
        f"two standard errors; {finite} more, of the weakest signal after few windows, have no comparison: the "
        f"controller sometimes says there that the noise scale is unbounded, where estimators that clip give a number. "
        f"`python -m studies calibration` repeats all of it. {caption('calibration')}"
    )


def _range(values: pd.Series) -> str:
    return f"{values.min():.1%} to {values.max():.1%}"


def _rms(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "no estimate"


def overhead_section() -> str:
    """Cost and bias, from the overhead study."""
    cost = pd.read_parquet(RESULTS / "overhead" / "cost.parquet")
    bias = pd.read_parquet(RESULTS / "overhead" / "bias.parquet")
    rows = [
        {
            "one window": row["contender"],
            "time": f"{row['ratio']:.3f}",
            "95 % interval": f"{row['ratio low']:.3f} to {row['ratio high']:.3f}",
            "host reads": _number(row["host reads"]),
            "extra memory allocated": _number(row["extra bytes"] / 1e6, ",.2f")
            + " MB" * math.isfinite(row["extra bytes"]),
        }
        for _, row in cost.iterrows()
    ]
    return (
        f"{markdown(rows)}\n\n"
        "Median ratio to the hand-written loop, or of the controller with clipping, AMP, a compiled loss or DDP to the "
        "same loop without it; interleaved in one process on one CPU thread (DDP: two processes): 8 micro-batches of "
        "256, 80 layers of width 128. Host reads and memory are above the same loop's; memory is the sum of all "
        "tensors newly allocated in a window.\n\n"
        "The estimates are unbiased: against the exact per-example covariance of a small network the mean over "
        f"{bias['windows'].iloc[0]:,} windows is off by at most {bias['bias %'].abs().max():.1f} % "
        f"and by no more than {bias['bias in SE'].abs().max():.1f} standard errors, with equal and unequal "
        f"micro-batches. `python -m studies overhead` measures all of this on your machine. {caption('overhead')}"
    )


SECTIONS: dict[str, Callable[[], str]] = {
    "short": short_section,
    "live": live_section,
    "quick": quick_section,
    "comparison": comparison_section,
    "studies": studies_section,
    "closed loop": loop_section,
    "two networks": networks_section,
    "calibration": calibration_section,
    "overhead": overhead_section,
}
# Where each section stands; paths within the repository.
PAGES = {"README.md": ["short"], "studies/results/README.md": [name for name in SECTIONS if name != "short"]}


def write() -> None:
    """Fill the pages in place, and say which of their numbers are of other code."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(fill(path.read_text(), page))
    warn()
