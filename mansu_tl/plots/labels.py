"""Names beside points, where there is room for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mansu_tl.plots.panels import Panel
from mansu_tl.plots.theme import plain

_CHARACTER, _LINE, _MARK = 6.0, 15.0, 5.0  # pixels
# Right above first: there a line that leaves a point to the right or upward is not run over.
_PLACES = (
    ("left", 6, 10), ("left", 9, 0), ("right", -6, 10), ("right", -9, 0), ("left", 6, -10), ("right", -6, -10),
    ("left", 13, 14), ("right", -13, 14), ("left", 13, -14), ("right", -13, -14),
)  # fmt: skip
_LONGEST = 34
_Box = tuple[float, float, float, float]


def label_points(
    panel: Panel,
    xs: Sequence[float | int],
    ys: Sequence[float | int],
    names: Sequence[str],
    spans: Sequence[Sequence[float | int]],
    size: tuple[float | int, float | int],
    avoid: Sequence[_Box] = (),
) -> None:
    """Write names right or left of their points, above, beside or below; those that would lie on another are left out.

    Args:
        names: plain text, the most important first.
        spans: ends of both axes; `size` is that of the panel in pixels, about.
        avoid: boxes (left, bottom, right, top), on the axes, that no name may lie on, such as lines.
    """
    (x0, x1), (y0, y1) = spans
    width, height = size

    def pixels(x: float | int, y: float | int) -> tuple[float, float]:
        return (x - x0) / (x1 - x0) * width, (y - y0) / (y1 - y0) * height

    drawn = [(*pixels(a, b), *pixels(c, d)) for a, b, c, d in avoid]
    points = [pixels(x, y) for x, y in zip(xs, ys, strict=True)]
    occupied: list[_Box] = [(x - _MARK, y - _MARK, x + _MARK, y + _MARK) for x, y in points]
    for i, ((px, py), name) in enumerate(zip(points, names, strict=True)):
        text = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
        wide = len(text) * _CHARACTER
        for anchor, dx, dy in _PLACES:
            left = px + dx - (wide if anchor == "right" else 0)
            box = (left, py + dy - _LINE / 2, left + wide, py + dy + _LINE / 2)
            others = [*drawn, *(other for j, other in enumerate(occupied) if j != i)]
            if box[0] >= 0 and box[2] <= width and not any(_overlap(box, other) for other in others):
                occupied.append(box)
                panel.note(xs[i], ys[i], plain(text), size=10.5, xanchor=anchor, yanchor="middle", xshift=dx, yshift=dy)
                break


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def apart(
    xs: np.ndarray, ys: np.ndarray, *, size: np.ndarray, most: int, room: tuple[float, float], among: int | None = None
) -> list[int]:
    """The points of largest `size` (`most` of them, tried `among` the first) whose labels do not meet.

    Places and the `room` that a label takes are shares of the panel.
    """
    chosen: list[int] = []
    for at in np.argsort(-size, kind="stable")[:among].tolist():
        free = all(abs(xs[at] - xs[i]) > room[0] or abs(ys[at] - ys[i]) > room[1] for i in chosen)
        if len(chosen) < most and free:
            chosen.append(at)
    return chosen
