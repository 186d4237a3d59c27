"""Which tokens of right-padded rows are real."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def real_tokens(tokens: Int[Tensor, "row pos"], lengths: Int[Tensor, " row"]) -> Bool[Tensor, "row pos"]:
    """True on each row's first `lengths` tokens, on the device of `tokens`."""
    return torch.arange(tokens.shape[1], device=tokens.device)[None] < lengths.to(tokens.device)[:, None]
