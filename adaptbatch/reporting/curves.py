"""The plots of a page about runs, by plotly: loss, accumulation steps, noise scale and batch, reasons. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from adaptbatch.planning.advice import Plan

# Of a longer run the smallest and the largest value of as many equal parts are drawn.
PARTS = 600
# Slices of the ribbon; each shows the most frequent reason within it.
SLICES = 300
# Okabe and Ito's colours, told apart in grey by lightness and dash.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "solid", "dash", "dot")
REASONS: Mapping[str, str] = {
    "hold": "#DDDDDD",
    "undecided": "#BBBBBB",
    "grow": "#D55E00",
    "growth_limited": "#E69F00",
    "shrink": "#0072B2",
    "at_min": "#56B4E9",
    "at_max": "#882255",
    "signal_lost": "#F0E442",
    "noise_floor": "#CC79A7",
    "nonfinite": "#000000",
    "guard": "#009E73",
}


def unit_of(frames: Mapping[str, pd.DataFrame]) -> str:
    """What the weights of these runs count; of several kinds all are named.

    Example:
        >>> run = pd.DataFrame({"loss": [1.0]})
        >>> run.attrs["unit"] = "tokens"
        >>> unit_of({"a": run, "b": run}), unit_of({"a": run, "b": pd.DataFrame()})
        ('tokens', 'examples or tokens')
    """
    return " or ".join(sorted({str(frame.attrs.get("unit", "examples")) for frame in frames.values()}))


def draw(frames: Mapping[str, pd.DataFrame], shown: Collection[str] | None = None) -> Figure:
    """The plots: loss, accumulation steps, noise scale and batch, reasons."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=4,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.055,
        row_heights=[0.3, 0.21, 0.36, 0.13],
        subplot_titles=(
            "loss",
            "accumulation steps k",
            "noise scale B (95 % interval), batch n (thin)",
            "reasons",
        ),
    )
    positive = all((frame["loss"].dropna() > 0).all() for frame in frames.values())
    for index, (name, frame) in enumerate(frames.items()):
        visible = True if shown is None or name in shown else "legendonly"
        style = {"color": COLOURS[index % len(COLOURS)], "dash": DASHES[index % len(DASHES)]}
        common = {"legendgroup": name, "visible": visible, "mode": "lines"}
        for row, column, shape in (
            (1, "loss", "linear"),
            (2, "accumulation_steps", "hv"),
            (3, "noise_scale", "linear"),
        ):
            part = thinned(frame, column)
            figure.add_scatter(
                x=part["examples_seen"],
                y=part[column].replace(math.inf, math.nan),
                line=style | {"shape": shape, "width": 1.8},
                name=name,
                showlegend=row == 1,
                row=row,
                col=1,
                **common,
            )
        part = thinned(frame, "global_batch")
        figure.add_scatter(
            x=part["examples_seen"],
            y=part["global_batch"],
            line={"color": style["color"], "width": 0.8, "shape": "hv"},
            name=f"batch, {name}",
            showlegend=False,
            row=3,
            col=1,
            **common,
        )
        _band(figure, frame, name, style["color"], visible)
    _ribbon(figure, {name: frame for name, frame in frames.items() if shown is None or name in shown})
    figure.update_yaxes(type="log" if positive else "linear", row=1, col=1)
    largest = max(frame["accumulation_steps"].max() for frame in frames.values())
    powers = [2**i for i in range(math.ceil(math.log2(largest)) + 1)]
    ends = [math.log10(0.8), math.log10(1.25 * max(powers[-1], 2))]
    figure.update_yaxes(type="log", tickvals=powers, range=ends, minor={"showgrid": False}, row=2, col=1)
    figure.update_yaxes(type="log", row=3, col=1)
    figure.update_xaxes(title_text=f"{unit_of(frames)} seen", row=4, col=1)
    figure.update_layout(
        template="plotly_white",
        height=900,
        margin={"l": 60, "r": 20, "t": 60, "b": 50},
        barmode="stack",
        hovermode="closest",
        legend={"orientation": "h", "y": -0.07, "yanchor": "top"},
        font={"family": "system-ui, sans-serif", "size": 12},
    )
    return figure


def draw_tradeoff(plan: Plan) -> Figure:
    """Steps, examples and seconds over the batch, with their intervals and the recommended batch."""
    from plotly.graph_objects import Figure

    figure, table = Figure(), plan.table
    batches = table["batch"].tolist()
    kinds = (("steps", "steps"), ("examples", plan.unit), ("seconds", f"seconds, devices: {plan.recommended.devices}"))
    for (kind, name), colour in zip(kinds, COLOURS, strict=False):
        values = table[f"{kind}_factor"]
        if values.isna().any():
            continue
        dash = "dash" if kind == "seconds" else "solid"
        style = {"color": colour, "width": 1.8, "dash": dash}
        figure.add_scatter(x=batches, y=values, mode="lines+markers", name=f"{name} / least", line=style)
        if kind == "seconds":
            continue
        high = table[f"{kind}_factor_high"].clip(upper=10.0 * values.max()).tolist()
        _between(figure, batches, table[f"{kind}_factor_low"].tolist(), high, colour)
    figure.add_vline(x=plan.recommended.batch, line={"color": "#666666", "width": 1, "dash": "dot"})
    figure.update_xaxes(type="log", title_text=f"batch [{plan.unit}]", tickvals=batches, tickformat=",.0f")
    top = table[["steps_factor", "examples_factor"]].replace(math.inf, math.nan).max().max()
    figure.update_yaxes(type="log", title_text="over the least [1]", range=[-0.05, math.log10(1.4 * top)])
    figure.update_layout(
        template="plotly_white",
        height=380,
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        font={"family": "system-ui, sans-serif", "size": 12},
    )
    return figure


