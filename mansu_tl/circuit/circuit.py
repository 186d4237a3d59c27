"""A circuit: a set of edges on paths from `embed` to `logits`, with the scores that chose them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import networkx as nx
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mansu_tl.circuit.graph import layer_of, prune, reader_kind, writers_behind
from mansu_tl.circuit.scores import EdgeScores
from mansu_tl.errors import MansuError
from mansu_tl.files import load_tensors, save_tensors


@dataclass(frozen=True)
class Circuit:
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
    def top(cls, scores: EdgeScores, n: int, faithfulness: float = float("nan")) -> Circuit:
        """The `n` edges of largest |score|, pruned to those on a path from `embed` to `logits`.

        Raises:
            MansuError: `n` is not between 1 and the number of edges.
        """
        total = int(scores.exists.sum())
        if not 1 <= n <= total:
            raise MansuError(f"circuit: n={n} edges, the graph has {total}; choose 1..{total}")
        mask = top_mask(scores, n)
        how = f"top {n} edges by |{scores.method} score|, pruned"
        return cls.from_mask(scores, mask, how, faithfulness)

    @classmethod
    def from_mask(
        cls, scores: EdgeScores, mask: Bool[Tensor, "writer reader"], how: str, faithfulness: float = float("nan")
    ) -> Circuit:
        """The edges of `mask` (pruned), carrying `scores`."""
        groups = kv_groups(scores.writers, scores.readers)
        kept = prune(mask & scores.exists, scores.writers, scores.readers, groups)
        return cls(kept, scores.tensor, scores.writers, scores.readers, groups, faithfulness, how, scores.model)

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
        return tuple(w for i, w in enumerate(self.writers) if self.mask[i].any() or self.mask[:, self.columns(w)].any())

    def columns(self, writer: str) -> list[int]:
        """The readers that feed a writer, as column numbers."""
        return [i for i, reader in enumerate(self.readers) if writer in writers_behind(reader, self.kv_groups)]

    def __and__(self, other: Circuit) -> Circuit:
        """Edges in both, pruned."""
        return self._combined(other, self.mask & other.mask, "intersection")

    def __or__(self, other: Circuit) -> Circuit:
        """Edges in either."""
        return self._combined(other, self.mask | other.mask, "union")

    def __sub__(self, other: Circuit) -> Circuit:
        """Edges here but not there, not pruned: what is left need not be a path."""
        _same_graph(self, other)
        how = f"difference of ({self.how}) and ({other.how})"
        return replace(self, mask=self.mask & ~other.mask, faithfulness=float("nan"), how=how)

    def jaccard(self, other: Circuit) -> float:
        """Shared edges over all edges of the two."""
        _same_graph(self, other)
        return int((self.mask & other.mask).sum()) / max(1, int((self.mask | other.mask).sum()))

    def to_dataframe(self) -> pd.DataFrame:
        """One row an edge, largest |score| first."""
        rows, columns = self.mask.nonzero(as_tuple=True)
        frame = pd.DataFrame(
            {
                "writer": [self.writers[i] for i in rows.tolist()],
                "reader": [self.readers[i] for i in columns.tolist()],
                "kind": [reader_kind(self.readers[i]) for i in columns.tolist()],
                "writer_layer": [layer_of(self.writers[i]) for i in rows.tolist()],
                "score": self.scores[rows, columns].tolist(),
            }
        )
        order = frame["score"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order].reset_index(drop=True)

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

    def save(self, path: str | PathLike[str]) -> Path:
        """Write one safetensors file."""
        facts: dict[str, Any] = {k: v for k, v in self.__dict__.items() if k not in ("mask", "scores")}
        return save_tensors(path, "Circuit", {"mask": self.mask, "scores": self.scores}, facts)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Circuit:
        """Read what `save` wrote.

        Raises:
            MansuError: no such file, not a circuit, or cut short.
        """
        tensors, facts = load_tensors(path, "Circuit")
        names: dict[str, Any] = {key: tuple(facts.pop(key)) for key in ("writers", "readers")}
        return cls(**tensors, **names, **facts)

    def _combined(self, other: Circuit, mask: Tensor, word: str) -> Circuit:
        _same_graph(self, other)
        kept = prune(mask, self.writers, self.readers, self.kv_groups)
        return replace(self, mask=kept, faithfulness=float("nan"), how=f"{word} of ({self.how}) and ({other.how})")

    def __repr__(self) -> str:
        return (
            f"Circuit({self.n_edges} edges, {len(self.nodes)} nodes, faithfulness {self.faithfulness:.3f}; {self.how})"
        )

    def _repr_html_(self) -> str:
        top = self.to_dataframe().head(10).to_html(index=False, float_format=lambda v: f"{v:.4f}")
        return f"<p><b>{self!r}</b><br>largest ten by |score|:</p>{top}"


def top_mask(scores: EdgeScores, n: int) -> Bool[Tensor, "writer reader"]:
    """The `n` existing edges of largest |score| as a mask; ties go to the earlier edge."""
    size = scores.tensor.abs().masked_fill(~scores.exists, -1).flatten()
    order = size.sort(descending=True, stable=True).indices[:n]
    mask = torch.zeros(size.shape[0], dtype=torch.bool)
    mask[order] = True
    return mask.view_as(scores.exists)


def random_mask(exists: Bool[Tensor, "writer reader"], n: int, seed: int) -> Bool[Tensor, "writer reader"]:
    """`n` existing edges drawn at random, not pruned: the control for a circuit of that size."""
    existing = exists.flatten().nonzero()[:, 0]
    draw = torch.randperm(existing.shape[0], generator=torch.Generator().manual_seed(seed))[:n]
    mask = torch.zeros(exists.numel(), dtype=torch.bool)
    mask[existing[draw]] = True
    return mask.view_as(exists)


def kv_groups(writers: Iterable[str], readers: Iterable[str]) -> int:
    """Query heads per KV head, from the names of layer 0."""
    heads = sum(1 for name in writers if name.startswith("L0H"))
    kv = sum(1 for name in readers if name.startswith("L0KV") and name.endswith(".k"))
    return heads // kv


def _same_graph(a: Circuit, b: Circuit) -> None:
    if a.writers != b.writers or a.readers != b.readers:
        raise MansuError("circuits: they belong to graphs of different shape; compare circuits of one architecture")
