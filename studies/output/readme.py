"""The numbers of README.md and of results/README.md: the text between two markers is never typed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from studies.engine.analysis import summary
from studies.engine.provenance import caption, warn
from studies.engine.results import RESULTS
from studies.output.acting import ACTING, acting_section, defaults_section, warm_up_section, what_it_saves
from studies.output.markdown import Cell, interval, known, markdown, spread, table
from studies.output.trust import calibration_section, loop_section, overhead_section, planning_section
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


def short_section() -> str:
    """Whether it helps: where it does, where it does not, the claims, the loop, and trust."""
    arms = pd.read_parquet(RESULTS / "comparison" / "arms.parquet")
    runs = pd.read_parquet(RESULTS / "comparison" / "runs.parquet")
    found = [_verdicts(study) for study in CLAIMED]
    counts = {kind: sum(int(row[kind]) for rows in found for row in rows) for kind in VERDICTS}
    loop = pd.read_parquet(RESULTS / "closed-loop" / "table.parquet").query("rule == 'CLT'")
    coverage = pd.read_parquet(RESULTS / "calibration" / "coverage.parquet")
    alone = coverage[coverage["B / n"].map(math.isfinite) & (coverage["r"] == 0)]
    cost = pd.read_parquet(RESULTS / "overhead" / "cost.parquet").set_index("contender")
    always, settled = (_cost(cost.loc[name]) for name in ("adaptbatch", "adaptbatch, one window in four"))
    sentences = [
        *map(what_it_saves, ACTING),
        _what_it_foretells(),
        *_where_it_helps(arms, len(runs)),
        f"Of what all studies claimed before their runs, {counts['supported']} cases are supported, "
        f"{counts['not supported']} are not, and {counts['undecided']} are undecided.",
        f"A noise scale that is known it follows: over {len(loop)} profiles the root mean square of log(k / right k) "
        f"is {loop['rms log error'].min():.2f} to {loop['rms log error'].max():.2f}, with at most "
        f"{loop['reversals'].max():.1f} reversals a run ({_said('closed-loop')}).",
        f"On one CPU thread measuring every window takes {always} more time a step, and {settled} once the noise scale "
        f"is known and one window in four is measured ({_said('overhead')}).",
        f"The nominal 95 % interval covers the truth in {spread(alone['coverage'])} of the cases "
        f"({_said('calibration')}).",
    ]
    return "\n".join(f"* {sentence}" for sentence in sentences)


def _cost(row: pd.Series) -> str:
    return f"{row['ratio'] - 1:.1%} ({row['ratio low'] - 1:.1%} to {row['ratio high'] - 1:.1%})"


def _said(study: str) -> str:
    """A study's caption within a sentence."""
    said = caption(study).rstrip(".")
    return said[:1].lower() + said[1:]


