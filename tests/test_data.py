"""Pairs and tasks: from text, from files, and every way in which they can be wrong."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import mansu_tl as mtl
from mansu_tl.data import PromptPairs, Task, corruption
from mansu_tl.data.sources import register_source, registry, rows_reader, sources
from mansu_tl.data.sources import source as source_of
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint
from mansu_tl.registry import Registry
from tests.tiny import tiny, tiny_tokenizer

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
        (
            ["w3"],
            ["w4"],
            ["w7 w8"],
            ["w7  w8"],
            r"distractor 'w7  w8' and answer 'w7 w8' are the same tokens 'w7', 'w8'",
        ),
        (
            ["w3"],
            ["w4"],
            ["w7"],
            [["w9 w9", "w9  w9"]],
            r"pair 0: distractor 'w9  w9' and distractor 'w9 w9' are the same",
        ),
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
    task = mtl.load_task(write(tmp_path / "t.jsonl", rows), tokenizer=TOKENIZER)
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
        ([pair("forget", 3), pair("retain", 4, corrupt="w4")], "clean has 4 tokens, corrupt 2"),
        # every field has a type
        ([pair("forget", 3, clean=None)], "line 1: clean is null; a forget line needs it"),
        ([pair("forget", 3, corrupt=7)], "line 1: corrupt is 7, not text"),
        ([pair("forget", 3, corrupt=["w3"])], r"line 1: corrupt is \['w3'\], not text"),
        ([pair("forget", 3, answer=7)], "line 1: answer is 7, not text; write it as text, in quotes"),
        ([pair("forget", 3, answer=True)], "line 1: answer is True, not text"),
        ([pair("forget", 3, answer="")], r"line 1: answer is blank \(''\)"),
        ([pair("forget", 3, clean=" ")], "line 1: clean is blank"),
        ([pair("forget", 3, fact=None)], "line 1: fact is null; name the fact, or leave the key out"),
        ([pair("forget", 3, fact="")], "line 1: fact is blank"),
        ([pair("forget", 3, fact=7)], "line 1: fact is 7, not text"),
        ([pair("forget", 3, distractors=None)], "line 1: distractors is null"),
        ([pair("forget", 3, distractors=[])], r"line 1: distractors \[\]; give a list of at least one text"),
        ([pair("forget", 3, distractors=["w4", 5])], "line 1: distractor 1 is 5, not text"),
        ([pair("forget", 3, distractors=["w4", None])], "line 1: distractor 1 is None, not text"),
        ([pair("forget", 3, distractors=["w4", ""])], "line 1: distractor 1 is blank"),
        ([pair("forget", 3, distractors=["w4", "w4"])], "line 1: distractor 'w4' is there twice"),
        ([pair("forget", 3, distractors=["w4", " w4"]), pair("retain", 5)], "line 1: .* are the same token 'w4'"),
        (
            [pair("forget", 3, distractors=["w33", "w4"]), pair("retain", 5)],
            "line 1: .*answer 'w33' are the same token",
        ),
        ([pair("forget", 3, corrupt="w3 w9 w5"), pair("retain", 5)], "line 1: clean .* are the same tokens"),
        *(
            ([pair("forget", 3, held_out=flag)], f"line 1: held_out is {shown}")
            for flag, shown in (
                ("true", "'true'"),
                ("false", "'false'"),
                (1, "1"),
                (0, "0"),
                (0.0, "0.0"),
                ("", "''"),
                (None, "null"),
                ([], r"\[\]"),
            )
        ),
        ([pair("forget", 3, answer_space="yes")], "line 1: answer_space is 'yes'"),
        ([pair("forget", 3, answer_space=1)], "line 1: answer_space is 1"),
        ([{"set": "text", "text": ""}], "line 1: text is blank"),
        ([{"set": "text", "text": 7}], "line 1: text is 7, not text"),
        ([{"set": "text", "text": None}], "line 1: text is null; a text line needs it"),
        ([{"set": "text", "text": "w3", "held_out": True}], "line 1: unknown key 'held_out'; known: set, text"),
        ([{"set": "unseen"}], "line 1: 'text' is missing; a unseen line needs it"),
        ([pair("forget", 3, text="w3")], "line 1: unknown key 'text'"),
        ([pair("forget", 3, note=None)], "line 1: unknown key 'note'"),
        ([{"clean": "w3"}], "line 1: set is None; choose one of forget, retain, near, text, unseen"),
        ([{"set": ["forget"]}], r"line 1: set is \['forget'\]"),
        ([{"set": True}], "line 1: set is True"),
        (['["forget"]'], "set is None|no object"),
        (["7"], "line 1: 7 is no object"),
        (["null"], "line 1: None is no object"),
        (['{"set": "text", "text": "w3", "text": "w4"}'], "line 1: key 'text' is there twice"),
        ([""], "holds no row"),
        # a fact is in one set
        ([pair("forget", 3, fact="a"), pair("retain", 5), pair("near", 6, fact="a")], "forget and near share 1 facts"),
        (
            [pair("forget", 3, fact="a"), pair("retain", 5), pair("retain", 6, fact="a", held_out=True)],
            r"forget and retain share 1 facts, e.g. 'a' \(.*line 1; .*line 3\); remove it from one",
        ),
        (
            [pair("forget", 3), pair("forget", 4, fact="a", held_out=True), pair("retain", 5, fact="a")],
            "forget and retain share 1 facts",
        ),
        (
            [pair("forget", 3, fact="a"), pair("retain", 5, clean="w3 w9 w5", fact="b")],
            "forget and retain share 1 prompts, e.g. 'w3 w9 w5'",
        ),
    ],
)
def test_bad_task_files_are_refused(rows, message: str, tmp_path: Path) -> None:
    with pytest.raises(MansuError, match=message):
        mtl.load_task(write(tmp_path / "t.jsonl", rows), tokenizer=TOKENIZER)


def test_the_summary_adds_up_to_the_file(tmp_path: Path) -> None:
    rows = [
        *(pair("forget", i, fact="a", clean=f"w{i} w9 w5") for i in range(3, 6)),
        pair("forget", 6, fact="a", held_out=True),
        pair("retain", 7),
        *(pair("near", i, held_out=i > 8) for i in range(8, 11)),
        *({"set": "text", "text": f"w{i} w3"} for i in range(20, 24)),
        {"set": "unseen", "text": "w50 w5"},
    ]
    file = write(tmp_path / "t.jsonl", rows)
    file.write_text(file.read_text().replace("\n", "\n\n  \n"))  # blank lines are no rows
    task = mtl.load_task(file, tokenizer=TOKENIZER)
    assert task.lines == {
        "forget": 3, "forget, held out": 1, "retain": 1, "near": 1, "near, held out": 2, "text": 4, "unseen": 1,
    }  # fmt: skip
    assert sum(task.lines.values()) == len(rows) == 13
    assert repr(task).endswith("; 13 lines: forget 3 + 1 held out, retain 1, near 1 + 2 held out, text 4, unseen 1)")
    # and every line is somewhere
    assert {key: len(value) for key, value in task.questions.items()} == {
        "forget": 3, "forget_paraphrase": 1, "retain": 1, "near": 1, "near_paraphrase": 2,
    }  # fmt: skip
    assert (len(task.retain_text), len(task.near_text), len(task.unseen)) == (1 + 4, 1, 1)
    assert task.to("cpu").lines == dataclasses.replace(task, name="x").lines == task.lines


def test_a_task_made_by_hand_is_held_against_the_same() -> None:
    task = mtl.load_task("pocket")
    near = dataclasses.replace(
        task.questions["near"], facts=task.questions["forget"].facts[:1] * len(task.questions["near"])
    )
    with pytest.raises(MansuError, match="task 'pocket': forget and near share 1 facts"):
        dataclasses.replace(task, questions={**task.questions, "near": near})
    held = dataclasses.replace(near, facts=task.questions["forget_paraphrase"].facts[:1] * len(near))
    with pytest.raises(MansuError, match="task 'pocket': forget and retain share 1 facts"):
        dataclasses.replace(task, questions={**task.questions, "retain_paraphrase": held})


# Files as people save them -------------------------------------------------------------------------------------------

ROWS = [pair("forget", 3), pair("forget", 4, held_out=True), pair("retain", 5), {"set": "text", "text": "w6 w7 w3"}]


def same(task: Task, other: Task) -> bool:
    parts = [
        [t.forget_pairs.clean, t.retain_pairs.corrupt, t.retain_text.tokens, *(q.choices for q in t.questions.values())]
        for t in (task, other)
    ]
    return task.lines == other.lines and all(torch.equal(a, b) for a, b in zip(*parts, strict=True))


@pytest.fixture
def plain(tmp_path: Path) -> Task:
    return mtl.load_task(write(tmp_path / "plain.jsonl", ROWS), tokenizer=TOKENIZER)


def text_of(rows: list[object], end: str = "\n") -> str:
    return end.join(json.dumps(row, ensure_ascii=False) for row in rows)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("bom.jsonl", text_of(ROWS).encode("utf-8-sig")),
        ("joined.jsonl", b"\n".join(text_of([row]).encode("utf-8-sig") for row in ROWS)),
        ("crlf.jsonl", text_of(ROWS, "\r\n").encode() + b"\r\n"),
        ("cr.jsonl", text_of(ROWS, "\r").encode()),
        ("blank.jsonl", b"\n \n" + text_of(ROWS, "\n\t\n").encode() + b"\n\n"),
        ("array.json", json.dumps(ROWS).encode()),
        ("pretty.json", json.dumps(ROWS, indent=2).encode("utf-8-sig")),
        ("task.jsonl.gz", gzip.compress(text_of(ROWS).encode())),
        ("a \N{TEST TUBE} b \u00e9\u6771.jsonl", text_of(ROWS).encode()),
        ("no_ending", text_of(ROWS).encode()),
        (".hidden", text_of(ROWS).encode()),
    ],
)
def test_files_are_read_as_people_save_them(plain: Task, tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    task = mtl.load_task(tmp_path / name, tokenizer=TOKENIZER)
    assert same(task, plain)
    assert task.name == name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")
    assert same(mtl.load_task(str(tmp_path / name), tokenizer=TOKENIZER), plain)


def test_a_home_folder_may_be_written_as_a_tilde(plain: Task, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert same(mtl.load_task("~/plain.jsonl", tokenizer=TOKENIZER), plain)
    with pytest.raises(MansuError, match="no such user's home; write the path out"):
        mtl.load_task("~nobody-of-this-name/t.jsonl", tokenizer=TOKENIZER)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085"])
def test_only_line_feeds_and_carriage_returns_end_a_line(tmp_path: Path, mark: str) -> None:
    """`str.splitlines` also ends one at these, which are legal inside a JSON string."""
    rows = [*ROWS, {"set": "text", "text": f"w8{mark}w9"}]
    task = mtl.load_task(write(tmp_path / "t.jsonl", [text_of([row]) for row in rows]), tokenizer=TOKENIZER)
    assert sum(task.lines.values()) == len(rows)
    assert task.retain_text.tokens[-1].tolist() == [1, 8, 9, 0, 0]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "u16.jsonl",
            text_of(ROWS).encode("utf-16"),
            "u16.jsonl: UTF-16, UTF-32 or no text at all, not UTF-8; save it",
        ),
        ("u16le.jsonl", text_of(ROWS).encode("utf-16-le"), "UTF-16, UTF-32 or no text at all"),
        ("u16be.jsonl", text_of(ROWS).encode("utf-16-be"), "UTF-16, UTF-32 or no text at all"),
        ("u32.jsonl", text_of(ROWS).encode("utf-32"), "UTF-16, UTF-32 or no text at all"),
        (
            "latin.jsonl",
            text_of([*ROWS, {"set": "text", "text": "caf\u00e9"}]).encode("latin-1"),
            r"latin.jsonl, line 5: byte 0xe9 is not UTF-8 \(Latin-1 or Windows-1252\?\); save the file as UTF-8",
        ),
        (
            "bom_latin.jsonl",
            b"\xef\xbb\xbf" + text_of([ROWS[0], {"set": "text", "text": "\u00fc"}], "\r\n").encode("latin-1"),
            "line 2: byte 0xfc is not UTF-8",
        ),
        ("t.jsonl.zip", b"PK\x03\x04rest", "packed with zip; unpack it first"),
        ("t.jsonl.bz2", b"BZh9rest", "packed with bzip2"),
        ("t.jsonl.xz", b"\xfd7zXZ\x00", "packed with xz"),
        ("cut.jsonl.gz", gzip.compress(text_of(ROWS).encode())[:-12], "cut.jsonl.gz: cannot be read"),
        ("t.csv", b"set,clean\nforget,w3", "t.csv, row 0: 'answer' is missing; a forget line needs it"),
        ("wide.csv", b"set,text\ntext,w3,w4", "no table|unknown key|row 0"),
        ("list.csv", b"set,distractors\nforget,[w3", r"list.csv, row 0: distractors '\[w3' is no list; write \["),
        ("empty.tsv", b"", "empty.tsv: no table"),
        ("head.tsv", b"set\ttext\n", "head.tsv: holds no row"),
        ("t.parquet", b"PAR1", r"load_task\(pd.read_parquet\('t.parquet'\)"),
        ("empty.jsonl", b"", "empty.jsonl: holds no row; write one object a line"),
        ("empty.json", b"[]", "empty.json: holds no row"),
        ("cut.json", b"[" + text_of(ROWS, ",").encode(), "cut.json: not JSON"),
        ("nested.json", json.dumps([ROWS]).encode(), "nested.json, row 0: .* is no object"),
        (
            "bad.json",
            json.dumps([*ROWS, pair("retain", 6, answer=7)]).encode(),
            "bad.json, row 4: answer is 7, not text",
        ),
        ("pretty.jsonl", json.dumps(ROWS[0], indent=2).encode(), "pretty.jsonl, line 1: not JSON"),
        ("python.jsonl", repr(ROWS[0]).encode(), "python.jsonl, line 1: not JSON"),
        ("deep.jsonl", b"{" + b'"a":[' * 100_000, "deep.jsonl, line 1: nested too deeply|not JSON"),
    ],
)
def test_files_that_cannot_be_read_say_so_in_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(MansuError, match=rf"^(?=[^\n]*\Z).*({message})"):
        mtl.load_task(tmp_path / name, tokenizer=TOKENIZER)


def test_paths_that_are_no_file_say_so(tmp_path: Path) -> None:
    with pytest.raises(MansuError, match=f"{tmp_path}: this is a folder; pass the file that is in it"):
        mtl.load_task(tmp_path, tokenizer=TOKENIZER)
    for path in ("x" * 5000, '{"set": "text"}', "a\0b"):
        with pytest.raises(MansuError, match="no such task file"):
            mtl.load_task(path, tokenizer=TOKENIZER)


# Tables --------------------------------------------------------------------------------------------------------------


def test_rows_and_tables_are_read_as_files_are(plain: Task) -> None:
    """A list of dicts, and pandas' tables, whose empty cells fill the columns of other sets."""
    frame = pd.DataFrame(ROWS)
    assert frame.isna().any(axis=None)
    whole = frame.assign(held_out=frame["held_out"].eq(True))
    for rows in (ROWS, tuple(ROWS), iter(ROWS), whole, whole.convert_dtypes(), whole.to_dict("records")):
        task = mtl.load_task(rows, tokenizer=TOKENIZER, name="plain")
        assert same(task, plain)
        assert task.name == "plain"
    assert mtl.load_task(ROWS, tokenizer=TOKENIZER).name == "rows"
    arrays = whole.assign(distractors=[np.array(d) if isinstance(d, list) else d for d in whole["distractors"]])
    assert same(mtl.load_task(arrays, tokenizer=TOKENIZER), plain)


