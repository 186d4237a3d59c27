"""A circuit as a layered graph."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

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
)
from mansu_tl.plots.layered import MLP_COLUMN, Placement, bundled, path, place
from mansu_tl.plots.ordering import untangled
from mansu_tl.plots.protocols import CircuitLike
from mansu_tl.plots.theme import Theme, new_figure, number, plain, theme_named

_LABELLED_HEADS = 16
_FAINT_OPACITIES = (0.22, 0.5)  # of many and of few
_OPACITIES = (0.75, 0.8, 0.85, 0.9, 0.95)
_Where = dict[str, int]  # row and column of a panel


def circuit(
    circuit: CircuitLike,
    reference: CircuitLike | None = None,
    *,
    emphasis: int | None = None,
    untangle: bool = True,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw a circuit, layers upward: `embed` at the bottom, heads side by side, then the MLP, `logits` on top.

    Width grows with |score| in five classes, each half as wide in score as the next; blue supports the answer, orange
    with a ring at mid-edge opposes it; q is dotted, k dashed, v solid in the paler hue, MLP and logits solid in the
    darker. Parts without an edge are not drawn. A KV head that several query heads share is a bar under them. Of a
    large circuit the strongest edges stand out and the others are a faint layer, bundled by where they go; the hover
    texts have the numbers of all.

    Args:
        circuit: what to draw.
        reference: another circuit of the same graph; its edges that `circuit` lacks are drawn in grey, and its scores
            are in the hover texts.
        emphasis: how many of the strongest edges stand out; by default all of up to 120, the 60 strongest of more.
        untangle: order the heads of a layer so that few of the strong edges cross (up to 16 heads a layer, whose names
            stand on them); else by number.
        title: plain text; by default the number of edges and the faithfulness.
        theme: "light" or "dark".

    Raises:
        MansuError: the circuit has no edge, a negative emphasis, or the reference belongs to another graph.
    """
    if emphasis is not None and emphasis < 0:
        raise MansuError(f"circuit: emphasis={emphasis}; give the number of edges that stand out, 0 or more")
    look = theme_named(theme)
    frame = circuit.to_dataframe()
    if frame.empty:
        raise MansuError("circuit: it has no edge to draw; select more edges or lower the faithfulness target")
    missing = _missing(circuit, reference)
    edges = [(str(w), str(r)) for part in (frame, missing) for w, r in zip(part["writer"], part["reader"], strict=True)]
    columns = _columns(circuit, frame[emphasised(frame, emphasis)]) if untangle else None
    placement = place(circuit.writers, edges, circuit.kv_groups, columns)
    faithful = "" if math.isnan(circuit.faithfulness) else f", faithfulness {circuit.faithfulness:.2f}"
    figure = new_figure(
        look,
        title or f"Circuit of {circuit.n_edges} edges{faithful}",
        f"Edges run upward; {circuit.how}" + ("" if reference is None else f"; compared with: {reference.how}"),
        height=int(190 + (112 if placement.n_layers <= 6 else 84) * (placement.n_layers + 1.25)),
    )
    top = float(frame["score"].abs().max())
    if reference is not None:
        _ghosts(figure, missing, placement, look)
    draw_panel(figure, frame, placement, circuit.kv_groups, top, look, beside=reference, emphasis=emphasis)
    draw_legend(figure, frame, top, look, ghosts=len(missing), emphasis=emphasis)
    return figure


