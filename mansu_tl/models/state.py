"""What earlier cells may have left on a model, and would silently enter every number taken from it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.errors import MansuError
from mansu_tl.models.tree import Model, parameters

_FORWARD = ("_forward_hooks", "_forward_pre_hooks")
_OWN = ("mansu_tl.", "transformer_lens.")
_BACKWARD = ("_backward_hooks", "_backward_pre_hooks")


def home(model: nn.Module) -> torch.device:
    """Where a model's tokens go in: the device of its first parameter."""
    inside: nn.Module = model.original_model if isinstance(model, TransformerBridge) else model
    return next(inside.parameters()).device


def computing_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in: its input embedding's, whatever its config was told when it was made."""
    inside: Any = model.original_model if isinstance(model, TransformerBridge) else model
    dtype: torch.dtype = inside.get_input_embeddings().weight.dtype
    return dtype


def require_ready(model: nn.Module, tokens: Int[Tensor, "row pos"] | None = None) -> None:
    """Refuse a model that would not give its own numbers.

    Hooks that `add_hook` left on a bridge are refused whatever they do; those of a `with model.hooks(...)` that is still
    open are there on purpose. PyTorch's own forward hooks, on whatever module, may stay as long as they only look: the
    model is run on one prompt with and without them.

    Args:
        tokens: prompts that it is about to be run on; the first is what such hooks are tried on.

    Raises:
        MansuError: it is in training mode, hooks were left on it, or its weights were made under `inference_mode`.
    """
    inside: nn.Module = model.original_model if isinstance(model, TransformerBridge) else model
    if inside.training:
        raise MansuError("model: it is in training mode, so dropout would change the numbers; call model.eval() first")
    if next(inside.parameters()).is_inference():
        raise MansuError(
            "model: its weights were made under torch.inference_mode(), so nothing can be differentiated through them; "
            "load it with mansu_tl.load"
        )
    if isinstance(model, TransformerBridge):
        _require_no_hooks(model, model.context_level)
    _require_no_torch_hooks(model, tokens)


def require_copyable(model: Model, tokens: Int[Tensor, "row pos"] | None = None) -> None:
    """`require_ready` of a model whose weights are going to be run in a copy, where no hook is: none may be there.

    Raises:
        MansuError: as `require_ready`, or it is no model or one that cannot be copied.
    """
    parameters(model)  # refuses what cannot be copied
    if isinstance(model, TransformerBridge):
        _require_no_hooks(model, -1)
    require_ready(model, tokens)


def _require_no_hooks(model: TransformerBridge, level: int) -> None:
    """Refuse hooks but those of the contexts that are open, up to `level`."""
    left = {
        id(handle): str(point.name)
        for point in model.hook_points()
        for handle in (*point.fwd_hooks, *point.bwd_hooks)
        if handle.context_level is None or handle.context_level > level
    }
    if left:
        raise MansuError(
            f"model: {'a hook is' if len(left) == 1 else f'{len(left)} hooks are'} left on "
            f"{_names(list(dict.fromkeys(left.values())))} and would change the numbers; call "
            "model.reset_hooks(including_permanent=True) first"
        )


def _require_no_torch_hooks(model: nn.Module, tokens: Int[Tensor, "row pos"] | None) -> None:
    holders: dict[str, nn.Module] = {}
    turning: list[str] = []
    for name, module in model.named_modules():
        if any(_foreign(getattr(module, kind)) for kind in _FORWARD):
            holders[name] = module
        if any(_foreign(getattr(module, kind)) for kind in _BACKWARD):
            turning.append(name)
    if turning:
        raise MansuError(
            f"model: a backward hook of PyTorch is left on {_names(turning)}, which may change gradients; remove it (the "
            "handle that register_full_backward_hook gave, .remove()) first"
        )
    if not holders:
        return
    prompt = torch.tensor([[0, 1]]) if tokens is None or len(tokens) == 0 else tokens[:1]
    prompt = prompt.to(home(model))
    with torch.no_grad():
        hooked = _logits(model, prompt)
        with _without_hooks(list(holders.values())):
            bare = _logits(model, prompt)
    if not torch.equal(hooked, bare):
        raise MansuError(
            f"model: a forward hook of PyTorch on {_names(list(holders))} changes its logits; remove it (the handle that "
            "register_forward_hook gave, .remove()) first"
        )


def _logits(model: nn.Module, tokens: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos vocab"]:
    out = model(tokens)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits


def _foreign(hooks: dict[int, Any] | None) -> dict[int, Any]:
    """The hooks that neither this package (see `cache.py`) nor TransformerLens has put there itself."""
    return {i: hook for i, hook in (hooks or {}).items() if not str(getattr(hook, "__module__", "")).startswith(_OWN)}


@contextmanager
def _without_hooks(modules: list[nn.Module]) -> Iterator[None]:
    """The same modules without other people's forward hooks."""
    kept = [(module, kind, module.__dict__[kind]) for module in modules for kind in _FORWARD]
    try:
        for module, kind, hooks in kept:
            others = _foreign(hooks)
            module.__dict__[kind] = OrderedDict((i, hook) for i, hook in hooks.items() if i not in others)
        yield
    finally:
        for module, kind, hooks in kept:
            module.__dict__[kind] = hooks


def _names(names: list[str]) -> str:
    shown = ", ".join(name.replace("._original_component", "") or "the model itself" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
