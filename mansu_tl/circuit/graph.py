"""The computational graph of a transformer: who writes to the residual stream, who reads from it, which edges exist.

Writers: `embed`, a head's output (`L3H2`), an MLP's output (`MLP3`). Readers: a head's query input (`L3H2.q`), a KV
head's key and value inputs (`L3KV1.k`, `L3KV1.v`), an MLP's input (`MLP3.in`), the final norm's input (`logits`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy
from mansu_tl.models.anatomy import graph_names
from mansu_tl.results.result import Result


@dataclass(frozen=True)
class Graph(Result):
    """Writers, readers and the edges that exist between them.

    Attributes:
        writers: in order of computation.
        readers: per layer all q, all k, all v, the MLP; last `logits`.
        exists: whether a writer comes before a reader. In parallel blocks an MLP does not read its own layer's heads.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    exists: Bool[Tensor, "writer reader"]

    @classmethod
    def of(cls, model: TransformerBridge) -> Graph:
        """The graph of a hooked model."""
        return cls.from_map(Anatomy.of(model))

    @classmethod
    @torch_defaults()
    def from_map(cls, components: Anatomy) -> Graph:
        """The graph of a component map."""
        exists = _in_order(components.writers, components.readers, components.parallel)
        return cls(components.writers, components.readers, exists)

    @property
    def n_edges(self) -> int:
        """How many edges exist."""
        return int(self.exists.sum())

    def __repr__(self) -> str:
        return f"Graph({len(self.writers)} writers, {len(self.readers)} readers, {self.n_edges} edges)"

    @torch_defaults()
    def mask(self, edges: Iterable[tuple[str, str]]) -> Bool[Tensor, "writer reader"]:
        """The edges as a mask.

        Raises:
            MansuError: a writer or reader that the model does not have, or an edge that does not exist.
        """
        out = torch.zeros_like(self.exists)
        for writer, reader in edges:
            for what, name, names in (("writer", writer, self.writers), ("reader", reader, self.readers)):
                if name not in names:
                    some = f"{', '.join(names[:3])} ... {names[-1]} ({len(names)})"
                    raise MansuError(f"edge {writer} -> {reader}: no {what} {name!r}; this model has {some}")
            at = self.writers.index(writer), self.readers.index(reader)
            if not self.exists[at]:
                raise MansuError(
                    f"edge {writer} -> {reader}: the reader is computed before the writer; swap or drop it"
                )
            out[at] = True
        return out


def layer_of(name: str) -> int:
    """The layer of a writer or reader; -1 for `embed`, a number past every layer for `logits`."""
    layer = re.match(r"(?:MLP|L)(\d+)", name)
    return int(layer[1]) if layer else {"embed": -1, "logits": 10**6}[name]


def reader_kind(name: str) -> str:
    """What a reader takes in: "q", "k", "v", "mlp" or "logits"."""
    if name == "logits":
        return "logits"
    suffix = name.rsplit(".", 1)[1]
    return "mlp" if suffix == "in" else suffix


@torch_defaults()
def prune(
    mask: Bool[Tensor, "writer reader"], writers: tuple[str, ...], readers: tuple[str, ...], kv_groups: int
) -> Bool[Tensor, "writer reader"]:
    """The edges of `mask` that lie on a path from `embed` to `logits`.

    A head is reached when any of its q, k, v inputs is, and passes on what reaches it; a KV head's inputs belong to
    every head of its group of `kv_groups` query heads.
    """
    outputs = [writers_behind(name, kv_groups) for name in readers]
    index = {name: i for i, name in enumerate(writers)}
    feeds = torch.zeros(len(readers), len(writers), dtype=torch.bool)
    for r, names in enumerate(outputs):
        for name in names:
            feeds[r, index[name]] = True
    kept = mask.clone()
    while True:
        reached = (feeds & kept.any(0)[:, None]).any(0)
        reached[index["embed"]] = True
        used_writer = kept.any(1)
        useful = (feeds & used_writer[None, :]).any(1)
        useful[readers.index("logits")] = True
        smaller = kept & reached[:, None] & useful[None, :]
        if torch.equal(smaller, kept):
            return kept
        kept = smaller


def writers_behind(reader: str, kv_groups: int) -> list[str]:
    """The writers whose output a reader can change; empty for `logits`."""
    if reader == "logits":
        return []
    name, suffix = reader.rsplit(".", 1)
    if suffix in ("in", "q"):
        return [name]
    layer, kv = name[1:].split("KV")
    return [f"L{layer}H{int(kv) * kv_groups + i}" for i in range(kv_groups)]


def shape_of(writers: Sequence[str], readers: Sequence[str]) -> tuple[int, int, int]:
    """Layers, heads of a layer and KV heads of a layer, counted in the names."""
    layers = sum(name.startswith("MLP") for name in writers)
    heads = sum(name.startswith("L0H") for name in writers)
    return layers, heads, sum(name.startswith("L0KV") and name.endswith(".k") for name in readers)


def kv_groups(writers: Sequence[str], readers: Sequence[str]) -> int:
    """Query heads per KV head, from the names of layer 0."""
    _, heads, kv = shape_of(writers, readers)
    return heads // kv


def require_names(writers: Sequence[str], readers: Sequence[str]) -> Bool[Tensor, "writer reader"]:
    """The edges that a graph with these names can have; MLPs that read their own layer's heads included."""
    layers, heads, kv = shape_of(writers, readers)
    for kind, given, wanted in zip(
        ("writers", "readers"), (writers, readers), graph_names(layers, heads, kv), strict=True
    ):
        wrong = next((a for a, b in zip_longest(given, wanted) if a != b), None)
        if tuple(given) != wanted or not layers or not kv or heads % kv:
            shown = f"{wrong!r} is out of place" if wrong is not None else "some are missing"
            raise MansuError(f"its {kind} are no graph of this package ({shown})")
    return _in_order(writers, readers, parallel=False)


def edge_frame(
    writers: Sequence[str], readers: Sequence[str], mask: Bool[Tensor, "writer reader"],
    values: Float[Tensor, "writer reader"],
) -> pd.DataFrame:  # fmt: skip
    """One row an edge of the mask, largest |value| ("score") first."""
    rows, columns = mask.nonzero(as_tuple=True)
    names = [readers[i] for i in columns.tolist()]
    frame = pd.DataFrame(
        {
            "writer": [writers[i] for i in rows.tolist()],
            "reader": names,
            "kind": [reader_kind(name) for name in names],
            "writer_layer": [layer_of(writers[i]) for i in rows.tolist()],
            "score": values[rows, columns].tolist(),
        }
    )
    return frame.sort_values("score", key=abs, ascending=False, kind="stable", ignore_index=True)


def _in_order(writers: Sequence[str], readers: Sequence[str], parallel: bool) -> Bool[Tensor, "writer reader"]:
    """Whether a writer is computed before a reader."""
    wrote = [4 * layer_of(name) + (2 if name.startswith("MLP") else 0) for name in writers]
    reads = [4 * layer_of(name) + (1 if reader_kind(name) == "mlp" and not parallel else 0) for name in readers]
    return torch.tensor(wrote)[:, None] < torch.tensor(reads)[None]