def draw_panel(
    figure: go.Figure,
    frame: pd.DataFrame,
    placement: Placement,
    kv_groups: int,
    top: float,
    look: Theme,
    *,
    beside: CircuitLike | None = None,
    emphasis: int | None = None,
    labels: Mapping[str, str] | None = None,
    panel: int = 1,
    panels: int = 1,
) -> None:
    """Draw one circuit into one panel of a figure.

    Args:
        frame: its edges, with columns writer, reader and score.
        top: the |score| that the widest edges stand for.
        beside: another circuit whose scores are added to the hover texts.
        emphasis: how many edges stand out.
        labels: texts of nodes, where they are not those of their names.
        panel: number of the panel, from 1.
        panels: how many there are, side by side.
    """
    where: _Where = {} if panels == 1 else {"row": 1, "col": panel}
    _bands(figure, placement, look, panel)
    strong = emphasised(frame, emphasis)
    _faint(figure, frame[~strong], placement, look, where)
    _edges(figure, frame[strong], placement, top, look, where)
    _middles(figure, frame, strong, beside, placement, top, look, where)
    _nodes(figure, frame, placement, kv_groups, look, panels, where, labels or {})
    _axes(figure, placement, panels, where)


def _columns(circuit: CircuitLike, frame: pd.DataFrame) -> dict[str, int] | None:
    """Columns that keep the given edges apart; None where heads are told apart by their column alone."""
    if frame.empty or sum(name.startswith("L0H") for name in circuit.writers) > _LABELLED_HEADS:
        return None
    edges = list(zip(frame["writer"].astype(str), frame["reader"].astype(str), strict=True))
    return untangled(circuit.writers, edges, circuit.kv_groups)


def _missing(circuit: CircuitLike, reference: CircuitLike | None) -> pd.DataFrame:
    """The edges of `reference` that `circuit` lacks."""
    if reference is None:
        return circuit.to_dataframe().iloc[:0]
    if (circuit.writers, circuit.readers) != (reference.writers, reference.readers):
        raise MansuError("circuits: they belong to graphs of different shape; compare circuits of one architecture")
    frame, other = circuit.to_dataframe(), reference.to_dataframe()
    here = set(zip(frame["writer"], frame["reader"], strict=True))
    lacks = [pair not in here for pair in zip(other["writer"], other["reader"], strict=True)]
    return other[lacks]


def _edges(
    figure: go.Figure, frame: pd.DataFrame, placement: Placement, top: float, look: Theme, where: _Where
) -> None:
    """One trace for each width class, sign and kind; the widest last, so that they lie on top."""
    groups: dict[tuple[int, str, bool], tuple[list[float | None], list[float | None]]] = defaultdict(lambda: ([], []))
    rows = zip(
        frame["writer"], frame["reader"], frame["score"].astype(float), width_classes(frame, top)[0], strict=True
    )
    for writer, reader, score, size in rows:
        xs, ys = path(placement, str(writer), str(reader))
        all_x, all_y = groups[size, reader_kind(str(reader)), score >= 0]
        all_x += [*xs, None]
        all_y += [*ys, None]
    for (size, kind, positive), (xs_all, ys_all) in sorted(groups.items()):
        line = {"width": WIDTHS[size], "color": edge_colour(look, kind, positive), "dash": DASHES[kind]}
        figure.add_scatter(
            x=xs_all,
            y=ys_all,
            mode="lines",
            line=line,
            opacity=_OPACITIES[size],
            hoverinfo="skip",
            legendgroup=kind,
            showlegend=False,
            name=KINDS[kind],
            **where,
        )


def _faint(figure: go.Figure, frame: pd.DataFrame, placement: Placement, look: Theme, where: _Where) -> None:
    """The edges that do not stand out: thin, pale and in bundles, under the others; one trace a kind and sign."""
    groups: dict[tuple[str, bool], tuple[list[float | None], list[float | None]]] = defaultdict(lambda: ([], []))
    for writer, reader, score in zip(frame["writer"], frame["reader"], frame["score"].astype(float), strict=True):
        xs, ys = bundled(placement, str(writer), str(reader))
        all_x, all_y = groups[reader_kind(str(reader)), score >= 0]
        all_x += [*xs, None]
        all_y += [*ys, None]
    many, few = _FAINT_OPACITIES
    for (kind, positive), (xs_all, ys_all) in sorted(groups.items()):
        figure.add_scatter(
            x=xs_all,
            y=ys_all,
            mode="lines",
            line={"width": FAINT, "color": edge_colour(look, kind, positive), "dash": DASHES[kind]},
            opacity=max(many, min(few, 60 / len(frame))),
            hoverinfo="skip",
            legendgroup=kind,
            showlegend=False,
            name=KINDS[kind],
            **where,
        )


