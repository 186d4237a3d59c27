"""Copies of models: plain HF models with the same or other values, and bridges over them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.utilities.multi_gpu import count_unique_devices
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models.cache import pass_cache_on
from mansu_tl.models.families import family_of
from mansu_tl.models.four_bit import compute_from_codes, packed, repack, require_dense, splitter
from mansu_tl.models.gguf import gguf_weights, remember
from mansu_tl.models.limits import require_memory
from mansu_tl.models.placement import placed_as
from mansu_tl.models.stored import remember_formats, stored_formats
from mansu_tl.models.tree import Model, blank, buffers, hf_of, parameters, require_in_step, tied_names


@torch_defaults()
def plain(model: Model) -> PreTrainedModel:
    """A fresh HF model of the same config with the same values in storage of its own: no bridge, eval, frozen, eager.

    For loops that need the model's speed rather than its hooks. Draws no random numbers.

    Raises:
        MansuError: folded, 4-bit or otherwise packed weights, or a gpt_neox bridge whose parts disagree.
    """
    require_dense(model, "a plain copy")
    return duplicate(model)


def float32_copy(model: Model) -> PreTrainedModel:
    """As `plain`, with float32 parameters: what training works on, whatever the model is stored in.

    In 16 bits an update smaller than the spacing of a weight's neighbours is lost, and Adam's epsilon is 0 in float16.

    Raises:
        MansuError: as `plain`.
    """
    return cast(plain(model), torch.float32)


@torch_defaults()
def rebuild(model: Model, values: Mapping[str, Tensor] | None = None) -> TransformerBridge:
    """A new bridge over a fresh HF model, with the named parameters replaced; the original is untouched.

    Args:
        values: new values by HF parameter name (see `parameters`), in a dtype that the parameter's own dtype holds
            exactly.

    Raises:
        MansuError: an unknown name, a wrong shape, a value that is not finite or that the parameter's dtype would
            round, or a model that `plain` refuses.
    """
    require_dense(model, "editing")
    fresh = duplicate(model, values or {})
    if isinstance(model, TransformerBridge):
        return boot(fresh, model.tokenizer, model.cfg.model_name)
    return boot(fresh, None, model.config.name_or_path or "model")


@torch_defaults()
def boot(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str) -> TransformerBridge:
    """A bridge around `hf`, which it takes over; frozen, in eval mode; the tokenizer object is used as it is."""
    hf.eval().requires_grad_(False)
    compute_from_codes(hf, name)
    kind = family_of(hf.config, type(hf).__name__)

    def prepare(adapter: Any) -> None:
        adapter.cfg.n_devices = count_unique_devices(hf)
        fused = kind.qkv != "separate" and any(path.endswith(f".{kind.q}") for path, _ in packed(hf))
        if fused:
            attention = adapter.component_mapping["blocks"].submodules["attn"]
            attention.split_qkv_matrix = splitter(kind, hf.config.num_attention_heads, attention.split_qkv_matrix)

    # TransformerLens initializes the split q, k, v of fused projections before it fills them.
    with _as_it_is(tokenizer), torch.random.fork_rng(devices=[]):
        bridge = build_bridge_from_module(
            hf,
            type(hf).__name__,
            hf_config=copy.deepcopy(hf.config),
            tokenizer=tokenizer,
            device=hf.get_input_embeddings().weight.device,
            model_name=name,
            post_adapter_hook=prepare,
        )
    bridge.eval().requires_grad_(False)
    pass_cache_on(bridge)
    return bridge


def cast(hf: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model with its parameters in another dtype; buffers keep theirs, as when Hugging Face loads in it.

    So do 4-bit weights, which are codes.
    """
    if not dtype.is_floating_point:
        raise MansuError(f"dtype {dtype}: weights need a floating dtype; pass torch.float32 or torch.bfloat16")
    for name, parameter in hf.named_parameters():
        if getattr(parameter, "quant_state", None) is not None:
            continue
        finite = torch.isfinite(parameter).all()
        parameter.data = parameter.data.to(dtype)
        if finite and not torch.isfinite(parameter).all():
            raise MansuError(f"{name}: does not fit {dtype}; choose a wider dtype")
    hf.config.dtype = dtype
    return hf


