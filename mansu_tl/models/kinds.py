"""What people pass where a hooked model is wanted, and how each becomes one."""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any

from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mansu_tl.errors import MansuError

_MERGE = "merge it into the weights first, model = mtl.load(peft_model.merge_and_unload())"


def require_bridge(model: object, what: str = "model") -> None:
    """Refuse anything but a hooked model."""
    if not isinstance(model, TransformerBridge):
        raise MansuError(f"{what}: {way_to_load(model)}")


def adapter_layer(model: nn.Module) -> str | None:
    """The first layer that peft has put into a model, by path; None where there is none."""
    return next((path for path, module in model.named_modules() if _is_peft(module)), None)


def way_to_load(given: object) -> str:
    """What was passed, and how to make a hooked model of it."""
    name = type(given).__name__
    if _is_peft(given) and not hasattr(given, "merge_and_unload"):
        return (
            f"a {name} carries an adapter that is no part of the weights and cannot be merged; pass a model without it"
        )
    if _is_peft(given):
        return f"a {name} carries an adapter; {_MERGE}"
    if isinstance(given, PreTrainedModel):
        layer = adapter_layer(given)
        if layer is not None:
            return f"this {name} carries an adapter of peft ({layer}); {_MERGE}"
        return f"a plain {name} has no hooks; wrap it, model = mtl.load(hf_model)"
    if isinstance(given, str | PathLike):
        return f"{fspath(given)!r} is a name or a path; load it, model = mtl.load({fspath(given)!r})"
    if isinstance(given, PreTrainedTokenizerBase):
        return f"got the tokenizer ({name}); pass the model that mtl.load gave"
    if isinstance(given, type):
        return f"{given.__name__} is a class; make a model of it first, hf_model = {given.__name__}.from_pretrained(folder)"
    inner: Any
    for attribute in ("_orig_mod", "module", "model"):  # torch.compile, DDP and the like, pipelines and trainers
        inner = getattr(given, attribute, None)
        if isinstance(inner, PreTrainedModel | TransformerBridge):
            inside = f"mtl.load(it.{attribute})" if isinstance(inner, PreTrainedModel) else f"it.{attribute}"
            return f"a {name} is wrapped around the model; pass {inside}"
    return f"got a {name}; pass a model from mtl.load (a name, a folder, a hub id or a transformers model)"


def _is_peft(given: object) -> bool:
    # By name: peft need not be installed to be recognised.
    return any(base.__module__.partition(".")[0] == "peft" for base in type(given).__mro__)
