"""Exact edge patching: run the clean prompts while chosen edges carry what they carry on the corrupt prompts.

Every reader's input is rebuilt as

    input_v = stream_v(corrupt) + sum_u mask[u, v] (a_u(this run) - a_u(corrupt)),

so an edge in the mask carries what its writer computes in this run, every other edge its corrupt value. All edges
on = the clean run, all off = the corrupt run. Heads in front of a post-norm (gemma) go through it together, at the
point that the mask gives. Several masks run as one batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit.graph import Graph
from mansu_tl.data import PromptPairs
from mansu_tl.errors import MansuError
from mansu_tl.metrics import Metric, logit_difference
from mansu_tl.models import NormWeights, attention_weights, component_map, norm_weights
from mansu_tl.patching.runs import Activations, Hook, check, chunks, heads_last, measured, record, run

# Rows (masks x pairs x positions x readers of a layer x d_model) rebuilt at once (fp32: 128 MB).
_ROW_ELEMENTS = 32_000_000


@torch.no_grad()
def patch_edges(
    model: TransformerBridge,
    pairs: PromptPairs,
    masks: Float[Tensor, "mask writer reader"],
    *,
    metric: Metric = logit_difference,
    batch_size: int = 64,
    progress: bool = False,
) -> Float[Tensor, "mask pair"]:
    """The metric of every pair under every mask: 1 = the edge is live, 0 = corrupt; values between interpolate.

    Raises:
        MansuError: masks of another shape than the model's graph.
    """
    check(model, pairs)
    graph = Graph.of(model)
    if tuple(masks.shape[1:]) != tuple(graph.exists.shape):
        raise MansuError(
            f"mask: shape {tuple(masks.shape[1:])}, this model's graph is {tuple(graph.exists.shape)}; "
            "the circuit belongs to another model"
        )
    cmap = component_map(model)
    widest = cmap.n_heads + 2 * cmap.n_kv_heads
    cost = min(batch_size, len(pairs)) * pairs.clean.shape[1] * cmap.d_model * widest
    group = max(1, _ROW_ELEMENTS // cost)
    out = torch.empty(masks.shape[0], len(pairs))
    live = masks * graph.exists
    steps = [(w, c, s) for w, c in chunks(pairs, batch_size) for s in range(0, masks.shape[0], group)]
    base: tuple[slice, Activations] | None = None
    for where, chunk, start in tqdm(steps, desc="edge patching", unit="batch", disable=not progress):
        if base is None or base[0] != where:
            base = (where, record(model, chunk.corrupt, chunk.lengths))
        part = live[start : start + group]
        logits = _Patched(model, chunk, base[1], part).logits()
        for i in range(part.shape[0]):
            out[start + i, where] = measured(metric, logits[i], chunk).cpu()
    return out


class _Patched:
    """One batched run of the clean prompts under several masks."""

    def __init__(self, model: TransformerBridge, pairs: PromptPairs, corrupt: Activations, masks: Tensor) -> None:
        self.model, self.pairs, self.corrupt = model, pairs, corrupt
        self.masks = masks.to(corrupt.embed.device, corrupt.embed.dtype)
        self.n_masks, self.n_pairs = masks.shape[0], len(pairs)
        self.map = component_map(model)
        # [mask, pair, pos, d_model] for every writer so far; heads in front of a post-norm are kept apart by layer,
        # because they only add up before that norm.
        self.deltas: list[Tensor] = []
        self.head_deltas: dict[int, Tensor] = {}

    def logits(self) -> Float[Tensor, "mask pair vocab"]:
        hooks: list[Hook] = [("blocks.0.hook_in", self._embed)]
        column = 0
        for layer in range(self.map.n_layers):
            block = f"blocks.{layer}"
            for kind, heads in (("q", self.map.n_heads), ("k", self.map.n_kv_heads), ("v", self.map.n_kv_heads)):
                hooks.append(
                    (f"{block}.attn.{kind}.hook_out", self._projection(layer, kind, slice(column, column + heads)))
                )
                column += heads
            hooks.append((f"{block}.ln2.hook_in", self._stream(self.corrupt.mlp_in[layer], column)))
            hooks.append((f"{block}.attn.o.hook_in", self._heads(layer)))
            out = "ln2_post.hook_out" if self.map.post_norms else "mlp.hook_out"
            hooks.append((f"{block}.{out}", self._mlp(layer)))
            column += 1
        hooks.append(("ln_final.hook_in", self._stream(self.corrupt.final, column)))
        tokens = self.pairs.clean.repeat(self.n_masks, 1)
        out_logits = run(self.model, tokens, self.pairs.lengths.repeat(self.n_masks), hooks)
        return out_logits.float().unflatten(0, (self.n_masks, self.n_pairs))

    def _split(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (self.n_masks, self.n_pairs))

    def _embed(self, stream: Tensor, hook: object) -> None:
        self.deltas = [self._split(stream) - self.corrupt.embed]
        self.head_deltas = {}

    def _heads(self, layer: int) -> Callable[..., None]:
        def hook_fn(z: Tensor, hook: object) -> None:
            change = self._split(heads_last(z, self.map.n_heads)) - self.corrupt.z[layer]
            weights = attention_weights(self.model, layer)
            per_head = [change[..., h, :] @ weights.o[h].T for h in range(self.map.n_heads)]
            if self.map.post_norms:
                self.head_deltas[layer] = torch.stack(per_head)
            else:
                self.deltas += per_head

        return hook_fn

    def _mlp(self, layer: int) -> Callable[..., None]:
        def hook_fn(out: Tensor, hook: object) -> None:
            self.deltas.append(self._split(out) - self.corrupt.mlp_out[layer])

        return hook_fn

    def _inputs(self, base: Tensor, readers: slice) -> Float[Tensor, "reader mask pair pos d_model"]:
        """The rebuilt inputs of some readers; writers that come later have zeros in the mask."""
        heads = self.map.n_heads
        if self.map.post_norms:
            rows = [0] + [(i + 1) * (heads + 1) for i in range(len(self.deltas) - 1)]
        else:
            rows = list(range(len(self.deltas)))
        deltas = torch.stack(self.deltas, 1)
        out = torch.einsum("mwr,mwbpd->rmbpd", self.masks[:, rows, readers], deltas) + base
        for earlier, changes in self.head_deltas.items():
            first = 1 + earlier * (heads + 1)
            part = torch.einsum("mhr,hmbpd->rmbpd", self.masks[:, first : first + heads, readers], changes)
            norm, raw = norm_weights(self.model, earlier, "attn_post"), self.corrupt.attn_raw[earlier]
            out = out + _norm(raw + part, norm) - _norm(raw, norm)
        return out

    def _projection(self, layer: int, kind: str, readers: slice) -> Callable[..., Tensor]:
        def hook_fn(value: Tensor, hook: object) -> Tensor:
            weights, norm = attention_weights(self.model, layer), norm_weights(self.model, layer, "attn")
            normed = _norm(self._inputs(self.corrupt.resid_pre[layer], readers), norm).flatten(1, 2)
            matrix, bias = getattr(weights, kind), getattr(weights, f"{kind}_bias")
            out = torch.einsum("hnpd,hed->nphe", normed, matrix)
            if bias is not None:
                out = out + bias
            return out.reshape(value.shape)

        return hook_fn

    def _stream(self, base: Tensor, column: int) -> Callable[..., Tensor]:
        def hook_fn(stream: Tensor, hook: object) -> Tensor:
            return self._inputs(base, slice(column, column + 1))[0].flatten(0, 1)

        return hook_fn


def _norm(x: Tensor, norm: NormWeights) -> Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True) if norm.kind == "layer" else wide
    out = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    return (out if norm.bias is None else out + norm.bias).to(x.dtype)
