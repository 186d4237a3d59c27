"""The last step of edge attribution, where writers meet readers: <change of u, gradient at v>, for all edges."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit.graph import Graph
from mansu_tl.models import Anatomy, NormWeights, attention_weights, norm_weights

# At most so many products of one batch stand for one over all of their tokens.
_PIECES = 16


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
        layers: layers whose readers share a product.
        dtype: of the products' operands; their sums are float32.
        wrote: the model whose writers changed, where that is another one than whose readers' gradients are met.
    """

    model: TransformerBridge
    graph: Graph
    tokens: int
    layers: int = 1
    dtype: torch.dtype = torch.float32
    wrote: TransformerBridge | None = None

    def scores(
        self, changes: Changes, gradients: list[Slopes], groups: Int[Tensor, " token"], n_groups: int
    ) -> Float[Tensor, "group writer reader"]:
        """Per group the sum of its tokens' scores; tokens of group -1 are left out.

        Where there is no edge, numbers without a meaning stand.
        """
        anatomy, on = Anatomy.of(self.model), changes.embed.device
        out = torch.zeros(n_groups, *self.graph.exists.shape, device=on)
        order = groups.sort(stable=True).indices
        order = order[groups[order] >= 0]
        size = max(1, min(self.tokens, len(order)))
        rows = (len(self.graph.writers), self.layers * (anatomy.n_attention_readers + 1) + 1)
        writers, readers = (torch.empty(n, size, anatomy.d_model, device=on, dtype=self.dtype) for n in rows)
        start = 0
        while start < len(order):
            # In whole pieces, as far as they go (see `Tokens.add`).
            count = min(size, len(order) - start)
            token = order[start : start + (count - count % _PIECES or count)]
            start += len(token)
            cut, at = Tokens.of(groups[token]), token.to(on)
            for part in gradients:
                self._add(out, at, cut, changes, part, writers[:, : len(at)], readers[:, : len(at)])
        return out

    def _add(
        self,
        out: Float[Tensor, "group writer reader"],
        token: Int[Tensor, " token"],
        cut: Tokens,
        changes: Changes,
        gradients: Slopes,
        writers: Float[Tensor, "writer token d_model"],
        readers: Float[Tensor, "row token d_model"],
    ) -> None:
        """The scores of some tokens, a few layers at a time; their readers are taken with all that is written so far."""
        heads, wide, n_layers = Anatomy.of(self.model).n_heads, len(self.graph.readers), len(gradients.layers)
        self._write(writers[0], changes.embed[token])
        column, row, done = 0, 0, 1
        for layer, sums in enumerate(gradients.layers):
            token_here = token.to(sums.ghat.device)
            count = sums.ghat.shape[1]
            self._pull_back(layer, sums, token_here, readers[row : row + count])
            readers[row + count].copy_(sums.mlp[token_here])
            row += count + 1
            self._push_out(layer, changes.z[layer][token_here], gradients, token_here, writers[done : done + heads])
            self._write(writers[done + heads], changes.mlp_out[layer][token_here])
            done += heads + 1
            if layer == n_layers - 1:
                readers[row].copy_(gradients.final[token.to(gradients.final.device)])
                row += 1
            elif (layer + 1) % self.layers:
                continue
            cut.add(out[:, :done, column : column + row], writers[:done], readers[:row])
            column, row = column + row, 0
        assert column == wide

    def _pull_back(
        self, layer: int, sums: LayerSlopes, token: Tensor, out: Float[Tensor, "reader token d_model"]
    ) -> None:
        """sum_i of the gradient at the norm's input, for every reader of a layer's attention."""
        weights, norm = attention_weights(self.model, layer), norm_weights(self.model, layer, "attn")
        ghat, start = sums.ghat[token].to(self.dtype).transpose(0, 1), 0
        local = out if out.device == ghat.device else out.to(ghat.device)
        for matrix in (weights.q, weights.k, weights.v):
            where = slice(start, start + matrix.shape[0])
            torch.bmm(ghat[where], matrix.to(self.dtype), out=local[where])
            start += matrix.shape[0]
        local.mul_(norm.weight)
        slopes, xhat = sums.slopes[token].to(self.dtype).transpose(1, 2), sums.xhat[token]
        local.transpose(0, 1).baddbmm_(slopes, xhat.to(self.dtype), alpha=-1)
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
        change = z.transpose(0, 1).to(self.dtype)
        o = attention_weights(self.wrote or self.model, layer).o.to(self.dtype)
        if not gradients.raw and out.device == change.device:
            torch.bmm(change, o.transpose(1, 2), out=out)
            self._centre(out)
            return
        change = change @ o.transpose(1, 2)
        if gradients.raw:
            norm = norm_weights(self.model, layer, "attn_post")
            xhat, scale = normalized(gradients.raw[layer][token], norm)
            change = change.float()
            slope = (change * xhat).mean(-1, keepdim=True)
            change = (change - xhat * slope) / scale[:, None] * norm.weight
        self._write(out, change)

    def _write(self, out: Tensor, change: Tensor) -> None:
        out.copy_(change)
        self._centre(out)

    def _centre(self, out: Float[Tensor, "... d_model"]) -> None:
        """Take the mean from writers, if the norms do: their gradient is blind to it, so W'^T g may keep its own."""
        if norm_weights(self.model, 0, "attn").kind == "layer":
            out -= out.mean(-1, keepdim=True)


@dataclass(frozen=True)
class Tokens:
    """Tokens that follow each other group by group.

    Attributes:
        names: the groups.
        counts: tokens of each.
    """

    names: Int[Tensor, " part"]
    counts: list[int]

    @classmethod
    def of(cls, groups: Int[Tensor, " token"]) -> Tokens:
        """The tokens with these groups."""
        names, counts = groups.unique_consecutive(return_counts=True)
        return cls(names, counts.tolist())

    def add(
        self,
        out: Float[Tensor, "group writer reader"],
        writers: Float[Tensor, "writer token d_model"],
        readers: Float[Tensor, "reader token d_model"],
    ) -> None:
        """Add <writer, reader>, summed over the tokens of a group, to each group's part."""
        if len(self.counts) == 1 and writers.device.type != "cuda" and writers.dtype == torch.float32:
            out[int(self.names[0])].addmm_(writers.flatten(1), readers.flatten(1).T)
        elif len(set(self.counts)) == 1:
            # In pieces: a product of few rows and columns over many tokens keeps a GPU busy only as a batch.
            pieces = len(self.names) * math.gcd(self.counts[0], _PIECES)
            a, b = (side.unflatten(1, (pieces, -1)).transpose(0, 1).flatten(2) for side in (writers, readers))
            parts = _product(a, b).unflatten(0, (len(self.names), -1)).sum(1)
            out.index_add_(0, self.names.to(out.device), parts)
        else:
            first = 0
            for name, n in zip(self.names.tolist(), self.counts, strict=True):
                of = slice(first, first + n)
                out[name] += _product(writers[None, :, of].flatten(2), readers[None, :, of].flatten(2))[0]
                first += n


def _product(
    a: Float[Tensor, "piece writer number"], b: Float[Tensor, "piece reader number"]
) -> Float[Tensor, "piece writer reader"]:
    """a b^T with float32 sums, on tensor cores where the operands are 16 bits wide and a GPU has them."""
    if a.dtype != torch.float32 and a.device.type == "cuda":
        return torch.bmm(a, b.transpose(1, 2), out_dtype=torch.float32)
    return a.float() @ b.float().transpose(1, 2)
