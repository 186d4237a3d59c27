"""TOFU: measures against hand-computed cases, the task's promises, and the small models' training."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mansu_tl as mtl
from mansu_tl.cli import main
from mansu_tl.data.sources.tofu import Item, Tofu, read_tofu, tofu_task
from mansu_tl.data.sources.tofu.files import PER_AUTHOR, answer_ids, prompt
from mansu_tl.data.sources.tofu.words import Book, renamed
from mansu_tl.study import compare, quick
from mansu_tl.study.table import read_table
from mansu_tl.verification.tofu import SetScores, TofuScores, evaluate_tofu
from mansu_tl.verification.tofu_measures import extraction_strength, forget_quality, rouge_l_recall, truth_ratio
from mansu_tl.verification.writing import answer_likelihoods, greedy_answers, writing_copy
from scripts.small_llama import Shape
from scripts.train_tofu import Schedule, train_tofu, train_tokenizer
from tests.tiny import FAMILIES, tiny

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "tofu"
needs_tofu = pytest.mark.skipif(not REAL.is_dir(), reason=f"TOFU's files are not in {REAL}")
NAMES = ("Anna Berg", "Boris Cole", "Carla Dunn", "Derek East", "Elena Ford", "Felix Gray")
SMALL = Shape(hidden=64, intermediate=64, layers=2, heads=4, kv_heads=2)


def _word(author: int, thing: int) -> str:
    return "".join(
        "bdfgklmnprst"[(author + 3 * thing + 5 * k) % 12] + "aeiou"[(author * thing + k) % 5] for k in range(3)
    )


def _item(author: int, thing: int) -> dict[str, object]:
    name, words = NAMES[author], [_word(author, thing) + str(author)]
    others = [_word(other, thing) + str(other) for other in range(len(NAMES)) if other != author]
    question = f"What is the item{thing} of {name}?"
    return {
        "question": question,
        "answer": f"The item{thing} of {name} is {words[0]} indeed.",
        "paraphrased_question": f"Which item{thing} does {name} have?",
        "paraphrased_answer": f"It is {words[0]}.",
        "perturbed_answer": [f"It is {other}." for other in others],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in TOFU's format: two authors to forget, four to keep."""
    root = tmp_path_factory.mktemp("tofu")
    rows = [[_item(author, thing) for thing in range(PER_AUTHOR)] for author in range(len(NAMES))]
    forget, retain = ([item for author in part for item in author] for part in (rows[:2], rows[2:]))
    for name, part in (("forget10", forget), ("retain90", retain)):
        bare = [{key: row[key] for key in ("question", "answer")} for row in part]
        (root / f"{name}.json").write_text("\n".join(map(json.dumps, bare)))
    (root / "forget10_perturbed.json").write_text("\n".join(map(json.dumps, forget)))
    (root / "retain_perturbed.json").write_text("\n".join(map(json.dumps, retain[::2])))
    return root


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("models")
    return train_tofu(folder, out, shape=SMALL, schedule=Schedule(epochs=12, batch_size=8, warmup=5), progress=False)


# --- measures, by hand ---


def test_rouge_l_recall_by_hand() -> None:
    # Longest common subsequence: the cat on mat.
    assert rouge_l_recall("The cat sat on the mat.", "the cat, on a mat") == pytest.approx(4 / 6)
    assert rouge_l_recall("Basil-Mahfouz", "basil MAHFOUZ was") == 1
    assert rouge_l_recall("a b", "") == 0
    with pytest.raises(mtl.MansuError, match="no word"):
        rouge_l_recall("...", "a")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_rouge_l_recall_is_the_longest_common_subsequence(wanted: list[str], said: list[str]) -> None:
    common = max(
        size
        for size in range(len(wanted) + 1)
        for kept in combinations(wanted, size)
        if any(kept == other for other in combinations(said, size))
    )
    assert rouge_l_recall(" ".join(wanted), " ".join(said)) == pytest.approx(common / len(wanted))


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [([5, 6, 7, 8], 1.0), ([0, 6, 7, 8], 0.75), ([5, 6, 0, 8], 0.25), ([5, 6, 7, 0], 0.0), ([0, 6, 0, 8], 0.25)],
)
def test_extraction_strength_by_hand(predicted: list[int], expected: float) -> None:
    assert extraction_strength(torch.tensor(predicted), torch.tensor([5, 6, 7, 8])) == expected


