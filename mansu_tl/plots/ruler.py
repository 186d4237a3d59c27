"""One block's weights on a quantizer's codes, before and after an edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.plots.series import legend_below
from mansu_tl.plots.theme import new_figure, number, plain, theme_named

_MOST_BLOCKS = 40
_SMALLEST = 1e-38  # a scale to divide by where a block is all zeros


@runtime_checkable
class GridLike(Protocol):
    """A blockwise quantizer with a fixed, symmetric codebook."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def levels(self) -> Float32[Tensor, " code"]:
        """The value of each code at absmax 1."""

    @property
    def bounds(self) -> Float32[Tensor, " bound"]:
        """The boundaries between them."""

    @property
    def block_size(self) -> int | None:
        """Weights that share a scale; None = a row."""

    def encode(self, w: Float[Tensor, "out in"]) -> Any:
        """Codes and scales (`.codes`, `.absmax`)."""


def ruler(
    before: Float[Tensor, "out in"],
    after: Float[Tensor, "out_after in_after"],
    grid: GridLike,
    *,
    blocks: Sequence[int] | None = None,
    name: str = "",
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw the weights of one block on the ruler of the quantizer's codes, before and after; a slider steps over blocks.

    Ticks on the ruler are the codes' values, thin lines the boundaries between them, all as shares of the block's
    absmax (its own after the edit, where that moved it). Weights before lie on the upper row, after on the lower; a line
    follows each edited weight from where it was to where it is and on to the code that it is rounded to: blue where the
    code changed, orange and dotted where rounding gives back the old one.

    Args:
        before: a matrix, [out, in].
        after: the same matrix edited.
        grid: the quantizer's grid, e.g. `quantizer("nf4")`.
        blocks: numbers of the blocks to step through; by default those with most edited weights.
        name: of the matrix.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: matrices of different shape, a grid that has no such ruler, or a block that is not there.
    """
    look = theme_named(theme)
    if before.shape != after.shape:
        raise MansuError(
            f"ruler: shapes {tuple(before.shape)} and {tuple(after.shape)}; pass one matrix before and after"
        )
    levels, bounds = getattr(grid, "levels", None), getattr(grid, "bounds", None)
    encoded = grid.encode(before)
    if levels is None or bounds is None or encoded.absmax.ndim != 1:
        raise MansuError(f"ruler: {getattr(grid, 'name', grid)!s} has no fixed codes to draw; use nf4, fp4 or int4")
    size = grid.block_size or before.shape[1]
    old, new = before.detach().reshape(-1).float().cpu(), after.detach().reshape(-1).float().cpu()
    count = -(-len(old) // size)
    chosen = _chosen(old != new, size, count) if blocks is None else list(blocks)
    for block in chosen:
        if not 0 <= block < count:
            raise MansuError(f"ruler: block {block}, the matrix has {count}; choose 0..{count - 1}")
    if not chosen:
        raise MansuError("ruler: no block to draw; name at least one")
    deployed = grid.encode(after)
    sides: list[_Side] = [
        (w, each.codes.reshape(-1).cpu(), each.absmax.cpu().clamp(min=_SMALLEST))
        for w, each in ((old, encoded), (new, deployed))
    ]
    values = levels.cpu().numpy()
    panels = [_Panel.of(block, size, sides[0], sides[1], values) for block in chosen]
    figure = new_figure(
        look,
        title or f"On the {grid.name} ruler{': ' if name else ''}{name}",
        "Each mark is a weight, as a share of its block's largest. Thin lines: where one code ends and the next begins; "
        "ticks below: the codes' values, to which the edited weights are followed.",
        height=520,
    )
    _scale(figure, levels.cpu().numpy(), bounds.cpu().numpy(), look.grid, look.band, look.ink)
    base = len(figure.data)
    for kind in ("kept", "crossed", "back"):
        colour = {"kept": look.neutral, "crossed": look.positive, "back": look.negative}[kind]
        title_of = {"kept": "not edited", "crossed": "edited, another code", "back": "edited, rounded back"}[kind]
        data = panels[0].trace(kind)
        figure.add_scatter(
            **data,
            mode="lines+markers",
            name=title_of,
            line={
                "color": colour,
                "width": 1.6 if kind != "kept" else 0.4,
                "dash": "dot" if kind == "back" else "solid",
            },
            marker={
                "symbol": {"kept": "line-ns-open", "crossed": "circle", "back": "x"}[kind],
                "size": 9 if kind != "kept" else 12,
                "color": colour,
                "line": {"width": 1.6, "color": colour},
            },
            hovertemplate="%{customdata}<extra></extra>",
        )
    traces = list(range(base, base + 3))
    if len(panels) > 1:
        steps = []
        for panel in panels:
            parts = [panel.trace(kind) for kind in ("kept", "crossed", "back")]
            update = {key: [p[key] for p in parts] for key in ("x", "y", "customdata")}
            steps.append(
                {
                    "method": "update",
                    "label": str(panel.block),
                    "args": [update, {"annotations[0].text": panel.text()}, traces],
                }
            )
        figure.update_layout(
            sliders=[
                {
                    "steps": steps,
                    "currentvalue": {"prefix": "block ", "font": {"size": 13}},
                    "pad": {"t": 52, "b": 8},
                    "len": 0.96,
                    "x": 0.02,
                    "tickcolor": look.muted,
                    "bordercolor": look.neutral,
                    "bgcolor": look.band,
                }
            ]
        )
    figure.add_annotation(
        x=0,
        y=1.02,
        xref="paper",
        yref="paper",
        text=panels[0].text(),
        showarrow=False,
        xanchor="left",
        yanchor="bottom",
        font={"size": 13},
    )
    # The slider rewrites the first annotation.
    figure.layout.annotations = (figure.layout.annotations[-1], *figure.layout.annotations[:-1])
    figure.update_xaxes(
        title_text="weight / absmax of its block",
        range=[-1.04, 1.04],
        tickvals=[-1, -0.5, 0, 0.5, 1],
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(
        tickvals=[1, 0.5, 0],
        ticktext=["before", "after", "codes"],
        range=[-0.28, 1.18],
        showgrid=False,
        zeroline=False,
        showline=False,
        ticks="",
    )
    legend_below(figure, 170 if len(panels) > 1 else 96, 120)
    return figure


_Side = tuple[Tensor, Tensor, Tensor]  # weights and codes of a matrix, scales of its blocks


@dataclass(frozen=True)
class _Panel:
    """One block: its weights before and after, the codes they had and have, its scales, and the codes' values."""

    block: int
    weights: tuple[np.ndarray, np.ndarray]
    codes: tuple[np.ndarray, np.ndarray]
    scales: tuple[float, float]
    levels: np.ndarray

    @classmethod
    def of(cls, block: int, size: int, before: _Side, after: _Side, levels: np.ndarray) -> _Panel:
        """One block of a matrix."""
        part = slice(block * size, min((block + 1) * size, len(before[0])))
        return cls(
            block,
            (before[0][part].numpy(), after[0][part].numpy()),
            (before[1][part].numpy(), after[1][part].numpy()),
            (float(before[2][block]), float(after[2][block])),
            levels,
        )

    def chosen(self, kind: str) -> np.ndarray:
        """Which weights are drawn as `kind`."""
        edited, crossed = self.weights[0] != self.weights[1], self.codes[0] != self.codes[1]
        return np.flatnonzero({"kept": ~edited, "crossed": edited & crossed, "back": edited & ~crossed}[kind])

    def trace(self, kind: str) -> dict[str, list[Any]]:
        """Points and connecting lines of one kind: before, after, gap; and so on."""
        x: list[float | None] = []
        y: list[float | None] = []
        texts: list[str] = []
        for i in self.chosen(kind).tolist():
            (a, b), (old, new) = ((float(side[i]) for side in self.weights), (int(side[i]) for side in self.codes))
            text = f"weight {i} of block {self.block}<br>before {number(a, 4)}, code {old}"
            text += f"<br>after {number(b, 4)}, code {new}"
            # An edited weight goes on to the code that it is rounded to.
            ends = [] if kind == "kept" else [float(self.levels[new])]
            x += [a / self.scales[0], b / self.scales[1], *ends, None]
            y += [1.0, 0.5, *([0.06] if ends else []), None]
            texts += [text] * (2 + len(ends)) + [""]
        return {"x": x, "y": y, "customdata": texts}

    def text(self) -> str:
        """One line on the block."""
        crossed = len(self.chosen("crossed"))
        edited, (old, new) = len(self.chosen("back")) + crossed, self.scales
        scale = f"absmax {number(old, 3)}" if old == new else f"absmax {number(old, 4)}, then {number(new, 4)}"
        return plain(
            f"block {self.block}: {len(self.weights[0])} weights, {scale}; {edited} edited, {crossed} of them take "
            "another code"
        )


def _chosen(edited: Tensor, size: int, count: int) -> list[int]:
    """The blocks with most edited weights, in order of their numbers."""
    padded = torch.nn.functional.pad(edited, (0, count * size - len(edited)))
    hits = padded.view(count, size).sum(1)
    best = torch.argsort(hits, descending=True, stable=True)[:_MOST_BLOCKS]
    return sorted(best[hits[best] > 0].tolist()) or [0]


def _scale(figure: go.Figure, levels: np.ndarray, bounds: np.ndarray, line: str, band: str, ink: str) -> None:
    """Cells as stripes, boundaries as lines, codes as numbered ticks."""
    ends = [-1.0, *bounds.tolist(), 1.0]
    for i, (low, high) in enumerate(pairwise(ends)):
        if i % 2 == 0:
            figure.add_shape(
                type="rect", x0=low, x1=high, y0=-0.24, y1=1.12, layer="below", line={"width": 0}, fillcolor=band
            )
    xs: list[float | None] = []
    ys: list[float | None] = []
    for bound in bounds.tolist():
        xs += [bound, bound, None]
        ys += [-0.24, 1.12, None]
    figure.add_scatter(
        x=xs,
        y=ys,
        mode="lines",
        line={"color": line, "width": 1},
        hoverinfo="skip",
        name="boundaries",
        showlegend=False,
    )
    few = len(levels) <= 20
    figure.add_scatter(
        x=levels,
        y=[0.0] * len(levels),
        mode="markers+text" if few else "markers",
        marker={"symbol": "line-ns-open", "size": 16, "color": ink, "line": {"width": 2.4 if few else 1, "color": ink}},
        text=[str(i) for i in range(len(levels))],
        textposition="bottom center",
        textfont={"size": 11},
        name="codes",
        showlegend=False,
        hovertemplate="code %{text}: %{x:.4f}<extra></extra>",
    )