def test_what_pandas_writes_is_read(plain: Task, tmp_path: Path) -> None:
    """`to_json` writes null where a row's set does not have the column."""
    frame = pd.DataFrame(ROWS)
    whole = frame.assign(held_out=frame["held_out"].eq(True))
    for name, table in (("null", whole), ("blank", whole.fillna({"text": "", "clean": "", "answer": ""}))):
        file = tmp_path / f"{name}.jsonl"
        table.to_json(file, orient="records", lines=True)
        assert '"corrupt":null' in file.read_text()
        assert same(mtl.load_task(file, tokenizer=TOKENIZER), plain)
    packed = tmp_path / "packed.jsonl.gz"
    frame.assign(held_out=frame["held_out"].eq(True)).to_json(packed, orient="records", lines=True)
    assert same(mtl.load_task(packed, tokenizer=TOKENIZER), plain)


@pytest.mark.parametrize(
    ("column", "way"),
    [("held_out", r"frame\['held_out'\].eq\(True\)"), ("fact", r"frame\['fact'\].fillna\(frame\['clean'\]\)")],
)
def test_an_empty_cell_of_its_own_column_is_refused_with_the_way_out(tmp_path: Path, column: str, way: str) -> None:
    rows = [pair("forget", 3, **{column: True if column == "held_out" else "a"}), pair("forget", 4), pair("retain", 5)]
    frame = pd.DataFrame(rows)
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    for source, name in ((tmp_path / "t.jsonl", "t.jsonl, line 2"), (frame, "row 1")):
        with pytest.raises(MansuError, match=rf"{name}: {column} is null; .*{way}"):
            mtl.load_task(source, tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, pair("retain", 6, answer=7)], "row 4: answer is 7, not text"),
        ([*ROWS, pair("retain", 6, clean="w3 w4 w5 w6")], "row 4: clean has 5 tokens, corrupt 4"),
        (
            pd.DataFrame([*ROWS[:1], pair("retain", 6, answer=float("nan"))]),
            "row 1: answer is null; a retain line needs it",
        ),
        (pd.DataFrame([pair("forget", 3, held_out=1.0)]), "row 0: held_out is 1.0; write true or false"),
        (pd.DataFrame(ROWS).rename(columns={"answer": "anser"}), "row 0: unknown key 'anser'"),
        (pd.DataFrame([{"set": "forget"}]), "row 0: 'answer' is missing"),
        (pd.DataFrame([["a", "b"]], columns=["set", "set"]), r"columns \['set', 'set'\] have one twice"),
        (pd.DataFrame(), "rows: holds no row"),
        ([], "rows: holds no row"),
        (["a line"], "row 0: 'a line' is no object"),
        ({"set": "forget"}, "got a dict; pass a file, a DataFrame or a list of rows"),
        (7, "got a int; pass a file, a DataFrame or a list of rows"),
    ],
)
def test_bad_rows_and_tables_are_refused(rows, message: str) -> None:
    with pytest.raises(MansuError, match=message):
        mtl.load_task(rows, tokenizer=TOKENIZER)
    with pytest.raises(MansuError, match="needs a tokenizer to be read; pass tokenizer=model"):
        mtl.load_task(rows)


