"""Attention patterns: who looks where, head by head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.plots.theme import plain, styled, theme_named

_ACROSS = 4


def attention_view(
    patterns: Float[Tensor, "head query key"],
    tokens: Sequence[str],
    heads: Sequence[str] | None = None,
    *,
    title: str | None = None,
    theme: str = "light",
) -> Any:
    """Show attention patterns in a notebook: CircuitsVis's widget where it is installed, else `attention_patterns`.

    CircuitsVis (`pip install circuitsvis`) loads its script from the net and has no title or theme; `attention_patterns`
    does without and can be saved.

    Args:
        patterns: attention probabilities of one prompt.
        tokens: the prompt's tokens.
        heads: their names; numbered where not given.
        title: plain text, of the figure.
        theme: "light" or "dark", of the figure.

    Raises:
        MansuError: as `attention_patterns`.
    """
    figure = attention_patterns(patterns, tokens, heads, title=title, theme=theme)
    if find_spec("circuitsvis") is None:
        return figure
    widgets = import_module("circuitsvis.attention")
    names = [f"H{i}" for i in range(len(patterns))] if heads is None else list(heads)
    return widgets.attention_patterns(
        tokens=list(tokens), attention=patterns.detach().float().cpu(), attention_head_names=names
    )


def attention_patterns(
    patterns: Float[Tensor, "head query key"],
    tokens: Sequence[str],
    heads: Sequence[str] | None = None,
    *,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw what each head attends to in one prompt: queries downward, keys across, one panel a head.

    Args:
        patterns: attention probabilities of one prompt.
        tokens: the prompt's tokens.
        heads: their names; numbered where not given.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: no head, or tokens or names of another number.
    """
    look = theme_named(theme)
    count, queries, keys = patterns.shape
    names = [f"H{i}" for i in range(count)] if heads is None else list(heads)
    if count == 0 or len(names) != count:
        raise MansuError(f"attention: {count} heads, {len(names)} names; give a name for each of at least one head")
    if len(tokens) != keys or queries != keys:
        raise MansuError(
            f"attention: {len(tokens)} tokens for patterns of {queries} x {keys}; give one for each position"
        )
    across = min(_ACROSS, count)
    down = math.ceil(count / across)
    side = 250
    height = 150 + down * (side + 34) + 70
    figure = make_subplots(
        rows=down,
        cols=across,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.025,
        vertical_spacing=40 / height if down > 1 else 0,
        subplot_titles=[plain(name) for name in names],
    )
    styled(
        figure,
        look,
        title or "What the heads look at",
        "Rows: the token that looks; columns: the token that is looked at. Dark = most of the attention; each row adds "
        "up to 1.",
        height=height,
    )
    shown = [plain(token) for token in tokens]
    z = patterns.detach().float().cpu().numpy()
    hover = [[[q, k] for k in shown] for q in shown]
    for i, name in enumerate(names):
        causal = [[float(v) if k <= q or v else None for k, v in enumerate(row)] for q, row in enumerate(z[i].tolist())]
        figure.add_heatmap(
            z=causal,
            coloraxis="coloraxis",
            customdata=hover,
            hoverongaps=False,
            xgap=1,
            ygap=1,
            name=plain(name),
            hovertemplate=f"{plain(name)}: %{{customdata[0]}} looks at %{{customdata[1]}}<br>%{{z:.3f}}<extra></extra>",
            row=i // across + 1,
            col=i % across + 1,
        )
    axis = {"showgrid": False, "zeroline": False, "showline": False, "ticks": "", "tickfont": {"size": 10}}
    places = list(range(len(shown)))
    figure.update_xaxes(**axis, tickvals=places, ticktext=shown, tickangle=-60)
    figure.update_yaxes(**axis, tickvals=places, ticktext=shown, autorange="reversed")
    _, zero, high = look.diverging
    figure.update_layout(
        coloraxis={
            "cmin": 0,
            "cmax": 1,
            "colorscale": [[0, zero], [1, high]],
            "colorbar": {"title": {"text": "attention"}, "thickness": 14, "outlinewidth": 0},
        },
        plot_bgcolor=look.band,
    )
    figure.update_annotations(font={"size": 12})
    figure.update_layout(margin={"t": figure.layout.margin.t + 24})
    return figure
