"""CAD: one bar a model, against what the model answers, and by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mansu_tl.errors import MansuError
from mansu_tl.plots.labels import label_points
from mansu_tl.plots.panels import (
    BARE,
    Panel,
    Style,
    intervals_of,
    legend_below,
    new_panel,
    padded,
    require_columns,
    series_styles,
    whiskers,
)  # fmt: skip
from mansu_tl.plots.theme import fixed, new_figure, number, plain, theme_named
from mansu_tl.verification import Divergence

_CAD = "CAD = 1 − ⟨a, b⟩ / ⟨a, a⟩"
_CROWD = 4  # silent models from which on their part of the plane is drawn larger


def circuit_divergence(
    divergences: Sequence[Divergence] | Mapping[str, Divergence],
    references: Mapping[str, Divergence] | None = None,
    *,
    bound: float | int | None = None,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw CAD as bars with their 95 % intervals, and the mass loss as a diamond beside each.

    Args:
        divergences: the models to judge; labels are taken from the mapping's keys, else from `.label`.
        references: what to judge them by, such as the noise floor of quantization or a model that never learnt; drawn
            hatched and grey.
        bound: a line at the value that the lower end of the interval has to reach.

    Raises:
        MansuError: nothing to draw.
    """
    look = theme_named(theme)
    if not divergences:
        raise MansuError("circuit divergence: none given; pass at least one result of circuit_divergence()")
    shown = dict(divergences) if isinstance(divergences, Mapping) else {d.label: d for d in divergences}
    if len(shown) != len(divergences):
        raise MansuError("circuit divergence: two results have the same label; pass a mapping label -> result")
    beside = dict(references or {})
    rows = [*shown.values(), *beside.values()]
    how_to_read = (
        "0 = the circuit is intact, 1 = gone, above 1 = inverted. Bars: CAD with its 95 % interval over facts; "
        "diamonds: mass loss."
    )
    panel = new_panel(look, title or "Circuit attribution divergence (CAD)", how_to_read, 190 + 46 * len(rows))
    hatched = {"shape": "/", "fgcolor": look.neutral, "bgcolor": look.band, "size": 6}
    grey = {"color": look.band, "line": {"color": look.neutral, "width": 1.2}, "pattern": hatched}
    _bars(panel, 0, shown, "models", {"color": look.positive_soft, "line": {"width": 0}})
    _bars(panel, len(shown), beside, "references", grey)
    diamond = {"symbol": "diamond", "size": 9, "color": look.paper, "line": {"color": look.ink, "width": 1.4}}
    losses = [d.mass_loss for d in rows]
    panel.mark(losses, list(range(len(rows))), "mass loss", "markers", hover="mass loss %{x:.3f}", marker=diamond)
    for x, text in ((0.0, "intact"), (1.0, "gone")):
        panel.level(x, text, upright=True, width=1, dash="solid", xanchor="center")
    if bound is not None:
        panel.level(bound, f"bound {number(bound)}", upright=True, width=1, xanchor="right")
    low = min(0.0, *(min(d.value, d.interval[0], d.mass_loss) for d in rows))
    high = max(1.0, *(max(d.value, d.interval[1], d.mass_loss) for d in rows))
    panel.x(title_text=_CAD, range=[low - 0.06, high + 0.16], zeroline=False)
    panel.rows([*shown, *beside], 0.5, showgrid=False)
    names = [*(plain(label) for label in shown), *(f"<i>{plain(label)}</i>" for label in beside)]
    panel.y(ticktext=names)
    legend_below(panel.figure, 88, 21)
    return panel.figure


def _bars(panel: Panel, start: int, part: Mapping[str, Divergence], name: str, marker: Mapping[str, object]) -> None:
    """Bars from row `start` on, their intervals, and the values written beside them."""
    if not part:
        return
    values, rows = [d.value for d in part.values()], list(range(start, start + len(part)))
    lows, highs = zip(*(d.interval for d in part.values()), strict=True)
    panel.bars(
        values, rows, name, orientation="h", width=0.62, marker=dict(marker),
        error_x=whiskers(values, lows, highs, panel.look.ink),
        data=[[plain(label), *d.interval, d.mass_loss] for label, d in part.items()],
        hover="%{customdata[0]}<br>CAD %{x:.3f} [%{customdata[1]:.3f}, %{customdata[2]:.3f}]"
        "<br>mass loss %{customdata[3]:.3f}",
    )  # fmt: skip
    for row, d in zip(rows, part.values(), strict=True):
        end = max(d.value, d.interval[1], d.mass_loss, 0.0)
        panel.note(end, row, fixed(d.value, 2), size=12, colour="", xanchor="left", xshift=8)