def _ghosts(figure: go.Figure, missing: pd.DataFrame, placement: Placement, look: Theme) -> None:
    xs_all: list[float | None] = []
    ys_all: list[float | None] = []
    for row in missing.itertuples():
        xs, ys = path(placement, str(row.writer), str(row.reader))
        xs_all += [*xs, None]
        ys_all += [*ys, None]
    figure.add_scatter(
        x=xs_all,
        y=ys_all,
        mode="lines",
        line={"width": 1, "color": look.neutral},
        opacity=0.5,
        hoverinfo="skip",
        legendgroup="reference",
        showlegend=False,
        name="only in the reference",
    )


def _middles(
    figure: go.Figure,
    frame: pd.DataFrame,
    strong: pd.Series,
    reference: CircuitLike | None,
    placement: Placement,
    top: float,
    look: Theme,
    where: _Where,
) -> None:
    """Hover points on every edge, carrying the numbers; rings where a strong one's score is negative."""
    others: dict[tuple[str, str], float] = {}
    if reference is not None:
        table = reference.to_dataframe()
        pairs = zip(table["writer"], table["reader"], strict=True)
        others = dict(zip(pairs, table["score"].astype(float), strict=True))
    parts: dict[str, list[tuple[float, float, bool, int, list[object]]]] = defaultdict(list)
    names = zip(frame["writer"].astype(str), frame["reader"].astype(str), strict=True)
    rows = zip(names, frame["score"].astype(float), width_classes(frame, top)[0], strong, strict=True)
    for (writer, reader), score, size, front in rows:
        xs, ys = (path if front else bundled)(placement, writer, reader)
        beside = "" if reference is None else f"<br>in the reference: {number(others.get((writer, reader), math.nan))}"
        verb = "supports" if score >= 0 else "opposes"
        text = f"{plain(writer)} → {plain(reader)}<br>score {number(score)} ({verb} the answer){beside}"
        at = len(xs) // (2 if front else 5)  # where a bundled edge is still on its own
        parts[reader_kind(reader)].append((xs[at], ys[at], front and score < 0, size, [writer, reader, score, text]))
    for kind, points in parts.items():
        ring = edge_colour(look, kind, False)
        figure.add_scatter(
            x=[p[0] for p in points],
            y=[p[1] for p in points],
            mode="markers",
            marker={
                "size": [4 + p[3] if p[2] else 9 for p in points],
                "color": [look.paper if p[2] else "rgba(0,0,0,0)" for p in points],
                "line": {"width": [1.5 if p[2] else 0 for p in points], "color": ring},
            },
            customdata=[p[4] for p in points],
            hovertemplate="%{customdata[3]}<extra></extra>",
            legendgroup=kind,
            showlegend=False,
            name=f"edges into {KINDS[kind]}",
            **where,
        )


