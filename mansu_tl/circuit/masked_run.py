"""One run of the clean prompts under many masks, every reader's input rebuilt from the ablated run and what was written.

The work is handed to the model's own modules as a batch of what is left to do (see `sharing`); the model's own stream has
one row and is thrown away.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit.sharing import LayerPlan, Plan, Reads
from mansu_tl.data import PromptPairs
from mansu_tl.data.forced import Forced
from mansu_tl.models import Anatomy, NormWeights, attention_weights, norm_weights
from mansu_tl.models.anatomy import UNEMBED
from mansu_tl.runs.ablation import Ablation
from mansu_tl.runs.ends import entering
from mansu_tl.runs.passes import Hook, Recording, forward, heads_last

# A sparse product takes this long for a live edge, a dense one for a writer, and for an edge of it, live or not (a writer's
# vectors read from memory; measured on CPUs).
_SPARSE_EDGE, _DENSE_WRITER, _DENSE_EDGE = 1.0, 0.8, 0.18


@dataclass
class AblatedRun:
    """The ablated run of some pairs, and the tokens that can differ from it."""

    model: TransformerBridge
    map: Anatomy
    pairs: Forced[PromptPairs]
    ablation: Ablation
    run: Recording = field(init=False)
    tokens: Int[Tensor, " token"] = field(init=False)
    last: Int[Tensor, " place"] = field(init=False)
    embed: Float[Tensor, "token d_model"] = field(init=False)
    projected: dict[int, list[Tensor]] = field(default_factory=dict)
    kept: dict[tuple[str, int, bool], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pairs = self.pairs
        self.run = self.ablation.activations(self.model, pairs)
        alive, places = pairs.real, pairs.places
        if self.ablation.kind == "corrupt":
            # In front of the first changed token both runs are the same, whatever edges are live.
            alive &= pairs.changed.cumsum(1) > 0
            alive[places.rows, places.positions] = True
        self.tokens = alive.flatten().nonzero()[:, 0]
        self.last = torch.searchsorted(self.tokens, places.rows * pairs.clean.shape[1] + places.positions)
        change = entering(self.model, pairs, clean=True) - self.run.value("stream", 0)
        self.embed = change.flatten(0, 1)[self.tokens]

    def at(self, role: str, layer: int, last: bool = False) -> Float[Tensor, "token d"]:
        """What had a role in a layer, at the tokens that count, or at the asked ones only."""
        key = (role, layer, last)
        if key not in self.kept:
            # At the tokens that count, positions are one axis behind the pairs'; heads are one axis with their numbers.
            value = self.run.value(role, layer).flatten(0, 1).flatten(1).to(self.embed.device)
            self.kept[key] = value[self.tokens[self.last] if last else self.tokens]
        return self.kept[key]

    def projections(self, layer: int) -> list[Float[Tensor, "place head d_head"]]:
        """q, k and v of the ablated run at every position."""
        if layer not in self.projected:
            weights, norm = attention_weights(self.model, layer), norm_weights(self.model, layer, "attn")
            x = normed(self.run.value("stream", layer).flatten(0, 1), norm)
            parts = ((weights.q, weights.q_bias), (weights.k, weights.k_bias), (weights.v, weights.v_bias))
            self.projected[layer] = [
                functional.linear(x.to(w.device), w.flatten(0, 1), None if b is None else b.flatten())
                .unflatten(-1, w.shape[:2])
                .to(self.embed.device)
                for w, b in parts
            ]
        return self.projected[layer]


class MaskedRun:
    """One run of the clean prompts under a group of masks."""

    def __init__(self, base: AblatedRun, work: Plan) -> None:
        self.base, self.plan, self.map, self.model = base, work, base.map, base.model
        self.place = base.pairs.clean.shape
        self.changes = base.embed.new_empty(work.n_slots, *base.embed.shape)
        if 1 in work.consumers:
            self.changes[work.consumers[1]] = base.embed

    def logits(self) -> Callable[[int], Float[Tensor, "place vocab"]]:
        """The logits at the asked positions, by mask."""
        hooks: list[Hook] = []
        for layer, work in enumerate(self.plan.layers):
            hooks += self._attention(layer, work) if work.rows else []
            hooks.append((self.map.hook("mlp_in", layer), self._mlp_in(layer, work)))
            hooks.append((self.map.hook("mlp_out", layer), self._mlp_out(layer, work)))
        hooks.append((UNEMBED, self._final))
        out_logits = forward(self.model, self.base.pairs.clean[:1], hooks)[0].float()
        parts = out_logits.unflatten(0, (len(self.plan.final), -1))
        return lambda mask: parts[self.plan.final_of[mask]]

    def _write(self, values: Sequence[int], make: Callable[..., Tensor], last: bool) -> None:
        """Put changes into every slot that holds their value; `make` can write where it is told."""
        slots = [self.plan.consumers[value] for value in values]
        at = _index([own[0] for own in slots])
        if last:
            self.changes[torch.tensor([own[:1] for own in slots], device=self.changes.device), self.base.last] = make()
        elif isinstance(at, slice):
            make(out=self.changes[at])
        else:
            self.changes[at] = make()
        copies = [(slot, own[0]) for own in slots for slot in own[1:]]
        if copies:
            to, of = torch.tensor(copies, device=self.changes.device).T
            self.changes[to] = self.changes[of]

    def _rebuilt(self, reads: Reads, role: str, layer: int, last: bool = False) -> Float[Tensor, "input token d_model"]:
        """The inputs of some readers of one mask, where the ablated ones have this role in this layer."""
        base, changes = self.base.at(role, layer, last), self.changes[reads.slots]
        if last:
            changes = changes[:, self.base.last]
        weights = torch.from_numpy(np.ascontiguousarray(reads.weights)).to(base.device, base.dtype)
        if not self.map.post_norms:
            return _summed(base, weights, changes)
        # Heads only add up before the post-norm of their layer.
        per_layer = self.map.n_heads + 1
        owner = np.where((reads.writers == 0) | (reads.writers % per_layer == 0), -1, (reads.writers - 1) // per_layer)
        plain = weights * torch.from_numpy(owner < 0).to(weights)
        out = _summed(base, plain, changes)
        for before in sorted(set(owner[owner >= 0].tolist())):
            inside = np.flatnonzero(owner == before)
            part = slice(int(inside[0]), int(inside[-1]) + 1)
            distinct, back = torch.unique(weights[:, part], dim=0, return_inverse=True)
            raw, norm = self.base.at("attn_raw", before, last), norm_weights(self.model, before, "attn_post")
            out += (normed(_summed(raw, distinct, changes[part]), norm) - normed(raw, norm))[back]
        return out

    def _attention(self, layer: int, work: LayerPlan) -> list[Hook]:
        anatomy, base = self.map, self.base
        counts = list(anatomy.heads_of.values())
        filled: list[Tensor] = []

        def begin(stream: Tensor, hook: object) -> Tensor:
            filled[:] = self._filled(layer, work)
            return stream.expand(work.rows * self.place[0], -1, -1)

        def one_row(stream: Tensor, hook: object) -> Tensor:
            return stream[:1]

        def give(i: int) -> Callable[..., Tensor]:
            def hook_fn(value: Tensor, hook: object) -> Tensor:
                out = filled[i].view(work.rows * self.place[0], self.place[1], counts[i], -1)
                return (out if value.ndim == 4 else out.flatten(2)).to(value.device)

            return hook_fn

        def take(z: Tensor, hook: object) -> Tensor:
            heads = heads_last(z.to(base.embed.device), anatomy.n_heads).reshape(
                work.rows, -1, anatomy.n_heads, anatomy.d_head
            )
            o, last = attention_weights(self.model, layer).o, layer == anatomy.n_layers - 1
            places = base.tokens[base.last] if last else base.tokens
            ablated = base.at("z", layer, last).unflatten(-1, (anatomy.n_heads, -1)).transpose(0, 1)
            instances = [(head, *where) for head, placed in work.heads.items() for where in placed]
            index, (head, row, _) = _index([h for h, *_ in instances]), torch.tensor(instances, device=heads.device).T
            change = heads[row[:, None], places, head[:, None]] - ablated[index]

            def pushed(out: Tensor | None = None) -> Tensor:
                if o.device == change.device:
                    return torch.bmm(change, o[index].transpose(1, 2), out=out)
                made = torch.bmm(change.to(o.device), o[index].transpose(1, 2)).to(change.device)
                return made if out is None else out.copy_(made)

            self._write([value for *_, value in instances], pushed, last)
            return z[:1]

        hooks: list[Hook] = [(anatomy.hook("attn_in", layer), begin), (anatomy.hook("z", layer), take)]
        for i, kind in enumerate("qkv"):
            hooks += [(anatomy.hook(f"{kind}_in", layer), one_row), (anatomy.hook(kind, layer), give(i))]
        return hooks

    def _filled(self, layer: int, work: LayerPlan) -> list[Float[Tensor, "row place head d_head"]]:
        """q, k and v of every attention row: the ablated run's, with what differs in place."""
        base, norm = self.base, norm_weights(self.model, layer, "attn")
        values = base.embed.new_empty(0)
        if work.reads:
            inputs = normed(_joined([self._rebuilt(reads, "stream", layer) for reads in work.reads]), norm)
            starts = itertools.accumulate((len(reads.weights) for reads in work.reads), initial=0)
            each = zip(starts, work.reads, strict=False)
            values = self._projected(layer, inputs, [(at + i, c) for at, reads in each for i, c in reads.projections])
        filled = [part.expand(work.rows, -1, -1, -1).clone() for part in base.projections(layer)]
        for part, (first, count) in zip(filled, self._columns(), strict=True):
            at = [(row, c - first, n) for c in range(first, first + count) for row, n in work.fill.get(c, ())]
            if at:
                row, head, number = torch.tensor(at, device=part.device).T
                part[row[:, None], base.tokens, head[:, None]] = values[number]
        return filled

    def _projected(
        self, layer: int, inputs: Float[Tensor, "input token d_model"], projections: list[tuple[int, int]]
    ) -> Float[Tensor, "projection token d_head"]:
        """What columns of a layer's q, k and v make of inputs."""
        weights = attention_weights(self.model, layer)
        out = inputs.new_empty(len(projections), inputs.shape[1], self.map.d_head)
        for kind, (first, count) in zip("qkv", self._columns(), strict=True):
            chosen = [(n, i, c - first) for n, (i, c) in enumerate(projections) if first <= c < first + count]
            if not chosen:
                continue
            numbers, rows, heads = (list(part) for part in zip(*chosen, strict=True))
            matrices, bias = getattr(weights, kind)[_index(heads)], getattr(weights, f"{kind}_bias")
            made = torch.bmm(inputs[_index(rows)].to(matrices.device), matrices.transpose(1, 2))
            out[_index(numbers)] = (made if bias is None else made + bias[_index(heads)][:, None]).to(out.device)
        return out

    def _columns(self) -> list[tuple[int, int]]:
        """The first column of q, k and v among the readers of a layer's attention, and how many each has."""
        anatomy = self.map
        counts = list(anatomy.heads_of.values())
        return [(sum(counts[:i]), count) for i, count in enumerate(counts)]

    def _mlp_in(self, layer: int, work: LayerPlan) -> Callable[..., Tensor]:
        def hook_fn(stream: Tensor, hook: object) -> Tensor:
            if not work.mlp_reads:
                return stream[:, :1]
            last = layer == self.map.n_layers - 1
            inputs = torch.cat([self._rebuilt(reads, "mlp_in", layer, last) for reads in work.mlp_reads])
            return inputs.flatten(0, 1)[None].to(stream.device)

        return hook_fn

    def _mlp_out(self, layer: int, work: LayerPlan) -> Callable[..., Tensor]:
        def hook_fn(out: Tensor, hook: object) -> Tensor:
            if work.mlp_reads:
                last = layer == self.map.n_layers - 1
                ablated = self.base.at("mlp_out", layer, last)
                parts = out[0].unflatten(0, (len(work.mlp_reads), -1)).to(ablated.device)

                def change(out: Tensor | None = None) -> Tensor:
                    return torch.sub(parts, ablated, out=out)

                self._write(work.mlp_values, change, last)
            return out.new_zeros(1, 1, out.shape[-1])

        return hook_fn

    def _final(self, stream: Tensor, hook: object) -> Tensor:
        streams = [self._rebuilt(reads, "stream", self.map.n_layers, last=True) for reads in self.plan.final]
        return normed(_joined(streams), norm_weights(self.model, None, "final")).flatten(0, 1)[None].to(stream.device)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _index(numbers: list[int]) -> slice | list[int]:
    """Numbers as an index, one that copies nothing where they follow each other."""
    first, count = numbers[0], len(numbers)
    return slice(first, first + count) if numbers == list(range(first, first + count)) else numbers


