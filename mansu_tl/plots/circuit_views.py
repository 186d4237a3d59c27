"""Other views of a circuit: side by side at several stages, and added up layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mansu_tl.circuit import Circuit
from mansu_tl.circuit.graph import layer_of, reader_kind
from mansu_tl.errors import MansuError
from mansu_tl.plots.circuit_graph import draw_panel, pairs_of, require_edges, require_same_graph
from mansu_tl.plots.circuit_look import draw_legend
from mansu_tl.plots.layered import place
from mansu_tl.plots.panels import Panel, new_panel
from mansu_tl.plots.theme import fixed, new_figure, plain, theme_named
from mansu_tl.verification import Divergence


def circuit_stages(
    circuit: Circuit,
    stages: Mapping[str, Divergence] | Mapping[str, Circuit],
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

    Raises:
        MansuError: no stage, a circuit without edges, a divergence of another circuit or a circuit of another graph.
    """
    look = theme_named(theme)
    if not stages:
        raise MansuError("circuit stages: none given; pass at least one, such as the edited model's divergence")
    frames = {first: require_edges(circuit)[["writer", "reader", "score"]]}
    notes = {first: f"{circuit.n_edges} edges"}
    for name, stage in stages.items():
        if name in frames:
            raise MansuError(f"circuit stages: two panels are called {name!r}; rename one")
        if isinstance(stage, Divergence):
            frames[name] = _rescored(stage, frames[first])
            notes[name] = f"CAD {fixed(stage.value, 2)}"
        else:
            frames[name] = _of_graph(circuit, stage)
            faithful = "" if math.isnan(stage.faithfulness) else f", faithfulness {fixed(stage.faithfulness, 2)}"
            notes[name] = f"{stage.n_edges} edges{faithful}"
    everything = pd.concat(frames.values(), ignore_index=True)
    top = float(everything["score"].abs().max())
    placements = [place(circuit.writers, pairs_of(frame), circuit.kv_groups) for frame in frames.values()]
    layers = placements[0].n_layers
    how_to_read = "One scale and layout for all panels: width is |score|, blue supports the answer, orange with a ring "
    how_to_read += "opposes it."
    grid: dict[str, Any] = {"rows": 1, "cols": len(frames), "shared_yaxes": True, "horizontal_spacing": 0.015}
    grid["subplot_titles"] = [f"<b>{plain(name)}</b><br>{plain(note)}" for name, note in notes.items()]
    figure = new_figure(
        look,
        title or "What became of the circuit",
        how_to_read,
        230 + (100 if layers <= 6 else 72) * (layers + 1.25),
        **grid,
    )
    for col, (frame, placement) in enumerate(zip(frames.values(), placements, strict=True), 1):
        draw_panel(Panel(figure, look, 1, col), frame, placement, circuit.kv_groups, top, panels=len(frames))
    draw_legend(Panel(figure, look), everything, top)
    margin = {"t": figure.layout.margin.t + 40}
    figure.update_layout(margin=margin, legend={"orientation": "v", "font": {"size": 11}})
    return figure


def circuit_layers(circuit: Circuit, *, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw a circuit with the heads of each layer as one part, every bundle of edges as one arrow with its summed score.

    Queries, keys and values stay apart; marks as in `circuit`. Supporting and opposing edges of a bundle cancel.

    Raises:
        MansuError: the circuit has no edge.
    """
    look = theme_named(theme)
    grouped = _summed_by_layer(require_edges(circuit))
    writers = tuple(dict.fromkeys(_part(name) for name in circuit.writers))
    heads = [name for name in writers if name.endswith("H0")]
    # In four columns of which the heads take the second, so that they stand beside the trunk and their inputs close by.
    spare = [f"L0H{i}" for i in range(1, 4)]
    placement = place((*writers, *spare), pairs_of(grouped), 1, dict.fromkeys(heads, 1))
    how_to_read = (
        f"Heads of a layer as one part, scores of all edges between two parts added up: {len(grouped)} bundles. "
        f"{circuit.how[:1].upper()}{circuit.how[1:]}."
    )
    panel = new_panel(
        look, title or f"{circuit.n_edges} edges, layer by layer", how_to_read, 190 + 100 * (placement.n_layers + 1.25)
    )
    top = float(grouped["score"].abs().max())
    draw_panel(panel, grouped, placement, 1, top, labels=dict.fromkeys(heads, "heads"))
    draw_legend(panel, grouped, top)
    return panel.figure


def _summed_by_layer(frame: pd.DataFrame) -> pd.DataFrame:
    """Scores added up between parts: columns writer and reader (layer i's heads are LiH0) and score."""
    parts = frame.assign(
        writer=[_part(str(name)) for name in frame["writer"]], reader=[_reader(str(name)) for name in frame["reader"]]
    )
    return parts.groupby(["writer", "reader"], sort=False)["score"].sum().reset_index()


def _part(writer: str) -> str:
    return f"L{layer_of(writer)}H0" if "H" in writer else writer


def _reader(reader: str) -> str:
    kind = reader_kind(reader)
    return reader if kind not in "qkv" else f"L{layer_of(reader)}{'H' if kind == 'q' else 'KV'}0.{kind}"


def _rescored(stage: Divergence, original: pd.DataFrame) -> pd.DataFrame:
    """The circuit's edges with the other model's scores."""
    frame = stage.edges
    if set(pairs_of(frame)) != set(pairs_of(original)):
        raise MansuError(
            f"circuit stages: {stage.label!r} was measured on another circuit; use this circuit's divergence"
        )
    return frame[["writer", "reader"]].assign(score=frame["other"].astype(float))


def _of_graph(circuit: Circuit, stage: Circuit) -> pd.DataFrame:
    require_same_graph(circuit, stage)
    frame = stage.to_dataframe()
    if frame.empty:
        raise MansuError("circuit stages: a circuit without an edge cannot be drawn; leave it out")
    return frame[["writer", "reader", "score"]]
