"""A circuit: a set of edges on paths from `embed` to `logits`, with the scores that chose them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import networkx as nx
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import Node

from mansu_tl.circuit import transformer_lens_io as interop
from mansu_tl.circuit.graph import Graph, OnGraph, writers_behind
from mansu_tl.circuit.scores import EdgeScores
from mansu_tl.circuit.selection import selected_mask, strength
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint
from mansu_tl.results.result import Table
from mansu_tl.results.serialise import MismatchError, require_finite


@dataclass(frozen=True)
class Circuit(OnGraph):
    """Edges chosen from a model's graph.

    Attributes:
        mask: the chosen edges.
        scores: the scores of all edges, by which they were chosen.
        writers: row names.
        readers: column names.
        kv_groups: query heads that share a KV head.
        faithfulness: (m(circuit) - m(corrupt)) / (m(clean) - m(corrupt)) when it was chosen; NaN if not measured.
        how: one line on how the edges were chosen.
        model: fingerprint of the model it belongs to.
    """

    mask: Bool[Tensor, "writer reader"]
    scores: Float[Tensor, "writer reader"]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    kv_groups: int
    faithfulness: float
    how: str
    model: str

    @classmethod
    def top(cls, scores: EdgeScores, n: int, faithfulness: float = float("nan"), *, by: str = "absolute") -> Circuit:
        """The `n` edges of largest |score|, pruned to those on a path from `embed` to `logits`.

        Args:
            by: "absolute" ranks by |score|, "signed" takes the most positive (what supports the answer).

        Raises:
            MansuError: `n` is not between 1 and the number of edges, or an unknown ranking.
        """
        how = f"top {n} edges by {_ranked(scores, by)}, pruned"
        return cls.from_mask(scores, selected_mask(scores, n, "top", by, least=1), how, faithfulness)

    @classmethod
    def greedy(cls, scores: EdgeScores, n: int, faithfulness: float = float("nan"), *, by: str = "absolute") -> Circuit:
        """`n` edges grown backwards from the logits, each the strongest into what is reached already; then pruned.

        EAP-IG's greedy search (Hanna et al. 2024, arXiv 2403.17806). Pruning takes away writers reached last, whose own
        inputs were not.

        Raises:
            MansuError: as `top`.
        """
        how = f"{n} edges grown from the logits by {_ranked(scores, by)}, pruned"
        return cls.from_mask(scores, selected_mask(scores, n, "greedy", by, least=1), how, faithfulness)

    @classmethod
    def above(cls, scores: EdgeScores, threshold: float, *, by: str = "absolute") -> Circuit:
        """The edges whose |score| (by="signed": score) is at least `threshold`, pruned.

        Raises:
            MansuError: a threshold that is not finite, or an unknown ranking.
        """
        if not math.isfinite(threshold):
            raise MansuError(f"circuit: threshold={threshold}; choose a finite number in the metric's units")
        how = f"edges of {_ranked(scores, by)} >= {threshold:g}, pruned"
        return cls.from_mask(scores, strength(scores, by) >= threshold, how)

    @classmethod
    def from_mask(
        cls, scores: EdgeScores, mask: Bool[Tensor, "writer reader"], how: str, faithfulness: float = float("nan")
    ) -> Circuit:
        """The edges of `mask` (pruned), carrying `scores`."""
        kept, group = scores.pruned(mask & scores.exists), scores.group
        return cls(kept, scores.tensor, scores.writers, scores.readers, group, faithfulness, how, scores.model)

    @property
    def n_edges(self) -> int:
        """How many edges the circuit has."""
        return int(self.mask.sum())

    @property
    def edges(self) -> list[tuple[str, str]]:
        """The edges by names, largest |score| first."""
        frame = self.to_dataframe()
        return list(zip(frame["writer"], frame["reader"], strict=True))

    @property
    def nodes(self) -> tuple[str, ...]:
        """Writers that send or receive an edge of the circuit, in order of computation."""
        used = self.mask.any(1) | (self.feeds() & self.mask.any(0)[:, None]).any(0)
        return tuple(name for name, is_used in zip(self.writers, used.tolist(), strict=True) if is_used)

    def __and__(self, other: Circuit) -> Circuit:
        """Edges in both, pruned."""
        return self._combined(other, self.mask & other.mask, "intersection")

    def __or__(self, other: Circuit) -> Circuit:
        """Edges in either."""
        return self._combined(other, self.mask | other.mask, "union")

    def __sub__(self, other: Circuit) -> Circuit:
        """Edges here but not there, not pruned: what is left need not be a path."""
        self.require_same_graph(other)
        how = f"difference of ({self.how}) and ({other.how})"
        return replace(self, mask=self.mask & ~other.mask, faithfulness=float("nan"), how=how)

    def jaccard(self, other: Circuit) -> float:
        """Shared edges over all edges of the two."""
        self.require_same_graph(other)
        return int((self.mask & other.mask).sum()) / max(1, int((self.mask | other.mask).sum()))

    def require_same_graph(self, other: Circuit) -> None:
        """Refuse a circuit of another architecture."""
        if not self.same_graph(other):
            raise MansuError("circuits: they belong to graphs of different shape; compare circuits of one architecture")

    def to_dataframe(self) -> pd.DataFrame:
        """One row an edge, largest |score| first."""
        return self.frame(self.mask, self.scores)

    def to_networkx(self) -> nx.MultiDiGraph:
        """A directed graph over writers plus `logits`; edge keys are reader kinds, with `score` and `reader`.

        An edge into a KV head becomes one edge to every head of its group.
        """
        graph = nx.MultiDiGraph(faithfulness=self.faithfulness, how=self.how)
        frame = self.to_dataframe()
        for writer, reader, kind, score in zip(
            frame["writer"], frame["reader"], frame["kind"], frame["score"], strict=True
        ):
            for target in writers_behind(reader, self.kv_groups) or ["logits"]:
                graph.add_edge(writer, target, key=kind, score=score, reader=reader)
        return graph

    def to_transformer_lens(self, n_positions: int) -> list[tuple[Node, Node]]:
        """The edges as TransformerLens names them, each at every one of `n_positions` positions.

        What its `tools.analysis.attribution_patching.faithfulness` takes as `circuit`.

        Raises:
            MansuError: a model with grouped-query attention, whose edges it has no names for.
        """
        if n_positions < 1:
            raise MansuError(f"circuit: n_positions={n_positions}; give the number of tokens of the prompt")
        return [edge for position in range(n_positions) for edge in interop.edges_at(self, self.mask, position)]

    @classmethod
    def from_transformer_lens(
        cls, edges: Sequence[tuple[Node, Node]] | Sequence[tuple[Node, Node, float]], model: TransformerBridge
    ) -> Circuit:
        """A circuit from TransformerLens's edges, such as `AttributionResult.top_edges(k)`; pruned.

        An edge belongs to it if it is there at any position; the scores given with them are added up over positions.

        Raises:
            MansuError: an edge that this model does not have.
        """
        graph = Graph.of(model)
        mask, place = torch.zeros_like(graph.exists), interop.places(graph)
        scores = torch.zeros(graph.exists.shape, dtype=torch.float64)
        for writer, reader, *score in edges:
            at = place((writer, reader))
            mask[at] = True
            scores[at] += sum(score)
        kept, how = graph.pruned(mask), f"{len(edges)} positional edges of TransformerLens, pruned"
        return cls(
            kept, scores.float(), graph.writers, graph.readers, graph.group, float("nan"), how, fingerprint(model)
        )

    def _combined(self, other: Circuit, mask: Tensor, word: str) -> Circuit:
        self.require_same_graph(other)
        return replace(
            self, mask=self.pruned(mask), faithfulness=float("nan"), how=f"{word} of ({self.how}) and ({other.how})"
        )

    def _check(self) -> None:
        possible = self._possible("mask")
        require_finite({"scores": self.scores})
        if (self.mask & ~possible).any():
            raise MismatchError(f"edge {' -> '.join(self.named(self.mask & ~possible)[0])} runs backwards")
        if self.kv_groups != self.group:
            raise MismatchError(f"kv_groups={self.kv_groups}, its names say {self.group}")

    def __repr__(self) -> str:
        return (
            f"Circuit({self.n_edges} edges, {len(self.nodes)} nodes, faithfulness {self.faithfulness:.3f}; {self.how})"
        )

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "largest |score| first", "{:.4f}".format, rows=10),)


def _ranked(scores: EdgeScores, by: str) -> str:
    return f"|{scores.method} score|" if by == "absolute" else f"{scores.method} score"
