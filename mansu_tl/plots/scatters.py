"""Scores one by one: nodes as bars, edges before and after, estimates against exact runs, one item at every stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from mansu_tl.circuit.graph import reader_kind
from mansu_tl.errors import MansuError
from mansu_tl.patching import NodeScores, PatchingResult
from mansu_tl.plots.circuit_look import KINDS
from mansu_tl.plots.labels import apart
from mansu_tl.plots.panels import legend_below, new_panel, padded, require_columns, series_styles, whiskers
from mansu_tl.plots.theme import fixed, number, plain, theme_named
from mansu_tl.verification import Divergence

_SYMBOLS = {"q": "circle", "k": "square", "v": "diamond", "mlp": "triangle-up", "logits": "x"}
_GOLDEN = (math.sqrt(5) - 1) / 2
_SPREAD = 0.24  # of a row, either side


def node_scores(scores: NodeScores, *, most: int = 30, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw the nodes of largest |score| as bars, largest on top; what opposes the answer is hatched and orange.

    Raises:
        MansuError: there is no node, or `most` is below one.
    """
    look = theme_named(theme)
    values = scores.tensor.detach().float().cpu().numpy()
    if not len(values) or most < 1:
        raise MansuError(f"node scores: {len(values)} nodes, most={most}; there is nothing to draw")
    order = np.argsort(-np.abs(values), kind="stable")[:most]
    drawn, names = values[order].tolist(), [plain(scores.writers[i]) for i in order]
    share = 100 * float(np.abs(values[order]).sum()) / (float(np.abs(values).sum()) or 1)
    metric = scores.metric.replace("_", " ")
    whole = "What each node is worth" if len(order) == len(values) else f"The {len(order)} nodes that matter most"
    how_to_read = (
        f"Estimated effect on the {metric} of restoring each node's output; positive supports the answer. "
        f"Shown: {fixed(share, 0)} % of all |score| in {len(values)} nodes."
    )
    panel = new_panel(look, title or whole, how_to_read, 170 + 22 * len(order))
    for positive, name, colour, hatch in (
        (True, "supports the answer", look.positive, ""),
        (False, "opposes it", look.negative, "/"),
    ):
        bars = [(value, at) for value, at in zip(drawn, names, strict=True) if (value >= 0) == positive]
        pattern = {"shape": hatch, "fgcolor": look.paper, "size": 5, "solidity": 0.25, "bgcolor": colour}
        if bars:
            panel.bars(
                [value for value, _ in bars], [at for _, at in bars], name, hover="%{y}: %{x:.4g}", orientation="h",
                marker={"color": colour, "line": {"width": 0}, "pattern": pattern}, text=[number(v) for v, _ in bars],
                textposition="outside", cliponaxis=False,
            )  # fmt: skip
    low, high = min(0.0, *drawn), max(0.0, *drawn)
    ends = padded(low, high, 0.09)
    ends = [ends[0] if low < 0 else low, ends[1]]
    units = f"score, in units of the {plain(metric)}"
    panel.x(title_text=units, range=ends, zeroline=True, zerolinecolor=look.muted)
    order_of_names = {"categoryorder": "array", "categoryarray": names[::-1]}
    panel.y(**order_of_names, showgrid=False, showline=False, ticks="", tickfont={"size": 11})
    legend = {"x": 1, "y": 0, "xanchor": "right", "yanchor": "bottom"}
    panel.figure.update_layout(bargap=0.25, legend=legend, showlegend=min(drawn) < 0)
    return panel.figure


