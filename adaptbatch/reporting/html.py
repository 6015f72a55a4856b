"""One HTML page that shows runs: loss, batch, noise scale, reasons, decisions. Works offline. No torch.

Everything that the page needs stands in it, plotly's script included; nothing is requested when it is opened.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import pandas as pd

from adaptbatch.reporting.curves import PARTS, draw, draw_tradeoff, unit_of
from adaptbatch.reporting.tables import table_of

if TYPE_CHECKING:
    from adaptbatch.planning.advice import Plan

NEEDED = ("examples_seen", "accumulation_steps", "global_batch", "reason", "loss", "noise_scale")
# Letters of a name in the plot.
NAME = 32
# Rows of the table of decisions.
MOVES = 3000
# Of more runs no page says which batch each would take.
PLANNED = 8


@runtime_checkable
class Tabular(Protocol):
    """A history."""

    def to_pandas(self) -> pd.DataFrame: ...


Source = Tabular | pd.DataFrame | str | PathLike[str]


def report(
    runs: Source | Mapping[str, Source],
    path: str | PathLike[str],
    *,
    title: str = "adaptbatch",
    about: str = "",
    shown: Collection[str] | None = None,
    tables: Mapping[str, pd.DataFrame] | None = None,
    pictures: Mapping[str, str | PathLike[str]] | None = None,
) -> Path:
    """Write one self-contained page about one or more runs.

    It shows, over the examples seen: the loss, the accumulation steps, the noise scale with its interval beside the
    batch, and which reason decided; of up to eight runs that hold evidence, which batch they recommend
    (:func:`adaptbatch.plan`). Below, every move of the batch in a table that can be filtered. Long runs are
    thinned for drawing: of each of 600 parts the smallest and the largest value stay.

    Args:
        runs: A history, its DataFrame, the place of its Parquet file, or a mapping from names to any of these. Of a
            DataFrame the columns ``examples_seen``, ``accumulation_steps``, ``global_batch``, ``reason``, ``loss`` and
            ``noise_scale`` are needed.
        path: Of the page.
        title: Its heading.
        about: A sentence under it.
        shown: Names of the runs that are drawn at first, the others at a click; None: all.
        tables: More tables by their titles, as the claims of a study.
        pictures: PNG or SVG files by their captions; they are put into the page.

    Returns:
        Where the page is.

    Raises:
        ModuleNotFoundError: If plotly is not installed.
        TypeError: If a run is none of these.
        ValueError: If there is no run, or one has no row or lacks a column.

    Example:
        >>> import tempfile
        >>> rows = {"examples_seen": [64.0, 128.0], "accumulation_steps": [2, 2], "global_batch": [64.0, 64.0]}
        >>> rows |= {"reason": ["undecided", "grow"], "loss": [2.0, 1.5], "noise_scale": [float("nan"), 90.0]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = report(pd.DataFrame(rows), folder + "/run.html", title="A run")
        ...     text = page.read_text()
        >>> "A run" in text, "<script src=" in text
        (True, False)
    """
    frames = _frames(runs)
    _check_shown(shown, frames)
    plotly = _plotly()
    short = _short(frames)
    figure = draw({short[name]: frame for name, frame in frames.items()}, shown and {short[name] for name in shown})
    plans = _plans(frames)
    tradeoff = _embedded(draw_tradeoff(plans[0][1]), "tradeoff") if len(frames) == len(plans) == 1 else ""
    rows, moves = decisions(frames)
    unit = unit_of(frames)
    rows = rows.rename(columns={"examples": unit})
    text = _template().render(
        title=title,
        about=about,
        plotlyjs=plotly.offline.get_plotlyjs(),
        plot=_embedded(figure, "plot"),
        plans=[(name, found.recommended.reason, " ".join(found.notes)) for name, found in plans],
        tradeoff=tradeoff,
        summary=_cells(
            pd.DataFrame(summary_row(frame, unit) | {"run": name} for name, frame in frames.items()), first="run"
        ),
        decisions=_cells(rows, first="run"),
        windows=f"{sum(map(len, frames.values())):,}",
        moves=f"{moves:,}",
        cut=moves > len(rows),
        thinned=any(len(frame) > 2 * PARTS for frame in frames.values()),
        names=list(frames),
        reasons=sorted(rows["reason"].unique()),
        tables={name: _cells(table) for name, table in (tables or {}).items()},
        pictures={caption: _data_uri(Path(place)) for caption, place in (pictures or {}).items()},
    )
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")
    return place


def _embedded(figure: Any, name: str) -> str:
    text: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        include_mathjax=False,
        div_id=name,
        config={
            "displaylogo": False,
            "responsive": True,
            "typesetMath": False,
            "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
        },
    )
    return text


def _plans(frames: Mapping[str, pd.DataFrame]) -> list[tuple[str, Plan]]:
    """Of a few runs those that hold evidence, with what it recommends."""
    from adaptbatch.planning.advice import plan

    found = []
    for name, frame in frames.items() if len(frames) <= PLANNED else ():
        # What a page is not about, it leaves out: a run without evidence, a table of fewer columns.
        with suppress(ValueError):
            found.append((name, plan(frame)))
    return found


# What a notebook shows of each window.
SHORT = (
    "optimizer_step",
    "examples_seen",
    "accumulation_steps",
    "global_batch",
    "reason",
    "loss",
    "noise_scale",
    "relative_error",
)


def notebook(frame: pd.DataFrame) -> str:
    """A history in a notebook: its summary, its first and its last windows."""
    if frame.empty:
        return "<p>History of no window yet</p>"
    shown = frame[list(SHORT)]
    ends = shown if len(frame) <= 10 else pd.concat([shown.head(5), shown.tail(5)])
    text = (
        "{% macro grid(table) %}<table><thead><tr>{% for name, _ in table.columns %}<th>{{ name }}</th>{% endfor %}"
        "</tr></thead><tbody>{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>"
        '{% endfor %}</tbody></table>{% endmacro %}<div style="overflow-x: auto">{{ grid(summary) }}'
        "<p>{{ note }}</p>{{ grid(ends) }}</div>"
    )
    note = f"{len(ends)} of {len(frame):,} windows" + (", the first and the last" if len(ends) < len(frame) else "")
    summary = _cells(pd.DataFrame([summary_row(frame, unit_of({"run": frame}))]))
    return str(_environment().from_string(text).render(summary=summary, ends=_cells(ends), note=note))


def summary_row(frame: pd.DataFrame, unit: str = "examples") -> dict[str, Any]:
    """What a run came to, in one row of texts and numbers."""
    loss = frame["loss"].dropna()
    last = frame.iloc[-1]
    counts = frame["reason"].value_counts(normalize=True).head(3)
    return {
        "windows": len(frame),
        unit: float(last["examples_seen"]),
        "final loss": float(loss.tail(max(len(loss) // 20, 1)).mean()) if len(loss) else math.nan,
        "best loss": float(loss.min()) if len(loss) else math.nan,
        "mean batch": float(frame["global_batch"].mean()),
        "k, first to last": f"{frame['accumulation_steps'].iloc[0]:.0f} to {last['accumulation_steps']:.0f}",
        "largest k": int(frame["accumulation_steps"].max()),
        "noise scale at the end": _interval(last),
        "skipped": int(frame["skipped"].sum()) if "skipped" in frame else 0,
        "reasons": ", ".join(f"{reason} {share:.0%}" for reason, share in counts.items()),
    }


def decisions(frames: Mapping[str, pd.DataFrame]) -> tuple[pd.DataFrame, int]:
    """The windows after which the size or its reason is another than before, and how many there are in all.

    Where there are more than 3,000, those at which the size moved come first.
    """
    parts = []
    for name, frame in frames.items():
        steps = frame["accumulation_steps"]
        moved, changed = steps.ne(steps.shift()), frame["reason"].ne(frame["reason"].shift())
        part = frame[moved | changed]
        parts.append(
            pd.DataFrame(
                {
                    "run": name,
                    "examples": part["examples_seen"],
                    "k": part["accumulation_steps"],
                    "batch": part["global_batch"],
                    "reason": part["reason"].astype(str),
                    "target": part.get("target_batch", math.nan),
                    "noise scale": [_interval(row) for _, row in part.iterrows()],
                    "loss": part["loss"],
                    "moved": moved[part.index],
                }
            )
        )
    rows = pd.concat(parts, ignore_index=True)
    kept = rows
    if len(rows) > MOVES:
        kept = rows.sort_values("moved", ascending=False, kind="stable").head(MOVES).sort_index()
    return kept.drop(columns="moved"), len(rows)


def _frames(runs: Source | Mapping[str, Source]) -> dict[str, pd.DataFrame]:
    named = runs if isinstance(runs, Mapping) else {_name(runs): runs}
    if not named:
        raise ValueError("runs must hold at least one run, got none; give a history, its DataFrame or its file.")
    return {str(name): _frame(str(name), source) for name, source in named.items()}


def _name(source: object) -> str:
    return Path(source).stem if isinstance(source, str | PathLike) else "run"


def _frame(name: str, source: object) -> pd.DataFrame:
    frame = table_of(source)
    if frame is None:
        raise TypeError(
            f"runs must be histories, DataFrames or places of Parquet or CSV files, got {type(source).__name__} for "
            f"{name!r}."
        )
    missing = [column for column in NEEDED if column not in frame]
    if missing:
        raise ValueError(
            f"runs must have the columns {list(NEEDED)}, {name!r} lacks {missing}; history.to_pandas() has them."
        )
    if frame.empty:
        raise ValueError(f"runs must have at least one window, {name!r} has none; report after the first step.")
    return frame.reset_index(drop=True)


def _check_shown(shown: Collection[str] | None, frames: Mapping[str, pd.DataFrame]) -> None:
    unknown = set(shown or ()) - set(frames)
    if unknown:
        raise ValueError(f"shown must be names of runs, got {sorted(unknown)}; there are {sorted(frames)}.")


def _short(names: Collection[str]) -> dict[str, str]:
    """Names that fit beside a plot, and are still different."""
    cut = {name: name if len(name) <= NAME else f"{name[: NAME - 3]}..." for name in names}
    if len(set(cut.values())) == len(cut):
        return cut
    return {name: f"{index}: {text}" for index, (name, text) in enumerate(cut.items(), start=1)}


def _interval(row: pd.Series) -> str:
    value = _number(row["noise_scale"])
    if "noise_scale_low" not in row or math.isnan(row["noise_scale_low"]):
        return value
    return f"{value} ({_number(row['noise_scale_low'])} to {_number(row['noise_scale_high'])})"


def _number(value: Any) -> str:
    if isinstance(value, str | bool):
        return str(value)
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "unbounded" if value > 0 else "-unbounded"
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _cells(table: pd.DataFrame, first: str | None = None) -> dict[str, Any]:
    """A table as texts, for the template, which escapes them."""
    columns = [first, *(name for name in table if name != first)] if first else list(table)
    # Row by row, a column of integers would become one of floats.
    rows = [[_number(value) for value in row] for row in zip(*(table[name].tolist() for name in columns), strict=True)]
    kinds = []
    for index, name in enumerate(columns):
        longest = max((len(row[index]) for row in rows), default=0)
        words = pd.api.types.is_string_dtype(table[name]) and not str(name).startswith("noise scale")
        kinds.append("long" if words and longest > 40 else "text" if words else "")
    return {"columns": list(zip(map(str, columns), kinds, strict=True)), "rows": rows}


def _data_uri(picture: Path) -> str:
    kinds = {".png": "image/png", ".svg": "image/svg+xml"}
    if picture.suffix not in kinds:
        raise ValueError(f"pictures must be PNG or SVG files, got {picture.name!r}.")
    return f"data:{kinds[picture.suffix]};base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _template() -> Any:
    return _environment().from_string(
        resources.files("adaptbatch").joinpath("page.html.jinja").read_text(encoding="utf-8")
    )


def _environment() -> Any:
    # Torch brings it.
    import jinja2

    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)


def _plotly() -> Any:
    try:
        import plotly
        import plotly.offline
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'A report is drawn by plotly, which is not installed: pip install "adaptbatch[report]".'
        ) from error
    return plotly
