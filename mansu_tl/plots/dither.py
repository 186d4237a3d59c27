"""Why small updates vanish on some weights and arrive on others: predicted against measured code changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float64, Int64
from plotly.subplots import make_subplots
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.plots.series import legend_below, require_columns
from mansu_tl.plots.theme import fixed, number, plain, styled, theme_named

_PREDICTION = ("low", "high", "changed", "measured", "uniform", "by_position")


@runtime_checkable
class RestPositionsLike(Protocol):
    """Where weights rest inside their quantization cells."""

    @property
    def position_edges(self) -> Float64[Tensor, " position_edge"]:
        """Bin edges: 0 and 1 are the boundaries, .5 the code's value."""

    @property
    def position_counts(self) -> Int64[Tensor, " position_bin"]:
        """Weights in each."""


def dither(
    predictions: Mapping[str, pd.DataFrame],
    positions: Mapping[str, RestPositionsLike] | None = None,
    *,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw the share of codes that change against the size of the update, measured and predicted, one column a model.

    Dashed: weights that rest anywhere in their cells with equal chance (rounding is dither, an update of a tenth of a
    bin changes a tenth of the codes). Solid: predicted from where this model's weights rest. Points: measured, larger
    where more weights lie. Above, where the weights rest.

    Args:
        predictions: tables of `predicted_flips` by the name of the model or update.
        positions: update statistics of the same names, for the upper row.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: none given, a table without the columns, or positions of other names.
    """
    look = theme_named(theme)
    if not predictions:
        raise MansuError("dither: none given; pass at least one table of predicted_flips")
    if positions is not None and set(positions) != set(predictions):
        raise MansuError(
            f"dither: positions of {sorted(positions)}, predictions of {sorted(predictions)}; name them alike"
        )
    for table in predictions.values():
        require_columns("dither", table, _PREDICTION)
    rows = 2 if positions else 1
    figure = make_subplots(
        rows=rows,
        cols=len(predictions),
        row_heights=[0.32, 0.68] if positions else [1.0],
        shared_yaxes=True,
        horizontal_spacing=0.06,
        vertical_spacing=0.2,
        subplot_titles=[plain(name) for name in predictions],
    )
    styled(
        figure,
        look,
        title or "Why an update survives rounding, or does not",
        "Weights anywhere in their cells: rounding works as dither, and an update of a tenth of a bin changes a tenth of "
        "the codes. Weights at their codes' values: nothing happens below half a bin.",
        height=640 if positions else 480,
    )
    low = min(float(table["low"].min()) for table in predictions.values())
    start = max(-4, int(np.floor(np.log10(low))))
    for col, (name, table) in enumerate(predictions.items(), 1):
        if positions is not None:
            _rest(figure, positions[name], look.neutral, col)
        bins, total = table.iloc[:-1], table.iloc[-1]
        middle = np.sqrt(bins["low"].to_numpy(float) * bins["high"].to_numpy(float))
        counts = bins["changed"].to_numpy(float)
        for key, label, line in (
            (
                "uniform",
                "predicted: weights anywhere in their cells",
                {"color": look.negative, "width": 2.4, "dash": "dash"},
            ),
            ("by_position", "predicted from where they rest", {"color": look.positive, "width": 2.4}),
        ):
            figure.add_scatter(
                x=middle,
                y=100 * bins[key].to_numpy(float),
                mode="lines",
                name=label,
                legendgroup=key,
                showlegend=col == 1,
                line=line,
                hovertemplate=f"{label}<br>%{{y:.3g}} %<extra></extra>",
                row=rows,
                col=col,
            )
        figure.add_scatter(
            x=middle,
            y=100 * bins["measured"].to_numpy(float),
            mode="markers",
            name="measured",
            legendgroup="measured",
            showlegend=col == 1,
            marker={
                "size": (4 + 9 * np.sqrt(counts / counts.max())).tolist(),
                "color": look.paper,
                "line": {"color": look.ink, "width": 1.5},
            },
            customdata=np.stack([counts, bins["low"], bins["high"]], 1).tolist(),
            hovertemplate="%{y:.3g} % of %{customdata[0]:,} weights whose update is %{customdata[1]:.3g} to "
            "%{customdata[2]:.3g} bins<extra>measured</extra>",
            row=rows,
            col=col,
        )
        figure.add_annotation(
            x=0.02,
            y=0.98,
            xref="x domain",
            yref="y domain",
            text=_totals(total),
            showarrow=False,
            align="left",
            xanchor="left",
            yanchor="top",
            font={"size": 11},
            row=rows,
            col=col,
        )
    ticks = list(range(start, 2))
    figure.update_xaxes(
        type="log",
        range=[start, 0.6],
        tickvals=[10.0**t for t in ticks],
        ticktext=[number(10.0**t) for t in ticks],
        title_text="|update| / local bin width",
        zeroline=False,
        row=rows,
    )
    figure.update_yaxes(range=[-4, 104], tickvals=[0, 25, 50, 75, 100], zeroline=False, row=rows)
    figure.update_yaxes(title_text="code changed, %", row=rows, col=1)
    figure.update_annotations(font={"size": 13}, selector={"yref": "paper"})
    legend_below(figure, 92, figure.layout.margin.t + 24)
    return figure


def _totals(total: pd.Series) -> str:
    """What all updates together did, and should have done."""
    measured, rest, anywhere = (fixed(100 * total[key], 2) for key in ("measured", "by_position", "uniform"))
    return (
        f"codes changed, of all {int(total['changed']):,} updates<br><b>measured {measured} %</b><br>"
        f"predicted from rest {rest} %<br>predicted if anywhere {anywhere} %"
    )


def _rest(figure: go.Figure, positions: RestPositionsLike, colour: str, col: int) -> None:
    edges, counts = positions.position_edges.cpu().numpy(), positions.position_counts.cpu().numpy()
    figure.add_bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=100 * counts / max(1, counts.sum()),
        width=np.diff(edges),
        name="weights",
        showlegend=False,
        marker={"color": colour, "line": {"width": 0}},
        customdata=counts,
        hovertemplate="position %{x:.2f}<br>%{customdata:,} weights, %{y:.2f} %<extra></extra>",
        row=1,
        col=col,
    )
    figure.update_xaxes(
        range=[-0.02, 1.02],
        tickvals=[0, 0.5, 1],
        ticktext=["boundary", "code's value", "boundary"],
        title_text="where weights rest in their cells",
        showgrid=False,
        row=1,
        col=col,
    )
    # One percentage says little where another model has all its weights in one bin.
    top = 1.15 * 100 * float(counts.max()) / max(1, counts.sum())
    figure.update_yaxes(range=[0, max(top, 5.0)], matches=None, showticklabels=True, row=1, col=col)
    if col == 1:
        figure.update_yaxes(title_text="weights, %", row=1, col=col)
