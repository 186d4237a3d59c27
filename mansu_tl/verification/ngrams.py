"""How varied a text's wording is: the entropy of its n-grams (Zhang et al. 2018, arXiv 1809.05972), as RWKU weighs it.

A text that repeats itself has few different n-grams and a low entropy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from math import log2

from mansu_tl.errors import MansuError

# Half of 2/3 and of 4/3: RWKU takes the mean of the two weighted entropies.
_WEIGHTS = {2: 1 / 3, 3: 2 / 3}
Words = Callable[[str], Sequence[str]]


def ngram_entropy(words: Sequence[str], n: int) -> float:
    """Entropy of a text's runs of n words, in bits; 0 where it has fewer than n words.

    Raises:
        MansuError: n below 1.
    """
    if n < 1:
        raise MansuError(f"n-gram entropy: n={n}; give at least 1")
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = sum(counts.values())
    return sum((count / total * log2(total / count) for count in counts.values()), 0.0)


def wording_entropy(words: Sequence[str]) -> float:
    """RWKU's fluency of one text, in bits: a third of the entropy of its pairs and two thirds of that of its triples."""
    return sum((weight * ngram_entropy(words, n) for n, weight in _WEIGHTS.items()), 0.0)


def nltk_words() -> Words:
    """NLTK's `word_tokenize`, by which RWKU splits text.

    Raises:
        MansuError: NLTK or its sentence model is not there.
    """
    if find_spec("nltk") is None:
        raise MansuError("fluency: NLTK is not installed, by whose words RWKU counts; pip install nltk, or pass words=")
    split: Words = import_module("nltk").word_tokenize
    try:
        split("A word. Another.")
    except LookupError:
        raise MansuError(
            "fluency: NLTK's sentence model is not on this machine; python -m nltk.downloader punkt punkt_tab, or pass words="
        ) from None
    return split
