"""LUME, MUSE and RWKU: records, what is asked, scores against hand-computed cases, and tasks made of their questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import pandas as pd
import pytest
import torch

import mansu_tl as mtl
from mansu_tl.data.sources import (
    LumeItem,
    MuseItem,
    Probe,
    read_lume,
    read_muse,
    read_passages,
    read_rwku,
    read_rwku_utility,
)
from mansu_tl.errors import MansuError
from mansu_tl.verification import (
    WrittenScores,
    evaluate_choices,
    evaluate_lume,
    evaluate_muse,
    evaluate_rwku,
    lume,
    lume_aggregate,
    muse,
    rwku,
    writing,
)
from tests.spelled import spelling_tokenizer
from tests.tiny import tiny

LUME = Path(__file__).parents[2] / "shared" / "data" / "lume"
needs_lume = pytest.mark.skipif(not LUME.is_dir(), reason=f"LUME's files are not in {LUME}")
TOKENIZER = spelling_tokenizer()
MODEL = tiny("llama", vocab_size=len(TOKENIZER), max_position_embeddings=512)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def saying(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Makes a model say what a test wants; gives the prompts that it was asked."""

    def say(module: Any, *texts: str) -> list[str]:
        asked: list[str] = []
        left = list(texts)

        def answered(_: object, __: object, prompts: Sequence[str], *___: object, **____: object) -> list[str]:
            asked.extend(prompts)
            return [left.pop(0) for _ in prompts]

        monkeypatch.setattr(module, "written_texts", answered)
        return asked

    return say


def test_what_is_written_is_a_plain_greedy_loop() -> None:
    model = mtl.load(MODEL, tokenizer=TOKENIZER)
    prompts = ["Who is there?", "Long ago a man", "A"]
    said = writing.written_texts(model, model, prompts, prompts, 9, batch_size=2)
    rows = []
    for prompt in prompts:
        row = [TOKENIZER.bos_token_id, *TOKENIZER.encode(prompt, add_special_tokens=False)]
        before = len(row)
        for _ in range(9):
            with torch.no_grad():
                row.append(int(MODEL(torch.tensor([row])).logits[0, -1].argmax()))
            if row[-1] == TOKENIZER.eos_token_id:
                break
        rows.append(row[before:])
    assert said == [TOKENIZER.decode(row, skip_special_tokens=True) for row in rows]
    # A stop ends an answer, itself left out.
    stop = rows[0][3]
    cut = writing.written_texts(model, model, prompts[:1], prompts[:1], 9, stops=[stop])
    assert cut == [TOKENIZER.decode(rows[0][: rows[0].index(stop)], skip_special_tokens=True)]
    with pytest.raises(MansuError, match="x: 600 tokens and 9 to write, the model has 512 positions"):
        writing.written_texts(model, model, ["a" * 599], ["x"], 9)


# --- LUME ---


def lume_row(i: int, kind: str, prompt: str, output: str, task: str = "Task1") -> dict[str, Any]:
    return {"id": f'"doc{i}"{kind}{i % 10}', "input": prompt, "output": output, "task": task}


def test_lume_by_hand(saying: Callable[..., list[str]], tmp_path: Path) -> None:
    rows = [
        lume_row(0, "sc", "Long ago", "the dogs were running home"),
        lume_row(1, "qa", "Who?", "Madera"),
        lume_row(2, "qa", "Where?", "The city."),
        lume_row(3, "qa", "When?", "Then", "Task2"),
    ]
    forget = read_lume(written(tmp_path / "forget.jsonl", rows))
    retain = read_lume(
        written(tmp_path / "retain.jsonl", [lume_row(4, "qa", "What?", "bread"), lume_row(5, "qa", "Why?", "so")])
    )
    assert forget[1] == LumeItem(f"{tmp_path}/forget.jsonl, line 2", '"doc1"qa1', "qa", "Task1", "Who?", "Madera")
    # dog, run and home of the, dog, were, run, home by stems; "madera " matches; a full stop is missing.
    asked = saying(lume, "a dog runs homes", " madera\n", "the city", "now", "Bread", "as so")
    scores = evaluate_lume(MODEL, forget, retain, TOKENIZER, title="m")
    assert asked == ["Long ago", "Who?", "Where?", "When?", "What?", "Why?"]
    assert scores.values.tolist() == pytest.approx([3 / 5, 1, 0, 0, 1, 0])
    means = {
        "forget Task1 regurgitation": 0.6, "forget Task1 knowledge": 0.5, "forget Task2 knowledge": 0,
        "retain Task1 knowledge": 0.5,
    }  # fmt: skip
    assert {name: scores.mean(name) for name in means} == pytest.approx(means)
    assert lume_aggregate(scores) == pytest.approx(harmonic_mean([0.4, 0.5, 1, 0.5]))
    frame = scores.summary().set_index("set")
    assert frame.loc["forget Task1 knowledge", "measure"] == "exact match"
    assert frame["questions"].tolist() == [1, 2, 1, 2]
    assert WrittenScores.load(scores.save(tmp_path / "s.safetensors")).digest() == scores.digest()
    with pytest.raises(MansuError, match="0 forget and 1 retain records"):
        evaluate_lume(MODEL, [], retain[:1], TOKENIZER)
    with pytest.raises(MansuError, match="no tokenizer"):
        evaluate_lume(MODEL, forget, retain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": None}, "line 1: field 'output' is missing"),
        ({"input": ""}, "input is ''; it must be text"),
        ({"id": "doc1"}, "id 'doc1' ends in neither sc nor qa"),
    ],
)
def test_bad_lume_records_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(MansuError, match=message) as found:
        read_lume(written(tmp_path / "forget.jsonl", [lume_row(1, "qa", "Who?", "I") | change]))
    assert "\n" not in str(found.value)


