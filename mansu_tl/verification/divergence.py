"""CAD, Circuit Attribution Divergence: is the mechanism gone, or only its output?

For a circuit C and its edge scores a (original model) and b (another model), same pairs and metric:

    CAD = 1 - <a, b> / <a, a>        0 = intact, 1 = gone, above 1 = inverted

with the mass loss 1 - sum|b| / sum|a| beside it, and an interval from resampling facts. Our definition: it is stable
where a cosine is not (b may be close to zero). By completeness it follows the answer, so it is about behaviour: an output
suppressor that was trained in brings it to 1. With near pairs, CAD by depth (`cad_by_depth`) says which of the two it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit, edge_attribution
from mansu_tl.circuit.graph import layer_of, reader_kind
from mansu_tl.data import PromptPairs
from mansu_tl.data.forced import Forced
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.results.intervals import fact_weights, middle
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.metrics import Metric, logit_difference, options_read, reads
from mansu_tl.verification.cad_by_depth import CadByDepth, DepthReader
from mansu_tl.verification.depth_verdict import DepthVerdict

_STEPS = 5


@dataclass(frozen=True)
class CircuitScores(Result):
    """Scores of a circuit's edges, pair by pair.

    Attributes:
        tensor: the score of each edge on each pair.
        writers: the edges' writers.
        readers: the edges' readers.
        groups: which pairs belong together when resampling (the same fact in several wordings).
        steps: EAP-IG steps they were taken with.
    """

    tensor: Float[Tensor, "pair edge"]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    groups: Int[Tensor, " pair"]
    steps: int = _STEPS

    def __repr__(self) -> str:
        pairs, edges = self.tensor.shape
        return f"CircuitScores({edges} edges on {pairs} pairs, {int(self.groups.max()) + 1} facts)"


@dataclass(frozen=True)
class Divergence(Result):
    """CAD of one model against the original.

    Attributes:
        value: 1 - <a, b> / <a, a>.
        interval: 95 % bootstrap interval over facts.
        mass_loss: 1 - sum|b| / sum|a|.
        mass_interval: its interval.
        original: a, mean over pairs.
        other: b, mean over pairs.
        writers: the edges' writers.
        readers: the edges' readers.
        label: what the other model is.
    """

    value: float
    interval: tuple[float, float]
    mass_loss: float
    mass_interval: tuple[float, float]
    original: Float[Tensor, " edge"]
    other: Float[Tensor, " edge"]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    label: str

    @property
    def edges(self) -> pd.DataFrame:
        """One row an edge: writer, reader, kind, layer, the scores before (`original`) and after (`other`)."""
        return pd.DataFrame(
            {
                "writer": self.writers,
                "reader": self.readers,
                "kind": [reader_kind(r) for r in self.readers],
                "writer_layer": [layer_of(w) for w in self.writers],
                "original": self.original.tolist(),
                "other": self.other.tolist(),
            }
        )

    def by_layer(self) -> pd.DataFrame:
        """CAD over the edges that start in each layer (-1 = the embedding), its share of <a, a>, and how many edges.

        The whole CAD is the mean of `cad`, weighted with `share`.
        """
        edges = self.edges
        layer = edges["writer_layer"]
        square = (edges["original"] ** 2).groupby(layer).sum()
        product = (edges["original"] * edges["other"]).groupby(layer).sum()
        counts = layer.value_counts()
        return pd.DataFrame({"cad": 1 - product / square, "share": square / square.sum(), "edges": counts})

    def to_dataframe(self) -> pd.DataFrame:
        """The edges."""
        return self.edges

    def __repr__(self) -> str:
        low, high = self.interval
        cad = f"CAD {self.value:.3f} [{low:.3f}, {high:.3f}]"
        return f"Divergence({self.label}: {cad}, mass loss {self.mass_loss:.3f})"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.edges, "scores before and after", "{:.4f}".format, rows=10),)


@dataclass(frozen=True)
class JudgedDivergence(Divergence):
    """CAD with what tells erasure from suppression.

    Attributes:
        by_depth: CAD by depth, on forget and on near pairs.
    """

    by_depth: CadByDepth

    @property
    def verdict(self) -> DepthVerdict:
        """Erased, suppressed, damaged, intact or undecided."""
        return self.by_depth.verdict()

    def __repr__(self) -> str:
        return f"{super().__repr__().removesuffix(')')}; {self.verdict})"

    def _tables(self) -> Sequence[Table]:
        return (*super()._tables(), *self.by_depth._tables())


@torch_defaults()
def circuit_scores(
    model: TransformerBridge,
    circuit: Circuit,
    pairs: PromptPairs,
    *,
    steps: int = _STEPS,
    metric: Metric = logit_difference,
    batch_size: int = 64,
    progress: bool = False,
) -> CircuitScores:
    """EAP-IG scores of the circuit's edges on every pair; reuse them to compare one original with many models."""
    scores = edge_attribution(
        model, pairs, steps=steps, metric=metric, per_pair=True, batch_size=batch_size, progress=progress
    )
    if scores.writers != circuit.writers or scores.readers != circuit.readers:
        raise MansuError("circuit: its writers and readers are not this model's; discover one on this model")
    assert scores.per_pair is not None
    rows, columns = circuit.mask.nonzero(as_tuple=True)
    return CircuitScores(
        scores.per_pair[:, rows, columns],
        tuple(circuit.writers[i] for i in rows.tolist()),
        tuple(circuit.readers[i] for i in columns.tolist()),
        pairs.fact_numbers(),
        steps,
    )


