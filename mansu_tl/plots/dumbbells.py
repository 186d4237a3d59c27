"""The PTQ gap over seeds: dumbbells for every method and quantizer, and the gaps as a matrix."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mansu_tl.plots.series import legend_below, require_columns
from mansu_tl.plots.theme import Theme, fixed, number, plain, styled, theme_named

_NEEDED = ("method", "quantizer", "seed", "value_before", "value_after")
_ACROSS = 3


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
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: no row, or a column is missing.
    """
    look = theme_named(theme)
    require_columns("ptq gaps", rows, _NEEDED)
    quantizers = list(dict.fromkeys(rows["quantizer"].astype(str)))
    methods = list(dict.fromkeys(rows["method"].astype(str)))
    across = min(_ACROSS, len(quantizers))
    down = math.ceil(len(quantizers) / across)
    height = 210 + down * (34 * len(methods) + 76)
    figure = make_subplots(
        rows=down,
        cols=across,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=84 / height if down > 1 else 0,
        subplot_titles=[plain(name) for name in quantizers],
    )
    counts = rows.groupby("method")["seed"].nunique()
    seeds = int(counts.max())
    styled(
        figure,
        look,
        title or "Does quantization bring it back?",
        "Ring: full precision; filled: quantized. To the right of its ring = knowledge came back; the number is the mean "
        f"gap in points. Means over {'up to ' if counts.min() < seeds else ''}{seeds} seed{'s' if seeds > 1 else ''}"
        + (", thin bars from the lowest to the highest." if seeds > 1 else "."),
        height=height,
    )
    for at, quantizer in enumerate(quantizers):
        where = {"row": at // across + 1, "col": at % across + 1}
        part = rows[rows["quantizer"].astype(str) == quantizer]
        _panel(figure, part, methods, measure, look, at == 0, where)
        if chance is not None:
            figure.add_scatter(
                x=[chance, chance],
                y=[-0.6, len(methods) - 0.4],
                mode="lines",
                name=f"chance ({number(chance)})",
                line={"color": look.muted, "width": 1.3, "dash": "dash"},
                hoverinfo="skip",
                legendgroup="chance",
                showlegend=at == 0,
                **where,
            )
    figure.update_xaxes(range=[-4, 122], tickvals=[0, 25, 50, 75, 100], zeroline=False)
    for col in range(1, across + 1):
        last = down if (down - 1) * across + col <= len(quantizers) else down - 1
        figure.update_xaxes(title_text=plain(measure), row=last, col=col)
    figure.update_yaxes(
        tickvals=list(range(len(methods))),
        ticktext=[plain(name) for name in methods],
        range=[len(methods) - 0.4, -0.6],
        zeroline=False,
        ticks="",
        showline=False,
    )
    figure.update_annotations(font={"size": 13}, selector={"yref": "paper"})
    legend_below(figure, 92)
    figure.update_layout(margin={"t": figure.layout.margin.t + 24})
    return figure


def _panel(
    figure: go.Figure,
    part: pd.DataFrame,
    methods: list[str],
    measure: str,
    look: Theme,
    first: bool,
    where: dict[str, int],
) -> None:
    groups = {str(name): group for name, group in part.groupby(part["method"].astype(str), sort=False)}
    shown = [(i, groups[name]) for i, name in enumerate(methods) if name in groups]
    places = [i for i, _ in shown]
    before = [group["value_before"].to_numpy(float) for _, group in shown]
    after = [group["value_after"].to_numpy(float) for _, group in shown]
    gaps = [b - a for a, b in zip(before, after, strict=True)]
    for back, colour, dash, name in (
        (True, look.negative, "solid", "came back"),
        (False, look.positive, "dot", "stayed or fell"),
    ):
        xs: list[float | None] = []
        ys: list[float | None] = []
        for place, a, b in zip(places, before, after, strict=True):
            if (b.mean() > a.mean()) == back:
                xs += [a.mean(), b.mean(), None]
                ys += [place, place, None]
        figure.add_scatter(
            x=xs or [None],
            y=ys or [None],
            mode="lines",
            line={"color": colour, "width": 4, "dash": dash},
            hoverinfo="skip",
            name=name,
            legendgroup=name,
            showlegend=first,
            **where,
        )
    data = [
        [plain(methods[i]), a.mean(), b.mean(), _signed(g.mean()), _signed(g.min()), _signed(g.max()), len(g)]
        for i, a, b, g in zip(places, before, after, gaps, strict=True)
    ]
    for values, name, fill, size, shift in (
        (before, "full precision", look.paper, 13, 0.0),
        (after, "quantized", look.ink, 8, 0.0),
    ):
        mean = [float(v.mean()) for v in values]
        figure.add_scatter(
            x=mean,
            y=[place + shift for place in places],
            mode="markers",
            name=name,
            legendgroup=name,
            showlegend=first,
            marker={"size": size, "color": fill, "line": {"color": look.ink, "width": 1.6}},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [float(v.max() - v.mean()) for v in values],
                "arrayminus": [float(v.mean() - v.min()) for v in values],
                "color": look.ink,
                "thickness": 1.1,
                "width": 5 if size > 10 else 3,
            },
            customdata=data,
            hovertemplate=f"%{{customdata[0]}}<br>{plain(measure)}<br>before %{{customdata[1]:.1f}}, after "
            "%{customdata[2]:.1f}<br>gap %{customdata[3]} points (%{customdata[4]} to %{customdata[5]}, "
            "%{customdata[6]} seeds)<extra></extra>",
            **where,
        )
    for place, a, b, gap in zip(places, before, after, gaps, strict=True):
        figure.add_annotation(
            x=float(max(a.max(), b.max())),
            y=place,
            text=_signed(float(gap.mean())),
            showarrow=False,
            xanchor="left",
            xshift=10,
            font={"size": 11, "color": look.ink if gap.mean() > 1 else look.muted},
            **where,
        )


