"""Weights by what they do, whatever the family calls them, read from the HF parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mansu_tl.errors import MansuError
from mansu_tl.models import library as bnb
from mansu_tl.models.anatomy import Anatomy
from mansu_tl.models.families import Family
from mansu_tl.models.tree import Model, family, hf_of, modules, parameters, quantization_state, submodule


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's attention, head by head; projections as [out, in]."""

    q: Float[Tensor, "head d_head d_model"]
    k: Float[Tensor, "kv_head d_head d_model"]
    v: Float[Tensor, "kv_head d_head d_model"]
    o: Float[Tensor, "head d_model d_head"]
    q_bias: Float[Tensor, "head d_head"] | None
    k_bias: Float[Tensor, "kv_head d_head"] | None
    v_bias: Float[Tensor, "kv_head d_head"] | None
    o_bias: Float[Tensor, " d_model"] | None


@dataclass(frozen=True)
class MlpWeights:
    """One layer's MLP, matrices as [out, in]; `gate` is None for a plain MLP."""

    gate: Float[Tensor, "d_mlp d_model"] | None
    up: Float[Tensor, "d_mlp d_model"]
    down: Float[Tensor, "d_model d_mlp"]
    gate_bias: Float[Tensor, " d_mlp"] | None
    up_bias: Float[Tensor, " d_mlp"] | None
    down_bias: Float[Tensor, " d_model"] | None


@dataclass(frozen=True)
class NormWeights:
    """A norm: "rms" or "layer", the weight that really multiplies (gemma: 1 + the stored one), bias, epsilon.

    Weight and bias are float32 whatever the model's dtype, because 1 + w would be rounded in bfloat16.
    """

    kind: Literal["rms", "layer"]
    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"] | None
    eps: float


@dataclass(frozen=True)
class LinearWeight:
    """A matrix that 4-bit loading quantizes; `transposed` = a dense model stores it as [in, out]."""

    name: str
    out_features: int
    in_features: int
    transposed: bool


def attention_weights(model: Model, layer: int) -> AttentionWeights:
    """The attention weights of a layer: detached views of the HF parameters (4-bit weights are dequantized copies).

    Raises:
        MansuError: no such layer, or a 4-bit weight that bitsandbytes has repacked for its CPU kernel.
    """
    kind, at = _layer(model, layer)
    anatomy = Anatomy.of(model)
    o = submodule(model, f"{at}.{kind.o}")
    if kind.qkv == "separate":
        parts = [submodule(model, f"{at}.{path}") for path in (kind.q, kind.k, kind.v)]
        counts = list(anatomy.heads_of.values())
        matrices = [_matrix(m, kind).unflatten(0, (n, -1)) for m, n in zip(parts, counts, strict=True)]
        biases = [
            None if b is None else b.unflatten(0, (n, -1)) for b, n in zip(map(_bias, parts), counts, strict=True)
        ]
    else:
        fused = submodule(model, f"{at}.{kind.q}")
        matrices, bias = list(kind.fused_parts(_matrix(fused, kind), anatomy.n_heads)), _bias(fused)
        biases = [None] * 3 if bias is None else list(kind.fused_parts(bias, anatomy.n_heads))
    o_heads = _matrix(o, kind).unflatten(1, (anatomy.n_heads, -1)).permute(1, 0, 2)
    (q, k, v), (q_bias, k_bias, v_bias) = matrices, biases
    return AttentionWeights(q, k, v, o_heads, q_bias, k_bias, v_bias, _bias(o))


def mlp_weights(model: Model, layer: int) -> MlpWeights:
    """The MLP weights of a layer: detached views of the HF parameters (4-bit weights are dequantized copies).

    Raises:
        MansuError: as `attention_weights`.
    """
    kind, at = _layer(model, layer)
    layers = [None if path is None else submodule(model, f"{at}.{path}") for path in (kind.gate, kind.up, kind.down)]
    matrices = [None if layer is None else _matrix(layer, kind) for layer in layers]
    return MlpWeights(*matrices, *(None if layer is None else _bias(layer) for layer in layers))  # type: ignore[arg-type]


