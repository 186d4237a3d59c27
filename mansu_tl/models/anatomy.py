"""The anatomy of a model: its sizes, its components' names, where their weights lie, and the hook of every role.

The one place that spells TransformerLens's hook points. All of them exist without any flag of a bridge.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.models.families import Family, registered
from mansu_tl.models.tree import Model, family, hf_of, submodule

_KEPT = "_mansu_tl_anatomy"
_COMPONENT = re.compile(
    r"L(?P<layer>\d+)(H(?P<head>\d+)(\.(?P<part>[qo]))?|KV(?P<kv>\d+)\.(?P<kv_part>[kv]))|MLP(?P<mlp>\d+)(\.N(?P<neuron>\d+))?"
)
# What passes where, inside a block. A head's q, k, v: before any q/k norm and rotary embedding.
_ROLES = {
    "attn_norm_in": "ln1.hook_in",
    "attn_in": "attn.hook_in",
    **{r: f"attn.{r}.hook_out" for r in "qkv"},
    **{f"{r}_in": f"attn.{r}.hook_in" for r in "qkv"},
    "pattern": "attn.hook_pattern",
    "z": "attn.o.hook_in",
    "attn_raw": "attn.hook_out",
    "attn_out": "attn.hook_out",
    "mlp_in": "ln2.hook_in",  # the MLP branch only, not the skip path
    "neurons": "mlp.out.hook_in",
    "mlp_out": "mlp.hook_out",
}
# What families with norms behind attention and MLP add to the stream, and what they put through the first of these.
_POST_NORM_ROLES = {"attn_raw": "ln1_post.hook_in", "attn_out": "ln1_post.hook_out", "mlp_out": "ln2_post.hook_out"}
UNEMBED = "unembed.hook_in"


@dataclass(frozen=True)
class WeightSlice:
    """A contiguous range of one dimension of an HF parameter, whole in the others."""

    parameter: str
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of, where each part's weights lie and which hook sees what; holds no weights.

    Attributes:
        family: name of the family.
        n_layers, n_heads, n_kv_heads, d_head, d_model, d_mlp: sizes.
        parallel: attention and MLP of a layer read the same stream.
        post_norms: attention and MLP outputs pass a norm before they are added to the stream.
        writers: embed, then per layer the heads and the MLP, in order of computation.
        readers: per layer all q, all k, all v, the MLP; last `logits`.
        biases: HF names of the bias parameters of attention and MLP.
    """

    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    parallel: bool
    post_norms: bool
    writers: tuple[str, ...] = field(repr=False)
    readers: tuple[str, ...] = field(repr=False)
    biases: frozenset[str] = field(repr=False)

    @classmethod
    def of(cls, model: Model) -> Anatomy:
        """The anatomy of a model, hooked or not, from its config and from which biases exist; kept beside the model.

        Raises:
            MansuError: the family is not supported.
        """
        kept: dict[str, Any] = hf_of(model).__dict__
        if _KEPT not in kept:
            kept[_KEPT] = _anatomy(model)
        return kept[_KEPT]

    @property
    def layers(self) -> range:
        """The numbers of the layers."""
        return range(self.n_layers)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.n_heads // self.n_kv_heads

    @property
    def heads_of(self) -> dict[str, int]:
        """Heads of a layer that have a "q", a "k", a "v"."""
        return {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads}

    @property
    def n_attention_readers(self) -> int:
        """Readers of a layer's attention: all q, k and v."""
        return self.n_heads + 2 * self.n_kv_heads

    def hook(self, role: str, layer: int) -> str:
        """The hook point that sees what has this role in a layer.

        Args:
            role: "stream" in front of the block (of layer `n_layers`: in front of the final norm); "attn_norm_in",
                "attn_in", "q_in", "k_in", "v_in", "q", "k", "v", "pattern", "z"; "attn_raw" and "attn_out", the
                attention's output in front of and behind a post-norm; "mlp_in", "neurons", "mlp_out".
        """
        if role == "stream":
            return f"blocks.{layer}.hook_in" if layer < self.n_layers else "ln_final.hook_in"
        behind_norm = _POST_NORM_ROLES.get(role) if self.post_norms else None
        return f"blocks.{layer}.{behind_norm or _ROLES[role]}"

    def hooks(self, *roles: str) -> dict[str, str]:
        """The hook points of some roles in every layer, by role and layer: "z0", "z1", ...; "stream" ends with the final
        norm's input."""
        count = {"stream": self.n_layers + 1}
        return {f"{role}{i}": self.hook(role, i) for role in roles for i in range(count.get(role, self.n_layers))}

    def slices(self, component: str) -> tuple[WeightSlice, ...]:
        """The parameter slices that belong to a component.

        `L3H2.q`, `L3H2.o`, `L3KV1.k`, `L3KV1.v`, `L3H2` (q and o), `MLP3` (all of it), `MLP3.N17` (a neuron: gate
        and up row, down column). Biases come with the rows they are added to; the biases of attention's and a
        neuron's output belong to no single head or neuron, so only `MLP3` holds its down bias.

        Raises:
            MansuError: no such component.
        """
        parsed = _COMPONENT.fullmatch(component)
        if parsed is None:
            raise self._unknown(component)
        kind = registered(self.family)
        number = {key: int(value) for key, value in parsed.groupdict().items() if value is not None and value.isdigit()}
        limits = {"head": self.n_heads, "kv": self.n_kv_heads, "neuron": self.d_mlp}
        layer = number["mlp"] if "mlp" in number else number["layer"]
        if layer >= self.n_layers or any(number[key] >= limit for key, limit in limits.items() if key in number):
            raise self._unknown(component)
        at = f"{kind.layers}.{layer}"
        if "mlp" in number:
            return self._mlp(kind, at, number.get("neuron"))
        if "kv" in number:
            return self._projection(kind, at, parsed["kv_part"], number["kv"])
        q, head = self._projection(kind, at, "q", number["head"]), number["head"]
        o = (WeightSlice(f"{at}.{kind.o}.weight", _input(kind), head * self.d_head, (head + 1) * self.d_head),)
        return {"q": q, "o": o, None: q + o}[parsed["part"]]

    def _projection(self, kind: Family, at: str, part: str, head: int) -> tuple[WeightSlice, ...]:
        i = "qkv".index(part)
        block = {"separate": head, "interleaved": 3 * head + i, "blocked": i * self.n_heads + head}[kind.qkv]
        path = {"q": kind.q, "k": kind.k, "v": kind.v}[part]
        return self._rows(kind, f"{at}.{path}", block * self.d_head, (block + 1) * self.d_head)

    def _mlp(self, kind: Family, at: str, neuron: int | None) -> tuple[WeightSlice, ...]:
        start, stop = (0, self.d_mlp) if neuron is None else (neuron, neuron + 1)
        rows = [self._rows(kind, f"{at}.{path}", start, stop) for path in (kind.gate, kind.up) if path is not None]
        columns = WeightSlice(f"{at}.{kind.down}.weight", _input(kind), start, stop)
        bias = f"{at}.{kind.down}.bias"
        whole = (WeightSlice(bias, 0, 0, self.d_model),) if neuron is None and bias in self.biases else ()
        return (*(piece for pieces in rows for piece in pieces), columns, *whole)

    def _rows(self, kind: Family, path: str, start: int, stop: int) -> tuple[WeightSlice, ...]:
        """Output rows of a matrix, and of its bias where there is one."""
        rows = WeightSlice(f"{path}.weight", 1 - _input(kind), start, stop)
        return (rows, WeightSlice(f"{path}.bias", 0, start, stop)) if f"{path}.bias" in self.biases else (rows,)

    def _unknown(self, component: str) -> MansuError:
        sizes = f"{self.n_layers} layers, {self.n_heads} heads, {self.n_kv_heads} KV heads, {self.d_mlp} neurons"
        forms = "L0H0, L0H0.q, L0H0.o, L0KV0.k, L0KV0.v, MLP0, MLP0.N0"
        return MansuError(f"component {component!r}: unknown; names are {forms}, and this model has {sizes}")