def attribution_scatter(
    scores: NodeScores | pd.DataFrame,
    exact: PatchingResult | None = None,
    *,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw estimates by attribution against exact patching, one point a node; on the rising line the estimate is right.

    Args:
        scores: scores of nodes, or a table with columns name, exact and attribution (and kind, for colours).
        exact: with scores of nodes, a denoising sweep of the heads' outputs by layer and head. Its shares are turned
            into the metric's units.

    Raises:
        MansuError: a table without the columns, scores without a sweep, or a sweep of something else than heads.
    """
    look = theme_named(theme)
    frame = scores if isinstance(scores, pd.DataFrame) else _beside(scores, exact)
    require_columns("attribution scatter", frame, ["name", "exact", "attribution"])
    x, y = frame["exact"].to_numpy(float), frame["attribution"].to_numpy(float)
    together = f", correlation {fixed(float(np.corrcoef(x, y)[0, 1]), 3)}" if len(x) > 2 and x.std() and y.std() else ""
    how_to_read = (
        f"Each point is a node or an edge: its exact effect by activation patching across, the linear estimate upright. "
        f"{len(x)} points, mean error {number(float(np.abs(x - y).mean()))}{together}."
    )
    panel = new_panel(look, title or "When can the linear estimate be trusted?", how_to_read, 600)
    ends = padded(min(x.min(), y.min(), 0.0), max(x.max(), y.max(), 0.0))
    panel.mark(ends, ends, "estimate = exact", line={"color": look.muted, "width": 1.3})
    kinds = frame["kind"].astype(str) if "kind" in frame.columns else pd.Series("nodes", index=frame.index)
    looks = series_styles(kinds.tolist(), look)
    for kind, part in frame.groupby(kinds, sort=False):
        style, rim = looks[str(kind)], {"width": 0.8, "color": look.ink}
        panel.mark(
            part["exact"].astype(float).tolist(), part["attribution"].astype(float).tolist(), plain(kind), "markers",
            hover="%{customdata[0]}<br>exact %{x:.4g}<br>estimate %{y:.4g}", data=[[plain(n)] for n in part["name"]],
            marker={"symbol": style.symbol, "size": 10, "color": style.colour, "line": rim},
        )  # fmt: skip
    shares = (x / (ends[1] - ends[0]), y / (ends[1] - ends[0]))
    for at in apart(*shares, size=np.abs(x) + np.abs(y), most=8, room=(0.08, 0.035)):
        panel.note(x[at], y[at], plain(frame["name"].iloc[at]), xanchor="left", xshift=8)
    panel.x(title_text="exact effect of patching", range=ends, zeroline=False)
    panel.y(title_text="estimate by attribution", range=ends, zeroline=False)
    return panel.figure


def divergence_scatter(divergence: Divergence, *, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw each edge's score in the other model against its score in the original.

    On the rising line the mechanism is intact, on the level line it is gone, on the falling one inverted.

    Raises:
        MansuError: it has no edge.
    """
    look = theme_named(theme)
    frame, label = divergence.edges, divergence.label
    if frame.empty:
        raise MansuError(f"circuit divergence {label!r}: it has no edge to draw; use a circuit that has some")
    low, high = divergence.interval
    how_to_read = (
        f"CAD {fixed(divergence.value, 3)}, 95 % interval {fixed(low, 3)} to {fixed(high, 3)}; "
        f"mass loss {fixed(divergence.mass_loss, 3)}; {len(frame)} edges."
    )
    panel = new_panel(look, title or f"{label}: edge scores before and after", how_to_read, 600)
    x, y = frame["original"].to_numpy(float), frame["other"].to_numpy(float)
    across = padded(min(x.min(), 0.0), max(x.max(), 0.0), 0.06)
    upright = padded(min(x.min(), y.min(), 0.0), max(x.max(), y.max(), 0.0), 0.06)
    for slope, name, dash in ((1, "intact", "solid"), (0, "gone", "dash"), (-1, "inverted", "dot")):
        line = {"color": look.muted, "width": 1.2, "dash": dash}
        panel.mark(across, [slope * end for end in across], name, line=line)
    kinds = np.array([reader_kind(str(r)) for r in frame["reader"]])
    for kind in (kind for kind in _SYMBOLS if kind in kinds):
        chosen, colour = kinds == kind, look.positive if kind in ("mlp", "logits") else look.positive_soft
        rim = {"width": 0.8, "color": look.ink}
        panel.mark(
            x[chosen], y[chosen], f"into {KINDS[kind]}", "markers",
            hover="%{customdata[0]} → %{customdata[1]}<br>original %{x:.4g}<br>other %{y:.4g}",
            data=[[plain(w), plain(r)] for w, r in frame.loc[chosen, ["writer", "reader"]].to_numpy()],
            marker={"symbol": _SYMBOLS[kind], "size": 8, "color": colour, "line": rim, "opacity": 0.85},
        )  # fmt: skip
    shares = (x / (across[1] - across[0]), y / (upright[1] - upright[0]))
    for at in apart(*shares, size=np.abs(x), most=6, room=(0.16, 0.04), among=12):
        writer, reader = frame.iloc[at][["writer", "reader"]]
        panel.note(x[at], y[at], f"{plain(writer)} → {plain(reader)}", size=10, yshift=11)
    panel.x(title_text="score in the original", range=across, zeroline=False)
    panel.y(title_text=f"score in: {plain(label)}", range=upright, zeroline=False)
    return panel.figure


@dataclass(frozen=True)
class StageScore:
    """A score in one model: of every pair, the mean over them and its 95 % interval."""

    name: str
    values: Float[Tensor, " pair"]
    mean: float
    interval: tuple[float, float]


def stage_scores(
    stages: Sequence[StageScore],
    labels: Sequence[str],
    *,
    chosen: int | None = None,
    metric: str = "logit difference",
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw a score before an edit, after it and after quantization, one row each; zero is where nothing is left.

    Traces, in order: the pairs (with a label each, for the hover texts), the chosen pair, the means.

    Raises:
        MansuError: no stage, labels of another number, or a chosen pair that is not there.
    """
    look = theme_named(theme)
    if not stages:
        raise MansuError("stage scores: none given; pass at least one")
    for stage in stages:
        if len(stage.values) != len(labels):
            raise MansuError(f"stage scores: {len(stage.values)} values, {len(labels)} labels; give one for each pair")
    if chosen is not None and not 0 <= chosen < len(labels):
        raise MansuError(f"stage scores: pair {chosen}, there are {len(labels)}; choose 0..{len(labels) - 1}")
    how_to_read = "Each mark is a pair; the bar is the mean over pairs, its whisker the 95 % interval over facts."
    panel = new_panel(look, title or "Score at every stage", how_to_read, 190 + 88 * len(stages))
    rows, shown = range(len(stages)), [plain(label) for label in labels]
    # Spread evenly within the row, the same pair at the same height in every row.
    heights = [_SPREAD * (2 * ((i * _GOLDEN) % 1) - 1) for i in range(len(labels))]
    dots = {"size": 5, "color": look.positive_soft, "opacity": 0.55, "line": {"width": 0}}
    diamond = {"size": 11, "symbol": "diamond-open", "color": look.negative, "line": {"width": 2.2}}
    marked = [] if chosen is None else [chosen]
    for name, pairs, marker in (("one pair", list(range(len(labels))), dots), ("the chosen pair", marked, diamond)):
        panel.mark(
            [float(stage.values[i]) for stage in stages for i in pairs], [row + heights[i] for row in rows for i in pairs],
            name, "markers", hover="%{customdata}<br>score %{x:.3g}", data=[shown[i] for _ in rows for i in pairs],
            marker=marker,
        )  # fmt: skip
    means = [stage.mean for stage in stages]
    lows, highs = zip(*(stage.interval for stage in stages), strict=True)
    panel.mark(
        means, list(rows), "mean over pairs", "markers+text",
        hover="mean %{x:.4g} [%{customdata[0]:.3g}, %{customdata[1]:.3g}]", data=[list(s.interval) for s in stages],
        marker={"symbol": "line-ns", "size": 26, "color": look.ink, "line": {"width": 3, "color": look.ink}},
        error_x=whiskers(means, lows, highs, look.ink), text=[f"<b>{number(mean)}</b>" for mean in means],
        textposition="top center", textfont={"size": 12}, cliponaxis=False,
    )  # fmt: skip
    panel.level(0, upright=True, width=1, dash="solid")
    panel.x(title_text=f"score, {plain(metric)}", zeroline=False)
    panel.rows([stage.name for stage in stages], showgrid=False)
    legend_below(panel.figure, 92)
    return panel.figure


def _beside(scores: NodeScores, exact: PatchingResult | None) -> pd.DataFrame:
    """Heads' estimates beside the same heads' exact effects, in the metric's units."""
    if exact is None:
        raise MansuError("attribution scatter: pass the exact sweep too, activation_patching(..., component='z')")
    values = dict(zip(scores.writers, scores.tensor.tolist(), strict=True))
    names = [[f"L{row}H{column.removeprefix('H')}" for column in exact.columns] for row in exact.rows]
    if exact.column_axis != "head" or exact.direction != "denoising" or any(n not in values for r in names for n in r):
        raise MansuError(
            f"attribution scatter: a {exact.direction} sweep of the {exact.component} by {exact.column_axis} does not "
            "name the scored heads; use activation_patching(..., component='z', by='head')"
        )
    unit = exact.metric_clean - exact.metric_corrupt
    rows = [
        (name, unit * value, values[name], f"heads of layer {layer}")
        for layer, line, cells in zip(exact.rows, names, exact.tensor.tolist(), strict=True)
        for name, value in zip(line, cells, strict=True)
    ]
    return pd.DataFrame(rows, columns=["name", "exact", "attribution", "kind"])
