"""Behaviour against mechanism, and where in depth the mechanism went."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mansu_tl.circuit.graph import layer_of
from mansu_tl.errors import MansuError
from mansu_tl.plots.protocols import DivergenceLike
from mansu_tl.plots.series import interval_of, legend_below, require_columns, series_styles
from mansu_tl.plots.theme import Theme, fixed, new_figure, plain, styled, theme_named


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

    The quadrants: *retained* (still answers, circuit intact), *suppressed* (silent, circuit intact), *erased* (silent,
    circuit gone), *damaged* (the circuit is gone and it answers by some other way). Rings are full precision, filled
    marks quantized, an arrow leads from one to the other: an arrow up and to the left is forgetting undone.

    Args:
        rows: columns label, quantizer ("" = full precision), cad and accuracy (percent); intervals are drawn where
            there are cad_low and cad_high, accuracy_low and accuracy_high.
        cad_bound: where the circuit counts as gone.
        accuracy_bound: where the model counts as answering, in percent.
        measure: what the accuracies are.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: a column is missing, no row, or a label with two rows for one quantizer.
    """
    look = theme_named(theme)
    require_columns("CAD plane", rows, ["label", "quantizer", "cad", "accuracy"])
    twice = rows.duplicated(["label", "quantizer"])
    if twice.any():
        row = rows[twice].iloc[0]
        raise MansuError(f"CAD plane: {row['label']!r} has two rows for quantizer {row['quantizer']!r}; drop one")
    figure = new_figure(
        look,
        title or "Erased, or only suppressed?",
        "Across: what is left of the circuit (0 = intact, 1 = gone). Upright: what the model answers. Rings: full "
        "precision; filled: quantized.",
        height=640,
    )
    x_low, x_high = min(-0.12, float(rows["cad"].min()) - 0.1), max(1.2, float(rows["cad"].max()) + 0.1)
    _quadrants(figure, (x_low, x_high), cad_bound, accuracy_bound, look)
    labels = list(dict.fromkeys(rows["label"].astype(str)))
    looks = series_styles(labels, look)
    for label in labels:
        part = rows[rows["label"].astype(str) == label]
        style, name = looks[label], plain(label)
        full = part[part["quantizer"].fillna("") == ""]
        for _, row in part[part["quantizer"].fillna("") != ""].iterrows():
            if len(full):
                _arrow(figure, full.iloc[0], row, style.colour)
        for i, (_, row) in enumerate(part.iterrows()):
            quantizer = "" if pd.isna(row["quantizer"]) else str(row["quantizer"])
            figure.add_scatter(
                x=[float(row["cad"])],
                y=[float(row["accuracy"])],
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=i == 0,
                marker={
                    "symbol": style.symbol,
                    "size": 13,
                    "color": style.colour if quantizer else look.paper,
                    "line": {"color": style.colour, "width": 2.4},
                },
                error_x=_whisker(row, "cad", style.colour),
                error_y=_whisker(row, "accuracy", style.colour),
                customdata=[[plain(quantizer) or "full precision"]],
                hovertemplate=f"{name}, %{{customdata[0]}}<br>CAD %{{x:.3f}}<br>{plain(measure)}: %{{y:.1f}}"
                "<extra></extra>",
            )
    figure.update_xaxes(title_text="CAD = 1 − ⟨a, b⟩ / ⟨a, a⟩", range=[x_low, x_high], zeroline=False, showgrid=False)
    figure.update_yaxes(title_text=plain(measure), range=[-8, 112], zeroline=False, showgrid=False)
    legend_below(figure)
    return figure