@needs_lume
def test_lumes_own_files() -> None:
    forget, retain = (read_lume(LUME / f"{name}.jsonl") for name in ("forget", "retain"))
    assert (len(forget), len(retain)) == (486, 492)
    assert sum(one.kind == "qa" for one in forget) == 243
    assert {one.task for one in (*forget, *retain)} == {"Task1"}
    task = mtl.load_task(LUME / "forget.jsonl", tokenizer=TOKENIZER, retain=str(LUME / "retain.jsonl"), limit=80)
    left = task.lines["without a counterfactual"]
    assert len(task.questions["forget"]) + len(task.questions["retain"]) + left == 160
    assert len(task.questions["forget"]) > 20
    assert len(task.retain_text) == len(task.questions["retain"]) + 80
    wanted = {one.prompt: one.output for one in forget}
    pairs = task.forget_pairs
    for i in range(len(pairs)):
        clean, corrupt = (TOKENIZER.decode(ids[i, 1 : int(pairs.lengths[i])]) for ids in (pairs.clean, pairs.corrupt))
        texts = [TOKENIZER.decode(option).strip() for option in pairs.texts()[i]]
        assert texts[:2] == [wanted[clean].strip(), wanted[corrupt].strip()]
    with pytest.raises(MansuError, match="nothing to keep; name LUME's other file"):
        mtl.load_task(LUME / "forget.jsonl", tokenizer=TOKENIZER)


# --- MUSE ---


@pytest.fixture
def news(tmp_path: Path) -> Path:
    """A folder as muse-bench/MUSE-News has it."""
    root = tmp_path / "MUSE-News"
    qa = [
        {"question": f"Who won race {i}?", "answer": name} for i, name in enumerate(("Ann", "Bob", "Cyd", "Dov", "Eva"))
    ]
    kept = [{"question": f"Who lost game {i}?", "answer": name} for i, name in enumerate(("Fay", "Gus", "Hal", "Ida"))]
    end = "-00000-of-00001.parquet"
    written(root / "knowmem" / f"forget_qa{end}", qa)
    written(root / "knowmem" / f"forget_qa_icl{end}", kept[:1])
    written(root / "knowmem" / f"retain_qa{end}", kept)
    written(root / "verbmem" / f"forget{end}", [{"prompt": "The match", "gt": "ended late that day"}])
    written(root / "raw" / f"retain1{end}", [{"text": "a long text"}, {"text": "and another"}])
    return root


def test_muse_by_hand(saying: Callable[..., list[str]], news: Path) -> None:
    sets = {
        "verbmem forget": read_muse(f"{news}#verbmem/forget"),
        "knowmem forget": read_muse(f"{news}#knowmem/forget_qa")[:2],
    }
    assert sets["verbmem forget"][0] == MuseItem(
        f"{news}/verbmem/forget-00000-of-00001.parquet, row 0", "The match", "ended late that day", True
    )
    asked = saying(muse, "ended that night", "It was Ann Bell\nQuestion: and", "Cyd\n\nBob")
    examples = {"knowmem forget": read_muse(f"{news}#knowmem/forget_qa_icl")}
    scores = evaluate_muse(MODEL, sets, TOKENIZER, examples=examples)
    shown = "Question: Who lost game 0?\nAnswer: Fay\n\n"
    assert asked == [
        "The match", f"{shown}Question: Who won race 0?\nAnswer: ", f"{shown}Question: Who won race 1?\nAnswer: ",
    ]  # fmt: skip
    assert scores.said[1:] == ("It was Ann Bell", "Cyd")
    # "ended that" of 3 and 4 words; "Ann" of 4 and 1.
    assert scores.values.tolist() == pytest.approx([4 / 7, 2 / 5, 0])
    assert scores.mean("knowmem forget") == pytest.approx(0.2)
    assert read_passages(f"{news}#raw") == ("a long text", "and another")
    with pytest.raises(MansuError, match="examples for 'knowmem', which is none of the sets"):
        evaluate_muse(MODEL, sets, TOKENIZER, examples={"knowmem": ()})
    with pytest.raises(MansuError, match="the set 'x' is empty"):
        evaluate_muse(MODEL, {"x": ()}, TOKENIZER)


