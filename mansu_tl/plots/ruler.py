"""One block's weights on a quantizer's codes, before and after an edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.plots.panels import BARE, Panel, legend_below, marker, new_panel, segments
from mansu_tl.plots.theme import number, plain, theme_named
from mansu_tl.quantization import Encoded, Grid

_MOST_BLOCKS = 40
_SMALLEST = 1e-38  # a scale to divide by where a block is all zeros
_NAMES = {"kept": "not edited", "crossed": "edited, another code", "back": "edited, rounded back"}


def ruler(
    before: Float[Tensor, "out in"],
    after: Float[Tensor, "out_after in_after"],
    grid: Grid,
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
    code changed, orange and dotted where rounding gives back the old one. The codes of a file lie evenly between the lowest
    and the highest of a block, whose scale no edit moves: there the ruler is the share of that way.

    Args:
        before: a matrix, [out, in].
        after: the same matrix edited.
        grid: the quantizer's grid, e.g. `quantizer("nf4")`; of a file the matrix's own,
            `quantizer("gguf").bound(model).of(name)`.
        blocks: numbers of the blocks to step through; by default those with most edited weights.
        name: of the matrix.

    Raises:
        MansuError: matrices of different shape, a grid that has no such ruler, or a block that is not there.
    """
    look = theme_named(theme)
    if before.shape != after.shape:
        raise MansuError(
            f"ruler: shapes {tuple(before.shape)} and {tuple(after.shape)}; pass one matrix before and after"
        )
    matrices = (before.detach().float().cpu(), after.detach().float().cpu())
    encoded = [grid.encode(w) for w in matrices]
    if encoded[0].absmax.ndim != 1 and not grid.given_scales:
        raise MansuError(f"ruler: {grid.name} has no fixed codes to draw; use nf4, fp4 or int4")
    places = [_places(w, each) for w, each in zip(matrices, encoded, strict=True)]
    size = grid.block_size or before.shape[1]
    edited = matrices[0] != matrices[1]
    count = -(-edited.numel() // size)
    chosen = (most_edited(edited, size, _MOST_BLOCKS) or [0]) if blocks is None else list(blocks)
    for block in chosen:
        if not 0 <= block < count:
            raise MansuError(f"ruler: block {block}, the matrix has {count}; choose 0..{count - 1}")
    if not chosen:
        raise MansuError("ruler: no block to draw; name at least one")
    levels = grid.levels.cpu().numpy()

    def block_of(number: int) -> _Block:
        part = slice(number * size, (number + 1) * size)
        weights, at = (np.stack([w.reshape(-1)[part].numpy() for w in each]) for each in (matrices, places))
        codes = np.stack([each.codes.reshape(-1)[part].cpu().numpy() for each in encoded])
        scale = _scale_said("step" if grid.given_scales else "absmax", *(each.absmax[number] for each in encoded))
        return _Block(number, weights, at, codes, scale, levels)

    shown = [block_of(number) for number in chosen]
    unit = "between its block's lowest and highest code" if grid.given_scales else "as a share of its block's largest"
    how_to_read = (
        f"Each mark is a weight, {unit}. Thin lines: where one code ends and the next begins; "
        "ticks below: the codes' values, to which the edited weights are followed."
    )
    panel = new_panel(look, title or f"On the {grid.name} ruler{': ' if name else ''}{name}", how_to_read, 520)
    # The slider rewrites the first annotation.
    line = {"xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
    panel.note(0, 1.02, shown[0].text(), size=13, colour="", **line)
    _scale(panel, levels, grid.bounds.tolist())
    first = len(panel.figure.data)
    for kind, colour, width, dash, symbol, mark in (
        ("kept", look.neutral, 0.4, "solid", "line-ns-open", 12),
        ("crossed", look.positive, 1.6, "solid", "circle", 9),
        ("back", look.negative, 1.6, "dot", "x", 9),
    ):
        panel.figure.add_scatter(
            **shown[0].trace(kind),
            mode="lines+markers",
            name=_NAMES[kind],
            line={"color": colour, "width": width, "dash": dash},
            marker=marker(symbol, mark, colour, colour, 1.6),
            hovertemplate="%{customdata}<extra></extra>",
        )
    if len(shown) > 1:
        steps = [each.step(list(range(first, first + len(_NAMES)))) for each in shown]
        panel.figure.update_layout(
            sliders=[
                {
                    "steps": steps, "currentvalue": {"prefix": "block ", "font": {"size": 13}}, "pad": {"t": 52, "b": 8},
                    "len": 0.96, "x": 0.02, "tickcolor": look.muted, "bordercolor": look.neutral, "bgcolor": look.band,
                }
            ]
        )  # fmt: skip
    if grid.given_scales:
        ticks = {
            "range": [-0.02, 1.02],
            "tickvals": [0, 0.25, 0.5, 0.75, 1],
            "title_text": "from the block's lowest code (0) to its highest (1)",
        }
    else:
        ticks = {
            "range": [-1.04, 1.04],
            "tickvals": [-1, -0.5, 0, 0.5, 1],
            "title_text": "weight / absmax of its block",
        }
    panel.x(**ticks, showgrid=False, zeroline=False)
    panel.y(**BARE, tickvals=[1, 0.5, 0], ticktext=["before", "after", "codes"], range=[-0.28, 1.18])
    legend_below(panel.figure, 170 if len(shown) > 1 else 96)
    panel.figure.update_layout(margin={"t": 120})
    return panel.figure


@dataclass(frozen=True)
class _Block:
    """One block: its weights, their places on the ruler and their codes, before and after; its scale; the codes' places."""

    number: int
    weights: np.ndarray
    places: np.ndarray
    codes: np.ndarray
    scale: str
    levels: np.ndarray

    def chosen(self, kind: str) -> np.ndarray:
        """Which weights are drawn as `kind`."""
        edited, crossed = self.weights[0] != self.weights[1], self.codes[0] != self.codes[1]
        return np.flatnonzero({"kept": ~edited, "crossed": edited & crossed, "back": edited & ~crossed}[kind])

    def trace(self, kind: str) -> dict[str, list[Any]]:
        """Points and connecting lines of one kind: before, after, gap; and so on."""
        ways, texts = [], []
        for i in self.chosen(kind).tolist():
            (a, b), (old, new) = self.weights[:, i].tolist(), self.codes[:, i].tolist()
            start, end = self.places[:, i].tolist()
            text = f"weight {i} of block {self.number}<br>before {number(a, 4)}, code {old}"
            text += f"<br>after {number(b, 4)}, code {new}"
            # An edited weight goes on to the code that it is rounded to.
            x, y = [start, end, float(self.levels[new])], [1.0, 0.5, 0.06]
            points = 2 if kind == "kept" else 3
            ways.append((x[:points], y[:points]))
            texts += [text] * points + [""]
        xs, ys = segments(ways)
        return {"x": xs, "y": ys, "customdata": texts}

    def step(self, traces: list[int]) -> dict[str, Any]:
        """The slider's step to this block."""
        parts = [self.trace(kind) for kind in _NAMES]
        update = {key: [part[key] for part in parts] for key in ("x", "y", "customdata")}
        args = [update, {"annotations[0].text": self.text()}, traces]
        return {"method": "update", "label": str(self.number), "args": args}

    def text(self) -> str:
        """One line on the block."""
        crossed = len(self.chosen("crossed"))
        edited = len(self.chosen("back")) + crossed
        return plain(
            f"block {self.number}: {self.weights.shape[1]} weights, {self.scale}; {edited} edited, {crossed} of them take "
            "another code"
        )


def _places(w: Float[Tensor, "out in"], encoded: Encoded) -> Float[Tensor, "out in"]:
    """Where weights lie on the ruler: shares of absmax; under given scales, of the way from lowest code to highest."""
    scales = encoded.scales()
    if scales.ndim == w.ndim:
        return w / scales.clamp(min=_SMALLEST)
    step, shift, zero, last = scales.unbind(-1)
    return ((w - shift) / step.clamp(min=_SMALLEST) + zero) / last


def _scale_said(what: str, before: Tensor, after: Tensor) -> str:
    """A block's scale before and after."""
    old, new = (float(each.reshape(-1)[0]) for each in (before, after))
    return f"{what} {number(old, 3)}" if old == new else f"{what} {number(old, 4)}, then {number(new, 4)}"


def most_edited(edited: Bool[Tensor, "*any"], size: int, most: int) -> list[int]:
    """The blocks of a matrix that hold most edited weights, in order of their numbers; none without one."""
    count = -(-edited.numel() // size)
    hits = torch.nn.functional.pad(edited.reshape(-1), (0, count * size - edited.numel())).view(count, size).sum(1)
    best = torch.argsort(hits, descending=True, stable=True)[:most]
    return sorted(best[hits[best] > 0].tolist())


def _scale(panel: Panel, levels: np.ndarray, bounds: list[float]) -> None:
    """Cells as stripes, boundaries as lines, codes as numbered ticks."""
    look, ends, few = panel.look, [float(np.sign(levels[0])), *bounds, 1.0], len(levels) <= 20
    for low, high in zip(ends[::2], ends[1::2], strict=False):
        style = {"layer": "below", "line": {"width": 0}, "fillcolor": look.band}
        panel.figure.add_shape(type="rect", x0=low, x1=high, y0=-0.24, y1=1.12, **style)
    lines = segments([([bound, bound], [-0.24, 1.12]) for bound in bounds])
    panel.mark(*lines, "boundaries", line={"color": look.grid, "width": 1}, legend=False)
    ticks = marker("line-ns-open", 16, look.ink, look.ink, 2.4 if few else 1)
    panel.mark(
        levels, [0.0] * len(levels), "codes", "markers+text" if few else "markers", legend=False, marker=ticks,
        hover="code %{text}: %{x:.4f}", text=[str(i) for i in range(len(levels))], textposition="bottom center",
        textfont={"size": 11},
    )  # fmt: skip