# Sources -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "separator"), [("t.csv", ","), ("t.tsv", "\t"), ("t.csv.gz", ",")])
def test_what_pandas_writes_as_a_table_is_read(plain: Task, tmp_path: Path, name: str, separator: str) -> None:
    pd.DataFrame(ROWS).to_csv(tmp_path / name, sep=separator, index=False)
    task = mtl.load_task(tmp_path / name, tokenizer=TOKENIZER)
    assert same(task, plain) and task.name == "t"
    by_json = pd.DataFrame(ROWS).assign(distractors=[json.dumps(row.get("distractors", "")) for row in ROWS])
    by_json.iloc[:3].to_csv(tmp_path / "json.csv", index=False)
    again = mtl.load_task(f"csv:{tmp_path / 'json.csv'}", tokenizer=TOKENIZER)
    assert torch.equal(again.forget_pairs.options, plain.forget_pairs.options)


def test_a_cell_of_a_table_may_be_one_distractor_and_upper_case(tmp_path: Path) -> None:
    header = "set,clean,corrupt,answer,distractors,held_out"
    lines = ["forget,w3 w9,w3 w8,w30,w40,FALSE", "forget,w4 w9,w4 w8,w30,w40,True", "retain,w5 w9,w5 w8,w31,w41,"]
    (tmp_path / "t.csv").write_text("\n".join([header, *lines]))
    task = mtl.load_task(tmp_path / "t.csv", tokenizer=TOKENIZER)
    assert task.lines == {"forget": 1, "forget, held out": 1, "retain": 1}
    (tmp_path / "t.csv").write_text("\n".join([header, *lines]).replace("FALSE", "no"))
    with pytest.raises(MansuError, match="t.csv, row 0: held_out is 'no'; write true or false"):
        mtl.load_task(tmp_path / "t.csv", tokenizer=TOKENIZER)


