"""An update seen by a quantizer: how large it is against the bins, what of it arrives, where weights rest."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mansu_tl.errors import MansuError
from mansu_tl.plots.panels import PERCENT, Panel, legend_below, require_columns
from mansu_tl.plots.theme import fixed, new_figure, number, plain, theme_named
from mansu_tl.quantization import UpdateStatistics

_PREDICTION = ("low", "high", "changed", "measured", "uniform", "by_position")


def bins(statistics: UpdateStatistics, *, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw update sizes against local bin widths, the share that changes its code, and where weights rest.

    Upper left: changed weights by |update| / bin width, those whose code changed filled. Lower left: their share, beside
    min(1, ratio), what rounding does to weights that rest anywhere in their bins. Right: where all weights rested before.

    Raises:
        MansuError: the update changed no weight.
    """
    look = theme_named(theme)
    counts, flipped = statistics.ratio_counts.cpu().numpy(), statistics.ratio_flipped.cpu().numpy()
    if not counts.sum():
        raise MansuError("update: it changed no weight, so there is nothing to draw; compare two different models")
    total = statistics.to_dataframe().iloc[-1]
    share = f"{number(100 * float(total['share']))} %"
    how_to_read = (
        f"{int(total['codes_changed']):,} of {int(total['changed']):,} changed weights take another code "
        f"({int(total['weights']):,} weights in all). A weight at a code's value has to move about half a bin."
    )
    grid: dict[str, Any] = {"rows": 2, "cols": 2, "specs": [[{}, {"rowspan": 2}], [{}, None]], "vertical_spacing": 0.09}
    grid |= {"column_widths": [0.66, 0.34], "row_heights": [0.58, 0.42], "horizontal_spacing": 0.11}
    figure = new_figure(
        look,
        title or f"{share} of the changed weights change their {statistics.quantizer} code",
        how_to_read,
        560,
        **grid,
    )
    above, below, right = Panel(figure, look, 1, 1), Panel(figure, look, 2, 1), Panel(figure, look, 1, 2)
    edges = statistics.ratio_edges.cpu().numpy()
    middles, some = (edges[:-1] + edges[1:]) / 2, np.flatnonzero(counts)
    low, high = max(int(some[0]) - 1, 0), min(int(some[-1]) + 2, len(counts))
    span = [float(edges[low]), float(max(edges[high], 0.15))]
    grey = {"color": look.grid, "line": {"color": look.neutral, "width": 1}}
    blue = {"color": look.positive, "line": {"width": 0}}
    for values, name, marker in ((counts, "changed weights", grey), (flipped, "of these, code changed", blue)):
        above.bars(
            middles, values, f"{name} ({int(values.sum()):,})", width=np.diff(edges) * 0.94, marker=marker,
            data=[f"{_power(a)} to {_power(b)}" for a, b in pairwise(edges)],
            hover="|update| / bin width %{customdata}<br>%{y:,} weights<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    below.mark(
        middles[some], 100 * flipped[some] / counts[some], "share of them, measured", "markers",
        hover="%{y:.3g} % of the weights in this bin<extra>code changed</extra>", marker={"color": look.positive, "size": 7},
    )  # fmt: skip
    ratio = np.linspace(span[0], span[1], 120)
    line = {"color": look.negative, "width": 2, "dash": "dash"}
    below.mark(ratio, 100 * np.minimum(1, 10**ratio), "if weights rest anywhere: min(1, ratio)", line=line)
    _rest(right, statistics, "weights before", ["lower<br>boundary", "code's<br>value", "upper<br>boundary"])
    right.x(title_text="rest position in the cell, before")
    right.y(title_text="weights, %", rangemode="tozero")
    above.y(title_text="weights", rangemode="tozero", exponentformat="SI")
    below.y(title_text="code changed, %", range=PERCENT["range"], tickvals=[0, 50, 100])
    below.x(title_text="|update| / local bin width")
    decades = list(range(int(np.floor(edges[low])), int(np.ceil(edges[high])) + 1))
    names = [_power(d) for d in decades]
    figure.update_xaxes(range=span, tickvals=decades, ticktext=names, showgrid=False, zeroline=False, col=1)
    above.x(showticklabels=False)
    for panel in (above, below):
        panel.level(0, upright=True, width=1, dash="dot")
    place: dict[str, Any] = {"xref": "x", "yref": "y domain", "xanchor": "right", "yanchor": "top", "xshift": -3}
    Panel(figure, look).note(0, 1, "one bin", **place)
    legend = {"orientation": "h", "x": 0, "y": -0.14, "yanchor": "top"}
    figure.update_layout(barmode="overlay", bargap=0.06, legend=legend, margin={"b": 96})
    return figure


