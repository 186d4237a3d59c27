"""Running a model from a layer and a position on, exactly: what an intervention cannot change is not computed again.

The blocks before the layer hand their input on, the recorded stream is put in front of the layer, and the recorded
keys and values stand for the positions before the first one that is run. Under causal attention nothing there depends
on later positions, sliding windows included, so this is the same computation and not an approximation. The first resumed
run of a model checks that (see `exactness.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from mansu_tl.data.forced import Asked, Places, places_of
from mansu_tl.models import Anatomy
from mansu_tl.models.anatomy import UNEMBED
from mansu_tl.models.cache import cache_argument, cache_passed_on
from mansu_tl.models.tree import hf_of
from mansu_tl.runs.exactness import require_exact
from mansu_tl.runs.passes import Hook, Recording, forward, keep, only, put


@dataclass(frozen=True)
class Base(Recording):
    """A recording that can be taken up again; it has every "stream".

    Attributes:
        tokens: what was run.
        places: the positions whose logits are wanted.
        cached: per layer keys and values, as attention caches them.
        attention_tuple: whether attention modules hand back a tuple (output, weights).
    """

    tokens: Int[Tensor, "row pos"]
    places: Places
    cached: list[tuple[Tensor, Tensor]]
    attention_tuple: bool


@torch.no_grad()
def record_base(
    model: TransformerBridge,
    tokens: Int[Tensor, "row pos"],
    asked: Asked,
    roles: Sequence[str],
    hooks: Sequence[Hook] = (),
) -> Base:
    """Run once with `hooks` in place, keeping of every layer the stream, the keys and values, and what has the roles.

    Args:
        roles: see `Anatomy.hook`.
    """
    kept: dict[str, Tensor] = {}
    seen: list[bool] = []
    points = Anatomy.of(model).hooks("stream", *roles)
    every = [*hooks, *((hook, keep(kept, key)) for key, hook in points.items()), (UNEMBED, only(asked))]
    cache = DynamicCache()
    given_out = model.blocks[0].attn.register_forward_hook(
        lambda module, args, out: seen.append(isinstance(out, tuple))
    )
    with given_out, cache_passed_on(model):
        logits = forward(model, tokens, every, **_given(model, cache))[:, 0]
    layers: list[Any] = list(cache.layers)
    cached = [(layer.keys, layer.values) for layer in layers]
    return Base(kept, logits.float().to(tokens.device), tokens, places_of(asked), cached, seen[0])


@torch.no_grad()
def resume(
    model: TransformerBridge,
    base: Base,
    layer: int,
    start: int,
    copies: int,
    hooks: list[Hook],
    *,
    attention: Float[Tensor, "row2 pos2 d_model"] | None = None,
) -> Float[Tensor, "copy place vocab"]:
    """Logits of `copies` runs that share `base` up to `layer` and up to position `start`; `hooks` make them differ.

    Hooks see the positions from `start` on, the copies one after another along the batch.

    Args:
        layer: the first block that is run; the number of blocks = only the final norm and the unembedding.
        start: the first position that is run, not past any asked one.
        attention: what the first block's attention gives out, instead of computing it.
    """
    require_exact(model, "resumed run", lambda: _unpatched(model, base))
    return _resumed(model, base, layer, start, copies, hooks, attention)


@torch.no_grad()
def grafted(
    model: TransformerBridge, base: Base, stream: Float[Tensor, "row pos d_model"], layer: int
) -> Float[Tensor, "place vocab"]:
    """Logits of the model's own layers from one on, put on the stream that another model has there.

    Args:
        base: this model's run on the same tokens.
        layer: the first block that is run; the number of blocks = only the final norm and the unembedding.
    """
    require_exact(model, "resumed run", lambda: _unpatched(model, base))
    key = f"stream{layer}"
    other = replace(base, values={**base.values, key: stream.to(base.values[key])})
    return _resumed(model, other, layer, 0, 1, [])[0]


def _unpatched(model: TransformerBridge, base: Base) -> tuple[Tensor, Tensor]:
    """Resumed runs with no hook, from several layers and positions on, two copies each; and what `base` says."""
    layers, last = len(model.blocks), int(base.places.positions.min())
    points = dict.fromkeys((layer, start) for layer in (0, layers // 2, layers) for start in (last, last // 2))
    runs = [_resumed(model, base, layer, start, 2, []) for layer, start in points]
    return torch.cat(runs), base.logits.expand(2 * len(runs), -1, -1)


def _resumed(
    model: TransformerBridge,
    base: Base,
    layer: int,
    start: int,
    copies: int,
    hooks: list[Hook],
    attention: Tensor | None = None,
) -> Float[Tensor, "copy place vocab"]:
    anatomy, count = Anatomy.of(model), len(base.tokens)
    cut = only(Places(base.places.rows, base.places.positions - start).repeated(copies, count))
    tokens = base.tokens[:, start:].repeat(copies, 1)
    begin = put(base.value("stream", layer)[:, start:].repeat(copies, 1, 1))
    all_hooks: list[Hook] = [(anatomy.hook("stream", layer), begin), *hooks, (UNEMBED, cut)]
    # Behind the last attention only what is asked counts; a row that asks once is that position.
    if layer < anatomy.n_layers and len(base.places.rows) == count:
        all_hooks.append((anatomy.hook("mlp_in", anatomy.n_layers - 1), cut))
    given = _given(model, _cache(base, layer, start, copies)) if start else {}
    replaced: list[tuple[nn.Module, Callable[..., Any]]] = [(block, _hand_on) for block in model.blocks[:layer]]
    if attention is not None:
        out = (attention, None) if base.attention_tuple else attention
        replaced.append((model.blocks[layer].attn, lambda *args, **kwargs: out))
    with cache_passed_on(model), _replaced(replaced):
        logits = forward(model, tokens, all_hooks, **given)[:, 0]
    return logits.float().to(base.tokens.device).unflatten(0, (copies, -1))


def _given(model: TransformerBridge, cache: DynamicCache) -> dict[str, Any]:
    """A cache as an argument of the bridge."""
    return {cache_argument(hf_of(model)): cache, "use_cache": True}


def _hand_on(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    return hidden_states


def _cache(base: Base, layer: int, start: int, copies: int) -> DynamicCache:
    cache = DynamicCache()
    for i, (keys, values) in enumerate(base.cached):
        if i < layer:
            # Never attended to; only the number of positions is asked of it.
            cache.update(keys[:1, :, :start], values[:1, :, :start], i)
        else:
            cache.update(keys[:, :, :start].repeat(copies, 1, 1, 1), values[:, :, :start].repeat(copies, 1, 1, 1), i)
    return cache


@contextmanager
def _replaced(forwards: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Other forwards inside. Set in the instance's dict, since a bridge hands attributes on to the module it wraps."""
    try:
        for module, forward in forwards:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, _ in forwards:
            module.__dict__.pop("forward", None)