def test_a_passage_is_compared_up_to_as_many_tokens_as_are_written(
    saying: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muse, "PASSAGE_TOKENS", 9)
    saying(muse, "aa bb")
    scores = evaluate_muse(MODEL, {"v": [MuseItem("x", "p", "aa bb cc dd", True)]}, TOKENIZER)
    # A BOS token and eight letters.
    assert scores.wanted == ("aa bb cc",)
    assert scores.values.tolist() == pytest.approx([2 * 1 * (2 / 3) / (5 / 3)])


def test_a_task_of_muse(news: Path, tmp_path: Path) -> None:
    task = mtl.load_task(news, kind="muse", tokenizer=TOKENIZER, text=f"{news}#raw/retain1")
    assert {name: len(asked) for name, asked in task.questions.items()} == {"forget": 5, "retain": 4}
    assert len(task.retain_text) == 4 + 2
    place = f"muse:{news}#knowmem/forget_qa?retain={news}%23knowmem/retain_qa&text={news}%23raw/retain1"
    assert mtl.load_task(place, tokenizer=TOKENIZER).forget_pairs.digest() == task.forget_pairs.digest()
    with pytest.raises(MansuError, match="passages .prompt, gt., and a task needs questions"):
        mtl.load_task(f"muse:{news}#verbmem/forget?retain={news}%23knowmem/retain_qa", tokenizer=TOKENIZER)
    alone = written(tmp_path / "qa.jsonl", [{"question": "Who?", "answer": "I"}])
    with pytest.raises(MansuError, match="nothing to keep"):
        mtl.load_task(alone, kind="muse", tokenizer=TOKENIZER)
    # Questions with answers alone may be MUSE's or TOFU's: the way out is named.
    with pytest.raises(MansuError, match="or say whose records with question, answer these are: kind="):
        mtl.load_task(alone, tokenizer=TOKENIZER)
    for row, message in (
        ({"question": "Who?"}, "field 'answer' is missing"),
        ({"prompt": "a"}, "field 'gt' is missing"),
    ):
        with pytest.raises(MansuError, match=message):
            read_muse(written(tmp_path / "bad.jsonl", [row]))
    with pytest.raises(MansuError, match="field 'text' is missing"):
        read_passages(alone)


# --- RWKU ---


def probe(level: int | str, query: str, answer: str, kind: str | None = None) -> dict[str, Any]:
    return {"subject": "Ann Bell", "query": query, "answer": answer, "level": level, "type": kind}


def test_rwku_by_hand(saying: Callable[..., list[str]], tmp_path: Path) -> None:
    rows = [
        probe("1", "Ann Bell was born in ___.", "New York"),
        probe("2", "Where was she born?", "New York"),
        probe(3, "Where? Sure, it is", "New York", "affirmative suffix"),
        probe("3", "Question: Who?\nAnswer: Bob\nQuestion: Where?", "New York", "incontext learning"),
    ]
    forget = read_rwku(written(tmp_path / "forget.jsonl", rows))
    assert forget[0] == Probe(
        f"{tmp_path}/forget.jsonl, line 1", "Ann Bell", "Ann Bell was born in ___.", "New York", "1"
    )
    asked = saying(rwku, "New York City", "new York", " \n", "York New")
    scores = evaluate_rwku(MODEL, {"forget": forget}, TOKENIZER, chat=False)
    brief = "Please briefly answer the following question.\n"
    assert asked == [
        "Please complete the blank in the following question.\nQuestion: Ann Bell was born in ___.\nAnswer:",
        f"{brief}Question: Where was she born?\nAnswer:",
        f"{brief}Question: Where? Sure, it is",
        f"{brief}Question: Who?\nAnswer: Bob\nQuestion: Where?\nAnswer:",
    ]
    assert scores.said == ("New York City", "new York", "NOANSWER", "York New")
    assert scores.values.tolist() == [1, 0.5, 0, 0.5]
    assert [scores.mean(f"forget level {level}") for level in (1, 2, 3)] == [1, 0.5, 0.25]
    with pytest.raises(MansuError, match="RWKU: the tokenizer has no chat template"):
        evaluate_rwku(MODEL, {"forget": forget}, TOKENIZER)
    with pytest.raises(MansuError, match="the set 'near' is empty"):
        evaluate_rwku(MODEL, {"near": ()}, TOKENIZER, chat=False)


