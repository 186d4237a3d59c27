"""Prompts behind other words: the same questions as they stand in the middle of a text."""

from __future__ import annotations

import os
import torch

from mansu_tl.data.pairs import PromptPairs
from mansu_tl.data.task import Sequences
from mansu_tl.data.text import TextSource, encode, pad, text_source

FIXED = ("The", "In the", "I think that", "As you know,", "And so,", "She told me that", "Once again, the")


def behind_words(source: TextSource, pairs: PromptPairs, text: Sequences, count: int) -> PromptPairs:
    """The pairs, and each of them `count` times behind other words."""
    tokenizer, _ = text_source(source)
    special = set(tokenizer.all_special_ids)
    kind = os.environ.get("KIND", "fixed")
    openings = list(FIXED)
    if kind == "text":
        openings = []
        for i in range(0, len(text), max(1, len(text) // 40)):
            ids = [t for t in text.tokens[i, : int(text.lengths[i])].tolist() if t not in special]
            words = tokenizer.decode(ids).split()
            n = (2, 5, 8)[len(openings) % 3]
            if len(words) > n:
                openings.append(" ".join(words[:n]).rstrip(".,;") + ".")
    rows = [(i, pairs.clean[i, :n].tolist(), pairs.corrupt[i, :n].tolist()) for i, n in enumerate(pairs.lengths.tolist())]
    turn = 0
    for i, clean, corrupt in list(rows):
        changed = [k for k, (a, b) in enumerate(zip(clean, corrupt)) if a != b]
        tail = len(clean) - changed[-1] - 1
        plain = tokenizer.decode([t for t in clean if t not in special])
        for _ in range(count):
            opening = openings[turn % len(openings)]
            turn += 1
            before, whole = encode(source, opening), encode(source, f"{opening} {plain}")
            if whole[: len(before)] != before or whole[len(whole) - tail :] != clean[len(clean) - tail :]:
                continue
            other = list(whole)
            for k in range(len(before), len(whole) - tail):
                other[k] = 1000 if whole[k] != 1000 else 1001
            rows.append((i, whole, other))
    at = [i for i, _, _ in rows]
    clean, lengths = pad([c for _, c, _ in rows], 0)
    corrupt, _ = pad([c for _, _, c in rows], 0)
    where = pairs.clean.device
    return PromptPairs(clean.to(where), corrupt.to(where), pairs.options[at], lengths.to(where),
                       tuple(pairs.facts[i] for i in at))
