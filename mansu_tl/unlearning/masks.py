"""Which weights may move, as one mask per HF parameter."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.models import linear_weights, parameters

Masks = dict[str, Bool[Tensor, "..."]]


def every_weight(model: TransformerBridge) -> Masks:
    """All linear weights."""
    values = parameters(model)
    return {name: torch.ones_like(values[name], dtype=torch.bool) for name in linear_weights(model)}
