"""Names and numbers of TransformerLens's `tools.analysis.attribution_patching`, there and back.

Both packages score an edge by (a(clean) - a(corrupt)) . dm/d input, mean over pairs, positive = supports the answer, in
the metric's units: nothing changes sign or scale. Theirs takes the gradient at the corrupt end, which here is
`edge_attribution(method="eap", at="corrupt")`, and keeps every position by itself (here `per_position=True`). It has
no edges for grouped-query attention.

Its `faithfulness` measures one pair at a time and, under mean ablation, still counts from the corrupt metric; ours takes
means over pairs and counts from the run with every edge ablated. On one pair with corrupt ablation the two agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import AttributionResult, Node

from mansu_tl.circuit.graph import Graph, OnGraph, layer_of
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy
from mansu_tl.patching import NodeScores


def node_scores_from_transformer_lens(result: AttributionResult, model: TransformerBridge, metric: str) -> NodeScores:
    """The node scores of TransformerLens's result, added up over positions; its gradient is at the corrupt end.

    Args:
        metric: what its metric is called.

    Raises:
        MansuError: a writer of this model has no score.
    """
    writers = Anatomy.of(model).writers
    row_of, total = {node: i for i, node in enumerate(_nodes(writers))}, torch.zeros(len(writers), dtype=torch.float64)
    seen: set[int] = set()
    for node, score in result.node_scores.items():
        row = row_of.get(replace(node, position=0))
        if row is None:
            raise MansuError(f"TransformerLens result: {node} is no writer of this model; pass its own result")
        seen.add(row)
        total[row] += score
    if missing := [name for i, name in enumerate(writers) if i not in seen]:
        raise MansuError(f"TransformerLens result: no score for {missing[0]}; pass the result of the same model")
    return NodeScores(total.float(), writers, "corrupt", metric)


def node_scores_to_transformer_lens(scores: NodeScores) -> AttributionResult:
    """Node scores by position as TransformerLens's result; it has nodes for writers only.

    Raises:
        MansuError: scores that were not kept by position from the start, or hold queries, keys and values.
    """
    table = from_start("node scores", scores.per_position, scores.positions)
    if other := [name for name in scores.writers if "." in name]:
        raise MansuError(f"node scores: TransformerLens has no node {other[0]}; score without qkv and qk_fix")
    return AttributionResult(node_scores=by_node(scores.writers, table))


def from_start(what: str, per_position: Tensor | None, positions: Sequence[str]) -> Tensor:
    """The scores by position, counted from the start."""
    if per_position is None or list(positions) != [str(i) for i in range(len(positions))]:
        raise MansuError(
            f"{what}: added up over positions, or in rows that are no positions from the start, which TransformerLens "
            "counts; score with per_position=True"
        )
    return per_position


def _nodes(names: Sequence[str], position: int = 0) -> list[Node]:
    """Writers or readers as TransformerLens names them."""
    last, nodes = max(layer_of(name) for name in names if name != "logits"), []
    for name in names:
        of, _, side = name.partition(".")
        kind: Any = of if of in ("embed", "logits") else "mlp_out" if of.startswith("MLP") else "attn_head_out"
        kind = {"": kind, "in": "mlp_in"}.get(side, f"{side}_input")
        layer = {"embed": None, "logits": last}.get(of, layer_of(name))
        head = int(re.split("H|KV", of)[1]) if of.startswith("L") else None
        nodes.append(Node(kind, position, layer=layer, head=head))
    return nodes


def by_node(writers: Sequence[str], table: Float[Tensor, "pos writer"]) -> dict[Node, float]:
    """The scores of a table by TransformerLens's nodes."""
    return {
        node: score
        for position, row in enumerate(table.tolist())
        for node, score in zip(_nodes(writers, position), row, strict=True)
    }


def edges_at(graph: OnGraph, mask: Bool[Tensor, "writer reader"], position: int) -> list[tuple[Node, Node]]:
    """The edges of a mask at a position, row by row."""
    _, heads, kv = graph.sizes
    if heads != kv:
        raise MansuError(
            f"TransformerLens: {heads} heads share {kv} KV heads, and it names no edge into a shared key or value; use "
            "this package's own scores"
        )
    writers, readers = _nodes(graph.writers, position), _nodes(graph.readers, position)
    return [(writers[w], readers[r]) for w, r in mask.nonzero().tolist()]


def places(graph: Graph) -> Callable[[tuple[Node, Node]], tuple[int, int]]:
    """Finds the row and column of an edge of TransformerLens."""
    rows, columns = ({node: i for i, node in enumerate(_nodes(names))} for names in (graph.writers, graph.readers))

    def place(edge: tuple[Node, Node]) -> tuple[int, int]:
        w, r = (index.get(replace(node, position=0)) for index, node in zip((rows, columns), edge, strict=True))
        if w is not None and r is not None and graph.exists[w, r] and edge[0].position == edge[1].position:
            return w, r
        shown = f"{edge[0] if w is None else graph.writers[w]} -> {edge[1] if r is None else graph.readers[r]}"
        raise MansuError(f"TransformerLens edge {shown}: this model has no such edge; pass its own result")

    return place
