"""Attention patterns under patched queries or keys, exact, all layers in one run.

The stream in front of every block is put back to the base run's, so a layer's patched queries or keys meet the base
run's everything else; heads of a layer do not see each other's patterns, so they are patched together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.models import Anatomy
from mansu_tl.runs.exactness import require_exact
from mansu_tl.runs.passes import Hook, keep, run


def pattern_effects(
    model: TransformerBridge,
    tokens: Int[Tensor, "pair pos"],
    base: dict[str, Tensor],
    other: dict[str, Tensor],
    grads: dict[str, Tensor],
    part: str,
    places: list[slice],
) -> Iterator[Float[Tensor, "place pair pos head"]]:
    """Per layer (change of the pattern) . dm/d pattern when a head's `part` ("q" or "k") comes from the other run.

    One row for each stretch of positions that does, by attending position; for keys the heads of a KV group are summed.
    """
    anatomy, count = Anatomy.of(model), len(places)

    def replace(layer: int) -> Callable[..., Tensor]:
        def hook_fn(value: Tensor, hook: object) -> Tensor:
            new = value.clone()
            for rows, place in zip(new.unflatten(0, (count, -1)), places, strict=True):
                rows[:, place] = other[f"{part}{layer}"][:, place]
            return new

        return hook_fn

    hooks: list[Hook] = [(anatomy.hook(part, i), replace(i)) for i in anatomy.layers]
    for i, patterns in enumerate(_patterns(model, tokens, base, hooks, count)):
        change = patterns.float().unflatten(0, (count, -1)) - base[f"pattern{i}"].float()
        effect = (change * grads[f"pattern{i}"]).sum(-1).transpose(-1, -2)
        yield effect if part == "q" else effect.unflatten(-1, (anatomy.n_kv_heads, -1)).sum(-1)


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
        kept = [base[f"pattern{i}"] for i in Anatomy.of(model).layers]
        # They may live on several devices.
        return torch.cat([each.cpu() for each in again]), torch.cat([each.cpu() for each in kept])

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
