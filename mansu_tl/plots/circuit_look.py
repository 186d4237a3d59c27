"""How edges of a circuit look (width, colour, dash), and the legend that says so."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mansu_tl.circuit.graph import reader_kind
from mansu_tl.plots.panels import Panel
from mansu_tl.plots.theme import Theme, fixed, number

WIDTHS = (1.1, 1.6, 2.4, 4.2, 7.0)
KINDS = {"q": "query (q)", "k": "key (k)", "v": "value (v)", "mlp": "MLP", "logits": "logits"}
DASHES = {"q": "dot", "k": "dash", "v": "solid", "mlp": "solid", "logits": "solid"}
FAINT = 0.8  # width of the edges that do not stand out
_ALL_STAND_OUT, _STAND_OUT = 120, 60


def emphasised(frame: pd.DataFrame, emphasis: int | None) -> pd.Series:
    """Which edges stand out: those of largest |score|, all of up to 120 edges and the 60 strongest of more."""
    most = emphasis if emphasis is not None else len(frame) if len(frame) <= _ALL_STAND_OUT else _STAND_OUT
    return frame["score"].abs().rank(method="first", ascending=False) <= most


def width_classes(frame: pd.DataFrame, top: float | int) -> tuple[list[int], list[float]]:
    """The width class of each edge, and the lower ends of the classes, for a largest |score| of `top`."""
    floors = [0.0, *(top / 2**i for i in range(len(WIDTHS) - 1, 0, -1))]
    return [sum(value > floor for floor in floors[1:]) for value in frame["score"].abs()], floors


def edge_colour(look: Theme, kind: str, positive: bool) -> str:
    """Of an edge into a kind of reader: palest into attention, then into MLPs, strongest into the logits."""
    soft, full, deep = look.supporting if positive else look.opposing
    return soft if kind in "qkv" else deep if kind == "logits" else full


def draw_legend(
    panel: Panel,
    frame: pd.DataFrame,
    top: float | int,
    ghosts: int = 0,
    emphasis: int | None = None,
    thin: float = 1.0,
    faded: float = 0.0,
) -> None:
    """Entries for kinds (which switch their edges on and off), sign and width, of all edges in `frame`; lines are `thin`
    times as wide as elsewhere, edges below `faded` are grey."""
    look, headed = panel.look, set()

    def entry(name: str, group: str, heading: str, line: dict[str, Any], **more: Any) -> None:
        title = {"text": heading} if heading not in headed else None
        headed.add(heading)
        mode = "lines+markers" if more else "lines"
        panel.mark([None], [None], name, mode, group=group, legendgrouptitle=title, line=line, **more)

    kinds = {reader_kind(r) for r in frame["reader"]}
    for kind in (k for k in KINDS if k in kinds):
        line = {"width": 2.3, "dash": DASHES[kind], "color": edge_colour(look, kind, True)}
        entry(KINDS[kind], kind, "Edge into", line)
    if (frame["score"] >= 0).any():
        entry("supports the answer", "sign", "Sign of the score", {"width": 4, "color": look.positive})
    if (frame["score"] < 0).any():
        ring = {"size": 7, "color": look.paper, "line": {"width": 1.6, "color": look.negative}}
        entry("opposes it", "sign", "Sign of the score", {"width": 4, "color": look.negative}, marker=ring)
    strong = emphasised(frame, emphasis)
    classes, floors = width_classes(frame[strong & (frame["score"].abs() >= faded)], top)
    ends, most = [*floors[1:], top], frame["score"].abs().max()
    for size in sorted(set(classes), reverse=True):
        low = number(max(floors[size], faded), 2)
        text = f"{low} or more" if size == len(floors) - 1 and most > top else f"{low} to {number(ends[size], 2)}"
        entry(text, "width", "|score|", {"width": max(FAINT, thin * WIDTHS[size]), "color": look.ink})
    if (frame["score"].abs() < faded).any():
        entry(f"below {number(faded, 2)}", "width", "|score|", {"width": FAINT, "color": look.neutral})
    if not strong.all():
        total = float(frame["score"].abs().sum()) or 1.0
        share = fixed(100 * float(frame["score"].abs()[~strong].sum()) / total, 0)
        line = {"width": FAINT, "color": look.positive_soft}
        entry(f"{int((~strong).sum())} edges, {share} % of all |score|", "faint", "Weaker, in bundles", line)
    if ghosts:
        line = {"width": 1, "color": look.neutral}
        entry(f"{ghosts} edges", "reference", "Only in the reference", line)
