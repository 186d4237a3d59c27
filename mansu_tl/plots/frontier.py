"""What is traded for what: many settings as points, and one hyperparameter at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mansu_tl.errors import MansuError
from mansu_tl.plots.labels import label_points
from mansu_tl.plots.series import interval_of, legend_below, require_columns, series_styles, translucent
from mansu_tl.plots.theme import Theme, plain, styled, theme_named

_COLUMNS = 3  # panels side by side
_CLOSE = 0.09  # of an axis: values nearer to each other are drawn side by side instead of to scale
_RING = 20  # pixels across
_DECADES = 1.2  # spread of positive values from which on an axis is logarithmic


def frontier(
    rows: pd.DataFrame,
    x: str,
    y: str | Sequence[str],
    *,
    name: str = "setting",
    group: str | None = None,
    default: str | None = None,
    higher_is_better: Sequence[str] = (),
    bounds: Mapping[str, float | int] | None = None,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw settings as points, one panel a column of `y`, with the points joined that no other beats in both.

    Args:
        rows: one row a setting; intervals are drawn where there are columns NAME_low and NAME_high.
        x: column of the horizontal axis, e.g. "forget MC, %".
        y: column or columns of the vertical axes, e.g. "retain drop, points" and "relearning excess, points".
        name: column that names the settings.
        group: column by which points get colour and symbol, such as the method.
        default: the setting that is ringed and named as the default.
        higher_is_better: columns of `x` and `y` that should be large; the others should be small.
        bounds: values to be reached, by column; the part of a panel that is within both is shaded.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: a column is missing, no row, two settings of one name, or a default that is none of them.
    """
    look = theme_named(theme)
    names = [y] if isinstance(y, str) else list(y)
    if not names:
        raise MansuError("frontier: no column for the vertical axis; name at least one in y")
    require_columns("frontier", rows, [name, x, *names, *([group] if group else [])])
    unknown = [column for column in (*higher_is_better, *(bounds or {})) if column not in (x, *names)]
    if unknown:
        raise MansuError(f"frontier: {unknown[0]!r} is neither x nor y; they are {', '.join([x, *names])}")
    settings = rows[name].astype(str)
    if settings.duplicated().any():
        raise MansuError(f"frontier: two rows are called {settings[settings.duplicated()].iloc[0]!r}; rename one")
    if default is not None and default not in set(settings):
        raise MansuError(f"frontier: default {default!r} is no setting of the table; see its column {name!r}")
    figure = make_subplots(rows=1, cols=len(names), horizontal_spacing=0.1)
    styled(
        figure,
        look,
        title or "What one setting gives up for another",
        "Joined: no other setting is better in both. "
        + ("Ringed: the default. " if default is not None else "")
        + ("Shaded: within both bounds. " if bounds else "")
        + f"Better: {_better([x], 'right', 'left', higher_is_better)} and "
        + f"{_better(names, 'up', 'down', higher_is_better)}.",
        height=520,
    )
    groups = list(dict.fromkeys(rows[group].astype(str))) if group else ["settings"]
    looks = series_styles(groups, look)
    for col, column in enumerate(names, 1):
        shown = rows[rows[x].notna() & rows[column].notna()].reset_index(drop=True)
        if shown.empty:
            raise MansuError(f"frontier: no setting has both {x!r} and {column!r}")
        spans = [_span(shown, key, (bounds or {}).get(key)) for key in (x, column)]
        _shade(figure, x, column, bounds or {}, higher_is_better, spans, look, col)
        _front(figure, shown, x, column, name, higher_is_better, look, col)
        for label in groups:
            part = shown[shown[group].astype(str) == label] if group else shown
            style = looks[label]
            figure.add_scatter(
                x=part[x].astype(float).tolist(),
                y=part[column].astype(float).tolist(),
                mode="markers",
                name=plain(label),
                legendgroup=plain(label),
                showlegend=col == 1 and group is not None,
                marker={
                    "symbol": style.symbol,
                    "size": 10,
                    "color": style.colour,
                    "line": {"width": 0.8, "color": look.paper},
                },
                error_x=_errors(part, x, style.colour),
                error_y=_errors(part, column, style.colour),
                customdata=[[plain(value)] for value in part[name]],
                hovertemplate=f"%{{customdata[0]}}<br>{plain(x)}: %{{x:.3g}}<br>{plain(column)}: %{{y:.3g}}"
                f"<extra>{plain(label)}</extra>",
                row=1,
                col=col,
            )
        if default is not None and default in set(shown[name].astype(str)):
            _ring(figure, shown[shown[name].astype(str) == default].iloc[0], x, column, default, look, col)
        best = pareto(shown, x, column, higher_is_better)
        first = pd.concat([best, shown.drop(index=best.index)])
        across, up = (first[key].astype(float).tolist() for key in (x, column))
        size = (900 / len(names), 350.0)
        drawn = _steps(best, x, column, higher_is_better)
        if default is not None:
            drawn += _ringed(shown[shown[name].astype(str) == default], x, column, spans, size)
        label_points(figure, across, up, first[name].astype(str).tolist(), spans, size, look, col, drawn)
        figure.update_xaxes(title_text=plain(x), range=spans[0], zeroline=False, col=col)
        figure.update_yaxes(title_text=plain(column), range=spans[1], zeroline=False, col=col)
    legend_below(figure)
    return figure


