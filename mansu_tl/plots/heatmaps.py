"""Matrices as heat maps: scores of all edges, of heads and of tokens, patching sweeps, attention patterns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.colors import find_intermediate_color
from torch import Tensor

from mansu_tl.circuit import EdgeScores
from mansu_tl.circuit.graph import layer_of
from mansu_tl.errors import MansuError
from mansu_tl.patching import NodeScores, PatchingResult
from mansu_tl.plots.panels import BARE, Panel, new_panel, new_panels
from mansu_tl.plots.theme import Theme, fixed, new_figure, number, plain, theme_named

_ALL_LABELS = 48  # names up to which every one is written
_VALUES_IN_CELLS = 240
_STRONG = 0.1  # of the largest |score|: cells from which on the minus sign is written
_ACROSS = 4  # attention patterns side by side


def edge_matrix(scores: EdgeScores, *, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw the scores of all edges, writers upward and readers to the right, in order of computation.

    Colour goes with the square root of |score|, so that small scores can be seen beside large ones. Strong negative
    cells carry a minus sign. Edges that do not exist are left in the background's grey.

    Raises:
        MansuError: there is no edge.
    """
    look = theme_named(theme)
    exists = scores.exists.cpu().numpy()
    if not exists.any():
        raise MansuError("edge scores: no edge exists; score a model with at least one layer")
    z = np.where(exists, scores.tensor.detach().float().cpu().numpy(), np.nan)
    top = float(np.nanmax(np.abs(z))) or 1.0
    how_to_read = (
        f"Blue supports the answer, orange opposes it; colour ~ √|score|. Metric {scores.metric}, "
        f"completeness residual {number(scores.residual, 2)}."
    )
    figure = new_figure(
        look,
        title or f"{scores.method.upper()} scores of {int(exists.sum()):,} edges",
        how_to_read,
        190 + min(760, max(320, 18 * len(z))),
    )
    panel = Panel(figure, look)
    marks = np.where(z < -_STRONG * top, "−", "").tolist() if len(z) <= _ALL_LABELS else None
    panel.heat(
        z, _root_scale(look), (-top, top), "score", hover="%{y} → %{x}<br>score %{z:.4g}", gap=None, texts=marks,
        x=[plain(name) for name in scores.readers], y=[plain(name) for name in scores.writers],
        colorbar={"tickformat": ".2~g"},
    )  # fmt: skip
    grid = {key: each for key, each in BARE.items() if key != "ticks"}
    panel.x(**{**grid, **_ticks(scores.readers)}, title_text="reader (where the edge goes)", tickangle=-90)
    panel.y(**{**grid, **_ticks(scores.writers)}, title_text="writer (where it comes from)")
    line = {"color": look.neutral, "width": 0.6}
    for names, along, across in ((scores.readers, "x", "y"), (scores.writers, "y", "x")):
        for i in _layer_starts(names)[1:]:
            ends = {f"{along}0": i - 0.5, f"{along}1": i - 0.5, f"{across}0": 0, f"{across}1": 1}
            figure.add_shape(type="line", **ends, **{f"{across}ref": "paper"}, line=line)
    return figure


