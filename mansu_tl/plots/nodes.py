"""Scores of nodes: bars, heads by layer, by position over the prompt's own tokens, and estimates against exact runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from mansu_tl.circuit.graph import layer_of
from mansu_tl.errors import MansuError
from mansu_tl.plots.heatmaps import root_scale
from mansu_tl.plots.protocols import PatchingLike
from mansu_tl.plots.series import require_columns, series_styles
from mansu_tl.plots.theme import fixed, new_figure, number, plain, theme_named

_VALUES_IN_CELLS = 240
_LABELLED = 8


@runtime_checkable
class NodeScoresLike(Protocol):
    """First-order effects of nodes."""

    @property
    def tensor(self) -> Float[Tensor, " node"]:
        """The scores."""

    @property
    def writers(self) -> tuple[str, ...]:
        """The nodes' names."""

    @property
    def metric(self) -> str:
        """Name of the metric."""


@runtime_checkable
class ScoresByPositionLike(Protocol):
    """Scores kept by position, of nodes or of edges."""

    @property
    def writers(self) -> tuple[str, ...]:
        """The nodes' names, or the edges' writers."""

    @property
    def metric(self) -> str:
        """Name of the metric."""

    @property
    def per_position(self) -> Float[Tensor, " pos *rest"] | None:
        """By position; [pos, node], or [pos, writer, reader]."""

    @property
    def positions(self) -> tuple[str, ...]:
        """Names of the positions."""


