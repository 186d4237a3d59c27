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
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import AttributionResult, Node

from mansu_tl.circuit.graph import Graph, shape_of
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy
from mansu_tl.patching import NodeScores

_NAME = re.compile(r"(?P<end>embed|logits)|(L(?P<layer>\d+)(?P<of>H|KV)(?P<head>\d+)|MLP(?P<mlp>\d+))(?P<side>\.\w+)?")
_KINDS: dict[str, Any] = {
    **{"H": "attn_head_out", "H.q": "q_input", "KV.k": "k_input", "KV.v": "v_input"},
    **{"MLP": "mlp_out", "MLP.in": "mlp_in"},
}


def result_of(
    per_position: Float[Tensor, "pos writer reader"],
    positions: Sequence[str],
    writers: Sequence[str],
    readers: Sequence[str],
    exists: Bool[Tensor, "writer reader"],
) -> AttributionResult:
    """Scores by position as TransformerLens's result, edges and writers."""
    if list(positions) != [str(i) for i in range(len(positions))]:
        raise MansuError(
            f"edge scores: rows {', '.join(positions[:3])}... are no positions from the start, which TransformerLens "
            "counts; score with per_position=True"
        )
    _refuse_groups(writers, readers)
    layers = shape_of(writers, readers)[0]
    edges: dict[tuple[Node, Node], float] = {}
    nodes: dict[Node, float] = {}
    for position, part in enumerate(per_position.tolist()):
        sources = [_node(name, position, layers) for name in writers]
        targets = [_node(name, position, layers) for name in readers]
        for w, r in exists.nonzero().tolist():
            edges[sources[w], targets[r]] = part[w][r]
        for node, row in zip(sources, part, strict=True):
            nodes[node] = sum(row)
    return AttributionResult(node_scores=nodes, edge_scores=edges)


def scores_of(result: AttributionResult, graph: Graph) -> Float[Tensor, "pos writer reader"]:
    """The edge scores of TransformerLens's result, by position."""
    if not result.edge_scores:
        raise MansuError(
            "TransformerLens result: it has no edge scores; run attribution_patch with "
            "EdgeAttributionConfig(granularity='edge')"
        )
    edges = [(_edge(edge, graph), edge[0].position, score) for edge, score in result.edge_scores.items()]
    count = 1 + max(position for _, position, _ in edges)
    out = torch.zeros(count, *graph.exists.shape, dtype=torch.float64)
    for (w, r), position, score in edges:
        out[position, w, r] = score
    if len(edges) != count * graph.n_edges:
        raise MansuError(
            f"TransformerLens result: {len(edges)} edges, this model has {graph.n_edges} at each of {count} positions; "
            "pass the result of the same model"
        )
    return out.float()


def node_scores_from_transformer_lens(result: AttributionResult, model: TransformerBridge, metric: str) -> NodeScores:
    """The node scores of TransformerLens's result, added up over positions; its gradient is at the corrupt end.

    Args:
        metric: what its metric is called.

    Raises:
        MansuError: a writer of this model has no score.
    """
    anatomy = Anatomy.of(model)
    total = dict.fromkeys(anatomy.writers, 0.0)
    seen: set[str] = set()
    for node, score in result.node_scores.items():
        name = _name(node)
        if name not in total:
            raise MansuError(f"TransformerLens result: {node} is no writer of this model; pass its own result")
        seen.add(name)
        total[name] += score
    if missing := [name for name in anatomy.writers if name not in seen]:
        raise MansuError(f"TransformerLens result: no score for {missing[0]}; pass the result of the same model")
    return NodeScores(torch.tensor([total[name] for name in anatomy.writers]), anatomy.writers, "corrupt", metric)


def node_scores_to_transformer_lens(scores: NodeScores) -> AttributionResult:
    """Node scores by position as TransformerLens's result; it has nodes for writers only.

    Raises:
        MansuError: scores that were not kept by position from the start, or hold queries, keys and values.
    """
    table, names = scores.per_position, scores.positions
    if table is None or list(names) != [str(i) for i in range(len(names))]:
        raise MansuError("node scores: TransformerLens counts positions from the start; score with per_position=True")
    if other := [name for name in scores.writers if "." in name]:
        raise MansuError(f"node scores: TransformerLens has no node {other[0]}; score without qkv and qk_fix")
    layers = sum(name.startswith("MLP") for name in scores.writers)
    nodes = {
        _node(name, position, layers): table[position, i].item()
        for position in range(len(names))
        for i, name in enumerate(scores.writers)
    }
    return AttributionResult(node_scores=nodes)


def circuit_edges(
    mask: Bool[Tensor, "writer reader"], writers: Sequence[str], readers: Sequence[str], n_positions: int
) -> list[tuple[Node, Node]]:
    """The edges of a mask at every position."""
    if n_positions < 1:
        raise MansuError(f"circuit: n_positions={n_positions}; give the number of tokens of the prompt")
    _refuse_groups(writers, readers)
    layers = shape_of(writers, readers)[0]
    return [
        (_node(writers[w], position, layers), _node(readers[r], position, layers))
        for position in range(n_positions)
        for w, r in mask.nonzero().tolist()
    ]


def mask_of(
    edges: Sequence[tuple[Node, Node]] | Sequence[tuple[Node, Node, float]], graph: Graph
) -> tuple[Bool[Tensor, "writer reader"], Float[Tensor, "writer reader"]]:
    """Which edges are there at any position, and the scores given with them, added up over positions."""
    mask, scores = torch.zeros_like(graph.exists), torch.zeros(graph.exists.shape, dtype=torch.float64)
    for entry in edges:
        w, r = _edge((entry[0], entry[1]), graph)
        mask[w, r] = True
        scores[w, r] += entry[2] if len(entry) == 3 else 0.0
    return mask, scores.float()


def _node(name: str, position: int, layers: int) -> Node:
    match = _NAME.fullmatch(name)
    if match is None:
        raise MansuError(
            f"{name!r}: no writer or reader; names are embed, L0H0, L0H0.q, L0KV0.k, MLP0, MLP0.in, logits"
        )
    if match["end"]:
        return Node("logits", position, layer=layers - 1) if name == "logits" else Node("embed", position)
    kind = _KINDS[(match["of"] or "MLP") + (match["side"] or "")]
    head = None if match["head"] is None else int(match["head"])
    return Node(kind, position, layer=int(match["layer"] or match["mlp"]), head=head)


def _name(node: Node) -> str:
    of, dot, side = next((form for form, kind in _KINDS.items() if kind == node.kind), node.kind).partition(".")
    named = {"MLP": f"MLP{node.layer}", "H": f"L{node.layer}H{node.head}", "KV": f"L{node.layer}KV{node.head}"}
    return named.get(of, of) + dot + side


def _edge(edge: tuple[Node, Node], graph: Graph) -> tuple[int, int]:
    writer, reader = _name(edge[0]), _name(edge[1])
    if writer in graph.writers and reader in graph.readers and edge[0].position == edge[1].position:
        w, r = graph.writers.index(writer), graph.readers.index(reader)
        if graph.exists[w, r]:
            return w, r
    raise MansuError(f"TransformerLens edge {writer} -> {reader}: this model has no such edge; pass its own result")


def _refuse_groups(writers: Sequence[str], readers: Sequence[str]) -> None:
    _, heads, kv = shape_of(writers, readers)
    if heads != kv:
        raise MansuError(
            f"TransformerLens: {heads} heads share {kv} KV heads, and it names no edge into a shared key or value; use "
            "this package's own scores"
        )