def subjects(**extra: object) -> list[dict[str, object]]:
    """Three subjects to forget and three to keep in two wordings, none with a corrupt prompt."""
    asked = [
        (kind, i, end)
        for kind, numbers in (("forget", (3, 4, 5)), ("retain", (6, 7, 8)))
        for i in numbers
        for end in (9, 50)
    ]
    return [
        {
            "set": kind, "clean": f"w{i} w60 w{end}", "subject": f"w{i} w60", "answer": f"w{30 + i}",
            "distractors": ["w55", "w56"], "fact": f"{kind} {i}", **extra,
        }
        for kind, i, end in asked
    ]  # fmt: skip


def test_a_corrupt_prompt_that_is_not_given_is_another_subjects() -> None:
    task = mtl.load_task(subjects(), tokenizer=TOKENIZER)
    pairs = task.forget_pairs
    said = {tuple(row): answer for row, answer in zip(pairs.clean.tolist(), pairs.answers.tolist(), strict=True)}
    for clean, corrupt, answer, wrong in zip(
        pairs.clean.tolist(), pairs.corrupt.tolist(), pairs.answers.tolist(), pairs.distractors.tolist(), strict=True
    ):
        assert corrupt != clean and corrupt[3] == clean[3]  # another subject in the same words
        assert wrong == [said[tuple(corrupt)], 55] and wrong[0] != answer
    assert mtl.load_task(subjects(), tokenizer=TOKENIZER).digest() == task.digest()
    assert mtl.load_task(subjects(), tokenizer=TOKENIZER, seed=1).digest() != task.digest()
    given = subjects()
    given[0]["corrupt"] = "w5 w60 w9"
    assert mtl.load_task(given, tokenizer=TOKENIZER).forget_pairs.distractors[0].tolist() == [55, 56]


