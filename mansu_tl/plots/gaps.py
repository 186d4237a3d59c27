"""The PTQ gap: what forgetting is worth before and after quantization, as dumbbells and as a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mansu_tl.errors import MansuError
from mansu_tl.plots.panels import (
    BARE,
    Panel,
    intervals_of,
    legend_below,
    new_panel,
    new_panels,
    require_columns,
    segments,
    whiskers,
)  # fmt: skip
from mansu_tl.plots.theme import number, plain, signed, theme_named

_ACROSS = 3
_MANY, _PITCH, _PITCH_OF_MANY = 12, 34, 24  # lines, and pixels a line
_CLOSE = 30.0  # points: marks that span no more are drawn on a part of the axis


def ptq_gap(
    rows: pd.DataFrame,
    *,
    panels: str = "base",
    chance: float | int | None = None,
    measure: str = "forget accuracy, %",
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw accuracy on the forget questions before and after quantization as dumbbells, one line a method.

    Ring: full precision; filled: quantized. A gap to the right (filled mark above the ring) means that knowledge came back.

    Args:
        rows: columns method, quantizer, before and after, and that of `panels`; accuracies in percent. Means over seeds
            bring columns seeds, and before_low, before_high and likewise for after and gap, which are drawn as thin bars.
        panels: the column of which each value gets a panel, "base" or "quantizer".
        chance: accuracy of guessing, in percent, drawn as a line.
        measure: what the accuracies are.

    Raises:
        MansuError: no row, a column is missing, or two rows for one line.
    """
    look = theme_named(theme)
    tidy = _with_gaps("ptq gap", rows, [panels])
    several = panels != "quantizer" and tidy["quantizer"].nunique() > 1
    tidy["line"] = tidy["method"] + (", " + tidy["quantizer"] if several else "")
    names, lines = list(dict.fromkeys(tidy[panels])), list(dict.fromkeys(tidy["line"]))
    if tidy.duplicated([panels, "line"]).any():
        raise MansuError("ptq gap: two rows for one method and quantizer; give one, the mean over seeds")
    many, fewest = int(tidy["seeds"].max()), int(tidy["seeds"].min())
    how_to_read = (
        "Ring: full precision; filled: quantized. To the right of its ring = knowledge came back (positive PTQ gap)."
        + (
            f" Means over {'up to ' if fewest < many else ''}{many} seeds, thin bars from the lowest to the highest."
            if many > 1
            else ""
        )
    )
    alike = panels != "quantizer" and not several
    heading = title or "Does quantization bring it back?" + (f" ({tidy['quantizer'].iloc[0]})" if alike else "")
    across, grid = min(_ACROSS, len(names)), {"shared_yaxes": True, "horizontal_spacing": 0.03}
    shown = [f"base: {name}" if panels == "base" else name for name in names] if len(names) > 1 else [""]
    pitch = _PITCH if len(lines) <= _MANY else _PITCH_OF_MANY
    drawn = new_panels(look, heading, how_to_read, shown, across, (210, pitch * len(lines) + 76), 84, **grid)
    figure = drawn[0].figure
    for panel, name in zip(drawn, names, strict=True):
        _dumbbells(panel, tidy[tidy[panels] == name], lines, measure)
        if chance is not None:
            line = {"color": look.muted, "width": 1.3, "dash": "dash"}
            ends = [-0.6, len(lines) - 0.4]
            panel.mark([chance, chance], ends, f"chance ({number(chance)})", line=line, group="chance")
        panel.rows(lines)
    figure.update_xaxes(**_percents(tidy, chance), zeroline=False)
    for panel in drawn[-across:]:  # the lowest of each column
        panel.x(title_text=plain(measure))
    legend_below(figure, 92, 24)
    return figure


def gap_matrix(
    rows: pd.DataFrame, *, measure: str = "forget multiple choice", title: str | None = None, theme: str = "light"
) -> go.Figure:
    """Draw the PTQ gap of every method under every quantizer as a matrix, numbers in the cells.

    Args:
        rows: as for `ptq_gap`.
        measure: what the accuracies are.

    Raises:
        MansuError: no row, or a column is missing.
    """
    look = theme_named(theme)
    tidy = _with_gaps("gap matrix", rows, [])
    quantizers, methods = (list(dict.fromkeys(tidy[key])) for key in ("quantizer", "method"))
    table = tidy.set_index(["method", "quantizer"]).reindex(pd.MultiIndex.from_product([methods, quantizers]))
    z = table["gap"].to_numpy(float).reshape(len(methods), -1)
    data = [
        [signed(low), signed(high), int(n)] if n == n else ["", "", 0]
        for low, high, n in zip(*_ends(table, "gap"), table["seeds"], strict=True)
    ]
    top = max(5.0, float(np.nanmax(np.abs(z))))
    low, zero, high = look.diverging
    how_to_read = (
        f"PTQ gap: {measure} after quantization minus before, mean over seeds. Orange and + = knowledge came back; "
        "blue and − = it fell further; grey = not measured."
    )
    panel = new_panel(look, title or "What quantization brings back, in points", how_to_read, 210 + 34 * len(methods))
    panel.heat(
        z, [[0, high], [0.5, zero], [1, low]], (-top, top), "points", gap=2,
        hover="%{y}, %{x}<br>gap %{text} points (%{customdata[0]} to %{customdata[1]}, %{customdata[2]} seeds)",
        texts=[[signed(v) if v == v else "" for v in row] for row in z.tolist()],
        customdata=[data[i : i + len(quantizers)] for i in range(0, len(data), len(quantizers))],
        x=[plain(name) for name in quantizers], y=[plain(name) for name in methods],
    )  # fmt: skip
    panel.x(**BARE, side="bottom")
    panel.y(**BARE, autorange="reversed")
    return panel.figure


