"""Pairs out of questions alone: each prompt against one that asks in the same words about something else."""

from __future__ import annotations

import torch

from mansu_tl.data.masks import real_tokens
from mansu_tl.data.pairs import PromptPairs
from mansu_tl.data.task import Questions
from mansu_tl.errors import MansuError


def contrasted(questions: Questions) -> PromptPairs:
    """Every question against the one behind it in the set that shares most of its tokens, place by place.

    The other question has as many tokens and another right answer, which becomes distractor 0. Questions that have no such
    partner are left out. Our definition: a set of questions says neither its wordings nor its subjects.

    Raises:
        MansuError: no question has a partner.
    """
    prompts, lengths, options = questions.prompts.cpu(), questions.lengths.cpu(), questions.options.cpu()
    options = options[..., None] if options.ndim == 2 else options
    real, answers, count = real_tokens(prompts, lengths), options[:, 0], len(prompts)
    rows, partners = [], []
    for i in range(count):
        # From the next one on, so that no question is everybody's partner.
        order = torch.arange(i + 1, i + count) % count
        fits = (lengths[order] == lengths[i]) & (answers[order] != answers[i]).any(-1)
        order = order[fits]
        if len(order):
            shared = ((prompts[order] == prompts[i]) & real[i]).sum(1)
            rows.append(i)
            partners.append(int(order[int(shared.argmax())]))
    if not rows:
        raise MansuError(
            f"questions: none of the {count} has another of as many tokens with another answer, so there is nothing to set "
            "them against; give more of one wording"
        )
    width = options.shape[1]
    made = []
    for i, j in zip(rows, partners, strict=True):
        rest = [option for option in options[i, 1:] if not torch.equal(option, answers[j])]
        made.append(torch.stack([answers[i], answers[j], *rest[: width - 2]]))
    return PromptPairs(
        prompts[rows], prompts[partners], torch.stack(made), lengths[rows], tuple(questions.facts[i] for i in rows)
    )
