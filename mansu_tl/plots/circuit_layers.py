"""A circuit added up layer by layer: attention and MLP of each layer as one part."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from mansu_tl.circuit.graph import layer_of, reader_kind
from mansu_tl.errors import MansuError
from mansu_tl.plots.circuit_graph import draw_panel
from mansu_tl.plots.circuit_look import draw_legend
from mansu_tl.plots.layered import place
from mansu_tl.plots.protocols import CircuitLike
from mansu_tl.plots.theme import new_figure, theme_named


def circuit_layers(circuit: CircuitLike, *, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw a circuit with the heads of each layer as one part, every bundle of edges as one arrow with its summed score.

    Queries, keys and values stay apart; marks as in `circuit`. Supporting and opposing edges of a bundle cancel, the hover
    texts have their number.

    Args:
        circuit: what to draw.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: the circuit has no edge.
    """
    look = theme_named(theme)
    frame = circuit.to_dataframe()
    if frame.empty:
        raise MansuError("circuit: it has no edge to draw; select more edges or lower the faithfulness target")
    grouped = summed_by_layer(frame)
    writers = tuple(dict.fromkeys(_part(name) for name in circuit.writers))
    edges = list(zip(grouped["writer"], grouped["reader"], strict=True))
    # In four columns of which the heads take the second, so that they stand beside the trunk and their inputs close by.
    spare = [f"L0H{i}" for i in range(1, 4)]
    placement = place((*writers, *spare), edges, 1, dict.fromkeys((w for w in writers if w.endswith("H0")), 1))
    figure = new_figure(
        look,
        title or f"{circuit.n_edges} edges, layer by layer",
        f"Heads of a layer as one part, scores of all edges between two parts added up: {len(grouped)} bundles. "
        f"{circuit.how[:1].upper()}{circuit.how[1:]}.",
        height=int(190 + 100 * (placement.n_layers + 1.25)),
    )
    top = float(grouped["score"].abs().max())
    draw_panel(figure, grouped, placement, 1, top, look, labels={n: "heads" for n in writers if n.endswith("H0")})
    draw_legend(figure, grouped, top, look)
    return figure


def summed_by_layer(frame: pd.DataFrame) -> pd.DataFrame:
    """Scores added up between parts: columns writer and reader (layer i's heads are LiH0), score and count."""
    parts = frame.assign(
        writer=[_part(str(name)) for name in frame["writer"]], reader=[_reader(str(name)) for name in frame["reader"]]
    )
    grouped = parts.groupby(["writer", "reader"], sort=False)["score"].agg(["sum", "size"]).reset_index()
    return grouped.rename(columns={"sum": "score", "size": "count"})


def _part(writer: str) -> str:
    return f"L{layer_of(writer)}H0" if "H" in writer else writer


def _reader(reader: str) -> str:
    kind = reader_kind(reader)
    return reader if kind not in "qkv" else f"L{layer_of(reader)}{'H' if kind == 'q' else 'KV'}0.{kind}"
