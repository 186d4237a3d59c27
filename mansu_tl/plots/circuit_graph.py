"""A circuit as a layered graph."""

from __future__ import annotations

import math
from collections import defaultdict

import pandas as pd
import plotly.graph_objects as go

from mansu_tl.circuit.graph import reader_kind, writers_behind
from mansu_tl.errors import MansuError
from mansu_tl.plots.layered import MLP_COLUMN, Placement, path, place
from mansu_tl.plots.protocols import CircuitLike
from mansu_tl.plots.theme import Theme, new_figure, number, plain, theme_named

_WIDTHS = (1.1, 1.6, 2.4, 4.2, 7.0)
_OPACITIES = (0.6, 0.7, 0.8, 0.9, 0.95)
_KINDS = {"q": "query (q)", "k": "key (k)", "v": "value (v)", "mlp": "MLP", "logits": "logits"}
_DASHES = {"q": "dot", "k": "dash", "v": "solid", "mlp": "solid", "logits": "solid"}
_SOFT = ("q", "k", "v")
_LABELLED_HEADS = 16
_CROWD = 120  # edges from which on the thin ones fade, so that the wide ones stay readable
_Where = dict[str, int]  # row and column of a panel


def circuit(
    circuit: CircuitLike, reference: CircuitLike | None = None, *, title: str | None = None, theme: str = "light"
) -> go.Figure:
    """Draw a circuit, layers upward: `embed` at the bottom, heads from left to right, then the MLP, `logits` on top.

    Width grows with |score| in five classes, each half as wide in score as the next; blue supports the answer, orange
    with a ring at mid-edge opposes it; q is dotted, k dashed, v solid in the paler hue, MLP and logits solid in the
    darker. Parts without an edge are not drawn. A KV head that several query heads share is a bar under them.

    Args:
        circuit: what to draw.
        reference: another circuit of the same graph; its edges that `circuit` lacks are drawn in grey, and its scores
            are in the hover texts.
        title: plain text; by default the number of edges and the faithfulness.
        theme: "light" or "dark".

    Raises:
        MansuError: the circuit has no edge, or the reference belongs to another graph.
    """
    look = theme_named(theme)
    frame = circuit.to_dataframe()
    if frame.empty:
        raise MansuError("circuit: it has no edge to draw; select more edges or lower the faithfulness target")
    missing = _missing(circuit, reference)
    edges = [(str(w), str(r)) for part in (frame, missing) for w, r in zip(part["writer"], part["reader"], strict=True)]
    placement = place(circuit.writers, edges, circuit.kv_groups)
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
    draw_panel(figure, frame, placement, circuit.kv_groups, top, look, beside=reference)
    draw_legend(figure, frame, top, look, ghosts=len(missing))
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
    panel: int = 1,
    panels: int = 1,
) -> None:
    """Draw one circuit into one panel of a figure.

    Args:
        frame: its edges, with columns writer, reader and score.
        top: the |score| that the widest edges stand for.
        beside: another circuit whose scores are added to the hover texts.
        panel: number of the panel, from 1.
        panels: how many there are, side by side.
    """
    where: _Where = {} if panels == 1 else {"row": 1, "col": panel}
    _bands(figure, placement, look, panel)
    _edges(figure, frame, placement, top, look, where)
    _middles(figure, frame, beside, placement, top, look, where)
    _nodes(figure, frame, placement, kv_groups, look, panels, where)
    _axes(figure, placement, panels, where)


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


def _classes(frame: pd.DataFrame, top: float) -> tuple[list[int], list[float]]:
    """The width class of each edge, and the lower ends of the classes, for a largest |score| of `top`."""
    size = frame["score"].abs()
    floors = [0.0, *(top / 2**i for i in range(len(_WIDTHS) - 1, 0, -1))]
    return [sum(value > floor for floor in floors[1:]) for value in size], floors


def _colour(look: Theme, kind: str, positive: bool) -> str:
    if positive:
        return look.positive_soft if kind in _SOFT else look.positive
    return look.negative_soft if kind in _SOFT else look.negative


