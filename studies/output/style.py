"""What figures share: their style, a colour and a marker for each kind of arm, and how they are saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from studies.output.verdicts import CONTROLS

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 150,
}
# Okabe and Ito's colours; their lightness differs too, and so do the markers, so that grey tells them apart.
KINDS: Mapping[str, tuple[str, str]] = {
    "fixed": ("#999999", "o"),
    "adaptive": ("#0072B2", "D"),
    "control": ("#56B4E9", "s"),
    "other": ("#D55E00", "^"),
}


def kind(arm: str) -> str:
    """To which kind an arm belongs."""
    if arm in CONTROLS:
        return "control"
    first = arm.split()[0].rstrip(",")
    if first in ("pareto", "theta"):
        return "adaptive"
    return first if first in KINDS else "other"


def save(figure: Figure, folder: Path, name: str) -> None:
    """As PNG and as PDF, without a date in it."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png")
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    plt.close(figure)


def short(value: float) -> str:
    """For an axis: thousands as k."""
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