def node_scores(scores: NodeScoresLike, *, most: int = 30, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw the nodes of largest |score| as bars, largest on top; what opposes the answer is hatched and orange.

    Args:
        scores: scores of nodes.
        most: how many are drawn.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: there is no node, or `most` is below one.
    """
    look = theme_named(theme)
    values = scores.tensor.detach().float().cpu().numpy()
    if not len(values) or most < 1:
        raise MansuError(f"node scores: {len(values)} nodes, most={most}; there is nothing to draw")
    order = np.argsort(-np.abs(values), kind="stable")[:most]
    total = float(np.abs(values).sum())
    figure = new_figure(
        look,
        title
        or ("What each node is worth" if len(order) == len(values) else f"The {len(order)} nodes that matter most"),
        f"Estimated effect on the {_words(scores.metric)} of restoring each node's output; positive supports the answer. "
        f"Shown: {fixed(100 * float(np.abs(values[order]).sum()) / (total or 1), 0)} % of all |score| in "
        f"{len(values)} nodes.",
        height=170 + 22 * len(order),
    )
    names = [plain(scores.writers[i]) for i in order]
    for positive in (True, False):
        chosen = [k for k, i in enumerate(order) if (values[i] >= 0) == positive]
        if chosen:
            figure.add_bar(
                x=[float(values[order[k]]) for k in chosen],
                y=[names[k] for k in chosen],
                orientation="h",
                name="supports the answer" if positive else "opposes it",
                marker={
                    "color": look.positive if positive else look.negative,
                    "line": {"width": 0},
                    "pattern": {
                        "shape": "" if positive else "/",
                        "fgcolor": look.paper,
                        "size": 5,
                        "solidity": 0.25,
                        "bgcolor": look.positive if positive else look.negative,
                    },
                },
                text=[number(float(values[order[k]])) for k in chosen],
                textposition="outside",
                cliponaxis=False,
                hovertemplate="%{y}: %{x:.4g}<extra></extra>",
            )
    low, high = min(0.0, float(values[order].min())), max(0.0, float(values[order].max()))
    pad = 0.09 * (high - low or 1.0)
    figure.update_xaxes(
        title_text=f"score, in units of the {plain(_words(scores.metric))}",
        range=[low - (pad if low < 0 else 0), high + pad],
        zeroline=True,
        zerolinecolor=look.muted,
    )
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=names[::-1],
        showgrid=False,
        showline=False,
        ticks="",
        tickfont={"size": 11},
    )
    figure.update_layout(
        bargap=0.25,
        legend={"x": 1, "y": 0, "xanchor": "right", "yanchor": "bottom"},
        showlegend=bool((values[order] < 0).any()),
    )
    return figure


def head_scores(scores: NodeScoresLike, *, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw the scores of heads and MLPs as a heat map, layers upward, heads from left to right and the MLP after them.

    Args:
        scores: scores of nodes; `embed` and queries, keys and values are left out.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: no head and no MLP among the nodes.
    """
    values = scores.tensor.detach().float().cpu().numpy()
    cells = {n: float(v) for n, v in zip(scores.writers, values, strict=True) if n != "embed" and "." not in n}
    if not cells:
        raise MansuError("head scores: no head and no MLP among the nodes; score the writers of a model")
    layers = 1 + max(layer_of(name) for name in cells)
    heads = 1 + max((int(name.partition("H")[2]) for name in cells if "H" in name), default=-1)
    columns = [*(f"H{h}" for h in range(heads)), "MLP"]
    z = [[cells.get(f"L{i}H{h}", np.nan) for h in range(heads)] + [cells.get(f"MLP{i}", np.nan)] for i in range(layers)]
    return _heat(
        np.array(z),
        columns,
        [str(i) for i in range(layers)],
        "component",
        "layer",
        title or "Which heads and MLPs carry the answer",
        f"Estimated effect on the {_words(scores.metric)} of restoring each component's output; blue supports the answer, "
        "orange opposes it; colour ~ √|score|.",
        scores.metric,
        theme,
    )


def token_scores(
    scores: ScoresByPositionLike,
    tokens: Sequence[str] | None = None,
    *,
    most: int = 12,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw scores by position over the prompt's own tokens: the strongest nodes as rows, tokens across.

    Edge scores are added up over readers, so that a row is a writer.

    Args:
        scores: scores that were kept by position.
        tokens: what stands at each position, without padding; by default the positions' names.
        most: how many nodes are drawn, those of largest |score| at any one position.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: scores that were not kept by position, or another number of tokens.
    """
    table = scores.per_position
    if table is None:
        raise MansuError("token scores: they are added up over positions; score with per_position=True")
    z = table.detach().float().cpu()
    by_node = (z.sum(2) if z.ndim == 3 else z).T.numpy()
    if tokens is not None and (len(tokens) > by_node.shape[1] or by_node[:, len(tokens) :].any()):
        raise MansuError(f"token scores: {len(tokens)} tokens for {by_node.shape[1]} positions; give one for each")
    by_node = by_node if tokens is None else by_node[:, : len(tokens)]
    if most < 1:
        raise MansuError(f"token scores: most={most}; draw at least one node")
    strongest = np.argsort(-np.abs(by_node).max(1), kind="stable")[:most]
    rows = sorted(strongest.tolist())
    return _heat(
        by_node[rows],
        list(scores.positions if tokens is None else tokens),
        [scores.writers[i] for i in rows],
        "token",
        "",
        title or "Where in the prompt the answer is carried",
        f"Scores in units of the {_words(scores.metric)} by node and token (the {len(rows)} strongest nodes); blue supports "
        "the answer, orange opposes it; colour ~ √|score|.",
        scores.metric,
        theme,
    )


def attribution_scatter(
    scores: NodeScoresLike | pd.DataFrame,
    exact: PatchingLike | None = None,
    *,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw estimates by attribution against exact patching, one point a node; on the rising line the estimate is right.

    Args:
        scores: scores of nodes, or a table with columns name, exact and attribution (and kind, for colours).
        exact: with scores of nodes, a denoising sweep of the heads' outputs by layer and head. Its shares are turned
            into the metric's units.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: a table without the columns, scores without a sweep, or a sweep of something else than heads.
    """
    look = theme_named(theme)
    frame = scores if isinstance(scores, pd.DataFrame) else _beside(scores, exact)
    require_columns("attribution scatter", frame, ["name", "exact", "attribution"])
    x, y = frame["exact"].to_numpy(float), frame["attribution"].to_numpy(float)
    error = float(np.abs(x - y).mean())
    together = f", correlation {fixed(float(np.corrcoef(x, y)[0, 1]), 3)}" if len(x) > 2 and x.std() and y.std() else ""
    figure = new_figure(
        look,
        title or "When can the linear estimate be trusted?",
        f"Each point is a node or an edge: its exact effect by activation patching across, the linear estimate upright. "
        f"{len(x)} points, mean error {number(error)}{together}.",
        height=600,
    )
    low, high = min(x.min(), y.min(), 0.0), max(x.max(), y.max(), 0.0)
    pad = 0.07 * (high - low or 1.0)
    ends = [low - pad, high + pad]
    figure.add_scatter(
        x=ends,
        y=ends,
        mode="lines",
        name="estimate = exact",
        hoverinfo="skip",
        line={"color": look.muted, "width": 1.3},
    )
    kinds = (
        frame["kind"].astype(str) if "kind" in frame.columns else pd.Series(["nodes"] * len(frame), index=frame.index)
    )
    looks = series_styles(kinds.tolist(), look)
    for kind, part in frame.groupby(kinds, sort=False):
        style = looks[str(kind)]
        figure.add_scatter(
            x=part["exact"].astype(float).tolist(),
            y=part["attribution"].astype(float).tolist(),
            mode="markers",
            name=plain(kind),
            marker={
                "symbol": style.symbol,
                "size": 10,
                "color": style.colour,
                "line": {"width": 0.8, "color": look.ink},
            },
            customdata=[[plain(name)] for name in part["name"]],
            hovertemplate="%{customdata[0]}<br>exact %{x:.4g}<br>estimate %{y:.4g}<extra></extra>",
        )
    for at in _apart(x / (ends[1] - ends[0]), y / (ends[1] - ends[0])):
        figure.add_annotation(
            x=x[at],
            y=y[at],
            text=plain(frame["name"].iloc[at]),
            showarrow=False,
            xanchor="left",
            xshift=8,
            font={"size": 11, "color": look.muted},
        )
    figure.update_xaxes(title_text="exact effect of patching", range=ends, zeroline=False)
    figure.update_yaxes(title_text="estimate by attribution", range=ends, zeroline=False)
    return figure


def _beside(scores: NodeScoresLike, exact: PatchingLike | None) -> pd.DataFrame:
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
    return pd.DataFrame(
        {
            "name": [n for row in names for n in row],
            "exact": [unit * v for row in exact.tensor.tolist() for v in row],
            "attribution": [values[n] for row in names for n in row],
            "kind": [f"heads of layer {row}" for row in exact.rows for _ in exact.columns],
        }
    )


def _heat(
    z: np.ndarray,
    columns: Sequence[str],
    rows: Sequence[str],
    column_axis: str,
    row_axis: str,
    title: str,
    subtitle: str,
    metric: str,
    theme: str,
) -> go.Figure:
    """A signed heat map whose colour goes with the root, numbers in the cells where there are few; names may repeat."""
    look = theme_named(theme)
    top = float(np.nanmax(np.abs(z))) or 1.0
    figure = new_figure(look, title, subtitle, height=int(190 + min(900, max(160, 32 * z.shape[0]))))
    few = z.size <= _VALUES_IN_CELLS
    figure.add_heatmap(
        z=z,
        zmin=-top,
        zmax=top,
        colorscale=root_scale(look),
        xgap=1,
        ygap=1,
        hoverongaps=False,
        text=[[fixed(v, 2) if few and abs(v) >= 0.005 else "" for v in row] for row in z.tolist()],
        texttemplate="%{text}",
        textfont={"size": 11},
        customdata=[[[plain(row), plain(column)] for column in columns] for row in rows],
        hovertemplate="%{customdata[0]} %{customdata[1]}<br>score %{z:.4g}<extra></extra>",
        colorbar={"title": {"text": plain(_words(metric)).replace(" ", "<br>")}, "thickness": 14, "outlinewidth": 0},
    )
    figure.update_layout(plot_bgcolor=look.band)
    axis = {"showgrid": False, "zeroline": False, "showline": False, "ticks": ""}
    figure.update_xaxes(
        **axis,
        tickvals=list(range(len(columns))),
        ticktext=[plain(name) for name in columns],
        title_text=column_axis,
        tickangle=0 if sum(map(len, columns)) < 110 else -60,
    )
    figure.update_yaxes(
        **axis, tickvals=list(range(len(rows))), ticktext=[plain(name) for name in rows], title_text=row_axis or None
    )
    return figure


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _apart(xs: np.ndarray, ys: np.ndarray) -> list[int]:
    """The largest points whose labels do not meet; coordinates are shares of the panel."""
    chosen: list[int] = []
    for at in np.argsort(-np.abs(xs) - np.abs(ys), kind="stable").tolist():
        if len(chosen) < _LABELLED and all(abs(xs[at] - xs[i]) > 0.08 or abs(ys[at] - ys[i]) > 0.035 for i in chosen):
            chosen.append(at)
    return chosen