def dither(
    predictions: Mapping[str, pd.DataFrame],
    positions: Mapping[str, UpdateStatistics] | None = None,
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
    how_to_read = (
        "Weights anywhere in their cells: rounding works as dither, and an update of a tenth of a bin changes a tenth of "
        "the codes. Weights at their codes' values: nothing happens below half a bin."
    )
    grid: dict[str, Any] = {"rows": rows, "row_heights": [0.32, 0.68] if positions else [1.0], "shared_yaxes": True}
    grid |= {"cols": len(predictions), "subplot_titles": [plain(name) for name in predictions]}
    grid |= {"horizontal_spacing": 0.06, "vertical_spacing": 0.2}
    figure = new_figure(
        look, title or "Why an update survives rounding, or does not", how_to_read, 640 if positions else 480, **grid
    )
    for col, (name, table) in enumerate(predictions.items(), 1):
        if positions is not None:
            upper = Panel(figure, look, 1, col)
            _rest(upper, positions[name], "weights", ["boundary", "code's value", "boundary"])
            # One percentage says little where another model has all its weights in one bin.
            counts = positions[name].position_counts
            top = 115 * float(counts.max()) / max(1, int(counts.sum()))
            upper.y(range=[0, max(top, 5.0)], matches=None, showticklabels=True)
            upper.x(title_text="where weights rest in their cells")
        _shares(Panel(figure, look, rows, col, col == 1), table)
    if positions is not None:
        figure.update_yaxes(title_text="weights, %", row=1, col=1)
    low = min(float(table["low"].min()) for table in predictions.values())
    start = max(-4, int(np.floor(np.log10(low))))
    ticks = [10.0**t for t in range(start, 2)]
    names = {"tickvals": ticks, "ticktext": [number(t) for t in ticks], "title_text": "|update| / local bin width"}
    figure.update_xaxes(**names, type="log", range=[start, 0.6], zeroline=False, row=rows)
    figure.update_yaxes(**PERCENT, zeroline=False, row=rows)
    figure.update_yaxes(title_text="code changed, %", row=rows, col=1)
    legend_below(figure, 92, 24)
    return figure


def _shares(panel: Panel, table: pd.DataFrame) -> None:
    """Shares of codes that change by the size of the update, predicted and measured, and in all."""
    look, bins, total = panel.look, table.iloc[:-1], table.iloc[-1]
    x, counts = np.sqrt(bins["low"].to_numpy(float) * bins["high"].to_numpy(float)), bins["changed"].to_numpy(float)
    anywhere = {"color": look.negative, "width": 2.4, "dash": "dash"}
    for key, name, line in (
        ("uniform", "predicted: weights anywhere in their cells", anywhere),
        ("by_position", "predicted from where they rest", {"color": look.positive, "width": 2.4}),
    ):
        panel.mark(x, 100 * bins[key].to_numpy(float), name, hover=f"{name}<br>%{{y:.3g}} %", group=key, line=line)
    sizes = (4 + 9 * np.sqrt(counts / counts.max())).tolist()
    panel.mark(
        x, 100 * bins["measured"].to_numpy(float), "measured", "markers", group="measured",
        marker={"size": sizes, "color": look.paper, "line": {"color": look.ink, "width": 1.5}},
        data=np.stack([counts, bins["low"], bins["high"]], 1).tolist(),
        hover="%{y:.3g} % of %{customdata[0]:,} weights whose update is %{customdata[1]:.3g} to "
        "%{customdata[2]:.3g} bins<extra>measured</extra>",
    )  # fmt: skip
    measured, rest, uniform = (fixed(100 * total[key], 2) for key in ("measured", "by_position", "uniform"))
    text = f"codes changed, of all {int(total['changed']):,} updates<br><b>measured {measured} %</b><br>"
    text += f"predicted from rest {rest} %<br>predicted if anywhere {uniform} %"
    corner: dict[str, Any] = {"xref": "x domain", "yref": "y domain", "xanchor": "left", "yanchor": "top"}
    panel.note(0.02, 0.98, text, colour="", align="left", **corner)


def _rest(panel: Panel, statistics: UpdateStatistics, name: str, ends: list[str]) -> None:
    """Where weights rest inside their cells."""
    edges, counts = statistics.position_edges.cpu().numpy(), statistics.position_counts.cpu().numpy()
    panel.bars(
        (edges[:-1] + edges[1:]) / 2, 100 * counts / max(1, counts.sum()), name, width=np.diff(edges), data=counts,
        hover="position %{x:.2f}<br>%{customdata:,} weights, %{y:.2f} %", legend=False,
        marker={"color": panel.look.neutral, "line": {"width": 0}},
    )  # fmt: skip
    panel.x(range=[-0.02, 1.02], tickvals=[0, 0.5, 1], ticktext=ends, showgrid=False)


def _power(exponent: float | int) -> str:
    """Ten to a power, for reading."""
    if exponent == int(exponent):
        return "1" if exponent == 0 else f"10<sup>{int(exponent)}</sup>".replace("-", "−")
    return number(10**exponent, 2)