def test_an_unseen_subject_is_an_invented_name() -> None:
    names = [f"w{43 + i} w60" for i in range(12)]
    rows = [row | {"clean": f"{n} w9", "subject": n, "fact": n} for n, row in zip(names, subjects(), strict=True)]
    pairs = mtl.load_task(rows, tokenizer=TOKENIZER, corruption="unseen").forget_pairs
    assert pairs.corrupt[:, 1:3].eq(TOKENIZER.unk_token_id).all() and torch.equal(
        pairs.corrupt[:, 3], pairs.clean[:, 3]
    )
    assert pairs.distractors.tolist() == [[55, 56]] * len(pairs)
    # A subject of five tokens takes an invented name of as many words.
    long = "w30 w31 w32 w33 w34"
    longer = [*rows[1:], rows[0] | {"clean": f"{long} w9", "subject": long}]
    pairs = mtl.load_task(longer, tokenizer=TOKENIZER, corruption="unseen").forget_pairs
    (pair,) = pairs.corrupt[pairs.lengths == 7].tolist()
    assert pair[1:] == [TOKENIZER.unk_token_id] * 5 + [9]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (subjects(), {"corruption": "nosie"}, "corruption 'nosie': unknown; choose one of swap, unseen, noise, zero"),
        (subjects(subject="w61"), {}, "row 0: subject 'w61' occurs 0 times in 'w3 w60 w9'; it must occur once"),
        (
            subjects(subject="w61", corrupt="w5 w60 w9"),
            {},
            "row 0: subject 'w61' occurs 0 times in 'w3 w60 w9'; it must occur once",
        ),
        (subjects(answer="w30"), {}, "row 0: no prompt in these words names another subject .* 'w3 w60' with another"),
        (subjects(subject=""), {}, "row 0: 'corrupt' is missing; a forget line needs it"),
        (subjects(subject=7), {}, "row 0: subject is 7, not text"),
    ],
)
def test_a_counterfactual_that_cannot_be_made_is_named(rows, options, message: str) -> None:
    with pytest.raises(MansuError, match=message):
        mtl.load_task(rows, tokenizer=TOKENIZER, **options)


