"""The studies that ``python -m studies run`` knows, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from studies import (
    comparison,
    depth,
    favourable,
    frontier,
    live,
    momentum,
    origin,
    sensitivity,
    study_figures,
    transformer,
    verdicts,
)
from studies.results import load
from studies.sweep import Study

Tables = Callable[[pd.DataFrame, pd.DataFrame], dict[str, pd.DataFrame]]


def _from_runs(tables: Tables) -> Callable[[Path], dict[str, pd.DataFrame]]:
    """``tables`` of the rows and curves in a folder."""

    def read(folder: Path) -> dict[str, pd.DataFrame]:
        name, parent = folder.name, folder.parent
        return tables(load(name, folder=parent), load(name, curves=True, folder=parent))

    return read


STUDIES = {
    study.name: study
    for study in (
        Study(
            "origin",
            "the origin's figures and table, and which choices make its instability appear",
            origin.plan,
            _from_runs(origin.tables),
            figures=study_figures.origin,
            measure=origin.measure,
        ),
        Study(
            "comparison",
            "adaptive against fixed batches, warmup, clipping and more, all tuned alike",
            comparison.plan,
            _from_runs(verdicts.tables),
            figures=study_figures.comparison,
        ),
        Study(
            "live",
            "updates at equal examples and equal loss, with a controller that acts",
            live.plan,
            _from_runs(live.tables),
        ),
        Study(
            "transformer",
            "the same on a character language model, by budget, and the role of the warm-up",
            transformer.plan,
            _from_runs(transformer.tables),
        ),
        Study(
            "sensitivity",
            "how wide the range is in which each method works",
            sensitivity.plan,
            _from_runs(sensitivity.tables),
            figures=study_figures.sensitivity,
        ),
        Study(
            "momentum",
            "seven optimizers at a small and a large batch",
            momentum.plan,
            _from_runs(momentum.tables),
            figures=study_figures.momentum,
        ),
        Study(
            "depth",
            "noise by depth and architecture, exactly",
            lambda *_: [],
            depth.tables,
            measure=depth.measure,
            figures=study_figures.depth,
        ),
        Study(
            "frontier",
            "updates against examples, and where each method lies",
            frontier.plan,
            _from_runs(frontier.tables),
            figures=study_figures.frontier,
        ),
        Study(
            "favourable",
            "where theory says that adapting should pay: a growing noise scale, updates that cost",
            favourable.plan,
            _from_runs(favourable.tables),
            figures=study_figures.favourable,
        ),
    )
}