def _with_gaps(what: str, rows: pd.DataFrame, more: Sequence[str]) -> pd.DataFrame:
    """The rows, names as text, with their gaps and numbers of seeds."""
    names = list(dict.fromkeys(["method", *more, "quantizer"]))
    require_columns(what, rows, [*names[:-1], "before", "after", "quantizer"])
    tidy = rows.astype(dict.fromkeys(names, str) | dict.fromkeys(("before", "after"), float))
    return tidy.assign(gap=tidy["after"] - tidy["before"], seeds=rows["seeds"] if "seeds" in rows.columns else 1)


def _percents(rows: pd.DataFrame, chance: float | int | None) -> dict[str, Any]:
    """The axis of percentages: all of it, or where all marks lie close together, that part of it."""
    names = [str(key) for key in rows.columns if str(key).partition("_")[0] in ("before", "after")]
    values = [v for v in rows[names].to_numpy(float).ravel().tolist() if v == v]
    values += [] if chance is None else [float(chance)]
    low, high = min(values), max(values)
    if high - low > _CLOSE:
        return {"range": [-4, 122], "tickvals": [0, 25, 50, 75, 100]}
    return {"range": [low - 0.08 * _CLOSE, high + 0.2 * _CLOSE]}  # room for the numbers beside the marks


def _ends(rows: pd.DataFrame, name: str) -> tuple[list[float], list[float]]:
    values = rows[name].tolist()
    return intervals_of(rows, name) or (values, values)


def _dumbbells(panel: Panel, rows: pd.DataFrame, lines: Sequence[str], measure: str) -> None:
    """Bars from ring to filled mark, coloured by which way they go, and the gap beside them."""
    rows = rows.assign(place=rows["line"].map(list(lines).index)).sort_values("place")
    places = rows["place"].tolist()
    for back, colour, dash, name in (
        (True, panel.look.negative, "solid", "came back"),
        (False, panel.look.positive, "dot", "stayed or fell"),
    ):
        part = rows[(rows["after"] > rows["before"]) == back]
        xs, ys = segments([((r.before, r.after), (r.place, r.place)) for r in part.itertuples()])
        if xs:
            shown = not any(trace.name == name for trace in panel.figure.data)  # once in the legend, where it occurs
            line = {"color": colour, "width": 4, "dash": dash}
            panel.mark(xs, ys, name, line=line, group=name, legend=shown)
    gaps, many = rows["gap"].tolist(), bool((rows["seeds"] > 1).any())
    columns = (rows[key].tolist() for key in ("line", "before", "after", "seeds"))
    data = [
        [plain(line), before, after, signed(gap), signed(low), signed(high), seeds]
        for line, before, after, seeds, gap, low, high in zip(*columns, gaps, *_ends(rows, "gap"), strict=True)
    ]
    spread = " (%{customdata[4]} to %{customdata[5]}, %{customdata[6]} seeds)" if many else ""
    for key, name, fill, size in (
        ("before", "full precision", panel.look.paper, 13),
        ("after", "quantized", panel.look.ink, 8),
    ):
        values = rows[key].tolist()
        panel.mark(
            values, places, name, "markers", data=data, group=name,
            hover=f"%{{customdata[0]}}<br>{plain(measure)}<br>before %{{customdata[1]:.1f}}, after "
            f"%{{customdata[2]:.1f}}<br>gap %{{customdata[3]}} points{spread}",
            marker={"size": size, "color": fill, "line": {"color": panel.look.ink, "width": 1.6}},
            error_x=whiskers(values, *_ends(rows, key), panel.look.ink) if many else None,
        )  # fmt: skip
    tops = zip(*(_ends(rows, key)[1] for key in ("before", "after")), strict=True)
    for place, ends, gap in zip(places, tops, gaps, strict=True):
        colour = panel.look.ink if gap > 1 else panel.look.muted
        panel.note(max(ends), place, signed(gap), colour=colour, xanchor="left", xshift=10)