def pareto(rows: pd.DataFrame, x: str, y: str, higher_is_better: Sequence[str] = ()) -> pd.DataFrame:
    """The rows that no other row matches or beats in both columns (and beats in one), in order of `x`.

    Args:
        higher_is_better: which of the two columns should be large.
    """
    a = rows[x].to_numpy(float) * (-1 if x in higher_is_better else 1)
    b = rows[y].to_numpy(float) * (-1 if y in higher_is_better else 1)
    no_worse = (a[None] <= a[:, None]) & (b[None] <= b[:, None])
    better = (a[None] < a[:, None]) | (b[None] < b[:, None])
    front: pd.DataFrame = rows.iloc[np.flatnonzero(~(no_worse & better).any(1))]
    return front.sort_values([x, y], kind="stable")


def sensitivity(
    rows: pd.DataFrame,
    *,
    defaults: Mapping[str, object] | None = None,
    bound: float | int | None = None,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw a measure against one hyperparameter at a time, one panel each, the default marked.

    With several seeds the line runs through their means and a bar spans the lowest to the highest.

    Args:
        rows: columns hyperparameter, value, measure and result, and seed where there are several; numbers are drawn to
            scale (logarithmic where they span more than a decade), words side by side.
        defaults: by hyperparameter.
        bound: a value of the measures to be reached, drawn as a line.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: a column is missing, no row, or a default for a hyperparameter that is not in the table.
    """
    look = theme_named(theme)
    require_columns("sensitivity", rows, ["hyperparameter", "value", "measure", "result"])
    names = list(dict.fromkeys(rows["hyperparameter"].astype(str)))
    unknown = [key for key in defaults or {} if key not in names]
    if unknown:
        raise MansuError(
            f"sensitivity: default for {unknown[0]!r}, which is not in the table; it has {', '.join(names)}"
        )
    measures = list(dict.fromkeys(rows["measure"].astype(str)))
    looks = series_styles(measures, look)
    across = min(_COLUMNS, len(names))
    down = math.ceil(len(names) / across)
    figure = make_subplots(
        rows=down,
        cols=across,
        shared_yaxes="all",
        horizontal_spacing=0.05,
        vertical_spacing=0.26 / down,
        subplot_titles=[plain(name) for name in names],
    )
    seeds = rows["seed"].nunique() if "seed" in rows.columns else 1
    styled(
        figure,
        look,
        title or "How much each setting matters",
        "One setting is changed at a time, the others stay at their defaults (dashed line)."
        + (f" Means over up to {seeds} seeds; bars: lowest to highest." if seeds > 1 else ""),
        height=190 + 230 * down,
    )
    for at, name in enumerate(names):
        where = {"row": at // across + 1, "col": at % across + 1}
        part = rows[rows["hyperparameter"].astype(str) == name]
        scale = _Scale(part["value"].tolist())
        for measure in measures:
            _line(figure, part[part["measure"].astype(str) == measure], measure, scale, looks[measure], at == 0, where)
        if defaults and name in defaults:
            figure.add_vline(
                x=scale.place(defaults[name]),
                line={"color": look.muted, "width": 1.6, "dash": "dash"},
                layer="below",
                **where,
            )
        if bound is not None:
            figure.add_hline(y=bound, line={"color": look.muted, "width": 1.2, "dash": "dot"}, **where)
        figure.update_xaxes(tickvals=scale.places, ticktext=scale.texts, showgrid=False, zeroline=False, **where)
        if where["col"] == 1:
            figure.update_yaxes(title_text=plain(measures[0]) if len(measures) == 1 else "result", **where)
    figure.update_annotations(font={"size": 13})
    legend_below(figure, 88, figure.layout.margin.t + 24)
    if len(measures) == 1:
        figure.update_layout(showlegend=False, margin={"b": 48})
    return figure


class _Scale:
    """Where the values of a hyperparameter are drawn: to scale, in decades, or side by side."""

    def __init__(self, values: Sequence[object]) -> None:
        unique = list(dict.fromkeys(values))
        self.numeric = all(isinstance(v, int | float | np.number) and not isinstance(v, bool) for v in unique)
        ordered: list[object] = sorted(unique, key=float) if self.numeric else unique  # type: ignore[arg-type]
        self.log = False
        if self.numeric and len(ordered) > 1 and float(ordered[0]) > 0:  # type: ignore[arg-type]
            self.log = math.log10(float(ordered[-1]) / float(ordered[0])) >= _DECADES  # type: ignore[arg-type]
        # Values that crowd together are drawn side by side too.
        places = [float(v) for v in ordered] if self.numeric and not self.log else []  # type: ignore[arg-type]
        crowded = any(b - a < _CLOSE * (places[-1] - places[0]) for a, b in pairwise(places))
        self.even = not self.numeric or crowded
        self.order = ordered
        self.texts = [f"{float(v):g}" if self.numeric else plain(v) for v in ordered]  # type: ignore[arg-type]
        self.places = [self.place(v) for v in ordered]

    def place(self, value: object) -> float:
        """A value's place on the axis."""
        if self.even:
            return float(self.order.index(value)) if value in self.order else math.nan
        return math.log10(float(value)) if self.log else float(value)  # type: ignore[arg-type]


def _line(
    figure: go.Figure,
    part: pd.DataFrame,
    measure: str,
    scale: _Scale,
    style: object,
    first: bool,
    where: dict[str, int],
) -> None:
    means, lows, highs, counts = [], [], [], []
    for value in scale.order:
        results = part.loc[part["value"] == value, "result"].to_numpy(float)
        results = results[~np.isnan(results)]
        counts.append(len(results))
        means.append(results.mean() if len(results) else math.nan)
        lows.append(results.min() if len(results) else math.nan)
        highs.append(results.max() if len(results) else math.nan)
    colour, dash, symbol = (getattr(style, key) for key in ("colour", "dash", "symbol"))
    figure.add_scatter(
        x=scale.places,
        y=means,
        mode="lines+markers" if scale.numeric else "markers",
        name=plain(measure),
        legendgroup=plain(measure),
        showlegend=first,
        line={"color": colour, "width": 2.2, "dash": dash},
        marker={"symbol": symbol, "size": 8, "color": colour},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": (np.array(highs) - np.array(means)).tolist(),
            "arrayminus": (np.array(means) - np.array(lows)).tolist(),
            "color": colour,
            "thickness": 1.4,
            "width": 4,
        },
        customdata=list(zip(scale.texts, lows, highs, counts, strict=True)),
        hovertemplate=f"%{{customdata[0]}}<br>{plain(measure)}: %{{y:.3g}} (%{{customdata[1]:.3g}} to "
        "%{customdata[2]:.3g}, %{customdata[3]} seeds)<extra></extra>",
        **where,
    )