def quick_section() -> str:
    """The summary of the quick study."""
    results = pd.read_parquet(RESULTS / "quick" / "results.parquet")
    cells: dict[str, Cell] = {
        "arm": "{arm}",
        "final validation loss": "{final:.1f}",
        "best": "{best:.1f}",
        "examples": "{examples:,.0f}",
        "updates": "{updates:,.0f}",
        "mean batch": "{mean n:,.0f}",
        "loss spikes": "{spikes:.0f}",
        "steps at limits": lambda row: f"{row['limits']:.0%}" if row["limits"] else "-",
        "seconds": "{wall s:.0f}",
    }
    run = results[results["arm"] == "adaptive"]
    first, last = run.iloc[len(run) // 4], run.iloc[-1]
    size = run["global_batch"].iloc[0] / run["accumulation_steps"].iloc[0]
    return (
        f"{table(summary(results), cells)}\n\n"
        f"One seed, {len(results):,} optimizer steps in `studies/results/quick/results.parquet`. The adaptive arm "
        f"measured a noise scale of {_scale(first)} examples after {first['examples_seen']:,.0f} examples and "
        f"{_scale(last)} at the end (95 % intervals), and went from {run['accumulation_steps'].iloc[0]} to "
        f"{run['accumulation_steps'].iloc[-2]} micro-batches of {size:.0f}. {caption('quick')}"
    )


CLAIMED = (
    *("live", "transformer", "planning", "comparison", "bursts", "origin-live"),
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
    cells: dict[str, Cell] = {
        "network": "{network}",
        "arm": "{arm}",
        "final loss": "{final:.1f}",
        "of the best fixed (95 %)": lambda row: "{} ({} to {})".format(
            *(_ratio(row[f"of best fixed{end}"]) for end in ("", " low", " high"))
        ),
        "diverged": "{diverged:.0f} of {seeds:.0f}",
        "spikes": "{spikes:.1f}",
        "mean batch": "{mean n:,.0f}",
        "AUROC": "{auroc:.3f}",
    }
    ends = table(arms[arms["data"] == "mnist"], cells)
    return f"The comparison's arms on MNIST, each at the rate that its trials chose:\n\n{ends}"


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


def _what_it_foretells() -> str:
    """How far one run's plan was from what every batch took, tuned whole and with short warm-ups only."""
    tables_ = (pd.read_parquet(RESULTS / "planning" / f"{name}.parquet") for name in ("predictions", "before"))
    found, before = (table_.assign(off=table_["updates"] / table_["predicted"]) for table_ in tables_)
    late = before[before["off"] > 1.1]
    said = [
        f"on {NETWORKS[str(task)]} {own['batch'].min():.0f} to {own['batch'].max():,.0f} took "
        f"{own['off'].min():.2f} to {own['off'].max():.2f} of that"
        for task, own in found.groupby("task", sort=False)
    ]
    return (
        f"From one run at a small batch `ab.plan` foretold how many updates every other one takes to the same loss, "
        f"with its rate and, but for the smallest, its warm-up tuned: {', '.join(said)}. With short warm-ups at most "
        f"to choose, {' and '.join(f'{n:,.0f}' for n in late['batch'])} had taken "
        f"{' and '.join(f'{ratio:.2f}' for ratio in late['off'])} of it."
    )


NETWORKS = {"calm, mnist": "the calm network", "transformer": "the transformer"}


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "not reached"


def _scale(row: pd.Series) -> str:
    return f"{row['noise_scale']:.0f} ({row['noise_scale_low']:.0f} to {row['noise_scale_high']:.0f})"


def networks_section() -> str:
    """The verdict on the two networks, and what other statistics would have said."""
    verdicts = pd.read_parquet(RESULTS / "two-networks" / "verdict.parquet")
    others = pd.read_parquet(RESULTS / "two-networks" / "designs.parquet")
    ends = {
        "network": "{network}",
        "arm": "{arm}",
        "final validation loss": "{final:.1f}",
        "of the best fixed": "{of best fixed:.3f}",
        "paired (95 %)": interval("paired"),
        "spikes": "{spikes:.0f}",
        "mean batch": "{mean n:,.0f}",
    }
    said = {
        "network": "{network}",
        "arm": "{arm}",
        **{name: known(name) for name in ("pooled B", "typical B", "median of means B", "self-normalised t")},
        "top 5 % share": known("top 5 % share", ".0%"),
        "tail index": known("tail index", ".2f"),
        **{name: known(name) for name in ("above 1e2", "above 1e4", "spikes")},
    }
    return (
        f"{table(verdicts, ends)}\n\n{_found(verdicts)}\n\n{_pilots()}\n\n"
        f"What each statistic says of the fixed arms (medians over seeds):\n\n{table(others, said)}"
    )


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


SECTIONS: dict[str, Callable[[], str]] = {
    "short": short_section,
    **{study: partial(acting_section, study) for study in ACTING},
    "warm-up": warm_up_section,
    "defaults": defaults_section,
    "planning": planning_section,
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
