"""Selections into figures: what `mansu_tl.plots` draws, of the results that a selection names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.basedatatypes import BaseFigure

from mansu_tl import plots
from mansu_tl.circuit.graph import reader_kind, writers_behind
from mansu_tl.errors import MansuError
from mansu_tl.explorer.results import ORIGINAL, Results, Stage
from mansu_tl.explorer.selection import Edge, Item, Part, Selection, head_of, item_name
from mansu_tl.plots.panels import Panel
from mansu_tl.plots.ruler import most_edited
from mansu_tl.plots.scatters import StageScore, stage_scores
from mansu_tl.plots.theme import fixed, theme_named
from mansu_tl.quantization import grid_of
from mansu_tl.results.intervals import interval_over_facts

SELECTED = "selected"
_NO_HEAD = "{item} has no attention pattern of its own; choose a head, or an edge into or out of one."
_NO_WEIGHTS = "{item} has no weights that quantization touches; choose a head, an MLP, or an edge between them."


def stages_of(selection: Selection) -> tuple[Stage, Stage, Stage]:
    """Before the edit, after it, and after quantization."""
    return ORIGINAL, (selection.method, ""), (selection.method, selection.quantizer)


def graph(results: Results, selection: Selection) -> go.Figure:
    """The circuit before, after, and after quantization, side by side; the chosen item is ringed.

    Its last three traces, called `SELECTED`, are the rings.
    """
    pair = selection.pair if selection.alone else None
    circuit = results.circuit(selection.size)
    shown = circuit if pair is None else results.pair_circuit(selection.size, pair)
    stages = stages_of(selection)[1:]
    found = {results.title(s): results.divergence(s, selection.size, pair) for s in stages}
    over = "mean over all pairs" if pair is None else f"pair {pair}: {results.label(pair)}"
    figure = plots.circuit_stages(
        shown,
        found,
        title=f"Circuit of {circuit.n_edges} edges, faithfulness {fixed(results.faithfulness(selection.size), 2)} ({over})",
    )
    figure.update_layout(height=max(560, int(figure.layout.height * 0.8)), clickmode="event")
    figure.update_traces(cliponaxis=False, selector={"name": "nodes"})
    ring = {"symbol": "circle-open", "size": 25, "color": "#CC79A7", "line": {"width": 4}}
    for col, (x, y) in enumerate(ring_places(figure, selection.item), 1):
        Panel(figure, theme_named("light"), 1, col).mark(x, y, SELECTED, "markers", legend=False, marker=ring)
    return figure


def ring_places(figure: BaseFigure, item: Item) -> list[tuple[list[float], list[float]]]:
    """Where an item is drawn in each panel of `graph`: a node at its centre, an edge at its middle."""
    out: list[tuple[list[float], list[float]]] = [([], []), ([], []), ([], [])]
    for trace in figure.data:
        if trace.customdata is None:
            continue
        panel = int((trace.xaxis or "x").removeprefix("x") or 1) - 1
        for x, y, data in zip(trace.x, trace.y, trace.customdata, strict=True):
            if clicked(data) == item:
                out[panel][0].append(float(x))
                out[panel][1].append(float(y))
    return out


def clicked(data: object) -> Item | None:
    """The item that a mark of `graph` stands for, from what the mark carries."""
    if not isinstance(data, list | tuple | np.ndarray):
        return None
    if isinstance(data[0], str) and isinstance(data[1], str):
        return (data[0], data[1])
    return data[0] if isinstance(data[0], str) else None


def curve(results: Results, selection: Selection) -> go.Figure:
    """Faithfulness against size; a line marks the chosen size. It is the figure's last shape."""
    figure = plots.faithfulness_curves(
        {"largest |score|": results.curve()},
        title=f"Faithfulness {fixed(results.faithfulness(selection.size), 2)} at {selection.size} edges selected",
    )
    figure.add_vline(x=selection.size, line={"color": "#CC79A7", "width": 3})
    return figure


def scatter(results: Results, selection: Selection) -> go.Figure:
    """The circuit's edges after edit and quantization against before."""
    pair = selection.pair if selection.alone else None
    return plots.divergence_scatter(results.divergence(stages_of(selection)[2], selection.size, pair))