def test_an_outsiders_way_of_making_counterfactuals(monkeypatch) -> None:
    monkeypatch.setattr(corruption, "_WAYS", Registry("corruption", corruption._WAYS))
    corruption.register_corruption("last", lambda asked, tokens, rng: [
        corruption.Counterfactual(f"w61 w60{one.wording[1]}") for one in asked
    ])  # fmt: skip
    assert corruption.corruptions() == ("swap", "unseen", "last", "noise", "zero", "mean")
    pairs = mtl.load_task(subjects(), tokenizer=TOKENIZER, corruption="last").forget_pairs
    assert pairs.corrupt[:, 1].eq(61).all()
    with pytest.raises(MansuError, match="corruption 'swap': registered already"):
        corruption.register_corruption("swap", corruption.unseen)


@pytest.fixture
def capitals(monkeypatch):
    """A format of an outsider's own: "subject|other|answer|wrong" lines, forget above a rule and retain below."""
    monkeypatch.setattr(registry, "_SOURCES", Registry("source", registry._SOURCES))

    def rows(source):
        part = "forget"
        for number, line in enumerate(Path(source).read_text().splitlines(), 1):
            subject, _, rest = line.partition("|")
            if not rest:
                part = "retain"
                continue
            other, answer, wrong = rest.split("|")
            row = {"set": part, "clean": f"{subject} w9", "corrupt": f"{other} w9"}
            yield f"{source}, line {number}", row | {"answer": answer, "distractors": [wrong], "fact": subject}

    register_source(
        "capitals", "lines of four", rows_reader(rows), claims=lambda source: str(source).endswith(".capitals")
    )


