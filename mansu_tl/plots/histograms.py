"""An update seen by a quantizer: how large it is against the bins, what of it arrives, where weights rest."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mansu_tl.errors import MansuError
from mansu_tl.plots.protocols import UpdateStatisticsLike
from mansu_tl.plots.theme import Theme, number, plain, styled, theme_named


def bins(statistics: UpdateStatisticsLike, *, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw update sizes against local bin widths, the share that changes its code, and where weights rest.

    Upper left: changed weights by |update| / bin width, those whose code changed filled. Lower left: their share in
    each bin, beside what rounding does to weights that rest anywhere in their bins with equal chance, min(1, ratio).
    Right: where all weights rested inside their cells before the update.

    Args:
        statistics: an update's statistics.
        title: plain text; by default how many codes changed.
        theme: "light" or "dark".

    Raises:
        MansuError: the update changed no weight.
    """
    look = theme_named(theme)
    counts = statistics.ratio_counts.cpu().numpy()
    flipped = statistics.ratio_flipped.cpu().numpy()
    if not counts.sum():
        raise MansuError("update: it changed no weight, so there is nothing to draw; compare two different models")
    total = statistics.to_dataframe().iloc[-1]
    share = f"{number(100 * float(total['share']))} %"
    figure = make_subplots(
        rows=2,
        cols=2,
        specs=[[{}, {"rowspan": 2}], [{}, None]],
        column_widths=[0.66, 0.34],
        row_heights=[0.58, 0.42],
        vertical_spacing=0.09,
        horizontal_spacing=0.11,
    )
    styled(
        figure,
        look,
        title or f"{share} of the changed weights change their {statistics.quantizer} code",
        f"{int(total['codes_changed']):,} of {int(total['changed']):,} changed weights take another code "
        f"({int(total['weights']):,} weights in all). A weight at a code's value has to move about half a bin.",
        height=560,
    )
    edges = statistics.ratio_edges.cpu().numpy()
    filled = np.flatnonzero(counts)
    low, high = max(int(filled[0]) - 1, 0), min(int(filled[-1]) + 2, len(counts))
    _sizes(figure, edges, counts, flipped, look)
    _shares(figure, edges, counts, flipped, slice(low, high), look)
    _positions(figure, statistics, look)
    decades = list(range(int(np.floor(edges[low])), int(np.ceil(edges[high])) + 1))
    span = [float(edges[low]), float(max(edges[high], 0.15))]
    figure.update_xaxes(
        range=span, tickvals=decades, ticktext=[_power(d) for d in decades], showgrid=False, zeroline=False, col=1
    )
    figure.update_xaxes(showticklabels=False, row=1, col=1)
    for row in (1, 2):
        figure.add_vline(x=0, line={"color": look.muted, "width": 1, "dash": "dot"}, row=row, col=1)
    figure.add_annotation(
        x=0,
        y=1,
        xref="x",
        yref="y domain",
        text="one bin",
        showarrow=False,
        xanchor="right",
        yanchor="top",
        xshift=-3,
        font={"size": 11, "color": look.muted},
    )
    figure.update_layout(
        barmode="overlay",
        bargap=0.06,
        legend={"orientation": "h", "x": 0, "y": -0.14, "yanchor": "top"},
        margin={"b": 96},
    )
    return figure


def _sizes(figure: go.Figure, edges: np.ndarray, counts: np.ndarray, flipped: np.ndarray, look: Theme) -> None:
    middles, widths = (edges[:-1] + edges[1:]) / 2, np.diff(edges)
    ranges = [f"{_power(a)} to {_power(b)}" for a, b in pairwise(edges)]
    hover = "|update| / bin width %{customdata}<br>%{y:,} weights<extra>%{fullData.name}</extra>"
    figure.add_bar(
        x=middles,
        y=counts,
        width=widths * 0.94,
        name=f"changed weights ({int(counts.sum()):,})",
        customdata=ranges,
        hovertemplate=hover,
        marker={"color": look.grid, "line": {"color": look.neutral, "width": 1}},
        row=1,
        col=1,
    )
    figure.add_bar(
        x=middles,
        y=flipped,
        width=widths * 0.94,
        name=f"of these, code changed ({int(flipped.sum()):,})",
        customdata=ranges,
        hovertemplate=hover,
        marker={"color": look.positive, "line": {"width": 0}},
        row=1,
        col=1,
    )
    figure.update_yaxes(title_text="weights", rangemode="tozero", exponentformat="SI", row=1, col=1)


def _shares(
    figure: go.Figure, edges: np.ndarray, counts: np.ndarray, flipped: np.ndarray, shown: slice, look: Theme
) -> None:
    middles = (edges[:-1] + edges[1:]) / 2
    some = np.flatnonzero(counts)
    figure.add_scatter(
        x=middles[some],
        y=100 * flipped[some] / counts[some],
        mode="markers",
        name="share of them, measured",
        marker={"color": look.positive, "size": 7},
        hovertemplate="%{y:.3g} % of the weights in this bin<extra>code changed</extra>",
        row=2,
        col=1,
    )
    line_x = np.linspace(edges[shown.start], max(edges[shown.stop], 0.15), 120)
    figure.add_scatter(
        x=line_x,
        y=100 * np.minimum(1, 10**line_x),
        mode="lines",
        name="if weights rest anywhere: min(1, ratio)",
        line={"color": look.negative, "width": 2, "dash": "dash"},
        hoverinfo="skip",
        row=2,
        col=1,
    )
    figure.update_yaxes(title_text="code changed, %", range=[-4, 104], tickvals=[0, 50, 100], row=2, col=1)
    figure.update_xaxes(title_text="|update| / local bin width", row=2, col=1)


def _positions(figure: go.Figure, statistics: UpdateStatisticsLike, look: Theme) -> None:
    edges = statistics.position_edges.cpu().numpy()
    counts = statistics.position_counts.cpu().numpy()
    figure.add_bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=100 * counts / max(1, counts.sum()),
        width=np.diff(edges),
        showlegend=False,
        name="weights before",
        customdata=counts,
        marker={"color": look.neutral, "line": {"width": 0}},
        hovertemplate="position %{x:.2f}<br>%{customdata:,} weights, %{y:.2f} %<extra></extra>",
        row=1,
        col=2,
    )
    figure.update_xaxes(
        title_text="rest position in the cell, before",
        range=[-0.02, 1.02],
        tickvals=[0, 0.5, 1],
        ticktext=["lower<br>boundary", "code's<br>value", "upper<br>boundary"],
        showgrid=False,
        row=1,
        col=2,
    )
    figure.update_yaxes(title_text=plain("weights, %"), rangemode="tozero", row=1, col=2)


def _power(exponent: float | int) -> str:
    """Ten to a power, for reading."""
    if exponent == int(exponent):
        return "1" if exponent == 0 else f"10<sup>{int(exponent)}</sup>".replace("-", "−")
    return number(10**exponent, 2)