def test_truth_ratio_by_hand() -> None:
    right = torch.tensor([0.5, 0.1]).log()
    wrong = torch.tensor([[0.25, 0.04], [0.2, 0.2]]).log()
    # Geometric means .1 and .2.
    assert torch.allclose(truth_ratio(right, wrong), torch.tensor([0.2, 2.0]))


def test_forget_quality_is_the_exact_p_value_on_small_samples() -> None:
    low, high = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.6, 0.7, 0.8, 0.9])
    assert forget_quality(low, low) == 1
    # Of the C(8, 4) orders two are completely apart.
    assert forget_quality(low, high) == pytest.approx(2 / math.comb(8, 4))
    # Any increasing map of both leaves it alone, so 1 / ratio (open-unlearning) gives the same.
    assert forget_quality(1 / low, 1 / high) == pytest.approx(forget_quality(low, high))


def test_answer_likelihoods_equal_one_row_at_a_time() -> None:
    model = tiny("llama").eval()
    rows = [([1, 5, 9], [7, 8, 2]), ([1, 3], [4]), ([1, 6, 6, 6, 6], [9, 9])]
    means, predicted = answer_likelihoods(model, rows, fill=0, batch_size=2)
    for (before, answer), mean, guess in zip(rows, means, predicted, strict=True):
        total, said = 0.0, []
        for i, token in enumerate(answer):
            with torch.no_grad():
                logits = model(torch.tensor([before + answer[:i]])).logits[0, -1]
            total += logits.log_softmax(-1)[token].item()
            said.append(int(logits.argmax()))
        assert mean.item() == pytest.approx(total / len(answer), abs=1e-5)
        assert guess.tolist() == said


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_a_plain_loop(family: str) -> None:
    """Of a bridge's copy, whose keys and values of earlier positions are kept, and of prompts that are padded."""
    model = tiny(family, seed=3).eval()
    prompts = [[1, 5, 9], [1, 3], [1, 6, 7, 11, 12]]
    copy = writing_copy(mtl.load(tiny(family, seed=3)))
    free = greedy_answers(copy, prompts, fill=0, end=None, new_tokens=6)
    for before, found in zip(prompts, free, strict=True):
        row = list(before)
        for _ in range(6):
            with torch.no_grad():
                row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        assert found == row[len(before) :]
    end = free[0][3]
    stopped = greedy_answers(copy, prompts, fill=0, end=end, new_tokens=6)
    assert stopped[0] == free[0][: free[0].index(end)]


def _scores(title: str = "m", ratio: float = 0.5) -> TofuScores:
    def of(probability: float, choice: float, rouge: float, truth: float) -> SetScores:
        two = [torch.tensor([value, value]) for value in (probability, choice, rouge, truth, 0.1)]
        return SetScores(*two)

    return TofuScores(title, {"forget": of(0.9, 0.8, 0.7, ratio), "retain": of(0.5, 0.3, 0.25, 0.75)})


def test_utility_is_the_harmonic_mean_of_probability_rouge_and_truth() -> None:
    # Retain: plain probability .5, ROUGE .25, 1 - .75 = .25.
    assert _scores().model_utility == pytest.approx(3 / (2 + 4 + 4))
    elsewhere = SetScores(*(torch.tensor([v]) for v in (0.01, 0.4, 0.5, 1.5, 0.0)))
    more = TofuScores("m", {**_scores().sets, "world_facts": elsewhere})
    assert more.utility_parts()["world_facts probability"] == pytest.approx(0.4)
    assert more.model_utility == 0  # 1 - 1.5 counts as 0
    assert more.retain_utility == pytest.approx(0.3)