def norm_weights(
    model: Model, layer: int | None, which: Literal["attn", "mlp", "attn_post", "mlp_post", "final"]
) -> NormWeights:
    """A norm in front of attention or MLP, behind them (gemma), or the final one (`layer` is then ignored).

    Raises:
        MansuError: no such norm or layer.
    """
    kind = family(model)
    kinds = ("attn", "mlp", "attn_post", "mlp_post", "final")
    paths: dict[str, str | None] = {name: getattr(kind, f"{name}_norm") for name in kinds}
    path = paths.get(which)
    if path is None:
        have = ", ".join(name for name, value in paths.items() if value is not None)
        raise MansuError(f"norm {which!r}: {kind.name} has {have}; choose one of them")
    if which != "final":
        if layer is None:
            raise MansuError(f"norm {which!r}: layer is None; say which layer")
        path = f"{_layer(model, layer)[1]}.{path}"
    module = submodule(model, path)
    weight = module._parameters["weight"]
    assert weight is not None
    effective = weight.detach().float()
    bias = _bias(module)
    return NormWeights(
        kind.norm,
        effective + kind.norm_offset if kind.norm_offset else effective,
        None if bias is None else bias.float(),
        float(getattr(hf_of(model).config, kind.eps)),
    )


def linear_weights(model: Model) -> dict[str, LinearWeight]:
    """The matrices that 4-bit loading quantizes, by HF parameter name: every linear layer but the output embedding."""
    kind = family(model)
    out: dict[str, LinearWeight] = {}
    for path, module in modules(model):
        if path == kind.head or not isinstance(module, nn.Linear | Conv1D):
            continue
        name = f"{path}.weight"
        if isinstance(module, Conv1D):
            out[name] = LinearWeight(name, module.nf, module.nx, transposed=True)
        else:
            # A 4-bit layer is an nn.Linear even where the dense model has a Conv1D.
            out[name] = LinearWeight(name, module.out_features, module.in_features, transposed=kind.transposed)
    return out


def orient(value: Shaped[Tensor, "rows columns"], linear: LinearWeight) -> Shaped[Tensor, "rows2 columns2"]:
    """A stored matrix, or a mask over it, as [out, in], or back.

    GPT-2's `Conv1D` stores [in, out], and quantizers see it transposed.

    Raises:
        MansuError: the value is not of the matrix's size.
    """
    oriented = (linear.out_features, linear.in_features)
    if tuple(value.shape) not in (oriented, oriented[::-1]):
        raise MansuError(f"{linear.name}: value has shape {tuple(value.shape)}, expected {oriented} or its transpose")
    return value.T if linear.transposed else value


def component_masks(
    model: Model, components: Iterable[str], names: Collection[str] | None = None
) -> dict[str, Bool[Tensor, ...]]:
    """The linear weights of some components (see `Anatomy.slices`), one mask for each HF parameter that holds any.

    Args:
        names: the parameters that are asked for; None = all.

    Raises:
        MansuError: no such component.
    """
    anatomy, values = Anatomy.of(model), parameters(model)
    asked = linear_weights(model).keys() & (parameters(model) if names is None else names)
    masks: dict[str, Tensor] = {}
    for piece in (piece for name in components for piece in anatomy.slices(name) if piece.parameter in asked):
        mask = masks.setdefault(piece.parameter, torch.zeros_like(values[piece.parameter], dtype=torch.bool))
        mask.narrow(piece.dim, piece.start, piece.stop - piece.start).fill_(True)
    return masks


def _layer(model: Model, layer: int) -> tuple[Family, str]:
    kind, count = family(model), hf_of(model).config.num_hidden_layers
    if not 0 <= layer < count:
        raise MansuError(f"layer {layer}: this model has layers 0..{count - 1}")
    return kind, f"{kind.layers}.{layer}"


def _matrix(module: nn.Module, kind: Family) -> Float[Tensor, "out in"]:
    """A layer's weight as [out, in]."""
    weight = module._parameters["weight"]
    assert weight is not None
    state = quantization_state(weight)
    if state is not None:
        return bnb.functional.dequantize_4bit(weight.data, state)
    if not weight.is_floating_point():
        raise MansuError(
            f"weight of {type(module).__name__}: packed as {weight.dtype}; pass the dense model or its twin"
        )
    return weight.detach().T if kind.transposed else weight.detach()


def _bias(module: nn.Module) -> Float[Tensor, " out"] | None:
    bias = module._parameters.get("bias")
    return None if bias is None else bias.detach()
