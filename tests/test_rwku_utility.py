"""RWKU's utility sets beside MMLU: records as published, what is asked, and scores against cases worked out by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from math import log2
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mansu_tl.data.sources import (
    read_rwku_factuality,
    read_rwku_fluency,
    read_rwku_reasoning,
    read_rwku_truthfulness,
)
from mansu_tl.errors import MansuError
from mansu_tl.verification import evaluate_rwku_utility, rwku_utility
from mansu_tl.verification.ngrams import ngram_entropy, nltk_words, wording_entropy
from mansu_tl.verification.word_match import exact_match, word_f1
from tests.spelled import spelling_tokenizer
from tests.tiny import tiny

TOKENIZER = spelling_tokenizer()
MODEL = tiny("llama", vocab_size=len(TOKENIZER), max_position_embeddings=1024)
# Fields as jinzhuoran/RWKU has them, each with the person it stands beside.
REASON = {
    "task": "navigate", "question": "Do you return? Options: (A) Yes (B) No", "answer": "(B)",
    "cot": " Q: One step back?\nA: No. So the answer is (B).\n", "subject": "Ann Bell",
}  # fmt: skip
TRUE = {
    "question": "Is it so?",
    "mc1_targets": {"choices": ["Yes", "No", "Maybe"], "labels": [1, 0, 0]},
    "mc2_targets": {"choices": ["Yes", "Sure", "No", "Maybe"], "labels": [1, 1, 0, 0]},
    "subject": "Ann Bell",
}
FACT = {"question": "Where?", "answers": ["The River Cam", "Cam"], "subject": "Ann Bell"}
FLUENT = {"instruction": "Write a line.", "subject": "Ann Bell"}


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def says(monkeypatch: pytest.MonkeyPatch, *texts: str) -> list[tuple[str, int, bool]]:
    """Makes a model say what a test wants; gives the prompts, the tokens it may write, and whether something stops it."""
    asked: list[tuple[str, int, bool]] = []
    left = list(texts)

    def answered(_: object, __: object, prompts: Sequence[str], ___: object, tokens: int, **more: Any) -> list[str]:
        asked.extend((prompt, tokens, bool(more["stops"])) for prompt in prompts)
        return [left.pop(0) for _ in prompts]

    monkeypatch.setattr(rwku_utility, "written_texts", answered)
    return asked


def test_reasoning_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    items = read_rwku_reasoning(written(tmp_path / "r.jsonl", REASON, REASON, REASON, REASON))
    asked = says(monkeypatch, "We turn. So the answer is (B). The answer is (A).", " \n", "No", "the answer is (A)")
    scores = evaluate_rwku_utility(MODEL, items, TOKENIZER, chat=False)
    assert asked[0] == (
        "Q: One step back?\nA: No. So the answer is (B).\n\n"
        "Following previous examples, answer the following questions and end with 'so the answer is'\n"
        "Q: Do you return? Options: (A) Yes (B) No\nA:",
        256,
        False,
    )
    assert scores.said == ("(B)", "NOANSWER", "No", "the answer is (A)")
    assert scores.wanted == ("(B)",) * 4
    assert scores.values.tolist() == [1, 0, 0, 0]
    assert scores.mean("reasoning") == 0.25


def test_rwku_compares_an_answer_that_is_text_letter_by_letter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl", REASON | {"answer": "yes"}, REASON | {"answer": ["yes", "y"]})
    for whole, values in ((False, [0, 1]), (True, [1, 1])):
        says(monkeypatch, "The answer is yes.", "The answer is yes.")
        scores = evaluate_rwku_utility(MODEL, read_rwku_reasoning(path, whole=whole), TOKENIZER, chat=False)
        assert scores.values.tolist() == values


def test_factuality_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    items = read_rwku_factuality(written(tmp_path / "f.jsonl", FACT, FACT, FACT))
    asked = says(monkeypatch, "a river, a cam!", "river Cam\nQ: Who", "")
    scores = evaluate_rwku_utility(MODEL, items, TOKENIZER, chat=False)
    prompt, tokens, _ = asked[0]
    assert prompt.startswith("\nQ: When did men's figure skating become a summer Olympic sport?\nA: 1908\nQ: ")
    assert prompt.endswith(
        "reunite?\nA: series finale\nPlease briefly answer the following question:\nQ: Where?\nA:"
    ) and (tokens == 30)
    # "river cam" of 2; then 2 shared of 4 said and 2 wanted: precision 1/2, recall 1, F1 2/3.
    assert scores.values.tolist() == pytest.approx([1, 1, 2 / 3, 0, 0, 0])
    assert scores.mean("factuality") == pytest.approx((1 + 2 / 3) / 3)
    assert scores.mean("factuality, exact") == pytest.approx(1 / 3)


def test_fluency_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    items = read_rwku_fluency(written(tmp_path / "a.jsonl", FLUENT, FLUENT, FLUENT))
    # Pairs ab ba ab bc: 1.5 bits; triples aba bab abc: log2 3. One pair again and again: none. One word: no pair.
    asked = says(monkeypatch, "a b a b c", "a a a a a a", "a")
    scores = evaluate_rwku_utility(MODEL, items, TOKENIZER, chat=False, words=str.split)
    assert asked[0][:2] == ("Instruction: Write a line.\n", 256)
    varied = (2 / 3 * 1.5 + 4 / 3 * log2(3)) / 2
    assert scores.values.tolist() == pytest.approx([varied, 0, 0])
    assert scores.mean("fluency") == pytest.approx(varied / 3)


@pytest.mark.parametrize("chat", [False, True])
def test_truthfulness_is_what_the_model_finds_likelier(tmp_path: Path, chat: bool) -> None:
    """Against log-probabilities read off the model's own logits, choice by choice."""
    tokenizer = spelling_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}<a>"
    (item,) = read_rwku_truthfulness(written(tmp_path / "t.jsonl", TRUE))
    assert item.request.endswith("A: The 1992 Olympics were held in Barcelona, Spain.\n\nQ: Is it so?")
    prompt = f"<u>{item.request}</u><a> A:" if chat else f"{item.request}\nA:"
    likely = {}
    for choice in item.more:
        before, whole = (tokenizer.encode(text, add_special_tokens=not chat) for text in (prompt, f"{prompt} {choice}"))
        with torch.no_grad():
            logits = MODEL(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        likely[choice] = sum(logits[i - 1, whole[i]].item() for i in range(len(before), len(whole)))
    scores = evaluate_rwku_utility(MODEL, [item], tokenizer, chat=chat)
    assert scores.mean("truthfulness") == float(likely["Yes"] > max(likely["No"], likely["Maybe"]))
    assert scores.said[0] == max(("Yes", "No", "Maybe"), key=lambda choice: likely[choice])
    chances = {choice: 2.718281828459045**value for choice, value in likely.items()}
    shared = (chances["Yes"] + chances["Sure"]) / sum(chances.values())
    assert scores.mean("truthfulness, MC2") == pytest.approx(shared, abs=1e-5)


def test_all_sets_at_once_in_the_chat_template(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokenizer = spelling_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}<a>"
    items = [
        *read_rwku_fluency(written(tmp_path / "a.jsonl", FLUENT)),
        *read_rwku_factuality(written(tmp_path / "f.jsonl", FACT)),
        *read_rwku_reasoning(written(tmp_path / "r.jsonl", REASON)),
        *read_rwku_truthfulness(written(tmp_path / "t.jsonl", TRUE)),
    ]
    asked = says(monkeypatch, "So the answer is B.", "Cam", "a b c d")
    scores = evaluate_rwku_utility(MODEL, items, tokenizer, words=str.split, title="m")
    assert [prompt.rpartition("</u>")[2] for prompt, *_ in asked] == ["<a> A:", "<a>A:", "<a>"]
    found = scores.summary().set_index("set")
    assert list(found.index) == [
        "reasoning", "factuality", "factuality, exact", "fluency", "truthfulness", "truthfulness, MC2"
    ]  # fmt: skip
    assert found["mean"]["reasoning"] == found["mean"]["factuality"] == 1
    assert found["mean"]["fluency"] == pytest.approx(log2(3) / 3 + 2 / 3)


def test_words_are_compared_without_articles_case_and_punctuation() -> None:
    assert exact_match("The U.S.A.!", ["usa"]) == 1 and exact_match("theatre", ["atre"]) == 0
    assert exact_match("a", ["."]) == 1 and word_f1("the", ["x"]) == 0 and word_f1("", ["!"]) == 1
    # "red red" against "red blue": one shared of two each.
    assert word_f1("red red", ["green", "red blue"]) == 0.5
    for bad in ([], "usa"):
        with pytest.raises(MansuError, match="give a list of at least one"):
            word_f1("usa", bad)


def test_entropy_by_hand() -> None:
    assert ngram_entropy(list("aabb"), 1) == 1 and ngram_entropy(["a"], 2) == 0
    assert wording_entropy(list("abcd")) == pytest.approx(log2(3) / 3 + 2 / 3)
    with pytest.raises(MansuError, match="n=0"):
        ngram_entropy(["a"], 0)


def test_fluency_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    items = read_rwku_fluency(written(tmp_path / "a.jsonl", FLUENT))
    monkeypatch.setattr("mansu_tl.verification.ngrams.find_spec", lambda _: None)
    with pytest.raises(MansuError, match="NLTK is not installed.*pip install nltk, or pass words="):
        evaluate_rwku_utility(MODEL, items, TOKENIZER, chat=False)

    def missing(_: str) -> list[str]:
        raise LookupError("Resource punkt not found")

    monkeypatch.setattr("mansu_tl.verification.ngrams.find_spec", lambda _: True)
    monkeypatch.setitem(sys.modules, "nltk", SimpleNamespace(word_tokenize=missing))
    with pytest.raises(MansuError, match="sentence model is not on this machine; python -m nltk.downloader"):
        nltk_words()
    monkeypatch.setitem(sys.modules, "nltk", SimpleNamespace(word_tokenize=str.split))
    assert nltk_words()("a b") == ["a", "b"]


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (read_rwku_reasoning, REASON | {"cot": None}, "field 'cot' is missing"),
        (read_rwku_reasoning, REASON | {"answer": []}, "answer has 0 of at least 1"),
        (read_rwku_factuality, FACT | {"answers": []}, "answers has 0 of at least 1"),
        (read_rwku_factuality, FACT | {"answers": "Cam"}, "answers is 'Cam'; it must be a list"),
        (read_rwku_fluency, {"subject": "Ann"}, "field 'instruction' is missing"),
        (read_rwku_truthfulness, TRUE | {"mc1_targets": "Yes"}, "mc1_targets is 'Yes'; it must be an object"),
        (
            read_rwku_truthfulness,
            TRUE | {"mc1_targets": {"choices": ["Yes", "No"], "labels": [0, 0]}},
            r"labels is \[0, 0\]; it must be 1 \(true\) or 0 for each of 2 choices",
        ),
        (
            read_rwku_truthfulness,
            TRUE | {"mc1_targets": {"choices": ["Yes", "Never"], "labels": [1, 0]}},
            "choice 'Never' of mc1_targets is not in mc2_targets",
        ),
    ],
)
def test_bad_records_are_refused(tmp_path: Path, read: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(MansuError, match=message) as found:
        read(written(tmp_path / "bad.jsonl", row))
    assert "bad.jsonl, line 1" in str(found.value)


def test_nothing_to_ask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MansuError, match="no item given"):
        evaluate_rwku_utility(MODEL, [], TOKENIZER)
    items = read_rwku_factuality(written(tmp_path / "f.jsonl", FACT))
    with pytest.raises(MansuError, match="RWKU utility: the tokenizer has no chat template"):
        evaluate_rwku_utility(MODEL, items, TOKENIZER)
