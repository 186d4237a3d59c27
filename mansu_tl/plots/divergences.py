"""CAD: one bar a model, or one point an edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from mansu_tl.circuit.graph import reader_kind
from mansu_tl.errors import MansuError
from mansu_tl.plots.protocols import DivergenceLike
from mansu_tl.plots.theme import Theme, fixed, new_figure, number, plain, theme_named

_SYMBOLS = {"q": "circle", "k": "square", "v": "diamond", "mlp": "triangle-up", "logits": "x"}
_NAMES = {"q": "query (q)", "k": "key (k)", "v": "value (v)", "mlp": "MLP", "logits": "logits"}
_LABELLED_EDGES = 6
_LABEL_WIDTH, _LABEL_HEIGHT = 0.16, 0.04  # of the panel


def circuit_divergence(
    divergences: Sequence[DivergenceLike] | Mapping[str, DivergenceLike],
    references: Mapping[str, DivergenceLike] | None = None,
    *,
    bound: float | int | None = None,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw CAD as bars with their 95 % intervals, and the mass loss as a diamond beside each.

    Args:
        divergences: the models to judge; labels are taken from the mapping's keys, else from `.label`.
        references: what to judge them by, such as the noise floor of quantization or a model that never learnt; drawn
            hatched and grey.
        bound: a line at the value that the lower end of the interval has to reach.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: nothing to draw.
    """
    look = theme_named(theme)
    shown = dict(divergences) if isinstance(divergences, Mapping) else {d.label: d for d in divergences}
    if not shown:
        raise MansuError("circuit divergence: none given; pass at least one result of circuit_divergence()")
    if len(shown) != len(divergences):
        raise MansuError("circuit divergence: two results have the same label; pass a mapping label -> result")
    beside = dict(references or {})
    rows = [*shown.items(), *beside.items()]
    figure = new_figure(
        look,
        title or "Circuit attribution divergence (CAD)",
        "0 = the circuit is intact, 1 = gone, above 1 = inverted. Bars: CAD with its 95 % interval over facts; "
        "diamonds: mass loss.",
        height=190 + 46 * len(rows),
    )
    for start, part, name, marker in (
        (0, shown, "models", {"color": look.positive_soft, "line": {"width": 0}}),
        (
            len(shown),
            beside,
            "references",
            {
                "color": look.band,
                "line": {"color": look.neutral, "width": 1.2},
                "pattern": {"shape": "/", "fgcolor": look.neutral, "bgcolor": look.band, "size": 6},
            },
        ),
    ):
        if part:
            _bars(figure, start, part, name, marker, look)
    _masses(figure, rows, look)
    for x, text, dash in (
        (0.0, "intact", "solid"),
        (1.0, "gone", "solid"),
        (bound, f"bound {number(bound or 0.0)}", "dash"),
    ):
        if x is not None:
            figure.add_vline(
                x=x,
                line={"color": look.muted, "width": 1, "dash": dash},
                annotation_text=text,
                annotation_position="top",
                annotation_xanchor="right" if text.startswith("bound") else "center",
                annotation_font={"size": 11, "color": look.muted},
            )
    lows = [min(d.value, d.interval[0], d.mass_loss, 0.0) for _, d in rows]
    highs = [max(d.value, d.interval[1], d.mass_loss, 1.0) for _, d in rows]
    figure.update_xaxes(
        title_text="CAD = 1 − ⟨a, b⟩ / ⟨a, a⟩", range=[min(lows) - 0.06, max(highs) + 0.16], zeroline=False
    )
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=[*(plain(label) for label in shown), *(f"<i>{plain(label)}</i>" for label in beside)],
        range=[len(rows) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
        ticks="",
        showline=False,
    )
    figure.update_layout(
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
        margin={"b": 88, "t": 104},
    )
    return figure