def _front(
    figure: go.Figure,
    shown: pd.DataFrame,
    x: str,
    y: str,
    name: str,
    higher: Sequence[str],
    look: Theme,
    col: int,
) -> None:
    front = pareto(shown, x, y, higher)
    figure.add_scatter(
        x=front[x].astype(float).tolist(),
        y=front[y].astype(float).tolist(),
        mode="lines",
        name="not beaten in both",
        legendgroup="front",
        showlegend=col == 1,
        line={"color": look.muted, "width": 1.6, "shape": _shape(x, y, higher)},
        customdata=[[plain(value)] for value in front[name]],
        hoverinfo="skip",
        row=1,
        col=col,
    )


def _shape(x: str, y: str, higher: Sequence[str]) -> str:
    return "hv" if (x in higher) == (y in higher) else "vh"


def _steps(front: pd.DataFrame, x: str, y: str, higher: Sequence[str]) -> list[tuple[float, float, float, float]]:
    """The stretches of the front's line, as boxes without width."""
    points = list(zip(front[x].astype(float), front[y].astype(float), strict=True))
    boxes = []
    for (a, b), (c, d) in pairwise(points):
        corner = (c, b) if _shape(x, y, higher) == "hv" else (a, d)
        for (e, f), (g, h) in (((a, b), corner), (corner, (c, d))):
            boxes.append((min(e, g), min(f, h), max(e, g), max(f, h)))
    return boxes