def divergence_plane(
    rows: pd.DataFrame,
    *,
    cad_bound: float | int = 0.5,
    accuracy_bound: float | int = 50,
    measure: str = "forget multiple choice, %",
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw accuracy on the forget questions against CAD: what a model says, and what is left of how it knew.

    The quadrants: *retained* (still answers, circuit intact), *filtered* (silent, circuit intact), *erased or suppressed*
    (silent, and the circuit carries nothing to the answer; which of the two, CAD by depth says), *damaged* (the circuit is
    gone and it answers by some other way). Rings are full precision, filled marks quantized, an arrow leads from one to
    the other: an arrow up and to the left is forgetting undone. Where many are silent, that part is drawn larger beside.

    Args:
        rows: columns label, quantizer ("" = full precision), cad and accuracy (percent); intervals are drawn where
            there are cad_low and cad_high, accuracy_low and accuracy_high.
        cad_bound: where the circuit counts as gone.
        accuracy_bound: where the model counts as answering, in percent.
        measure: what the accuracies are.

    Raises:
        MansuError: a column is missing, no row, or a label with two rows for one quantizer.
    """
    look = theme_named(theme)
    require_columns("CAD plane", rows, ["label", "quantizer", "cad", "accuracy"])
    twice = rows.duplicated(["label", "quantizer"])
    if twice.any():
        row = rows[twice].iloc[0]
        raise MansuError(f"CAD plane: {row['label']!r} has two rows for quantizer {row['quantizer']!r}; drop one")
    how_to_read = (
        "Across: what is left of the circuit (0 = intact, 1 = gone). Upright: what the model answers. Rings: full "
        "precision; filled: quantized."
    )
    shown = rows.assign(quantizer=rows["quantizer"].fillna("").astype(str), label=rows["label"].astype(str))
    inside = shown[(shown["cad"] >= cad_bound) & (shown["accuracy"] < accuracy_bound)]
    crowded = inside["label"].nunique() > _CROWD
    heading = title or "What a model answers, and what its circuit carries"
    grid: dict[str, Any] = {"rows": 1, "cols": 2, "horizontal_spacing": 0.08} if crowded else {}
    if crowded:
        grid["subplot_titles"] = ["all", "those that are silent, larger"]
    figure = new_figure(look, heading, how_to_read, 560, **grid)
    panels = [Panel(figure, look, 1, 1), Panel(figure, look, 1, 2, first=False)] if crowded else [Panel(figure, look)]
    ends = (min(-0.12, float(rows["cad"].min()) - 0.1), max(1.2, float(rows["cad"].max()) + 0.1))
    _quadrants(panels[0], ends, cad_bound, accuracy_bound)
    looks = series_styles(shown["label"].tolist(), look)
    _plane(panels[0], shown, looks, measure)
    panels[0].x(range=ends)
    panels[0].y(title_text=plain(measure), range=[-8, 112])
    if crowded:
        spans = [padded(float(inside[key].min()), float(inside[key].max()), 0.12) for key in ("cad", "accuracy")]
        _plane(panels[1], inside, looks, measure)
        panels[1].x(range=spans[0])
        panels[1].y(range=spans[1])
        first = inside.drop_duplicates("label")
        across, up = (first[key].astype(float).tolist() for key in ("cad", "accuracy"))
        label_points(panels[1], across, up, first["label"].tolist(), spans, (420, 340))
        box = {"x0": spans[0][0], "x1": spans[0][1], "y0": spans[1][0], "y1": spans[1][1]}
        line = {"width": 1.2, "color": look.muted, "dash": "dot"}
        figure.add_shape(type="rect", **box, line=line, row=1, col=1)
    figure.update_xaxes(title_text=_CAD, zeroline=False, showgrid=False)
    figure.update_yaxes(zeroline=False, showgrid=False)
    legend_below(figure)
    return figure


def _plane(panel: Panel, rows: pd.DataFrame, looks: Mapping[str, Style], measure: str) -> None:
    """Marks, their intervals and arrows from full precision to quantized."""
    for label, part in rows.groupby("label", sort=False):
        style, name = looks[str(label)], plain(label)
        full, quantized = part[part["quantizer"] == ""], part[part["quantizer"] != ""]
        for end in quantized[["cad", "accuracy"]].to_numpy(float).tolist() if len(full) else ():
            _arrow(panel, full[["cad", "accuracy"]].to_numpy(float)[0].tolist(), end, style.colour)
        for i, quantizer in enumerate(part["quantizer"]):
            point = part.iloc[i : i + 1]
            values = {key: [float(point[key].iloc[0])] for key in ("cad", "accuracy")}
            intervals = {key: intervals_of(point, key) for key in values}
            errors = {k: each and whiskers(values[k], *each, style.colour) for k, each in intervals.items()}
            fill = style.colour if quantizer else panel.look.paper
            panel.mark(
                values["cad"], values["accuracy"], name, "markers", group=name, legend=panel.first and i == 0,
                marker={"symbol": style.symbol, "size": 11, "color": fill, "line": {"color": style.colour, "width": 2.2}},
                error_x=errors["cad"], error_y=errors["accuracy"], data=[[plain(quantizer) or "full precision"]],
                hover=f"{name}, %{{customdata[0]}}<br>CAD %{{x:.3f}}<br>{plain(measure)}: %{{y:.1f}}",
            )  # fmt: skip


def divergence_by_layer(
    divergences: Mapping[str, Divergence], *, title: str | None = None, theme: str = "light"
) -> go.Figure:
    """Draw each model's CAD by the layer of the edges' writers, under what each layer carries of the circuit.

    A layer's CAD is 1 - <a, b> / <a, a> over its edges alone; the whole CAD is their mean, weighted with each layer's
    share of <a, a>, which the bars show.

    Raises:
        MansuError: none given, no edge, or results of different circuits.
    """
    look = theme_named(theme)
    if not divergences:
        raise MansuError("CAD by layer: none given; pass at least one result of circuit_divergence()")
    first = next(iter(divergences.values()))
    if first.edges.empty:
        raise MansuError("CAD by layer: the circuit has no edge; use a circuit that has some")
    for label, each in divergences.items():
        if (each.writers, each.readers) != (first.writers, first.readers):
            raise MansuError(f"CAD by layer: {label!r} was measured on another circuit; use one circuit for all")
    tables = [each.by_layer() for each in divergences.values()]
    layers, share = [*tables[0].index], 100 * tables[0]["share"].to_numpy()
    names = ["embed" if i < 0 else f"layer {i}" for i in layers]
    z = np.array([table["cad"] for table in tables])
    how_to_read = (
        "CAD over the edges that start in each layer: blue = still there, white = gone, orange = works against the answer. "
        "Bars: what the layer carries of the original circuit."
    )
    grid = {"rows": 2, "cols": 1, "shared_xaxes": True, "row_heights": [0.3, 0.7], "vertical_spacing": 0.06}
    figure = new_figure(
        look, title or "Where the mechanism went, layer by layer", how_to_read, 300 + 40 * len(divergences), **grid
    )
    above, below = Panel(figure, look, 1, 1), Panel(figure, look, 2, 1)
    above.bars(
        names, share.tolist(), "share of the circuit", legend=False, marker={"color": look.neutral, "line": {"width": 0}},
        data=tables[0]["edges"].tolist(), hover="%{x}: %{y:.1f} % of ⟨a, a⟩ in %{customdata} edges",
        text=[f"{fixed(v, 0)} %" for v in share], textposition="outside", cliponaxis=False,
    )  # fmt: skip
    against, none, still = look.diverging
    far = max(1.0, float(np.nanmax(np.abs(z - 1))))
    labels = [f"{plain(label)}   <b>{fixed(each.value, 2)}</b>" for label, each in divergences.items()]
    named = {"tickvals": [0, 1, 2], "ticktext": ["0 intact", "1 gone", "2 inverted"]}
    below.heat(
        z, [[0, still], [0.5, none], [1, against]], (1 - far, 1 + far), "CAD", gap=2, hover="%{y}<br>%{x}: CAD %{z:.3f}",
        x=names, y=labels, texts=[[fixed(v, 2) for v in row] for row in z.tolist()],
        colorbar={"y": 0.33, "len": 0.66, **named},
    )  # fmt: skip
    figure.update_xaxes(**BARE)
    below.x(title_text="layer in which the edge starts")
    below.y(**BARE, autorange="reversed")
    above.y(title_text="of the circuit, %", range=[0, 1.2 * share.max()])
    return figure


def _quadrants(panel: Panel, x: tuple[float, float], cad: float | int, accuracy: float | int) -> None:
    look = panel.look
    for x0, x1, upper, name, fill in (
        (x[0], cad, True, "retained", look.paper),
        (x[0], cad, False, "filtered", look.band),
        (cad, x[1], False, "erased or suppressed", look.passed),
        (cad, x[1], True, "damaged", look.band),
    ):
        y0, y1 = (accuracy, 112) if upper else (-8, accuracy)
        line = {"width": 1, "color": look.grid}
        panel.figure.add_shape(
            type="rect", x0=x0, x1=x1, y0=y0, y1=y1, layer="below", line=line, fillcolor=fill, **panel.where
        )
        at = {"y": y1 - 3, "yanchor": "top"} if upper else {"y": y0 + 3, "yanchor": "bottom"}
        panel.note((x0 + x1) / 2, at["y"], f"<b>{name}</b>", size=14, yanchor=at["yanchor"])


def _arrow(panel: Panel, start: Sequence[float], end: Sequence[float], colour: str) -> None:
    number_of = "" if panel.col in (None, 1) else str(panel.col)
    x, y = f"x{number_of}", f"y{number_of}"
    panel.figure.add_annotation(
        x=float(end[0]), y=float(end[1]), ax=float(start[0]), ay=float(start[1]), xref=x, yref=y, axref=x, ayref=y,
        text="", showarrow=True, arrowhead=2, arrowsize=1.1, arrowwidth=1.6, arrowcolor=colour, opacity=0.7, standoff=7,
        startstandoff=7,
    )  # fmt: skip
