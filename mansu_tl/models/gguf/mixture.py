"""Which number format llama.cpp gives each tensor of a model: what "Q4_K_M" means (llama-quant.cpp, no importance matrix)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from gguf import get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mansu_tl.errors import MansuError
from mansu_tl.models.gguf.config import ARCHITECTURES
from mansu_tl.models.tree import Model, hf_of, parameters
from mansu_tl.models.weights import linear_weights

# What a tensor is stored as whose rows the blocks of 256 do not divide; F16 where blocks of 32 do not either.
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# Beside vectors, biases and norms.
_NEVER = ("position_embd.weight",)


def fallback(kind: str, columns: int) -> str:
    """The number format that rows of so many weights get where this one is wanted."""
    for each in (kind, _FALLBACK.get(kind, kind)):
        if columns % GGML_QUANT_SIZES[GGMLQuantizationType[each]][0] == 0:
            return each
    return "F16"


def q4_k_m(model: Model) -> dict[str, str]:
    """The number format of every matrix in a Q4_K_M file of this model, by HF parameter name; others stay as they are.

    Q6_K for the output embedding (the token embedding where the two are tied), and for the value (or fused q, k and v) and
    down projections of the first and the last eighth of the layers and every third in between; Q4_K for the rest; and
    `fallback` of these where the rows are no multiple of 256. llama.cpp's rule as of 2026 (llama-cpp-python 0.3.36).

    Raises:
        MansuError: a model of an architecture whose GGUF names are not known here.
    """
    config = hf_of(model).config
    known = dict(ARCHITECTURES.values())
    if config.model_type not in known:
        raise MansuError(
            f"Q4_K_M: no GGUF names known for models of type {config.model_type!r}; those that are: {', '.join(known)}"
        )
    layers = config.num_hidden_layers
    names = get_tensor_name_map(known[config.model_type], layers)
    theirs = {
        name: names.get_name(name, try_suffixes=(".weight", ".bias")) or ""
        for name, value in parameters(model).items()
        if value.ndim == 2
    }
    many = layers == 80 and config.model_type == "llama" and config.num_key_value_heads < config.num_attention_heads
    linear, live = linear_weights(model), parameters(model)
    return {
        # Blocks run along the input features.
        name: fallback(
            _wanted(tensor, theirs, layers, many), linear[name].in_features if name in linear else live[name].shape[1]
        )
        for name, tensor in theirs.items()
        if tensor.endswith(".weight") and tensor not in _NEVER
    }


def _wanted(tensor: str, all_tensors: Mapping[str, str], layers: int, many: bool) -> str:
    """What a tensor would get if its rows were long enough."""
    if tensor == "output.weight" or (tensor == "token_embd.weight" and "output.weight" not in all_tensors.values()):
        return "Q6_K"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor)
    if match is None:
        return "Q4_K"
    layer, what = int(match[1]), match[2]
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    if what in ("attn_v", "attn_qkv", "ffn_down") and more:
        return "Q6_K"
    # Eight query heads of Llama 70B share a value head, so that it costs little.
    return "Q5_K" if what == "attn_v" and many else "Q4_K"