def test_an_outsiders_source_is_one_registration(capitals, tmp_path: Path) -> None:
    assert sources()[-1] == "capitals" and source_of("capitals").about == "lines of four"
    file = tmp_path / "t.capitals"
    file.write_text("w3|w4|w30|w31\n---\nw5|w6|w32|w33\n")
    for name in (file, f"capitals:{file}"):
        task = mtl.load_task(name, tokenizer=TOKENIZER)
        assert task.name == "t" and task.forget_pairs.facts == ("w3",) and task.retain_pairs.answers.tolist() == [32]
    assert mtl.load_task(f"capitals:{file}?name=mine", tokenizer=TOKENIZER).name == "mine"
    (tmp_path / "other").write_text(file.read_text())
    assert mtl.load_task(tmp_path / "other", kind="capitals", tokenizer=TOKENIZER).name == "other"
    file.write_text("w3|w4|w30|w30\n---\nw5|w6|w32|w33\n")
    with pytest.raises(MansuError, match="t.capitals, line 1: .*answer 'w30' are the same token"):
        mtl.load_task(file, tokenizer=TOKENIZER)
    with pytest.raises(MansuError, match="source 'capitals': registered already"):
        register_source("capitals", "again", rows_reader(lambda source: []))


def test_sources_and_options_that_are_not_there_are_named() -> None:
    with pytest.raises(MansuError, match="source 'squad': unknown; choose one of rows, jsonl, csv, tofu, wmdp, mmlu"):
        mtl.load_task("x", kind="squad", tokenizer=TOKENIZER)
    with pytest.raises(MansuError, match="source 'pocket' has no option 'near'; known: seed"):
        mtl.load_task("pocket?near=3")
    with pytest.raises(MansuError, match="seed='x' for source 'pocket'; give a whole number"):
        mtl.load_task("pocket", seed="x")
    assert mtl.load_task("pocket?seed=1").digest() == mtl.load_task("pocket", seed=1).digest()