def _input(kind: Family) -> int:
    """The dimension of a stored matrix along which its inputs lie."""
    return 0 if kind.transposed else 1


def _anatomy(model: Model) -> Anatomy:
    kind, config = family(model), hf_of(model).config
    layers, heads, d_model = range(config.num_hidden_layers), config.num_attention_heads, config.hidden_size
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    writers, readers = graph_names(len(layers), heads, kv_heads)
    paths = {kind.q, kind.k, kind.v, kind.o, kind.up, kind.down} | ({kind.gate} if kind.gate else set())
    linear = [f"{kind.layers}.{i}.{path}" for i in layers for path in paths]
    return Anatomy(
        family=kind.name,
        n_layers=len(layers),
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_head=getattr(config, "head_dim", None) or d_model // heads,
        d_model=d_model,
        d_mlp=getattr(config, kind.mlp_width) or 4 * d_model,
        parallel=kind.parallel is not None and bool(getattr(config, kind.parallel)),
        post_norms=kind.attn_post_norm is not None,
        writers=writers,
        readers=readers,
        biases=frozenset(
            f"{path}.bias" for path in linear if submodule(model, path)._parameters.get("bias") is not None
        ),
    )


def graph_names(layers: int, heads: int, kv_heads: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of all writers and readers of a model of this shape, in order of computation."""
    writers, readers = ["embed"], []
    for i in range(layers):
        writers += [*(f"L{i}H{h}" for h in range(heads)), f"MLP{i}"]
        readers += [f"L{i}H{h}.q" for h in range(heads)]
        readers += [f"L{i}KV{h}.{part}" for part in "kv" for h in range(kv_heads)] + [f"MLP{i}.in"]
    return tuple(writers), (*readers, "logits")


def flat_indices(piece: WeightSlice, shape: Sequence[int]) -> Int64[Tensor, " index"]:
    """The flat (row-major) indices of a slice in a parameter of this shape, ascending.

    Raises:
        MansuError: the slice does not fit the shape.
    """
    if not 0 <= piece.dim < len(shape) or not 0 <= piece.start <= piece.stop <= shape[piece.dim]:
        raise MansuError(f"{piece.parameter}: {piece} does not fit shape {tuple(shape)}; use the model it was made for")
    inner, outer = math.prod(shape[piece.dim + 1 :]), math.prod(shape[: piece.dim])
    block = torch.arange(piece.start * inner, piece.stop * inner)
    return (torch.arange(outer)[:, None] * (shape[piece.dim] * inner) + block).reshape(-1)