def forget_source_format(hf: PreTrainedModel) -> None:
    """Take the format that dense weights were unpacked from (GGUF) out of a model's config.

    Else a folder saved from it says that it is packed, and nothing reads it.
    """
    if getattr(hf.config, "quantization_config", None) is not None:
        del hf.config.quantization_config


@contextmanager
def _as_it_is(tokenizer: PreTrainedTokenizerBase | None) -> Iterator[None]:
    # TransformerLens loads a tokenizer anew from its name unless it claims to prepend BOS, and added tokens get lost.
    if tokenizer is None:
        yield
        return
    before = tokenizer.init_kwargs
    tokenizer.init_kwargs = {**before, "name_or_path": before.get("name_or_path", ""), "add_bos_token": True}
    try:
        yield
    finally:
        tokenizer.init_kwargs = before


@torch_defaults()
def duplicate(model: Model, values: Mapping[str, Tensor] = MappingProxyType({})) -> PreTrainedModel:
    """As `plain`, but 4-bit layers stay 4-bit: their packed bytes are copied.

    Args:
        values: new values by parameter name, as in `rebuild`.
    """
    live, tied, fresh = parameters(model), tied_names(model), blank(model)
    require_memory("a copy of the model", (live[names[0]] for names in tied))
    repack(fresh, model)
    _require_names(values, tied)

    def value(names: list[str], old: Tensor) -> Tensor:
        return old.clone() if names[0] not in values else _fitting(names[0], values[names[0]], old)

    return placed_as(filled(fresh, model, value), hf_of(model))


def filled(fresh: PreTrainedModel, model: Model, value: Callable[[list[str], Tensor], Tensor]) -> PreTrainedModel:
    """A blank model with everything that belongs to a model, in eval mode and frozen.

    Args:
        value: what a parameter is to hold, by its names (several where it is tied) and what the model's holds; 4-bit weights
            are left as they are.
    """
    live = parameters(model)
    _require_unpacked(live)
    require_in_step(model)
    for names in tied_names(model):
        old = live[names[0]]
        if getattr(old, "quant_state", None) is not None:
            continue
        parameter = nn.Parameter(value(names, old.detach()), requires_grad=False)
        for name in names:
            _put(fresh, name, parameter, "_parameters")
    live_buffers = buffers(model)
    for name, _ in list(fresh.named_buffers(remove_duplicate=False)):
        if name not in live_buffers:
            raise MansuError(f"{name}: buffer not found in this model; load it with mansu_tl.load")
        _put(fresh, name, live_buffers[name].detach().clone(), "_buffers")
    fresh.generation_config = copy.deepcopy(hf_of(model).generation_config)
    remember(fresh, gguf_weights(model))
    remember_formats(fresh, stored_formats(model))
    return fresh.eval()


def _put(model: nn.Module, name: str, value: Tensor, kind: str) -> None:
    parent, _, leaf = name.rpartition(".")
    getattr(model.get_submodule(parent), kind)[leaf] = value


def _require_unpacked(live: Mapping[str, Tensor]) -> None:
    for name, parameter in live.items():
        if not parameter.is_floating_point() and getattr(parameter, "quant_state", None) is None:
            raise MansuError(
                f"{name}: holds packed {parameter.dtype} weights; pass the dense model or its dequantized twin"
            )


def _require_names(values: Mapping[str, Tensor], tied: list[list[str]]) -> None:
    first = {name: names[0] for names in tied for name in names}
    for name in values:
        if name not in first:
            raise MansuError(f"{name}: this model has no such parameter; see mansu_tl.parameters(model) for the names")
        if first[name] != name:
            raise MansuError(f"{name}: tied to {first[name]}; give the value under that name")


def _fitting(name: str, value: Tensor, old: Tensor) -> Tensor:
    if value.shape != old.shape:
        raise MansuError(
            f"{name}: value has shape {tuple(value.shape)}, the parameter {tuple(old.shape)}; give all of it"
        )
    new = value.detach().to(device=old.device, dtype=old.dtype, copy=True)
    if not torch.isfinite(new).all():
        raise MansuError(f"{name}: the new value holds NaN or infinity in {old.dtype}; check the edit")
    if new.dtype != value.dtype and not torch.equal(new.to(value.dtype), value.detach().to(old.device)):
        raise MansuError(f"{name}: {value.dtype} values would be rounded to {old.dtype}; round them yourself first")
    return new.contiguous()
