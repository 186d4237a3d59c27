"""CAD by depth: what another model's streams still say to the original's read-out, layer by layer.

With dh the clean minus the corrupt residual stream at layer l, and G_l the integrated gradient of the *original's* metric
there (EAP-IG's path, arXiv 2403.17806), the evidence at l is <dh_l, G_l>, summed over positions, and

    CAD_l = 1 - <dh_l(other), G_l> / <dh_l(original), G_l>

which is 0 where the knowledge still stands, 1 where it is gone and above 1 where it is inverted. The same edge by edge on a
circuit: what a writer writes in the other model, read by the original's gradient at the edge's reader. The total-derivative
CAD of `divergence` follows the answer: an edited model's scores sum to its own change of the metric, so once that is gone
they are gone everywhere. Here only the other model's states count, as the original reads them. It needs a shared basis: a
model that was trained from elsewhere has its streams turned, and no number here speaks of it. Our definitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit
from mansu_tl.circuit.attribution import EdgeReader
from mansu_tl.circuit.evaluation import require_graph
from mansu_tl.data import PromptPairs
from mansu_tl.data.forced import Forced
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, home, require_ready
from mansu_tl.patching.reading import read_layer, subject_share
from mansu_tl.results.intervals import fact_weights, middle
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.ends import end_hooks
from mansu_tl.runs.metrics import Metric, logit_difference, options_read
from mansu_tl.runs.passes import Hook, chunks, keep, prepared, run
from mansu_tl.runs.points import Path, between
from mansu_tl.runs.resume import grafted, record_base
from mansu_tl.runs.streams import require_one_shape, stream_hooks
from mansu_tl.verification.depth_verdict import DepthBounds, DepthVerdict, depth_verdict

# The numbers behind a verdict, as tables call them.
CAD, SPECIFICITY, OPPOSITION = "CAD by depth", "specificity by depth", "added opposition"
_LEAST = 1e-6  # nats: less evidence than this in the original cannot be divided by


class NoEvidenceError(MansuError):
    """The original shows no knowledge on some pairs, so nothing can be gone."""


@dataclass(frozen=True)
class CadByDepth(Result):
    """What is left of the original's evidence at every layer of another model, on forget pairs and on near ones.

    Attributes:
        label: what the other model is.
        layers: "embed" enters block 0, "L0", "L1", ... leave a block.
        writers: "embed", then "A0", "MLP0", "A1", ...: the attention and the MLP of every layer.
        read: the index in `layers` of the last stream before the layer that moves the fact off the subject's tokens.
        original, other: evidence by layer and forget pair, in nats.
        near_original, near_other: by layer and near pair.
        terms_original, terms_other: what each writer puts into the read-out on each forget pair, in nats.
        grafted: whether a forget answer is chosen when the original's layers behind this one are put on the other's stream:
            behind the last, what the other model itself chooses.
        groups, near_groups: the fact behind each pair.
        edges: writer and reader of each edge of the circuit, where one was given.
        edges_original, edges_other: evidence by forget pair and edge, in nats.
    """

    label: str
    layers: tuple[str, ...]
    writers: tuple[str, ...]
    read: int
    original: Float[Tensor, "layer pair"]
    other: Float[Tensor, "layer pair"]
    near_original: Float[Tensor, "layer near"]
    near_other: Float[Tensor, "layer near"]
    terms_original: Float[Tensor, "writer pair"]
    terms_other: Float[Tensor, "writer pair"]
    grafted: Bool[Tensor, "layer pair"]
    groups: Int[Tensor, " pair"]
    near_groups: Int[Tensor, " near"]
    edges: tuple[tuple[str, str], ...]
    edges_original: Float[Tensor, "pair edge"]
    edges_other: Float[Tensor, "pair edge"]

    @property
    def judged(self) -> int:
        """The index in `layers` of the stream that the verdict is about: before the fact is read, but not in front of half
        depth, since where a name is moved early the fact is looked up behind; and before the last block."""
        return min(max(self.read, len(self.layers) // 2), len(self.layers) - 2)

    @property
    def cad(self) -> Float[Tensor, " layer"]:
        """CAD at every layer, on forget pairs; NaN where the original has no evidence."""
        return _cad(self.original, self.other)

    @property
    def near_cad(self) -> Float[Tensor, " layer"]:
        """CAD at every layer, on near pairs."""
        return _cad(self.near_original, self.near_other)

    @property
    def specificity(self) -> Float[Tensor, " layer"]:
        """CAD on forget pairs minus CAD on near pairs."""
        return self.cad - self.near_cad

    @property
    def edge_cad(self) -> float:
        """CAD over the circuit's edges, 1 - <a, b> / <a, a> of their mean evidence; NaN without a circuit."""
        return float(_edge_cad(*(values.double().mean(0) for values in (self.edges_original, self.edges_other))))

    @property
    def edge_interval(self) -> tuple[float, float]:
        """Its 95 % bootstrap interval over facts."""
        weights = fact_weights(self.groups)
        return middle(_edge_cad(*(weights @ values.double() for values in (self.edges_original, self.edges_other))))

    @property
    def answered(self) -> float:
        """Forget answers that the other model chooses, as a share of those that the original does."""
        right = self.grafted.double().mean(1)
        return float(right[-1] / right[0])

    @property
    def facts_gone(self) -> float:
        """Share of the forget facts of which at least half the evidence is gone at the layer that is judged."""
        facts = torch.zeros(int(self.groups.max()) + 1, 2, dtype=torch.float64)
        both = torch.stack([self.original[self.judged], self.other[self.judged]], 1).double()
        own, left = facts.index_add_(0, self.groups, both).T
        return float((left < 0.5 * own).double().mean())

    @property
    def decisive(self) -> dict[str, tuple[float, float, float]]:
        """What a verdict is made of, each with its 95 % interval over facts: CAD and specificity at the judged layer, on the
        facts that are no longer answered (all, where none was lost), and added opposition."""
        lost = self.grafted[0] & ~self.grafted[-1]
        if not lost.any():
            lost = torch.ones_like(lost)
        at, groups = self.judged, self.groups[lost].unique(return_inverse=True)[1]
        own, other = self.original[:, lost], self.other[:, lost]
        forget, near = _draws(own, other, groups)[at], _draws(self.near_original, self.near_other, self.near_groups)[at]
        cad = float(_cad(own, other)[at])
        return {
            CAD: (cad, *middle(forget)),
            SPECIFICITY: (cad - float(self.near_cad[at]), *middle(forget - near)),
            OPPOSITION: (self.opposition, *self.opposition_interval),
        }

    def verdict(self, bounds: DepthBounds | None = None) -> DepthVerdict:
        """Erased, suppressed, damaged or intact; see `depth_verdict`."""
        intervals = [ends for _, *ends in self.decisive.values()]
        cad, specificity, opposition = ((low, high) for low, high in intervals)
        layer = self.layers[self.judged]
        return depth_verdict(layer, cad, specificity, opposition, self.answered, bounds or DepthBounds())

    @property
    def opposition(self) -> float:
        """Negative terms that the original did not have, as a share of its positive ones: writers that now speak against."""
        return float(_opposition(*(terms.double().mean(1) for terms in (self.terms_original, self.terms_other))))

    @property
    def opposition_interval(self) -> tuple[float, float]:
        """Its 95 % bootstrap interval over facts."""
        weights = fact_weights(self.groups)
        return middle(
            _opposition(*((terms.double() @ weights.T).T for terms in (self.terms_original, self.terms_other)))
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row a layer: CAD on forget and near pairs and their difference, each with its 95 % interval over facts, the
        forget answers chosen, in percent, when the original's layers behind this one are put on the other's stream, and
        whether the layer that reads the fact is still to come."""
        forget, near = (
            _draws(self.original, self.other, self.groups),
            _draws(self.near_original, self.near_other, self.near_groups),
        )
        rows = []
        for i, layer in enumerate(self.layers):
            row: dict[str, object] = {"label": self.label, "layer": layer}
            for name, value, draws in (
                ("cad", self.cad[i], forget[i]),
                ("near_cad", self.near_cad[i], near[i]),
                ("specificity", self.specificity[i], forget[i] - near[i]),
            ):
                low, high = middle(draws)
                row |= {name: float(value), f"{name}_low": low, f"{name}_high": high}
            row["grafted_percent"] = 100 * self.grafted[i].double().mean().item()
            row["before_reading"] = i <= self.read
            rows.append(row)
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        at = self.judged
        return (
            f"CadByDepth({self.label}, {self.verdict().name}: at {self.layers[at]} CAD "
            f"{self.cad[at]:.2f}, near {self.near_cad[at]:.2f}; at {self.layers[-1]} {self.cad[-1]:.2f}, near "
            f"{self.near_cad[-1]:.2f}; added opposition {100 * self.opposition:.0f} %)"
        )

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "by layer", "{:.2f}".format, rows=40),)


@dataclass(frozen=True)
class _Part:
    """One batch of pairs and the original's gradients on it."""

    pairs: Forced[PromptPairs]
    slopes: dict[str, Tensor]


class DepthReader:
    """The original's gradients on forget and near pairs, taken once; every other model is two forward passes.

    Args:
        original: the model before the edit.
        pairs: facts that were to be forgotten.
        near: facts of the same kind that were to stay.
        circuit: edges of the original to be read too.
        steps: points of EAP-IG's path.
        metric: what the gradients are of.

    Raises:
        MansuError: pairs that do not fit the model, or that it shows no knowledge of.

    Example:
        >>> model, task = mtl.load("pocket"), mtl.load_task("pocket")
        >>> reader = mtl.verification.DepthReader(model, task.forget_pairs[:8], task.retain_pairs[:8])
        >>> reader.read(model).cad.abs().max().item() < 1e-5
        True
    """

    @torch_defaults()
    def __init__(
        self,
        original: TransformerBridge,
        pairs: PromptPairs,
        near: PromptPairs,
        *,
        circuit: Circuit | None = None,
        steps: int = 5,
        metric: Metric = logit_difference,
        batch_size: int = 64,
    ) -> None:
        self.model, self.pairs, self.near, self.metric, self.batch_size = original, pairs, near, metric, batch_size
        anatomy = Anatomy.of(original)
        self.streams, self.layers = anatomy.hooks("stream"), tuple(stream_hooks(original))
        roles = [
            (f"{short}{i}", f"{role}{i}")
            for i in anatomy.layers
            for short, role in (("A", "attn_out"), ("MLP", "mlp_out"))
        ]
        hooks = anatomy.hooks("attn_out", "mlp_out")
        self.writers = {"embed": self.streams["stream0"], **{name: hooks[key] for name, key in roles}}
        self.circuit, self.edge_names = circuit, tuple[tuple[str, str], ...]()
        if circuit is not None:
            require_graph(original, circuit)
            self.edges = EdgeReader(original, pairs, steps=steps, metric=metric, batch_size=batch_size)
            self.edge_names = tuple(
                (circuit.writers[i], circuit.readers[j]) for i, j in circuit.mask.nonzero().tolist()
            )
        self.own_edges = self._on_circuit(original)
        self.read_at = read_layer(subject_share(original, pairs, metric=metric, batch_size=batch_size))
        self.parts = [self._parts(each, steps) for each in (pairs, near)]
        self.own = [self._evidence(original, parts) for parts in self.parts]
        for name, (evidence, _) in zip(("forget", "near"), self.own, strict=True):
            whole = float(evidence[0].sum())
            if whole <= _LEAST:
                raise NoEvidenceError(
                    f"CAD by depth: the original's evidence on the {name} pairs is {whole:.3g} nats; use pairs on which it "
                    "shows the knowledge"
                )

    def _on_circuit(self, model: TransformerBridge) -> Float[Tensor, "pair edge"]:
        """The evidence on the circuit's edges; none without a circuit."""
        return torch.zeros(len(self.pairs), 0) if self.circuit is None else self.edges.read(model)[:, self.circuit.mask]

    def _parts(self, pairs: PromptPairs, steps: int) -> list[_Part]:
        out = []
        for _, chunk in chunks(prepared(self.model, pairs, options_read(self.metric)), self.batch_size):
            path = Path(self.model, chunk, self.metric, at_ends={}, slopes=self.streams)
            out.append(_Part(chunk, path.mean_gradients(between(steps))))
        return out

    @torch.no_grad()
    def _evidence(
        self, model: TransformerBridge, parts: Sequence[_Part]
    ) -> tuple[Float[Tensor, "layer pair"], Float[Tensor, "writer pair"]]:
        """<dh, G> at every layer, and every writer's share of it in front of the final norm."""
        found: list[tuple[Tensor, Tensor]] = []
        last = list(self.streams)[-1]
        for part in parts:
            ends = [self._passed(model, part.pairs, clean=clean) for clean in (True, False)]

            def along(key: str, slope: str, part: _Part = part, ends: list[dict[str, Tensor]] = ends) -> Tensor:
                change = ends[0][key].float() - ends[1][key].float()
                by_row = (change * part.slopes[slope].to(change.device)).flatten(1).sum(1)
                return part.pairs.by_pair(by_row.to(part.pairs.clean.device)).double().cpu()

            found.append(
                (
                    torch.stack([along(key, key) for key in self.streams]),
                    torch.stack([along(f"writer {name}", last) for name in self.writers]),
                )
            )
        evidence, terms = (torch.cat(each, 1) for each in zip(*found, strict=True))
        return evidence, terms

    def _passed(self, model: TransformerBridge, pairs: Forced[PromptPairs], *, clean: bool) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        hooks: list[Hook] = end_hooks(model, pairs, clean=clean)
        hooks += [(hook, keep(kept, key)) for key, hook in self.streams.items()]
        hooks += [(hook, keep(kept, f"writer {name}")) for name, hook in self.writers.items()]
        run(model, (pairs.clean if clean else pairs.corrupt).to(home(model)), pairs.places, hooks)
        return kept

    @torch_defaults()
    def read(self, other: TransformerBridge, *, label: str = "edited") -> CadByDepth:
        """CAD by depth of another model of the same shape and basis.

        Raises:
            MansuError: a model of another shape, or one with hooks left on it.
        """
        require_one_shape("CAD by depth", self.model, other=other)
        require_ready(other, self.pairs.clean)
        (evidence, terms), (near, _) = (self._evidence(other, parts) for parts in self.parts)
        (own, own_terms), (own_near, _) = self.own
        values = {"original": own, "other": evidence, "near_original": own_near, "near_other": near}
        return CadByDepth(
            label=label,
            layers=self.layers,
            writers=tuple(self.writers),
            read=self.read_at,
            **{name: value.float() for name, value in values.items()},
            terms_original=own_terms.float(),
            terms_other=terms.float(),
            grafted=self._grafted(other),
            groups=self.pairs.fact_numbers(),
            near_groups=self.near.fact_numbers(),
            edges=self.edge_names,
            edges_original=self.own_edges,
            edges_other=self._on_circuit(other),
        )

    @torch.no_grad()
    def _grafted(self, other: TransformerBridge) -> Bool[Tensor, "layer pair"]:
        """Which answers the original chooses from the other model's streams, with all of its own layers behind each."""
        out = []
        for _, chunk in chunks(prepared(self.model, self.pairs, None), self.batch_size):
            streams = self._passed(other, chunk, clean=True)
            base = record_base(self.model, chunk.clean.to(home(self.model)), chunk.places, ())
            logits = [grafted(self.model, base, streams[key], i) for i, key in enumerate(self.streams)]
            out.append(torch.stack([(_margin(each, chunk) > 0).cpu() for each in logits]))
        return torch.cat(out, 1)


def _margin(logits: Float[Tensor, "place vocab"], pairs: Forced[PromptPairs]) -> Float[Tensor, " pair"]:
    """The answer's score less the best other option's."""
    told = pairs.told
    scores = told.per_token(logits) if isinstance(told, Forced) else logits.gather(1, told.choices)
    return scores[:, 0] - scores[:, 1:].max(1).values


def _cad(original: Tensor, other: Tensor) -> Float[Tensor, " layer"]:
    whole = original.double().sum(1)
    return torch.where(whole > _LEAST, 1 - other.double().sum(1) / whole, torch.nan).float()


def _draws(original: Tensor, other: Tensor, groups: Int[Tensor, " pair"]) -> Float[Tensor, "layer draw"]:
    weights = fact_weights(groups)
    whole = original.double() @ weights.T
    return torch.where(whole > _LEAST, 1 - (other.double() @ weights.T) / whole, torch.nan)


def _edge_cad(original: Float[Tensor, "*draw edge"], other: Float[Tensor, "*draw edge"]) -> Float[Tensor, "*draw"]:
    return 1 - (original * other).sum(-1) / original.square().sum(-1)


def _opposition(
    original: Float[Tensor, "*draw writer"], other: Float[Tensor, "*draw writer"]
) -> Float[Tensor, "*draw"]:
    added = ((-other).clamp_min(0) - (-original).clamp_min(0)).clamp_min(0)
    return added.sum(-1) / original.clamp_min(0).sum(-1)
