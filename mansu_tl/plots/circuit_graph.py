"""A circuit as a layered graph."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mansu_tl.circuit import Circuit
from mansu_tl.circuit.graph import reader_kind, writers_behind
from mansu_tl.errors import MansuError
from mansu_tl.plots.circuit_look import (
    DASHES,
    FAINT,
    KINDS,
    WIDTHS,
    draw_legend,
    edge_colour,
    emphasised,
    width_classes,
)  # fmt: skip
from mansu_tl.plots.layered import MLP_COLUMN, Placement, bundled, path, place
from mansu_tl.plots.ordering import untangled
from mansu_tl.plots.panels import BARE, Panel, marker, new_panel, segments
from mansu_tl.plots.theme import number, plain, theme_named

_LABELLED_HEADS, _LABELLED_LAYERS = 16, 12
_ROOMY, _THINNEST = 36, 0.6  # pixels a layer below which lines are thinner, and how thin they get
_LABEL = 30  # pixels of `embed` and `logits` below and above their marks
_OF_A_LAYER = 0.45  # of the way from layer to layer, the size of a node at most
_FAINT_OPACITIES = (0.22, 0.5)  # of many and of few
_OPACITIES = (0.75, 0.8, 0.85, 0.9, 0.95)
_BUNDLED, _FADED = -1, -2  # the classes of edges that do not stand out, and of those with hardly a score
Way = tuple[Sequence[float], Sequence[float]]


def circuit(
    circuit: Circuit,
    reference: Circuit | None = None,
    *,
    emphasis: int | None = None,
    untangle: bool = False,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw a circuit, layers upward: `embed` at the bottom, heads side by side, then the MLP, `logits` on top.

    Width grows with |score| in five classes, each half as wide in score as the next; blue supports the answer, orange
    with a ring at mid-edge opposes it; q is dotted, k dashed, v solid in the paler hue, MLP and logits solid in the
    darker. Parts without an edge are not drawn. A KV head that several query heads share is a bar under them. Of a
    large circuit the strongest edges stand out and the others are a faint layer, bundled by where they go.

    Args:
        circuit: what to draw.
        reference: another circuit of the same graph; its edges that `circuit` lacks are grey, its scores in the hover texts.
        emphasis: how many of the strongest edges stand out; by default all of up to 120, the 60 strongest of more.
        untangle: order the heads of a layer so that few of the strong edges cross (up to 16 heads a layer); by
            default by number, as in every other figure.

    Raises:
        MansuError: the circuit has no edge, a negative emphasis, or the reference belongs to another graph.
    """
    if emphasis is not None and emphasis < 0:
        raise MansuError(f"circuit: emphasis={emphasis}; give the number of edges that stand out, 0 or more")
    look = theme_named(theme)
    frame = require_edges(circuit)
    missing = frame.iloc[:0] if reference is None else _missing(circuit, reference)
    strong = frame[emphasised(frame, emphasis)]
    columns = (
        untangled(circuit.writers, pairs_of(strong), circuit.kv_groups)
        if untangle and _ordered(circuit, strong)
        else None
    )
    placement = place(circuit.writers, pairs_of(pd.concat([frame, missing])), circuit.kv_groups, columns)
    faithful = "" if math.isnan(circuit.faithfulness) else f", faithfulness {circuit.faithfulness:.2f}"
    how_to_read = f"Edges run upward; {circuit.how}" + (
        "" if reference is None else f"; compared with: {reference.how}"
    )
    panel = new_panel(
        look,
        title or f"Circuit of {circuit.n_edges} edges{faithful}",
        how_to_read,
        190 + (112 if placement.n_layers <= 6 else 84) * (placement.n_layers + 1.25),
    )
    top = float(frame["score"].abs().max())
    if reference is not None:
        xs, ys = _lines([path(placement, *pair) for pair in pairs_of(missing)])
        line = {"width": 1, "color": look.neutral}
        panel.mark(xs, ys, "only in the reference", line=line, opacity=0.5, group="reference", legend=False)
    draw_panel(panel, frame, placement, circuit.kv_groups, top, beside=reference, emphasis=emphasis)
    draw_legend(panel, frame, top, len(missing), emphasis)
    return panel.figure


