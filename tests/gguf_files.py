"""Small GGUF files, written as llama.cpp's converter writes them: its names, orders of rows and offsets."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

_ARCH = {
    "llama": "llama",
    "mistral": "llama",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gpt_neox": "gptneox",
    "gpt2": "gpt2",
}
_COMMON = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down",
    "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_TOP = {
    "model.embed_tokens": "token_embd", "gpt_neox.embed_in": "token_embd", "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd", "model.norm": "output_norm", "gpt_neox.final_layer_norm": "output_norm",
    "transformer.ln_f": "output_norm", "lm_head": "output", "embed_out": "output",
}  # fmt: skip


def write_gguf(
    hf: PreTrainedModel,
    family: str,
    path: Path,
    kind: str = "F32",
    kinds: dict[str, str] | None = None,
    tokens: bool = True,
) -> Path:
    """Write a model of a family, its matrices in one number format, or in others by the piece of GGUF's name in `kinds`."""
    config, arch = hf.config, _ARCH.get(family, family)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.n_inner if family == "gpt2" else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if family in ("gpt2", "gpt_neox"):
        writer.add_layer_norm_eps(config.layer_norm_epsilon if family == "gpt2" else config.layer_norm_eps)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if family.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if family == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_rope_dimension_count(int(config.rotary_ndims if hasattr(config, "rotary_ndims") else 2))
    if tokens:
        _add_tokens(writer, config.vocab_size)
    state = {name: value.detach() for name, value in hf.named_parameters()}
    for name, value in state.items():
        theirs = _name(family, name)
        data = _converted(family, hf, name, value)
        wanted = next((k for piece, k in (kinds or {}).items() if piece in theirs), kind)
        number = gguf.GGMLQuantizationType[wanted if data.ndim == 2 else "F32"]
        writer.add_tensor(theirs, gguf.quantize(data, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _name(family: str, name: str) -> str:
    path, _, leaf = name.rpartition(".")
    if path in _TOP:
        return f"{_TOP[path]}.{leaf}"
    parts = path.split(".")
    layer = next(i for i, part in enumerate(parts) if part.isdigit())
    table = _COMMON | (_GEMMA if family.startswith("gemma") else {})
    return f"blk.{parts[layer]}.{table['.'.join(parts[layer + 1 :])]}.{leaf}"


def _converted(family: str, hf: PreTrainedModel, name: str, value: Tensor) -> np.ndarray:
    config, heads = hf.config, hf.config.num_attention_heads
    if family in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
        count = heads if "q_proj" in name else config.num_key_value_heads
        rows = value.shape[0] // count // 2
        value = value.reshape(count, 2, rows, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    if family.startswith("gemma") and name.endswith("norm.weight"):
        value = value + 1
    if family == "gpt_neox" and "query_key_value" in name:
        parts = value.reshape(heads, 3, value.shape[0] // heads // 3, *value.shape[1:])
        value = torch.cat([parts[:, i].reshape(-1, *value.shape[1:]) for i in range(3)])
    if family == "gpt2" and any(piece in name for piece in ("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        value = value.T
    return value.contiguous().numpy().astype(np.float32)


def _add_tokens(writer: gguf.GGUFWriter, count: int) -> None:
    letters = [*(chr(33 + i) for i in range(count - 4)), '!"']
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<pad>", "<s>", "</s>", *letters])
    writer.add_token_types([3, 3, 3, *([1] * len(letters))])
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
