"""What figures share: one panel's marks, axes and notes; a style for each series; columns of tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mansu_tl.errors import MansuError
from mansu_tl.plots.theme import Theme, new_figure, plain, translucent

_COLOURS = {
    "light": ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B8860B", "#7A5195", "#8C564B"),
    "dark": ("#56B4E9", "#F0883E", "#2FBF96", "#E29BC4", "#A9C7FF", "#E6B44C", "#B79CDB", "#C9A08F"),
}
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "star", "cross", "hexagon", "pentagon")
BARE: dict[str, Any] = {"showgrid": False, "zeroline": False, "showline": False, "ticks": ""}  # an axis of names
PERCENT: dict[str, Any] = {"range": [-4, 104], "tickvals": [0, 25, 50, 75, 100]}
Number = float | int
Numbers = Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class Style:
    """How a series is drawn; colour, dash and symbol all differ, so that grey print tells them apart too."""

    colour: str
    dash: str
    symbol: str

    @property
    def line(self) -> dict[str, Any]:
        """Of the series."""
        return {"color": self.colour, "width": 2.6, "dash": self.dash}

    @property
    def marker(self) -> dict[str, Any]:
        """Of its points."""
        return {"symbol": self.symbol, "size": 8, "line": {"width": 1.4, "color": self.colour}}


def series_styles(labels: Sequence[str], look: Theme, references: Sequence[str] = ()) -> dict[str, Style]:
    """A style for every label; references are grey and dotted."""
    colours = _COLOURS[look.name]
    out: dict[str, Style] = {}
    for label in dict.fromkeys(labels):
        i = len(out) - sum(name in out for name in references)
        symbol = _SYMBOLS[i % len(_SYMBOLS)]
        known = Style(colours[i % len(colours)], _DASHES[i % len(_DASHES)], symbol)
        out[label] = Style(look.muted, "dot", f"{symbol}-open") if label in references else known
    return out


@dataclass(frozen=True)
class Panel:
    """One panel of a figure, and what is drawn into it.

    Row and column count from 1 and are None where there is one panel only. Groups of the `first` stand in the legend;
    those of others do not again.
    """

    figure: go.Figure
    look: Theme
    row: int | None = None
    col: int | None = None
    first: bool = True

    @property
    def where(self) -> dict[str, int]:
        """Row and column, for plotly."""
        return {} if self.row is None or self.col is None else {"row": self.row, "col": self.col}

    def mark(
        self,
        x: Numbers,
        y: Numbers,
        name: str | None = None,
        mode: str = "lines",
        *,
        hover: str = "",
        data: Any = None,
        group: str | None = None,
        legend: bool | None = None,
        **style: Any,
    ) -> None:
        """Points, lines or both.

        `hover` is plotly's template of what a mark tells ("" = nothing), `data` what it knows of each mark, `group` what
        the legend switches together, `legend` whether the name stands there (by default in the group's first panel).
        """
        self.figure.add_scatter(
            x=x, y=y, mode=mode, name=name, customdata=data, **self._shared(hover, group, legend), **style
        )

    def bars(
        self, x: Numbers, y: Numbers, name: str, *, hover: str, data: Any = None, legend: Any = None, **style: Any
    ) -> None:
        """Bars, upright where not said otherwise; see `mark`."""
        self.figure.add_bar(x=x, y=y, name=name, customdata=data, **self._shared(hover, None, legend), **style)

    def heat(
        self, z: Any, scale: Any, ends: Numbers, bar: str, *, hover: str, texts: Any = None, gap: Any = 1, **more: Any
    ) -> None:
        """A heat map with a colour scale, the values at its ends, a title of its bar, and texts in the cells; cells
        without a value show the band's colour."""
        bars = {"title": {"text": bar}, "thickness": 14, "outlinewidth": 0, **more.pop("colorbar", {})}
        self.figure.add_heatmap(
            z=z, zmin=ends[0], zmax=ends[1], colorscale=scale, xgap=gap, ygap=gap, hoverongaps=False, text=texts,
            texttemplate=None if texts is None else "%{text}", textfont={"size": 11}, colorbar=bars,
            hovertemplate=f"{hover}<extra></extra>", **more, **self.where,
        )  # fmt: skip
        self.figure.update_layout(plot_bgcolor=self.look.band)

    def band(self, x: Numbers, low: Numbers, high: Numbers, colour: str, group: str) -> None:
        """A shaded interval that the legend switches together with its line."""
        self.mark(
            [*x, *reversed(x)], [*high, *reversed(low)], f"{group}, band", group=group, legend=False,
            fill="toself", fillcolor=translucent(colour, 0.16), line={"width": 0},
        )  # fmt: skip

    def series(self, x: Numbers, y: Numbers, name: str, style: Style, **details: Any) -> None:
        """A line through points; see `mark`."""
        self.mark(x, y, name, "lines+markers", line=style.line, marker=style.marker, **details)

    def note(self, x: Any, y: Any, text: str, *, size: Number = 11, colour: str | None = None, **place: Any) -> None:
        """Escaped text at a point, muted where no colour is given; "" = the figure's own."""
        font: dict[str, Any] = {"size": size}
        if colour != "":
            font["color"] = colour or self.look.muted
        self.figure.add_annotation(x=x, y=y, text=text, showarrow=False, font=font, **place, **self.where)

    def level(
        self, at: Any, text: str = "", *, upright: bool = False, width: Number = 1.2, dash: str = "dash", **place: Any
    ) -> None:
        """A reference line across the panel, level or upright, and what it is."""
        line = {"color": self.look.muted, "width": width, "dash": dash}
        noted = {
            "annotation_text": text,
            "annotation_position": "top" if upright else "bottom right",
            "annotation_font": {"size": 11, "color": self.look.muted},
            **{f"annotation_{key}": each for key, each in place.items()},
        }
        draw = self.figure.add_vline if upright else self.figure.add_hline
        draw(**{"x" if upright else "y": at}, line=line, **(noted if text else {}), **self.where)

    def x(self, **axis: Any) -> None:
        """Set up the horizontal axis."""
        self.figure.update_xaxes(**axis, **self.where)

    def y(self, **axis: Any) -> None:
        """Set up the vertical axis."""
        self.figure.update_yaxes(**axis, **self.where)

    def rows(self, names: Sequence[str], pad: Number = 0.6, **axis: Any) -> None:
        """One row a name, the first on top."""
        bare = {key: each for key, each in BARE.items() if key != "showgrid"}
        shown = [plain(name) for name in names]
        self.y(tickvals=list(range(len(names))), ticktext=shown, range=[len(names) - 1 + pad, -pad], **(bare | axis))

    def _shared(self, hover: str, group: str | None, legend: bool | None) -> dict[str, Any]:
        shown = legend if legend is not None or self.first or group is None else False
        template = hover if "<extra>" in hover else f"{hover}<extra></extra>"
        tells = {"hovertemplate": template} if hover else {"hoverinfo": "skip"}
        return {"legendgroup": group, "showlegend": shown, **tells, **self.where}


def whiskers(values: Numbers, lows: Numbers, highs: Numbers, colour: str) -> dict[str, Any]:
    """Error bars between the ends of intervals."""
    ends = {
        "array": [max(0.0, float(high - v)) for v, high in zip(values, highs, strict=True)],
        "arrayminus": [max(0.0, float(v - low)) for v, low in zip(values, lows, strict=True)],
    }
    return {"type": "data", "symmetric": False, **ends, "color": colour, "thickness": 1.4, "width": 4}


def marker(symbol: str, size: Number, fill: str, rim: str, width: Number) -> dict[str, Any]:
    """A mark with a rim of some width in pixels."""
    return {"symbol": symbol, "size": size, "color": fill, "line": {"color": rim, "width": width}}


def segments(parts: Sequence[tuple[Numbers, Numbers]]) -> tuple[list[Any], list[Any]]:
    """Separate lines as one, with gaps between them."""
    xs: list[Any] = []
    ys: list[Any] = []
    for x, y in parts:
        xs += [*x, None]
        ys += [*y, None]
    return xs, ys


def legend_below(figure: go.Figure, bottom: int = 96, more: int = 0) -> None:
    """A legend in one line under the figure and room for it, and `more` room on top, for the titles of panels."""
    figure.update_layout(
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
        margin={"b": bottom, "t": figure.layout.margin.t + more},
    )


def new_panel(look: Theme, title: str, subtitle: str, height: Number) -> Panel:
    """The panel of a new figure; see `new_figure`."""
    return Panel(new_figure(look, title, subtitle, height), look)


def new_panels(
    look: Theme,
    title: str,
    subtitle: str,
    names: Sequence[str],
    across: int,
    heights: tuple[int, int],
    gap: int,
    **grid: Any,
) -> list[Panel]:
    """The panels of a new figure, one a name (plain text), `across` of them side by side; see `new_figure`.

    Args:
        heights: in pixels, of all that is around the panels and of each row of them.
        gap: between the rows, in pixels.
    """
    down = math.ceil(len(names) / across)
    height, titles = heights[0] + heights[1] * down, [plain(name) for name in names]
    grid |= {
        "rows": down,
        "cols": across,
        "vertical_spacing": gap / height if down > 1 else 0,
        "subplot_titles": titles,
    }
    figure = new_figure(look, title, subtitle, height, **grid)
    return [Panel(figure, look, i // across + 1, i % across + 1, i == 0) for i in range(len(names))]


def require_columns(what: str, rows: pd.DataFrame, names: Sequence[str]) -> None:
    """Refuse a table that lacks columns or rows with a `MansuError`."""
    lacking = [name for name in names if name not in rows.columns]
    if lacking:
        raise MansuError(f"{what}: the table has no column {', '.join(lacking)}; it needs {', '.join(names)}")
    if rows.empty:
        raise MansuError(f"{what}: the table has no row to draw; give at least one")


def distinct(what: str, labels: Sequence[str]) -> list[str]:
    """The labels; where there is none, or two are alike, a `MansuError`."""
    if not labels:
        raise MansuError(f"{what}: none given; pass at least one result")
    if len(set(labels)) != len(labels):
        raise MansuError(f"{what}: the labels {list(labels)} are not distinct; give each model its own label")
    return list(labels)


def intervals_of(part: pd.DataFrame, name: str) -> tuple[list[float], list[float]] | None:
    """The ends of the intervals beside a column, from NAME_low and NAME_high (its own values where one is missing);
    None where there is none."""
    ends = [f"{name}_low", f"{name}_high"]
    if not set(ends) <= set(part.columns) or part[ends].isna().any(axis=1).all():
        return None
    there = part[ends].notna().all(axis=1)
    low, high = (part[end].where(there, part[name]).astype(float).tolist() for end in ends)
    return low, high


def padded(low: Number, high: Number, share: Number = 0.07) -> list[float]:
    """Ends of an axis with some room beyond the values."""
    pad = share * (high - low or 1.0)
    return [low - pad, high + pad]
