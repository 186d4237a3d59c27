"""ROUGE-L and Porter's stemmer against what rouge_score 0.1.2, rouge 1.0.1 and NLTK 3.10.4 gave on the same texts."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mansu_tl.errors import MansuError
from mansu_tl.verification.rouge import rouge_l, summary_recall
from mansu_tl.verification.stemmer import stem

# Reference, text; rouge_score's precision, recall and F1 without and with stems; rouge's recall.
CASES = [
    ("The cat sat on the mat.", "the cat, on a mat",
     (0.8, 0.666666667, 0.727272727), (0.8, 0.666666667, 0.727272727), 0.333333333),
    ("As fate would have it, their paths crossed one day in the heart of Madera.",
     "Fate had it that paths were crossing on a day in Madera's heart.",
     (0.428571429, 0.4, 0.413793103), (0.5, 0.466666667, 0.482758621), 0.266666667),
    ("She was running and hopefully relational organizations agreed.",
     "She runs; a relation of organisation is agreeing hopeful",
     (0.111111111, 0.125, 0.117647059), (0.444444444, 0.5, 0.470588235), 0.125),
    ("Paris", "It is paris", (0.333333333, 1.0, 0.5), (0.333333333, 1.0, 0.5), 0.0),
    ("A tall and rugged man. With piercing blue eyes.", "a rugged, tall man with eyes. Blue eyes.",
     (0.75, 0.666666667, 0.705882353), (0.75, 0.666666667, 0.705882353), 0.333333333),
]  # fmt: skip

STEMS = (
    "caresses:caress ponies:poni ties:tie dies:die cats:cat feed:feed agreed:agre plastered:plaster bled:bled "
    "motoring:motor conflated:conflat troubled:troubl sized:size hopping:hop tanned:tan falling:fall hissing:hiss "
    "fizzed:fizz failing:fail filing:file happy:happi sky:sky dying:die enjoy:enjoy relational:relat "
    "conditional:condit rational:ration digitizer:digit radically:radic hopefully:hope analogously:analog "
    "vietnamization:vietnam operator:oper decisiveness:decis formality:formal sensibility:sensibl geology:geolog "
    "triplicate:triplic formative:form electrical:electr goodness:good revival:reviv allowance:allow "
    "inference:infer airliner:airlin gyroscopic:gyroscop adjustable:adjust replacement:replac adjustment:adjust "
    "dependent:depend adoption:adopt communism:commun activate:activ homologous:homolog effective:effect "
    "probate:probat rate:rate cease:ceas controll:control roll:roll died:die proceed:proceed yyyy:yyyi oed:o "
)


@pytest.mark.parametrize(("reference", "text", "plain", "stemmed", "recall"), CASES)
def test_values_are_the_packages(
    reference: str, text: str, plain: tuple[float, ...], stemmed: tuple[float, ...], recall: float
) -> None:
    for wanted, found in ((plain, rouge_l(reference, text)), (stemmed, rouge_l(reference, text, stemmed=True))):
        assert (found.precision, found.recall, found.f1) == pytest.approx(wanted, abs=1e-8)
    assert summary_recall(reference, text) == pytest.approx(recall, abs=1e-8)


def test_by_hand() -> None:
    # the cat on mat: 4 of 5 words said, 4 of 6 wanted; 2 * .8 * .6667 / 1.4667.
    assert rouge_l("The cat sat on the mat.", "the cat, on a mat").f1 == pytest.approx(8 / 11)
    assert rouge_l("a", "").f1 == rouge_l("a", "b").f1 == 0
    # Two different words of three; a word that comes twice counts once, and case tells words apart.
    assert summary_recall("a b c", "c a b") == pytest.approx(2 / 3)
    assert summary_recall("a b a b", "a b") == 1
    assert summary_recall("Paris", "paris") == 0
    # Sentences in another order keep their words.
    assert summary_recall("one two. three", "three. one two") == 1
    assert summary_recall("one", "...") == 0
    for score in (rouge_l, summary_recall):
        with pytest.raises(MansuError, match="has no word"):
            score("...", "a")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=6), st.lists(st.sampled_from("abc"), min_size=1, max_size=6)
)
def test_rouge_l_is_the_longest_common_subsequence(wanted: list[str], said: list[str]) -> None:
    common = max(
        size
        for size in range(len(wanted) + 1)
        for kept in combinations(wanted, size)
        if any(kept == other for other in combinations(said, size))
    )
    found = rouge_l(" ".join(wanted), " ".join(said))
    assert (found.recall, found.precision) == pytest.approx((common / len(wanted), common / len(said)))


def test_stems_are_nltks() -> None:
    known = dict(pair.split(":") for pair in STEMS.split())
    assert {word: stem(word) for word in known} == known
    assert stem("is") == "is"
