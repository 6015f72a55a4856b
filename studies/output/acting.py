"""The studies in which the controller acts, in words and tables."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from studies.engine.results import RESULTS
from studies.output.markdown import interval, markdown, table


@dataclass(frozen=True)
class Task:
    """What is said of a study's first task.

    Attributes:
        setting: What is trained, and how.
        unit: Of what is learnt from.
        task: Columns that tell its tasks apart, with the values of the first.
        clock: What grows by the clock, by what it is called.
        alone: Arms without a coupling.
    """

    setting: str
    unit: str
    task: dict[str, object]
    clock: dict[str, str]
    alone: tuple[str, ...]


ACTING = {
    "transformer": Task(
        setting="On a character transformer (a million characters, AdamW, a learning rate that decays to zero)",
        unit="characters",
        task={"order": "pre", "millions": 1},
        clock={"linear ramp, root": "a linear ramp of its range", "exponential ramp, root": "an exponential one"},
        alone=("theta 0.7", "theta 1", "pareto 2048"),
    ),
    "live": Task(
        setting="On the calm 80-layer network (MNIST, micro-batches of 16, a learning rate that decays to zero)",
        unit="examples",
        task={"network": "calm", "data": "mnist", "rate": "decaying"},
        clock={"ramp 2 to 16, root": "a linear ramp"},
        alone=("theta 0.7", "theta 1", "pareto 128"),
    ),
}
PRIMARY = "theta 0.7, root"
TUNED = f"{PRIMARY}, tuned"


def what_it_saves(study: str) -> str:
    """The primary arm beside fixed batches: neither tuned, both tuned, and untuned against tuned."""
    arms, said = _arms(study), ACTING[study]
    own = arms.loc[PRIMARY]
    return (
        f"{said.setting}, `RelativeStandardError(0.7)` with `LearningRate('sqrt')` takes "
        f"{_ratio(arms.loc['constant mean'], 'over')} of the updates that a fixed batch of its own mean takes to the "
        f"same loss from the same {said.unit}, where neither is tuned: both have the rate and the warm-up of a small "
        f"batch, and the rate follows the root of the batch. Of the updates of fixed batches whose rate and warm-up "
        f"are tuned it takes {_ratio(arms.loc[TUNED], 'updates ratio')} where its own are too, and "
        f"{_ratio(own, 'updates ratio')} where they are not, at {_ratio(own, 'loss ratio', '.3f')} of their loss after "
        f"as many updates."
    )


def what_it_owes_to(study: str) -> str:
    """What a sceptic asks: its own batches without feedback, the clock, no coupling, fewer warm-ups to choose."""
    arms, said = _arms(study), ACTING[study]
    alone = arms.loc[list(said.alone), "updates ratio"]
    beside = {"its own batches, replayed on another seed": "replay"}
    beside |= {words: arm for arm, words in said.clock.items()}
    others = ", ".join(f"{_ratio(arms.loc[arm], 'over')} of {words}" for words, arm in beside.items())
    before = _ratio(_arms(study, "before").loc[PRIMARY], "updates ratio")
    return (
        f"Not tuned, it takes {others}. Without the coupling rules take {alone.min():.2f} to {alone.max():.2f} of the "
        f"tuned fixed batches' updates. Before these had longer warm-ups to choose, it seemed to take {before} of "
        f"theirs: most of that was the warm-up."
    )


def _arms(study: str, table: str = "arms") -> pd.DataFrame:
    """Of the study's first task, by name."""
    arms = pd.read_parquet(RESULTS / study / f"{table}.parquet")
    for column, value in ACTING[study].task.items():
        arms = arms[arms[column] == value]
    return arms.set_index("arm")


def _ratio(row: pd.Series, name: str, form: str = ".2f") -> str:
    return interval(name, form).format_map(row)


