"""How good a circuit is: faithfulness, completeness, minimality, all by exact edge patching.

With m(X) the mean metric over pairs when exactly the edges of X are live, M all edges and 0 none (every edge at its
ablated value, by default that of the corrupt prompt):

- **faithfulness** of C = (m(C) - m(0)) / (m(M) - m(0)) (Hanna et al. 2024, arXiv 2403.17806; Marks et al. 2024,
  arXiv 2403.19647). 1 = the circuit does all of it.
- **completeness**: the faithfulness of the complement M - C, as Marks et al. 2024 measure it. 0 = nothing of the
  behaviour is left without the circuit; what it is above 0, the circuit misses. Wang et al. 2022 (arXiv 2211.00593)
  compare C and M with any part K of C taken out of both; this is their comparison at K = C.
- **minimality**: for every edge e of C the drop faithfulness(C) - faithfulness(C - e), Wang et al.'s minimality score at
  K = 0, signed and as a share. An edge without a drop is redundant given the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit.circuit import Circuit
from mansu_tl.circuit.graph import Graph, OnGraph
from mansu_tl.circuit.intervention import Patching
from mansu_tl.circuit.selection import random_mask
from mansu_tl.data import PromptPairs
from mansu_tl.data.forced import Forced
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.results.result import Table
from mansu_tl.results.serialise import MismatchError
from mansu_tl.runs.ablation import Ablation
from mansu_tl.runs.ends import end_hooks
from mansu_tl.runs.metrics import Metric, logit_difference, measured, metric_name, options_read
from mansu_tl.runs.passes import chunks, prepared, run

# Masks that are built and patched at once when every edge is taken out in turn.
_MASKS = 256


@dataclass(frozen=True)
class Minimality(OnGraph):
    """What every edge and every node of a circuit is worth to it.

    Attributes:
        edge_drops: faithfulness(C) - faithfulness(C - e) for every edge e of the circuit, 0 elsewhere.
        node_drops: the same for every writer of the circuit, taken out with all its edges, in and out.
        mask: the circuit's edges.
        nodes: the circuit's writers but `embed`.
        writers: row names.
        readers: column names.
        faithfulness: of the whole circuit.
        metric: name of the metric.
        ablation: what edges that are not live carry.
    """

    edge_drops: Float[Tensor, "writer reader"]
    node_drops: Float[Tensor, " node"]
    mask: Bool[Tensor, "writer reader"]
    nodes: tuple[str, ...]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    faithfulness: float
    metric: str
    ablation: str

    def redundant(self, tolerance: float = 0.0) -> list[tuple[str, str]]:
        """The edges whose removal, one at a time, costs no more than `tolerance` of faithfulness."""
        return self.named(self.mask & (self.edge_drops <= tolerance))

    def to_dataframe(self, what: str = "edges") -> pd.DataFrame:
        """One row an edge (or, with what="nodes", a writer), largest drop first.

        Raises:
            MansuError: `what` is neither.
        """
        if what == "nodes":
            frame = pd.DataFrame({"node": self.nodes, "drop": self.node_drops.tolist()})
        elif what == "edges":
            frame = self.frame(self.mask, self.edge_drops)
            frame = frame[["writer", "reader", "score"]].rename(columns={"score": "drop"})
        else:
            raise MansuError(f"minimality: what={what!r}; choose edges or nodes")
        return frame.sort_values("drop", ascending=False, kind="stable", ignore_index=True)

    def _check(self) -> None:
        self._possible("mask")
        if len(self.node_drops) != len(self.nodes):
            raise MismatchError("'node_drops' does not fit its names")

    def __repr__(self) -> str:
        return (
            f"Minimality({int(self.mask.sum())} edges, faithfulness {self.faithfulness:.3f}; {len(self.redundant())} "
            "edges cost nothing)"
        )

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "edges that are worth most first", "{:.4f}".format, rows=10),)


@torch_defaults()
def faithfulness(
    model: TransformerBridge,
    circuit: Circuit,
    pairs: PromptPairs,
    *,
    ablation: Ablation | None = None,
    metric: Metric = logit_difference,
    batch_size: int = 64,
) -> float:
    """(m(C) - m(0)) / (m(M) - m(0)), means over pairs, every edge outside C carrying its ablated value.

    Exact: the edges are patched, nothing is linearised. 1 = the circuit does all of it; it may exceed 1. An edited or
    quantized model of the same architecture is a fair question: does the circuit still do it there?

    Args:
        ablation: what the edges outside carry; by default what they carry on the corrupt prompt, so m(0) = m(corrupt).

    Raises:
        MansuError: the circuit belongs to another architecture, or the model shows no difference on these pairs.
    """
    require_graph(model, circuit)
    return relative(model, circuit.mask[None].float(), pairs, ablation, metric, batch_size)[0]


@torch_defaults()
def completeness(
    model: TransformerBridge,
    circuit: Circuit,
    pairs: PromptPairs,
    *,
    ablation: Ablation | None = None,
    metric: Metric = logit_difference,
    batch_size: int = 64,
) -> float:
    """Faithfulness of everything but the circuit (Marks et al. 2024, arXiv 2403.19647): 0 = the circuit misses nothing.

    Raises:
        MansuError: as `faithfulness`.
    """
    graph = require_graph(model, circuit)
    rest = graph.exists & ~circuit.mask
    return relative(model, rest[None].float(), pairs, ablation, metric, batch_size)[0]


@torch_defaults()
def minimality(
    model: TransformerBridge,
    circuit: Circuit,
    pairs: PromptPairs,
    *,
    ablation: Ablation | None = None,
    metric: Metric = logit_difference,
    batch_size: int = 64,
    progress: bool = False,
) -> Minimality:
    """The drop in faithfulness when each edge, and each node, of a circuit is taken out by itself.

    Raises:
        MansuError: as `faithfulness`, or a circuit without edges.
    """
    require_graph(model, circuit)
    if circuit.n_edges == 0:
        raise MansuError("circuit: it has no edge whose worth could be measured; select more edges")
    edges = [(w, r) for w, r in circuit.mask.nonzero().tolist()]
    nodes = [name for name in circuit.nodes if name != "embed"]
    parts, values = [None, *edges, *nodes], []
    for start in range(0, len(parts), _MASKS):
        masks = torch.stack([_without(circuit, part) for part in parts[start : start + _MASKS]])
        values += relative(model, masks, pairs, ablation, metric, batch_size, progress)
    whole, *rest = values
    drops = torch.zeros_like(circuit.scores)
    for (w, r), value in zip(edges, rest[: len(edges)], strict=True):
        drops[w, r] = whole - value
    return Minimality(
        edge_drops=drops,
        node_drops=whole - torch.tensor(rest[len(edges) :]),
        mask=circuit.mask,
        nodes=tuple(nodes),
        writers=circuit.writers,
        readers=circuit.readers,
        faithfulness=whole,
        metric=metric_name(metric),
        ablation=ablation.kind if ablation else "corrupt",
    )


@torch_defaults()
def random_faithfulness(
    model: TransformerBridge,
    circuit: Circuit,
    pairs: PromptPairs,
    *,
    seeds: int = 5,
    ablation: Ablation | None = None,
    metric: Metric = logit_difference,
    batch_size: int = 64,
) -> list[float]:
    """Faithfulness of random circuits drawn with as many edges as `circuit` has: its control."""
    exists = Graph.of(model).exists
    masks = torch.stack([random_mask(exists, circuit.n_edges, seed) for seed in range(seeds)])
    return relative(model, masks.float(), pairs, ablation, metric, batch_size)


def relative(
    model: TransformerBridge,
    masks: Float[Tensor, "mask writer reader"],
    pairs: PromptPairs,
    ablation: Ablation | None,
    metric: Metric,
    batch_size: int,
    progress: bool = False,
) -> list[float]:
    """The faithfulness of many masks."""
    return Judge(model, pairs, ablation, metric, batch_size).of(masks, progress)


class Judge:
    """Measures the faithfulness of masks on some pairs; what no mask changes is run once.

    Raises:
        MansuError: as `faithfulness`, when asked.
    """

    def __init__(
        self,
        model: TransformerBridge,
        pairs: PromptPairs,
        ablation: Ablation | None,
        metric: Metric,
        batch_size: int,
    ) -> None:
        self.ablation, rows = ablation or Ablation(), prepared(model, pairs, options_read(metric))
        self.patching = Patching(model, rows, self.ablation, metric, batch_size)
        self.clean = clean_metric(model, rows, metric, batch_size)

    def of(self, masks: Float[Tensor, "mask writer reader"], progress: bool = False) -> list[float]:
        """The faithfulness of each."""
        return self._shares(self.patching.values(masks, progress))

    def until(self, masks: Float[Tensor, "mask writer reader"], target: float, progress: bool = False) -> list[float]:
        """The same in turn, as far as the first that reaches a target, and what is measured together with it."""
        out: list[float] = []
        with tqdm(total=len(masks), desc="faithfulness", unit="circuit", disable=not progress) as bar:
            for values in self.patching.in_turn(masks):
                shares = self._shares(values)
                out += shares
                bar.update(len(shares))
                if max(shares) >= target:
                    break
        return out

    def _shares(self, values: Float[Tensor, "mask pair"]) -> list[float]:
        clean, ablated = self.clean, self.patching.off.double().mean().item()
        if abs(clean - ablated) < 1e-6:
            raise MansuError(
                f"pairs: the metric is {clean:.3g} on the clean and {ablated:.3g} on the {_OFF[self.ablation.kind]}; the "
                "model does not show this knowledge, so no circuit can be judged on it"
            )
        return ((values.double().mean(1) - ablated) / (clean - ablated)).tolist()


_OFF = {
    "corrupt": "corrupt prompts",
    "zero": "model with every edge at zero",
    "mean": "model with every edge at its mean",
}


@torch.no_grad()
def clean_metric(model: TransformerBridge, pairs: Forced[PromptPairs], metric: Metric, batch_size: int) -> float:
    """The metric's mean over the clean prompts."""
    total = 0.0
    for _, chunk in chunks(pairs, batch_size):
        hooks = end_hooks(model, chunk, clean=True)
        logits = run(model, chunk.clean, chunk.places, hooks).float()
        total += measured(metric, logits, chunk).double().sum().item()
    return total / len(pairs)


def require_graph(model: TransformerBridge, circuit: Circuit) -> Graph:
    """The model's graph, if the circuit is one of its."""
    graph = Graph.of(model)
    if not circuit.same_graph(graph):
        raise MansuError("circuit: its writers and readers are not this model's; discover one on this model")
    wrong = circuit.mask & ~graph.exists
    if wrong.any():
        raise MansuError(
            f"circuit: edge {' -> '.join(graph.named(wrong)[0])} does not exist in this model, whose blocks are parallel; "
            "discover one on this model"
        )
    return graph


def _without(circuit: Circuit, part: tuple[int, int] | str | None) -> Float[Tensor, "writer reader"]:
    """The circuit's mask without an edge, or without a writer and the readers of that writer alone.

    Keys and values that it shares with other heads stay.
    """
    mask = circuit.mask.float()
    if isinstance(part, tuple):
        mask[part] = 0
    elif part is not None:
        row, feeds = circuit.writers.index(part), circuit.feeds()
        mask[row] = 0
        mask[:, feeds[:, row] & (feeds.sum(1) == 1)] = 0
    return mask