def _edges(
    figure: go.Figure, frame: pd.DataFrame, placement: Placement, top: float, look: Theme, where: _Where
) -> None:
    """One trace for each width class, sign and kind; the widest last, so that they lie on top."""
    groups: dict[tuple[int, str, bool], tuple[list[float | None], list[float | None]]] = defaultdict(lambda: ([], []))
    rows = zip(frame["writer"], frame["reader"], frame["score"].astype(float), _classes(frame, top)[0], strict=True)
    for writer, reader, score, size in rows:
        xs, ys = path(placement, str(writer), str(reader))
        all_x, all_y = groups[size, reader_kind(str(reader)), score >= 0]
        all_x += [*xs, None]
        all_y += [*ys, None]
    fade = min(1.0, math.sqrt(_CROWD / len(frame)))
    for (size, kind, positive), (xs_all, ys_all) in sorted(groups.items()):
        line = {"width": _WIDTHS[size], "color": _colour(look, kind, positive), "dash": _DASHES[kind]}
        figure.add_scatter(
            x=xs_all,
            y=ys_all,
            mode="lines",
            line=line,
            opacity=_OPACITIES[size] * (fade if size < 2 else 1),
            hoverinfo="skip",
            legendgroup=kind,
            showlegend=False,
            name=_KINDS[kind],
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
    reference: CircuitLike | None,
    placement: Placement,
    top: float,
    look: Theme,
    where: _Where,
) -> None:
    """Hover points at mid-edge, carrying the numbers; rings where the score is negative."""
    others: dict[tuple[str, str], float] = {}
    if reference is not None:
        table = reference.to_dataframe()
        pairs = zip(table["writer"], table["reader"], strict=True)
        others = dict(zip(pairs, table["score"].astype(float), strict=True))
    parts: dict[str, list[tuple[float, float, float, int, list[object]]]] = defaultdict(list)
    names = zip(frame["writer"].astype(str), frame["reader"].astype(str), strict=True)
    rows = zip(names, frame["score"].astype(float), _classes(frame, top)[0], strict=True)
    for (writer, reader), score, size in rows:
        xs, ys = path(placement, writer, reader)
        beside = "" if reference is None else f"<br>in the reference: {number(others.get((writer, reader), math.nan))}"
        verb = "supports" if score >= 0 else "opposes"
        text = f"{plain(writer)} → {plain(reader)}<br>score {number(score)} ({verb} the answer){beside}"
        at = len(xs) // 2
        parts[reader_kind(reader)].append((xs[at], ys[at], score, size, [writer, reader, score, text]))
    small = max(0.7, min(1.0, math.sqrt(_CROWD / len(frame))))
    for kind, points in parts.items():
        ring = _colour(look, kind, False)
        figure.add_scatter(
            x=[p[0] for p in points],
            y=[p[1] for p in points],
            mode="markers",
            marker={
                "size": [(4 + p[3]) * (1 if p[3] else small) if p[2] < 0 else 9 for p in points],
                "color": [look.paper if p[2] < 0 else "rgba(0,0,0,0)" for p in points],
                "line": {"width": [(1.5 if p[3] else small) if p[2] < 0 else 0 for p in points], "color": ring},
            },
            customdata=[p[4] for p in points],
            hovertemplate="%{customdata[3]}<extra></extra>",
            legendgroup=kind,
            showlegend=False,
            name=f"edges into {_KINDS[kind]}",
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
    size = max(12, min(34, int(560 / panels / (placement.n_heads + 2))))
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
            text=[_node_text(n, placement.n_heads * panels) for n in chosen],
            textfont={"size": 12 if ends_only else max(8, min(11, size // 3 + 1)), "color": look.ink},
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


def draw_legend(figure: go.Figure, frame: pd.DataFrame, top: float, look: Theme, ghosts: int = 0) -> None:
    """Entries for kinds (which switch their edges on and off), sign and width, of all edges in `frame`."""

    def entry(
        name: str, group: str, heading: str, line: dict[str, object], marker: dict[str, object] | None = None
    ) -> None:
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="lines+markers" if marker else "lines",
            line=line,
            marker=marker,
            name=name,
            legendgroup=group,
            legendgrouptitle={"text": heading} if heading else None,
            hoverinfo="skip",
        )

    kinds = [kind for kind in _KINDS if kind in {reader_kind(r) for r in frame["reader"]}]
    for i, kind in enumerate(kinds):
        line = {"width": 2.3, "dash": _DASHES[kind], "color": _colour(look, kind, True)}
        entry(_KINDS[kind], kind, "Edge into" if i == 0 else "", line)
    entry("supports the answer", "sign", "Sign of the score", {"width": 4, "color": look.positive})
    if (frame["score"] < 0).any():
        line = {"width": 4, "color": look.negative}
        ring = {"size": 7, "color": look.paper, "line": {"width": 1.6, "color": look.negative}}
        entry("opposes it", "sign", "", line, ring)
    classes, floors = _classes(frame, top)
    for i, size in enumerate(sorted(set(classes), reverse=True)):
        upper = number(floors[size + 1] if size + 1 < len(floors) else top, 2)
        text = f"{number(floors[size], 2)} to {upper}"
        entry(text, "width", "|score|" if i == 0 else "", {"width": _WIDTHS[size], "color": look.ink})
    if ghosts:
        line = {"width": 1, "color": look.neutral}
        entry(f"{ghosts} edges", "reference", "Only in the reference", line)


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