def item_scores(results: Results, selection: Selection) -> go.Figure:
    """The chosen edge's or node's score at the three stages, pair by pair."""
    item, stages = selection.item, []
    for stage in stages_of(selection):
        values = item_values(results, stage, item)
        mean, low, high = mean_and_interval(results, values)
        stages.append(StageScore(results.title(stage), values, mean, (low, high)))
    labels = [results.label(i) for i in range(len(results.pairs))]
    words = "all edges into logits" if item == "logits" else "all edges out of it" if isinstance(item, str) else "edge"
    return stage_scores(stages, labels, chosen=selection.pair, title=f"{item_name(item)}: score ({words})",
                        metric=f"{results.ranking.metric.replace('_', ' ')} (nats)")  # fmt: skip


def item_values(results: Results, stage: Stage, item: Item) -> torch.Tensor:
    """Score of an edge, or of a node (the sum over what it sends; for `logits` over what it takes in), on every pair."""
    scores, names = results.scores(stage), results.ranking
    if isinstance(item, tuple):
        return scores[:, names.writers.index(item[0]), names.readers.index(item[1])]
    if item == "logits":
        return scores[:, :, names.readers.index(item)].sum(1)
    return scores[:, names.writers.index(item)].sum(1)


def mean_and_interval(results: Results, values: torch.Tensor) -> tuple[float, float, float]:
    """Mean over pairs, and both ends of its 95 % interval over facts."""
    low, high = interval_over_facts(values, results.pairs.facts)
    return values.double().mean().item(), low, high


def attention(results: Results, selection: Selection) -> go.Figure:
    """The pattern of the chosen head on the chosen pair's clean prompt, at the three stages.

    Raises:
        MansuError: the item has no head.
    """
    groups = results.circuit(selection.size).kv_groups
    head = head_of(selection.item, groups)
    if head is None:
        raise MansuError(_NO_HEAD.format(item=item_name(selection.item)))
    stages = stages_of(selection)
    patterns = torch.stack([results.pattern(stage, selection.pair, head) for stage in stages])
    return plots.attention_patterns(
        patterns,
        results.tokens(selection.pair),
        [results.title(stage) for stage in stages],
        title=f"{head} on {results.label(selection.pair)}{_shared(selection.item, groups)}",
    )


def ruler(results: Results, selection: Selection) -> go.Figure:
    """The chosen weights on the quantizer's ruler; see `ruler_of`.

    Raises:
        MansuError: the item has no quantized weights, or the quantizer no fixed codes.
    """
    return ruler_of(results, selection.method, selection.quantizer, chosen_part(results, selection))


def ruler_of(results: Results, method: str, quantizer_name: str, part: Part, most: int = 24) -> go.Figure:
    """A part's weights on a quantizer's ruler, block after block; first those blocks with most edited weights.

    Raises:
        MansuError: the quantizer has no fixed codes.
    """
    name = part.piece.parameter
    grid = grid_of(quantizer_name).bound(results.model).of(name)
    before, after = results.matrix("", name), results.matrix(method, name)
    held = results.held(part)
    edited, size = held & results.edited(method, name), grid.block_size or before.shape[1]
    blocks = most_edited(edited, size, most) or most_edited(held, size, 1)
    title = f"{part.name}: {int(edited.sum()):,} weights edited by {results.titles[method]}"
    return plots.ruler(before, after, grid, blocks=blocks, name=name, title=title)


def chosen_part(results: Results, selection: Selection) -> Part:
    """The weights that the selection names, else those of which the method has edited most.

    Raises:
        MansuError: the item has none.
    """
    parts = {part.name: part for part in results.parts(selection.item)}
    if not parts:
        raise MansuError(_NO_WEIGHTS.format(item=item_name(selection.item)))
    if not selection.part:
        return max(parts.values(), key=lambda part: n_edited(results, selection.method, part))
    return parts[selection.part]


def n_edited(results: Results, method: str, part: Part) -> int:
    """How many of a part's weights a method has edited."""
    return int((results.held(part) & results.edited(method, part.piece.parameter)).sum())


def telling(results: Results, method: str, edges: Sequence[Edge]) -> Edge:
    """The first of some edges that has everything to show: edited weights and an attention pattern; else the first."""
    for edge in edges:
        if reader_kind(edge[1]) in "qkv" and any(n_edited(results, method, p) for p in results.parts(edge)):
            return edge
    return edges[0]


def _shared(item: Item, groups: int) -> str:
    reader = item[1] if isinstance(item, tuple) else ""
    if groups == 1 or not reader.endswith((".k", ".v")):
        return ""
    others = ", ".join(writers_behind(reader, groups)[1:])
    return f" (shares {reader.partition('.')[0]} with {others})"
