"""Edge attribution patching, exact and without any bridge flag.

The score of an edge u -> v is the mean over pairs of the sum over positions of

    (a_u(clean) - a_u(corrupt)) . dm/d input_v,

the first-order change of the metric m when u's message to v alone goes from corrupt to clean. EAP (Syed et al. 2023,
arXiv 2310.10348) takes the gradient at one end; EAP-IG (Hanna et al. 2024, arXiv 2403.17806) averages it over
embeddings interpolated between the ends.

Gradients are taken at each projection's output (q, k, v of d_head numbers) rather than at a per-head copy of its
input. With x^ the normalized input, s its scale, w the norm's weight, W' = W diag(w), b the projection's bias (the
norm's included), the gradient at the norm's input is, for step i,

    ( W'^T g_i - mean(W'^T g_i) [LayerNorm only] - x^_i <q_i - b, g_i> / d_model ) / s_i,

so sum_i g_i / s_i is pulled back once, the steps survive only in a correction of rank `steps`, and the contraction
with the writers happens once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit.graph import Graph
from mansu_tl.circuit.scores import EdgeScores
from mansu_tl.data import PromptPairs
from mansu_tl.errors import MansuError
from mansu_tl.metrics import Metric, logit_difference
from mansu_tl.models import (
    AttentionWeights,
    ComponentMap,
    NormWeights,
    attention_weights,
    component_map,
    fingerprint,
    norm_weights,
)
from mansu_tl.patching.runs import Hook, check, chunks, keep, measured, metric_name, record, run

# Elements of writer deltas plus reader gradients held at once in the contraction (fp32: 64 MB).
_CONTRACTION_ELEMENTS = 16_000_000


def edge_attribution(
    model: TransformerBridge,
    pairs: PromptPairs,
    *,
    method: str = "eap-ig",
    steps: int = 5,
    rule: str = "midpoint",
    at: str = "clean",
    metric: Metric = logit_difference,
    per_pair: bool = False,
    per_position: bool = False,
    batch_size: int = 64,
    progress: bool = False,
) -> EdgeScores:
    """Score every edge of the model's graph on the pairs.

    Args:
        method: "eap" takes one gradient, "eap-ig" averages `steps` of them.
        steps: interpolation steps of EAP-IG.
        rule: where in its interval each step sits; "left" starts at the corrupt end and never reaches the clean one.
        at: the end at which EAP takes its gradient.
        metric: maps last-token logits and pairs to one number a pair.
        per_pair: also keep the scores of every pair (for intervals).
        per_position: also keep the scores of every position.
        batch_size: pairs per forward pass.
        progress: show a progress bar over batches.

    Raises:
        MansuError: an unknown method, rule or end, or fewer than one step; a metric or pairs that do not fit.
    """
    if method not in ("eap", "eap-ig"):
        raise MansuError(f"attribution: unknown method {method!r}; choose eap or eap-ig")
    if method == "eap" and at not in ("clean", "corrupt"):
        raise MansuError(f"attribution: unknown end {at!r}; choose at='clean' or at='corrupt'")
    if method == "eap-ig" and rule not in ("midpoint", "left", "right"):
        raise MansuError(f"attribution: unknown rule {rule!r}; choose midpoint, left or right")
    if steps < 1:
        raise MansuError(f"attribution: steps={steps}; EAP-IG needs at least one")
    check(model, pairs)
    alphas = [1.0 if at == "clean" else 0.0] if method == "eap" else _alphas(steps, rule)
    graph, cmap = Graph.of(model), component_map(model)
    total = torch.zeros(graph.exists.shape)
    by_pair = torch.zeros(len(pairs), *graph.exists.shape) if per_pair else None
    by_position = torch.zeros(pairs.clean.shape[1], *graph.exists.shape) if per_position else None
    clean_sum = corrupt_sum = 0.0
    parts = tqdm(list(chunks(pairs, batch_size)), desc=f"{method} edges", unit="batch", disable=not progress)
    for where, chunk in parts:
        scored = _Chunk(model, cmap, chunk, metric, alphas)
        clean_sum += scored.metric_clean.sum().item()
        corrupt_sum += scored.metric_corrupt.sum().item()

        def collect(scores: Tensor, pair: slice, start: int = where.start) -> None:
            # scores: [pair, pos, writer, reader] with the axes that nobody asked for already summed to size 1
            total.add_(scores.sum((0, 1)))
            if by_pair is not None:
                by_pair[start + pair.start : start + pair.stop] += scores.sum(1)
            if by_position is not None:
                by_position[: scores.shape[1]] += scores.sum(0)

        scored.contract(graph, per_pair, per_position, collect)
    count = len(pairs)
    tensor = (total / count) * graph.exists
    clean_mean, corrupt_mean = clean_sum / count, corrupt_sum / count
    return EdgeScores(
        tensor=tensor,
        writers=graph.writers,
        readers=graph.readers,
        exists=graph.exists,
        method=method,
        rule=at if method == "eap" else rule,
        steps=len(alphas),
        metric=metric_name(metric),
        metric_clean=clean_mean,
        metric_corrupt=corrupt_mean,
        residual=abs(tensor[0].double().sum().item() - (clean_mean - corrupt_mean)),
        model=fingerprint(model),
        per_pair=None if by_pair is None else by_pair * graph.exists,
        per_position=None if by_position is None else by_position / count * graph.exists,
    )


def _alphas(steps: int, rule: str) -> list[float]:
    shift = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[rule]
    return [(i + shift) / steps for i in range(steps)]


@dataclass
class _LayerSums:
    """What one layer's readers have gathered over the steps, tokens flattened to one axis."""

    ghat: Tensor | None = None  # [token, reader, d_head]: sum of g / s
    slopes: list[Tensor] = field(default_factory=list)  # per step [token, reader]: <q - b, g> / (d_model s)
    xhat: list[Tensor] = field(default_factory=list)  # per step [token, d_model]
    mlp: Tensor | None = None  # [token, d_model]


