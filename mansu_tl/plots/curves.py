"""Faithfulness against circuit size: how few edges do it, beside random ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.plots.series import add_band, legend_below, series_styles
from mansu_tl.plots.theme import fixed, new_figure, number, plain, theme_named


@runtime_checkable
class FaithfulnessCurveLike(Protocol):
    """Faithfulness of circuits of growing size."""

    @property
    def faithfulness(self) -> Float[Tensor, " size"]:
        """Of each size."""

    @property
    def control(self) -> Float[Tensor, "seed size"]:
        """Of as many random edges; no rows without a control."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Edges selected, ascending."""

    @property
    def edges(self) -> tuple[int, ...]:
        """Edges left after pruning."""

    @property
    def n_edges(self) -> int:
        """All edges of the graph."""

    @property
    def cpr(self) -> float:
        """Area under the curve."""


def faithfulness_curves(
    curves: Mapping[str, FaithfulnessCurveLike],
    *,
    target: float | int | None = 0.85,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw faithfulness against the number of edges, one line a way to score or select, and the random control.

    Args:
        curves: by name; the grey band spans their random circuits, lowest to highest.
        target: a faithfulness to be reached, drawn as a line.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: none given, or a curve without a size above 0.
    """
    look = theme_named(theme)
    if not curves:
        raise MansuError("faithfulness curves: none given; pass at least one result of faithfulness_curve()")
    figure = new_figure(
        look,
        title or "How few edges carry the behaviour",
        "Share of the metric's clean-corrupt difference that a circuit keeps, every other edge carrying its ablated "
        "value. Grey: random circuits of the same size.",
        height=500,
    )
    looks = series_styles(list(curves), look)
    shown_control = False
    for name, curve in curves.items():
        sizes = np.array(curve.sizes)
        some = np.flatnonzero(sizes > 0)
        if not len(some):
            raise MansuError(f"faithfulness curves: {name!r} has no size above 0; measure larger circuits")
        values, control = curve.faithfulness.cpu().numpy()[some], curve.control.cpu().numpy()[:, some]
        if len(control):
            add_band(
                figure, sizes[some].tolist(), control.min(0).tolist(), control.max(0).tolist(), look.neutral, "random"
            )
            figure.add_scatter(
                x=sizes[some].tolist(),
                y=control.mean(0).tolist(),
                mode="lines",
                name="random edges",
                legendgroup="random",
                showlegend=not shown_control,
                line={"color": look.muted, "width": 1.8, "dash": "dot"},
                hovertemplate="%{x:,} random edges: %{y:.3f}<extra></extra>",
            )
            shown_control = True
        style = looks[name]
        figure.add_scatter(
            x=sizes[some].tolist(),
            y=values.tolist(),
            mode="lines+markers",
            name=f"{plain(name)} (area {fixed(curve.cpr, 2)})",
            line={"color": style.colour, "width": 2.6, "dash": style.dash},
            marker={"symbol": style.symbol, "size": 8},
            customdata=[[curve.edges[i], 100 * curve.sizes[i] / curve.n_edges] for i in some],
            hovertemplate=f"{plain(name)}<br>%{{x:,}} edges (%{{customdata[1]:.2g}} %), %{{customdata[0]:,}} after pruning"
            "<br>faithfulness %{y:.3f}<extra></extra>",
        )
    for value, text in ((1.0, ""), (target, f"target {number(target or 0)}")):
        if value is not None:
            figure.add_hline(
                y=value,
                line={"color": look.muted, "width": 1, "dash": "dash" if text else "solid"},
                annotation_text=text,
                annotation_position="bottom right",
                annotation_font={"size": 11, "color": look.muted},
            )
    figure.update_xaxes(
        type="log", title_text="edges selected (log scale)", dtick=1, minor={"ticks": "outside", "ticklen": 2}
    )
    figure.update_yaxes(title_text="faithfulness", zeroline=True)
    legend_below(figure)
    return figure
