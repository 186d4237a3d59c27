"""Questions as pairs: each beside another question of the same length with another answer, in words as near as there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from mansu_tl.data.pairs import PromptPairs
from mansu_tl.data.task import Questions


def counterparts(questions: Questions, most: int | None = None) -> PromptPairs | None:
    """Every question with the question that shares most of its tokens and asks for something else; None where none has one.

    The answer of that one is the pair's corrupt answer, and takes the place of the last distractor where it is none of them.

    Args:
        most: rows at most, facts first and their further wordings after; None = all.
    """
    tokens, lengths, options = questions.prompts, questions.lengths, questions.options
    answers, rows, partners = options[:, 0], list[int](), list[int]()
    for i in facts_first(questions.facts):
        # Token 0 stands behind every prompt, so among prompts of one length padding counts alike.
        alike = (tokens == tokens[i]).sum(1)
        other = (answers != answers[i]).any(1) & (lengths == lengths[i])
        if other.any() and (most is None or len(rows) < most):
            rows.append(i)
            # Of those that share as many tokens, the next question.
            partners.append(int((torch.where(other, alike, -1).roll(-i).argmax() + i) % len(questions)))
    if not rows:
        return None
    order = sorted(range(len(rows)), key=rows.__getitem__)
    at, partner = (torch.tensor([each[i] for i in order], device=tokens.device) for each in (rows, partners))
    own, corrupt = options[at], answers[partner]
    # Distractors without the corrupt answer, which comes first of them.
    same = (own == corrupt[:, None]).all(-1)
    last = torch.where(same, options.shape[1], torch.arange(options.shape[1], device=own.device)).argsort(
        dim=1, stable=True
    )
    kept = own.gather(1, last[..., None].expand_as(own))
    pairs = torch.cat([kept[:, :1], corrupt[:, None], kept[:, 1:-1]], 1)
    return PromptPairs(
        tokens[at], tokens[partner], pairs, lengths[at], facts=tuple(questions.facts[i] for i in at.tolist())
    )


def facts_first(facts: Sequence[str]) -> list[int]:
    """The rows in turns: the first of every fact, then the second of every fact, and so on."""
    seen: Counter[str] = Counter()
    turns = []
    for i, fact in enumerate(facts):
        turns.append((seen[fact], i))
        seen[fact] += 1
    return [i for _, i in sorted(turns)]
