"""The map from components (heads, MLPs, neurons) to slices of HF parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int64
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.models.families import FAMILIES, Family
from mansu_tl.models.tree import Model, family, hf_of, submodule

_COMPONENT = re.compile(
    r"L(?P<layer>\d+)(H(?P<head>\d+)(\.(?P<part>[qo]))?|KV(?P<kv>\d+)\.(?P<kv_part>[kv]))|MLP(?P<mlp>\d+)(\.N(?P<neuron>\d+))?"
)


@dataclass(frozen=True)
class WeightSlice:
    """A contiguous range of one dimension of an HF parameter, whole in the others."""

    parameter: str
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class ComponentMap:
    """What a model is made of and where each part's weights lie; holds no weights.

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

    def slices(self, component: str) -> tuple[WeightSlice, ...]:
        """The parameter slices that belong to a component.

        `L3H2.q`, `L3H2.o`, `L3KV1.k`, `L3KV1.v`, `L3H2` (q and o), `MLP3` (all of it), `MLP3.N17` (a neuron: gate
        and up row, down column). Biases come with the rows they are added to; the biases of attention's and a
        neuron's output belong to no single head or neuron, so only `MLP3` holds its down bias.

        Raises:
            MansuError: no such component.
        """
        found = _COMPONENT.fullmatch(component)
        if found is None:
            raise self._unknown(component)
        kind = next(f for f in FAMILIES if f.name == self.family)
        number = {key: int(value) for key, value in found.groupdict().items() if value is not None and value.isdigit()}
        limits = {"head": self.n_heads, "kv": self.n_kv_heads, "neuron": self.d_mlp}
        layer = number["mlp"] if "mlp" in number else number["layer"]
        if layer >= self.n_layers or any(number[key] >= limit for key, limit in limits.items() if key in number):
            raise self._unknown(component)
        at = f"{kind.layers}.{layer}"
        if "mlp" in number:
            return self._mlp(kind, at, number.get("neuron"))
        if "kv" in number:
            return self._rows(kind, at, found["kv_part"], number["kv"])
        q, o = self._rows(kind, at, "q", number["head"]), self._output(kind, at, number["head"])
        return {"q": q, "o": o, None: q + o}[found["part"]]

    def _rows(self, kind: Family, at: str, part: str, head: int) -> tuple[WeightSlice, ...]:
        i = "qkv".index(part)
        block = {"separate": head, "interleaved": 3 * head + i, "blocked": i * self.n_heads + head}[kind.qkv]
        path = {"q": kind.q, "k": kind.k, "v": kind.v}[part]
        return self._range(kind, f"{at}.{path}", block * self.d_head, (block + 1) * self.d_head)

    def _output(self, kind: Family, at: str, head: int) -> tuple[WeightSlice, ...]:
        dim = 0 if kind.transposed else 1
        return (WeightSlice(f"{at}.{kind.o}.weight", dim, head * self.d_head, (head + 1) * self.d_head),)

    def _mlp(self, kind: Family, at: str, neuron: int | None) -> tuple[WeightSlice, ...]:
        start, stop = (0, self.d_mlp) if neuron is None else (neuron, neuron + 1)
        out: tuple[WeightSlice, ...] = ()
        for path in (kind.gate, kind.up):
            if path is not None:
                out += self._range(kind, f"{at}.{path}", start, stop)
        out += (WeightSlice(f"{at}.{kind.down}.weight", 0 if kind.transposed else 1, start, stop),)
        bias = f"{at}.{kind.down}.bias"
        if neuron is None and bias in self.biases:
            out += (WeightSlice(bias, 0, 0, self.d_model),)
        return out

    def _range(self, kind: Family, path: str, start: int, stop: int) -> tuple[WeightSlice, ...]:
        """Output rows of a matrix, and of its bias where there is one."""
        rows = WeightSlice(f"{path}.weight", 1 if kind.transposed else 0, start, stop)
        return (rows, WeightSlice(f"{path}.bias", 0, start, stop)) if f"{path}.bias" in self.biases else (rows,)

    def _unknown(self, component: str) -> MansuError:
        sizes = f"{self.n_layers} layers, {self.n_heads} heads, {self.n_kv_heads} KV heads, {self.d_mlp} neurons"
        forms = "L0H0, L0H0.q, L0H0.o, L0KV0.k, L0KV0.v, MLP0, MLP0.N0"
        return MansuError(f"component {component!r}: unknown; names are {forms}, and this model has {sizes}")


def component_map(model: Model) -> ComponentMap:
    """The map of a model's components; reads the config and looks which biases exist.

    Raises:
        MansuError: the family is not supported.
    """
    kind, config = family(model), hf_of(model).config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    d_model = config.hidden_size
    writers, readers = ["embed"], []
    for i in range(layers):
        writers += [f"L{i}H{h}" for h in range(heads)] + [f"MLP{i}"]
        readers += [f"L{i}H{h}.q" for h in range(heads)]
        readers += [f"L{i}KV{h}.k" for h in range(kv_heads)] + [f"L{i}KV{h}.v" for h in range(kv_heads)]
        readers.append(f"MLP{i}.in")
    paths = {kind.q, kind.k, kind.v, kind.o, kind.up, kind.down} | ({kind.gate} if kind.gate else set())
    return ComponentMap(
        family=kind.name,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_head=getattr(config, "head_dim", None) or d_model // heads,
        d_model=d_model,
        d_mlp=getattr(config, kind.mlp_width) or 4 * d_model,
        parallel=kind.parallel is not None and bool(getattr(config, kind.parallel)),
        post_norms=kind.attn_post_norm is not None,
        writers=tuple(writers),
        readers=(*readers, "logits"),
        biases=frozenset(
            f"{kind.layers}.{i}.{path}.bias"
            for i in range(layers)
            for path in paths
            if submodule(model, f"{kind.layers}.{i}.{path}")._parameters.get("bias") is not None
        ),
    )


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
