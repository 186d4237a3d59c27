"""Attention patterns under patched queries or keys, exact, all layers in one run.

The stream in front of every block is put back to the base run's, so a layer's patched queries or keys meet the base
run's everything else; heads of a layer do not see each other's patterns, so they are patched together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.models import Anatomy
from mansu_tl.runs.exactness import require_exact
from mansu_tl.runs.passes import Hook, keep, put, run

# Runs that share a batch when keys are patched one position at a time.
_COPIES = 8


def patched_pattern_effects(
    model: TransformerBridge,
    tokens: Int[Tensor, "pair pos"],
    base: dict[str, Tensor],
    other: dict[str, Tensor],
    grads: dict[str, Tensor],
    part: str,
) -> list[tuple[Tensor, Tensor]]:
    """Per layer (change of the pattern) . dm/d pattern when all of a head's `part` ("q" or "k") come from the other run.

    Returns:
        Per layer the effect by attending position [pair, pos, head], and summed over them [pair, head]; for keys the
        heads of a KV group are summed.
    """
    anatomy = Anatomy.of(model)
    hooks: list[Hook] = [(anatomy.hook(part, i), put(other[f"{part}{i}"])) for i in anatomy.layers]
    out = []
    for i, pattern in enumerate(_patterns(model, tokens, base, hooks, 1)):
        change = pattern.float() - base[f"pattern{i}"].float()
        effect = (change * grads[f"pattern{i}"]).sum(-1).transpose(1, 2)
        effect = effect if part == "q" else effect.unflatten(-1, (anatomy.n_kv_heads, -1)).sum(-1)
        out.append((effect, effect.sum(1)))
    return out


def key_position_effects(
    model: TransformerBridge,
    tokens: Int[Tensor, "pair pos"],
    base: dict[str, Tensor],
    other: dict[str, Tensor],
    grads: dict[str, Tensor],
) -> list[Float[Tensor, "pair pos kv_head"]]:
    """Per layer the same for keys, patched one position at a time."""
    (count, width), anatomy = tokens.shape, Anatomy.of(model)
    out = [torch.zeros(count, width, anatomy.n_kv_heads, device=tokens.device) for _ in anatomy.layers]
    for start in range(0, width, _COPIES):
        places = list(range(start, min(start + _COPIES, width)))

        def replace(layer: int, places: list[int] = places) -> Callable[..., Tensor]:
            def hook_fn(value: Tensor, hook: object) -> Tensor:
                new = value.clone()
                for part, place in zip(new.unflatten(0, (len(places), -1)), places, strict=True):
                    part[:, place] = other[f"k{layer}"][:, place]
                return new

            return hook_fn

        hooks: list[Hook] = [(anatomy.hook("k", i), replace(i)) for i in anatomy.layers]
        for i, patterns in enumerate(_patterns(model, tokens, base, hooks, len(places))):
            change = patterns.float().unflatten(0, (len(places), -1)) - base[f"pattern{i}"].float()
            effect = (change * grads[f"pattern{i}"]).sum((-1, -2)).unflatten(-1, (anatomy.n_kv_heads, -1)).sum(-1)
            out[i][:, places] = effect.transpose(0, 1).to(out[i].device)
    return out


@torch.no_grad()
def _patterns(
    model: TransformerBridge,
    tokens: Tensor,
    base: dict[str, Tensor],
    hooks: list[Hook],
    copies: int,
) -> list[Float[Tensor, "row head query key"]]:
    def unpatched() -> tuple[Tensor, Tensor]:
        again = _run(model, tokens, base, [], 1)
        return torch.cat(again), torch.cat([base[f"pattern{i}"] for i in Anatomy.of(model).layers])

    require_exact(model, "attention patterns", unpatched)
    return _run(model, tokens, base, hooks, copies)


def _run(
    model: TransformerBridge, tokens: Tensor, base: dict[str, Tensor], hooks: list[Hook], copies: int
) -> list[Float[Tensor, "row head query key"]]:
    kept: dict[str, Tensor] = {}
    anatomy = Anatomy.of(model)

    def put_back(layer: int) -> Callable[..., Tensor]:
        return lambda stream, hook: base[f"stream{layer}"].repeat(copies, 1, 1)

    every = [*hooks, *((anatomy.hook("stream", i), put_back(i)) for i in anatomy.layers)]
    every += [(anatomy.hook("pattern", i), keep(kept, f"{i}")) for i in anatomy.layers]
    first = torch.ones(copies * len(tokens), dtype=torch.long, device=tokens.device)
    run(model, tokens.repeat(copies, 1), first, every)  # no logits are wanted, so those of one position are made
    return [kept[f"{i}"] for i in anatomy.layers]
