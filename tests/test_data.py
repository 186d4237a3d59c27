"""Pairs and tasks: from text, from files, and every way in which they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mansu_tl as mtl
from mansu_tl.data import PromptPairs
from mansu_tl.data.jsonl import read_task
from mansu_tl.errors import MansuError
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def pair(kind: str, i: int, **extra: object) -> dict[str, object]:
    row = {
        "set": kind,
        "clean": f"w{i} w9 w5",
        "corrupt": f"w{i} w8 w5",
        "answer": f"w{30 + i}",
        "distractors": [f"w{40 + i}", "w60"],
    }
    return row | extra


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_pairs_from_text_are_the_tokens_one_would_expect() -> None:
    pairs = PromptPairs.from_text(TOKENIZER, ["w3 w4", "w3 w4 w5"], ["w3 w6", "w3 w6 w5"], ["w7", "w8"], ["w9", "w50"])
    assert pairs.clean.tolist() == [[1, 3, 4, 0], [1, 3, 4, 5]]
    assert pairs.corrupt.tolist() == [[1, 3, 6, 0], [1, 3, 6, 5]]
    assert pairs.lengths.tolist() == [3, 4]
    assert pairs.answers.tolist() == [7, 8]
    assert pairs.distractors.tolist() == [[9], [50]]
    assert len(pairs[[1]]) == 1
    assert pairs[[1]].clean.tolist() == [[1, 3, 4, 5]]


@pytest.mark.parametrize(
    ("clean", "corrupt", "answer", "wrong", "message"),
    [
        (["w3 w4"], ["w3"], ["w7"], ["w9"], r"pair 0: clean has 3 tokens, corrupt 2: .*'w4'"),
        (["w3"], ["w4"], ["w7 w8"], ["w9"], r"pair 0: answer 'w7 w8' continues 'w3' as 2 tokens"),
        (["w3"], ["w4"], ["w7"], ["w9 w9"], r"pair 0: distractor 'w9 w9'"),
        (["w3"], ["w4", "w5"], ["w7"], ["w9"], "differ in number"),
        ([], [], [], [], "none given"),
    ],
)
def test_bad_pairs_are_refused(clean, corrupt, answer, wrong, message: str) -> None:
    with pytest.raises(MansuError, match=message):
        PromptPairs.from_text(TOKENIZER, clean, corrupt, answer, wrong)


def test_one_wording_is_the_largest_group_that_differs_in_its_subject_alone() -> None:
    clean = ["w6 w3 w7", "w6 w4 w7", "w8 w3 w9 w9", "w6 w5 w7"]
    corrupt = ["w6 w5 w7", "w6 w3 w7", "w8 w4 w9 w9", "w6 w4 w7"]
    pairs = PromptPairs.from_text(TOKENIZER, clean, corrupt, ["w50"] * 4, ["w51"] * 4, labels=list("abcd"))
    alike, constant = pairs.one_wording()
    assert alike.labels == ("a", "b", "d")
    assert alike.clean.tolist() == [[1, 6, 3, 7], [1, 6, 4, 7], [1, 6, 5, 7]]
    assert constant.tolist() == [True, True, False, True]


def test_bad_lengths_are_refused() -> None:
    tokens = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(MansuError, match="pair 1: length 4"):
        PromptPairs.from_tokens(tokens, tokens, tokens[:, 0], tokens[:, 0], torch.tensor([3, 4]))


def test_a_task_file_becomes_the_sets_it_names(tmp_path: Path) -> None:
    rows = [
        pair("forget", 3, fact="a"),
        pair("forget", 4, fact="a", held_out=True),
        pair("retain", 5),
        pair("near", 6),
        {"set": "text", "text": "w6 w7 w3"},
        {"set": "unseen", "text": "w50 w5"},
    ]
    task = read_task(write(tmp_path / "t.jsonl", rows), TOKENIZER)
    assert task.name == "t"
    assert {key: len(value) for key, value in task.questions.items()} == {
        "forget": 1, "forget_paraphrase": 1, "retain": 1, "near": 1,
    }  # fmt: skip
    assert len(task.forget_pairs) == 1  # held-out wordings are never trained on
    assert task.questions["forget"].choices.tolist() == [[33, 43, 60]]
    assert task.retain_text.tokens.tolist() == [[1, 5, 9, 5, 35], [1, 6, 7, 3, 0]]
    assert task.near_text.tokens.tolist() == [[1, 6, 9, 5, 36]]
    assert task.unseen.tokens.tolist() == [[1, 50, 5]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([pair("retain", 5)], "the forget set is empty"),
        ([pair("forget", 5)], "the retain set is empty"),
        ([pair("forget", 3, fact="a"), pair("retain", 4, fact="a")], "forget and retain share 1 facts, e.g. 'a'"),
        (["{oops"], "line 1: not JSON"),
        ([pair("forget", 3), pair("retian", 4)], "line 2: set is 'retian'"),
        ([pair("forget", 3, anser="w3")], "line 1: unknown key 'anser'"),
        ([{"set": "forget", "clean": "w3"}], "line 1: 'answer' is missing"),
        ([pair("forget", 3), pair("forget", 4, distractors=["w1"]), pair("retain", 5)], "line 2: distractors"),
        (
            [pair("forget", 3, distractors="w1"), pair("retain", 5)],
            "line 1: distractors 'w1'; give a list of at least one",
        ),
        ([pair("forget", 3), pair("forget", 4, clean="w3 w4 w5 w6 w7"), pair("retain", 5)], "line 2: clean has"),
        ([pair("forget", 3), pair("forget", 4, answer="w7 w8"), pair("retain", 5)], "line 2: answer 'w7 w8' continues"),
        ([pair("forget", 3), pair("retain", 4, corrupt="w4")], "clean has 4 tokens, corrupt 2"),
    ],
)
def test_bad_task_files_are_refused(rows, message: str, tmp_path: Path) -> None:
    with pytest.raises(MansuError, match=message):
        read_task(write(tmp_path / "t.jsonl", rows), TOKENIZER)


def test_tasks_by_name_and_by_file() -> None:
    assert mtl.load_task("pocket").name == "pocket"
    with pytest.raises(MansuError, match="no such task file"):
        mtl.load_task("nothing.jsonl", tokenizer=TOKENIZER)
    with pytest.raises(MansuError, match="needs a tokenizer"):
        mtl.load_task("nothing.jsonl")
