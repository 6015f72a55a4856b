"""``python -m studies report``: a study, all studies, or a user's own runs as one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

import adaptbatch as ab
from studies.engine.results import load, read_table
from studies.output.verdicts import fixed_arms

# Tables of a study that are too long to be read on a page.
LONG = ("runs", "curves", "noise", "histograms", "results", "time")
DRAWN = ("adaptive", "pareto")


def study_page(name: str, about: str, folder: Path, out: Path) -> Path:
    """The page of one study: its claims and tables, its figures, one run of each of its arms."""
    return ab.report(
        runs := median_runs(name, folder),
        out,
        title=f"adaptbatch: {name}",
        about=f"{about[0].upper()}{about[1:]}. Of every arm the run is drawn whose end is the median of its seeds.",
        shown=first_drawn(runs),
        tables=tables(folder / name),
        pictures=pictures(folder / name),
    )


def own_page(files: list[Path], out: Path) -> Path:
    """The page of a user's runs, from their histories' Parquet files."""
    return ab.report({path.stem: path for path in files}, out, title=", ".join(path.stem for path in files))


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """A study's tables, the claims first."""
    names = sorted(path.stem for path in folder.glob("*.parquet") if path.stem not in LONG)
    names.sort(key=lambda name: name != "claims")
    return {f"{folder.name}: {name}": read_table(folder / f"{name}.parquet") for name in names}


def pictures(folder: Path) -> dict[str, Path]:
    """A study's figures."""
    return {f"{folder.name}: {path.stem}": path for path in sorted(folder.glob("*.png"))}


def median_runs(name: str, folder: Path) -> dict[str, pd.DataFrame]:
    """Of every network and arm the reported run whose ``final`` is the median of its seeds, by a name for the page."""
    curves = load(name, curves=True, folder=folder)
    runs = load(name, folder=folder)
    stage = next(
        one for one in ("final", "table", "examples", "choice", "knob", "tune") if (runs["stage"] == one).any()
    )
    groups = [column for column in ("network", "data", "arm") if column in runs]
    found = {}
    for labels, part in runs[runs["stage"] == stage].groupby(groups, sort=False):
        ordered = part.sort_values("final")
        key = ordered["key"].iloc[(len(ordered) - 1) // 2]
        own = curves[(curves["key"] == key) & (curves["stage"] == stage)]
        if len(own):
            found[", ".join(dict.fromkeys(map(str, labels)))] = own.drop_duplicates("examples_seen")
    return found


def first_drawn(runs: Mapping[str, pd.DataFrame]) -> list[str]:
    """The adaptive arms of the first network and its smallest and largest fixed batch: the rest at a click."""
    names = list(runs)
    network = names[0].split(", ")[0]
    own = {name.split(", ", 2)[-1]: name for name in names if name.startswith(f"{network}, ")}
    fixed = fixed_arms(pd.DataFrame({"arm": list(own)}))
    chosen = [arm for arm in own if arm in DRAWN] + fixed[:1] + fixed[-1:]
    return [own[arm] for arm in dict.fromkeys(chosen)] or names[:4]
