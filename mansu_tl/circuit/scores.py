"""Edge scores as one tensor plus names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import AttributionResult

from mansu_tl.circuit import transformer_lens_io as interop
from mansu_tl.circuit.graph import Graph, OnGraph
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint
from mansu_tl.results.result import Table
from mansu_tl.results.serialise import MismatchError, require_finite


@dataclass(frozen=True)
class EdgeScores(OnGraph):
    """How much each edge supports the answer: positive = it does.

    Attributes:
        tensor: mean over pairs of the score summed over positions, in the metric's units; 0 where no edge exists.
        writers: row names.
        readers: column names.
        exists: which edges the model has.
        method: "eap" or "eap-ig".
        rule: where the gradient is taken: "clean"/"corrupt" for EAP, "midpoint"/"left"/"right" for EAP-IG.
        steps: gradient evaluations.
        metric: name of the metric.
        metric_clean: its mean over the clean prompts.
        metric_corrupt: its mean over the corrupt prompts.
        residual: |sum of the embed row - (metric_clean - metric_corrupt)|, in the metric's units: 0 in the limit of
            many EAP-IG steps (completeness); for EAP it says how far the linear estimate is off.
        model: fingerprint of the model that was scored.
        per_pair: the scores of every pair, kept on request.
        per_position: mean over pairs of the score at every position, kept on request.
        positions: names of the rows of `per_position`.
    """

    tensor: Float[Tensor, "writer reader"]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    exists: Bool[Tensor, "writer reader"]
    method: str
    rule: str
    steps: int
    metric: str
    metric_clean: float
    metric_corrupt: float
    residual: float
    model: str
    per_pair: Float[Tensor, "pair writer reader"] | None = None
    per_position: Float[Tensor, "pos writer reader"] | None = None
    positions: tuple[str, ...] = ()

    @property
    def relative_residual(self) -> float:
        """The completeness residual as a share of the metric's change."""
        return self.residual / abs(self.metric_clean - self.metric_corrupt)

    def node_scores(self) -> Float[Tensor, " writer"]:
        """Each writer's score: the sum over its outgoing edges."""
        return self.tensor.sum(1)

    def __getitem__(self, edge: tuple[str, str]) -> float:
        """The score of one edge, by names."""
        return self.tensor[self.at(*edge)].item()

    def to_dataframe(self) -> pd.DataFrame:
        """One row an edge, largest |score| first."""
        return self.frame(self.exists, self.tensor)

    def to_transformer_lens(self) -> AttributionResult:
        """The scores as TransformerLens's `AttributionResult`, edges and writers, position by position.

        Same sign and units; see `transformer_lens_io` for how the two packages' scores relate.

        Raises:
            MansuError: scores that were not kept by position, or of a model with grouped-query attention.
        """
        table = interop.from_start("edge scores", self.per_position, self.positions)
        edges = {
            edge: score
            for position, row in enumerate(table[:, self.exists].tolist())
            for edge, score in zip(interop.edges_at(self, self.exists, position), row, strict=True)
        }
        return AttributionResult(node_scores=interop.by_node(self.writers, table.sum(2)), edge_scores=edges)

    @classmethod
    def from_transformer_lens(
        cls,
        result: AttributionResult,
        model: TransformerBridge,
        *,
        metric: str = "metric",
        metric_clean: float = float("nan"),
        metric_corrupt: float = float("nan"),
    ) -> EdgeScores:
        """The edge scores of TransformerLens's `attribution_patch`, kept by position and added up over positions.

        Args:
            model: the model that was scored.
            metric: what its metric is called.
            metric_clean: its mean over the clean prompts, which the result does not hold; without it the residual is NaN.
            metric_corrupt: the same over the corrupt prompts.

        Raises:
            MansuError: a result of another model, or without edge scores.
        """
        edges, graph = result.edge_scores, Graph.of(model)
        if not edges:
            raise MansuError(
                "TransformerLens result: it has no edge scores; run attribution_patch with "
                "EdgeAttributionConfig(granularity='edge')"
            )
        place, count = interop.places(graph), 1 + max(writer.position for writer, _ in edges)
        per_position = torch.zeros(count, *graph.exists.shape)
        for edge, score in edges.items():
            per_position[edge[0].position][place(edge)] = score
        if len(edges) != count * graph.n_edges:
            raise MansuError(
                f"TransformerLens result: {len(edges)} edges, this model has {graph.n_edges} at each of {count} positions; "
                "pass the result of the same model"
            )
        tensor = per_position.sum(0)
        return cls(
            tensor=tensor,
            writers=graph.writers,
            readers=graph.readers,
            exists=graph.exists,
            method="eap",
            rule="corrupt",
            steps=1,
            metric=metric,
            metric_clean=metric_clean,
            metric_corrupt=metric_corrupt,
            residual=abs(tensor[0].sum().item() - (metric_clean - metric_corrupt)),
            model=fingerprint(model),
            per_position=per_position,
            positions=tuple(str(i) for i in range(len(per_position))),
        )

    def _check(self) -> None:
        possible = self._possible("tensor")
        require_finite({"tensor": self.tensor})
        if (self.exists & ~possible).any() or (self.tensor[~self.exists] != 0).any():
            raise MismatchError("it scores edges that no model has")
        if self.per_position is not None and len(self.per_position) != len(self.positions):
            raise MismatchError(f"'per_position' has {len(self.per_position)} rows for {len(self.positions)} positions")

    def __repr__(self) -> str:
        return (
            f"EdgeScores({int(self.exists.sum())} edges, {self.method} {self.rule} x{self.steps}, {self.metric} "
            f"{self.metric_corrupt:.3g} -> {self.metric_clean:.3g}, residual {self.residual:.2g})"
        )

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "largest |score| first", "{:.4f}".format, rows=10),)
