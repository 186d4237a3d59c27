"""Where the parts of a circuit are drawn: layers upward, heads from left to right and the MLP after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
_TURN, _MERGE = 0.62, 0.3  # how far bundled edges rise before they are in their gutter, and out of it again

Point = tuple[float, float]
_T = np.linspace(0.0, 1.0, _POINTS)
_WEIGHTS = np.stack([(1 - _T) ** 3, 3 * (1 - _T) ** 2 * _T, 3 * (1 - _T) * _T**2, _T**3])


@dataclass(frozen=True)
class Placement:
    """Positions of what is drawn.

    Attributes:
        nodes: centre of every writer with an edge, and of `logits`.
        bars: KV heads shared by several query heads, drawn as a bar under their group: left, right and height.
        stubs: from a bar up to the heads of its group that are drawn.
    """

    nodes: dict[str, Point]
    bars: dict[str, tuple[float, float, float]]
    stubs: tuple[tuple[Point, Point], ...]
    n_layers: int
    n_heads: int

    def entry(self, reader: str) -> Point:
        """Where edges enter a reader from below."""
        kind = reader_kind(reader)
        name = reader.partition(".")[0]
        if name in self.bars:
            left, right, height = self.bars[name]
            return (left + right) / 2 + _PORT[kind], height
        x, y = self.nodes[name.replace("KV", "H")]
        return x + _PORT.get(kind, 0.0) * 0.8, y - RADIUS


def place(
    writers: Sequence[str], edges: Sequence[tuple[str, str]], kv_groups: int, columns: Mapping[str, int] | None = None
) -> Placement:
    """Positions for the given edges; nodes without an edge are left out.

    Args:
        columns: of every head, KV groups side by side; by default its own number.
    """
    n_layers = 1 + max(layer_of(name) for name in writers)
    n_heads = sum(name.startswith("L0H") for name in writers)
    shared = {reader for _, reader in edges if kv_groups > 1 and reader_kind(reader) in "kv"}
    drawn = {writer for writer, _ in edges}
    for reader in {reader for _, reader in edges} - shared:
        drawn |= set(writers_behind(reader, kv_groups) or ["logits"])
    nodes = {name: _centre(name, n_layers, n_heads, columns) for name in (*writers, "logits") if name in drawn}
    bars: dict[str, tuple[float, float, float]] = {}
    stubs: list[tuple[Point, Point]] = []
    for reader in (reader for _, reader in edges if reader in shared):
        name = reader.partition(".")[0]
        if name in bars:
            continue
        group = [_centre(head, n_layers, n_heads, columns) for head in writers_behind(reader, kv_groups)]
        y = group[0][1] - _BAR_Y
        bars[name] = (min(x for x, _ in group) - RADIUS, max(x for x, _ in group) + RADIUS, y)
        heads = [nodes[head] for head in writers_behind(reader, kv_groups) if head in nodes]
        stubs += [((x, y), (x, top - RADIUS)) for x, top in heads]
    return Placement(nodes, bars, tuple(stubs), n_layers, n_heads)


def path(placement: Placement, writer: str, reader: str) -> tuple[list[float], list[float]]:
    """The points of an edge: a cubic Bezier curve that leaves its writer upward and enters its reader from below.

    Readers of one head are entered side by side, q on the left, k in the middle, v on the right. An MLP takes its own
    layer's heads in from the left, the farthest highest, so that they do not run over each other; an edge to a part
    right above bows to the right, so that it does not run through what lies between.
    """
    (x0, y0), (x1, y1) = placement.nodes[writer], placement.entry(reader)
    y0 += RADIUS
    if writer != "embed" and reader.startswith("MLP") and layer_of(writer) == layer_of(reader):
        x1, y1 = x1 - 0.5 * RADIUS, y1 + RADIUS * (1.8 - 1.6 * x0 / max(1, placement.n_heads - 1))
        return _bezier((x0, y0), (x0, y1 - 0.01), (x0 + 0.4 * (x1 - x0), y1), (x1, y1))
    rise = y1 - y0
    lift = max(0.45 * rise, 0.12)
    bow = min(0.16 * rise, 0.7) if abs(x1 - x0) < 0.6 and rise > 1 else 0.0
    return _bezier((x0, y0), (x0 + bow, y0 + lift), (x1 + bow, y1 - lift), (x1, y1))


def bundled(placement: Placement, writer: str, reader: str) -> tuple[list[float], list[float]]:
    """The points of an edge that shares its way with others: it turns soon after its writer into the gutter beside its
    reader's column, and all that are on their way there rise in it together. Short ones as in `path`.
    """
    (x0, y0), (x1, y1) = placement.nodes[writer], placement.entry(reader)
    y0 += RADIUS
    if y1 - y0 < _TURN + _MERGE:
        return path(placement, writer, reader)
    gutter = x1 if reader == "logits" else round(x1) - 0.5
    low, high = y0 + _TURN, y1 - _MERGE
    first = _bezier((x0, y0), (x0, y0 + 0.6 * _TURN), (gutter, low - 0.4 * _TURN), (gutter, low))
    last = _bezier((gutter, high), (gutter, high + 0.6 * _MERGE), (x1, y1 - 0.6 * _MERGE), (x1, y1))
    return first[0][::2] + last[0][::2] + [last[0][-1]], first[1][::2] + last[1][::2] + [last[1][-1]]


def _bezier(a: Point, b: Point, c: Point, d: Point) -> tuple[list[float], list[float]]:
    xs, ys = np.array([a, b, c, d]).T @ _WEIGHTS
    return xs.round(4).tolist(), ys.round(4).tolist()  # four decimals: half the size on disk


def _centre(name: str, n_layers: int, n_heads: int, columns: Mapping[str, int] | None = None) -> Point:
    middle = n_heads // 2 - 0.5  # between two columns, so that what runs straight up meets no head
    if name == "embed":
        return middle, -1.0
    if name == "logits":
        return middle, n_layers + 0.25
    layer = layer_of(name)
    if name.startswith("MLP"):
        return n_heads + MLP_COLUMN, layer + _MLP_Y
    return float(name.partition("H")[2] if columns is None else columns[name]), float(layer)
