"""Hugging Face names on a bridged model.

A bridge wraps modules of the HF model in place and hangs its own aliases beside them: `q_proj` becomes
`_original_component.q_proj._original_component` and is reachable as `q` too. Following `_original_component` wherever
there is one, and nothing beside it, gives back exactly the tree of the HF model. gpt_neox's fused `query_key_value`
is found the same way; the q, k and v that its bridge computes with are copies beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from mansu_tl.errors import MansuError
from mansu_tl.models.families import Family, family_of
from mansu_tl.models.kinds import adapter_layer, require_bridge, way_to_load

_WRAPPED = "_original_component"
_NAMES = "_mansu_tl_parameter_names"

Model = TransformerBridge | PreTrainedModel


def hf_of(model: Model) -> PreTrainedModel:
    """The Hugging Face model itself, wrapped by a bridge or not."""
    if isinstance(model, PreTrainedModel):
        return model
    require_bridge(model)
    inside: Any = model.original_model
    return inside


def family(model: Model) -> Family:
    """The family of a model."""
    source = hf_of(model)
    return family_of(source.config, type(source).__name__)


def unwrap(module: nn.Module) -> nn.Module:
    """The HF module inside a bridge component; any other module as it is."""
    while _WRAPPED in module._modules:
        inner = module._modules[_WRAPPED]
        assert inner is not None
        module = inner
    return module


def layer_of(model: Model, name: str) -> int | None:
    """The number of the layer that a parameter of some HF name lies in; None in front of the layers and behind them."""
    inside = f"{family(model).layers}."
    return int(name.removeprefix(inside).split(".")[0]) if name.startswith(inside) else None


def submodule(model: Model, path: str) -> nn.Module:
    """The HF module at an HF path, bridged or not."""
    module = unwrap(hf_of(model))
    for part in path.split("."):
        child = module._modules.get(part)
        if child is None:
            raise MansuError(f"{path}: this model has no such module; load it with mansu_tl.load")
        module = unwrap(child)
    return module


def modules(model: Model) -> Iterator[tuple[str, nn.Module]]:
    """HF modules by HF name, parents before children."""
    return _walk(hf_of(model), "")


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    module = unwrap(module)
    yield name, module
    for part, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{part}" if name else part)


def buffers(model: Model) -> dict[str, Tensor]:
    """Buffers by HF name."""
    return {_join(n, k): b for n, m in modules(model) for k, b in m._buffers.items() if b is not None}


def blank(model: Model) -> PreTrainedModel:
    """A model of the same config on the meta device: names, shapes and ties, no values, no random numbers drawn."""
    source = hf_of(model)
    config = copy.deepcopy(source.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return type(source)(config)


def tied_names(model: Model) -> list[list[str]]:
    """Parameter names of a fresh model of the same config, tied ones together, in HF's order; kept beside the model."""
    kept: dict[str, Any] = hf_of(model).__dict__
    if _NAMES not in kept:
        names: dict[int, list[str]] = {}
        for name, parameter in blank(model).named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        kept[_NAMES] = list(names.values())
    return kept[_NAMES]


def parameters(model: Model) -> dict[str, Tensor]:
    """The live HF parameters under a bridge, by HF name; tied weights once, under their first name.

    Names and order are those of `named_parameters()` of a fresh HF model of the same config. A 4-bit model gives its
    packed weights. For gpt_neox the fused `query_key_value` is what counts; the bridge computes with split copies of
    it, so change values with `mansu_tl.rebuild`, never in place.

    Raises:
        MansuError: the bridge's weights were folded or untied (compatibility mode), or a name cannot be found.
    """
    if isinstance(model, TransformerBridge) and getattr(model, "_weights_processed", False):
        raise MansuError(
            "model: its weights were folded (enable_compatibility_mode or process_weights), so they are no longer "
            "those of the HF model; load it with mansu_tl.load"
        )
    family(model)
    live = {_join(n, k): p for n, m in modules(model) for k, p in m._parameters.items() if p is not None}
    out: dict[str, Tensor] = {}
    for names in tied_names(model):
        for name in names:
            if name not in live:
                if adapter_layer(hf_of(model)) is not None:
                    raise MansuError(f"model: {way_to_load(hf_of(model))}")
                raise MansuError(f"{name}: not found in this model; load it with mansu_tl.load")
            if live[name] is not live[names[0]]:
                raise MansuError(
                    f"{name}: no longer tied to {names[0]}, as the config says; load it with mansu_tl.load"
                )
        out[names[0]] = live[names[0]]
    return out


def quantization_state(parameter: Tensor) -> Any | None:
    """The bitsandbytes state of a 4-bit weight; None for a dense one."""
    state = getattr(parameter, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise MansuError(
            "4-bit weight: bitsandbytes repacked it for its CPU kernel; set support_avx512bf16_for_cpu = False on "
            "every Linear4bit right after loading, before the first forward"
        )
    return state


def require_in_step(model: Model) -> None:
    """Refuse a gpt_neox bridge whose split q, k, v copies differ from the fused weight they were made from."""
    if not isinstance(model, TransformerBridge) or family(model).qkv != "interleaved":
        return
    kind, heads = family(model), hf_of(model).config.num_attention_heads
    for layer, block in enumerate(model.blocks):
        path = f"{kind.layers}.{layer}.{kind.q}"
        for leaf, fused in submodule(model, path)._parameters.items():
            for part, rows in zip("qkv", () if fused is None else kind.fused_parts(fused, heads), strict=False):
                copied = unwrap(getattr(block.attn, part))._parameters.get(leaf)
                if copied is not None and not torch.equal(rows, copied.reshape(rows.shape)):
                    raise MansuError(
                        f"{path}.{leaf}: differs from the bridge's own copy of its {part} rows, one of them was edited "
                        "in place; change values with mansu_tl.rebuild"
                    )


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf
