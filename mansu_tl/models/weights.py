"""Weights by what they do, whatever the family calls them, read from the HF parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mansu_tl.errors import MansuError
from mansu_tl.models import library as bnb
from mansu_tl.models.families import Family
from mansu_tl.models.tree import Model, family, hf_of, modules, quantization_state, submodule


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
    config = hf_of(model).config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    o = submodule(model, f"{at}.{kind.o}")
    o_weight = _matrix(o, kind).unflatten(1, (heads, -1)).permute(1, 0, 2)
    if kind.qkv == "separate":
        sizes = (heads, kv_heads, kv_heads)
        parts = [submodule(model, f"{at}.{path}") for path in (kind.q, kind.k, kind.v)]
        matrices = [_matrix(m, kind).unflatten(0, (n, -1)) for m, n in zip(parts, sizes, strict=True)]
        biases = [None if b is None else b.unflatten(0, (n, -1)) for b, n in zip(map(_bias, parts), sizes, strict=True)]
    else:
        fused = submodule(model, f"{at}.{kind.q}")
        shape, axis = ((heads, 3, -1), 1) if kind.qkv == "interleaved" else ((3, heads, -1), 0)
        matrix, bias = _matrix(fused, kind), _bias(fused)
        matrices = list(matrix.unflatten(0, shape).unbind(axis))
        biases = [None] * 3 if bias is None else list(bias.unflatten(0, shape).unbind(axis))
    return AttentionWeights(
        q=matrices[0],
        k=matrices[1],
        v=matrices[2],
        o=o_weight,
        q_bias=biases[0],
        k_bias=biases[1],
        v_bias=biases[2],
        o_bias=_bias(o),
    )


def mlp_weights(model: Model, layer: int) -> MlpWeights:
    """The MLP weights of a layer: detached views of the HF parameters (4-bit weights are dequantized copies).

    Raises:
        MansuError: as `attention_weights`.
    """
    kind, at = _layer(model, layer)
    gate = None if kind.gate is None else submodule(model, f"{at}.{kind.gate}")
    up, down = submodule(model, f"{at}.{kind.up}"), submodule(model, f"{at}.{kind.down}")
    return MlpWeights(
        None if gate is None else _matrix(gate, kind),
        _matrix(up, kind),
        _matrix(down, kind),
        None if gate is None else _bias(gate),
        _bias(up),
        _bias(down),
    )


def norm_weights(
    model: Model, layer: int | None, which: Literal["attn", "mlp", "attn_post", "mlp_post", "final"]
) -> NormWeights:
    """A norm in front of attention or MLP, behind them (gemma), or the final one (`layer` is then ignored).

    Raises:
        MansuError: no such norm or layer.
    """
    kind = family(model)
    paths = {
        "attn": kind.attn_norm,
        "mlp": kind.mlp_norm,
        "attn_post": kind.attn_post_norm,
        "mlp_post": kind.mlp_post_norm,
        "final": kind.final_norm,
    }
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