def thinned(pitch: float | int) -> float:
    """How wide lines are beside their usual width, where a layer has `pitch` pixels."""
    return min(1.0, max(_THINNEST, pitch / _ROOMY))


def require_edges(circuit: Circuit) -> pd.DataFrame:
    """A circuit's table of edges; a `MansuError` where it has none."""
    frame = circuit.to_dataframe()
    if frame.empty:
        raise MansuError("circuit: it has no edge to draw; select more edges or lower the faithfulness target")
    return frame


def require_same_graph(circuit: Circuit, other: Circuit) -> None:
    """Refuse circuits of different graphs with a `MansuError`."""
    if (circuit.writers, circuit.readers) != (other.writers, other.readers):
        raise MansuError("circuits: they belong to graphs of different shape; compare circuits of one architecture")


def pairs_of(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Writer and reader of each edge."""
    return list(zip(frame["writer"].astype(str), frame["reader"].astype(str), strict=True))


def _ordered(circuit: Circuit, frame: pd.DataFrame) -> bool:
    """Whether heads may change places: not where they are told apart by their column alone."""
    return len(frame) > 0 and sum(name.startswith("L0H") for name in circuit.writers) <= _LABELLED_HEADS


def _missing(circuit: Circuit, reference: Circuit) -> pd.DataFrame:
    """The edges of `reference` that `circuit` lacks."""
    require_same_graph(circuit, reference)
    here, other = set(pairs_of(circuit.to_dataframe())), reference.to_dataframe()
    return other[[pair not in here for pair in pairs_of(other)]]


def draw_panel(
    panel: Panel,
    frame: pd.DataFrame,
    placement: Placement,
    kv_groups: int,
    top: float | int,
    *,
    beside: Circuit | None = None,
    emphasis: int | None = None,
    labels: Mapping[str, str] | None = None,
    panels: int = 1,
    pitch: float | int = 100,
    faded: float = 0.0,
) -> None:
    """Draw one circuit into one of `panels` panels, side by side.

    Args:
        frame: its edges, with columns writer, reader and score.
        top: the |score| that the widest edges stand for.
        beside: another circuit whose scores are added to the hover texts.
        labels: texts of nodes, where they are not their names.
        pitch: pixels from layer to layer.
        faded: edges of a smaller |score| are grey hairlines without a sign.
    """
    strong = emphasised(frame, emphasis).tolist()
    sizes = [size if front else _BUNDLED for size, front in zip(width_classes(frame, top)[0], strong, strict=True)]
    gone = (frame["score"].abs() < faded).tolist()
    sizes = [_FADED if is_gone else size for size, is_gone in zip(sizes, gone, strict=True)]
    _bands(panel, placement)
    ways = [
        (bundled if size == _BUNDLED else path)(placement, *pair)
        for pair, size in zip(pairs_of(frame), sizes, strict=True)
    ]
    thin = thinned(pitch)
    _edges(panel, frame, sizes, ways, thin)
    _middles(panel, frame, sizes, ways, beside, thin)
    _bars(panel, frame, placement, kv_groups, thin)
    _nodes(panel, frame, placement, kv_groups, (panels, pitch), labels or {})
    _axes(panel, placement, panels, pitch)


def _edges(panel: Panel, frame: pd.DataFrame, sizes: list[int], drawn: Sequence[Way], thin: float) -> None:
    """One trace for each width class, sign and kind: the bundled ones below, the widest on top."""
    groups: dict[tuple[int, str, bool], list[Way]] = defaultdict(list)
    for (_, reader), score, size, way in zip(pairs_of(frame), frame["score"], sizes, drawn, strict=True):
        groups[size, reader_kind(reader), score >= 0].append(way)
    many, few = _FAINT_OPACITIES
    faint = max(many, min(few, 60 / max(1, sizes.count(_BUNDLED))))
    for (size, kind, positive), ways in sorted(groups.items()):
        width, opacity = (FAINT, faint) if size < 0 else (WIDTHS[size], _OPACITIES[size])
        colour = panel.look.neutral if size == _FADED else edge_colour(panel.look, kind, positive)
        line = {"width": max(FAINT, thin * width), "color": colour, "dash": DASHES[kind]}
        panel.mark(*_lines(ways), KINDS[kind], line=line, opacity=opacity, group=kind, legend=False)


def _lines(ways: Sequence[Way]) -> tuple[np.ndarray, np.ndarray]:
    """`segments` of thousands of edges, as arrays: plotly looks at every entry of a list."""
    xs, ys = (np.full(sum(len(way[0]) + 1 for way in ways), np.nan, np.float32) for _ in range(2))
    start = 0
    for x, y in ways:
        end = start + len(x)
        xs[start:end], ys[start:end], start = x, y, end + 1
    return xs, ys


def _middles(
    panel: Panel,
    frame: pd.DataFrame,
    sizes: list[int],
    drawn: Sequence[Way],
    reference: Circuit | None,
    thin: float,
) -> None:
    """Hover points on every edge, carrying the numbers; rings where a strong one's score is negative."""
    table = frame.iloc[:0] if reference is None else reference.to_dataframe()
    others = dict(zip(pairs_of(table), table["score"].astype(float), strict=True))
    parts: dict[str, list[tuple[float, float, float, list[Any]]]] = defaultdict(list)
    rows = zip(pairs_of(frame), frame["score"].astype(float), sizes, drawn, strict=True)
    for (writer, reader), score, size, (xs, ys) in rows:
        verb = "supports" if score >= 0 else "opposes"
        text = f"{plain(writer)} → {plain(reader)}<br>score {number(score)} ({verb} the answer)"
        if reference is not None:
            text += f"<br>in the reference: {number(others.get((writer, reader), math.nan))}"
        at = len(xs) // (5 if size == _BUNDLED else 2)  # where a bundled edge is still on its own
        ring = thin * (size + 4) if score < 0 <= size else 0
        parts[reader_kind(reader)].append((xs[at], ys[at], ring, [writer, reader, score, text]))
    for kind, points in parts.items():
        x, y, rings, told = zip(*points, strict=True)
        data = np.empty((len(told), 4), object)
        data[:] = told
        circles = {
            "size": np.array([ring or 9 for ring in rings]),
            "color": [panel.look.paper if ring else "rgba(0,0,0,0)" for ring in rings],
            "line": {
                "width": np.array([min(1.5, ring / 3) for ring in rings]),
                "color": edge_colour(panel.look, kind, False),
            },
        }
        name = f"edges into {KINDS[kind]}"
        panel.mark(
            np.array(x),
            np.array(y),
            name,
            "markers",
            hover="%{customdata[3]}",
            data=data,
            marker=circles,
            group=kind,
            legend=False,
        )


def _bars(panel: Panel, frame: pd.DataFrame, placement: Placement, kv_groups: int, thin: float) -> None:
    """KV heads that several query heads share, with the sums of what enters them, and stubs up to the heads."""
    entering = frame["score"].groupby([str(reader).partition(".")[0] for reader in frame["reader"]]).sum()
    line = {"width": 1, "color": panel.look.muted}
    panel.mark(
        *segments([(xs, ys) for xs, ys in (zip(*ends, strict=True) for ends in placement.stubs)]),
        None,
        line=line,
        legend=False,
    )
    for name, (left, right, y) in placement.bars.items():
        text = f"{plain(name)}: KV head of {kv_groups} query heads<br>in {number(entering.get(name, 0.0))}"
        panel.mark(
            [left, (left + right) / 2, right], [y] * 3, name, line={"width": max(1.0, 4 * thin), "color": panel.look.muted},
            hover="%{text}", text=[text] * 3, legend=False,
        )  # fmt: skip


def _nodes(
    panel: Panel,
    frame: pd.DataFrame,
    placement: Placement,
    kv_groups: int,
    room: tuple[int, float | int],
    labels: Mapping[str, str],
) -> None:
    """Nodes with the sums of what enters and leaves them; `room` is the number of panels and pixels from layer to layer."""
    panels, pitch = room
    sent = frame.groupby("writer")["score"].sum()
    received: dict[str, float] = defaultdict(float)
    for reader, score in zip(frame["reader"], frame["score"].astype(float), strict=True):
        for target in writers_behind(reader, kv_groups) or ["logits"]:
            received[target] += score
    size = max(12, min(44 if labels else 34, int(560 / panels / (placement.n_heads + 2))))
    size = max(5, min(size, int(_OF_A_LAYER * pitch)))
    written = placement.n_heads * panels <= _LABELLED_HEADS and size >= 12
    ends = {"embed": "bottom center", "logits": "top center"}
    for shape, names, font in (
        ("circle", [n for n in placement.nodes if "H" in n], max(8, min(12, size // 3 + 1))),
        ("square", [n for n in placement.nodes if n.startswith("MLP")], max(8, min(12, size // 3 + 1))),
        ("square", [n for n in placement.nodes if n in ends], 13),
    ):
        if not names:
            continue
        sums = [(float(received.get(n, 0.0)), float(sent.get(n, 0.0))) for n in names]
        panel.mark(
            [placement.nodes[n][0] for n in names],
            [placement.nodes[n][1] for n in names],
            "nodes",
            "markers+text",
            hover="%{customdata[0]}<br>in %{customdata[3]}, out %{customdata[4]}",
            data=[[n, *both, *map(number, both)] for n, both in zip(names, sums, strict=True)],
            legend=False,
            marker=marker(shape, size, panel.look.paper, panel.look.ink, 1.5 if size >= 12 else 1),
            text=[labels.get(n, n if n in ends else _short(n) if written else "") for n in names],
            textfont={"size": font, "color": panel.look.ink},
            textposition=[ends.get(n, "middle center") for n in names],
        )


def _short(name: str) -> str:
    return "MLP" if name.startswith("MLP") else name[name.index("H") :]


def _bands(panel: Panel, placement: Placement) -> None:
    axes = {"xref": "x domain", "yref": "y"}
    if panel.row is not None and panel.col is not None:
        x, y = panel.figure.get_subplot(panel.row, panel.col)
        axes = {"xref": f"{x.plotly_name.replace('axis', '')} domain", "yref": y.plotly_name.replace("axis", "")}
    for layer in range(0, placement.n_layers, 2):
        panel.figure.add_shape(
            type="rect", **axes, x0=0, x1=1, y0=layer - 0.42, y1=layer + 0.58, layer="below", line={"width": 0},
            fillcolor=panel.look.band,
        )  # fmt: skip


def units_of(n_layers: int, pitch: float | int) -> float:
    """How many layers high a panel is, from below the label of `embed` to above that of `logits`."""
    return n_layers + 1.25 + 2 * max(0.4, _LABEL / pitch)


def _axes(panel: Panel, placement: Placement, panels: int, pitch: float | int) -> None:
    heads, layers = list(range(placement.n_heads)), list(range(placement.n_layers))
    pad = max(0.4, _LABEL / pitch)
    many, each = placement.n_heads * panels > _LABELLED_HEADS, 1 if len(layers) <= _LABELLED_LAYERS else 5
    panel.figure.update_xaxes(
        **BARE,
        range=[-0.75, placement.n_heads + 1.1],
        showticklabels=many,
        tickvals=[*heads[::4], MLP_COLUMN + placement.n_heads],
        ticktext=[*(f"H{h}" for h in heads[::4]), "MLP"],
    )
    panel.figure.update_yaxes(
        **BARE,
        range=[-1 - pad, placement.n_layers + 0.25 + pad],
        tickvals=layers[::each],
        ticktext=[f"layer {i}" for i in layers[::each]],
    )
    legend = {"tracegroupgap": 2, "groupclick": "togglegroup"}
    panel.figure.update_layout(margin={"b": 32 if many else 12}, legend=legend)