@torch_defaults()
def circuit_divergence(
    original: TransformerBridge | CircuitScores,
    other: TransformerBridge | CircuitScores,
    circuit: Circuit,
    pairs: PromptPairs,
    *,
    near: PromptPairs | None = None,
    label: str = "edited",
    steps: int | None = None,
    metric: Metric = logit_difference,
    seed: int = 0,
    progress: bool = False,
) -> Divergence:
    """CAD between two models on a circuit.

    Args:
        original: the model before, or its `circuit_scores`.
        other: the model after, or its `circuit_scores`.
        near: facts of the same kind that were to stay: CAD by depth is taken too, from both models, and a `JudgedDivergence`
            given. To compare many models with one original, keep a `DepthReader`.
        label: what `other` is, for tables and figures.
        steps: EAP-IG steps; those of the scores that are given, 5 where none are.
        seed: of the bootstrap.
        progress: show progress bars.

    Raises:
        MansuError: the circuit has no edge, all its scores on the original are zero, scores of other steps, or near pairs
            beside scores.

    Example:
        >>> model, task = mtl.load("pocket"), mtl.load_task("pocket")
        >>> pairs, never = task.forget_pairs[:16], mtl.load("pocket-never")
        >>> circuit = mtl.discover_circuit(model, pairs, faithfulness=0.8)
        >>> round(mtl.circuit_divergence(model, never, circuit, pairs).value, 1)
        1.0
    """
    if circuit.n_edges == 0:
        raise MansuError("circuit: it has no edge, so nothing can diverge; lower the threshold or the target")
    if near is not None and not (isinstance(original, TransformerBridge) and isinstance(other, TransformerBridge)):
        raise MansuError("CAD: near pairs beside circuit_scores; give both models, so that they can be read by depth")
    given = {m.steps for m in (original, other) if isinstance(m, CircuitScores)} | ({steps} if steps else set())
    if len(given) > 1:
        raise MansuError(
            f"CAD: scores with {' and with '.join(str(n) for n in sorted(given))} EAP-IG steps cannot be compared; take "
            "both with the same steps"
        )
    options: dict[str, Any] = {"steps": given.pop() if given else _STEPS, "metric": metric, "progress": progress}
    found = [
        m if isinstance(m, CircuitScores) else circuit_scores(m, circuit, pairs, **options) for m in (original, other)
    ]
    mean_a, mean_b = (scores.tensor.double().mean(0) for scores in found)
    if not mean_a.abs().sum() > 0:
        raise MansuError(
            "circuit: all its scores on the original are zero; use pairs on which the model shows the knowledge"
        )
    weights = fact_weights(found[0].groups, seed)
    a, b = (weights @ scores.tensor.double() for scores in found)
    divergence = Divergence(
        value=(1 - (mean_a @ mean_b) / (mean_a @ mean_a)).item(),
        interval=middle(1 - (a * b).sum(1) / a.square().sum(1)),
        mass_loss=(1 - mean_b.abs().sum() / mean_a.abs().sum()).item(),
        mass_interval=middle(1 - b.abs().sum(1) / a.abs().sum(1)),
        original=mean_a.float(),
        other=mean_b.float(),
        writers=found[0].writers,
        readers=found[0].readers,
        label=label,
    )
    if near is None:
        return divergence
    assert isinstance(original, TransformerBridge)
    assert isinstance(other, TransformerBridge)
    reader = DepthReader(original, pairs, near, circuit=circuit, steps=options["steps"], metric=metric)
    return JudgedDivergence(**vars(divergence), by_depth=reader.read(other, label=label))


def output_suppressor(metric: Metric, penalty: float) -> Metric:
    """The metric as seen behind an output filter that lowers the answer's logit by `penalty` nats.

    The control for CAD: behaviour changes as much as one likes, the circuit not at all. Where options have several tokens,
    it is the log-probability of each of the answer's tokens that is lowered.
    """

    @reads(options_read(metric))
    def suppressed(
        logits: Float[Tensor, "place vocab"], pairs: PromptPairs | Forced[PromptPairs]
    ) -> Float[Tensor, " pair"]:
        if isinstance(pairs, Forced):
            return metric(logits, replace(pairs, lowered=pairs.lowered + penalty))
        lowered = torch.zeros_like(logits).scatter(1, pairs.answers[:, None], penalty)
        return metric(logits - lowered, pairs)

    return suppressed
