"""What not knowing looks like: what the original model says of names that it never saw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from mansu_tl.data import PromptPairs, Sequences, Task
from mansu_tl.unlearning.forward import last_token_states

# Numbers of one kind (logits, compared tokens) that exist at one time.
_MOST_NUMBERS = 2**26


@dataclass(frozen=True)
class Ignorance:
    """What the original model says where it knows nothing, by the wording of the forget prompts.

    Attributes:
        wording: the row below that each forget prompt has.
        reference: mean next-token distribution over never-seen prompts of the same wording (our definition).
        pool: tokens that answer any forget prompt of the same wording, as a mask.
        state: mean residual stream behind every layer over those prompts, at their last token.
        spread: their mean squared distance to it; where there is one such prompt only, that of all never-seen prompts
            to their own mean.
    """

    wording: Int[Tensor, " pair"]
    reference: Float[Tensor, "wording vocab"]
    pool: Bool[Tensor, "wording vocab"]
    state: Float[Tensor, "wording layer d_model"]
    spread: Float[Tensor, "wording layer"]

    def of(self, rows: Int[Tensor, " row"]) -> Ignorance:
        """The same for some of the forget prompts, each with a row of its own."""
        at = self.wording[rows]
        every = torch.arange(len(at), device=at.device)
        return Ignorance(every, self.reference[at], self.pool[at], self.state[at], self.spread[at])


def ignorance(model: PreTrainedModel, task: Task) -> Ignorance:
    """Measure the "never seen" distribution of the original model.

    Every forget prompt is matched with the never-seen prompts of closest wording: those that agree with it most where
    it does not differ from its own corrupt prompt. Where the task has no never-seen prompts, the corrupt prompts stand in.
    """
    pairs = task.forget_pairs
    unseen = task.unseen if len(task.unseen) else Sequences(pairs.corrupt, pairs.lengths)
    closest, wording = _closest(pairs, unseen).unique(dim=0, return_inverse=True)
    mean = closest.float() / closest.sum(1, keepdim=True)
    values, parts = dict(model.named_parameters()), []
    vocab = model.get_output_embeddings().weight.shape[0]
    reference = torch.zeros(len(closest), vocab, device=mean.device)
    rows = max(1, _MOST_NUMBERS // vocab)
    for start in range(0, len(unseen), rows):
        part = unseen[slice(start, start + rows)]
        with torch.no_grad():
            logits, hidden = last_token_states(model, values, part.tokens, part.lengths)
        reference += mean[:, start : start + rows] @ logits.softmax(-1)
        parts.append(hidden)
    states = torch.cat(parts)
    state = torch.einsum("wu,uld->wld", mean, states)
    square = torch.einsum("wu,ul->wl", mean, states.square().sum(-1))
    pool = torch.zeros_like(reference, dtype=torch.bool)
    options = torch.cat([pairs.answers[:, None], pairs.distractors], 1)
    pool[wording[:, None].expand_as(options), options] = True
    spread = square - state.square().sum(-1)
    # A single prompt of that wording has no spread of its own: all never-seen prompts' around their mean stands in.
    common = (states - states.mean(0)).square().sum(-1).mean(0)
    spread = torch.where(closest.sum(1, keepdim=True) > 1, spread, common)
    return Ignorance(wording, reference, pool, state, spread)


def _closest(pairs: PromptPairs, unseen: Sequences) -> Bool[Tensor, "pair unseen"]:
    """The never-seen prompts that share most tokens with each pair, aligned at the last real one, over its wording:
    where clean and corrupt do not differ."""
    width = max(pairs.clean.shape[1], unseen.tokens.shape[1])

    def from_end(tokens: Tensor, lengths: Tensor, fill: int) -> Tensor:
        out = torch.full((tokens.shape[0], width), fill, device=tokens.device)
        for i, length in enumerate(lengths.tolist()):
            out[i, width - length :] = tokens[i, :length]
        return out

    clean, corrupt = from_end(pairs.clean, pairs.lengths, -1), from_end(pairs.corrupt, pairs.lengths, -1)
    other = from_end(unseen.tokens, unseen.lengths, -2)
    rows = max(1, _MOST_NUMBERS // max(1, other.numel()))
    parts = []
    for start in range(0, len(pairs), rows):
        mine, differs = clean[start : start + rows], (clean != corrupt)[start : start + rows]
        shared = ((mine[:, None] == other[None]) & ~differs[:, None]).sum(-1)
        parts.append(shared == shared.max(1, keepdim=True).values)
    return torch.cat(parts)
