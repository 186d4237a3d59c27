"""The model families: one row of names each, so that nothing else in the package asks which family it has.

Another family that TransformerLens can hook is one more row: `register_family(Family(...))`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mansu_tl.errors import MansuError
from mansu_tl.registry import Registry

_ROTARY = r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$"


@dataclass(frozen=True)
class Family:
    """Where one family keeps what; module paths are Hugging Face's, inside a layer unless they say otherwise.

    Attributes:
        name: how this package calls the family.
        model_type: `model_type` in config.json.
        architecture: name of the transformers class.
        layers: path of the list of layers, from the top.
        q, k, v, o: attention projections; the same path three times where they are fused.
        qkv: "separate" matrices; "interleaved" = fused outputs [head, (q, k, v), d_head]; "blocked" = fused outputs
            [(q, k, v), head, d_head].
        gate, up, down: MLP matrices; `gate` is None for a plain MLP.
        attn_norm, mlp_norm: the norms in front of attention and MLP.
        attn_post_norm, mlp_post_norm: norms behind them, or None.
        final_norm: path from the top.
        head: the output embedding, path from the top.
        norm: "rms" or "layer".
        norm_offset: added to the stored norm weight before it multiplies.
        eps: config field of the norms' epsilon.
        mlp_width: config field of the MLP's width; empty in the config means 4 d_model.
        transposed: matrices are stored [in, out] (transformers' Conv1D).
        parallel: config field that makes attention and MLP read the same stream, or None.
        refused: config fields and the values with which TransformerLens 4.3 fails or computes something else.
        buffers: what old checkpoints hold besides weights (causal masks, rotary tables), as patterns of HF names. The
            model makes its own, and neither transformers nor this package reads them.
    """

    name: str
    model_type: str
    architecture: str
    layers: str = "model.layers"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    qkv: Literal["separate", "interleaved", "blocked"] = "separate"
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attn_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None
    final_norm: str = "model.norm"
    head: str = "lm_head"
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    eps: str = "rms_norm_eps"
    mlp_width: str = "intermediate_size"
    transposed: bool = False
    parallel: str | None = None
    refused: tuple[tuple[str, bool], ...] = ()
    buffers: tuple[str, ...] = (_ROTARY,)

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The transformers class."""
        return getattr(transformers, self.architecture)

    def is_old_buffer(self, name: str) -> bool:
        """Whether a name in a checkpoint is a buffer of old versions, no weight."""
        return any(re.search(pattern, name) for pattern in self.buffers)

    def fused_parts(self, fused: Tensor, heads: int) -> tuple[Tensor, ...]:
        """q, k and v, head by head, of a fused matrix oriented [out, in], or of its bias."""
        shape, axis = ((heads, 3, -1), 1) if self.qkv == "interleaved" else ((3, heads, -1), 0)
        return fused.unflatten(0, shape).unbind(axis)


def _gemma(name: str, model_type: str, architecture: str) -> Family:
    return Family(
        name,
        model_type,
        architecture,
        mlp_norm="pre_feedforward_layernorm",
        attn_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        norm_offset=1.0,
    )


_FAMILIES = Registry[Family]("family")


def register_family(family: Family) -> None:
    """Let models of one more family be loaded.

    Raises:
        MansuError: another family has that name.
    """
    _FAMILIES.add(family.name, family)


def families() -> tuple[Family, ...]:
    """The families that can be loaded."""
    return tuple(_FAMILIES.values())


def registered(name: str) -> Family:
    """The family of that name, which some model has."""
    return _FAMILIES[name]


for _family in (
    Family("llama", "llama", "LlamaForCausalLM"),
    Family("mistral", "mistral", "MistralForCausalLM"),
    Family("qwen3", "qwen3", "Qwen3ForCausalLM"),
    _gemma("gemma2", "gemma2", "Gemma2ForCausalLM"),
    _gemma("gemma3", "gemma3_text", "Gemma3ForCausalLM"),
    Family(
        "gpt_neox",
        "gpt_neox",
        "GPTNeoXForCausalLM",
        layers="gpt_neox.layers",
        q="attention.query_key_value",
        k="attention.query_key_value",
        v="attention.query_key_value",
        o="attention.dense",
        qkv="interleaved",
        gate=None,
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        final_norm="gpt_neox.final_layer_norm",
        norm="layer",
        eps="layer_norm_eps",
        parallel="use_parallel_residual",
        refused=(("attention_bias", False),),
        buffers=(r"\.attention\.(masked_)?bias$", _ROTARY),
    ),
    Family(
        "gpt2",
        "gpt2",
        "GPT2LMHeadModel",
        layers="transformer.h",
        q="attn.c_attn",
        k="attn.c_attn",
        v="attn.c_attn",
        o="attn.c_proj",
        qkv="blocked",
        gate=None,
        up="mlp.c_fc",
        down="mlp.c_proj",
        attn_norm="ln_1",
        mlp_norm="ln_2",
        final_norm="transformer.ln_f",
        norm="layer",
        eps="layer_norm_epsilon",
        mlp_width="n_inner",
        transposed=True,
        refused=(("scale_attn_weights", False), ("add_cross_attention", True)),
        buffers=(r"\.attn\.(masked_)?bias$",),
    ),
):
    register_family(_family)


def family_of(config: PretrainedConfig, architecture: str | None = None, source: str = "model") -> Family:
    """The family that a config (and a class name, where one is known) belongs to."""
    if architecture is None:
        named = getattr(config, "architectures", None) or []
        architecture = named[0] if named else None
    for family in families():
        if family.model_type == config.model_type and architecture in (None, family.architecture):
            for field, value in family.refused:
                if getattr(config, field, None) is value:
                    what = f"{family.name} with {field}={value}"
                    raise MansuError(f"{source}: {what} does not work in TransformerLens; use another model")
            return family
    known = ", ".join(f"{family.name} ({family.architecture})" for family in families())
    why = "".join(f"it {reason}; " for reason in _obstacles(config))
    raise MansuError(
        f"{source}: {why}architecture {architecture or '(none named)'} of model type {config.model_type!r} is not "
        f"supported; use one of {known}"
    )


def _obstacles(config: PretrainedConfig) -> list[str]:
    """What about a model does not fit a graph of heads and MLPs on one residual stream, as its config says."""
    parts = [config, getattr(config, "text_config", None)]
    facts = [vars(part) for part in parts if isinstance(part, PretrainedConfig)]

    def says(*names: str) -> bool:
        return any(fact.get(name) for fact in facts for name in names)

    kinds = {str(kind) for fact in facts for kind in fact.get("layer_types") or ()}
    obstacles = {
        "has an encoder beside the decoder, so two residual streams": says("is_encoder_decoder"),
        "is multimodal (save its language model as a causal one of its own)": says("vision_config", "audio_config"),
        "shares keys and values between layers, so that they belong to no one layer": says("num_kv_shared_layers"),
        "is a mixture of experts, whose MLPs are chosen token by token": says(
            "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"
        ),
        "has state-space or recurrent layers, which have no attention heads": says(
            "state_size", "ssm_state_size", "mamba_d_state", "lru_width"
        )
        or any("linear" in kind or "mamba" in kind or "recurrent" in kind for kind in kinds),
    }
    return [what for what, true in obstacles.items() if true]
