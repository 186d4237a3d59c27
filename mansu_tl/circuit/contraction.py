"""The one place where writers meet readers: <change of u, gradient at v>, for all edges, token by token.

Head changes and pulled-back gradients of d_model numbers exist only for a few tokens at a time, built layer by layer
from what `gradients.py` kept in d_head numbers; so the memory of this step does not grow with the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit.gradients import Changes, Gradients, LayerSums, normalized
from mansu_tl.circuit.graph import Graph
from mansu_tl.models import Anatomy, attention_weights, norm_weights


@dataclass(frozen=True)
class Contraction:
    """Scores of one batch, gathered into groups of tokens.

    Attributes:
        tokens: tokens whose vectors of d_model numbers exist at one time.
    """

    model: TransformerBridge
    anatomy: Anatomy
    graph: Graph
    tokens: int

    def scores(
        self, changes: Changes, gradients: list[Gradients], groups: Int[Tensor, " token"], n_groups: int
    ) -> Float[Tensor, "group writer reader"]:
        """Per group the sum of its tokens' scores; tokens of group -1 are left out."""
        out = torch.zeros(n_groups, *self.graph.exists.shape, device=changes.embed.device)
        order = groups.sort(stable=True).indices
        order = order[groups[order] >= 0].to(changes.embed.device)
        size = max(1, min(self.tokens, len(order)))
        writers = torch.empty(len(self.graph.writers), size, self.anatomy.d_model, device=out.device)
        readers = torch.empty(self._attention_readers, size, self.anatomy.d_model, device=out.device)
        for start in range(0, len(order), size):
            token = order[start : start + size]
            n = len(token)
            for part in gradients:
                self._add(out, token, groups[token.to(groups.device)], changes, part, writers[:, :n], readers[:, :n])
        return out

    @property
    def _attention_readers(self) -> int:
        return self.anatomy.n_heads + 2 * self.anatomy.n_kv_heads

    def _add(
        self,
        out: Tensor,
        token: Tensor,
        groups: Tensor,
        changes: Changes,
        gradients: Gradients,
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

        heads = self.anatomy.n_heads
        self._write(writers[0], changes.embed[token])
        column, done = 0, 1
        for layer, sums in enumerate(gradients.layers):
            there = token.to(sums.ghat.device)
            before = done
            self._pull_back(layer, sums, there, readers)
            put(before, slice(column, column + readers.shape[0]), readers)
            column += readers.shape[0]
            self._push_out(layer, changes.z[layer][there], gradients, there, writers[done : done + heads])
            done += heads
            put(before if self.anatomy.parallel else done, slice(column, column + 1), sums.mlp[there][None])
            column += 1
            self._write(writers[done], changes.mlp_out[layer][there])
            done += 1
        put(done, slice(column, column + 1), gradients.final[token.to(gradients.final.device)][None])

    def _pull_back(
        self, layer: int, sums: LayerSums, token: Tensor, out: Float[Tensor, "reader token d_model"]
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
        gradients: Gradients,
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
