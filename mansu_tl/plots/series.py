"""What line and point figures share: a look for each series, interval bands, legends below, columns of tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from mansu_tl.errors import MansuError
from mansu_tl.plots.theme import Theme

_COLOURS = {
    "light": ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B8860B", "#7A5195", "#8C564B"),
    "dark": ("#56B4E9", "#F0883E", "#2FBF96", "#E29BC4", "#A9C7FF", "#E6B44C", "#B79CDB", "#C9A08F"),
}
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "star", "cross", "hexagon", "pentagon")


@dataclass(frozen=True)
class Style:
    """How a series is drawn; colour, dash and symbol all differ, so that grey print tells them apart too."""

    colour: str
    dash: str
    symbol: str


def series_styles(labels: Sequence[str], look: Theme, references: Sequence[str] = ()) -> dict[str, Style]:
    """A style for every label; references are grey and dotted."""
    colours = _COLOURS[look.name]
    out: dict[str, Style] = {}
    for label in dict.fromkeys(labels):
        i = len(out) - sum(name in out for name in references)
        out[label] = (
            Style(look.muted, "dot", f"{_SYMBOLS[i % len(_SYMBOLS)]}-open")
            if label in references
            else Style(colours[i % len(colours)], _DASHES[i % len(_DASHES)], _SYMBOLS[i % len(_SYMBOLS)])
        )
    return out


def translucent(colour: str, opacity: float) -> str:
    """A hex colour with an opacity."""
    return f"rgba({int(colour[1:3], 16)}, {int(colour[3:5], 16)}, {int(colour[5:7], 16)}, {opacity})"


def add_band(
    figure: go.Figure,
    x: Sequence[float | int],
    low: Sequence[float | int],
    high: Sequence[float | int],
    colour: str,
    group: str,
    row: int | None = None,
    col: int | None = None,
) -> None:
    """A shaded interval that the legend switches together with its line."""
    figure.add_scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        fill="toself",
        fillcolor=translucent(colour, 0.16),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=group,
        name=f"{group}, band",
        row=row,
        col=col,
    )


def legend_below(figure: go.Figure, bottom: int = 96, top: int | None = None) -> None:
    """A legend in one line under the figure, and room for it."""
    figure.update_layout(
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
        margin={"b": bottom} if top is None else {"b": bottom, "t": top},
    )


def require_columns(what: str, rows: pd.DataFrame, names: Sequence[str]) -> None:
    """Refuse a table that lacks columns or rows.

    Raises:
        MansuError: it does.
    """
    lacking = [name for name in names if name not in rows.columns]
    if lacking:
        raise MansuError(f"{what}: the table has no column {', '.join(lacking)}; it needs {', '.join(names)}")
    if rows.empty:
        raise MansuError(f"{what}: the table has no row to draw; give at least one")


def interval_of(row: pd.Series, name: str) -> tuple[float, float] | None:
    """The interval beside a value, from columns NAME_low and NAME_high; None where there is none."""
    keys = (f"{name}_low", f"{name}_high")
    if any(key not in row.index or pd.isna(row[key]) for key in keys):
        return None
    return float(row[keys[0]]), float(row[keys[1]])
