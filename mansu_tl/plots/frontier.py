"""What is traded for what: many settings as points, and one hyperparameter at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mansu_tl.errors import MansuError
from mansu_tl.plots.labels import label_points
from mansu_tl.plots.panels import (
    Panel,
    Style,
    intervals_of,
    legend_below,
    marker,
    new_panels,
    padded,
    require_columns,
    series_styles,
    whiskers,
)  # fmt: skip
from mansu_tl.plots.theme import new_figure, plain, theme_named, translucent

_COLUMNS, _COLUMNS_OF_MANY = 3, 4  # panels side by side
_CLOSE = 0.09  # of an axis: values nearer to each other are drawn side by side instead of to scale
_RING = 20  # pixels across
_DECADES = 1.2  # spread of positive values from which on an axis is logarithmic
_Box = tuple[float, float, float, float]


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

    Raises:
        MansuError: a column is missing, no row, two settings of one name, or a default that is none of them.
    """
    look, limits = theme_named(theme), dict(bounds or {})
    columns = [y] if isinstance(y, str) else list(y)
    if not columns:
        raise MansuError("frontier: no column for the vertical axis; name at least one in y")
    require_columns("frontier", rows, [name, x, *columns, *([group] if group else [])])
    unknown = [column for column in (*higher_is_better, *limits) if column not in (x, *columns)]
    if unknown:
        raise MansuError(f"frontier: {unknown[0]!r} is neither x nor y; they are {', '.join([x, *columns])}")
    settings = rows[name].astype(str)
    if settings.duplicated().any():
        raise MansuError(f"frontier: two rows are called {settings[settings.duplicated()].iloc[0]!r}; rename one")
    if default is not None and default not in set(settings):
        raise MansuError(f"frontier: default {default!r} is no setting of the table; see its column {name!r}")
    how_to_read = (
        "Joined: no other setting is better in both. "
        + ("Ringed: the default. " if default is not None else "")
        + ("Shaded: within both bounds. " if bounds else "")
        + f"Better: {_better([x], 'right', 'left', higher_is_better)} and "
        + f"{_better(columns, 'up', 'down', higher_is_better)}."
    )
    grid = {"rows": 1, "cols": len(columns), "horizontal_spacing": 0.1}
    figure = new_figure(look, title or "What one setting gives up for another", how_to_read, 520, **grid)
    groups = rows[group].astype(str) if group else pd.Series("settings", index=rows.index)
    looks = series_styles(groups.tolist(), look)
    for col, column in enumerate(columns, 1):
        panel, shown = Panel(figure, look, 1, col, col == 1), rows[rows[x].notna() & rows[column].notna()]
        if shown.empty:
            raise MansuError(f"frontier: no setting has both {x!r} and {column!r}")
        spans = [_span(shown, key, limits.get(key)) for key in (x, column)]
        _shade(panel, (x, column), limits, higher_is_better, spans)
        best, boxes = pareto(shown, x, column, higher_is_better), []
        shape = "hv" if (x in higher_is_better) == (column in higher_is_better) else "vh"
        _front(panel, best, x, column, name, shape)
        boxes += _steps(best[[x, column]].to_numpy(float).tolist(), shape)
        for label, style in looks.items():
            part = shown[groups[shown.index] == label]
            _points(panel, part, x, column, name, label, style, group is not None)
        ringed = shown[shown[name].astype(str) == default]
        size = (900 / len(columns), 350.0)
        if len(ringed):
            at = (float(ringed[x].iloc[0]), float(ringed[column].iloc[0]))
            ring = marker("circle-open", _RING, look.ink, look.ink, 2.4)
            panel.mark([at[0]], [at[1]], f"default: {plain(default)}", "markers", group="default", marker=ring)
            reach = [_RING / 2 * (end - start) / pixels for (start, end), pixels in zip(spans, size, strict=True)]
            boxes.append((at[0] - reach[0], at[1] - reach[1], at[0] + reach[0], at[1] + reach[1]))
        ordered = pd.concat([best, shown.drop(index=best.index)])
        across, up = (ordered[key].astype(float).tolist() for key in (x, column))
        label_points(panel, across, up, ordered[name].astype(str).tolist(), spans, size, boxes)
        figure.update_xaxes(title_text=plain(x), range=spans[0], zeroline=False, col=col)
        figure.update_yaxes(title_text=plain(column), range=spans[1], zeroline=False, col=col)
    legend_below(figure)
    return figure


def pareto(rows: pd.DataFrame, x: str, y: str, higher_is_better: Sequence[str] = ()) -> pd.DataFrame:
    """The rows that no other row matches or beats in both columns (and beats in one), in order of `x`.

    Args:
        higher_is_better: which of the two columns should be large.
    """
    a, b = (rows[key].to_numpy(float) * (-1 if key in higher_is_better else 1) for key in (x, y))
    no_worse = (a[None] <= a[:, None]) & (b[None] <= b[:, None])
    better = (a[None] < a[:, None]) | (b[None] < b[:, None])
    front: pd.DataFrame = rows.iloc[np.flatnonzero(~(no_worse & better).any(1))]
    return front.sort_values([x, y], kind="stable")


