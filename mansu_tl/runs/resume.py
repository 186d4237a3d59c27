"""Running a model from a layer and a position on, exactly: what an intervention cannot change is not computed again.

The blocks before the layer hand their input on, the recorded stream is put in front of the layer, and the recorded
keys and values stand for the positions before the first one that is run. Under causal attention nothing there depends
on later positions, sliding windows included, so this is the same computation and not an approximation. The first resumed
run of a model checks that (see `exactness.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from mansu_tl.models.cache import cache_argument, cache_passed_on
from mansu_tl.models.tree import hf_of
from mansu_tl.runs.exactness import require_exact
from mansu_tl.runs.passes import Hook, keep


@dataclass(frozen=True)
class Base:
    """A recorded run.

    Attributes:
        tokens, lengths: what was run.
        streams: the stream entering every block, and the final norm last.
        kept: what passed the hooks that were asked for.
        keys, values: per layer, as attention caches them.
        logits: at the last real token.
        attention_tuple: whether attention modules hand back a tuple (output, weights).
    """

    tokens: Int[Tensor, "row pos"]
    lengths: Int[Tensor, " row"]
    streams: list[Float[Tensor, "row pos d_model"]]
    kept: dict[str, Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    logits: Float[Tensor, "row vocab"]
    attention_tuple: bool


@torch.no_grad()
def record_base(
    model: TransformerBridge, tokens: Int[Tensor, "row pos"], lengths: Int[Tensor, " row"], names: list[str]
) -> Base:
    """Run once, keeping the streams, the keys and values, and what passes the hooks `names`."""
    kept: dict[str, Tensor] = {}
    layers, seen = len(model.blocks), []
    streams = [f"blocks.{i}.hook_in" for i in range(layers)] + ["ln_final.hook_in"]
    cache = DynamicCache()
    handle = model.blocks[0].attn.register_forward_hook(lambda module, args, out: seen.append(isinstance(out, tuple)))
    hooks = [(name, keep(kept, name)) for name in dict.fromkeys([*streams, *names])]
    try:
        with cache_passed_on(model), model.hooks(fwd_hooks=[*hooks, _last_token(lengths - 1)]):
            logits = model(tokens, return_type="logits", **_given(model, cache))[:, 0]
    finally:
        handle.remove()
    cached: list[Any] = list(cache.layers)
    keys, values = [layer.keys for layer in cached], [layer.values for layer in cached]
    return Base(
        tokens, lengths, [kept[n] for n in streams], kept, keys, values, logits.float().to(tokens.device), seen[0]
    )


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
    cut_last_mlp: bool = True,
) -> Float[Tensor, "copy row vocab"]:
    """Logits of `copies` runs that share `base` up to `layer` and up to position `start`; `hooks` make them differ.

    Hooks see the positions from `start` on, the copies one after another along the batch.

    Args:
        layer: the first block that is run; the number of blocks = only the final norm and the unembedding.
        start: the first position that is run, not past any row's last token.
        attention: what the first block's attention gives out, instead of computing it.
        cut_last_mlp: run the last block's MLP at the last token only (not where a hook looks at other positions).

    Raises:
        MansuError: with nothing patched, a resumed run of this model gives something else than `base`.
    """
    require_exact(model, "resumed run", lambda: _unpatched(model, base))
    return _resumed(model, base, layer, start, copies, hooks, attention, cut_last_mlp)


def _unpatched(model: TransformerBridge, base: Base) -> tuple[Tensor, Tensor]:
    """Resumed runs with no hook, from several layers and positions on, two copies each; and what `base` says."""
    layers, last = len(model.blocks), int(base.lengths.min()) - 1
    points = dict.fromkeys((layer, start) for layer in (0, layers // 2, layers) for start in (last, last // 2))
    runs = [_resumed(model, base, layer, start, 2, [], None, True) for layer, start in points]
    return torch.cat(runs), base.logits.expand(2 * len(runs), -1, -1)


def _resumed(
    model: TransformerBridge,
    base: Base,
    layer: int,
    start: int,
    copies: int,
    hooks: list[Hook],
    attention: Tensor | None,
    cut_last_mlp: bool,
) -> Float[Tensor, "copy row vocab"]:
    layers = len(model.blocks)
    tokens, lengths = base.tokens[:, start:].repeat(copies, 1), (base.lengths - start).repeat(copies)
    stream = base.streams[layer][:, start:].repeat(copies, 1, 1)

    def begin(old: Tensor, hook: object) -> Tensor:
        return stream

    name = f"blocks.{layer}.hook_in" if layer < layers else "ln_final.hook_in"
    all_hooks: list[Hook] = [(name, begin), *hooks, _last_token(lengths - 1)]
    if cut_last_mlp and layer < layers:
        all_hooks.append((f"blocks.{layers - 1}.ln2.hook_in", _last_token(lengths - 1)[1]))
    given = _given(model, _cache(base, layer, start, copies)) if start else {}
    replaced: list[tuple[nn.Module, Callable[..., Any]]] = [(block, _hand_on) for block in model.blocks[:layer]]
    if attention is not None:
        out = (attention, None) if base.attention_tuple else attention
        replaced.append((model.blocks[layer].attn, lambda *args, **kwargs: out))
    with cache_passed_on(model), _replaced(replaced), model.hooks(fwd_hooks=all_hooks):
        logits = model(tokens, return_type="logits", **given)[:, 0]
    return logits.float().to(base.tokens.device).unflatten(0, (copies, -1))


def _given(model: TransformerBridge, cache: DynamicCache) -> dict[str, Any]:
    """A cache as an argument of the bridge."""
    return {cache_argument(hf_of(model)): cache, "use_cache": True}


def _hand_on(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    return hidden_states


def _cache(base: Base, layer: int, start: int, copies: int) -> DynamicCache:
    cache = DynamicCache()
    for i, (keys, values) in enumerate(zip(base.keys, base.values, strict=True)):
        if i < layer:
            # Never attended to; only the number of positions is asked of it.
            cache.update(keys[:1, :, :start], values[:1, :, :start], i)
        else:
            cache.update(keys[:, :, :start].repeat(copies, 1, 1, 1), values[:, :, :start].repeat(copies, 1, 1, 1), i)
    return cache


def _last_token(last: Int[Tensor, " row"]) -> Hook:
    rows = torch.arange(len(last), device=last.device)

    def cut(stream: Tensor, hook: object) -> Tensor:
        # Contiguous on purpose: a strided slice turns the unembedding into one product per row.
        return stream[rows.to(stream.device), last.to(stream.device)][:, None].contiguous()

    return "unembed.hook_in", cut


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