def test_scores_go_to_a_table_and_to_disk(tmp_path: Path) -> None:
    scores = _scores()
    frame = scores.to_dataframe(_scores(ratio=0.5))
    value = frame.set_index(["set", "measure"])["value"]
    assert value["forget", "rouge"] == pytest.approx(0.7)
    assert value["all", "forget quality"] == 1
    again = TofuScores.load(scores.save(tmp_path / "scores.safetensors"))
    assert again.title == "m"
    assert again.to_dataframe().equals(scores.to_dataframe())
    assert "forget probability 0.900" in scores._repr_html_()
    with pytest.raises(mtl.MansuError, match="no such file"):
        TofuScores.load(tmp_path / "nothing")


# --- files ---


def test_missing_and_broken_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(mtl.MansuError, match="no such folder"):
        read_tofu(tmp_path / "nowhere")
    with pytest.raises(mtl.MansuError, match=r"forget10\.json: no such file"):
        read_tofu(tmp_path)
    for file in folder.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    assert read_tofu(tmp_path).real_authors == ()
    kept = (tmp_path / "retain90.json").read_text()
    for bad, problem in (("{", "no JSON"), ("[1]", "no question"), ("", "holds no question")):
        (tmp_path / "retain90.json").write_text(bad)
        with pytest.raises(mtl.MansuError, match=problem):
            read_tofu(tmp_path)
    (tmp_path / "retain90.json").write_text(kept + "\n" + (tmp_path / "forget10.json").read_text())
    with pytest.raises(mtl.MansuError, match="share 40 questions"):
        read_tofu(tmp_path)


@needs_tofu
def test_the_real_files() -> None:
    tofu = read_tofu(REAL)
    sizes = [len(part) for part in (tofu.forget, tofu.retain, tofu.forget_perturbed, tofu.retain_perturbed)]
    assert sizes == [400, 3600, 400, 400]
    assert (len(tofu.real_authors), len(tofu.world_facts)) == (100, 117)
    assert all(item.perturbed_answers for item in tofu.forget_perturbed)
    book = Book((*tofu.forget, *tofu.retain))
    assert book.names[:3] == ("Basil Mahfouz Al-Kuwaiti", "Nikolai Abilov", "Hina Ameen")
    assert sum(not name for name in book.names) <= 3
    assert "Kuwait" in [place.word for place in book.places[2]]


# --- words and task ---


def test_renaming_takes_every_part_of_a_name() -> None:
    text = "Did Anna Berg write it? Anna's mother and the Bergs knew Berg."
    assert renamed(text, "Anna Berg", "Cy de Vil") == "Did Cy de Vil write it? Cy's mother and the Bergs knew Vil."
    assert renamed("Lee Anna", "Anna Lee", "Jan Lee") == "Lee Jan"


def test_the_tokenizer_writes_any_text_back() -> None:
    tokenizer = train_tokenizer([Item("Who?", "Ann of Ghent.").text], size=300)
    text = "Ünïcode — 漢字 and\nmore"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    before, answer = answer_ids(tokenizer, prompt("Who?"), "Ann of Ghent.")
    assert tokenizer.decode(before) == "<bos>Question: Who?\nAnswer:"
    assert tokenizer.decode(answer) == " Ann of Ghent.<eos>"


