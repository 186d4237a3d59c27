"""Porter's stemmer (1980, "An algorithm for suffix stripping", Program 14.3) with NLTK's extensions, as rouge_score uses it.

Rules are tried from the longest ending down; the first ending that a word has decides, whether its condition holds or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

_VOWELS = frozenset("aeiou")
# What NLTK knows by heart.
_IRREGULAR = {
    "sky": "sky", "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news", "innings": "inning",
    "inning": "inning", "outings": "outing", "outing": "outing", "cannings": "canning", "canning": "canning",
    "howe": "howe", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed",
}  # fmt: skip
_STEP_2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble", "alli": "al",
    "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate", "ator": "ate", "alism": "al",
    "iveness": "ive", "fulness": "ful", "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble", "fulli": "ful",
}  # fmt: skip
_STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
_STEP_4 = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti", "ous",
    "ive", "ize",
)  # fmt: skip


def stem(word: str) -> str:
    """The stem of a word in lower case; words of two letters and fewer stay."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    for step in (_plural, _past, _y_to_i, _second, _third, _fourth, _last_e, _double_l):
        word = step(word)
    return word


def _consonants(text: str) -> list[bool]:
    """Which letters are consonants: all but a, e, i, o, u, and y behind a consonant."""
    out: list[bool] = []
    for i, letter in enumerate(text):
        out.append(letter not in _VOWELS and (letter != "y" or i == 0 or not out[-1]))
    return out


def _measure(text: str) -> int:
    """How many times a vowel is followed by a consonant."""
    kinds = _consonants(text)
    return sum(second and not first for first, second in pairwise(kinds))


def _has_vowel(text: str) -> bool:
    return not all(_consonants(text))


def _doubled(text: str) -> bool:
    return len(text) >= 2 and text[-1] == text[-2] and _consonants(text)[-1]


def _short_end(text: str) -> bool:
    """Consonant, vowel, consonant other than w, x and y at the end; NLTK: or a vowel and a consonant alone."""
    kinds = _consonants(text)
    return (kinds[-3:] == [True, False, True] and text[-1] not in "wxy") or kinds == [False, True]


def _ending(word: str, endings: Sequence[str]) -> str:
    """The longest of some endings that a word has."""
    return max((end for end in endings if word.endswith(end)), key=len, default="")


def _plural(word: str) -> str:
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    end = _ending(word, ("ed", "ing"))
    base = word[: len(word) - len(end)]
    if not end or not _has_vowel(base):
        return word
    if base.endswith(("at", "bl", "iz")):
        return base + "e"
    if _doubled(base):
        return base if base[-1] in "lsz" else base[:-1]
    return base + "e" if _measure(base) == 1 and _short_end(base) else base


def _y_to_i(word: str) -> str:
    """NLTK's condition: behind a consonant that is not the first letter."""
    base = word[:-1]
    return base + "i" if word.endswith("y") and len(base) > 1 and _consonants(base)[-1] else word


def _second(word: str) -> str:
    while word.endswith("alli") and _measure(word[:-4]) > 0:
        word = word[:-2]
    if word.endswith("logi"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return _mapped(word, _STEP_2)


def _third(word: str) -> str:
    return _mapped(word, _STEP_3)


def _mapped(word: str, table: dict[str, str]) -> str:
    end = _ending(word, tuple(table))
    base = word[: len(word) - len(end)]
    return base + table[end] if end and _measure(base) > 0 else word


def _fourth(word: str) -> str:
    end = _ending(word, _STEP_4)
    base = word[: len(word) - len(end)]
    if not end or _measure(base) <= 1 or (end == "ion" and base[-1] not in "st"):
        return word
    return base


def _last_e(word: str) -> str:
    base = word[:-1]
    if not word.endswith("e") or _measure(base) == 0:
        return word
    return base if _measure(base) > 1 or not _short_end(base) else word


def _double_l(word: str) -> str:
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
