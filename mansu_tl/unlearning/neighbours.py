"""Near neighbours of the forget set in the retain text, found by what the model makes of them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from mansu_tl.data import PromptPairs, Sequences
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
    prompts, _ = _states(model, Sequences(pairs.clean, pairs.lengths), batch_size)
    states, real = _states(model, text, batch_size)
    mean = torch.cat([row[keep] for row, keep in zip(states, real, strict=True)]).mean(0)
    last = torch.stack([row[length - 1] for row, length in zip(prompts, pairs.lengths.tolist(), strict=True)])
    wanted = normalize(last - mean, dim=-1)
    nearness = torch.stack(
        [(normalize(row[keep] - mean, dim=-1) @ wanted.T).max() for row, keep in zip(states, real, strict=True)]
    )
    return nearness.topk(max(1, round(share * len(text)))).indices


def _states(
    model: PreTrainedModel, text: Sequences, batch_size: int
) -> tuple[list[Float[Tensor, "pos d_model"]], list[Tensor]]:
    """The residual stream at half depth of every row, and which of its positions are real."""
    states: list[Tensor] = []
    real: list[Tensor] = []
    for start in range(0, len(text), batch_size):
        batch = text[slice(start, start + batch_size)]
        hidden = model(batch.tokens, use_cache=False, output_hidden_states=True).hidden_states
        states += list(hidden[len(hidden) // 2].float())
        real += list(torch.arange(batch.tokens.shape[1], device=batch.tokens.device)[None] < batch.lengths[:, None])
    return states, real