class _Chunk:
    """One batch of pairs: both ends recorded, gradients gathered, ready to be contracted."""

    def __init__(
        self, model: TransformerBridge, cmap: ComponentMap, pairs: PromptPairs, metric: Metric, alphas: list[float]
    ) -> None:
        self.model, self.cmap, self.pairs, self.metric, self.alphas = model, cmap, pairs, metric, alphas
        self.clean = record(model, pairs.clean, pairs.lengths)
        self.corrupt = record(model, pairs.corrupt, pairs.lengths)
        self.metric_clean = measured(metric, self.clean.logits, pairs)
        self.metric_corrupt = measured(metric, self.corrupt.logits, pairs)
        self.weights = [attention_weights(model, layer) for layer in range(cmap.n_layers)]
        self.norms = [norm_weights(model, layer, "attn") for layer in range(cmap.n_layers)]

    def contract(
        self, graph: Graph, per_pair: bool, per_position: bool, collect: Callable[[Tensor, slice], None]
    ) -> None:
        """Hand every score to `collect`: once for all steps, or step by step where heads pass a post-norm."""
        if not self.cmap.post_norms:
            layers, logits = [_LayerSums() for _ in self.weights], None
            for alpha in self.alphas:
                logits = self._gradients(alpha, layers, logits)[0]
            assert logits is not None
            self._contract(layers, logits, self.clean.attn_raw, graph, per_pair, per_position, collect)
            return
        for alpha in self.alphas:
            layers = [_LayerSums() for _ in self.weights]
            logits, raw = self._gradients(alpha, layers, None)
            self._contract(layers, logits, raw, graph, per_pair, per_position, collect)

    def _gradients(
        self, alpha: float, layers: list[_LayerSums], logits_sum: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One forward and backward at an interpolated embedding, added to `layers`."""
        point = self.corrupt.embed + alpha * (self.clean.embed - self.corrupt.embed)
        point = point.detach().requires_grad_()
        kept: dict[str, Tensor] = {}

        def start(stream: Tensor, hook: object) -> Tensor:
            return point

        def branch(key: str) -> Callable[..., Tensor]:
            def hook_fn(stream: Tensor, hook: object) -> Tensor:
                # A view of its own: the gradient at the stream itself would count the skip path too.
                kept[key] = stream.view_as(stream)
                return kept[key]

            return hook_fn

        hooks: list[Hook] = [("blocks.0.hook_in", start), ("ln_final.hook_in", branch("final"))]
        for layer in range(self.cmap.n_layers):
            block = f"blocks.{layer}"
            hooks += [(f"{block}.attn.{r}.hook_out", keep(kept, f"{r}{layer}")) for r in "qkv"]
            hooks += [(f"{block}.ln1.hook_in", keep(kept, f"x{layer}")), (f"{block}.ln2.hook_in", branch(f"m{layer}"))]
            if self.cmap.post_norms:
                hooks.append((f"{block}.ln1_post.hook_in", keep(kept, f"raw{layer}")))
        with torch.enable_grad():
            logits = run(self.model, self.pairs.clean, self.pairs.lengths, hooks).float()
            value = measured(self.metric, logits, self.pairs).sum()
            wanted = ["final"] + [f"{r}{i}" for i in range(len(layers)) for r in "qkvm"]
            grads = dict(zip(wanted, torch.autograd.grad(value, [kept[key] for key in wanted]), strict=True))
        share = 1 / len(self.alphas)
        for i, layer_sums in enumerate(layers):
            self._add(i, layer_sums, kept, grads, share)
        final = grads["final"].flatten(0, 1).float() * share
        raw = tuple(kept[f"raw{i}"].detach().flatten(0, 1).float() for i in range(len(layers)) if self.cmap.post_norms)
        return final if logits_sum is None else logits_sum.add_(final), raw

    def _add(self, i: int, sums: _LayerSums, kept: dict[str, Tensor], grads: dict[str, Tensor], share: float) -> None:
        def rows(r: str, source: dict[str, Tensor]) -> Tensor:
            heads = self.cmap.n_heads if r == "q" else self.cmap.n_kv_heads
            return source[f"{r}{i}"].detach().flatten(0, 1).reshape(-1, heads, self.cmap.d_head).float()

        values = torch.cat([rows(r, kept) for r in "qkv"], 1)
        grad = torch.cat([rows(r, grads) for r in "qkv"], 1)
        xhat, scale = _normalized(kept[f"x{i}"].detach().flatten(0, 1).float(), self.norms[i])
        grad = grad * (share / scale)[:, None, None]
        offset = _offsets(self.weights[i], self.norms[i])
        slope = ((values - offset) * grad).sum(-1) / self.cmap.d_model
        mlp = grads[f"m{i}"].flatten(0, 1).float() * share
        sums.ghat = grad if sums.ghat is None else sums.ghat.add_(grad)
        sums.mlp = mlp if sums.mlp is None else sums.mlp.add_(mlp)
        sums.slopes.append(slope)
        sums.xhat.append(xhat)

    def _contract(
        self,
        layers: list[_LayerSums],
        logits: Tensor,
        raw: tuple[Tensor, ...],
        graph: Graph,
        per_pair: bool,
        per_position: bool,
        collect: Callable[[Tensor, slice], None],
    ) -> None:
        count, width = self.pairs.clean.shape
        readers_per_layer = self.cmap.n_heads + 2 * self.cmap.n_kv_heads + 1
        cost = (len(graph.writers) + readers_per_layer) * width * self.cmap.d_model
        size = max(1, min(count, _CONTRACTION_ELEMENTS // cost))
        for start in range(0, count, size):
            pair = slice(start, min(start + size, count))
            token = slice(pair.start * width, pair.stop * width)
            n = pair.stop - pair.start
            deltas = torch.empty(len(graph.writers), n * width, self.cmap.d_model)
            deltas[0] = (self.clean.embed[pair] - self.corrupt.embed[pair]).flatten(0, 1).float()
            out = torch.zeros(n if per_pair else 1, width if per_position else 1, *graph.exists.shape)

            def put(
                readers: slice,
                writers: int,
                gradient: Float[Tensor, "reader token d_model"],
                out: Tensor = out,
                deltas: Tensor = deltas,
            ) -> None:
                product = _product(deltas[:writers], gradient, width, per_pair, per_position)
                out[:, :, :writers, readers] += product

            heads, column, done = self.cmap.n_heads, 0, 1
            for i, sums in enumerate(layers):
                attention = self._pulled_back(i, sums, token)
                before_heads = done
                put(slice(column, column + attention.shape[0]), before_heads, attention)
                column += attention.shape[0]
                self._head_deltas(i, pair, raw[i][token] if raw else None, deltas[done : done + heads])
                done += heads
                assert sums.mlp is not None
                seen = before_heads if self.cmap.parallel else done
                put(slice(column, column + 1), seen, sums.mlp[token][None])
                column += 1
                deltas[done] = (self.clean.mlp_out[i][pair] - self.corrupt.mlp_out[i][pair]).flatten(0, 1).float()
                done += 1
            put(slice(column, column + 1), done, logits[token][None])
            collect(out, pair)

    def _pulled_back(self, i: int, sums: _LayerSums, token: slice) -> Float[Tensor, "reader token d_model"]:
        weights, norm = self.weights[i], self.norms[i]
        scaled = torch.cat([weights.q, weights.k, weights.v]).float() * norm.weight.float()
        assert sums.ghat is not None
        out = sums.ghat[token].transpose(0, 1) @ scaled
        if norm.kind == "layer":
            out -= out.mean(-1, keepdim=True)
        slopes = torch.stack([s[token] for s in sums.slopes], 1)
        xhat = torch.stack([x[token] for x in sums.xhat], 1)
        return out - torch.einsum("tsr,tsd->rtd", slopes, xhat)

    def _head_deltas(self, i: int, pair: slice, raw: Tensor | None, out: Float[Tensor, "head token d_model"]) -> None:
        z = (self.clean.z[i][pair] - self.corrupt.z[i][pair]).flatten(0, 1).float()
        torch.matmul(z.transpose(0, 1), self.weights[i].o.float().transpose(1, 2), out=out)
        if raw is not None:
            norm = norm_weights(self.model, i, "attn_post")
            xhat, scale = _normalized(raw, norm)
            slope = (out * xhat).mean(-1, keepdim=True)
            out.copy_((out - xhat * slope) / scale[:, None] * norm.weight.float())


def _normalized(x: Float[Tensor, "token d_model"], norm: NormWeights) -> tuple[Tensor, Tensor]:
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    scale = (x.square().mean(-1) + norm.eps).sqrt()
    return x / scale[:, None], scale


def _offsets(weights: AttentionWeights, norm: NormWeights) -> Float[Tensor, "reader d_head"]:
    parts = []
    for name in ("q", "k", "v"):
        matrix, bias = getattr(weights, name), getattr(weights, f"{name}_bias")
        offset = torch.zeros(matrix.shape[:2], device=matrix.device) if bias is None else bias.float()
        parts.append(offset if norm.bias is None else offset + matrix.float() @ norm.bias.float())
    return torch.cat(parts)


def _product(
    deltas: Float[Tensor, "writer token d_model"],
    gradient: Float[Tensor, "reader token d_model"],
    width: int,
    per_pair: bool,
    per_position: bool,
) -> Float[Tensor, "pair pos writer reader"]:
    if not per_pair and not per_position:
        return (deltas.flatten(1) @ gradient.flatten(1).T)[None, None]
    a, b = deltas.unflatten(1, (-1, width)), gradient.unflatten(1, (-1, width))
    if per_pair and per_position:
        return torch.einsum("wbpd,rbpd->bpwr", a, b)
    if per_pair:
        return torch.einsum("wbpd,rbpd->bwr", a, b)[:, None]
    return torch.einsum("wbpd,rbpd->pwr", a, b)[None]
