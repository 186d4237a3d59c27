"""CounterFact, known_1000 and LRE: records, scores by hand and against a plain forward, and tasks made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mansu_tl as mtl
from mansu_tl.data.sources import Request, lre_requests, read_counterfact
from mansu_tl.errors import MansuError
from mansu_tl.verification.counterfact import CounterFactScores, evaluate_counterfact
from tests.spelled import spelling_tokenizer
from tests.tiny import tiny

LRE = Path(__file__).parents[2] / "shared" / "data" / "lre"
needs_lre = pytest.mark.skipif(not LRE.is_dir(), reason=f"LRE's files are not in {LRE}")
CITIES = ("Rome", "Oslo", "Bern", "Lima")
NAMES = ("Ann", "Bob", "Cyd", "Dov", "Eva", "Fay", "Gus", "Hal", "Ida", "Jon", "Kay", "Lou")


def nested(i: int, relation: str, words: str) -> dict[str, Any]:
    true, new = CITIES[i % 4], CITIES[(i + 1) % 4]
    return {
        "case_id": i,
        "requested_rewrite": {
            "prompt": words, "relation_id": relation, "subject": NAMES[i],
            "target_true": {"str": true, "id": "Q1"}, "target_new": {"str": new, "id": "Q2"},
        },
        "paraphrase_prompts": [f"Long ago. {words.format(NAMES[i])}", f"It rained. {words.format(NAMES[i])}"],
        "neighborhood_prompts": [words.format(NAMES[(i + 4) % 12])],
        "attribute_prompts": [], "generation_prompts": [],
    }  # fmt: skip


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def counterfact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [nested(i, "P1", "{} lives in the city of") for i in range(12)]
    rows += [nested(i, "P2", "{} was born near the town") for i in range(8)]
    return written(tmp_path_factory.mktemp("counterfact") / "counterfact.json", rows)


def test_a_nested_record_is_read(counterfact: Path) -> None:
    found = read_counterfact(counterfact)
    assert len(found) == 20
    assert found[0] == Request(
        f"{counterfact}, row 0", "P1", "Ann", "Ann lives in the city of", "Rome", "Oslo",
        ("Long ago. Ann lives in the city of", "It rained. Ann lives in the city of"), ("Eva lives in the city of",),
    )  # fmt: skip
    assert found[0].fact == "P1: Ann"


def test_flat_records_get_what_they_lack_from_their_relation(tmp_path: Path) -> None:
    rows = [
        {"known_id": i, "subject": name, "attribute": CITIES[i % 3], "prompt": f"{name} lives in", "relation_id": "P1",
         "template": "{} lives in", "prediction": ""}
        for i, name in enumerate(NAMES)
    ]  # fmt: skip
    found = read_counterfact(written(tmp_path / "known_1000.json", rows))
    assert [one.true for one in found[:3]] == list(CITIES[:3])
    assert all(one.new != one.true and one.new in CITIES[:3] for one in found)
    # Every third name lives in the same city.
    assert found[0].neighbours == ("Dov lives in", "Gus lives in", "Jon lives in")
    assert found == read_counterfact(tmp_path / "known_1000.json")
    assert found != read_counterfact(tmp_path / "known_1000.json", seed=1)
    flat = {
        "subject": "Ann",
        "prompt": "Ann lives in",
        "target_true": " Rome",
        "target_false": " Oslo",
        "relation_id": "P1",
    }
    (one,) = read_counterfact(written(tmp_path / "flat.json", [flat]))
    assert (one.true, one.new, one.neighbours) == ("Rome", "Oslo", ())


def test_scores_by_hand() -> None:
    # Request a: rewrite succeeds; one of two paraphrases; both neighbours. Request b: rewrite fails; its neighbour fails.
    true = torch.tensor([0.1, 0.2, 0.4, 0.3, 0.5, 0.6, 0.2]).log()
    new = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.2, 0.5, 0.3]).log()
    kinds = ("rewrite", "paraphrase", "paraphrase", "neighbourhood", "neighbourhood", "rewrite", "neighbourhood")
    scores = CounterFactScores("m", true, new, kinds, (*"aaaaa", *"bb"))
    assert scores.success.tolist() == [True, True, False, True, True, False, False]
    assert (scores.efficacy, scores.paraphrase, scores.neighbourhood) == (0.5, 0.5, 0.5)
    assert scores.score == 0.5
    frame = scores.to_dataframe().set_index("score")
    # .4 - .1 and .5 - .6; .3 - .2 and .1 - .4; (.2 + .3) / 2 and .2 - .3.
    assert frame["magnitude"].round(5).tolist() == [0.1, -0.1, 0.075]
    assert frame["requests"].tolist() == [2, 1, 2]
    uneven = CounterFactScores("m", true[:1], new[:1], ("rewrite",), ("a",))
    assert uneven.efficacy == 1 and uneven.score != uneven.score


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_probabilities_are_romes(counterfact: Path, tmp_path: Path, family: str) -> None:
    """One prompt at a time, as ROME's test_batch_prediction: the mean over the answer's tokens behind the prompt."""
    tokenizer = spelling_tokenizer(("Rome", "Oslo"))
    plain = tiny(family, vocab_size=len(tokenizer), max_position_embeddings=128)
    model = mtl.load(plain, tokenizer=tokenizer)
    requests = read_counterfact(counterfact)[:5]
    scores = evaluate_counterfact(model, requests, batch_size=7)
    prompts = [(p, one) for one in requests for p in (one.prompt, *one.paraphrases, *one.neighbours)]
    assert len(scores.true) == len(prompts) == 20
    for i, (prompt, one) in enumerate(prompts):
        for answer, found in ((one.true, scores.true[i]), (one.new, scores.new[i])):
            head = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
            target = tokenizer.encode(f" {answer}", add_special_tokens=False)
            with torch.no_grad():
                logits = plain(torch.tensor([head + target])).logits[0].log_softmax(-1)
            each = [logits[len(head) + j - 1, token] for j, token in enumerate(target)]
            assert found.item() == pytest.approx(torch.stack(each).mean().item(), abs=1e-5)
    assert CounterFactScores.load(scores.save(tmp_path / "s.safetensors")).digest() == scores.digest()
    with pytest.raises(MansuError, match="no request"):
        evaluate_counterfact(model, [])
    with pytest.raises(MansuError, match="is there twice"):
        evaluate_counterfact(model, [requests[0], requests[0]])
    short = tiny(family, vocab_size=len(tokenizer), max_position_embeddings=16)
    with pytest.raises(MansuError, match="row 0: .* tokens, the model has 16 positions"):
        evaluate_counterfact(short, requests, tokenizer)


def test_a_task_of_counterfact(counterfact: Path) -> None:
    tokenizer = spelling_tokenizer()
    task = mtl.load_task(counterfact, tokenizer=tokenizer, facts=4, near=6, far_facts=5)
    assert {name: len(set(asked.facts)) for name, asked in task.questions.items()} == {
        "forget": 4, "forget_paraphrase": 4, "near": 6, "near_paraphrase": 6, "retain": 5, "retain_paraphrase": 5,
    }  # fmt: skip
    assert {fact[:2] for fact in task.questions["near"].facts} == {"P1"}
    assert {fact[:2] for fact in task.questions["retain"].facts} == {"P2"}
    pairs = task.forget_pairs
    known = {one.prompt: one.true for one in read_counterfact(counterfact)}
    for i in range(len(pairs)):
        clean, corrupt = (tokenizer.decode(ids[i, 1 : int(pairs.lengths[i])]) for ids in (pairs.clean, pairs.corrupt))
        texts = [tokenizer.decode(option).strip() for option in pairs.texts()[i]]
        # The corrupt prompt asks another subject in the same words, whose answer is the first distractor.
        assert clean[3:] == corrupt[3:] == " lives in the city of"
        assert texts[:2] == [known[clean], known[corrupt]]
    again = mtl.load_task(f"counterfact:{counterfact}?facts=4&near=6&far_facts=5", tokenizer=tokenizer)
    assert again.digest() == task.digest()
    assert (
        mtl.load_task(counterfact, tokenizer=tokenizer, facts=4, relation="P2").questions["retain"].facts[0][:2] == "P1"
    )
    for options, message in (
        ({"relation": "P9"}, "has no relation 'P9'; it has P1, P2"),
        ({"facts": 0}, "facts=0"),
        ({"facts": 12}, "12 facts can be used, 12 to forget and a near one"),
    ):
        with pytest.raises(MansuError, match=message):
            mtl.load_task(counterfact, tokenizer=tokenizer, **options)


REWRITE: dict[str, Any] = nested(0, "P1", "{} lives in")["requested_rewrite"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"requested_rewrite": None, "subject": "Ann"}, "field 'requested_rewrite' is missing"),
        ({"requested_rewrite": "Ann"}, "requested_rewrite is 'Ann'; it must be an object"),
        ({"requested_rewrite": REWRITE | {"prompt": "Ann lives in"}}, "must have {} once"),
        ({"requested_rewrite": REWRITE | {"target_new": {"id": "Q1"}}}, "target_new: field 'str' is missing"),
        ({"requested_rewrite": REWRITE | {"target_new": REWRITE["target_true"]}}, "new answer 'Rome' is the true one"),
        ({"requested_rewrite": REWRITE, "paraphrase_prompts": "one"}, "paraphrase_prompts is 'one'; it must be a list"),
        ({"subject": "Ann", "prompt": "Bob lives in", "attribute": "Rome"}, "subject 'Ann' is not in prompt"),
        ({"subject": "Ann", "prompt": "Ann lives in"}, "field 'target_true' is missing"),
        ({"subject": "Ann", "prompt": "Ann lives in", "attribute": "Rome"}, "a new one cannot be drawn"),
    ],
)
def test_bad_records_are_refused_in_one_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(MansuError, match=message) as found:
        read_counterfact(written(tmp_path / "bad.json", [row]))
    assert "\n" not in str(found.value)


def test_a_relation_in_lres_format(tmp_path: Path) -> None:
    def relation(name: str, words: list[str]) -> Path:
        samples = [{"subject": who, "object": CITIES[i % 4]} for i, who in enumerate(NAMES)]
        samples.append({"subject": "Ann", "object": "Oslo"})  # two answers: left out
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"name": name, "prompt_templates": words, "samples": samples}))
        return path

    home, born = (
        relation("home", ["{} lives in", "The home of {} is"]),
        relation("birth", ["{} comes from", "Home: {},"]),
    )
    requests = lre_requests(home)
    assert [one.subject for one in requests] == list(NAMES[1:])
    assert requests[0].paraphrases == ("The home of Bob is",)
    assert requests[0].neighbours == ("Fay lives in", "Jon lives in")
    assert all(one.new in CITIES and one.new != one.true for one in requests)
    tokenizer = spelling_tokenizer()
    task = mtl.load_task(home, tokenizer=tokenizer, retain=str(born), facts=3, near=4, far_facts=5)
    assert [len(task.questions[name]) for name in ("forget", "near", "retain", "forget_paraphrase")] == [3, 4, 5, 3]
    with pytest.raises(MansuError, match="nothing to keep; name another relation's file"):
        mtl.load_task(home, tokenizer=tokenizer)
    with pytest.raises(MansuError, match="not one of LRE's relations"):
        mtl.load_task(tmp_path / "none.json", kind="lre", tokenizer=tokenizer, retain=str(born))


@needs_lre
def test_lres_own_files() -> None:
    tokenizer = spelling_tokenizer()
    source, other = LRE / "landmark_in_country.json", LRE / "country_capital_city.json"
    requests = lre_requests(source)
    samples = json.loads(source.read_text())["samples"]
    assert 0 < len(requests) <= len(samples)
    by_subject = {one["subject"]: one["object"] for one in samples}
    for one in requests:
        assert by_subject[one.subject] == one.true
        neighbours = [subject for subject in by_subject if one.prompt.replace(one.subject, subject) in one.neighbours]
        assert {by_subject[subject] for subject in neighbours} <= {one.true}
    task = mtl.load_task(source, tokenizer=tokenizer, retain=str(other), facts=10, near=10, far_facts=10)
    assert [len(task.questions[name]) for name in ("forget", "near", "retain")] == [10, 10, 10]
    changed = (task.forget_pairs.clean != task.forget_pairs.corrupt).sum(1)
    assert (changed > 0).all()
