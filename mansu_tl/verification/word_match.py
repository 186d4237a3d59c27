"""Answers compared word by word, as question answering does since SQuAD: exact match and F1 (TriviaQA, BBH in RWKU).

Words are in lower case, without ASCII punctuation and without the articles a, an and the; as RWKU's eval_bbh.py and
eval_triviaqa.py, which have them from topiocqa.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from mansu_tl.errors import MansuError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(said: str, references: Sequence[str]) -> float:
    """1 where an answer has the same words in the same order as one of the references, else 0.

    An answer and a reference without a word are the same.

    Raises:
        MansuError: no reference.
    """
    _require(references)
    return float(any(_words(said) == _words(reference) for reference in references))


def word_f1(said: str, references: Sequence[str]) -> float:
    """F1 of an answer's words against a reference's, in [0, 1]; of several references the best.

    A word that is there twice counts twice. Where answer or reference has no word, 1 if both have none, else 0.

    Raises:
        MansuError: no reference.
    """
    _require(references)
    return max(_f1(_words(said), _words(reference)) for reference in references)


def _f1(said: list[str], wanted: list[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _require(references: Sequence[str]) -> None:
    if not references or isinstance(references, str):
        raise MansuError(f"word match: references is {references!r}; give a list of at least one")
