"""Keys and values of earlier positions, handed to a bridge's attention whatever transformers calls them.

transformers has renamed the argument more than once (`layer_past`, `past_key_values`, since 5.24 `cache`), and
TransformerLens reads it by name: under another name it computes as if there were no earlier positions. Here the cache is
found by its type.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import Cache, PreTrainedModel

from mansu_tl.errors import MansuError

_READ = "past_key_values"  # what TransformerLens's attention reads


def cache_argument(hf: PreTrainedModel) -> str:
    """The name under which a model's forward takes a cache, found by its annotation."""
    for name, parameter in inspect.signature(type(hf).forward).parameters.items():
        if "Cache" in str(parameter.annotation):
            return name
    raise MansuError(
        f"model: the forward of {type(hf).__name__} takes no cache in this version of transformers; install the versions "
        "in constraints.txt"
    )


def cache_of(output: Any) -> Cache:
    """The cache that a forward gave back, found by its type."""
    for value in output.values():
        if isinstance(value, Cache):
            return value
    raise MansuError("model: its forward gave no cache back; call it with use_cache=True")


def pass_cache_on(bridge: TransformerBridge) -> None:
    """Let every attention of a bridge find the cache that its block was given, from now on (for `generate`)."""
    hf: Any = bridge.original_model
    hf.register_forward_pre_hook(_as_asked_for, with_kwargs=True)
    for block in bridge.blocks:
        block.attn.register_forward_pre_hook(_renamed, with_kwargs=True)


@contextmanager
def cache_passed_on(bridge: TransformerBridge) -> Iterator[None]:
    """The same inside, for a bridge that was booted elsewhere."""
    with ExitStack() as hooks:
        for block in bridge.blocks:
            hooks.enter_context(block.attn.register_forward_pre_hook(_renamed, with_kwargs=True))
        yield


def _as_asked_for(hf: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """TransformerLens's `generate` gives the cache under its old name, which transformers warns about."""
    name = cache_argument(hf)
    return (args, {name if key == _READ else key: value for key, value in kwargs.items()}) if _READ in kwargs else None


def _renamed(attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    if kwargs.get(_READ) is not None:
        return None
    cache = next((value for value in (*kwargs.values(), *args) if isinstance(value, Cache)), None)
    return None if cache is None else (args, {**kwargs, _READ: cache})