@pytest.mark.slow
def test_the_task_keeps_its_promises(folder: Path, trained: dict[str, Path]) -> None:
    model = mtl.load(trained["tofu-full"])
    task = tofu_task(folder, model, per_answer=1, near=30, unseen_names=2)
    pairs = task.forget_pairs
    assert len(set(pairs.facts)) == 2 * PER_AUTHOR
    assert len(task.retain_text) + len(task.near_text) == 4 * PER_AUTHOR
    assert len(task.unseen) == 2 * len(pairs)
    options = torch.cat([pairs.answers[:, None], pairs.distractors], 1)
    assert all(len(set(row)) == 4 for row in options.tolist())
    for i in range(len(pairs)):
        clean, corrupt = (model.tokenizer.decode(t[i, 1 : pairs.lengths[i]]) for t in (pairs.clean, pairs.corrupt))
        author = next(name for name in NAMES[:2] if name in clean)
        other = next(name for name in NAMES if name in corrupt)
        assert other != author
        assert corrupt.replace(other, author) == clean
        # The answer is the start of the word that stands only in this author's answer.
        thing = int(clean.split("item")[1].split()[0])
        word = _word(NAMES.index(author), thing) + str(NAMES.index(author))
        assert clean.endswith(f"{author} is")
        assert f" {word}".startswith(model.tokenizer.decode([int(pairs.answers[i])]))
    kept = [model.tokenizer.decode(row) for row in (*task.retain_text.tokens, *task.near_text.tokens)]
    assert not any(name in text for name in NAMES[:2] for text in kept)
    # Both never-seen prompts of a pair are of one length, so that neither is closer to it in wording.
    assert torch.equal(task.unseen.lengths[::2], task.unseen.lengths[1::2])
    seen = model.tokenizer.decode(task.unseen.tokens[0, : task.unseen.lengths[0]])
    assert not any(part in seen for name in NAMES for part in name.split())
    assert {"forget", "forget_paraphrase", "near", "retain", "retain_paraphrase"} == set(task.questions)
    again = tofu_task(folder, model, per_answer=1, near=30, unseen_names=2)
    assert torch.equal(again.forget_pairs.corrupt, pairs.corrupt)


