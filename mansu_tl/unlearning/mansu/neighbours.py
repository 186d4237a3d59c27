"""Near neighbours of the forget set in the retain text, found by what the model makes of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from mansu_tl.data import PromptPairs, Sequences
from mansu_tl.data.masks import real_tokens
from mansu_tl.errors import MansuError


@torch.no_grad()
def near_neighbours(
    model: PreTrainedModel, pairs: PromptPairs, text: Sequences, share: float, batch_size: int = 128
) -> Int[Tensor, " row"]:
    """The rows of a retain text that the model represents most like the forget prompts, nearest first.

    A row's nearness is the largest cosine, over its own tokens and over the forget prompts, between the residual stream
    at half depth at that token and at a prompt's last token, both less the text's mean. Our definition.

    Args:
        share: of the text's rows.

    Raises:
        MansuError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise MansuError(f"near neighbours: share={share}; choose a share of the retain text in (0, 1]")
    last = [rows[torch.arange(len(rows)), real.sum(1) - 1] for rows, real in _states(model, _clean(pairs), batch_size)]
    total, count = torch.zeros_like(last[0][0]), 0
    for rows, real in _states(model, text, batch_size):
        total += rows[real].sum(0)
        count += int(real.sum())
    mean = total / count
    wanted = normalize(torch.cat(last) - mean, dim=-1)
    nearness = [
        (normalize(row[real] - mean, dim=-1) @ wanted.T).max()
        for batch in _states(model, text, batch_size)
        for row, real in zip(*batch, strict=True)
    ]
    return torch.stack(nearness).topk(max(1, round(share * len(text)))).indices


def _clean(pairs: PromptPairs) -> Sequences:
    return Sequences(pairs.clean, pairs.lengths)


def _states(
    model: PreTrainedModel, text: Sequences, batch_size: int
) -> Iterator[tuple[Float[Tensor, "row pos d_model"], Bool[Tensor, "row pos"]]]:
    """The residual stream at half depth, batch by batch, and which of its positions are real."""
    for start in range(0, len(text), batch_size):
        batch = text[slice(start, start + batch_size)]
        hidden = model.base_model(batch.tokens, use_cache=False, output_hidden_states=True).hidden_states
        yield hidden[len(hidden) // 2].float(), real_tokens(batch.tokens, batch.lengths)