def divergence_scatter(divergence: DivergenceLike, *, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw each edge's score in the other model against its score in the original.

    On the rising line the mechanism is intact, on the level line it is gone, on the falling one inverted.

    Args:
        divergence: one result.
        title: plain text; by default its label and CAD.
        theme: "light" or "dark".

    Raises:
        MansuError: it has no edge.
    """
    look = theme_named(theme)
    frame = divergence.edges
    if frame.empty:
        raise MansuError(
            f"circuit divergence {divergence.label!r}: it has no edge to draw; use a circuit that has some"
        )
    low, high = divergence.interval
    figure = new_figure(
        look,
        title or f"{divergence.label}: edge scores before and after",
        f"CAD {fixed(divergence.value, 3)}, 95 % interval {fixed(low, 3)} to {fixed(high, 3)}; "
        f"mass loss {fixed(divergence.mass_loss, 3)}; {len(frame)} edges.",
        height=600,
    )
    original, other = frame["original"].to_numpy(float), frame["other"].to_numpy(float)
    x_low, x_high = _padded(min(original.min(), 0.0), max(original.max(), 0.0))
    both = np.concatenate([original, other, [0.0]])
    y_low, y_high = _padded(float(both.min()), float(both.max()))
    for slope, name, dash in ((1, "intact", "solid"), (0, "gone", "dash"), (-1, "inverted", "dot")):
        figure.add_scatter(
            x=[x_low, x_high],
            y=[slope * x_low, slope * x_high],
            mode="lines",
            hoverinfo="skip",
            name=name,
            line={"color": look.muted, "width": 1.2, "dash": dash},
        )
    kinds = np.array([reader_kind(str(r)) for r in frame["reader"]])
    for kind, symbol in _SYMBOLS.items():
        chosen = kinds == kind
        if chosen.any():
            part = frame[chosen]
            figure.add_scatter(
                x=original[chosen],
                y=other[chosen],
                mode="markers",
                name=f"into {_NAMES[kind]}",
                marker={
                    "symbol": symbol,
                    "size": 8,
                    "color": look.positive if kind in ("mlp", "logits") else look.positive_soft,
                    "line": {"width": 0.8, "color": look.ink},
                    "opacity": 0.85,
                },
                customdata=[[plain(w), plain(r)] for w, r in zip(part["writer"], part["reader"], strict=True)],
                hovertemplate="%{customdata[0]} → %{customdata[1]}<br>original %{x:.4g}"
                "<br>other %{y:.4g}<extra></extra>",
            )
    for at in _apart(original / (x_high - x_low), other / (y_high - y_low)):
        row = frame.iloc[at]
        figure.add_annotation(
            x=original[at],
            y=other[at],
            text=f"{plain(row['writer'])} → {plain(row['reader'])}",
            showarrow=False,
            font={"size": 10, "color": look.muted},
            yshift=11,
        )
    figure.update_xaxes(title_text="score in the original", range=[x_low, x_high], zeroline=False)
    figure.update_yaxes(title_text=f"score in: {plain(divergence.label)}", range=[y_low, y_high], zeroline=False)
    return figure


def _bars(
    figure: go.Figure,
    start: int,
    part: Mapping[str, DivergenceLike],
    name: str,
    marker: Mapping[str, object],
    look: Theme,
) -> None:
    values = [d.value for d in part.values()]
    figure.add_bar(
        y=list(range(start, start + len(part))),
        x=values,
        orientation="h",
        width=0.62,
        name=name,
        marker=dict(marker),
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [max(0.0, d.interval[1] - d.value) for d in part.values()],
            "arrayminus": [max(0.0, d.value - d.interval[0]) for d in part.values()],
            "color": look.ink,
            "thickness": 1.4,
            "width": 4,
        },
        customdata=[[plain(label), d.interval[0], d.interval[1], d.mass_loss] for label, d in part.items()],
        hovertemplate="%{customdata[0]}<br>CAD %{x:.3f} [%{customdata[1]:.3f}, %{customdata[2]:.3f}]"
        "<br>mass loss %{customdata[3]:.3f}<extra></extra>",
    )
    for row, d in enumerate(part.values(), start):
        figure.add_annotation(
            x=max(d.value, d.interval[1], d.mass_loss, 0.0),
            y=row,
            text=fixed(d.value, 2),
            showarrow=False,
            xanchor="left",
            xshift=8,
            font={"size": 12},
        )


def _masses(figure: go.Figure, rows: Sequence[tuple[str, DivergenceLike]], look: Theme) -> None:
    figure.add_scatter(
        x=[d.mass_loss for _, d in rows],
        y=list(range(len(rows))),
        mode="markers",
        name="mass loss",
        marker={"symbol": "diamond", "size": 9, "color": look.paper, "line": {"color": look.ink, "width": 1.4}},
        hovertemplate="mass loss %{x:.3f}<extra></extra>",
    )


def _apart(xs: np.ndarray, ys: np.ndarray) -> list[int]:
    """The edges of largest original score whose labels do not meet; coordinates are shares of the panel."""
    chosen: list[int] = []
    for at in np.argsort(-np.abs(xs))[: 2 * _LABELLED_EDGES].tolist():
        if len(chosen) < _LABELLED_EDGES and all(
            abs(xs[at] - xs[i]) > _LABEL_WIDTH or abs(ys[at] - ys[i]) > _LABEL_HEIGHT for i in chosen
        ):
            chosen.append(at)
    return chosen


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = 0.06 * (high - low or 1.0)
    return low - pad, high + pad