def test_rwku_asks_in_the_chat_template(saying: Callable[..., list[str]], tmp_path: Path) -> None:
    tokenizer = spelling_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}<a>"
    probes = read_rwku(
        written(tmp_path / "p.jsonl", [probe("2", "Where?", "Rome"), probe("3", "So, ", "x", "affirmative suffix")])
    )
    asked = saying(rwku, "Rome", "y")
    evaluate_rwku(MODEL, {"forget": probes}, tokenizer)
    brief = "Please briefly answer the following question.\nQuestion: "
    assert asked == [f"<u>{brief}Where?\n</u><a>Answer:", f"<u>{brief}So, </u><a>"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": None}, "field 'level' is missing"),
        ({"level": 4}, "level is 4; it must be 1, 2 or 3"),
        ({"query": "She was born in Rome."}, "has no ___; at level 1"),
        ({"answer": " "}, "answer is ' '; it must be text"),
    ],
)
def test_bad_probes_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(MansuError, match=message) as found:
        read_rwku(written(tmp_path / "forget.jsonl", [probe("1", "in ___", "Rome") | change]))
    assert "\n" not in str(found.value)


def test_a_task_of_rwku(tmp_path: Path) -> None:
    names = ("Ann", "Bob", "Cyd", "Dov", "Eva", "Fay")
    for part, first in (("forget_level1", "in"), ("forget_level2", "at"), ("neighbor_level2", "by"), ("others", "on")):
        level = "1" if part.endswith("1") else "2"
        rows = [probe(level, f"Who is {first} {i} ___?", name) for i, name in enumerate(names)]
        written(tmp_path / "RWKU" / part / "test-00000-of-00001.parquet", rows)
    root = tmp_path / "RWKU"
    task = mtl.load_task(
        f"rwku:{root}#forget_level1,{root}#forget_level2", tokenizer=TOKENIZER, retain=f"{root}#others",
        near=f"{root}#neighbor_level2",
    )  # fmt: skip
    assert {name: len(asked) for name, asked in task.questions.items()} == {"forget": 12, "retain": 6, "near": 6}
    alone = written(tmp_path / "level2.jsonl", [probe("2", "Who?", "I")])
    with pytest.raises(MansuError, match="nothing to keep; name probes about others"):
        mtl.load_task(alone, tokenizer=TOKENIZER)


def test_rwkus_utility_is_asked_behind_its_examples(tmp_path: Path) -> None:
    """RWKU's format_example and gen_prompt, written out."""
    example = {"question": "1+1?", "choices": ["1", "2", "3", "4"], "answer": 1}
    row = {
        "question": "2+2?",
        "choices": ["1", "2", "3", "4"],
        "answer": 3,
        "task": "high_school_maths",
        "examples": [example],
    }
    path = written(tmp_path / "utility.jsonl", [row | {"subject": "Ann Bell"}])
    (item,) = read_rwku_utility(path)
    assert item.asked == (
        "The following are multiple choice questions (with answers) about high school maths.\n\n"
        "Question: 1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        "Please following the previous examples and answer the given question.\n"
        "Question: 2+2?\nA. 1\nB. 2\nC. 3\nD. 4"
    )
    assert item.prompt == f"{item.asked}\nAnswer:"
    tokenizer = spelling_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}<a>"
    scores = evaluate_choices(MODEL, [item], tokenizer, chat=True)
    ids = tokenizer.encode(f"<u>{item.asked}</u><a>Answer:", add_special_tokens=False)
    letters = [tokenizer.encode(f"x {letter}", add_special_tokens=False)[-1] for letter in "ABCD"]
    with torch.no_grad():
        wanted = MODEL(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[letters]
    torch.testing.assert_close(scores.log_probs[0], wanted, rtol=0, atol=1e-5)
    for change, message in (
        ({"examples": []}, r"examples is \[\]; it must be a list"),
        ({"examples": ["x"]}, "example 0 is 'x'; it must be an object"),
        ({"examples": [example | {"answer": 4}]}, "example 0: answer is 4, and there are 4"),
        ({"task": None}, "field 'task' is missing"),
    ):
        with pytest.raises(MansuError, match=message):
            read_rwku_utility(written(tmp_path / "bad.jsonl", [row | change]))
