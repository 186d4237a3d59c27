"""Matrices as heat maps: all edge scores, and activation-patching sweeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.colors import find_intermediate_color

from mansu_tl.circuit.graph import layer_of
from mansu_tl.errors import MansuError
from mansu_tl.plots.protocols import EdgeScoresLike, PatchingLike
from mansu_tl.plots.theme import Theme, fixed, new_figure, number, plain, theme_named

_ALL_LABELS = 48  # names up to which every one is written
_VALUES_IN_CELLS = 240
_STRONG = 0.1  # of the largest |score|: cells from which on the minus sign is written


def edge_matrix(scores: EdgeScoresLike, *, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw the scores of all edges, writers upward and readers to the right, in order of computation.

    Colour goes with the square root of |score|, so that small scores can be seen beside large ones; the numbers are in
    the hover texts. Strong negative cells carry a minus sign. Edges that do not exist are left in the background's
    grey.

    Args:
        scores: scores of all edges of a model.
        title: plain text; by default the method and the number of edges.
        theme: "light" or "dark".

    Raises:
        MansuError: there is no edge.
    """
    look = theme_named(theme)
    exists = scores.exists.cpu().numpy()
    if not exists.any():
        raise MansuError("edge scores: no edge exists; score a model with at least one layer")
    z = np.where(exists, scores.tensor.detach().float().cpu().numpy(), np.nan)
    top = float(np.nanmax(np.abs(z))) or 1.0
    n_rows = z.shape[0]
    figure = new_figure(
        look,
        title or f"{scores.method.upper()} scores of {int(exists.sum()):,} edges",
        f"Blue supports the answer, orange opposes it; colour ~ √|score|. Metric {scores.metric}, "
        f"completeness residual {number(scores.residual, 2)}.",
        height=int(190 + min(760, max(320, 18 * n_rows))),
    )
    marks = np.where(z < -_STRONG * top, "−", "").tolist() if n_rows <= _ALL_LABELS else None
    figure.add_heatmap(
        z=z,
        zmin=-top,
        zmax=top,
        colorscale=root_scale(look),
        hoverongaps=False,
        x=[plain(name) for name in scores.readers],
        y=[plain(name) for name in scores.writers],
        text=marks,
        texttemplate="%{text}" if marks else None,
        textfont={"size": 11},
        hovertemplate="%{y} → %{x}<br>score %{z:.4g}<extra></extra>",
        colorbar={"title": {"text": "score"}, "thickness": 14, "outlinewidth": 0, "tickformat": ".2~g"},
    )
    figure.update_layout(plot_bgcolor=look.band)
    axis = {"showgrid": False, "zeroline": False, "showline": False}
    figure.update_xaxes(**axis, **_ticks(scores.readers), title_text="reader (where the edge goes)", tickangle=-90)
    figure.update_yaxes(**axis, **_ticks(scores.writers), title_text="writer (where it comes from)")
    _layer_lines(figure, scores, look)
    return figure


def patching(result: PatchingLike, *, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw an activation-patching sweep, layers upward; cells show their value where there are few enough.

    Args:
        result: the sweep; its column names may be tokens.
        title: plain text; by default direction and component.
        theme: "light" or "dark".

    Raises:
        MansuError: the sweep has no cell.
    """
    look = theme_named(theme)
    z = result.tensor.detach().float().cpu().numpy()
    if z.size == 0:
        raise MansuError("patching: the sweep has no cell to draw; run it on at least one layer and position")
    top = max(1.0, float(np.nanmax(np.abs(z))))
    restored = "restored, 1 = all of it" if result.direction == "denoising" else "destroyed, 1 = all of it"
    figure = new_figure(
        look,
        title or f"{result.direction.capitalize()} the {result.component}",
        f"Share of the clean-corrupt difference in {result.metric} that one patch has {restored}; 0 = no effect.",
        height=int(190 + max(200, 34 * z.shape[0])),
    )
    few = z.size <= _VALUES_IN_CELLS
    text = [[fixed(v, 2) if few else "" for v in row] for row in z.tolist()]
    low, zero, high = look.diverging
    figure.add_heatmap(
        z=z,
        zmin=-top,
        zmax=top,
        colorscale=[[0, low], [0.5, zero], [1, high]],
        xgap=1,
        ygap=1,
        text=text,
        texttemplate="%{text}",
        textfont={"size": 11},
        customdata=_names(result.rows, result.columns),
        hovertemplate=f"{plain(result.row_axis)} %{{customdata[0]}}, {plain(result.column_axis)} "
        "%{customdata[1]}<br>%{z:.3f}<extra></extra>",
        colorbar={"title": {"text": "share"}, "thickness": 14, "outlinewidth": 0},
    )
    axis = {"showgrid": False, "zeroline": False, "showline": False, "ticks": ""}
    figure.update_xaxes(**axis, **_ticks(result.columns), title_text=plain(result.column_axis))
    figure.update_yaxes(**axis, **_ticks(result.rows), title_text=plain(result.row_axis))
    return figure


def _names(rows: Sequence[str], columns: Sequence[str]) -> list[list[list[str]]]:
    return [[[plain(row), plain(column)] for column in columns] for row in rows]


def _ticks(names: Sequence[str]) -> dict[str, object]:
    """Tick settings by number, since names may repeat; one tick a layer where there are many."""
    places = list(range(len(names)))
    if len(names) <= _ALL_LABELS:
        return {"tickvals": places, "ticktext": [plain(name) for name in names]}
    if not any(name.partition(".")[0].startswith(("L", "MLP")) for name in names):
        places = places[:: math.ceil(len(names) / _ALL_LABELS)]
        return {"tickvals": places, "ticktext": [plain(names[i]) for i in places]}
    starts = _layer_starts(names)
    middles = [(a + b - 1) / 2 for a, b in zip(starts, [*starts[1:], len(names)], strict=True)]
    labels = [names[i] if names[i] in ("embed", "logits") else f"layer {layer_of(names[i])}" for i in starts]
    return {"tickvals": middles, "ticktext": labels, "ticks": ""}


def _layer_starts(names: Sequence[str]) -> list[int]:
    layers = [layer_of(name) for name in names]
    return [i for i, layer in enumerate(layers) if i == 0 or layer != layers[i - 1]]


def _layer_lines(figure: go.Figure, scores: EdgeScoresLike, look: Theme) -> None:
    line = {"color": look.neutral, "width": 0.6}
    for i in _layer_starts(scores.readers)[1:]:
        figure.add_shape(type="line", x0=i - 0.5, x1=i - 0.5, yref="paper", y0=0, y1=1, line=line)
    for i in _layer_starts(scores.writers)[1:]:
        figure.add_shape(type="line", y0=i - 0.5, y1=i - 0.5, xref="paper", x0=0, x1=1, line=line)


def root_scale(look: Theme) -> list[tuple[float, str]]:
    """A diverging colour scale whose colour goes with the square root of the distance from zero."""
    low, zero, high = (_rgb(c) for c in look.diverging)
    stops = [(i / 12) ** 2 for i in range(13)]
    below = [(0.5 - s / 2, find_intermediate_color(zero, low, math.sqrt(s), colortype="rgb")) for s in reversed(stops)]
    above = [(0.5 + s / 2, find_intermediate_color(zero, high, math.sqrt(s), colortype="rgb")) for s in stops[1:]]
    return below + above


def _rgb(colour: str) -> str:
    return f"rgb({int(colour[1:3], 16)}, {int(colour[3:5], 16)}, {int(colour[5:7], 16)})"
