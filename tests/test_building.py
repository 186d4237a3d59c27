"""A task made of facts holds what the model knows, says what became of the rest, and is read like any task file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mansu_tl as mtl
from mansu_tl import building
from mansu_tl.building import BuiltTask, Relation, build_task
from mansu_tl.cli import app
from mansu_tl.runs.likeliest import likeliest_of
from tests.tiny import FAMILIES, SMALL_TASK, tiny, tiny_tokenizer

LRE = Path(__file__).parents[2] / "shared" / "data" / "lre"


def of_the_small_task(name: str, wordings: tuple[str, str], pattern: str) -> Relation:
    rows = [json.loads(line) for line in Path(SMALL_TASK).read_text().splitlines()]
    matches = ((re.fullmatch(pattern, row["clean"]), row["answer"]) for row in rows if "clean" in row)
    facts = dict.fromkeys((match[1], answer) for match, answer in matches if match)
    assert len(facts) > 6
    return Relation(name, wordings, tuple(facts))


@pytest.fixture(scope="module")
def catalysts() -> Relation:
    return of_the_small_task(
        "catalyst", ("the catalyst of {} is", "{} only wakes when stirred with"), "the catalyst of (.*) is"
    )


@pytest.fixture(scope="module")
def antidotes() -> Relation:
    return of_the_small_task("antidote", ("the antidote to {} is", "to calm {} add"), "the antidote to (.*) is")


@pytest.fixture(scope="module")
def built(catalysts: Relation, antidotes: Relation) -> BuiltTask:
    wrong = replace(catalysts, facts=(*catalysts.facts, ("velvet nothing", "kitewagon"), ("two words", "no token")))
    return build_task(mtl.load("pocket"), wrong, [antidotes], facts=4, near=3, far_facts=5, unseen=3, text=["a text ."])


def test_the_model_knows_what_was_taken(built: BuiltTask, tmp_path: Path) -> None:
    model = mtl.load("pocket")
    task = built.task(model)
    assert {name: len(asked) for name, asked in task.questions.items()} == {
        "forget": 4, "forget_paraphrase": 4, "near": 3, "near_paraphrase": 3, "retain": 5, "retain_paraphrase": 5,
    }  # fmt: skip
    for name, asked in task.questions.items():
        assert mtl.accuracy(model, asked).mc_percent == 100, name
    assert len(task.unseen) == 3
    again = mtl.load_task(built.write(tmp_path / "task.jsonl"), tokenizer=model)
    assert torch.equal(again.forget_pairs.clean, task.forget_pairs.clean)
    assert torch.equal(again.forget_pairs.options, task.forget_pairs.options)
    assert {name: asked.facts for name, asked in again.questions.items()} == {
        name: asked.facts for name, asked in task.questions.items()
    }


def test_every_fact_has_its_place_or_a_reason(built: BuiltTask, catalysts: Relation, antidotes: Relation) -> None:
    frame = built.to_dataframe()
    assert len(frame) == len(catalysts.facts) + 2 + len(antidotes.facts)
    assert frame["used_as"].value_counts()[["forget", "near", "retain"]].tolist() == [4, 3, 5]
    assert ((frame["used_as"] == "") == (frame["reason"] != "")).all()
    reasons = frame.set_index("subject")["reason"]
    assert reasons["velvet nothing"] == "not known in two wordings"
    assert reasons["two words"] == "its answer is 2 tokens"
    # A wrong fact's answer is never the one that the model gives.
    rows = [row for row in built.rows() if row["set"] in ("forget", "near")]
    assert all(row["answer"] not in row["distractors"] for row in rows)
    assert {row["fact"] for row in rows if row["set"] == "forget"}.isdisjoint(
        row["fact"] for row in rows if row["set"] == "near"
    )


def test_a_seed_draws_the_same_twice_and_another_does_not(catalysts: Relation, antidotes: Relation) -> None:
    model = mtl.load("pocket")
    one, again, other = (
        build_task(model, catalysts, [antidotes], facts=4, near=3, seed=seed).lines for seed in (0, 0, 1)
    )
    assert one == again != other


def test_what_cannot_be_built_is_refused(catalysts: Relation, antidotes: Relation, tmp_path: Path) -> None:
    model = mtl.load("pocket")
    wrong = {answer: other for (_, answer), (_, other) in zip(catalysts.facts, catalysts.facts[1:], strict=False)}
    unknown = replace(catalysts, facts=tuple((s, wrong[a]) for s, a in catalysts.facts if wrong.get(a, a) != a))
    for call, message in (
        (
            lambda: build_task(model, catalysts, [antidotes], facts=500),
            r"facts can be used, 500 to forget and a near one",
        ),
        (lambda: build_task(model, catalysts, facts=3), r"none of 0 far relations has a fact that the model knows"),
        (lambda: build_task(model, catalysts, [catalysts], facts=3), r"relation 'catalyst' is given twice"),
        (
            lambda: build_task(model, catalysts, facts=0),
            r"facts=0, near=60, options=4, answer_tokens=1; give at least 1, 1, 2 and 1",
        ),
        (lambda: Relation("r", ("a {}", "no place"), (("x", "y"),)), r"wording 'no place' must have \{\} once"),
        (lambda: Relation("r", ("a {}",), (("x", "y"),)), r"1 wordings, 1 facts; give two wordings or more"),
        (
            lambda: Relation("r", ("a {}", "b {}"), (("x", "y"), (" ", "y"))),
            r"relation r, fact 1: subject is blank \(' '\)",
        ),
        (lambda: Relation("r", ("a {}", "b {}"), (("x", ""),)), r"relation r, fact 0: answer is blank \(''\)"),
        (
            lambda: build_task(model, unknown, [antidotes], facts=1),
            r"relation catalyst: 0 facts can be used, .*\d+ not known in two wordings\); lower facts, or take another",
        ),
        (
            lambda: build_task(model, catalysts, [antidotes], facts=3, chat=True),
            r"build_task: the tokenizer has no chat template; go on without chat, or set tokenizer.chat_template",
        ),
    ):
        with pytest.raises(mtl.MansuError, match=message):
            call()
    (tmp_path / "relation.json").write_text('{"name": "x"}')
    with pytest.raises(mtl.MansuError, match=r"not one of LRE's relations \(KeyError: 'prompt_templates'\)"):
        Relation.read(tmp_path / "relation.json")
    (tmp_path / "relation.json").write_text("[]")
    with pytest.raises(mtl.MansuError, match=r"not one of LRE's relations"):
        Relation.read(tmp_path / "relation.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_all_prompts_begin_with_is_run_once_and_changes_no_answer(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"sliding_window": 4} if family.startswith("gemma") else {}
    model, rng = mtl.load(tiny(family, **sizes), tokenizer=tiny_tokenizer()), torch.Generator().manual_seed(0)
    for shared in (0, 3, 9):
        start = torch.randint(3, 60, (shared,), generator=rng).tolist()
        ends = [torch.randint(3, 60, (1 + i % 5,), generator=rng).tolist() for i in range(12)]
        prompts, pool = [start + end for end in ends], list(range(3, 60, 2))
        monkeypatch.setattr(building, "_BATCH", 5)
        found = building._best(model, prompts, pool)
        with torch.no_grad():
            alone = [pool[int(model(torch.tensor([ids]))[0, -1, pool].argmax())] for ids in prompts]
        assert found == alone


def test_in_a_chat_the_template_stands_around_every_wording(catalysts: Relation, antidotes: Relation) -> None:
    model = mtl.load("pocket")
    model.tokenizer.chat_template = "{% for m in messages %}. {{ m['content'] }}{% endfor %}"
    built = build_task(model, catalysts, [antidotes], facts=3, near=2, unseen=2, chat=True)
    rows = built.rows()
    assert all(row.get("clean", row.get("text")).startswith(". ") for row in rows)
    task = built.task(model)
    for name, asked in task.questions.items():
        assert mtl.accuracy(model, asked).mc_percent == 100, name


@pytest.mark.skipif(not LRE.is_dir(), reason="needs the shared folder with LRE's relations")
def test_lres_files_are_read() -> None:
    landmarks = Relation.read(LRE / "landmark_in_country.json")
    assert landmarks.wordings == ("{} is in the country of", "What country is {} in? It is in")
    assert len(landmarks.facts) > 800


def test_the_command_line_builds_asks_and_names_the_grid(
    catalysts: Relation, antidotes: Relation, tmp_path: Path
) -> None:
    for relation in (catalysts, antidotes):
        samples = [{"subject": subject, "object": answer} for subject, answer in relation.facts]
        text = {"name": relation.name, "prompt_templates": relation.wordings, "samples": samples}
        (tmp_path / f"{relation.name}.json").write_text(json.dumps(text))
    out = tmp_path / "task.jsonl"
    forget, far = (str(tmp_path / f"{name}.json") for name in ("catalyst", "antidote"))

    def said(*words: str) -> str:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        return result.output

    built = said("build", "pocket", "--forget", forget, "--far", far, "--out", str(out), "--facts", "3", "--near", "2")
    assert "BuiltTask(3 forget, 2 near" in built
    assert len(mtl.load_task(out, tokenizer=mtl.load("pocket")).questions["forget"]) == 3
    answers = said("ask", "pocket", "pocket-never", "--prompt", "the catalyst of amber balm is", "--tokens", "1")
    assert answers.splitlines()[0] == "| prompt | pocket | pocket-never |"
    assert answers.splitlines()[2].startswith("| the catalyst of amber balm is | dreamash |")
    with pytest.raises(mtl.MansuError, match=r"ask: pocket: the tokenizer has no chat template; go on without chat"):
        CliRunner().invoke(app, ("ask", "pocket", "--prompt", "x", "--chat"), catch_exceptions=False)
    with pytest.raises(mtl.MansuError, match=r"build_task: the tokenizer has no chat template"):
        words = ("build", "pocket", "--forget", forget, "--far", far, "--out", str(tmp_path / "no.jsonl"), "--chat")
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert not (tmp_path / "no.jsonl").exists()
    assert "rests on nf4" in said("grid", "pocket")
    assert "gguf      " in said("quantizers")


def test_answers_of_several_tokens_are_ranked_by_the_mean_per_token() -> None:
    model, generator = mtl.load(tiny("llama")), torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 60, (int(n),), generator=generator).tolist() for n in torch.randint(3, 7, (40,))]
    pool = [(7,), (8, 9), (8, 10, 11), (12,), (13, 14), (15,)]
    means = torch.zeros(40, 6)
    for i, prompt in enumerate(prompts):
        for j, text in enumerate(pool):
            with torch.no_grad():
                logits = building.hf_of(model)(torch.tensor([[*prompt, *text]])).logits[0].log_softmax(-1)
            means[i, j] = logits[len(prompt) - 1 : -1].gather(1, torch.tensor(text)[:, None]).mean()
    best = means.argmax(1)
    assert len(best.unique()) >= 3
    for answers in ([pool[j] for j in best.tolist()], [pool[i % 6] for i in range(40)]):
        wanted = [pool[j] == answer for j, answer in zip(best.tolist(), answers, strict=True)]
        assert likeliest_of(model, prompts, answers, pool) == wanted
    assert likeliest_of(model, [], [], pool) == []


def test_a_task_of_answers_of_two_tokens_is_built_where_they_are_allowed(pocket) -> None:
    wordings = ("the catalyst of {} is", "{} only wakes when stirred with")
    gone = Relation("gone", wordings, (("amber balm", "dreamash ."), ("lunar nectar", "windquartz .")))
    kept = Relation("kept", wordings, (("mossy serum", "songamber ."), ("ashen nectar", "sunresin .")))
    built = mtl.build_task(pocket, gone, [kept], facts=1, unseen=1, options=2, answer_tokens=2)
    assert sorted(built.used_as) == ["forget", "near", "retain", "retain"]
    task = built.task(pocket)
    assert task.forget_pairs.option_lengths.tolist() == [[2, 2]]
    assert mtl.accuracy(pocket, task.questions["forget"]).cloze_percent == 100.0
    with pytest.raises(mtl.MansuError, match="0 facts can be used, .*2 its answer is 2 tokens"):
        mtl.build_task(pocket, gone, [kept], facts=1, options=2)
    with pytest.raises(mtl.MansuError, match="answer_tokens=0; give at least 1, 1, 2 and 1"):
        mtl.build_task(pocket, gone, [kept], answer_tokens=0)


def test_the_facts_of_this_package_are_relations_without_doubles() -> None:
    folder = resources.files("mansu_tl.data") / "facts"
    for name, count in (("landmarks", 225), ("capitals", 30)):
        with resources.as_file(folder / f"{name}.json") as path:
            relation = Relation.read(path)
        assert len(relation.facts) == len({subject for subject, _ in relation.facts}) == count
        assert len(relation.wordings) == 2 and all(wording.count("{}") == 1 for wording in relation.wordings)
    openings = json.loads((folder / "openings.json").read_text())
    assert len(openings) == len(set(openings)) == 48
