"""One circuit at several stages, side by side: original, edited, edited and quantized."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mansu_tl.errors import MansuError
from mansu_tl.plots.circuit_graph import draw_panel
from mansu_tl.plots.circuit_look import draw_legend
from mansu_tl.plots.layered import place
from mansu_tl.plots.protocols import CircuitLike, DivergenceLike
from mansu_tl.plots.theme import fixed, plain, styled, theme_named


def circuit_stages(
    circuit: CircuitLike,
    stages: Mapping[str, DivergenceLike] | Mapping[str, CircuitLike],
    *,
    first: str = "original",
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw a circuit and what became of it side by side, in one layout and with one scale of widths.

    Signs and marks as in `circuit`. With divergences every panel has the same edges, each as wide as its score there;
    with circuits (rediscovered after an edit, say) every panel has its own.

    Args:
        circuit: the original's.
        stages: by name, results of `circuit_divergence` for this circuit, or circuits of the same graph.
        first: name of the first panel.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: no stage, a circuit without edges, a divergence of another circuit or a circuit of another graph.
    """
    look = theme_named(theme)
    if not stages:
        raise MansuError("circuit stages: none given; pass at least one, such as the edited model's divergence")
    original = circuit.to_dataframe()
    if original.empty:
        raise MansuError("circuit: it has no edge to draw; select more edges or lower the faithfulness target")
    pairs = set(zip(original["writer"].astype(str), original["reader"].astype(str), strict=True))
    frames = {first: original[["writer", "reader", "score"]]}
    notes = {first: f"{circuit.n_edges} edges"}
    for name, stage in stages.items():
        if name in frames:
            raise MansuError(f"circuit stages: two panels are called {name!r}; rename one")
        if isinstance(stage, DivergenceLike):
            frames[name] = _rescored(stage, pairs)
            notes[name] = f"CAD {fixed(stage.value, 2)}"
        else:
            frames[name] = _of_graph(circuit, stage)
            faithful = "" if math.isnan(stage.faithfulness) else f", faithfulness {fixed(stage.faithfulness, 2)}"
            notes[name] = f"{stage.n_edges} edges{faithful}"
    everything = pd.concat(frames.values(), ignore_index=True)
    top = float(everything["score"].abs().max())
    edges = list(zip(everything["writer"].astype(str), everything["reader"].astype(str), strict=True))
    placement = place(circuit.writers, list(dict.fromkeys(edges)), circuit.kv_groups)
    count = len(frames)
    figure = make_subplots(
        rows=1,
        cols=count,
        shared_yaxes=True,
        horizontal_spacing=0.015,
        subplot_titles=[f"<b>{plain(name)}</b><br>{plain(note)}" for name, note in notes.items()],
    )
    styled(
        figure,
        look,
        title or "What became of the circuit",
        "One scale and layout for all panels: width is |score|, blue supports the answer, orange with a ring opposes it.",
        height=int(230 + (100 if placement.n_layers <= 6 else 72) * (placement.n_layers + 1.25)),
    )
    for panel, frame in enumerate(frames.values(), 1):
        here = list(zip(frame["writer"].astype(str), frame["reader"].astype(str), strict=True))
        own = place(circuit.writers, here, circuit.kv_groups)
        draw_panel(figure, frame, own, circuit.kv_groups, top, look, panel=panel, panels=count)
    draw_legend(figure, everything, top, look)
    figure.update_annotations(font={"size": 13}, selector={"yref": "paper"})
    figure.update_layout(
        margin={"t": figure.layout.margin.t + 40},
        legend={"orientation": "v", "font": {"size": 11}},
    )
    return figure


def _rescored(stage: DivergenceLike, pairs: set[tuple[str, str]]) -> pd.DataFrame:
    """The circuit's edges with the other model's scores."""
    frame = stage.edges
    if set(zip(frame["writer"].astype(str), frame["reader"].astype(str), strict=True)) != pairs:
        raise MansuError(
            f"circuit stages: {stage.label!r} was measured on another circuit; use this circuit's divergence"
        )
    return frame[["writer", "reader"]].assign(score=frame["other"].astype(float))


def _of_graph(circuit: CircuitLike, stage: CircuitLike) -> pd.DataFrame:
    if (stage.writers, stage.readers) != (circuit.writers, circuit.readers):
        raise MansuError("circuits: they belong to graphs of different shape; compare circuits of one architecture")
    frame = stage.to_dataframe()
    if frame.empty:
        raise MansuError("circuit stages: a circuit without an edge cannot be drawn; leave it out")
    return frame[["writer", "reader", "score"]]
