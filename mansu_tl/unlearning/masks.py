"""Which weights may move, as one mask per HF parameter."""

from __future__ import annotations

from collections.abc import Collection

import torch
from jaxtyping import Bool
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.models import linear_weights, parameters

Masks = dict[str, Bool[Tensor, "..."]]


def every_weight(model: TransformerBridge, names: Collection[str] | None = None) -> Masks:
    """All linear weights.

    Args:
        names: the parameters that are asked for; None = all.
    """
    values, asked = parameters(model), linear_weights(model)
    return {name: torch.ones_like(values[name], dtype=torch.bool) for name in asked if names is None or name in names}
