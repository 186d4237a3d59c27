"""What edge attribution needs from the model: the writers' changes, and the readers' gradients summed over the steps.

Gradients are taken at each projection's output (q, k, v of d_head numbers) rather than at a per-head copy of its
input. With x^ the normalized input, s its scale, w the norm's weight, W' = W diag(w), b the projection's bias (the
norm's included), the gradient at the norm's input is, for step i,

    ( W'^T g_i - mean(W'^T g_i) [LayerNorm only] - x^_i <q_i - b, g_i> / d_model ) / s_i,

so sum_i g_i / s_i is all that has to be kept, with a correction of rank `steps`; `contraction.py` pulls it back once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import PromptPairs
from mansu_tl.models import Anatomy, AttentionWeights, NormWeights, attention_weights, norm_weights
from mansu_tl.runs.ablation import Ablation
from mansu_tl.runs.metrics import Metric
from mansu_tl.runs.passes import Hook, heads_last, keep, measured, run


@dataclass
class LayerSums:
    """What one layer's readers gather over the steps, tokens flattened to one axis.

    Attributes:
        ghat: sum of g / s over the steps.
        slopes: per step <q - b, g> / (d_model s).
        xhat: per step the normalized input.
        mlp: the gradient at the MLP's input, summed.
    """

    ghat: Float[Tensor, "token reader d_head"]
    slopes: Float[Tensor, "token step reader"]
    xhat: Float[Tensor, "token step d_model"]
    mlp: Float[Tensor, "token d_model"]


@dataclass
class Gradients:
    """The readers' side: per layer, at the final norm's input, and (post-norm families) in front of the post-norm."""

    layers: list[LayerSums]
    final: Float[Tensor, "token d_model"]
    raw: list[Tensor] = field(default_factory=list)


@dataclass
class Changes:
    """The writers' side: clean minus ablated, tokens flattened to one axis; and the metric at both ends."""

    embed: Float[Tensor, "token d_model"]
    z: list[Float[Tensor, "token head d_head"]]
    mlp_out: list[Float[Tensor, "token d_model"]]
    metric_clean: Float[Tensor, " pair"]
    metric_other: Float[Tensor, " pair"]


@dataclass
class _End:
    embed: Tensor
    z: list[Tensor]
    mlp_out: list[Tensor]
    metric: Tensor