def acting_section(study: str) -> str:
    """Every arm against the frontier, and the claims."""
    arms = pd.read_parquet(RESULTS / study / "arms.parquet")
    claims = pd.read_parquet(RESULTS / study / "claims.parquet")
    names = ACTING[study].task
    ends = {
        ", ".join(names): ", ".join(f"{{{name}}}" for name in names),
        "arm": "{arm}",
        "updates": "{updates:,.0f}",
        "test loss": "{loss:.2f}",
        "updates, of a fixed batch of that loss (95 %)": interval("updates ratio"),
        "loss, of a fixed batch of these updates (95 %)": interval("loss ratio"),
        "live": "{live:.0f} of {seeds:.0f}",
        "rate": "{lr:.2g}",
        "mean batch": "{mean n:,.0f}",
    }
    if "auroc" in arms:
        ends["AUROC"] = "{auroc:.3f}"
    said = {
        "claim": "{claim}: {what}",
        "where": "{where}",
        "value (95 %)": "{value:.3f} ({low:.3f} to {high:.3f})",
        "verdict": "{verdict}",
    }
    return f"{what_it_saves(study)} {what_it_owes_to(study)}\n\n{table(arms, ends)}\n\n{table(claims, said)}"


OPENINGS = {
    "rate warm-up": "the rate's warm-up over the first tenth",
    "none": "nothing",
    "large batch first": "eight times the batch over the first tenth",
    "standard error": "`StandardError` without a clock",
}
OF_WARM_UP = "{of rate warm-up:.3f} ({low:.3f} to {high:.3f})"


def warm_up_section() -> str:
    """What replaces a warm-up of the rate on the language model, and how noisy its start is."""
    found = pd.read_parquet(RESULTS / "transformer" / "warm-up.parquet")
    claims = pd.read_parquet(RESULTS / "transformer" / "claims.parquet")
    noise = pd.read_parquet(RESULTS / "transformer" / "opening.parquet")
    calm = noise[noise.groupby(["order", "lr"])["diverged"].transform("max") == 0]["B / n"]
    (early,) = claims[(claims["claim"] == "L3") & claims["what"].str.startswith("early")].to_dict("records")
    cells = {
        "normalised": "{order}",
        "what opens gently": lambda row: OPENINGS[row["opening"]],
        "best rate": "{lr:g}",
        "test loss": "{loss:.3f}",
        "of the warm-up's (95 %)": OF_WARM_UP,
        "rates within a tenth": "{rates within a tenth} of {rates}",
        "spikes": "{spikes:.1f}",
    }
    ratios = found.set_index(["order", "opening"])
    said = []
    for order in ("post", "pre"):
        ways = (f"{OPENINGS[way]} {OF_WARM_UP.format_map(ratios.loc[order, way])}" for way in list(OPENINGS)[1:])
        said.append(f"{order}-normalised, {', '.join(ways)}")
    return (
        f"A fixed 512 over seven rates, each way to open at its best, has of the loss that a warm-up of the rate "
        f"gives: {'; '.join(said)}. Over the first 50,000 characters, where noise is said to be largest, `B / n` is at "
        f"most {calm.max():.2f}, and of pre-normalised networks {early['value']:.2f} ({early['low']:.2f} to "
        f"{early['high']:.2f}) times that of post-normalised ones."
        f"\n\n{table(found, cells)}"
    )


# Rules by what is the same in every task: a price is in starting batches.
RULES = {
    "`RelativeStandardError(0.7)`": ("theta 0.7",),
    "`RelativeStandardError(1.0)`": ("theta 1",),
    "`Pareto`, at 4 starting batches": ("pareto 128", "pareto 2048"),
    "`Pareto`, at 32 starting batches": ("pareto 1024", "pareto 16384"),
}


def defaults_section() -> str:
    """Each rule's updates ratio with the root coupling and without, over all tasks."""
    rows: list[dict[str, str]] = []
    for study, said in ACTING.items():
        arms = pd.read_parquet(RESULTS / study / "arms.parquet")
        for values, part in arms.groupby(list(said.task), sort=False):
            own = part.set_index("arm")
            for rule, names in RULES.items():
                (name,) = (name for name in names if {name, f"{name}, root"} & set(own.index))
                row = {"task": f"{study}: {', '.join(map(str, values))}", "rule": rule}
                for kind, arm in {"rate follows the root": f"{name}, root", "rate as it was": name}.items():
                    row[kind] = _ratio(own.loc[arm], "updates ratio") if arm in own.index else "-"
                rows.append(row)
    return markdown(rows)