def gap_matrix(
    rows: pd.DataFrame,
    *,
    measure: str = "forget multiple choice",
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw the mean PTQ gap of every method under every quantizer as a matrix, numbers in the cells.

    Args:
        rows: as for `ptq_gaps`.
        measure: what the accuracies are.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: no row, or a column is missing.
    """
    look = theme_named(theme)
    require_columns("ptq gaps", rows, _NEEDED)
    quantizers = list(dict.fromkeys(rows["quantizer"].astype(str)))
    methods = list(dict.fromkeys(rows["method"].astype(str)))
    z = np.full((len(methods), len(quantizers)), np.nan)
    data = [[["", "", 0] for _ in quantizers] for _ in methods]
    for (method, quantizer), group in rows.groupby([rows["method"].astype(str), rows["quantizer"].astype(str)]):
        gap = (group["value_after"] - group["value_before"]).to_numpy(float)
        i, j = methods.index(str(method)), quantizers.index(str(quantizer))
        z[i, j] = gap.mean()
        data[i][j] = [_signed(gap.min()), _signed(gap.max()), len(gap)]
    top = max(5.0, float(np.nanmax(np.abs(z))))
    low, zero, high = look.diverging
    figure = styled(
        go.Figure(),
        look,
        title or "What quantization brings back, in points",
        f"PTQ gap: {measure} after quantization minus before, mean over seeds. Orange and + = knowledge came back; "
        "blue and − = it fell further; grey = not measured.",
        height=210 + 34 * len(methods),
    )
    figure.add_heatmap(
        z=z,
        zmin=-top,
        zmax=top,
        colorscale=[[0, high], [0.5, zero], [1, low]],
        xgap=2,
        ygap=2,
        hoverongaps=False,
        text=[[_signed(v) if v == v else "" for v in row] for row in z.tolist()],
        texttemplate="%{text}",
        textfont={"size": 12},
        customdata=data,
        hovertemplate="%{y}, %{x}<br>gap %{text} points (%{customdata[0]} to %{customdata[1]}, %{customdata[2]} seeds)"
        "<extra></extra>",
        x=[plain(name) for name in quantizers],
        y=[plain(name) for name in methods],
        colorbar={"title": {"text": "points"}, "thickness": 14, "outlinewidth": 0},
    )
    figure.update_layout(plot_bgcolor=look.band)
    axis = {"showgrid": False, "zeroline": False, "showline": False, "ticks": ""}
    figure.update_xaxes(**axis, side="bottom")
    figure.update_yaxes(**axis, autorange="reversed")
    return figure


def _signed(points: float) -> str:
    text = fixed(points, 1)
    return f"+{text}" if points > 0 and text != "0.0" else text