def patching(result: PatchingResult, *, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw an activation-patching sweep, layers upward; cells show their value where there are few enough.

    Raises:
        MansuError: the sweep has no cell.
    """
    look = theme_named(theme)
    z = result.tensor.detach().float().cpu().numpy()
    if z.size == 0:
        raise MansuError("patching: the sweep has no cell to draw; run it on at least one layer and position")
    top = max(1.0, float(np.nanmax(np.abs(z))))
    done = "restored" if result.direction == "denoising" else "destroyed"
    how_to_read = f"Share of the clean-corrupt difference in {result.metric} that one patch has {done}, "
    how_to_read += "1 = all of it; 0 = no effect."
    panel = new_panel(
        look,
        title or f"{result.direction.capitalize()} the {result.component}",
        how_to_read,
        190 + max(200, 34 * len(z)),
    )
    few = z.size <= _VALUES_IN_CELLS
    low, zero, high = look.diverging
    panel.heat(
        z, [[0, low], [0.5, zero], [1, high]], (-top, top), "share", texts=_written(z, few),
        hover=f"{plain(result.row_axis)} %{{customdata[0]}}, {plain(result.column_axis)} %{{customdata[1]}}<br>%{{z:.3f}}",
        customdata=_cells(result.rows, result.columns),
    )  # fmt: skip
    panel.x(**{**BARE, **_ticks(result.columns)}, title_text=plain(result.column_axis))
    panel.y(**{**BARE, **_ticks(result.rows)}, title_text=plain(result.row_axis))
    return panel.figure


def head_scores(scores: NodeScores, *, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw the scores of heads and MLPs as a heat map, layers upward, heads from left to right and the MLP after them.

    `embed` and queries, keys and values are left out.

    Raises:
        MansuError: no head and no MLP among the nodes.
    """
    values = dict(zip(scores.writers, scores.tensor.detach().float().tolist(), strict=True))
    title = title or "Which heads and MLPs carry the answer"
    what = f"Estimated effect on the {_words(scores.metric)} of restoring each component's output"
    return _components(values, "head scores", title, what, scores.metric, theme)


def direct_logit_attribution(scores: EdgeScores, *, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw what every head and MLP writes into the logits itself: the scores of the edges that end there.

    The change of each output from the corrupt prompt to the clean one, through the final norm and the unembedding alone;
    what reaches the answer through later components is in `head_scores`. `embed` stands in the text above.

    Raises:
        MansuError: no head and no MLP among the writers.
    """
    direct = scores.tensor[:, scores.readers.index("logits")].detach().float().tolist()
    values = dict(zip(scores.writers, direct, strict=True))
    title = title or "What heads and MLPs write into the answer themselves"
    what = (
        f"Direct effect on the {_words(scores.metric)}; with embed's {number(values['embed'], 2)} they add up to "
        f"{number(sum(direct), 3)} of {number(scores.metric_clean - scores.metric_corrupt, 3)}"
    )
    return _components(values, "direct logit attribution", title, what, scores.metric, theme)


def token_scores(
    scores: NodeScores | EdgeScores,
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

    Raises:
        MansuError: scores that were not kept by position, or another number of tokens.
    """
    if scores.per_position is None:
        raise MansuError("token scores: they are added up over positions; score with per_position=True")
    z = scores.per_position.detach().float().cpu()
    by_node = (z.sum(2) if z.ndim == 3 else z).T.numpy()
    if tokens is not None and (len(tokens) > by_node.shape[1] or by_node[:, len(tokens) :].any()):
        raise MansuError(f"token scores: {len(tokens)} tokens for {by_node.shape[1]} positions; give one for each")
    if most < 1:
        raise MansuError(f"token scores: most={most}; draw at least one node")
    names = list(scores.positions if tokens is None else tokens)
    by_node = by_node[:, : len(names)]
    rows = sorted(np.argsort(-np.abs(by_node).max(1), kind="stable")[:most].tolist())
    title = title or "Where in the prompt the answer is carried"
    what = f"Scores in units of the {_words(scores.metric)} by node and token (the {len(rows)} strongest nodes)"
    nodes = [scores.writers[i] for i in rows]
    return _scores(by_node[rows], names, nodes, ("token", ""), title, what, scores.metric, theme)


def attention_patterns(
    patterns: Float[Tensor, "head query key"],
    tokens: Sequence[str],
    heads: Sequence[str] | None = None,
    *,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw what each head attends to in one prompt: queries downward, keys across, one panel a head.

    Heads are numbered where no names are given.

    Raises:
        MansuError: no head, or tokens or names of another number.
    """
    look = theme_named(theme)
    count, queries, keys = patterns.shape
    names = [f"H{i}" for i in range(count)] if heads is None else list(heads)
    if count == 0 or len(names) != count:
        raise MansuError(f"attention: {count} heads, {len(names)} names; give a name for each of at least one head")
    if len(tokens) != keys or queries != keys:
        raise MansuError(
            f"attention: {len(tokens)} tokens for patterns of {queries} x {keys}; give one for each position"
        )
    how_to_read = (
        "Rows: the token that looks; columns: the token that is looked at. Dark = most of the attention; each row adds "
        "up to 1."
    )
    title, grid = (
        title or "What the heads look at",
        {"shared_xaxes": True, "shared_yaxes": True, "horizontal_spacing": 0.025},
    )
    panels = new_panels(look, title, how_to_read, names, min(_ACROSS, count), (220, 284), 40, **grid)
    figure = panels[0].figure
    shown = [plain(token) for token in tokens]
    z = patterns.detach().float().cpu().tolist()
    for panel, name, pattern in zip(panels, map(plain, names), z, strict=True):
        causal = [[v if k <= q or v else None for k, v in enumerate(row)] for q, row in enumerate(pattern)]
        figure.add_heatmap(
            z=causal, coloraxis="coloraxis", customdata=_cells(tokens, tokens), hoverongaps=False, xgap=1, ygap=1, name=name,
            hovertemplate=f"{name}: %{{customdata[0]}} looks at %{{customdata[1]}}<br>%{{z:.3f}}<extra></extra>",
            **panel.where,
        )  # fmt: skip
    axis = {**BARE, "tickfont": {"size": 10}, "tickvals": list(range(len(shown))), "ticktext": shown}
    figure.update_xaxes(**axis, tickangle=-60)
    figure.update_yaxes(**axis, autorange="reversed")
    _, zero, high = look.diverging
    bar = {"title": {"text": "attention"}, "thickness": 14, "outlinewidth": 0}
    colours = {"cmin": 0, "cmax": 1, "colorscale": [[0, zero], [1, high]], "colorbar": bar}
    figure.update_layout(coloraxis=colours, plot_bgcolor=look.band, margin={"t": figure.layout.margin.t + 24})
    figure.update_annotations(font={"size": 12})
    return figure


def attention_view(
    patterns: Float[Tensor, "head query key"],
    tokens: Sequence[str],
    heads: Sequence[str] | None = None,
    *,
    title: str | None = None,
    theme: str = "light",
) -> Any:
    """Show attention patterns in a notebook: CircuitsVis's widget where it is installed, else `attention_patterns`.

    CircuitsVis (`pip install circuitsvis`) loads its script from the net and has no title or theme. Arguments and errors
    are those of `attention_patterns`.
    """
    figure = attention_patterns(patterns, tokens, heads, title=title, theme=theme)
    if find_spec("circuitsvis") is None:
        return figure
    names = [f"H{i}" for i in range(len(patterns))] if heads is None else list(heads)
    return import_module("circuitsvis.attention").attention_patterns(
        tokens=list(tokens), attention=patterns.detach().float().cpu(), attention_head_names=names
    )


def _components(values: Mapping[str, float], about: str, title: str, what: str, metric: str, theme: str) -> go.Figure:
    """Scores of heads and MLPs, layers upward; other nodes are left out."""
    cells = {name: value for name, value in values.items() if name != "embed" and "." not in name}
    if not cells:
        raise MansuError(f"{about}: no head and no MLP among the nodes; score the writers of a model")
    layers = [str(i) for i in range(1 + max(layer_of(name) for name in cells))]
    heads = [f"H{i}" for i in range(1 + max((int(n.partition("H")[2]) for n in cells if "H" in n), default=-1))]
    z = [[*(cells.get(f"L{i}{h}", np.nan) for h in heads), cells.get(f"MLP{i}", np.nan)] for i in layers]
    return _scores(np.array(z), [*heads, "MLP"], layers, ("component", "layer"), title, what, metric, theme)


def _scores(
    z: np.ndarray,
    columns: Sequence[str],
    rows: Sequence[str],
    axes: tuple[str, str],
    title: str,
    what: str,
    metric: str,
    theme: str,
) -> go.Figure:
    """A signed heat map whose colour goes with the root, numbers in the cells where there are few; names may repeat."""
    look = theme_named(theme)
    top = float(np.nanmax(np.abs(z))) or 1.0
    subtitle = f"{what}; blue supports the answer, orange opposes it; colour ~ √|score|."
    figure = new_figure(look, title, subtitle, 190 + min(900, max(160, 32 * len(z))))
    panel = Panel(figure, look)
    panel.heat(
        z, _root_scale(look), (-top, top), plain(_words(metric)).replace(" ", "<br>"), customdata=_cells(rows, columns),
        hover="%{customdata[0]} %{customdata[1]}<br>score %{z:.4g}", texts=_written(z, z.size <= _VALUES_IN_CELLS, 0.005),
    )  # fmt: skip
    panel.x(**BARE, **_named(columns), title_text=axes[0], tickangle=0 if sum(map(len, columns)) < 110 else -60)
    panel.y(**BARE, **_named(rows), title_text=axes[1] or None)
    return figure


def _written(z: np.ndarray, few: bool, least: float | int = 0.0) -> list[list[str]]:
    """The numbers in the cells: where there are few, those of at least that size."""
    return [[fixed(v, 2) if few and not abs(v) < least else "" for v in row] for row in z.tolist()]


def _cells(rows: Sequence[str], columns: Sequence[str]) -> list[list[list[str]]]:
    """The names of every cell's row and column."""
    return [[[plain(row), plain(column)] for column in columns] for row in rows]


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _named(names: Sequence[str]) -> dict[str, Any]:
    """Tick settings by number, since names may repeat."""
    return {"tickvals": list(range(len(names))), "ticktext": [plain(name) for name in names]}


def _ticks(names: Sequence[str]) -> dict[str, Any]:
    """Tick settings; one tick a layer where there are many names."""
    if len(names) <= _ALL_LABELS:
        return _named(names)
    if not any(name.partition(".")[0].startswith(("L", "MLP")) for name in names):
        places = list(range(0, len(names), math.ceil(len(names) / _ALL_LABELS)))
        return {"tickvals": places, "ticktext": [plain(names[i]) for i in places]}
    starts = _layer_starts(names)
    middles = [(a + b - 1) / 2 for a, b in zip(starts, [*starts[1:], len(names)], strict=True)]
    labels = [names[i] if names[i] in ("embed", "logits") else f"layer {layer_of(names[i])}" for i in starts]
    return {"tickvals": middles, "ticktext": labels, "ticks": ""}


def _layer_starts(names: Sequence[str]) -> list[int]:
    layers = [layer_of(name) for name in names]
    return [i for i, layer in enumerate(layers) if i == 0 or layer != layers[i - 1]]


def _root_scale(look: Theme) -> list[tuple[float, str]]:
    """A diverging colour scale whose colour goes with the square root of the distance from zero."""
    low, zero, high = (f"rgb({int(c[1:3], 16)}, {int(c[3:5], 16)}, {int(c[5:7], 16)})" for c in look.diverging)

    def side(end: str) -> list[tuple[float, str]]:
        return [((i / 12) ** 2 / 2, find_intermediate_color(zero, end, i / 12, colortype="rgb")) for i in range(13)]

    return [(0.5 - s, colour) for s, colour in reversed(side(low))] + [(0.5 + s, c) for s, c in side(high)[1:]]