def _ringed(
    rows: pd.DataFrame, x: str, y: str, spans: list[list[float]], size: tuple[float, float]
) -> list[tuple[float, float, float, float]]:
    """The box of the ring around the default."""
    reach = [_RING / 2 * (end - start) / pixels for (start, end), pixels in zip(spans, size, strict=True)]
    centres = zip(rows[x].astype(float), rows[y].astype(float), strict=True)
    return [(a - reach[0], b - reach[1], a + reach[0], b + reach[1]) for a, b in centres]


def _ring(figure: go.Figure, row: pd.Series, x: str, y: str, default: str, look: Theme, col: int) -> None:
    figure.add_scatter(
        x=[float(row[x])],
        y=[float(row[y])],
        mode="markers",
        name=f"default: {plain(default)}",
        legendgroup="default",
        showlegend=col == 1,
        marker={"symbol": "circle-open", "size": _RING, "color": look.ink, "line": {"width": 2.4, "color": look.ink}},
        hoverinfo="skip",
        row=1,
        col=col,
    )


def _shade(
    figure: go.Figure,
    x: str,
    y: str,
    bounds: Mapping[str, float | int],
    higher: Sequence[str],
    spans: list[list[float]],
    look: Theme,
    col: int,
) -> None:
    if x not in bounds and y not in bounds:
        return
    ends = []
    for key, (low, high) in zip((x, y), spans, strict=True):
        bound = bounds.get(key)
        ends.append((low, high) if bound is None else (bound, high) if key in higher else (low, bound))
    figure.add_shape(
        type="rect",
        x0=ends[0][0],
        x1=ends[0][1],
        y0=ends[1][0],
        y1=ends[1][1],
        layer="below",
        line={"width": 1, "color": look.neutral, "dash": "dot"},
        fillcolor=look.passed,
        row=1,
        col=col,
    )


def _span(shown: pd.DataFrame, column: str, bound: float | int | None) -> list[float]:
    values = shown[column].astype(float).tolist() + ([] if bound is None else [bound])
    for _, row in shown.iterrows():
        values += interval_of(row, column) or ()
    low, high = min(values), max(values)
    pad = 0.07 * (high - low or 1.0)
    return [low - pad, high + pad]


def _errors(part: pd.DataFrame, column: str, colour: str) -> dict[str, object] | None:
    found = [interval_of(row, column) for _, row in part.iterrows()]
    if not any(found):
        return None
    values = part[column].astype(float)
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, i[1] - v) if i else 0.0 for i, v in zip(found, values, strict=True)],
        "arrayminus": [max(0.0, v - i[0]) if i else 0.0 for i, v in zip(found, values, strict=True)],
        "color": translucent(colour, 0.45),
        "thickness": 1,
        "width": 0,
    }


def _better(columns: Sequence[str], more: str, less: str, higher: Sequence[str]) -> str:
    """The direction in which columns get better; both where they differ."""
    return " or ".join(dict.fromkeys(more if column in higher else less for column in columns))
