"""Where the circuit of what is to be forgotten meets the circuit of what is to stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from mansu_tl.circuit.circuit import Circuit
from mansu_tl.circuit.graph import layer_of
from mansu_tl.errors import MansuError
from mansu_tl.results.result import Result, Table


@dataclass(frozen=True)
class Conflict(Result):
    """What a forget circuit and a retain circuit share.

    A node is in conflict if it writes along some edge of either circuit; its score in a circuit is the sum over its
    outgoing edges there (our definition; the score of an edge is the circuit's own).

    Attributes:
        forget: the circuit to be forgotten.
        retain: the circuit to be kept.
    """

    forget: Circuit
    retain: Circuit

    @property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """The edges in both."""
        return tuple(self.forget.named(self.forget.mask & self.retain.mask))

    @property
    def nodes(self) -> tuple[str, ...]:
        """The writers in both, in order of computation."""
        both = set(_senders(self.retain))
        return tuple(name for name in _senders(self.forget) if name in both)

    @property
    def jaccard(self) -> float:
        """Shared edges over all edges of the two."""
        return self.forget.jaccard(self.retain)

    @property
    def node_jaccard(self) -> float:
        """Shared writers over all writers of the two."""
        return len(self.nodes) / max(1, len(set(_senders(self.forget)) | set(_senders(self.retain))))

    def to_dataframe(self, what: str = "nodes") -> pd.DataFrame:
        """One row a shared node (or, with what="edges", a shared edge) with both scores, most contested first.

        Contested = the smaller of the two |scores| is large.

        Raises:
            MansuError: `what` is neither.
        """
        if what == "nodes":
            frame = pd.DataFrame({"node": self.nodes, "layer": [layer_of(name) for name in self.nodes]})
            rows = [self.forget.writers.index(name) for name in self.nodes]
            forget, retain = ((c.scores * c.mask).sum(1)[rows] for c in (self.forget, self.retain))
        elif what == "edges":
            frame = pd.DataFrame(self.edges, columns=["writer", "reader"])
            shared = self.forget.mask & self.retain.mask
            forget, retain = (c.scores[shared] for c in (self.forget, self.retain))
        else:
            raise MansuError(f"conflict: what={what!r}; choose nodes or edges")
        frame["forget"], frame["retain"] = forget.tolist(), retain.tolist()
        contested = frame[["forget", "retain"]].abs().min(axis=1)
        return frame.loc[contested.sort_values(ascending=False, kind="stable").index].reset_index(drop=True)

    def __repr__(self) -> str:
        return (
            f"Conflict({len(self.edges)} shared edges, Jaccard {self.jaccard:.3f}; {len(self.nodes)} shared nodes, "
            f"Jaccard {self.node_jaccard:.3f})"
        )

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "most contested nodes first", "{:.4f}".format, rows=10),)


def conflict(forget: Circuit, retain: Circuit) -> Conflict:
    """The edges and nodes that two circuits share, with both scores.

    Raises:
        MansuError: circuits of different architectures.
    """
    forget.require_same_graph(retain)
    return Conflict(forget, retain)


def _senders(circuit: Circuit) -> list[str]:
    return [name for i, name in enumerate(circuit.writers) if circuit.mask[i].any()]