class Gatherer:
    """Both ends and all steps of one batch of pairs.

    An end at which a gradient is wanted is recorded in that pass and not run twice. Only the last token's logits are
    measured, so the last block's MLP runs at that position alone and the other positions of the final stream are not
    those of a plain run.
    """

    def __init__(
        self,
        model: TransformerBridge,
        anatomy: Anatomy,
        pairs: PromptPairs,
        metric: Metric,
        ablation: Ablation,
        tick: Callable[[], object],
    ) -> None:
        self.model, self.anatomy, self.pairs, self.metric, self.tick = model, anatomy, pairs, metric, tick
        self.ablation = ablation
        self.rows = torch.arange(len(pairs), device=pairs.clean.device)
        self.last = pairs.lengths - 1
        self.norms = [norm_weights(model, layer, "attn") for layer in range(anatomy.n_layers)]
        self.offsets = [_offsets(attention_weights(model, i), self.norms[i]) for i in range(anatomy.n_layers)]

    def gather(self, alphas: list[float]) -> tuple[Changes, list[Gradients]]:
        """The changes and the gradients: one `Gradients` for all steps, or one a step in post-norm families."""
        fused = not self.anatomy.post_norms
        ends: dict[float, _End] = {}
        both = self.ablation.kind == "corrupt"
        for end in (1.0, 0.0) if both else (1.0,):
            if not fused or end not in alphas:
                ends[end] = self._record(end)
        out: list[Gradients] = []
        self.sums: list[LayerSums] = []
        # The ends first: the steps between them need both embeddings.
        for i, alpha in enumerate(sorted(alphas, key=lambda a: a not in (0.0, 1.0))):
            if not fused:
                i, self.sums = 0, []
            steps = len(alphas) if fused else 1
            result = self._step(alpha, i, steps, 1 / len(alphas), ends)
            if fused and out:
                out[0].final.add_(result.final)
            else:
                out.append(result)
            self.tick()
        return self._changes(ends, both), out

    @torch.no_grad()
    def _record(self, end: float) -> _End:
        kept: dict[str, Tensor] = {}
        tokens = self.pairs.clean if end else self.pairs.corrupt
        hooks: list[Hook] = [("blocks.0.hook_in", keep(kept, "embed")), *self._writer_hooks(kept)]
        hooks.append((f"blocks.{self.anatomy.n_layers - 1}.ln2.hook_in", self._last_only({}, "")))
        logits = run(self.model, tokens, self.pairs.lengths, hooks).float()
        return self._end(kept, measured(self.metric, logits, self.pairs))

    def _step(self, alpha: float, i: int, steps: int, share: float, ends: dict[float, _End]) -> Gradients:
        """One forward and backward at an interpolated embedding."""
        kept: dict[str, Tensor] = {}
        record = alpha in (0.0, 1.0) and alpha not in ends
        point = None
        if not record and alpha != 1.0:
            point = ends[0.0].embed + alpha * (ends[1.0].embed - ends[0.0].embed)
        elif not record:
            point = ends[1.0].embed

        def start(stream: Tensor, hook: object) -> Tensor:
            kept["embed"] = (stream if point is None else point).detach().requires_grad_()
            return kept["embed"]

        n = self.anatomy.n_layers
        hooks: list[Hook] = [("blocks.0.hook_in", start), ("ln_final.hook_in", _branch(kept, "final"))]
        for layer in range(n):
            block = f"blocks.{layer}"
            hooks += [(f"{block}.attn.{r}.hook_out", keep(kept, f"{r}{layer}")) for r in "qkv"]
            hooks.append((f"{block}.ln1.hook_in", keep(kept, f"x{layer}")))
            mlp = self._last_only(kept, f"m{layer}") if layer == n - 1 else _branch(kept, f"m{layer}")
            hooks.append((f"{block}.ln2.hook_in", mlp))
            if self.anatomy.post_norms:
                hooks.append((f"{block}.ln1_post.hook_in", keep(kept, f"raw{layer}")))
        if record:
            hooks += self._writer_hooks(kept)
        tokens = self.pairs.corrupt if alpha == 0.0 else self.pairs.clean
        with torch.enable_grad():
            logits = run(self.model, tokens, self.pairs.lengths, hooks).float()
            values = measured(self.metric, logits, self.pairs)
            wanted = ["final"] + [f"{r}{layer}" for layer in range(n) for r in "qkvm"]
            grads = dict(zip(wanted, torch.autograd.grad(values.sum(), [kept[k] for k in wanted]), strict=True))
        if record:
            ends[alpha] = self._end(kept, values.detach())
        if not self.sums:
            self.sums = [self._empty(steps, kept[f"x{layer}"]) for layer in range(n)]
        for layer in range(n):
            self._add(layer, i, share, kept, grads)
        final = grads["final"].flatten(0, 1).float() * share
        raw = [kept[f"raw{layer}"].detach().flatten(0, 1).float() for layer in range(n) if self.anatomy.post_norms]
        return Gradients(self.sums, final, raw)

    def _empty(self, steps: int, like: Tensor) -> LayerSums:
        anatomy, tokens = self.anatomy, like.shape[0] * like.shape[1]
        readers = anatomy.n_heads + 2 * anatomy.n_kv_heads
        return LayerSums(
            ghat=torch.zeros(tokens, readers, anatomy.d_head, device=like.device),
            slopes=torch.zeros(tokens, steps, readers, device=like.device),
            xhat=torch.empty(tokens, steps, anatomy.d_model, device=like.device),
            mlp=torch.zeros(tokens, anatomy.d_model, device=like.device),
        )

    def _add(self, layer: int, step: int, share: float, kept: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
        sums, anatomy = self.sums[layer], self.anatomy
        xhat, scale = normalized(kept[f"x{layer}"].detach().flatten(0, 1).float(), self.norms[layer])
        sums.xhat[:, step] = xhat
        inverse = share / scale
        start = 0
        for r, heads in (("q", anatomy.n_heads), ("k", anatomy.n_kv_heads), ("v", anatomy.n_kv_heads)):
            value = kept.pop(f"{r}{layer}").detach().reshape(-1, heads, anatomy.d_head).float()
            grad = grads.pop(f"{r}{layer}").reshape(-1, heads, anatomy.d_head).float()
            where = slice(start, start + heads)
            sums.ghat[:, where].addcmul_(grad, inverse[:, None, None])
            slope = torch.linalg.vecdot(value - self.offsets[layer][where], grad)
            sums.slopes[:, step, where] = slope * (inverse / anatomy.d_model)[:, None]
            start += heads
        grad = grads.pop(f"m{layer}").float()
        mlp = sums.mlp.unflatten(0, (len(self.pairs), -1))
        if layer == anatomy.n_layers - 1:
            mlp[self._last_of(mlp)] += grad[:, 0] * share
        else:
            mlp.add_(grad, alpha=share)

    def _writer_hooks(self, kept: dict[str, Tensor]) -> list[Hook]:
        out = "ln2_post.hook_out" if self.anatomy.post_norms else "mlp.hook_out"
        hooks: list[Hook] = []
        for layer in range(self.anatomy.n_layers):
            hooks.append((f"blocks.{layer}.attn.o.hook_in", keep(kept, f"z{layer}")))
            hooks.append((f"blocks.{layer}.{out}", keep(kept, f"out{layer}")))
        return hooks

    def _last_only(self, kept: dict[str, Tensor], key: str) -> Callable[..., Tensor]:
        def hook_fn(stream: Tensor, hook: object) -> Tensor:
            kept[key] = stream[self._last_of(stream)][:, None].contiguous()
            return kept[key]

        return hook_fn

    def _last_of(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The index of every row's last token, on the tensor's device."""
        return self.rows.to(tensor.device), self.last.to(tensor.device)

    def _end(self, kept: dict[str, Tensor], metric: Tensor) -> _End:
        n = self.anatomy.n_layers
        z = [heads_last(kept[f"z{i}"].detach(), self.anatomy.n_heads).flatten(0, 1) for i in range(n)]
        mlp_out = [kept[f"out{i}"].detach().flatten(0, 1) for i in range(n)]
        return _End(kept["embed"].detach(), z, mlp_out, metric)

    def _changes(self, ends: dict[float, _End], both: bool) -> Changes:
        clean = ends.pop(1.0)
        last = torch.zeros(*self.pairs.clean.shape, self.anatomy.d_model, device=clean.mlp_out[-1].device)
        if both:
            other = ends.pop(0.0)
        else:
            ablated = self.ablation.activations(self.model, self.pairs)
            z = [value.flatten(0, 1) for value in ablated.z]
            mlp_out = [value.flatten(0, 1) for value in ablated.mlp_out[:-1]]
            mlp_out.append(ablated.mlp_out[-1][self._last_of(ablated.mlp_out[-1])])
            other = _End(ablated.embed, z, mlp_out, measured(self.metric, ablated.logits, self.pairs))
        last[self._last_of(last)] = (clean.mlp_out[-1] - other.mlp_out[-1]).float()
        return Changes(
            embed=(clean.embed - other.embed).flatten(0, 1),
            z=[a - b for a, b in zip(clean.z, other.z, strict=True)],
            mlp_out=[*(a - b for a, b in zip(clean.mlp_out[:-1], other.mlp_out[:-1], strict=True)), last.flatten(0, 1)],
            metric_clean=clean.metric,
            metric_other=other.metric,
        )


def normalized(x: Float[Tensor, "token d_model"], norm: NormWeights) -> tuple[Tensor, Tensor]:
    """The input of a norm divided by its scale (centred first by a LayerNorm), and that scale."""
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    scale = (x.square().mean(-1) + norm.eps).sqrt()
    return x / scale[:, None], scale


def _branch(kept: dict[str, Tensor], key: str) -> Callable[..., Tensor]:
    def hook_fn(stream: Tensor, hook: object) -> Tensor:
        # A view of its own: the gradient at the stream itself would count the skip path too.
        kept[key] = stream.view_as(stream)
        return kept[key]

    return hook_fn


def _offsets(weights: AttentionWeights, norm: NormWeights) -> Float[Tensor, "reader d_head"]:
    parts = []
    for name in ("q", "k", "v"):
        matrix, bias = getattr(weights, name), getattr(weights, f"{name}_bias")
        offset = torch.zeros(matrix.shape[:2], device=matrix.device) if bias is None else bias.float()
        parts.append(offset if norm.bias is None else offset + matrix.float() @ norm.bias.float())
    return torch.cat(parts)
