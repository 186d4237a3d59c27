"""Exact edge patching: run the clean prompts while chosen edges carry their ablated values.

Every reader's input is rebuilt as

    input_v = stream_v(ablated) + sum_u mask[u, v] (a_u(this run) - a_u(ablated)),

so an edge in the mask carries what its writer computes in this run, every other edge its ablated value (by default what
it carries on the corrupt prompt). All edges on = the clean run, all off = the ablated run. Heads in front of a post-norm
(gemma) go through it together, at the point that the mask gives.

Many masks share one run: what is alike in them is computed once (see `sharing`), positions in front of the first
changed token and padding are not computed at all, nor the last layer's queries and MLP away from the asked positions. The
work is handed to the model's own modules as a batch of what is left; its own stream has one row and is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit.graph import Graph
from mansu_tl.circuit.sharing import LayerPlan, Plan, Reads, plan, useful
from mansu_tl.data import PromptPairs
from mansu_tl.data.forced import Forced
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, NormWeights, attention_weights, norm_weights
from mansu_tl.models.anatomy import UNEMBED
from mansu_tl.runs.ablation import Ablation
from mansu_tl.runs.ends import end_hooks, entering
from mansu_tl.runs.exactness import require_exact
from mansu_tl.runs.metrics import Metric, logit_difference, measured, options_read
from mansu_tl.runs.passes import Hook, Recording, chunks, forward, heads_last, prepared, run

# Numbers held at once by a group of masks: changes, rebuilt inputs, attention rows, MLP, logits (fp32: 256 MB).
_ROW_ELEMENTS = 64_000_000
# Below this share of live edges a sparse product is the faster one on CPUs (measured: break-even near .2).
_SPARSE = 0.15


@torch_defaults()
@torch.no_grad()
def patch_edges(
    model: TransformerBridge,
    pairs: PromptPairs,
    masks: Float[Tensor, "mask writer reader"],
    *,
    ablation: Ablation | None = None,
    metric: Metric = logit_difference,
    batch_size: int = 64,
    progress: bool = False,
) -> Float[Tensor, "mask pair"]:
    """The metric of every pair under every mask: 1 = the edge is live, 0 = ablated; values between interpolate.

    Args:
        ablation: what edges carry that are not live; their values on the corrupt prompts where not given.
        batch_size: at most so many pairs in a pass; fewer where memory asks for it.

    Raises:
        MansuError: masks of another shape than the model's graph, or not finite.
    """
    rows = prepared(model, pairs, options_read(metric))
    return patched(model, rows, masks, ablation or Ablation(), metric, batch_size, progress)[0]


@torch.no_grad()
def patched(
    model: TransformerBridge,
    pairs: Forced[PromptPairs],
    masks: Float[Tensor, "mask writer reader"],
    ablation: Ablation,
    metric: Metric,
    batch_size: int,
    progress: bool = False,
) -> tuple[Float[Tensor, "mask pair"], Float[Tensor, " pair"]]:
    """`patch_edges`, and the metric with every edge ablated, which falls out of it."""
    graph, anatomy = Graph.of(model), Anatomy.of(model)
    if tuple(masks.shape[1:]) != tuple(graph.exists.shape):
        raise MansuError(
            f"mask: shape {tuple(masks.shape[1:])}, this model's graph is {tuple(graph.exists.shape)}; "
            "the circuit belongs to another model"
        )
    if not torch.isfinite(masks).all():
        raise MansuError("mask: it holds numbers that are not finite; use 0, 1 or what lies between")
    if batch_size < 1:
        raise MansuError(f"batch_size={batch_size}: at least one pair has to fit in a batch")
    out, off = torch.empty(masks.shape[0], len(pairs)), torch.empty(len(pairs))
    rows, places = (-(-len(part) // len(pairs)) for part in (pairs.clean, pairs.places.rows))
    fixed, a_mask, a_writer = _costs(anatomy, rows * pairs.clean.shape[1], places * model.cfg.d_vocab)
    most = max(1, min(batch_size, _ROW_ELEMENTS // (fixed + a_mask + a_writer * len(anatomy.writers))))
    with tqdm(total=len(pairs) * len(masks), desc="edge patching", unit="run", disable=not progress) as bar:
        for where, chunk in chunks(pairs, most):
            base = _Base(model, anatomy, chunk, ablation)
            require_exact(model, f"edge patching against {ablation.kind}", partial(_unpatched, base, graph))
            off[where] = measured(metric, base.run.logits, chunk).cpu()
            for group, live in _groups(anatomy, masks, graph, _ROW_ELEMENTS // len(chunk) - fixed, a_mask, a_writer):
                logits = _Group(base, plan(anatomy, live, ablation.kind == "corrupt")).logits()
                for i in range(group.stop - group.start):
                    out[group.start + i, where] = measured(metric, logits(i), chunk).cpu()
                bar.update(len(chunk) * (group.stop - group.start))
    return out, off


def _unpatched(base: _Base, graph: Graph) -> tuple[Tensor, Tensor]:
    """The logits with every edge live, and those of the clean prompts; and the same with none and of the ablated run."""
    every = useful(base.map, np.stack([graph.exists.numpy(), np.zeros_like(graph.exists.numpy())]).astype(np.float32))
    logits = _Group(base, plan(base.map, every, base.ablation.kind == "corrupt")).logits()
    clean = run(base.model, base.pairs.clean, base.pairs.places, end_hooks(base.model, base.pairs, clean=True))
    return torch.cat([logits(0), logits(1)]), torch.cat([clean.float(), base.run.logits])


def _costs(anatomy: Anatomy, width: int, vocab: int) -> tuple[int, int, int]:
    """How many numbers are held for one pair: whatever the masks, for every mask, and for every writer that it uses.

    The ablated run and the inputs of one mask's attention, before and behind the norm; a mask's attention rows, its MLP
    and its logits; a writer's change.
    """
    readers = anatomy.n_attention_readers
    kept = anatomy.n_layers * (4 * anatomy.d_model + (anatomy.n_heads + readers) * anatomy.d_head)
    rows = 3 * (anatomy.n_heads + readers) * anatomy.d_head + 2 * anatomy.n_heads * width
    fixed = width * (kept + 3 * readers * anatomy.d_model) + vocab
    return fixed, width * (rows + 4 * anatomy.d_mlp) + 2 * vocab, width * anatomy.d_model


def _groups(
    anatomy: Anatomy, masks: Tensor, graph: Graph, budget: int, a_mask: int, a_writer: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Neighbouring masks that fit into the budget together, without their useless edges."""
    exists, block = graph.exists.numpy(), max(1, 8_000_000 // graph.exists.numel())
    for first in range(0, len(masks), block):
        live = useful(anatomy, masks[first : first + block].cpu().float().numpy() * exists)
        costs: list[int] = (a_mask + a_writer * (live != 0).any(2).sum(1)).tolist()
        start = 0
        while start < len(costs):
            stop, total = start + 1, costs[start]
            while stop < len(costs) and total + costs[stop] <= budget:
                total += costs[stop]
                stop += 1
            yield slice(first + start, first + stop), live[start:stop]
            start = stop


@dataclass
class _Base:
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
        self.embed = self.at(entering(self.model, pairs, clean=True) - self.run.value("stream", 0))

    def at(self, stream: Float[Tensor, "pair pos d"], last: bool = False) -> Float[Tensor, "token d"]:
        """A stream's vectors at the tokens that count, or at the asked ones only."""
        return stream.flatten(0, 1)[self.tokens[self.last] if last else self.tokens]

    def projections(self, layer: int) -> list[Float[Tensor, "place head d_head"]]:
        """q, k and v of the ablated run at every position."""
        if layer not in self.projected:
            weights, norm = attention_weights(self.model, layer), norm_weights(self.model, layer, "attn")
            x = normed(self.run.value("stream", layer).flatten(0, 1), norm)
            parts = ((weights.q, weights.q_bias), (weights.k, weights.k_bias), (weights.v, weights.v_bias))
            self.projected[layer] = [
                functional.linear(x, w.flatten(0, 1), None if b is None else b.flatten()).unflatten(-1, w.shape[:2])
                for w, b in parts
            ]
        return self.projected[layer]


class _Group:
    """One run of the clean prompts under a group of masks."""

    def __init__(self, base: _Base, work: Plan) -> None:
        self.base, self.plan, self.map, self.model = base, work, base.map, base.model
        self.place = base.pairs.clean.shape
        embed = base.embed
        self.changes = embed.new_empty(work.n_slots, *embed.shape)
        if 1 in work.consumers:
            self._write(1, partial(torch.add, embed, 0))

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

    def _write(self, value: int, make: Callable[..., Tensor], last: bool = False) -> None:
        """Put a change into every slot that holds its value; `make` can write where it is told."""
        first, *others = self.plan.consumers[value]
        if last:
            self.changes[first, self.base.last] = make()
        else:
            make(out=self.changes[first])
        for slot in others:
            self.changes[slot] = self.changes[first]

    def _rebuilt(self, reads: Reads, base: Tensor, last: bool = False) -> Float[Tensor, "input token d_model"]:
        """The inputs of some readers of one mask, where `base` has the ablated ones."""
        changes = self.changes[reads.slots]
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
        for layer in sorted(set(owner[owner >= 0].tolist())):
            inside = np.flatnonzero(owner == layer)
            part = slice(int(inside[0]), int(inside[-1]) + 1)
            distinct, back = torch.unique(weights[:, part], dim=0, return_inverse=True)
            raw, norm = (
                self.base.at(self.base.run.value("attn_raw", layer), last),
                norm_weights(self.model, layer, "attn_post"),
            )
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
                return out if value.ndim == 4 else out.flatten(2)

            return hook_fn

        def take(z: Tensor, hook: object) -> Tensor:
            heads = heads_last(z, anatomy.n_heads).reshape(work.rows, -1, anatomy.n_heads, anatomy.d_head)
            weights, last = attention_weights(self.model, layer), layer == anatomy.n_layers - 1
            places = base.tokens[base.last] if last else base.tokens
            ablated = base.at(base.run.value("z", layer).flatten(2), last).unflatten(-1, (anatomy.n_heads, -1))
            for head, instances in work.heads.items():
                rows = torch.tensor([row for row, _ in instances], device=z.device)
                change = heads[rows[:, None], places[None], head] - ablated[:, head]
                for i, (_, value) in enumerate(instances):
                    self._write(value, partial(torch.mm, change[i], weights.o[head].T), last)
            return z[:1]

        hooks: list[Hook] = [(anatomy.hook("attn_in", layer), begin), (anatomy.hook("z", layer), take)]
        for i, kind in enumerate("qkv"):
            hooks += [(anatomy.hook(f"{kind}_in", layer), one_row), (anatomy.hook(kind, layer), give(i))]
        return hooks

    def _filled(self, layer: int, work: LayerPlan) -> list[Float[Tensor, "row place head d_head"]]:
        """q, k and v of every attention row: the ablated run's, with what differs in place."""
        anatomy, base, kv = self.map, self.base, self.map.n_kv_heads
        weights, norm = attention_weights(self.model, layer), norm_weights(self.model, layer, "attn")
        matrices = [m for part in (weights.q, weights.k, weights.v) for m in part]
        biases = [b for part in (weights.q_bias, weights.k_bias, weights.v_bias) if part is not None for b in part]
        stream, done = base.at(base.run.value("stream", layer)), []
        for reads in work.reads:
            inputs = normed(self._rebuilt(reads, stream), norm)
            for i, c in reads.projections:
                done.append(functional.linear(inputs[i], matrices[c], biases[c] if biases else None))
        filled = [part.expand(work.rows, -1, -1, -1).clone() for part in base.projections(layer)]
        for column, places in work.fill.items():
            which = 0 if column < anatomy.n_heads else 1 if column < anatomy.n_heads + kv else 2
            head = column - (0, anatomy.n_heads, anatomy.n_heads + kv)[which]
            rows = torch.tensor([row for row, _ in places], device=stream.device)
            values = torch.stack([done[number] for _, number in places])
            filled[which][rows[:, None], base.tokens[None], head] = values
        return filled

    def _mlp_in(self, layer: int, work: LayerPlan) -> Callable[..., Tensor]:
        def hook_fn(stream: Tensor, hook: object) -> Tensor:
            if not work.mlp_reads:
                return stream[:, :1]
            last = layer == self.map.n_layers - 1
            base = self.base.at(self.base.run.value("mlp_in", layer), last)
            return torch.cat([self._rebuilt(reads, base, last) for reads in work.mlp_reads]).flatten(0, 1)[None]

        return hook_fn

    def _mlp_out(self, layer: int, work: LayerPlan) -> Callable[..., Tensor]:
        def hook_fn(out: Tensor, hook: object) -> Tensor:
            if work.mlp_reads:
                last = layer == self.map.n_layers - 1
                ablated = self.base.at(self.base.run.value("mlp_out", layer), last)
                parts = out[0].unflatten(0, (len(work.mlp_reads), -1))
                for value, part in zip(work.mlp_values, parts, strict=True):
                    self._write(value, partial(torch.sub, part, ablated), last)
            return out.new_zeros(1, 1, out.shape[-1])

        return hook_fn

    def _final(self, stream: Tensor, hook: object) -> Tensor:
        base = self.base.at(self.base.run.value("stream", self.map.n_layers), last=True)
        streams = torch.cat([self._rebuilt(reads, base, last=True) for reads in self.plan.final])
        return normed(streams, norm_weights(self.model, None, "final")).flatten(0, 1)[None]


def _summed(
    base: Float[Tensor, "token d_model"],
    weights: Float[Tensor, "input writer"],
    changes: Float[Tensor, "writer token d_model"],
) -> Float[Tensor, "input token d_model"]:
    """`base` plus each input's weighted changes."""
    start, flat = base.reshape(1, -1), changes.flatten(1)
    if weights.device.type == "cpu" and weights.dtype == torch.float32:
        terms = weights.nonzero()
        if len(terms) < _SPARSE * weights.numel():
            sparse = torch.sparse_coo_tensor(
                terms.T, weights[terms[:, 0], terms[:, 1]], weights.shape, check_invariants=False
            )
            out = torch.sparse.addmm(start.expand(len(weights), -1), sparse, flat)
            return out.unflatten(-1, base.shape)
    return torch.addmm(start, weights, flat).unflatten(-1, base.shape)


def normed(x: Float[Tensor, "... d_model"], norm: NormWeights) -> Float[Tensor, "... d_model"]:
    """A norm applied to a stream, in float32 inside and back in the stream's dtype."""
    wide = x.float()
    if norm.kind == "layer":
        return functional.layer_norm(wide, wide.shape[-1:], norm.weight, norm.bias, norm.eps).to(x.dtype)
    scale = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / wide.shape[-1] + norm.eps)
    return (wide * scale * norm.weight).to(x.dtype)
