"""Relearning curves: what fine-tuning on a few facts brings back, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.plots.series import add_band, legend_below, series_styles
from mansu_tl.plots.theme import number, plain, styled, theme_named
from mansu_tl.results.intervals import interval_over_facts
from mansu_tl.verification.relearning import measure_index

_NAMES = {"multiple_choice": "multiple choice, %", "cloze": "cloze, %", "log_odds": "log-odds, nats"}


@runtime_checkable
class RelearningCurveLike(Protocol):
    """One model under one attack."""

    @property
    def label(self) -> str:
        """Which model."""

    @property
    def kind(self) -> str:
        """Facts or text."""

    @property
    def learning_rate(self) -> float:
        """Of the attack."""

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps at which it was asked."""

    @property
    def values(self) -> Float[Tensor, "measure step question"]:
        """What it answers."""

    @property
    def excess(self) -> Float[Tensor, "measure step question"]:
        """The same above the model's own prior on never-seen names."""

    @property
    def facts(self) -> tuple[str, ...]:
        """The fact behind each question."""


@runtime_checkable
class RelearningLike(Protocol):
    """Curves of several models under the same attacks."""

    @property
    def curves(self) -> Sequence[RelearningCurveLike]:
        """One a model, attack and learning rate."""

    @property
    def reference(self) -> str:
        """The label of the never-trained model; "" = there is none."""


def relearning(
    result: RelearningLike,
    *,
    measures: Sequence[str] = ("multiple_choice", "cloze"),
    kind: str = "facts",
    excess: bool = False,
    chance: float | int | None = None,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw what each model answers while an attacker fine-tunes it, one column a learning rate, one row a measure.

    Bands are 95 % intervals over facts, the attack's splits taken together; the never-trained model is dotted and grey.
    What lies above it has come back; what it reaches itself can be learnt from the attack alone.

    Args:
        result: curves of several models under the same attacks.
        measures: of "multiple_choice", "cloze" and "log_odds".
        kind: attacks on "facts" or with unrelated "text".
        excess: subtract each model's own prior on names that it has never seen.
        chance: multiple choice by guessing, in percent, drawn as a line.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: no curve of this kind, no measure or one that does not exist, or curves without a common step.
    """
    look = theme_named(theme)
    if not measures:
        raise MansuError("relearning: no measure to draw; name one of multiple_choice, cloze, log_odds")
    places = [measure_index(name) for name in measures]
    curves = [curve for curve in result.curves if curve.kind == kind]
    if not curves:
        kinds = ", ".join(dict.fromkeys(curve.kind for curve in result.curves))
        raise MansuError(f"relearning: no curve of kind {kind!r}; it has {kinds}")
    rates = sorted({curve.learning_rate for curve in curves})
    steps = sorted(set(curves[0].steps).intersection(*(curve.steps for curve in curves)))
    if not steps:
        raise MansuError("relearning: the curves share no step; ask every model at the same steps")
    labels = list(dict.fromkeys(curve.label for curve in curves))
    looks = series_styles(labels, look, [result.reference])
    n_rows = len(measures)
    figure = make_subplots(
        rows=n_rows,
        cols=len(rates),
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.07,
        subplot_titles=[f"attack at learning rate {rate:g}" for rate in rates],
    )
    what = "above the model's own prior" if excess else "asked about facts that are not in the attack"
    trained = "a few forget facts" if kind == "facts" else "unrelated text"
    styled(
        figure,
        look,
        title or f"What fine-tuning on {trained} brings back",
        f"Forget questions, {what}. Bands: 95 % intervals over facts. "
        + (f"Above the dotted line ({result.reference}) = knowledge that came back." if result.reference else ""),
        height=190 + 235 * n_rows,
    )
    x = [math.log2(1 + step) for step in steps]
    for col, rate in enumerate(rates, 1):
        for row, (measure, place) in enumerate(zip(measures, places, strict=True), 1):
            scale = 1.0 if measure == "log_odds" else 100.0
            for label in labels:
                mine = [c for c in curves if c.label == label and c.learning_rate == rate]
                if not mine:
                    continue
                facts = [fact for curve in mine for fact in curve.facts]
                means, lows, highs = [], [], []
                for step in steps:
                    parts = [
                        (c.excess if excess else c.values)[place, c.steps.index(step)].double().cpu() for c in mine
                    ]
                    answers = torch.cat(parts)
                    low, high = interval_over_facts(answers, facts)
                    means.append(scale * answers.mean().item())
                    lows.append(scale * low)
                    highs.append(scale * high)
                style = looks[label]
                add_band(figure, x, lows, highs, style.colour, plain(label), row, col)
                figure.add_scatter(
                    x=x,
                    y=means,
                    mode="lines+markers",
                    name=plain(label),
                    legendgroup=plain(label),
                    showlegend=row == 1 and rate == min(c.learning_rate for c in curves if c.label == label),
                    line={"color": style.colour, "width": 2.6, "dash": style.dash},
                    marker={"symbol": style.symbol, "size": 8, "line": {"width": 1.4, "color": style.colour}},
                    customdata=[[s, lo, hi] for s, lo, hi in zip(steps, lows, highs, strict=True)],
                    hovertemplate=f"{plain(label)}<br>{plain(_NAMES[measure])} after %{{customdata[0]}} steps: "
                    "%{y:.1f} [%{customdata[1]:.1f}, %{customdata[2]:.1f}]<extra></extra>",
                    row=row,
                    col=col,
                )
            if chance is not None and measure == "multiple_choice" and not excess:
                figure.add_hline(y=chance, line={"color": look.muted, "width": 1.2, "dash": "dash"}, row=row, col=col)
                if col == len(rates):
                    figure.add_annotation(
                        x=x[-1],
                        y=chance,
                        text=f"chance {number(chance)}",
                        showarrow=False,
                        xanchor="right",
                        yanchor="bottom",
                        font={"size": 11, "color": look.muted},
                        row=row,
                        col=col,
                    )
    figure.update_xaxes(tickvals=x, ticktext=[str(step) for step in steps], showgrid=False, zeroline=False)
    figure.update_xaxes(title_text="fine-tuning steps (log scale)", row=n_rows)
    for row, measure in enumerate(measures, 1):
        name = _NAMES[measure].replace(", %", ", points") if excess else _NAMES[measure]
        figure.update_yaxes(title_text=f"{name} above prior" if excess else name, row=row, col=1)
        if measure != "log_odds" and not excess:
            figure.update_yaxes(range=[-4, 104], tickvals=[0, 25, 50, 75, 100], row=row)
    figure.update_annotations(font={"size": 13}, selector={"yref": "paper"})
    legend_below(figure, 88, figure.layout.margin.t + 24)
    return figure
