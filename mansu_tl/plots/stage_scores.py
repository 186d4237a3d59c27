"""One edge's or node's score at several stages: each pair a mark, the mean over them a bar with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.plots.theme import new_figure, number, plain, theme_named

_GOLDEN = (math.sqrt(5) - 1) / 2
_SPREAD = 0.24  # of a row, either side


@dataclass(frozen=True)
class StageScore:
    """A score in one model.

    Attributes:
        name: what the model is.
        values: of every pair.
        mean: over pairs.
        interval: its 95 % interval.
    """

    name: str
    values: Float[Tensor, " pair"]
    mean: float
    interval: tuple[float, float]


def stage_scores(
    stages: Sequence[StageScore],
    labels: Sequence[str],
    *,
    chosen: int | None = None,
    metric: str = "logit difference",
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw a score before an edit, after it and after quantization, one row each; zero is where nothing is left.

    Traces, in order: the pairs, the chosen pair, the means.

    Args:
        stages: from the top down.
        labels: a name for each pair, for the hover texts.
        chosen: a pair that is marked in every row.
        metric: what the scores are measured in.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: no stage, labels of another number, or a chosen pair that is not there.
    """
    look = theme_named(theme)
    if not stages:
        raise MansuError("stage scores: none given; pass at least one")
    for stage in stages:
        if len(stage.values) != len(labels):
            raise MansuError(f"stage scores: {len(stage.values)} values, {len(labels)} labels; give one for each pair")
    if chosen is not None and not 0 <= chosen < len(labels):
        raise MansuError(f"stage scores: pair {chosen}, there are {len(labels)}; choose 0..{len(labels) - 1}")
    figure = new_figure(
        look,
        title or "Score at every stage",
        "Each mark is a pair; the bar is the mean over pairs, its whisker the 95 % interval over facts.",
        height=190 + 88 * len(stages),
    )
    shown = [plain(label) for label in labels]
    # Spread evenly within the row, the same pair at the same height in every row.
    heights = [_SPREAD * (2 * ((i * _GOLDEN) % 1) - 1) for i in range(len(labels))]
    figure.add_scatter(
        x=[float(v) for stage in stages for v in stage.values.tolist()],
        y=[row + h for row in range(len(stages)) for h in heights],
        mode="markers",
        name="one pair",
        marker={"size": 5, "color": look.positive_soft, "opacity": 0.55, "line": {"width": 0}},
        customdata=shown * len(stages),
        hovertemplate="%{customdata}<br>score %{x:.3g}<extra></extra>",
    )
    figure.add_scatter(
        x=[] if chosen is None else [float(stage.values[chosen]) for stage in stages],
        y=[] if chosen is None else [row + heights[chosen] for row in range(len(stages))],
        mode="markers",
        name="the chosen pair",
        marker={"size": 11, "symbol": "diamond-open", "color": look.negative, "line": {"width": 2.2}},
        customdata=[] if chosen is None else [shown[chosen]] * len(stages),
        hovertemplate="%{customdata}<br>score %{x:.3g}<extra></extra>",
    )
    figure.add_scatter(
        x=[stage.mean for stage in stages],
        y=list(range(len(stages))),
        mode="markers+text",
        name="mean over pairs",
        marker={"symbol": "line-ns", "size": 26, "color": look.ink, "line": {"width": 3, "color": look.ink}},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [max(0.0, s.interval[1] - s.mean) for s in stages],
            "arrayminus": [max(0.0, s.mean - s.interval[0]) for s in stages],
            "color": look.ink,
            "thickness": 1.6,
            "width": 5,
        },
        text=[f"<b>{number(s.mean)}</b>" for s in stages],
        textposition="top center",
        textfont={"size": 12},
        customdata=[list(s.interval) for s in stages],
        hovertemplate="mean %{x:.4g} [%{customdata[0]:.3g}, %{customdata[1]:.3g}]<extra></extra>",
        cliponaxis=False,
    )
    figure.add_vline(x=0, line={"color": look.muted, "width": 1})
    figure.update_xaxes(title_text=f"score, {plain(metric)}", zeroline=False)
    figure.update_yaxes(
        tickvals=list(range(len(stages))),
        ticktext=[plain(stage.name) for stage in stages],
        range=[len(stages) - 0.55, -0.6],
        showgrid=False,
        zeroline=False,
        showline=False,
        ticks="",
    )
    figure.update_layout(
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"}, margin={"b": 92}
    )
    return figure