def test_a_model_is_held_against_every_line(tmp_path: Path) -> None:
    """The tokenizer of a model that knows fewer words, or has fewer positions, than the file needs."""
    model = mtl.load(tiny("llama"), tokenizer=tiny_tokenizer(80))
    long = " ".join(["w5"] * 64)
    for row, message in (
        (pair("retain", 6, answer="w70"), "t.jsonl, line 5: token 70, the model's vocabulary ends at 63"),
        (pair("near", 6, clean=f"{long} w6", corrupt=f"{long} w7"), "line 5: 66 tokens, the model has 64 positions"),
        ({"set": "text", "text": long}, "line 5: 65 tokens, the model has 64 positions; shorten the text"),
        ({"set": "unseen", "text": long}, "line 5: 65 tokens, the model has 64 positions; shorten the text"),
    ):
        with pytest.raises(MansuError, match=message):
            mtl.load_task(write(tmp_path / "t.jsonl", [*ROWS, row]), tokenizer=model)
    bare = mtl.load(tiny("qwen3"), tokenizer=tiny_tokenizer())
    with pytest.raises(MansuError, match=r"line 5: text 'w3' is 1 token\(s\) long; 2 are the least that say something"):
        mtl.load_task(write(tmp_path / "t.jsonl", [*ROWS, {"set": "text", "text": "w3"}]), tokenizer=bare)


def test_a_config_may_have_a_mark_a_tilde_and_another_encoding(tmp_path: Path, monkeypatch) -> None:
    text = 'model = "pocket"\ntask = "pocket"\nseed = 3\n# caf\u00e9\n'
    (tmp_path / "c.toml").write_bytes(text.encode("utf-8-sig"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mtl.study.StudyConfig.read(tmp_path / "c.toml").seed == mtl.study.StudyConfig.read("~/c.toml").seed == 3
    (tmp_path / "u.toml").write_bytes(text.encode("utf-16"))
    with pytest.raises(MansuError, match="u.toml: UTF-16"):
        mtl.study.StudyConfig.read(tmp_path / "u.toml")
    (tmp_path / "l.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(MansuError, match="l.toml, line 4: byte 0xe9 is not UTF-8"):
        mtl.study.StudyConfig.read(tmp_path / "l.toml")
    with pytest.raises(MansuError, match="this is a folder"):
        mtl.study.StudyConfig.read(tmp_path)


def test_results_go_to_a_home_folder_and_to_any_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = mtl.load(tiny("llama"), tokenizer=TOKENIZER)
    folder = mtl.save(model, "~/m \N{TEST TUBE}")
    assert folder == tmp_path / "m \N{TEST TUBE}"
    assert fingerprint(mtl.load("~/m \N{TEST TUBE}")) == fingerprint(mtl.load(folder)) == fingerprint(model)
    scores = mtl.edge_attribution(model, mtl.load_task(ROWS, tokenizer=model).forget_pairs, steps=1)
    assert scores.save("~/s.safetensors") == tmp_path / "s.safetensors"
    assert torch.equal(mtl.circuit.EdgeScores.load("~/s.safetensors").tensor, scores.tensor)


def test_tasks_by_name_and_by_file() -> None:
    assert mtl.load_task("pocket").name == "pocket"
    with pytest.raises(MansuError, match="no such task file"):
        mtl.load_task("nothing.jsonl", tokenizer=TOKENIZER)
    with pytest.raises(MansuError, match="nothing.jsonl': no such file or folder"):
        mtl.load_task("nothing.jsonl")