def thinned(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Of a long run the first, the last, the smallest and the largest row of each of 600 parts, by ``column``.

    Example:
        >>> rows = pd.DataFrame({"x": range(100_000)}).assign(y=0.0)
        >>> rows.loc[54_321, "y"] = 9.0
        >>> part = thinned(rows, "y")
        >>> len(part) <= 4 * 600, part["y"].max(), part["x"].iloc[-1]
        (True, np.float64(9.0), np.int64(99999))
    """
    if len(frame) <= 2 * PARTS:
        return frame
    values = frame[column].to_numpy(float)
    kept: set[int] = set()
    for part in np.array_split(np.arange(len(frame)), PARTS):
        own = values[part]
        kept |= {int(part[0]), int(part[-1])}
        if not np.isnan(own).all():
            kept |= {int(part[np.nanargmin(own)]), int(part[np.nanargmax(own)])}
    return frame.iloc[sorted(kept)]


def segments(frame: pd.DataFrame) -> Iterator[tuple[float, float, str]]:
    """Stretches of one reason: where it starts, how long it is [examples], which.

    Example:
        >>> rows = pd.DataFrame({"examples_seen": [10.0, 20.0, 30.0], "reason": ["hold", "hold", "grow"]})
        >>> list(segments(rows))
        [(0.0, 20.0, 'hold'), (20.0, 10.0, 'grow')]
    """
    ends, reasons = frame["examples_seen"].to_numpy(float), frame["reason"].astype(str).to_numpy()
    if len(frame) > SLICES:
        edges = np.linspace(0.0, ends[-1], SLICES + 1)
        place = np.clip(np.searchsorted(edges, ends, side="left") - 1, 0, SLICES - 1)
        most = pd.Series(reasons).groupby(place).agg(lambda own: own.value_counts().index[0])
        ends, reasons = edges[most.index + 1], most.to_numpy()
    starts = np.concatenate([[0.0], ends[:-1]])
    first = np.flatnonzero(np.concatenate([[True], reasons[1:] != reasons[:-1]]))
    last = np.concatenate([first[1:] - 1, [len(reasons) - 1]])
    for i, j in zip(first, last, strict=True):
        yield float(starts[i]), float(ends[j] - starts[i]), str(reasons[i])


def _between(figure: Figure, x: list[float], low: list[float], high: list[float], colour: str, **more: Any) -> None:
    """The area between two curves, which no legend names."""
    figure.add_scatter(
        x=x + x[::-1],
        y=high + low[::-1],
        fill="toself",
        fillcolor=colour,
        opacity=0.14,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        **more,
    )


def _band(figure: Figure, frame: pd.DataFrame, name: str, colour: str, visible: bool | str) -> None:
    """The interval of the noise scale; where it is unbounded it is drawn up to ten times the largest finite value."""
    if not {"noise_scale_low", "noise_scale_high"} <= set(frame):
        return
    part = thinned(frame, "noise_scale_high")
    part = part[part["noise_scale_low"].notna()]
    finite = part["noise_scale_high"].replace(math.inf, math.nan)
    top = 10.0 * np.nanmax([*finite, *part["noise_scale"].replace(math.inf, math.nan), 1.0])
    x, high = part["examples_seen"].tolist(), part["noise_scale_high"].replace(math.inf, top).tolist()
    # A logarithmic axis has no zero.
    low = part["noise_scale_low"].clip(lower=top * 1e-9).tolist()
    place = {"legendgroup": name, "visible": visible, "row": 3, "col": 1}
    _between(figure, x, low, high, colour, name=f"interval, {name}", **place)
    bounded = part[["noise_scale", "noise_scale_low"]].replace(math.inf, math.nan)
    if bounded["noise_scale"].notna().any():
        largest, smallest = bounded["noise_scale"].max(), bounded["noise_scale"].min()
        limits = [math.log10(max(smallest, 1e-3) / 8), math.log10(max(largest, frame["global_batch"].max()) * 8)]
        figure.update_yaxes(range=limits, row=3, col=1)


def _ribbon(figure: Figure, frames: Mapping[str, pd.DataFrame]) -> None:
    by_reason: dict[str, list[tuple[str, float, float]]] = {}
    for name, frame in frames.items():
        for start, width, reason in segments(frame):
            by_reason.setdefault(reason, []).append((name, start, width))
    for reason, pieces in by_reason.items():
        figure.add_bar(
            y=[name for name, _, _ in pieces],
            base=[start for _, start, _ in pieces],
            x=[width for _, _, width in pieces],
            orientation="h",
            marker={"color": REASONS.get(reason, "#FFFFFF"), "line": {"width": 0}},
            name=reason,
            legendgroup=f"reason {reason}",
            hovertemplate=f"{reason}<extra>%{{y}}</extra>",
            row=4,
            col=1,
        )
