"""The PTQ gap: what forgetting is worth before and after quantization, as dumbbells and as a matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mansu_tl.plots.panels import BARE, Panel, legend_below, new_panel, new_panels, require_columns, segments, whiskers
from mansu_tl.plots.theme import Theme, number, plain, signed, theme_named

_SEEDS = ("method", "quantizer", "seed", "value_before", "value_after")
_ACROSS = 3


def ptq_gap(
    rows: pd.DataFrame,
    *,
    chance: float | int | None = None,
    measure: str = "forget accuracy, %",
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw accuracy on the forget questions before and after quantization as dumbbells, one panel a base model.

    A gap to the right (filled circle above the ring) means that knowledge came back.

    Args:
        rows: columns method, base, before, after, quantizer; accuracies in percent.
        chance: accuracy of guessing, in percent, drawn as a line.
        measure: what the accuracies are.

    Raises:
        MansuError: no row, or a column is missing.
    """
    look = theme_named(theme)
    require_columns("ptq gap", rows, ("method", "base", "before", "after", "quantizer"))
    several = rows["quantizer"].nunique() > 1
    names = [f"{m}, {q}" if several else str(m) for m, q in zip(rows["method"], rows["quantizer"], strict=True)]
    tidy = rows.assign(panel="base: " + rows["base"].astype(str), line=names, seed=0)
    figure = _dumbbells(
        tidy,
        look,
        title or "Does quantization bring it back?" + ("" if several else f" ({rows['quantizer'].iloc[0]})"),
        "Ring: full precision; filled: quantized. To the right of its ring = knowledge came back (positive PTQ gap).",
        chance,
        measure,
        across=rows["base"].nunique(),
    )
    return figure