def _nodes(
    figure: go.Figure,
    frame: pd.DataFrame,
    placement: Placement,
    kv_groups: int,
    look: Theme,
    panels: int,
    where: _Where,
    labels: Mapping[str, str],
) -> None:
    """Bars, stubs and nodes with the sums of what enters and leaves them."""
    sent = frame.groupby("writer")["score"].sum()
    received: dict[str, float] = defaultdict(float)
    bar_sums: dict[str, float] = defaultdict(float)
    for reader, score in zip(frame["reader"], frame["score"].astype(float), strict=True):
        for target in writers_behind(reader, kv_groups) or ["logits"]:
            received[target] += score
        bar_sums[str(reader).partition(".")[0]] += score
    xs: list[float | None] = []
    ys: list[float | None] = []
    for (x0, y0), (x1, y1) in placement.stubs:
        xs += [x0, x1, None]
        ys += [y0, y1, None]
    figure.add_scatter(
        x=xs, y=ys, mode="lines", line={"width": 1, "color": look.muted}, hoverinfo="skip", showlegend=False, **where
    )
    for name, (left, right, y) in placement.bars.items():
        text = f"{plain(name)}: KV head of {kv_groups} query heads<br>in {number(bar_sums[name])}"
        figure.add_scatter(
            x=[left, (left + right) / 2, right],
            y=[y] * 3,
            mode="lines",
            line={"width": 4, "color": look.muted},
            text=[text] * 3,
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
            name=name,
            **where,
        )
    size = max(12, min(44 if labels else 34, int(560 / panels / (placement.n_heads + 2))))
    for shape, chosen in (
        ("circle", [n for n in placement.nodes if "H" in n]),
        ("square", [n for n in placement.nodes if n.startswith("MLP")]),
        ("square", [n for n in placement.nodes if n in ("embed", "logits")]),
    ):
        if not chosen:
            continue
        ends_only = chosen[0] in ("embed", "logits")
        figure.add_scatter(
            x=[placement.nodes[n][0] for n in chosen],
            y=[placement.nodes[n][1] for n in chosen],
            mode="markers+text",
            marker={"symbol": shape, "size": size, "color": look.paper, "line": {"width": 1.5, "color": look.ink}},
            text=[labels.get(n, _node_text(n, placement.n_heads * panels)) for n in chosen],
            textfont={"size": 13 if ends_only else max(8, min(12, size // 3 + 1)), "color": look.ink},
            textposition=[
                "bottom center" if n == "embed" else "top center" if n == "logits" else "middle center" for n in chosen
            ],
            customdata=[
                [
                    n,
                    float(received.get(n, 0.0)),
                    float(sent.get(n, 0.0)),
                    number(received.get(n, 0.0)),
                    number(sent.get(n, 0.0)),
                ]
                for n in chosen
            ],
            hovertemplate="%{customdata[0]}<br>in %{customdata[3]}, out %{customdata[4]}<extra></extra>",
            showlegend=False,
            name="nodes",
            **where,
        )


def _node_text(name: str, n_heads: int) -> str:
    if name in ("embed", "logits"):
        return name
    if name.startswith("MLP"):
        return "MLP" if n_heads <= _LABELLED_HEADS else ""
    return name[name.index("H") :] if n_heads <= _LABELLED_HEADS else ""


def _bands(figure: go.Figure, placement: Placement, look: Theme, panel: int) -> None:
    number_of = "" if panel == 1 else str(panel)
    for layer in range(0, placement.n_layers, 2):
        figure.add_shape(
            type="rect",
            xref=f"x{number_of} domain",
            yref=f"y{number_of}",
            x0=0,
            x1=1,
            y0=layer - 0.42,
            y1=layer + 0.58,
            layer="below",
            line={"width": 0},
            fillcolor=look.band,
        )


def _axes(figure: go.Figure, placement: Placement, panels: int, where: _Where) -> None:
    heads = list(range(placement.n_heads))
    many = placement.n_heads * panels > _LABELLED_HEADS
    figure.update_xaxes(
        range=[-0.75, placement.n_heads + 1.1],
        showgrid=False,
        zeroline=False,
        showline=False,
        ticks="",
        showticklabels=many,
        tickvals=[*heads[::4], MLP_COLUMN + placement.n_heads],
        ticktext=[*(f"H{h}" for h in heads[::4]), "MLP"],
    )
    layers = list(range(placement.n_layers))
    figure.update_yaxes(
        range=[-1.4, placement.n_layers + 0.65],
        showgrid=False,
        zeroline=False,
        showline=False,
        ticks="",
        tickvals=layers,
        ticktext=[f"layer {i}" for i in layers],
    )
    figure.update_layout(margin={"b": 32 if many else 12}, legend={"tracegroupgap": 2, "groupclick": "togglegroup"})
