"""Where the parts of a circuit are drawn: layers upward, heads from left to right and the MLP after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mansu_tl.circuit.graph import layer_of, reader_kind, writers_behind

# One layer is one unit high, one head one unit wide.
RADIUS = 0.12
MLP_COLUMN = 0.35  # right of the last head's column
_MLP_Y = 0.42
_BAR_Y = 0.3
_PORT = {"q": -0.15, "k": 0.0, "v": 0.15}
_POINTS = 24

Point = tuple[float, float]


@dataclass(frozen=True)
class Placement:
    """Positions of what is drawn.

    Attributes:
        nodes: centre of every writer with an edge, and of `logits`.
        bars: KV heads shared by several query heads, drawn as a bar under their group: left, right and height.
        stubs: from a bar up to the heads of its group that are drawn.
        n_layers: layers of the model.
        n_heads: heads of a layer.
    """

    nodes: dict[str, Point]
    bars: dict[str, tuple[float, float, float]]
    stubs: tuple[tuple[Point, Point], ...]
    n_layers: int
    n_heads: int


def place(writers: Sequence[str], edges: Sequence[tuple[str, str]], kv_groups: int) -> Placement:
    """Positions for the given edges; nodes without an edge are left out."""
    n_layers = 1 + max(layer_of(name) for name in writers)
    n_heads = sum(name.startswith("L0H") for name in writers)
    senders = {writer for writer, _ in edges}
    direct = {
        target
        for _, reader in edges
        for target in (writers_behind(reader, kv_groups) or ["logits"])
        if kv_groups == 1 or reader_kind(reader) not in "kv"
    }
    drawn = senders | direct
    nodes = {name: _centre(name, n_layers, n_heads) for name in (*writers, "logits") if name in drawn}
    bars: dict[str, tuple[float, float, float]] = {}
    stubs: list[tuple[Point, Point]] = []
    for _, reader in edges:
        name = reader.partition(".")[0]
        if kv_groups == 1 or reader_kind(reader) not in "kv" or name in bars:
            continue
        group = [_centre(head, n_layers, n_heads) for head in writers_behind(reader, kv_groups)]
        y = group[0][1] - _BAR_Y
        bars[name] = (group[0][0] - RADIUS, group[-1][0] + RADIUS, y)
        heads = [nodes[head] for head in writers_behind(reader, kv_groups) if head in nodes]
        stubs += [((x, y), (x, top - RADIUS)) for x, top in heads]
    return Placement(nodes, bars, tuple(stubs), n_layers, n_heads)


def ends(placement: Placement, writer: str, reader: str) -> tuple[Point, Point]:
    """Where an edge leaves its writer and enters its reader: q on the left, k in the middle, v on the right."""
    x, y = placement.nodes[writer]
    kind = reader_kind(reader)
    name = reader.partition(".")[0]
    if name in placement.bars and kind in "kv":
        left, right, height = placement.bars[name]
        return (x, y + RADIUS), ((left + right) / 2 + _PORT[kind], height)
    name = name.replace("KV", "H")
    to_x, to_y = placement.nodes[name]
    return (x, y + RADIUS), (to_x + _PORT.get(kind, 0.0) * 0.8, to_y - RADIUS)


def curve(start: Point, end: Point) -> tuple[list[float], list[float]]:
    """A cubic Bezier curve that leaves upward and arrives upward; a long vertical one bows to the right."""
    (x0, y0), (x1, y1) = start, end
    rise = y1 - y0
    lift = max(0.45 * rise, 0.12)
    # Without the bow, edges between parts above each other would run through everything between them.
    bow = 0.16 * rise if abs(x1 - x0) < 0.6 and rise > 1 else 0.0
    bow = min(bow, 0.7)
    t = np.linspace(0.0, 1.0, _POINTS)
    s = 1 - t
    xs = s**3 * x0 + 3 * s**2 * t * (x0 + bow) + 3 * s * t**2 * (x1 + bow) + t**3 * x1
    ys = s**3 * y0 + 3 * s**2 * t * (y0 + lift) + 3 * s * t**2 * (y1 - lift) + t**3 * y1
    return xs.tolist(), ys.tolist()


def _centre(name: str, n_layers: int, n_heads: int) -> Point:
    middle = n_heads // 2 - 0.5  # between two columns, so that what runs straight up meets no head
    if name == "embed":
        return middle, -1.0
    if name == "logits":
        return middle, n_layers + 0.25
    layer = layer_of(name)
    if name.startswith("MLP"):
        return n_heads + MLP_COLUMN, layer + _MLP_Y
    return float(name.partition("H")[2]), float(layer)
