"""How edges of a circuit look (width, colour, dash), and the legend that says so."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from mansu_tl.circuit.graph import reader_kind
from mansu_tl.plots.theme import Theme, fixed, number

WIDTHS = (1.1, 1.6, 2.4, 4.2, 7.0)
KINDS = {"q": "query (q)", "k": "key (k)", "v": "value (v)", "mlp": "MLP", "logits": "logits"}
DASHES = {"q": "dot", "k": "dash", "v": "solid", "mlp": "solid", "logits": "solid"}
FAINT = 0.8  # width of the edges that do not stand out
_SOFT = ("q", "k", "v")
_ALL_STAND_OUT, _STAND_OUT = 120, 60


def emphasised(frame: pd.DataFrame, emphasis: int | None) -> pd.Series:
    """Which edges stand out: those of largest |score|, all of up to 120 edges and the 60 strongest of more."""
    most = emphasis if emphasis is not None else len(frame) if len(frame) <= _ALL_STAND_OUT else _STAND_OUT
    return frame["score"].abs().rank(method="first", ascending=False) <= most


def width_classes(frame: pd.DataFrame, top: float | int) -> tuple[list[int], list[float]]:
    """The width class of each edge, and the lower ends of the classes, for a largest |score| of `top`."""
    size = frame["score"].abs()
    floors = [0.0, *(top / 2**i for i in range(len(WIDTHS) - 1, 0, -1))]
    return [sum(value > floor for floor in floors[1:]) for value in size], floors


def edge_colour(look: Theme, kind: str, positive: bool) -> str:
    """Of an edge into a kind of reader; the inputs of attention are paler."""
    if positive:
        return look.positive_soft if kind in _SOFT else look.positive
    return look.negative_soft if kind in _SOFT else look.negative


def draw_legend(
    figure: go.Figure, frame: pd.DataFrame, top: float, look: Theme, ghosts: int = 0, emphasis: int | None = None
) -> None:
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

    kinds = [kind for kind in KINDS if kind in {reader_kind(r) for r in frame["reader"]}]
    for i, kind in enumerate(kinds):
        line = {"width": 2.3, "dash": DASHES[kind], "color": edge_colour(look, kind, True)}
        entry(KINDS[kind], kind, "Edge into" if i == 0 else "", line)
    entry("supports the answer", "sign", "Sign of the score", {"width": 4, "color": look.positive})
    if (frame["score"] < 0).any():
        line = {"width": 4, "color": look.negative}
        ring = {"size": 7, "color": look.paper, "line": {"width": 1.6, "color": look.negative}}
        entry("opposes it", "sign", "", line, ring)
    strong = emphasised(frame, emphasis)
    classes, floors = width_classes(frame[strong], top)
    for i, size in enumerate(sorted(set(classes), reverse=True)):
        upper = number(floors[size + 1] if size + 1 < len(floors) else top, 2)
        text = f"{number(floors[size], 2)} to {upper}"
        entry(text, "width", "|score|" if i == 0 else "", {"width": WIDTHS[size], "color": look.ink})
    if not strong.all():
        total = float(frame["score"].abs().sum()) or 1.0
        share = fixed(100 * float(frame["score"].abs()[~strong].sum()) / total, 0)
        line = {"width": FAINT, "color": look.positive_soft}
        entry(f"{int((~strong).sum())} edges, {share} % of all |score|", "faint", "Weaker, in bundles", line)
    if ghosts:
        line = {"width": 1, "color": look.neutral}
        entry(f"{ghosts} edges", "reference", "Only in the reference", line)