def ptq_gaps(
    rows: pd.DataFrame,
    *,
    chance: float | int | None = None,
    measure: str = "forget multiple choice, %",
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw forget accuracy before and after quantization, one panel a quantizer, one line a method.

    Ring: mean over seeds in full precision; filled: mean after quantization; thin bars span the lowest to the highest
    seed. A filled mark to the right of its ring is knowledge that came back.

    Args:
        rows: columns method, quantizer, seed, value_before, value_after; accuracies in percent.
        chance: accuracy of guessing, in percent, drawn as a line.
        measure: what the accuracies are.

    Raises:
        MansuError: no row, or a column is missing.
    """
    look = theme_named(theme)
    require_columns("ptq gaps", rows, _SEEDS)
    counts = rows.groupby("method")["seed"].nunique()
    seeds = int(counts.max())
    tidy = rows.rename(columns={"value_before": "before", "value_after": "after"})
    return _dumbbells(
        tidy.assign(panel=rows["quantizer"].astype(str), line=rows["method"].astype(str)),
        look,
        title or "Does quantization bring it back?",
        "Ring: full precision; filled: quantized. To the right of its ring = knowledge came back; the number is the mean "
        f"gap in points. Means over {'up to ' if counts.min() < seeds else ''}{seeds} seed{'s' if seeds > 1 else ''}"
        + (", thin bars from the lowest to the highest." if seeds > 1 else "."),
        chance,
        measure,
        across=min(_ACROSS, rows["quantizer"].nunique()),
    )


def gap_matrix(
    rows: pd.DataFrame, *, measure: str = "forget multiple choice", title: str | None = None, theme: str = "light"
) -> go.Figure:
    """Draw the mean PTQ gap of every method under every quantizer as a matrix, numbers in the cells.

    Args:
        rows: as for `ptq_gaps`.
        measure: what the accuracies are.

    Raises:
        MansuError: no row, or a column is missing.
    """
    look = theme_named(theme)
    require_columns("ptq gaps", rows, _SEEDS)
    quantizers = list(dict.fromkeys(rows["quantizer"].astype(str)))
    methods = list(dict.fromkeys(rows["method"].astype(str)))
    gaps = (rows["value_after"] - rows["value_before"]).groupby(
        [rows["method"].astype(str), rows["quantizer"].astype(str)]
    )
    over_seeds = gaps.agg(["mean", "min", "max", "count"]).reindex(pd.MultiIndex.from_product([methods, quantizers]))
    z = over_seeds["mean"].to_numpy(float).reshape(len(methods), -1)
    data = [
        [signed(low), signed(high), int(n)] if n == n else ["", "", 0]
        for low, high, n in over_seeds[["min", "max", "count"]].to_numpy(float)
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


def _dumbbells(
    rows: pd.DataFrame, look: Theme, title: str, subtitle: str, chance: float | int | None, measure: str, across: int
) -> go.Figure:
    """Columns panel, line, seed, before and after: one dumbbell a line in each panel."""
    panels, lines = (list(dict.fromkeys(rows[key].astype(str))) for key in ("panel", "line"))
    grid = {"shared_yaxes": True, "horizontal_spacing": 0.03}
    drawn = new_panels(look, title, subtitle, panels, across, (210, 34 * len(lines) + 76), 84, **grid)
    figure = drawn[0].figure
    for panel, name in zip(drawn, panels, strict=True):
        _panel(panel, rows[rows["panel"].astype(str) == name], lines, measure)
        if chance is not None:
            line = {"color": look.muted, "width": 1.3, "dash": "dash"}
            ends = [-0.6, len(lines) - 0.4]
            panel.mark([chance, chance], ends, f"chance ({number(chance)})", line=line, group="chance")
        panel.rows(lines)
    figure.update_xaxes(range=[-4, 122], tickvals=[0, 25, 50, 75, 100], zeroline=False)
    for panel in drawn[-across:]:  # the lowest of each column
        panel.x(title_text=plain(measure))
    legend_below(figure, 92, 24)
    return figure


def _panel(panel: Panel, rows: pd.DataFrame, lines: Sequence[str], measure: str) -> None:
    """Bars from ring to filled mark, coloured by which way they go, and the gap beside them."""
    rows = rows.assign(gap=rows["after"].astype(float) - rows["before"].astype(float))
    found = rows.groupby(rows["line"].map(list(lines).index))[["before", "after", "gap"]].agg(
        ["mean", "min", "max", "size"]
    )
    places, means = found.index.tolist(), found.xs("mean", axis=1, level=1)
    for back, colour, dash, name in (
        (True, panel.look.negative, "solid", "came back"),
        (False, panel.look.positive, "dot", "stayed or fell"),
    ):
        part = means[(means["after"] > means["before"]) == back]
        xs, ys = segments([((a, b), (place, place)) for place, a, b in part[["before", "after"]].itertuples()])
        panel.mark(xs or [None], ys or [None], name, line={"color": colour, "width": 4, "dash": dash}, group=name)
    gaps = found["gap"]
    data = [
        [plain(lines[at]), a, b, signed(gap), signed(low), signed(high), int(n)]
        for at, a, b, (gap, low, high, n) in zip(
            places, means["before"], means["after"], gaps.to_numpy(float), strict=True
        )
    ]
    many = (gaps["size"] > 1).any()
    spread = " (%{customdata[4]} to %{customdata[5]}, %{customdata[6]} seeds)" if many else ""
    for key, name, fill, size in (
        ("before", "full precision", panel.look.paper, 13),
        ("after", "quantized", panel.look.ink, 8),
    ):
        mean, low, high = (found[key, part].tolist() for part in ("mean", "min", "max"))
        panel.mark(
            mean, places, name, "markers", data=data, group=name,
            hover=f"%{{customdata[0]}}<br>{plain(measure)}<br>before %{{customdata[1]:.1f}}, after "
            f"%{{customdata[2]:.1f}}<br>gap %{{customdata[3]}} points{spread}",
            marker={"size": size, "color": fill, "line": {"color": panel.look.ink, "width": 1.6}},
            error_x=whiskers(mean, low, high, panel.look.ink) if many else None,
        )  # fmt: skip
    tops = found[[("before", "max"), ("after", "max")]].max(axis=1)
    for place, top, gap in zip(places, tops, gaps["mean"], strict=True):
        colour = panel.look.ink if gap > 1 else panel.look.muted
        panel.note(float(top), place, signed(gap), colour=colour, xanchor="left", xshift=10)
