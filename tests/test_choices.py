"""WMDP and MMLU: records, the harness's prompt, accuracy against hand-computed cases, and a task that can be unlearned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import mansu_tl as mtl
from mansu_tl.cli import main
from mansu_tl.data.sources import beside, read_choices, read_records
from mansu_tl.errors import MansuError
from mansu_tl.study import StudyConfig
from mansu_tl.verification.choices import ChoiceScores, evaluate_choices
from tests.spelled import spelling_tokenizer
from tests.tiny import tiny

BIO = {
    "question": " Which cell part makes ATP? ",
    "choices": ["nucleus", "ribosome", "vacuole", "mitochondrion"],
    "answer": 3,
}
LAW = {
    "question": "Who sits?",
    "subject": "professional_law",
    "choices": ["judge", "clerk", "jury", "bailiff"],
    "answer": 0,
}


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def questions(count: int, what: str, **more: Any) -> list[dict[str, Any]]:
    """Questions whose choices are words of four letters."""
    return [
        {
            "question": f"Which {what} is number {i}?",
            "choices": [f"{'abcd'[c]}{'aeiou'[i % 5]}{'bdfg'[i // 5 % 4]}{what[0]}" for c in range(4)],
            "answer": i % 4,
            **more,
        }
        for i in range(count)
    ]


def test_the_prompt_is_the_harnesses(tmp_path: Path) -> None:
    """The templates of lm_eval/tasks/wmdp and mmlu/default, written out."""
    (item,) = read_choices(written(tmp_path / "wmdp-bio" / "test-00000-of-00001.parquet", [BIO]).parent)
    assert item.prompt == (
        "The following are multiple choice questions (with answers) about biology.\n\nWhich cell part makes ATP?\n"
        "A. nucleus\nB. ribosome\nC. vacuole\nD. mitochondrion\nAnswer:"
    )
    (item,) = read_choices(written(tmp_path / "mmlu.jsonl", [LAW]))
    assert item.prompt.startswith(
        "The following are multiple choice questions (with answers) about professional law.\n\nWho sits?\nA. judge\n"
    )
    assert read_choices(tmp_path / "mmlu.jsonl", subject="")[0].prompt.startswith("Who sits?\n")


def test_a_folder_as_the_hub_lays_it_out_is_read_by_part(tmp_path: Path) -> None:
    for config, split, count in (("all", "test", 3), ("all", "dev", 2), ("anatomy", "test", 1)):
        rows = questions(count, "bone", subject=config)
        written(tmp_path / "mmlu" / config / f"{split}-00000-of-00001.parquet", rows)
    assert len(read_choices(f"{tmp_path}/mmlu#all/test")) == 3
    assert len(read_choices(f"{tmp_path}/mmlu#dev")) == 2
    assert len(read_choices(f"{tmp_path}/mmlu#anatomy")) == 1
    for part, message in (
        ("", "several parts"),
        ("#all", "#all is several parts, all/dev, all/test"),
        ("#law", "no part 'law'"),
    ):
        with pytest.raises(MansuError, match=message):
            read_choices(f"{tmp_path}/mmlu{part}")
    # Two shards of one split are one split.
    for shard in range(2):
        written(tmp_path / "two" / f"test-0000{shard}-of-00002.parquet", questions(2, f"joint{shard}"))
    assert len(read_choices(tmp_path / "two")) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "line 1: field 'question' is missing; it has choices, answer"),
        ({"question": " "}, "question is ' '; it must be text"),
        ({"choices": []}, "choices has 0 of at least 1"),
        ({"choices": ["a", "b", "c"]}, "3 choices; give 4"),
        ({"choices": ["a", "b", "c", "a"]}, "choice 'a' is there twice"),
        ({"choices": "abcd"}, "choices is 'abcd'; it must be a list of texts"),
        ({"answer": 4}, r"answer is 4, and there are 4 to choose from, 0\.\.3"),
        ({"answer": -1}, r"answer is -1"),
        ({"answer": "B"}, "answer is 'B'; it must be a whole number"),
        ({"answer": True}, "answer is True; it must be a whole number"),
    ],
)
def test_bad_records_are_refused_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(MansuError, match=message) as found:
        read_choices(written(tmp_path / "wmdp.jsonl", [BIO | change]))
    assert "\n" not in str(found.value)


def test_bad_places_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "torn.json").write_text('[{"question":')
    (tmp_path / "number.jsonl").write_text("3\n")
    (tmp_path / "no.parquet").write_text("text")
    (tmp_path / "none").mkdir()
    for name, message in (
        ("empty.jsonl", "holds no record"),
        ("torn.json", "not JSON"),
        ("number.jsonl", "3 is no record"),
        ("no.parquet", "no Parquet file"),
        ("none", "holds no file of .parquet"),
        ("mmlu.csv", "no such file or folder, and no hub id"),
        ("empty.jsonl#test", "a file, and #test names a part of a folder"),
    ):
        with pytest.raises(MansuError, match=message) as found:
            read_records(tmp_path / name)
        assert "\n" not in str(found.value)


def test_accuracy_by_hand() -> None:
    log_probs = torch.tensor([[-1.0, -2, -3, -4], [-1, -1, -2, -2], [-3, -1, -2, -4], [-4, -3, -2, -1]])
    # Right, right (a tie goes to the first), wrong, right.
    scores = ChoiceScores("m", log_probs, torch.tensor([0, 0, 2, 3]), ("a", "a", "a", "b"))
    assert scores.right.tolist() == [True, True, False, True]
    assert scores.accuracy == 0.75
    # The sample's standard deviation of 1, 1, 0, 1 is .5.
    assert scores.standard_error == pytest.approx(0.25)
    frame = scores.to_dataframe().set_index("subject")
    assert frame["accuracy"].round(6).tolist() == [0.666667, 1, 0.75]
    assert frame["questions"].tolist() == [3, 1, 4]


def test_the_letters_log_probabilities_are_those_of_a_plain_forward(tmp_path: Path) -> None:
    tokenizer = spelling_tokenizer()
    plain = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    model = mtl.load(plain, tokenizer=tokenizer)
    items = read_choices(
        written(tmp_path / "mmlu.jsonl", [LAW, BIO | {"subject": "biology"}, *questions(3, "bone", subject="x")])
    )
    scores = evaluate_choices(model, items, batch_size=2)
    for item, row in zip(items, scores.log_probs, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(item.prompt, add_special_tokens=False)]
        with torch.no_grad():
            logits = plain(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        letters = [tokenizer.encode(f"Answer: {letter}", add_special_tokens=False)[-1] for letter in "ABCD"]
        torch.testing.assert_close(row, logits[letters], rtol=0, atol=1e-5)
    assert evaluate_choices(plain, items, tokenizer).log_probs.allclose(scores.log_probs, atol=1e-5)
    again = ChoiceScores.load(scores.save(tmp_path / "scores.safetensors"))
    assert again.digest() == scores.digest()
    with pytest.raises(MansuError, match="no tokenizer"):
        evaluate_choices(plain, items)
    with pytest.raises(MansuError, match="no question"):
        evaluate_choices(model, [])


def test_a_task_of_wmdp_beside_mmlu(tmp_path: Path) -> None:
    tokenizer = spelling_tokenizer()
    written(tmp_path / "wmdp-bio.jsonl", questions(8, "virus"))
    written(tmp_path / "mmlu.jsonl", questions(6, "treaty", subject="law"))
    written(tmp_path / "corpus.jsonl", [{"text": "a text that is kept"}])
    retain = str(tmp_path / "mmlu.jsonl")
    task = mtl.load_task(
        tmp_path / "wmdp-bio.jsonl", tokenizer=tokenizer, retain=retain, text=str(tmp_path / "corpus.jsonl")
    )
    assert {name: len(asked) for name, asked in task.questions.items()} == {"forget": 8, "retain": 6}
    assert task.questions["forget"].chance == 25
    assert len(task.retain_text) == 7
    # Only the two choices that changed places differ, and the letter of the second is the first distractor.
    pairs = task.forget_pairs
    for i, item in enumerate(read_choices(tmp_path / "wmdp-bio.jsonl")):
        clean, corrupt = (tokenizer.decode(ids[i, 1 : int(pairs.lengths[i])]) for ids in (pairs.clean, pairs.corrupt))
        changed = [(a, b) for a, b in zip(clean.split("\n"), corrupt.split("\n"), strict=True) if a != b]
        assert len(changed) == 2
        right, other = "ABCD"[item.answer], tokenizer.decode([int(pairs.distractors[i, 0])]).strip()
        assert tokenizer.decode([int(pairs.answers[i])]).strip() == right
        assert {a.replace(" ", "")[:2] for a, _ in changed} == {f"{right}.", f"{other}."}
    # A config names the same, beside its own folder.
    named = f"wmdp:{tmp_path}/wmdp-bio.jsonl?retain={retain}&limit=4"
    assert len(mtl.load_task(named, tokenizer=tokenizer).forget_pairs) == 4
    with pytest.raises(MansuError, match="nothing to keep; name a file of questions"):
        mtl.load_task(tmp_path / "wmdp-bio.jsonl", tokenizer=tokenizer)
    with pytest.raises(MansuError, match="limit=-1"):
        mtl.load_task(tmp_path / "wmdp-bio.jsonl", tokenizer=tokenizer, retain=retain, limit=-1)


def test_a_configs_paths_are_beside_it(tmp_path: Path) -> None:
    written(tmp_path / "data" / "wmdp-bio.jsonl", questions(4, "virus"))
    for config in ("all", "law"):
        written(tmp_path / "mmlu" / config / "test-00000-of-00001.parquet", questions(4, "treaty", subject="law"))
    name = "wmdp:data/wmdp-bio.jsonl?retain=mmlu%23law&limit=3&text=cais/none%23x"
    found = beside(name, tmp_path)
    assert found == f"wmdp:{tmp_path}/data/wmdp-bio.jsonl?retain={tmp_path}/mmlu%23law&limit=3&text=cais/none%23x"
    assert beside("wmdp:cais/wmdp#wmdp-bio?retain=cais/mmlu", tmp_path) == "wmdp:cais/wmdp#wmdp-bio?retain=cais/mmlu"
    both = beside("lre:data/wmdp-bio.jsonl?retain=mmlu,data", tmp_path)
    assert both == f"lre:{tmp_path}/data/wmdp-bio.jsonl?retain={tmp_path}/mmlu,{tmp_path}/data"
    (tmp_path / "config.toml").write_text(f'task = "{name.partition("&text")[0]}"')
    task = StudyConfig.read(tmp_path / "config.toml").task
    assert len(mtl.load_task(task, tokenizer=spelling_tokenizer()).questions["retain"]) == 3


def test_the_commands_know_the_sources(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["mansu-tl", "sources"])
    with pytest.raises(SystemExit):
        main()
    listed = capsys.readouterr().out
    assert "wmdp" in listed and "mmlu" in listed
