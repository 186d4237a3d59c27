"""The clean and the corrupt run of pairs: what enters block 0 in each.

Most pairs have a corrupt prompt, so nothing has to be done. Others have a `corruption`: their corrupt run is one of the
clean tokens in which the embeddings of the subject's tokens are changed.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import PromptPairs
from mansu_tl.data.corruption import EmbeddingCorruption
from mansu_tl.data.forced import Forced
from mansu_tl.models import Anatomy
from mansu_tl.models.state import computing_dtype, home
from mansu_tl.results.digest import digest
from mansu_tl.runs.passes import Hook

_DEVIATIONS = 3.0  # of the embeddings, in ROME's noise
_ROWS = 4096  # tokens embedded at one time


def end_hooks(model: TransformerBridge, pairs: Forced[PromptPairs], *, clean: bool) -> list[Hook]:
    """What makes the clean or the corrupt run, beside its tokens."""
    corruption = pairs.given.corruption
    if corruption is None or clean is not pairs.swapped:
        return []
    return [(Anatomy.of(model).hook("stream", 0), _Corrupted(model, pairs, corruption))]


@torch.no_grad()
def entering(model: TransformerBridge, pairs: Forced[PromptPairs], *, clean: bool) -> Float[Tensor, "row pos d_model"]:
    """What enters block 0 in the clean or the corrupt run."""
    stream: Any = model(pairs.clean if clean else pairs.corrupt, stop_at_layer=0)
    for _, hook in end_hooks(model, pairs, clean=clean):
        stream = hook(stream, None)
    return stream


def positional(model: TransformerBridge, width: int) -> Float[Tensor, "... d_model"]:
    """What the positions alone add to the embedding: learned positional embeddings, or nothing."""
    if not hasattr(model, "pos_embed"):
        return torch.zeros((), dtype=computing_dtype(model), device=home(model))[None]
    return model.pos_embed.weight[:width].detach()


class _Corrupted:
    """A hook on the embedding that changes it where the subject is named."""

    def __init__(self, model: TransformerBridge, pairs: Forced[PromptPairs], corruption: EmbeddingCorruption) -> None:
        self.where = pairs.changed
        own = _embedded(model, torch.tensor(corruption.tokens, device=pairs.clean.device))
        rows, positions = self.where.nonzero(as_tuple=True)
        if corruption.kind == "noise":
            size = _DEVIATIONS * own.float().std(correction=0)
            self.kept, self.value = True, size * _noise(pairs, corruption.seed, own.shape[1])[rows, positions]
        else:
            mean = own.float().mean(0) * (corruption.kind == "mean")
            at = positional(model, self.where.shape[1]).float()
            self.kept, self.value = False, mean + at.expand(self.where.shape[1], -1)[positions]

    def __call__(self, stream: Tensor, hook: object) -> Tensor:
        out, where = stream.clone(), self.where.to(stream.device)
        old = out[where].float() if self.kept else 0
        out[where] = (old + self.value.to(stream.device)).to(stream.dtype)
        return out


@torch.no_grad()
def _embedded(model: TransformerBridge, tokens: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
    """The embeddings of some tokens as they enter block 0, without their positions."""
    parts = [model(part[:, None], stop_at_layer=0)[:, 0] for part in tokens.split(_ROWS)]
    return torch.cat(parts) - positional(model, 1)


def _noise(pairs: Forced[PromptPairs], seed: int, width: int) -> Float[Tensor, "row pos d_model"]:
    """Standard Gaussian noise for every position of the prompts, drawn from each pair's tokens and the seed."""
    given = pairs.given
    out = torch.zeros(*pairs.clean.shape, width)
    drawn = []
    for tokens, length in zip(given.clean.tolist(), given.lengths.tolist(), strict=True):
        key = int(digest([seed, tokens[:length]])[:15], 16)
        drawn.append(torch.randn(length, width, generator=torch.Generator().manual_seed(key)))
    for row, pair in enumerate(pairs.owner.tolist()):
        out[row, : len(drawn[pair])] = drawn[pair]
    return out.to(pairs.clean.device)
