"""TOFU's questions and answers as tokens."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from mansu_tl.data.answers import joined


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, end: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt (BOS in front where the tokenizer has one) and of the answer that follows it.

    Args:
        end: close the answer with the end-of-sequence token, as in training.
    """
    before = tokenizer.encode(prompt, add_special_tokens=False)
    joint = tokenizer.encode(joined(tokenizer, prompt, f" {answer}"), add_special_tokens=False)
    # A tokenizer that merges across the seam leaves the longest common start as the prompt.
    shared = next((i for i, (a, b) in enumerate(zip(before, joint, strict=False)) if a != b), len(before))
    head = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    tail = [int(tokenizer.eos_token_id)] if end and tokenizer.eos_token_id is not None else []
    return [*head, *joint[:shared]], [*joint[shared:], *tail]


def text_of(tokenizer: PreTrainedTokenizerBase, row: Sequence[int]) -> str:
    """The text of token ids, special tokens left out."""
    return str(tokenizer.decode(list(row), skip_special_tokens=True))
