"""Names beside points, where there is room for them."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from mansu_tl.plots.theme import Theme, plain

_CHARACTER, _LINE, _MARK = 6.0, 15.0, 5.0  # pixels
# Right above first: there a line that leaves a point to the right or upward is not run over.
_PLACES = (
    ("left", 6, 10), ("left", 9, 0), ("right", -6, 10), ("right", -9, 0), ("left", 6, -10), ("right", -6, -10),
    ("left", 13, 14), ("right", -13, 14), ("left", 13, -14), ("right", -13, -14),
)  # fmt: skip
_LONGEST = 34
_Box = tuple[float, float, float, float]


def label_points(
    figure: go.Figure,
    xs: Sequence[float | int],
    ys: Sequence[float | int],
    names: Sequence[str],
    spans: Sequence[Sequence[float | int]],
    size: tuple[float | int, float | int],
    look: Theme,
    col: int = 1,
    avoid: Sequence[_Box] = (),
) -> None:
    """Write names right or left of their points, above, beside or below; those that would lie on another are left out.

    Args:
        names: plain text, the most important first.
        spans: ends of both axes.
        size: of the panel in pixels, about.
        col: of the panel.
        avoid: boxes (left, bottom, right, top), on the axes, that no name may lie on, such as lines.
    """
    (x0, x1), (y0, y1) = spans
    width, height = size
    drawn = [
        (
            (a - x0) / (x1 - x0) * width,
            (b - y0) / (y1 - y0) * height,
            (c - x0) / (x1 - x0) * width,
            (d - y0) / (y1 - y0) * height,
        )
        for a, b, c, d in avoid
    ]
    points = [((x - x0) / (x1 - x0) * width, (y - y0) / (y1 - y0) * height) for x, y in zip(xs, ys, strict=True)]
    taken: list[_Box] = [(x - _MARK, y - _MARK, x + _MARK, y + _MARK) for x, y in points]
    for i, ((px, py), name) in enumerate(zip(points, names, strict=True)):
        text = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
        wide = len(text) * _CHARACTER
        for anchor, dx, dy in _PLACES:
            left = px + dx - (wide if anchor == "right" else 0)
            box = (left, py + dy - _LINE / 2, left + wide, py + dy + _LINE / 2)
            others = [*drawn, *(other for j, other in enumerate(taken) if j != i)]
            if box[0] < 0 or box[2] > width or any(_overlap(box, other) for other in others):
                continue
            taken.append(box)
            figure.add_annotation(
                x=xs[i], y=ys[i], text=plain(text), showarrow=False, xanchor=anchor, yanchor="middle", xshift=dx, yshift=dy,
                font={"size": 10.5, "color": look.muted}, row=1, col=col,
            )  # fmt: skip
            break


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
