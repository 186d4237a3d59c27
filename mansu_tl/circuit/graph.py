"""The computational graph of a transformer: who writes to the residual stream, who reads from it, which edges exist.

Writers: `embed`, a head's output (`L3H2`), an MLP's output (`MLP3`). Readers: a head's query input (`L3H2.q`), a KV
head's key and value inputs (`L3KV1.k`, `L3KV1.v`), an MLP's input (`MLP3.in`), the final norm's input (`logits`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
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
from mansu_tl.results.serialise import MismatchError


class OnGraph(Result):
    """Base of what has a row for every writer and a column for every reader.

    Attributes:
        writers: row names, in order of computation.
        readers: column names; per layer all q, all k, all v, the MLP; last `logits`.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Layers, heads of a layer and KV heads of a layer, counted in the names."""
        layers = sum(name.startswith("MLP") for name in self.writers)
        heads = sum(name.startswith("L0H") for name in self.writers)
        return layers, heads, sum(name.startswith("L0KV") and name.endswith(".k") for name in self.readers)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        _, heads, kv = self.sizes
        return heads // kv

    def at(self, writer: str, reader: str) -> tuple[int, int]:
        """Row and column of an edge.

        Raises:
            MansuError: a writer or reader that the graph does not have.
        """
        for what, name, names in (("writer", writer, self.writers), ("reader", reader, self.readers)):
            if name not in names:
                some = f"{', '.join(names[:3])} ... {names[-1]} ({len(names)})"
                raise MansuError(f"edge {writer} -> {reader}: no {what} {name!r}; this model has {some}")
        return self.writers.index(writer), self.readers.index(reader)

    def named(self, mask: Bool[Tensor, "writer reader"]) -> list[tuple[str, str]]:
        """The edges of a mask by names, row by row."""
        return [(self.writers[w], self.readers[r]) for w, r in mask.nonzero().tolist()]

    def frame(self, mask: Bool[Tensor, "writer reader"], values: Float[Tensor, "writer reader"]) -> pd.DataFrame:
        """One row an edge of the mask, largest |value| ("score") first."""
        frame = pd.DataFrame(self.named(mask), columns=["writer", "reader"])
        frame["kind"] = [reader_kind(name) for name in frame["reader"]]
        frame["writer_layer"] = [layer_of(name) for name in frame["writer"]]
        frame["score"] = values[mask].tolist()
        return frame.sort_values("score", key=abs, ascending=False, kind="stable", ignore_index=True)

    @torch_defaults()
    def feeds(self) -> Bool[Tensor, "reader writer"]:
        """Which writers' output each reader can change: a KV head's inputs belong to every head of its group."""
        out, group = torch.zeros(len(self.readers), len(self.writers), dtype=torch.bool), self.group
        row_of = {name: i for i, name in enumerate(self.writers)}
        for r, reader in enumerate(self.readers):
            out[r, [row_of[name] for name in writers_behind(reader, group)]] = True
        return out

    @torch_defaults()
    def pruned(
        self, mask: Bool[Tensor, "writer reader"], feeds: Bool[Tensor, "reader writer"] | None = None
    ) -> Bool[Tensor, "writer reader"]:
        """The edges of `mask` that lie on a path from `embed` to `logits`.

        A head is reached when any of its q, k, v inputs is, and passes on what reaches it.

        Args:
            feeds: this graph's, where it is at hand.
        """
        feeds, kept = self.feeds() if feeds is None else feeds, mask.clone()
        while True:
            reached = (feeds & kept.any(0)[:, None]).any(0)
            reached[self.writers.index("embed")] = True
            useful = (feeds & kept.any(1)[None, :]).any(1)
            useful[self.readers.index("logits")] = True
            smaller = kept & reached[:, None] & useful[None, :]
            if torch.equal(smaller, kept):
                return kept
            kept = smaller

    def same_graph(self, other: OnGraph) -> bool:
        """Whether both have the same rows and columns."""
        return self.writers == other.writers and self.readers == other.readers

    def _possible(self, name: str) -> Bool[Tensor, "writer reader"]:
        """The edges that a graph with these names can have (MLPs that read their own layer's heads included).

        Refuses names that no graph of this package has, and a tensor (the field `name`) that does not fit them.
        """
        layers, heads, kv = self.sizes
        wanted = graph_names(layers, heads, kv)
        for kind, given, right in zip(("writers", "readers"), (self.writers, self.readers), wanted, strict=True):
            wrong = next((a for a, b in zip_longest(given, right) if a != b), None)
            if tuple(given) != right or not layers or not kv or heads % kv:
                shown = f"{wrong!r} is out of place" if wrong is not None else "some are missing"
                raise MansuError(f"its {kind} are no graph of this package ({shown})")
        possible, values = _in_order(self.writers, self.readers, parallel=False), getattr(self, name)
        if values.shape != possible.shape:
            raise MismatchError(f"{name!r} is {tuple(values.shape)}, its names ask for {tuple(possible.shape)}")
        return possible


@dataclass(frozen=True)
class Graph(OnGraph):
    """Writers, readers and the edges that exist between them.

    Attributes:
        writers, readers: their names.
        exists: whether a writer comes before a reader. In parallel blocks an MLP does not read its own layer's heads.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    exists: Bool[Tensor, "writer reader"]

    @classmethod
    @torch_defaults()
    def of(cls, model: TransformerBridge | Anatomy) -> Graph:
        """The graph of a hooked model, or of its anatomy."""
        anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
        exists = _in_order(anatomy.writers, anatomy.readers, anatomy.parallel)
        return cls(anatomy.writers, anatomy.readers, exists)

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
            at = self.at(writer, reader)
            if not self.exists[at]:
                raise MansuError(
                    f"edge {writer} -> {reader}: the reader is computed before the writer; swap or drop it"
                )
            out[at] = True
        return out


@cache
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


def writers_behind(reader: str, kv_groups: int) -> list[str]:
    """The writers whose output a reader can change; empty for `logits`."""
    if reader == "logits":
        return []
    name, suffix = reader.rsplit(".", 1)
    if suffix in ("in", "q"):
        return [name]
    layer, kv = name[1:].split("KV")
    return [f"L{layer}H{int(kv) * kv_groups + i}" for i in range(kv_groups)]


def _in_order(writers: Sequence[str], readers: Sequence[str], parallel: bool) -> Bool[Tensor, "writer reader"]:
    """Whether a writer is computed before a reader."""
    wrote = [4 * layer_of(name) + (2 if name.startswith("MLP") else 0) for name in writers]
    reads = [4 * layer_of(name) + (1 if reader_kind(name) == "mlp" and not parallel else 0) for name in readers]
    return torch.tensor(wrote)[:, None] < torch.tensor(reads)[None]
