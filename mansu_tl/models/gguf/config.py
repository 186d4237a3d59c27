"""A GGUF file's head as a Hugging Face config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from gguf import MODEL_ARCH
from transformers import AutoConfig, PretrainedConfig

from mansu_tl.errors import MansuError
from mansu_tl.models.gguf.file import GgufFile

# llama.cpp's architecture -> `model_type` in config.json, and the architecture under which `gguf` knows its tensors' names.
ARCHITECTURES: Mapping[str, tuple[str, MODEL_ARCH]] = {
    "llama": ("llama", MODEL_ARCH.LLAMA),
    "gemma2": ("gemma2", MODEL_ARCH.GEMMA2),
    "gemma3": ("gemma3_text", MODEL_ARCH.GEMMA3),
    "qwen3": ("qwen3", MODEL_ARCH.QWEN3),
    "gptneox": ("gpt_neox", MODEL_ARCH.GPTNEOX),
    "gpt2": ("gpt2", MODEL_ARCH.GPT2),
}
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "rope.freq_base": "rope_theta",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "use_parallel_residual": "use_parallel_residual",
}
_GPT2 = {
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "layer_norm_eps": "layer_norm_epsilon",
}
_SPECIAL = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
    "tokenizer.ggml.unknown_token_id": "unk_token_id",
}
# Layers of the Gemmas of 27 B, which alone divide their scores by the root of d_model / heads instead of d_head.
_LARGE_GEMMAS = {"gemma2": 46, "gemma3": 62}
# What Llama 3.1 (8) and 3.2 (32) stretch their rotary wave lengths by; a GGUF keeps only the result, tensor rope_freqs.
_LLAMA3_FACTORS = (8.0, 32.0)


def read_config(file: GgufFile) -> PretrainedConfig:
    """The config of the model in a file.

    Raises:
        MansuError: an architecture that is not read here, a head that lacks a size, or rotary embeddings that the config
            cannot be told.
    """
    arch = file.architecture
    if arch not in ARCHITECTURES:
        raise MansuError(
            f"{file.path}: holds a model of architecture {arch!r}; those that can be read are {', '.join(ARCHITECTURES)}"
        )
    try:
        return _config(file)
    except KeyError as key:
        raise MansuError(f"{file.path}: its head does not say {key}; the file is broken, convert it again") from None


def _config(file: GgufFile) -> PretrainedConfig:
    arch = file.architecture
    head, (model_type, _) = file.metadata, ARCHITECTURES[arch]
    values: dict[str, Any] = {
        ours: head[f"{arch}.{theirs}"] for theirs, ours in _SIZES.items() if f"{arch}.{theirs}" in head
    }
    values |= {ours: head[theirs] for theirs, ours in _SPECIAL.items() if theirs in head}
    if "token_embd.weight" not in file.tensors:
        raise MansuError(f"{file.path}: has no tensor token_embd.weight; it is no language model")
    values["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if arch == "llama":
        values.setdefault("head_dim", head.get("llama.rope.dimension_count", width // heads))
        values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if arch == "gptneox":
        values["rotary_pct"] = head["gptneox.rope.dimension_count"] / (width // heads)
        values.pop("num_key_value_heads", None)
    if arch == "gpt2":
        values = {_GPT2.get(key, key): value for key, value in values.items() if key != "num_key_value_heads"}
    if arch in _LARGE_GEMMAS:
        large = values["num_hidden_layers"] == _LARGE_GEMMAS[arch]
        values["query_pre_attn_scalar"] = width // heads if large else values["head_dim"]
    _add_scaling(file, values)
    config = AutoConfig.for_model(model_type, **values)
    config.architectures = None
    return config


def _add_scaling(file: GgufFile, values: dict[str, Any]) -> None:
    """How rotary embeddings are stretched, where they are."""
    arch, head = file.architecture, file.metadata
    kind = head.get(f"{arch}.rope.scaling.type", "none")
    if kind == "linear":
        factor = head[f"{arch}.rope.scaling.factor"]
        if arch == "gemma3":
            values["rope_parameters"] = {
                "full_attention": {"rope_type": "linear", "factor": factor, "rope_theta": values["rope_theta"]},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            }
        else:
            values["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind != "none":
        raise MansuError(
            f"{file.path}: rotary embeddings scaled by {kind!r} are not read; use the model's own checkpoint"
        )
    if "rope_freqs.weight" in file.tensors:
        values["rope_scaling"] = _llama3(file, values)


def _llama3(file: GgufFile, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of Llama 3's rotary embeddings whose stretches are those in the file."""
    stored = file.data("rope_freqs.weight").view(torch.float32).flatten()
    size = values["head_dim"]
    waves = 2 * math.pi * values["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    low, high, context = 1.0, 4.0, 8192
    for factor in _LLAMA3_FACTORS:
        smooth = (context / waves - low) / (high - low)
        middle = 1 / ((1 - smooth) / factor + smooth)
        stretches = torch.where(waves < context / high, 1.0, torch.where(waves > context / low, factor, middle))
        if torch.allclose(stored.double(), stretches, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    raise MansuError(f"{file.path}: stretches its rotary embeddings as no Llama 3 does; use the model's own checkpoint")