def divergence_by_layer(
    divergences: Mapping[str, DivergenceLike], *, title: str | None = None, theme: str = "light"
) -> go.Figure:
    """Draw each model's CAD by the layer of the edges' writers, under what each layer carries of the circuit.

    A layer's CAD is 1 - <a, b> / <a, a> over its edges alone; the whole CAD is their mean, weighted with each layer's
    share of <a, a>, which the bars show.

    Args:
        divergences: results for the same circuit by label.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: none given, no edge, or results of different circuits.
    """
    look = theme_named(theme)
    if not divergences:
        raise MansuError("CAD by layer: none given; pass at least one result of circuit_divergence()")
    frames = {label: each.edges for label, each in divergences.items()}
    first = next(iter(frames.values()))
    if first.empty:
        raise MansuError("CAD by layer: the circuit has no edge; use a circuit that has some")
    for label, frame in frames.items():
        if list(frame["writer"]) != list(first["writer"]) or list(frame["reader"]) != list(first["reader"]):
            raise MansuError(f"CAD by layer: {label!r} was measured on another circuit; use one circuit for all")
    layer = np.array([-1 if w == "embed" else layer_of(str(w)) for w in first["writer"]])
    layers = sorted(set(layer.tolist()))
    names = ["embed" if i < 0 else f"layer {i}" for i in layers]
    a = first["original"].to_numpy(float)
    share = np.array([(a[layer == i] ** 2).sum() for i in layers])
    z = np.array([[_cad(a, f["other"].to_numpy(float), layer == i) for i in layers] for f in frames.values()])
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.3, 0.7], vertical_spacing=0.06)
    styled(
        figure,
        look,
        title or "Where the mechanism went, layer by layer",
        "CAD over the edges that start in each layer: 0 = intact, 1 = gone, above 1 = inverted. Bars: what the layer "
        "carries of the original circuit.",
        height=300 + 40 * len(frames),
    )
    figure.add_bar(
        x=names,
        y=(100 * share / share.sum()).tolist(),
        name="share of the circuit",
        showlegend=False,
        marker={"color": look.neutral, "line": {"width": 0}},
        customdata=[int((layer == i).sum()) for i in layers],
        hovertemplate="%{x}: %{y:.1f} % of ⟨a, a⟩ in %{customdata} edges<extra></extra>",
        text=[f"{fixed(v, 0)} %" for v in 100 * share / share.sum()],
        textposition="outside",
        cliponaxis=False,
        row=1,
        col=1,
    )
    _, zero, high = look.diverging
    labels = [f"{plain(label)}   <b>{fixed(each.value, 2)}</b>" for label, each in divergences.items()]
    figure.add_heatmap(
        z=z,
        zmin=0,
        zmax=1,
        x=names,
        y=labels,
        colorscale=[[0, zero], [1, high]],
        xgap=2,
        ygap=2,
        text=[[fixed(v, 2) for v in row] for row in z.tolist()],
        texttemplate="%{text}",
        textfont={"size": 12},
        hovertemplate="%{y}<br>%{x}: CAD %{z:.3f}<extra></extra>",
        colorbar={"title": {"text": "CAD"}, "thickness": 14, "outlinewidth": 0, "y": 0.33, "len": 0.66},
        row=2,
        col=1,
    )
    plain_axis = {"showgrid": False, "zeroline": False, "showline": False, "ticks": ""}
    figure.update_xaxes(**plain_axis)
    figure.update_xaxes(title_text="layer in which the edge starts", row=2, col=1)
    figure.update_yaxes(**plain_axis, autorange="reversed", row=2, col=1)
    figure.update_yaxes(title_text="of the circuit, %", range=[0, 120 * share.max() / share.sum()], row=1, col=1)
    return figure


def _cad(a: np.ndarray, b: np.ndarray, chosen: np.ndarray) -> float:
    square = float((a[chosen] ** 2).sum())
    return 1 - float((a[chosen] * b[chosen]).sum()) / square if square else float("nan")


def _quadrants(
    figure: go.Figure, x: tuple[float, float], cad_bound: float | int, accuracy_bound: float | int, look: Theme
) -> None:
    for x0, x1, y0, y1, name, fill in (
        (x[0], cad_bound, accuracy_bound, 112, "retained", look.paper),
        (x[0], cad_bound, -8, accuracy_bound, "suppressed", look.failed),
        (cad_bound, x[1], -8, accuracy_bound, "erased", look.passed),
        (cad_bound, x[1], accuracy_bound, 112, "damaged", look.band),
    ):
        figure.add_shape(
            type="rect",
            x0=x0,
            x1=x1,
            y0=y0,
            y1=y1,
            layer="below",
            line={"width": 1, "color": look.grid},
            fillcolor=fill,
        )
        figure.add_annotation(
            x=(x0 + x1) / 2,
            y=y1 - 3 if y0 == accuracy_bound else y0 + 3,
            text=f"<b>{name}</b>",
            showarrow=False,
            yanchor="top" if y0 == accuracy_bound else "bottom",
            font={"size": 16, "color": look.muted},
        )


def _arrow(figure: go.Figure, start: pd.Series, end: pd.Series, colour: str) -> None:
    figure.add_annotation(
        x=float(end["cad"]),
        y=float(end["accuracy"]),
        ax=float(start["cad"]),
        ay=float(start["accuracy"]),
        xref="x",
        yref="y",
        axref="x",
        ayref="y",
        text="",
        showarrow=True,
        arrowhead=2,
        arrowsize=1.1,
        arrowwidth=1.8,
        arrowcolor=colour,
        opacity=0.7,
        standoff=8,
        startstandoff=8,
    )


def _whisker(row: pd.Series, column: str, colour: str) -> dict[str, object] | None:
    found = interval_of(row, column)
    if found is None:
        return None
    value = float(row[column])
    ends = {"array": [max(0.0, found[1] - value)], "arrayminus": [max(0.0, value - found[0])]}
    return {"type": "data", "symmetric": False, **ends, "color": colour, "thickness": 1.2, "width": 3}
