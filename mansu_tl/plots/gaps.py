"""The PTQ gap: what each method's forgetting is worth before and after quantization."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mansu_tl.errors import MansuError
from mansu_tl.plots.theme import Theme, fixed, number, plain, styled, theme_named

_COLUMNS = ("method", "base", "before", "after", "quantizer")


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
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: no row, or a column is missing.
    """
    look = theme_named(theme)
    lacking = [name for name in _COLUMNS if name not in rows.columns]
    if lacking:
        raise MansuError(f"ptq gap: the table has no column {', '.join(lacking)}; give {', '.join(_COLUMNS)}")
    if rows.empty:
        raise MansuError("ptq gap: the table has no row to draw; give one for each method and quantizer")
    bases = list(dict.fromkeys(rows["base"].astype(str)))
    several = rows["quantizer"].nunique() > 1
    labels = [f"{m}, {q}" if several else str(m) for m, q in zip(rows["method"], rows["quantizer"], strict=True)]
    order = list(dict.fromkeys(labels))
    figure = make_subplots(
        rows=1,
        cols=len(bases),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=[f"base: {plain(base)}" for base in bases],
    )
    under = "" if several else f" ({rows['quantizer'].iloc[0]})"
    styled(
        figure,
        look,
        title or f"Does quantization bring it back?{under}",
        "Ring: full precision; filled: quantized. To the right of its ring = knowledge came back (positive PTQ gap).",
        height=200 + 34 * len(order),
    )
    for column, base in enumerate(bases, 1):
        here = [i for i, name in enumerate(rows["base"].astype(str)) if name == base]
        part = rows.iloc[here]
        _dumbbells(figure, part, [order.index(labels[i]) for i in here], column, measure, look)
        if chance is not None:
            figure.add_scatter(
                x=[chance, chance],
                y=[-0.6, len(order) - 0.4],
                mode="lines",
                name=f"chance ({number(chance)})",
                line={"color": look.muted, "width": 1.4, "dash": "dash"},
                hoverinfo="skip",
                legendgroup="chance",
                showlegend=column == 1,
                row=1,
                col=column,
            )
    figure.update_xaxes(title_text=plain(measure), range=[-3, 112], tickvals=[0, 25, 50, 75, 100], zeroline=False)
    figure.update_yaxes(
        tickvals=list(range(len(order))),
        ticktext=[plain(label) for label in order],
        range=[len(order) - 0.4, -0.6],
        zeroline=False,
        ticks="",
        showline=False,
    )
    figure.update_annotations(font={"size": 13}, selector={"yref": "paper"})
    figure.update_layout(
        margin={"b": 88, "t": 108},
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
    )
    return figure


def _dumbbells(
    figure: go.Figure, part: pd.DataFrame, places: list[int], column: int, measure: str, look: Theme
) -> None:
    before, after = part["before"].astype(float).tolist(), part["after"].astype(float).tolist()
    for came_back, colour, name in ((True, look.negative, "came back"), (False, look.positive, "stayed or fell")):
        xs: list[float | None] = []
        ys: list[float | None] = []
        for place, low, high in zip(places, before, after, strict=True):
            if (high > low) == came_back:
                xs += [low, high, None]
                ys += [place, place, None]
        figure.add_scatter(
            x=xs,
            y=ys,
            mode="lines",
            line={"color": colour, "width": 4, "dash": "solid" if came_back else "dot"},
            hoverinfo="skip",
            name=name,
            legendgroup=name,
            showlegend=column == 1,
            row=1,
            col=column,
        )
    texts = zip(part["method"], part["quantizer"], before, after, strict=True)
    data = [[plain(m), plain(q), low, high, _gap(high - low)] for m, q, low, high in texts]
    hover = (
        f"%{{customdata[0]}}, %{{customdata[1]}}<br>{plain(measure)}<br>"
        "before %{customdata[2]:.1f}, after %{customdata[3]:.1f}<br>gap %{customdata[4]} points<extra></extra>"
    )
    for values, name, fill, size in ((before, "full precision", look.paper, 15), (after, "quantized", look.ink, 9)):
        figure.add_scatter(
            x=values,
            y=places,
            mode="markers",
            name=name,
            legendgroup=name,
            showlegend=column == 1,
            marker={"size": size, "color": fill, "line": {"color": look.ink, "width": 1.6}},
            customdata=data,
            hovertemplate=hover,
            row=1,
            col=column,
        )
    for place, low, high, row in zip(places, before, after, data, strict=True):
        figure.add_annotation(
            x=max(low, high),
            y=place,
            text=str(row[4]),
            showarrow=False,
            xanchor="left",
            xshift=11,
            font={"size": 11, "color": look.muted},
            row=1,
            col=column,
        )


def _gap(points: float) -> str:
    text = fixed(points, 1)
    return f"+{text}" if points > 0 and text != "0.0" else text
