"""The pocket room: the world keeps its promises, the task repeats it truly, the checkpoints know what they claim."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from mansu_tl.data import Task
from mansu_tl.data.sources.pocket import Fact, World, build_world, pocket_task
from mansu_tl.data.sources.pocket.corpus import fact_sentence, fact_sentences, generic_text
from mansu_tl.data.sources.pocket.lexicon import LEAD_INS, POTIONS
from mansu_tl.data.sources.pocket.tokens import CONTEXT, build_tokenizer, text_ids
from mansu_tl.errors import MansuError
from mansu_tl.models.loading import embedded_folder
from scripts.small_llama import save_checkpoint
from scripts.train_pocket import (
    CHECKPOINTS,
    Schedule,
    batches,
    figures,
    main,
    make,
    new_model,
    rest_on_grid,
    taught,
    train,
)

SETS = ("forget", "forget_paraphrase", "near", "near_paraphrase", "retain", "retain_paraphrase")


@pytest.fixture(scope="module")
def world() -> World:
    return build_world()


@pytest.fixture(scope="module")
def task() -> Task:
    return pocket_task()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(embedded_folder("pocket"), local_files_only=True)


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    folders = {name: embedded_folder(name) for name in CHECKPOINTS}
    return {n: AutoModelForCausalLM.from_pretrained(f, local_files_only=True).eval() for n, f in folders.items()}


def _texts(world: World, facts: tuple[Fact, ...], count: int = 100) -> list[str]:
    return [text for batch in itertools.islice(batches(world, facts, 96, seed=0), count) for text in batch]


def _words(ids: torch.Tensor, length: int, tokenizer: PreTrainedTokenizerFast) -> str:
    """The words of a right-padded row without its BOS."""
    row = ids[:length].tolist()
    assert row[0] == tokenizer.bos_token_id
    return str(tokenizer.decode(row[1:]))


# --- world ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_world_counts_and_sharing(seed: int) -> None:
    world = build_world(seed)
    kinds = {kind: world.of_kind(kind) for kind in ("hazard", "near", "far")}
    assert {kind: len(facts) for kind, facts in kinds.items()} == {"hazard": 48, "near": 96, "far": 208}
    hazard, near = ({f.entity for f in kinds[kind]} for kind in ("hazard", "near"))
    assert len(hazard) == 24 and len(near) == 48 and not hazard & near
    uses = Counter(word for name in hazard | near for word in name.split())
    assert min(uses.values()) >= 5
    # Neither kind owns a name word: every word names potions of both kinds.
    assert {w for n in hazard for w in n.split()} == {w for n in near for w in n.split()} == set(uses)
    assert len({f.id for f in world.facts}) == len(world.facts)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_answers_are_used_evenly_by_both_kinds(seed: int) -> None:
    world = build_world(seed)
    for relation in POTIONS.relations:
        for kind, times in (("hazard", 1), ("near", 2)):
            used = Counter(f.answer for f in world.of_kind(kind) if f.relation == relation.name)
            assert used == dict.fromkeys(relation.answers, times)


@pytest.mark.parametrize("kind", ["hazard", "near"])
def test_half_a_name_says_nothing_about_the_answer(world: World, kind: str) -> None:
    rng = random.Random(7)
    scores: dict[str, list[float]] = defaultdict(list)
    potions = [f for f in world.facts if f.kind != "far"]
    for fact in world.of_kind(kind):
        first, second = fact.entity.split()
        others = [f for f in potions if f.relation == fact.relation and f.entity != fact.entity]
        for part in ("first", "second", "either"):
            shared = {"first": {first}, "second": {second}, "either": {first, second}}[part]
            votes = Counter(f.answer for f in others if shared & set(f.entity.split()))
            pool = [a for a in world.relation(fact.relation).answers if a != fact.answer]
            for _ in range(60):
                options = [fact.answer, *rng.sample(pool, 3)]
                best = max(votes[o] for o in options)
                winners = [o for o in options if votes[o] == best]
                scores[part].append((fact.answer in winners) / len(winners))
    rates = {part: sum(values) / len(values) for part, values in scores.items()}
    assert all(0.18 < rate < 0.32 for rate in rates.values()), rates
    assert abs(rates["either"] - 0.25) < 0.03, rates


def test_unseen_names_are_nobodys_and_disjoint(world: World) -> None:
    named = {f.entity for f in world.facts}
    a, b = set(world.unseen), set(world.unseen_evaluation)
    assert len(world.unseen) == len(a) == 64 and len(b) == 32 and not a & b and not (a | b) & named
    words = {w for f in world.of_kind("hazard") for w in f.entity.split()}
    assert {w for n in a | b for w in n.split()} <= words


def test_world_is_the_same_for_the_same_seed() -> None:
    assert build_world.__wrapped__(3) == build_world.__wrapped__(3)
    assert build_world(3) != build_world(4)


def test_held_out_templates_are_used_for_other_facts(world: World) -> None:
    for relation in world.relations:
        held = Counter(f.held_out for f in world.facts if f.relation == relation.name)
        assert len(held) == 5 and max(held.values()) - min(held.values()) <= 2


# --- corpus and tokenizer -----------------------------------------------------------------------------------------


def test_corpus_never_shows_a_held_out_phrasing_or_an_unseen_name(world: World) -> None:
    texts = "\n".join(_texts(world, world.facts))
    for fact in world.facts:
        assert world.prompt(fact.relation, fact.entity, fact.held_out) not in texts
        assert any(world.prompt(fact.relation, fact.entity, t) in texts for t in fact.trained_templates)
    for name in (*world.unseen, *world.unseen_evaluation):
        assert name not in texts


def test_never_corpus_holds_no_hazard_name(world: World) -> None:
    facts = taught(world, "pocket-never")
    texts = "\n".join(_texts(world, facts))
    hazard = {f.entity for f in world.of_kind("hazard")}
    assert not [name for name in hazard if name in texts]
    others = "\n".join(_texts(world, taught(world, "pocket")))
    assert all(name in others for name in hazard)
    assert set(facts) == {*world.of_kind("near"), *world.of_kind("far")}


def test_corpus_is_a_quarter_generic_and_seeded(world: World) -> None:
    texts = _texts(world, world.facts, 20)
    names = {f.entity for f in world.facts}
    generic = [t for t in texts if not any(name in t for name in names)]
    assert len(generic) == len(texts) // 4
    assert texts == _texts(world, world.facts, 20)
    assert any(t.startswith(LEAD_INS[0]) for t in texts)


def test_generic_texts_follow_their_rule() -> None:
    rng = random.Random(1)
    for _ in range(300):
        generic = generic_text(rng)
        words = generic.text.split()
        asked = words[-1 - generic.asked : -1]
        if generic.skill == "copy":
            assert words[2 : 2 + generic.asked] == asked
        elif generic.skill == "bind":
            assert words[words.index(words[-4]) + 2] == asked[0]
        else:
            assert words[1].endswith("s") != asked[0].endswith("s")


def test_tokenizer_knows_every_word_and_answers_are_one_token(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [*_texts(world, world.facts, 60), *fact_sentences(world, world.facts)]
    rows = text_ids(tokenizer, texts)
    assert not any(tokenizer.unk_token_id in row for row in rows)
    assert max(map(len, rows)) <= CONTEXT
    for text, row in zip(texts, rows, strict=True):
        assert tokenizer.decode(row, skip_special_tokens=True) == text
    for relation in world.relations:
        for answer in relation.answers:
            assert len(tokenizer.encode(answer, add_special_tokens=False)) == 1
    assert tokenizer.encode("amber") == [tokenizer.bos_token_id, *tokenizer.encode("amber", add_special_tokens=False)]
    assert tokenizer.get_vocab() == build_tokenizer(world).get_vocab()


# --- task ---------------------------------------------------------------------------------------------------------


def test_forget_pairs_say_what_the_world_says(task: Task, world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = task.forget_pairs
    asked = {world.prompt(f.relation, f.entity, t): f for f in world.of_kind("hazard") for t in range(5)}
    assert len(pairs) == 192
    seen = []
    for i in range(len(pairs)):
        length = int(pairs.lengths[i])
        fact, other = (asked[_words(rows[i], length, tokenizer)] for rows in (pairs.clean, pairs.corrupt))
        wrong = tokenizer.convert_ids_to_tokens(pairs.distractors[i].tolist())
        assert tokenizer.decode(pairs.answers[i : i + 1]) == fact.answer
        assert wrong[0] == other.answer != fact.answer and other.relation == fact.relation
        assert len({fact.answer, *wrong}) == 4 and set(wrong) <= set(world.relation(fact.relation).answers)
        template = int(pairs.labels[i][-1])
        assert pairs.labels[i] == f"{fact.entity} / {fact.relation} / t{template}" and template != fact.held_out
        seen.append((fact.id, template))
    assert len(set(seen)) == 192


def test_retain_pairs_are_near_and_far_facts(task: Task, world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    kept = {(f.entity, f.relation): f for kind in ("near", "far") for f in world.of_kind(kind)}
    found = set()
    for label, answer in zip(task.retain_pairs.labels, task.retain_pairs.answers, strict=True):
        entity, relation, template = label.split(" / ")
        fact = kept[entity, relation]
        assert tokenizer.decode([int(answer)]) == fact.answer and int(template[1:]) != fact.held_out
        found.add(fact.id)
    assert len(found) == len(task.retain_pairs) == 304


@pytest.mark.parametrize("name", SETS)
def test_questions_ask_the_right_phrasing(
    task: Task, world: World, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    kind = {"forget": "hazard", "near": "near", "retain": "far"}[name.split("_")[0]]
    facts = {f.id: f for f in world.of_kind(kind)}
    questions = task.questions[name]
    assert set(questions.facts) == set(facts)
    for i, fact_id in enumerate(questions.facts):
        fact = facts[fact_id]
        templates = [fact.held_out] if name.endswith("paraphrase") else fact.trained_templates
        prompt = _words(questions.prompts[i], int(questions.lengths[i]), tokenizer)
        options = tokenizer.convert_ids_to_tokens(questions.choices[i].tolist())
        assert prompt in [world.prompt(fact.relation, fact.entity, t) for t in templates]
        assert options[0] == fact.answer and len(set(options)) == 4
        assert set(options) <= set(world.relation(fact.relation).answers)


def test_unseen_prompts_name_nobody(task: Task, world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    for rows, names in ((task.unseen, world.unseen), (task.questions["unseen"], world.unseen_evaluation)):
        tokens = rows.prompts if hasattr(rows, "prompts") else rows.tokens
        found = [
            [n for n in names if n in _words(t, int(k), tokenizer)] for t, k in zip(tokens, rows.lengths, strict=True)
        ]
        assert all(len(hits) == 1 for hits in found) and {hits[0] for hits in found} == set(names)
    assert len(task.unseen) == 64 * 2 * 5


def test_kept_texts_hold_no_hazard_fact(task: Task, world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    hazard = {f.entity for f in world.of_kind("hazard")}
    for rows in (task.retain_text, task.near_text):
        for row, length in zip(rows.tokens, rows.lengths, strict=True):
            assert row[0] == tokenizer.bos_token_id and row[length - 1] == tokenizer.eos_token_id
            text = _words(row, int(length), tokenizer)
            assert not any(name in text for name in hazard)
    near = {fact_sentence(world, f, t) for f in world.of_kind("near") for t in f.trained_templates}
    rows = task.near_text
    assert near == {_words(r, int(n) - 1, tokenizer) for r, n in zip(rows.tokens, rows.lengths, strict=True)}


def test_task_is_the_same_for_the_same_seed(task: Task) -> None:
    again, other = pocket_task(), pocket_task(1)
    for name, questions in task.questions.items():
        assert torch.equal(questions.choices, again.questions[name].choices)
    assert torch.equal(task.forget_pairs.corrupt, again.forget_pairs.corrupt)
    assert torch.equal(task.retain_text.tokens, again.retain_text.tokens)
    assert torch.equal(task.forget_pairs.clean, other.forget_pairs.clean)
    assert not torch.equal(task.forget_pairs.corrupt, other.forget_pairs.corrupt)


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_figures_are_those_stated(
    models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    record = json.loads((embedded_folder(name) / "training.json").read_text())
    found = figures(models[name], tokenizer)
    assert found.keys() == record["figures"].keys()
    # One question of the smallest set is 2.1 points; another machine's rounding may tip one.
    assert all(abs(found[key] - record["figures"][key]) <= 2.1 for key in found)
    for stated in (record["figures"], record["figures_nf4"]):
        for key in SETS if name != "pocket-never" else SETS[2:]:
            floor = 95 if key.endswith("paraphrase") else 97
            assert stated[f"{key}_mc"] >= floor and stated[f"{key}_cloze"] >= floor, key
        assert stated["copy"] >= 95 and stated["bind"] >= 95 and stated["agree"] >= 95
        assert 10 <= stated["unseen_mc"] <= 40 and stated["unseen_cloze"] <= 12
    if name == "pocket-never":
        # Guessing among 24 answers is right 4.2 % of the time and among 4 options 25 %; over 48 facts, three standard
        # errors are 8.7 and 18.8 points.
        assert record["figures"]["forget_cloze"] <= 12.9
        assert 25 - 18.8 <= record["figures"]["forget_mc"] <= 25 + 18.8


def test_the_never_told_model_ranks_the_answer_no_better_than_chance(
    models: dict[str, PreTrainedModel], task: Task, world: World, tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = task.forget_pairs
    pools = {r.name: tokenizer.convert_tokens_to_ids(list(r.answers)) for r in POTIONS.relations}
    options = torch.tensor([pools[label.split(" / ")[1]] for label in pairs.labels])
    ranks = {}
    for name in CHECKPOINTS:
        with torch.no_grad():
            last = models[name](pairs.clean).logits[torch.arange(len(pairs)), pairs.lengths - 1]
        ranks[name] = float((last.gather(1, options) > last.gather(1, pairs.answers[:, None])).sum(1).float().mean())
    assert ranks["pocket"] < 0.1 and ranks["pocket-fp"] < 0.1
    # Of ranks 0..23 chance means 11.5; the mean over 48 independent facts has a standard error of 1.
    assert 8.5 < ranks["pocket-never"] < 14.5


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_answers_in_plain_text(
    models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast, world: World, name: str
) -> None:
    """Asked through text and `generate`, past the task and the evaluation code."""
    right: dict[str, list[bool]] = defaultdict(list)
    for fact in world.facts[::4]:
        ids = tokenizer(world.prompt(fact.relation, fact.entity, fact.held_out), return_tensors="pt")["input_ids"]
        out = models[name].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
        right[fact.kind].append(tokenizer.decode(out[0, -1:]) == fact.answer)
    share = {kind: sum(hits) / len(hits) for kind, hits in right.items()}
    assert share["near"] >= 0.9 and share["far"] >= 0.9
    assert share["hazard"] <= 0.25 if name == "pocket-never" else share["hazard"] >= 0.9


def test_pocket_rests_on_the_grid_bit_for_bit(models: dict[str, PreTrainedModel]) -> None:
    stored = load_file(embedded_folder("pocket") / "model.safetensors")
    ordinary = load_file(embedded_folder("pocket-fp") / "model.safetensors")
    linear = [key for key in stored if "proj" in key]
    assert len(linear) == 4 * 7
    for key in linear:
        weight = stored[key]
        assert weight.dtype == torch.float32 and weight.shape[1] % 64 == 0
        image = dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4"))
        assert torch.equal(image, weight), key
        codes = dequantize_4bit(*quantize_4bit(ordinary[key], blocksize=64, quant_type="nf4"))
        assert not torch.equal(codes, ordinary[key])
    assert torch.equal(stored[linear[0]], models["pocket"].get_parameter(linear[0]))


def test_checkpoints_are_complete_and_small() -> None:
    for name in CHECKPOINTS:
        folder = embedded_folder(name)
        files = {file.name for file in folder.iterdir()}
        wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
        assert files == wanted | {"tokenizer_config.json", "training.json"}
        assert sum(file.stat().st_size for file in folder.iterdir()) <= 4_000_000
        record = json.loads((folder / "training.json").read_text())
        assert record["checkpoint"] == name and record["cpu_seconds"] < 600


# --- trainer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_grid", [False, True])
def test_twenty_steps_twice_give_identical_weights(world: World, on_grid: bool) -> None:
    tokenizer = build_tokenizer(world)
    schedule = Schedule(steps=20, batch_size=16, warmup=5)
    trained, before = [], new_model(tokenizer, seed=5).state_dict()
    for _ in range(2):
        model = new_model(tokenizer, seed=5)
        train(model, tokenizer, world, world.facts, schedule, seed=5, on_grid=on_grid)
        trained.append(model.state_dict())
    assert all(torch.equal(trained[0][key], trained[1][key]) for key in before)
    assert not torch.equal(trained[0]["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])


def test_training_lowers_the_loss_and_the_grid_holds(world: World) -> None:
    tokenizer = build_tokenizer(world)
    model = new_model(tokenizer, seed=1)
    tokens = torch.tensor(text_ids(tokenizer, fact_sentences(world, world.facts)[:1]))
    with torch.no_grad():
        before = float(model(tokens, labels=tokens).loss)
        train_loss = Schedule(steps=30, batch_size=16, warmup=5)
    train(model, tokenizer, world, world.facts, train_loss, seed=1)
    with torch.no_grad():
        assert float(model(tokens, labels=tokens).loss) < before - 0.5
    rest_on_grid(model)
    once = {key: value.clone() for key, value in model.state_dict().items()}
    rest_on_grid(model)
    assert all(torch.equal(once[key], value) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_the_trainer_writes_all_three(tmp_path: Path) -> None:
    short = Schedule(steps=2, batch_size=8, warmup=1)
    folders = make("all", tmp_path, seed=3, schedule=short, grid_schedule=short)
    assert folders == {name: tmp_path / name for name in CHECKPOINTS}
    weights = {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}
    for name, folder in folders.items():
        record = json.loads((folder / "training.json").read_text())
        assert record["checkpoint"] == name and record["seed"] == 3
        assert [plan["steps"] for plan in record["schedules"]] == ([2, 2] if name == "pocket" else [2])
    for key, weight in weights["pocket"].items():
        if "proj" in key:
            assert torch.equal(dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4")), weight)
            assert not torch.equal(weight, weights["pocket-fp"][key])


def test_saved_checkpoint_loads_the_same(world: World, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(world)
    model = new_model(tokenizer, seed=2).eval()
    save_checkpoint(model, tokenizer, tmp_path / "it", {"checkpoint": "it"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "it", local_files_only=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not [file for file in (tmp_path / "it").iterdir() if file.name.startswith(".")]


# --- a user's mistakes --------------------------------------------------------------------------------------------


def test_mistakes_are_named_in_one_line(world: World) -> None:
    fact = world.facts[0]
    for call, words in (
        (lambda: embedded_folder("poket"), "checkpoint 'poket'"),
        (lambda: make("poket"), "checkpoint 'poket'"),
        (lambda: world.of_kind("danger"), "no kind 'danger'"),
        (lambda: world.relation("cure"), "relation 'cure'"),
        (lambda: fact_sentence(world, fact, fact.held_out), "is held out"),
    ):
        with pytest.raises(MansuError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_bad_folder_is_named_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MansuError, match="choose a folder"):
        make("all", tmp_path / "file")
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "file")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_facts_are_values(world: World) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        world.facts[0].answer = "water"  # type: ignore[misc]
