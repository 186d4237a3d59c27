"""A tokenizer that writes any text: words and signs that are in its list as one token each, other text letter by letter."""

from __future__ import annotations

import string
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def spelling_tokenizer(words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Byte-level, without merges but those that spell `words` (as they stand behind a space) and single capitals."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(("<pad>", "<s>", "</s>", *alphabet))}
    merges: list[tuple[str, str]] = []
    for word in (*(f"Ġ{letter}" for letter in string.ascii_uppercase), *(f"Ġ{word}" for word in words)):
        whole = word[0]
        for letter in word[1:]:
            if (whole, letter) not in merges:
                merges.append((whole, letter))
            whole += letter
            vocabulary.setdefault(whole, len(vocabulary))
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
