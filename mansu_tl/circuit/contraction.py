"""The last step of edge attribution, where writers meet readers: <change of u, gradient at v>, for all edges."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit.graph import Graph
from mansu_tl.models import Anatomy, NormWeights, attention_weights, norm_weights


@dataclass
class Changes:
    """The writers' side: clean minus switched off, tokens flattened to one axis."""

    embed: Float[Tensor, "token d_model"]
    z: list[Float[Tensor, "token head d_head"]]
    mlp_out: list[Float[Tensor, "token d_model"]]


@dataclass
class LayerSlopes:
    """What one layer's readers gather over the points, tokens flattened to one axis.

    Attributes:
        ghat: sum of g / s over the points.
        slopes: per point <q - b, g> / (d_model s).
        xhat: per point the normalized input.
        mlp: the gradient at the MLP's input, summed.
    """

    ghat: Float[Tensor, "token reader d_head"]
    slopes: Float[Tensor, "token step reader"]
    xhat: Float[Tensor, "token step d_model"]
    mlp: Float[Tensor, "token d_model"]


@dataclass
class Slopes:
    """The readers' side: per layer, at the final norm's input, and (post-norm families) in front of the post-norm."""

    layers: list[LayerSlopes]
    final: Float[Tensor, "token d_model"]
    raw: list[Float[Tensor, "token d_model"]] = field(default_factory=list)


def normalized(x: Float[Tensor, "token d_model"], norm: NormWeights) -> tuple[Tensor, Tensor]:
    """The input of a norm divided by its scale (centred first by a LayerNorm), and that scale."""
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    scale = (x.square().mean(-1) + norm.eps).sqrt()
    return x / scale[:, None], scale


@dataclass(frozen=True)
class Contraction:
    """Step 3: scores of one batch, gathered into groups of tokens.

    Attributes:
        tokens: tokens whose vectors of d_model numbers exist at one time.
    """

    model: TransformerBridge
    graph: Graph
    tokens: int

    def scores(
        self, changes: Changes, gradients: list[Slopes], groups: Int[Tensor, " token"], n_groups: int
    ) -> Float[Tensor, "group writer reader"]:
        """Per group the sum of its tokens' scores; tokens of group -1 are left out."""
        anatomy = Anatomy.of(self.model)
        out = torch.zeros(n_groups, *self.graph.exists.shape, device=changes.embed.device)
        order = groups.sort(stable=True).indices
        order = order[groups[order] >= 0].to(changes.embed.device)
        size = max(1, min(self.tokens, len(order)))
        writers = torch.empty(len(self.graph.writers), size, anatomy.d_model, device=out.device)
        readers = torch.empty(anatomy.n_attention_readers, size, anatomy.d_model, device=out.device)
        for start in range(0, len(order), size):
            token = order[start : start + size]
            n = len(token)
            for part in gradients:
                self._add(out, token, groups[token.to(groups.device)], changes, part, writers[:, :n], readers[:, :n])
        return out

    def _add(
        self,
        out: Tensor,
        token: Tensor,
        groups: Tensor,
        changes: Changes,
        gradients: Slopes,
        writers: Float[Tensor, "writer token d_model"],
        readers: Float[Tensor, "reader token d_model"],
    ) -> None:
        names, counts = groups.unique_consecutive(return_counts=True)

        def put(count: int, columns: slice, gradient: Tensor) -> None:
            gradient = gradient.to(writers.device)
            target = out[:, :count, columns]
            if len(names) == 1:
                target[int(names[0])].addmm_(writers[:count].flatten(1), gradient.flatten(1).T)
            elif bool((counts == counts[0]).all()):
                a = writers[:count].unflatten(1, (len(names), -1)).transpose(0, 1).flatten(2)
                b = gradient.unflatten(1, (len(names), -1)).transpose(0, 1).flatten(2)
                target.index_add_(0, names.to(out.device), a @ b.transpose(1, 2))
            else:
                first = 0
                for name, n in zip(names.tolist(), counts.tolist(), strict=True):
                    a, b = writers[:count, first : first + n], gradient[:, first : first + n]
                    target[name] += a.flatten(1) @ b.flatten(1).T
                    first += n

        anatomy = Anatomy.of(self.model)
        heads = anatomy.n_heads
        self._write(writers[0], changes.embed[token])
        column, done = 0, 1
        for layer, sums in enumerate(gradients.layers):
            token_here = token.to(sums.ghat.device)
            before = done
            self._pull_back(layer, sums, token_here, readers)
            put(before, slice(column, column + readers.shape[0]), readers)
            column += readers.shape[0]
            self._push_out(layer, changes.z[layer][token_here], gradients, token_here, writers[done : done + heads])
            done += heads
            put(before if anatomy.parallel else done, slice(column, column + 1), sums.mlp[token_here][None])
            column += 1
            self._write(writers[done], changes.mlp_out[layer][token_here])
            done += 1
        put(done, slice(column, column + 1), gradients.final[token.to(gradients.final.device)][None])

    def _pull_back(
        self, layer: int, sums: LayerSlopes, token: Tensor, out: Float[Tensor, "reader token d_model"]
    ) -> None:
        """sum_i of the gradient at the norm's input, for every reader of a layer's attention."""
        weights, norm = attention_weights(self.model, layer), norm_weights(self.model, layer, "attn")
        ghat, start = sums.ghat[token].transpose(0, 1), 0
        local = out if out.device == ghat.device else out.to(ghat.device)
        for matrix in (weights.q, weights.k, weights.v):
            where = slice(start, start + matrix.shape[0])
            torch.bmm(ghat[where], matrix.float(), out=local[where])
            start += matrix.shape[0]
        local.mul_(norm.weight.float())
        slopes, xhat = sums.slopes[token].transpose(1, 2), sums.xhat[token]
        local.transpose(0, 1).baddbmm_(slopes, xhat, alpha=-1)
        if local is not out:
            out.copy_(local)

    def _push_out(
        self,
        layer: int,
        z: Float[Tensor, "token head d_head"],
        gradients: Slopes,
        token: Tensor,
        out: Float[Tensor, "head token d_model"],
    ) -> None:
        """The heads' changes as they arrive in the stream: through W_O, and the post-norm's Jacobian where there is one."""
        change = z.transpose(0, 1).float() @ attention_weights(self.model, layer).o.float().transpose(1, 2)
        if gradients.raw:
            norm = norm_weights(self.model, layer, "attn_post")
            xhat, scale = normalized(gradients.raw[layer][token], norm)
            slope = (change * xhat).mean(-1, keepdim=True)
            change = (change - xhat * slope) / scale[:, None] * norm.weight.float()
        self._write(out, change)

    def _write(self, out: Tensor, change: Tensor) -> None:
        out.copy_(change)
        if self.centred:
            # A LayerNorm's gradient is blind to the mean; taking it from the writers spares taking it from W'^T g.
            out -= out.mean(-1, keepdim=True)

    @property
    def centred(self) -> bool:
        """Whether the family's norms subtract the mean."""
        return norm_weights(self.model, 0, "attn").kind == "layer"
