"""What the explorer shows, computed when it is first asked for and then kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit, EdgeScores, FaithfulnessCurve, edge_attribution, faithfulness_curve
from mansu_tl.data import Task
from mansu_tl.data.forced import forced
from mansu_tl.data.text import pad
from mansu_tl.errors import MansuError
from mansu_tl.explorer.selection import Item, Part, item_name, part_mask, parts_of
from mansu_tl.models import Anatomy, home, linear_weights, orient, parameters
from mansu_tl.quantization import quantize
from mansu_tl.runs.ablation import Ablation, ablation
from mansu_tl.runs.metrics import (
    asked_logits,
    last_logits,
    logit_difference,
    measured,
    metric_name,
    options_read,
)
from mansu_tl.runs.passes import chunks, forward, keep
from mansu_tl.unlearning import Edit
from mansu_tl.verification import CircuitScores, Divergence, circuit_divergence

Stage = tuple[str, str]  # method and quantizer; "" = not edited, not quantized
ORIGINAL: Stage = ("", "")
_KEPT_MODELS = 4
_CONTROL_SEEDS = 3
_PAIRS = 256  # asked at one time
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _once(method: _Method) -> _Method:
    """Keep what a method of `Results` returns, for each set of arguments."""

    @wraps(method)
    def kept(self: Results, *args: Any) -> Any:
        key = (method.__name__, *args)
        if key not in self._kept:
            self._kept[key] = method(self, *args)
        return self._kept[key]

    return cast(_Method, kept)


@dataclass(frozen=True)
class Answers:
    """How one model answers the clean prompts: probability of the answer, its logit minus that of the corrupt prompt's
    answer (nats; of several tokens, the difference of log-probabilities), and the most likely next token, or where the
    answer has several as many as greedy decoding writes."""

    probability: Float[Tensor, " pair"]
    difference: Float[Tensor, " pair"]
    likeliest: tuple[str, ...]


class Results:
    """Results on one model and its edits, each computed once.

    Attributes:
        model: before any edit.
        pairs: the forget pairs, which everything is measured on.
        edits: by name.
        titles: how each edit is written.
        ranking: the scores that circuits are selected by.
        sizes: of the circuits that can be chosen, in edges selected, ascending; each has an edge to draw.
        own: a circuit that stands at its size in place of the strongest edges.
        known: CAD of stages on `own` over all pairs, computed before.
    """

    def __init__(
        self,
        model: TransformerBridge,
        task: Task,
        edits: Mapping[str, Edit],
        titles: Mapping[str, str],
        quantizers: Sequence[str],
        sizes: Sequence[int],
        ranking: EdgeScores,
        steps: int,
        own: tuple[int, Circuit] | None = None,
        known: Mapping[Stage, Divergence] | None = None,
    ) -> None:
        self.model, self.pairs, self.edits, self.titles = model, task.forget_pairs, dict(edits), dict(titles)
        self.quantizers, self.sizes, self.ranking = tuple(quantizers), tuple(sizes), ranking
        self.own, self.known = own, dict(known or {})
        self._cmap, self._linear, self._weights = Anatomy.of(model), linear_weights(model), parameters(model)
        self._calibration, self._steps = task.retain_text, steps
        self._kept: dict[tuple[Any, ...], Any] = {}
        self._models: dict[Stage, TransformerBridge] = {}
        kind = ranking.method, ranking.rule, ranking.steps, ranking.metric
        self._ranked_alike = kind == ("eap-ig", "midpoint", steps, metric_name(logit_difference))

    def title(self, stage: Stage) -> str:
        """A stage as it is written."""
        if stage == ORIGINAL:
            return "original"
        return ", ".join(part for part in (self.titles[stage[0]], stage[1]) if part)

    @_once
    def scores(self, stage: Stage) -> Float[Tensor, "pair writer reader"]:
        """EAP-IG scores of every edge on every pair, in one model."""
        scored = edge_attribution(self.model_of(stage), self.pairs, steps=self._steps, per_pair=True)
        assert scored.per_pair is not None
        return scored.per_pair

    def circuit(self, size: int) -> Circuit:
        """The circuit of that many edges of largest |score|; or the given one, where that is its size."""
        if size not in self.sizes:
            raise MansuError(f"explorer: size {size}; choose one of {', '.join(map(str, self.sizes))}")
        if self.own is not None and size == self.own[0]:
            return self.own[1]
        return self._top(size)

    @_once
    def _top(self, size: int) -> Circuit:
        return Circuit.top(self.ranking, size)

    def faithfulness(self, size: int) -> float:
        """Faithfulness of the circuit of that size: the given circuit's own, else the curve's."""
        if self.own is not None and size == self.own[0] and self.own[1].faithfulness == self.own[1].faithfulness:
            return self.own[1].faithfulness
        self.circuit(size)  # refuses one that is not there
        curve = self.curve()
        return float(curve.faithfulness[curve.sizes.index(size)])

    @_once
    def curve(self) -> FaithfulnessCurve:
        """Faithfulness of all sizes in the original, every other edge carrying its corrupt value."""
        return faithfulness_curve(self.model, self.ranking, self.pairs, self.sizes, control_seeds=_CONTROL_SEEDS)

    @_once
    def divergence(self, stage: Stage, size: int, pair: int | None) -> Divergence:
        """CAD of one model against the original on the circuit of that size, over all pairs or on one."""
        if pair is None and self.own is not None and size == self.own[0] and stage in self.known:
            return self.known[stage]
        circuit, pairs = self.circuit(size), self.pairs if pair is None else self.pairs[[pair]]
        before, after = (self._of_circuit(s, circuit, pair) for s in (ORIGINAL, stage))
        return circuit_divergence(before, after, circuit, pairs, label=self.title(stage))

    @_once
    def edge_scores(self, stage: Stage, size: int, pair: int | None) -> Float[Tensor, " edge"]:
        """Scores of the circuit's edges in the order of `Circuit.edges`, mean over all pairs or on one."""
        edges = self.circuit(size).edges
        if pair is None and stage != ORIGINAL:
            found = self.divergence(stage, size, None)
            values = dict(zip(zip(found.writers, found.readers, strict=True), found.other.tolist(), strict=True))
            return torch.tensor([values[edge] for edge in edges])
        if pair is not None:
            table = self.scores(stage)[pair]
        else:
            table = self.ranking.tensor if self._ranked_alike else self.scores(ORIGINAL).mean(0)
        return torch.stack([table[self.ranking.at(*edge)] for edge in edges])

    def pair_circuit(self, size: int, pair: int) -> Circuit:
        """The circuit of that size, carrying the scores of one pair."""
        return replace(self.circuit(size), scores=self.scores(ORIGINAL)[pair], faithfulness=float("nan"))

    @_once
    def answers(self, stage: Stage) -> Answers:
        """How a model answers."""
        model = self.model_of(stage)
        probabilities, differences = [], []
        for _, asked in chunks(forced(self.pairs.to(home(model)), options_read(logit_difference)), _PAIRS):
            logits = asked_logits(model, asked.clean, asked.places)
            probabilities.append(asked.log_probs(logits)[:, 0].exp().cpu())
            differences.append(measured(logit_difference, logits, asked).cpu())
        return Answers(torch.cat(probabilities), torch.cat(differences), self._said(model))

    def _said(self, model: TransformerBridge) -> tuple[str, ...]:
        """What greedy decoding writes after every clean prompt, as many tokens as the answer has."""
        counts = self.pairs.option_lengths[:, 0].tolist()
        prompts = [
            row[:length] for row, length in zip(self.pairs.clean.tolist(), self.pairs.lengths.tolist(), strict=True)
        ]
        said: list[list[int]] = [[] for _ in prompts]
        for step in range(max(counts)):
            going = [i for i, count in enumerate(counts) if count > step]
            tokens, lengths = pad([[*prompts[i], *said[i]] for i in going], 0)
            best = last_logits(model, tokens, lengths).argmax(-1).tolist()
            for i, token in zip(going, best, strict=True):
                said[i].append(token)
        return tuple(self.model.tokenizer.decode(tokens) for tokens in said)

    def pattern(self, stage: Stage, pair: int, head: str) -> Float[Tensor, "query key"]:
        """What a head attends to in a pair's clean prompt."""
        layer, _, index = head.removeprefix("L").partition("H")
        return self._patterns(stage, pair)[int(layer)][int(index)]

    def tokens(self, pair: int, corrupt: bool = False) -> list[str]:
        """A pair's prompt, token by token, without the spaces around them."""
        row = (self.pairs.corrupt if corrupt else self.pairs.clean)[pair, : int(self.pairs.lengths[pair])]
        tokens = [token.strip() or token for token in map(self.token, row.tolist())]
        corruption = self.pairs.corruption
        if not corrupt or corruption is None:
            return tokens
        changed = self.pairs.changed[pair].tolist()
        return [f"[{corruption.kind}]" if changed[i] else token for i, token in enumerate(tokens)]

    def asked(self, pair: int) -> tuple[str, str]:
        """The answer to a pair's clean prompt, and that to its corrupt one."""
        answer, rival, *_ = self.pairs[[pair]].texts()[0]
        return self.model.tokenizer.decode(answer).strip(), self.model.tokenizer.decode(rival).strip()

    def token(self, i: int) -> str:
        """One token, with the spaces that belong to it."""
        return self.model.tokenizer.decode([i])

    def label(self, pair: int) -> str:
        """A pair's name, or its number."""
        return self.pairs.labels[pair] if self.pairs.labels else f"pair {pair}"

    def matrix(self, method: str, name: str) -> Float[Tensor, "out in"]:
        """A matrix of the original ("") or of an edited model, as the quantizer sees it."""
        value = self._weights[name].detach().cpu()
        if method and name in self.edits[method].indices:
            edit = self.edits[method]
            value = value.clone()
            value.view(-1)[edit.indices[name]] = edit.new[name].to(value)
        return orient(value, self._linear[name])

    def parts(self, item: Item) -> tuple[Part, ...]:
        """The weights behind an edge or node; none for the embedding and the logits."""
        return parts_of(item, self._cmap, self._linear)

    def part(self, name: str) -> Part:
        """The weights of that name.

        Raises:
            MansuError: there are none.
        """
        if name not in (known := self._parts()):
            raise MansuError(f"explorer: no weights are called {name!r}; see parts()")
        return known[name]

    @_once
    def _parts(self) -> dict[str, Part]:
        """All weights that quantization touches, by name."""
        return {part.name: part for writer in self.ranking.writers for part in self.parts(writer)}

    def require_item(self, item: Item) -> None:
        """Refuse an edge or node that this model does not have.

        Raises:
            MansuError: it has none such.
        """
        names = self.ranking
        if isinstance(item, tuple):
            writer, reader = item
            if writer not in names.writers or reader not in names.readers:
                raise MansuError(f"explorer: no edge {item_name(item)} in this model; see items()")
            if not names.exists[names.writers.index(writer), names.readers.index(reader)]:
                raise MansuError(f"explorer: edge {item_name(item)} runs backwards; see items()")
        elif item not in (*names.writers, "logits"):
            raise MansuError(f"explorer: no node {item!r} in this model; see items()")

    def held(self, part: Part) -> Bool[Tensor, "out in"]:
        """Which weights of its matrix, as the quantizer sees it, belong to a part."""
        name = part.piece.parameter
        return orient(part_mask(part, tuple(self._weights[name].shape)), self._linear[name])

    def edited(self, method: str, name: str) -> Bool[Tensor, "out in"]:
        """Which weights of a matrix, as the quantizer sees it, a method has edited."""
        mask = torch.zeros(self._weights[name].shape, dtype=torch.bool)
        if name in self.edits[method].indices:
            mask.view(-1)[self.edits[method].indices[name]] = True
        return orient(mask, self._linear[name])

    def _of_circuit(self, stage: Stage, circuit: Circuit, pair: int | None) -> CircuitScores:
        rows, columns = circuit.mask.nonzero(as_tuple=True)
        chosen = self.scores(stage)[:, rows, columns]
        groups = self.pairs.fact_numbers()
        if pair is not None:
            chosen, groups = chosen[[pair]], torch.zeros(1, dtype=torch.long)
        writers = tuple(circuit.writers[i] for i in rows.tolist())
        return CircuitScores(chosen, writers, tuple(circuit.readers[i] for i in columns.tolist()), groups)

    @_once
    def mean_ablation(self, stage: Stage) -> Ablation:
        """What every writer carries on average over the clean prompts."""
        return ablation(self.model_of(stage), "mean", reference=self.pairs)

    @_once
    @torch.no_grad()
    def _patterns(self, stage: Stage, pair: int) -> list[Tensor]:
        model = self.model_of(stage)
        kept: dict[str, Tensor] = {}
        hooks = self._cmap.hooks("pattern")
        tokens = self.pairs.clean[[pair], : int(self.pairs.lengths[pair])].to(home(model))
        forward(model, tokens, [(hook, keep(kept, key)) for key, hook in hooks.items()])
        return [kept[key][0].float().cpu() for key in hooks]

    def model_of(self, stage: Stage) -> TransformerBridge:
        """The model of a stage; the last few are kept, since an edit of a large one takes time."""
        if stage == ORIGINAL:
            return self.model
        if stage not in self._models:
            method, quantizer = stage
            if quantizer:
                self._models[stage] = quantize(self.model_of((method, "")), quantizer, self._calibration)
            else:
                self._models[stage] = self.edits[method].apply(self.model)
            while len(self._models) > _KEPT_MODELS:
                del self._models[next(iter(self._models))]
        return self._models[stage]
