"""Prompts behind other words: the same question as it stands in the middle of a text."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from mansu_tl.data.corruption import EmbeddingCorruption
from mansu_tl.data.pairs import SUBJECT, PromptPairs, Span
from mansu_tl.data.text import TextSource, encode, pad, text_source
from mansu_tl.errors import MansuError

OPENINGS = ("The", "In the", "I think that", "As you know,", "And so,", "She told me that", "Once again, the")


def behind_words(source: TextSource, pairs: PromptPairs, count: int) -> PromptPairs:
    """The pairs, and each of them behind some of `OPENINGS`, by turns.

    What stands first in a text has other tokens (no space in front) and other inputs than the same words later on. The
    subject is the span from the first token that differs from the corrupt prompt's to the last; the pairs that come back
    name it, in the place of corrupt prompts. After MEMIT's prefixes (arXiv 2210.07229, section 4.2.2), with fixed ones.

    Args:
        count: openings for each pair, at most: a pair whose own words would get other tokens behind them has fewer or none.

    Raises:
        MansuError: no tokenizer, or one that can put none of the openings in front of any pair (a chat template's own tokens
            stand there, or the words are not in its vocabulary).
    """
    tokenizer, _ = text_source(source)
    special = set(tokenizer.all_special_ids)
    known = [text for text in OPENINGS if tokenizer.unk_token_id not in encode(source, text)]
    rows: list[tuple[int, list[int], int, int]] = []
    behind: list[tuple[int, list[int], int, int]] = []
    for i, (length, changed) in enumerate(zip(pairs.lengths.tolist(), pairs.changed.cpu(), strict=True)):
        tokens, subject = pairs.clean[i, :length].tolist(), changed[:length].nonzero()[:, 0].tolist()
        first, left = subject[0], length - subject[-1] - 1
        rows.append((i, tokens, first, length - left))
        bos = tokens[:1] == [tokenizer.bos_token_id]
        plain = tokens[bos:]
        writable = (
            []
            if special.intersection(plain)
            else [known[(i * count + turn) % len(known)] for turn in range(len(known))]
        )
        # Where the first token that differs lies inside a word, the subject begins with the word.
        for start in range(first, bos - 1, -1):
            lead, text = (_text(tokenizer, ids) for ids in (plain[: start - bos], plain))
            found = []
            for opening in writable:
                whole, before = encode(source, f"{opening} {text}"), encode(source, f"{opening} {lead}".rstrip())
                # The words in front and those behind the subject keep their tokens; only the subject's may change.
                if whole[: len(before)] == before and whole[len(whole) - left :] == tokens[length - left :]:
                    found.append((i, whole, len(before), len(whole) - left))
            if found:
                behind += found[:count]
                break
    if not behind:
        raise MansuError(
            f"forget pairs: the tokenizer can write none of {len(OPENINGS)} openings ({OPENINGS[0]!r}, ...) in front of a "
            f"prompt, which may be a chat's or in other words than these; choose contexts=0 instead of {count}"
        )
    rows += behind
    at = [i for i, _, _, _ in rows]
    device = pairs.clean.device
    clean, lengths = (each.to(device) for each in pad([ids for _, ids, _, _ in rows], 0))
    first_of, stop_of = (torch.tensor([row[k] for row in rows], device=device) for k in (2, 3))
    named = tuple(sorted({ids[k] for _, ids, a, b in rows for k in range(a, b)}))
    return PromptPairs(
        clean=clean,
        corrupt=clean,
        options=pairs.options[at],
        lengths=lengths,
        facts=tuple(pairs.facts[i] for i in at),
        spans=(Span(SUBJECT, first_of, stop_of),),
        corruption=EmbeddingCorruption("zero", named),
    )


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """What the ids stand for, with every space."""
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