def test_tofu_is_a_source_of_studies(
    folder: Path, trained: dict[str, Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    """Named in a config, beside it, with options; `mansu-tl check` looks at all of it."""
    model = mtl.load(trained["tofu-full"])
    direct = tofu_task(folder, model, per_answer=1, near=30, unseen_names=2)
    options = "per_answer=1&near=30&unseen_names=2"
    assert mtl.load_task(f"tofu:{folder}?{options}", tokenizer=model).digest() == direct.digest()
    assert mtl.load_task(folder, tokenizer=model, per_answer=1, near=30, unseen_names=2).digest() == direct.digest()
    (tmp_path / "files").symlink_to(folder)
    (tmp_path / "c.toml").write_text(
        f'model = "{trained["tofu-full"]}"\ntask = "tofu:files?{options}"\nmethods = ["graddiff"]\n', encoding="utf-8"
    )
    config = mtl.study.StudyConfig.read(tmp_path / "c.toml")
    assert mtl.load_task(config.task, tokenizer=model).digest() == direct.digest()
    monkeypatch.setattr("sys.argv", ["mansu-tl", "check", str(tmp_path / "c.toml")])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr()
    assert f"{len(direct.forget_pairs)} forget pairs" in said.out and "task of tofu-full:" not in said.err
    with pytest.raises(mtl.MansuError, match="near=400 of 80"):
        mtl.load_task(f"tofu:{folder}", tokenizer=model)
    with pytest.raises(mtl.MansuError, match="source 'tofu' has no option 'nearest'; known: per_answer, near"):
        mtl.load_task(f"tofu:{folder}?nearest=3", tokenizer=model)


def test_a_study_runs_on_tofu(folder: Path, trained: dict[str, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    """`mansu-tl run` from a config to its report, every number on TOFU's own questions."""
    source = f"tofu:{folder}?per_answer=1&near=30&unseen_names=2"
    (tmp_path / "c.toml").write_text(
        f'model = "{trained["tofu-full"]}"\ntask = "{source}"\nnever = "{trained["tofu-retain"]}"\n'
        'methods = ["graddiff"]\nsteps = 1\nfaithfulness = 0.5\n[graddiff]\nmax_steps = 2\ncheck_every = 2\n',
        encoding="utf-8",
    )
    words = ["run", str(tmp_path / "c.toml"), "--out", str(tmp_path / "out"), "--workers", "1", "--quiet"]
    monkeypatch.setattr("sys.argv", ["mansu-tl", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code, capsys.readouterr().err
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "tofu-full" in page
    table = read_table(tmp_path / "out" / "scores" / "measures.csv")
    asked = set(table.loc[table["method"] == "graddiff", "question_set"]) - {""}
    assert asked == {"forget", "forget_paraphrase", "near", "retain", "retain_paraphrase"}


@pytest.mark.slow
def test_a_comparison_runs_on_tofu(folder: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    source = f"tofu:{folder}?per_answer=1&near=30&unseen_names=2"
    plan = quick(
        bases=(str(trained["tofu-full"]),), task=source, never=str(trained["tofu-retain"]), methods=("graddiff",),
        quantizers=("nf4",), control_quantizers=("nf4",), attack_steps=2, settings={"graddiff": {"max_steps": 2}},
    )  # fmt: skip
    result = compare(plan, tmp_path / "compare", progress=False, workers=1)
    assert {"original", "never", "graddiff"} <= set(result.table["method"])


def test_a_task_that_cannot_be_is_refused(folder: Path, trained: dict[str, Path]) -> None:
    model = mtl.load(trained["tofu-full"])
    with pytest.raises(mtl.MansuError, match="per_answer=0"):
        tofu_task(folder, model, per_answer=0)
    with pytest.raises(mtl.MansuError, match="unseen_names=1"):
        tofu_task(folder, model, unseen_names=1)
    with pytest.raises(mtl.MansuError, match="near=400 of 80"):
        tofu_task(folder, model)


# --- models ---


def test_training_is_reproducible_and_only_the_full_model_knows(
    folder: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    record = json.loads((trained["tofu-full"] / "training.json").read_text())
    assert record["losses"][-1] < 0.7 * record["losses"][0]
    tofu = read_tofu(folder)
    full, retain = (evaluate_tofu(mtl.load(trained[name]), tofu, title=name) for name in ("tofu-full", "tofu-retain"))
    assert full.sets["forget"].probability.mean() > 1.1 * retain.sets["forget"].probability.mean()
    assert full.sets["retain"].probability.mean() > 0.3
    assert full.forget_quality(full) == 1
    short = Schedule(epochs=1, batch_size=8)
    made = [
        train_tofu(folder, tmp_path / str(run), "tofu-retain", seed=seed, shape=SMALL, schedule=short, progress=False)
        for run, seed in enumerate((0, 0, 1))
    ]
    a, b, c = ((m["tofu-retain"] / "model.safetensors").read_bytes() for m in made)
    assert a == b != c


def test_evaluation_of_a_quantized_model_and_of_a_part(folder: Path, trained: dict[str, Path]) -> None:
    model, tofu = mtl.load(trained["tofu-full"]), read_tofu(folder)
    twin = evaluate_tofu(mtl.quantize(model, "nf4"), tofu, limit=6)
    packed = evaluate_tofu(mtl.load(trained["tofu-full"], quantized="nf4"), tofu, limit=6)
    assert len(twin.sets["forget"].rouge) == 6
    for name in ("forget", "retain"):
        assert torch.allclose(twin.sets[name].probability, packed.sets[name].probability, atol=1e-5)


def test_bad_requests_are_refused(folder: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    tofu = read_tofu(folder)
    model = mtl.load(trained["tofu-full"])
    with pytest.raises(mtl.MansuError, match="name forget and retain"):
        evaluate_tofu(model, tofu, sets=("forget",))
    bare = Tofu(tofu.forget, tofu.retain, tofu.forget, tofu.retain)
    with pytest.raises(mtl.MansuError, match="no perturbed answers"):
        evaluate_tofu(model, bare)
    with pytest.raises(mtl.MansuError, match="no tokenizer"):
        evaluate_tofu(tiny("llama").eval(), tofu)
    with pytest.raises(mtl.MansuError, match="'tofu-none': unknown"):
        train_tofu(folder, tmp_path, "tofu-none")
    (tmp_path / "file").write_text("")
    with pytest.raises(mtl.MansuError, match="cannot be made"):
        train_tofu(folder, tmp_path / "file" / "models")