def _summed(
    base: Float[Tensor, "token d_model"],
    weights: Float[Tensor, "input writer"],
    changes: Float[Tensor, "writer token d_model"],
) -> Float[Tensor, "input token d_model"]:
    """`base` plus each input's weighted changes."""
    start, flat = base.reshape(1, -1), changes.flatten(1)
    if weights.device.type == "cpu" and weights.dtype == torch.float32:
        terms = weights.nonzero()
        rows, writers = weights.shape
        if len(terms) * _SPARSE_EDGE < writers * max(_DENSE_WRITER, _DENSE_EDGE * rows):
            sparse = torch.sparse_coo_tensor(
                terms.T, weights[terms[:, 0], terms[:, 1]], weights.shape, check_invariants=False
            )
            out = torch.sparse.addmm(start.expand(len(weights), -1), sparse, flat)
            return out.unflatten(-1, base.shape)
    return torch.addmm(start, weights, flat).unflatten(-1, base.shape)


def normed(x: Float[Tensor, "... d_model"], norm: NormWeights) -> Float[Tensor, "... d_model"]:
    """A norm applied to a stream, in float32 where its weight lies, and back in the stream's dtype and place."""
    wide = x.to(norm.weight)
    if norm.kind == "layer":
        return functional.layer_norm(wide, wide.shape[-1:], norm.weight, norm.bias, norm.eps).to(x)
    scale = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / wide.shape[-1] + norm.eps)
    return (wide * scale * norm.weight).to(x)