def sensitivity(
    rows: pd.DataFrame,
    *,
    defaults: Mapping[str, object] | None = None,
    bound: float | int | None = None,
    least: float | int = 0,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw a measure against one hyperparameter at a time, one panel each, the default marked.

    Args:
        rows: columns hyperparameter, value, measure and result; numbers are drawn to scale (logarithmic where they span
            more than a decade), words side by side. Means over seeds bring columns seeds, and result_low and result_high
            of the lowest and highest seed, which are drawn as bars.
        defaults: by hyperparameter.
        bound: a value of the measures to be reached, drawn as a line.
        least: draw hyperparameters that move a measure by so much, the largest first; the others are named below the
            title. If none does, all are drawn.

    Raises:
        MansuError: a column is missing, no row, two rows for one value and measure, or a default for a hyperparameter
            that is not in the table.
    """
    look = theme_named(theme)
    require_columns("sensitivity", rows, ["hyperparameter", "value", "measure", "result"])
    names, measures = (list(dict.fromkeys(rows[key].astype(str))) for key in ("hyperparameter", "measure"))
    unknown = [key for key in defaults or {} if key not in names]
    if unknown:
        raise MansuError(
            f"sensitivity: default for {unknown[0]!r}, which is not in the table; it has {', '.join(names)}"
        )
    if rows.duplicated(["hyperparameter", "value", "measure"]).any():
        raise MansuError("sensitivity: two rows for one value and measure; give one, the mean over seeds")
    names, still = _by_what_they_move(rows, names, least)
    looks = series_styles(measures, look)
    rows = rows.assign(seeds=rows["seeds"] if "seeds" in rows.columns else 1)
    seeds = int(rows["seeds"].max())
    how_to_read = "One setting is changed at a time, the others stay at their defaults (dashed line)." + (
        f" Means over up to {seeds} seeds; bars: lowest to highest." if seeds > 1 else ""
    )
    if bound is not None:
        how_to_read += f" Dotted: the bound, {bound:g}."
    if still:
        how_to_read += f" These move no result by {least:g}: {', '.join(still)}."
    title, grid = title or "How much each setting matters", {"shared_yaxes": "all", "horizontal_spacing": 0.05}
    across = _COLUMNS if len(names) <= 2 * _COLUMNS else _COLUMNS_OF_MANY
    panels = new_panels(look, title, how_to_read, names, min(across, len(names)), (190, 190), 80, **grid)
    figure = panels[0].figure
    for panel, name in zip(panels, names, strict=True):
        part = rows[rows["hyperparameter"].astype(str) == name]
        scale = _Scale(part["value"].tolist())
        for measure in measures:
            _line(panel, part[part["measure"].astype(str) == measure], measure, scale, looks[measure])
        if defaults and name in defaults:
            line = {"color": look.muted, "width": 1.6, "dash": "dash"}
            figure.add_vline(x=scale.place(defaults[name]), line=line, layer="below", **panel.where)
        if bound is not None:
            panel.level(bound, dash="dot")
        panel.x(tickvals=scale.places, ticktext=scale.texts, tickangle=0, showgrid=False, zeroline=False)
        if panel.col == 1:
            panel.y(title_text=plain(measures[0]) if len(measures) == 1 else "result")
    legend_below(figure, 88, 24)
    if len(measures) == 1:
        figure.update_layout(showlegend=False, margin={"b": 48})
    return figure


def _by_what_they_move(rows: pd.DataFrame, names: list[str], least: float | int) -> tuple[list[str], list[str]]:
    """Hyperparameters that move a measure by `least`, the largest first, and the others."""
    spans = rows.assign(name=rows["hyperparameter"].astype(str)).groupby(["name", "measure"])["result"]
    moved = (spans.max() - spans.min()).groupby("name").max()
    drawn = sorted((name for name in names if moved[name] >= least), key=lambda name: -moved[name]) if least else names
    return (drawn, [name for name in names if name not in drawn]) if drawn else (names, [])


class _Scale:
    """Where the values of a hyperparameter are drawn: to scale, in decades, or side by side."""

    def __init__(self, values: Sequence[object]) -> None:
        unique = list(dict.fromkeys(values))
        self.numeric = all(isinstance(v, int | float | np.number) and not isinstance(v, bool) for v in unique)
        ordered: list[object] = sorted(unique, key=float) if self.numeric else unique  # type: ignore[arg-type]
        numbers = [float(v) for v in ordered] if self.numeric else []  # type: ignore[arg-type]
        self.log = len(numbers) > 1 and numbers[0] > 0 and math.log10(numbers[-1] / numbers[0]) >= _DECADES
        # Values that crowd together are drawn side by side too.
        crowded = not self.log and any(b - a < _CLOSE * (numbers[-1] - numbers[0]) for a, b in pairwise(numbers))
        self.even = not self.numeric or crowded
        self.order = ordered
        self.texts = [f"{v:g}" for v in numbers] if self.numeric else [plain(v) for v in ordered]
        self.places = [self.place(v) for v in ordered]

    def place(self, value: object) -> float:
        """A value's place on the axis."""
        if self.even:
            return float(self.order.index(value)) if value in self.order else math.nan
        return math.log10(float(value)) if self.log else float(value)  # type: ignore[arg-type]


def _line(panel: Panel, part: pd.DataFrame, measure: str, scale: _Scale, style: Style) -> None:
    """Results by value, and bars from the lowest to the highest seed."""
    table = part.set_index("value").reindex(pd.Index(scale.order, dtype=part["value"].dtype))
    results, name = table["result"].astype(float).tolist(), plain(measure)
    lows, highs = intervals_of(table, "result") or (results, results)
    panel.mark(
        scale.places, results, name, "lines+markers" if scale.numeric else "markers", group=name,
        data=list(zip(scale.texts, lows, highs, table["seeds"].fillna(0).astype(int).tolist(), strict=True)),
        hover=f"%{{customdata[0]}}<br>{name}: %{{y:.3g}} (%{{customdata[1]:.3g}} to %{{customdata[2]:.3g}}, "
        "%{customdata[3]} seeds)",
        line={"color": style.colour, "width": 2.2, "dash": style.dash},
        marker={"symbol": style.symbol, "size": 8, "color": style.colour},
        error_y=whiskers(results, lows, highs, style.colour),
    )  # fmt: skip


def _points(
    panel: Panel, part: pd.DataFrame, x: str, y: str, name: str, label: str, style: Style, in_legend: bool
) -> None:
    """The settings of one group, with their intervals."""
    values = [part[key].astype(float).tolist() for key in (x, y)]
    errors = []
    for key, here in zip((x, y), values, strict=True):
        ends = intervals_of(part, key)
        bars = None if ends is None else whiskers(here, *ends, translucent(style.colour, 0.45))
        errors.append(None if bars is None else {**bars, "thickness": 1, "width": 0})
    rim = {"width": 0.8, "color": panel.look.paper}
    panel.mark(
        values[0], values[1], plain(label), "markers", group=plain(label), legend=None if in_legend else False,
        marker={"symbol": style.symbol, "size": 10, "color": style.colour, "line": rim},
        error_x=errors[0], error_y=errors[1], data=[[plain(value)] for value in part[name]],
        hover=f"%{{customdata[0]}}<br>{plain(x)}: %{{x:.3g}}<br>{plain(y)}: %{{y:.3g}}<extra>{plain(label)}</extra>",
    )  # fmt: skip


def _front(panel: Panel, best: pd.DataFrame, x: str, y: str, name: str, shape: str) -> None:
    line = {"color": panel.look.muted, "width": 1.6, "shape": shape}
    data = [[plain(value)] for value in best[name]]
    across, up = (best[key].astype(float).tolist() for key in (x, y))
    panel.mark(across, up, "not beaten in both", line=line, group="front", data=data)


def _steps(points: list[list[float]], shape: str) -> list[_Box]:
    """The stretches of the front's line, as boxes without width."""
    boxes = []
    for (a, b), (c, d) in pairwise(points):
        corner = (c, b) if shape == "hv" else (a, d)
        for (e, f), (g, h) in (((a, b), corner), (corner, (c, d))):
            boxes.append((min(e, g), min(f, h), max(e, g), max(f, h)))
    return boxes


def _shade(
    panel: Panel,
    keys: tuple[str, str],
    bounds: Mapping[str, float | int],
    higher: Sequence[str],
    spans: list[list[float]],
) -> None:
    """The part of a panel that is within both bounds."""
    if not set(keys) & set(bounds):
        return
    ends = []
    for key, (low, high) in zip(keys, spans, strict=True):
        bound = bounds.get(key)
        ends.append((low, high) if bound is None else (bound, high) if key in higher else (low, bound))
    (x0, x1), (y0, y1) = ends
    line = {"width": 1, "color": panel.look.neutral, "dash": "dot"}
    fill = {"line": line, "fillcolor": panel.look.passed, "layer": "below"}
    panel.figure.add_shape(type="rect", x0=x0, x1=x1, y0=y0, y1=y1, **fill, **panel.where)


def _span(shown: pd.DataFrame, column: str, bound: float | int | None) -> list[float]:
    values = shown[column].astype(float).tolist() + ([] if bound is None else [bound])
    for ends in intervals_of(shown, column) or ():
        values += ends
    return padded(min(values), max(values))


def _better(columns: Sequence[str], more: str, less: str, higher: Sequence[str]) -> str:
    """The direction in which columns get better; both where they differ."""
    return " or ".join(dict.fromkeys(more if column in higher else less for column in columns))
