"""Which weights may move, as one mask per HF parameter."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.models import component_map, linear_weights, parameters

Masks = dict[str, Bool[Tensor, "..."]]


def every_weight(model: TransformerBridge) -> Masks:
    """All linear weights."""
    values = parameters(model)
    return {name: torch.ones_like(values[name], dtype=torch.bool) for name in linear_weights(model)}


def weights_of(model: TransformerBridge, components: Iterable[str]) -> Masks:
    """The linear weights of some components, named as `ComponentMap.slices` takes them."""
    parts, every = component_map(model), every_weight(model)
    masks: Masks = {}
    for component in components:
        for piece in parts.slices(component):
            if piece.parameter in every:
                mask = masks.setdefault(piece.parameter, torch.zeros_like(every[piece.parameter]))
                mask.narrow(piece.dim, piece.start, piece.stop - piece.start).fill_(True)
    return masks
