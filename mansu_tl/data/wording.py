"""Which prompts ask in the same words, whatever they ask about."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mansu_tl.data.task import Sequences

# Compared tokens that exist at one time.
_MOST_NUMBERS = 2**26


def same_wording(
    tokens: Int[Tensor, "row pos"], lengths: Int[Tensor, " row"], others: Sequences
) -> Bool[Tensor, "row other"]:
    """Which of the others share most tokens with each prompt, counted from the last real one.

    Args:
        tokens: the prompts; what names a subject is to be -1, so that a name like the prompt's own has no better chance.
    """
    width = max(tokens.shape[1], others.tokens.shape[1])
    asked = _from_end(tokens, lengths, width, -1)
    other = _from_end(others.tokens, others.lengths, width, -2)
    rows = max(1, _MOST_NUMBERS // max(1, other.numel()))
    shared = torch.cat([(part[:, None] == other[None]).sum(-1) for part in asked.split(rows)])
    return shared == shared.max(1, keepdim=True).values if len(others) else shared.bool()


def _from_end(
    tokens: Int[Tensor, "row pos"], lengths: Int[Tensor, " row"], width: int, fill: int
) -> Int[Tensor, "row width"]:
    """The rows with their last real token in the last column."""
    position = torch.arange(width, device=tokens.device)[None] - (width - lengths[:, None])
    moved = tokens.gather(1, position.clamp(0, tokens.shape[1] - 1)) if len(tokens) else tokens.new_zeros(0, width)
    return torch.where(position >= 0, moved, fill)
