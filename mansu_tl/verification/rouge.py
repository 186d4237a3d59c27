"""ROUGE-L (Lin 2004) as the two Python packages compute it that benchmarks use: rouge_score, and rouge.

- `rouge_l` is rouge_score's (Google's): words are runs of a-z and 0-9 in lower case, longer ones than three letters
  stemmed where the benchmark asks for it; precision, recall and F1 of their longest common subsequence. MUSE: no
  stemmer. LUME and open-unlearning: stemmer.
- `summary_recall` is the recall of the package rouge (pltrdy's): upper and lower case differ, "." ends a sentence,
  words end at white space, and *different* words are counted. RWKU uses it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mansu_tl.errors import MansuError
from mansu_tl.verification.stemmer import stem

_WORD = re.compile(r"[a-z0-9]+")
# rouge_score leaves words of three letters and fewer as they are.
_STEMMED_FROM = 4


@dataclass(frozen=True)
class RougeL:
    """One text against its reference, all in [0, 1].

    Attributes:
        precision: the longest common subsequence over the text's words.
        recall: the same over the reference's words.
    """

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """Harmonic mean of both; 0 where nothing is shared."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def rouge_l(reference: str, text: str, *, stemmed: bool = False) -> RougeL:
    """ROUGE-L of a text against a reference, as rouge_score computes it.

    Args:
        stemmed: compare stems (`use_stemmer=True`).

    Raises:
        MansuError: a reference without a word.
    """
    wanted, words = (_words(each, stemmed) for each in (reference, text))
    if not wanted:
        raise MansuError(f"ROUGE-L: the reference {reference!r} has no word; drop the question")
    common = _table(wanted, words)[-1][-1]
    return RougeL(common / len(words) if words else 0.0, common / len(wanted))


def summary_recall(reference: str, text: str) -> float:
    """ROUGE-L recall of a text, in [0, 1], as the package rouge computes it (`get_scores(...)["rouge-l"]["r"]`).

    Of every sentence of the reference with every one of the text a longest common subsequence is taken; the different words
    in any of them, over the different words of the reference. A text without a sentence counts as one that says nothing.

    Raises:
        MansuError: a reference without a word.
    """
    wanted, said = _sentences(reference), _sentences(text)
    of_all = {word for sentence in wanted for word in sentence}
    if not of_all - {""}:
        raise MansuError(f"ROUGE-L: the reference {reference!r} has no word; drop the question")
    shared = {word for one in wanted for other in said for word in _common(one, other)}
    return len(shared) / len(of_all)


def _words(text: str, stemmed: bool) -> list[str]:
    words = _WORD.findall(text.lower())
    return [stem(word) if len(word) >= _STEMMED_FROM else word for word in words] if stemmed else words


def _sentences(text: str) -> list[list[str]]:
    # A piece of white space between two full stops is a sentence of one empty word there, and stays one.
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _table(one: Sequence[str], other: Sequence[str]) -> list[list[int]]:
    """Lengths of the longest common subsequences of all beginnings of two lists."""
    table = [[0] * (len(other) + 1)]
    for word in one:
        above, row = table[-1], [0]
        for j, found in enumerate(other):
            row.append(above[j] + 1 if word == found else max(above[j + 1], row[j]))
        table.append(row)
    return table


def _common(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """A longest common subsequence: of several, the one that the package takes."""
    table, i, j, out = _table(one, other), len(one), len(other), []
    while i and j:
        if one[i - 1] == other[j - 1]:
            out.append(one[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return out[::-1]
