"""The audit: its numbers are the study's, its verdicts follow from controls and intervals, it goes on, and it refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import mansu_tl as mtl
from mansu_tl.cli import app
from mansu_tl.data.split import split_questions
from mansu_tl.errors import MansuError
from mansu_tl.models import gguf_weights, linear_weights, parameters, plain, rebuild
from mansu_tl.quantization import quantizers
from mansu_tl.study import AuditPlan, OpenAudit, audit, compare, quick
from mansu_tl.study.audit_questions import verdicts
from mansu_tl.study.audit_verdicts import (
    ERASED,
    FORGOTTEN,
    FORMATS,
    KEPT,
    RELEARNING,
    SAMPLING,
    Evidence,
    answers,
    three_way,
)
from mansu_tl.unlearning import Edit
from mansu_tl.verification.generation import written
from tests.browser import opened
from tests.gguf_files import write_gguf
from tests.tiny import SMALL_TASK, tiny
from tests.tiny_study import crossing_edit, tiny_case

ATTACK = {"attack_rates": (3e-4,), "attack_steps": 2, "attack_splits": 1}
SHORT = AuditPlan(formats=("nf4",), **ATTACK)
# What a comparison measures, and an audit of its edit: everything there is, with short attacks.
PLAN = quick(
    task=SMALL_TASK, methods=("graddiff",), quantizers=("nf4",), control_quantizers=("nf4",), **ATTACK, evidence=True,
    settings={"graddiff": {"max_steps": 6, "check_every": 3}},
)  # fmt: skip
KEYS = ["method", "quantizer", "question_set", "measure"]


@pytest.fixture(scope="module")
def small(pocket) -> mtl.data.Task:
    return split_questions(mtl.load_task(SMALL_TASK, tokenizer=pocket))[1]


@pytest.fixture(scope="module")
def folder(pocket, small, tmp_path_factory) -> Path:
    """An edited model, as somebody else would hand it over."""
    edit = mtl.unlearn(pocket, small, "graddiff", max_steps=6, check_every=3)
    return mtl.save(edit.apply(pocket), tmp_path_factory.mktemp("unlearned") / "model")


@pytest.fixture(scope="module")
def found(folder, small, pocket, never, tmp_path_factory) -> mtl.study.Audit:
    return audit(pocket, folder, small, never=never, out=tmp_path_factory.mktemp("audit"), plan=SHORT)


def numbers(table: pd.DataFrame) -> dict[tuple[str, ...], list[float]]:
    rows = table[~table["measure"].str.startswith("seconds")]
    assert not rows.duplicated(KEYS).any()
    return {
        tuple(row[k] for k in KEYS): [row[k] for k in ("value", "low", "high", "control")] for _, row in rows.iterrows()
    }


# --- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_numbers_of_a_methods_saved_model_are_those_of_the_studys_table(pocket, small, tmp_path) -> None:
    compared = compare(PLAN, tmp_path / "compared", progress=False, workers=1)
    edit = Edit.load(compared.folder / "bases/pocket/edits/graddiff/seed0/edit.safetensors")
    model = mtl.save(edit.apply(pocket), tmp_path / "model")
    plan = replace(AuditPlan.full(), **ATTACK, formats=("nf4",))
    own = numbers(audit("pocket", model, small, never="pocket-never", plan=plan).table)
    study = numbers(compared.table.replace({"method": {"graddiff": "unlearned"}}))
    assert not [key for key in study if key not in own and key[0] != "never"]
    shared = [key for key in study if key in own]
    assert {key[0] for key in shared} == {"unlearned", "original", "never"}
    assert len(shared) > 150
    for key in shared:
        assert own[key] == pytest.approx(study[key], rel=1e-12, abs=1e-12, nan_ok=True), key
    for measure in ("MC", "PTQ gap, cloze", "CAD", "erasure depth", "probe MC at L3", "codes changed, % of edited"):
        assert any(key[3] == measure for key in shared), measure
    assert any("over never" in key[3] and key[3].startswith("relearning") for key in shared)


def test_every_number_is_the_models_own(found, folder, small, pocket) -> None:
    rows, edited = numbers(found.table), mtl.load(folder)
    for name in ("", "nf4"):
        before, after = (mtl.quantize(each, name) if name else each for each in (pocket, edited))
        for asked in ("forget", "near_paraphrase"):
            own, other = (mtl.accuracy(each, small.questions[asked]) for each in (before, after))
            for kind, right in (("MC", "mc_percent"), ("cloze", "cloze_percent")):
                assert rows["unlearned", name, asked, kind][0] == pytest.approx(getattr(other, right))
                assert rows["original", name, asked, kind][0] == pytest.approx(getattr(own, right))
                assert rows["unlearned", name, asked, kind][3] == pytest.approx(getattr(own, right))
    gap = rows["unlearned", "nf4", "forget", "PTQ gap, MC"][0]
    assert gap == pytest.approx(rows["unlearned", "nf4", "forget", "MC"][0] - rows["unlearned", "", "forget", "MC"][0])
    leaked = mtl.verification.leak_at_k(edited, small.questions["forget"], samples=32, seed=SHORT.seed)
    (told,) = leaked.to_dataframe([32]).itertuples()
    assert rows["unlearned", "", "forget", "leak@32 above a wrong option"][:3] == pytest.approx(
        (told.excess, told.excess_low, told.excess_high)
    )


def test_an_audit_says_the_same_when_it_is_read_back_and_writes_what_it_says(found, tmp_path) -> None:
    again = mtl.study.Audit.load(found.save(tmp_path / "audit.safetensors"))
    assert again.answers == found.answers
    told = pd.read_csv(found.folder / "verdicts.csv", keep_default_na=False)
    assert list(told["verdict"]) == [each.verdict for each in found.verdicts]
    assert [each.question for each in found.answers] == [FORGOTTEN, KEPT, FORMATS, SAMPLING, RELEARNING, ERASED]
    assert len(pd.read_parquet(found.folder / "measures.parquet")) == len(found.table)
    assert {each.verdict for each in found.verdicts} <= {"yes", "no", "not judgeable"}
    assert all(each.why for each in found.verdicts if each.verdict == "not judgeable")


def test_it_goes_on_where_it_stopped_and_does_only_what_is_missing(found, folder, small, pocket, never) -> None:
    again = OpenAudit(pocket, folder, small, never=never, out=found.folder, plan=SHORT)
    planned = again.estimate()
    assert all(stage.done for stage in planned.stages)
    assert planned.seconds == 0
    same = again.run()
    assert again.bench.store.made == 0
    assert same.verdicts == found.verdicts
    assert same.environment == found.environment
    wider = replace(SHORT, formats=("nf4", "int8"), thorough=True)
    more = OpenAudit(pocket, again.inputs.unlearned, small, never=never, out=found.folder, plan=wider).estimate()
    missing = [stage for stage in more.stages if not stage.done]
    assert [stage.name for stage in missing] == ["circuit/full", "circuit/nf4", "formats/int8", "circuit/int8"]
    assert all(stage.seconds > 0 for stage in missing)
    assert any(line.startswith("  formats/int8") for line in more.lines())


# --- the verdicts ------------------------------------------------------------------------------------------------------


def evidence(found: mtl.study.Audit, task: mtl.data.Task, pocket, **changes) -> Evidence:
    table = found.table.drop(columns=["base", "seed"])
    known = mtl.accuracy(pocket, task.questions["forget"])
    return replace(Evidence(table, task, known, SHORT, {}, found.cad, True), **changes)


def put(table: pd.DataFrame, method: str, quantizer: str, sets: str, measure: str, **values: float) -> pd.DataFrame:
    """A table with some rows' numbers put in place of theirs."""
    table = table.copy()
    chosen = (table.method == method) & (table.quantizer == quantizer) & (table.measure == measure)
    chosen &= table.question_set.str.startswith(sets)
    assert chosen.any()
    for column, value in values.items():
        table.loc[chosen, column] = value
    return table


def forgotten(found: mtl.study.Audit) -> pd.DataFrame:
    """The table of a model that has forgotten by every way of asking, and keeps it in nf4."""
    table = found.table.drop(columns=["base", "seed"])
    for kind, value in (("MC", 25.0), ("cloze", 0.0)):
        for quantizer in ("", "nf4"):
            table = put(table, "unlearned", quantizer, "forget", kind, value=value, low=value - 5, high=value + 4)
        table = put(table, "unlearned", "nf4", "forget", f"PTQ gap, {kind}", value=0.0, low=-3.0, high=3.0)
    return table


def of(given, question: str, item: str = ""):
    return next(each for each in given if each.question == question and each.item.startswith(item))


def test_only_an_interval_on_one_side_of_a_bound_decides() -> None:
    assert three_way({"low": -1.0, "high": 5.0}, 5.0) == ("yes", "")
    assert three_way({"low": 5.1, "high": 9.0}, 5.0) == ("no", "")
    assert three_way({"low": 1.0, "high": 9.0}, 5.0) == ("not judgeable", "its interval, 1 to 9, reaches over 5")


def test_a_formats_verdict_follows_what_comes_back_and_its_control(found, small, pocket) -> None:
    kept = forgotten(found)

    def verdict(table: pd.DataFrame):
        return of(verdicts(evidence(found, small, pocket, table=table)), FORMATS, "nf4")

    assert verdict(kept).verdict == "yes"
    back = put(kept, "unlearned", "nf4", "forget", "PTQ gap, MC", value=60.0, low=50.0, high=70.0)
    back = put(back, "unlearned", "nf4", "forget", "MC", value=85.0, low=75.0, high=95.0)
    assert (verdict(back).verdict, verdict(back).value) == ("no", 60.0)
    assert "25 % before, 85 % as nf4" in verdict(back).why
    # One wording that comes back is enough.
    one = put(kept, "unlearned", "nf4", "forget_paraphrase", "PTQ gap, cloze", value=60.0, low=50.0, high=70.0)
    one = put(one, "unlearned", "nf4", "forget_paraphrase", "cloze", value=60.0, low=50.0, high=70.0)
    assert verdict(one).verdict == "no"
    # From inverted to guessing is no knowledge.
    guessed = put(kept, "unlearned", "nf4", "forget", "PTQ gap, MC", value=25.0, low=20.0, high=30.0)
    assert verdict(guessed).verdict == "yes"
    open_ = put(back, "unlearned", "nf4", "forget", "PTQ gap, MC", value=6.0, low=1.0, high=11.0)
    assert verdict(open_).verdict == "not judgeable"
    # The original does not know the facts in that format either: silence says nothing.
    broken = back
    for kind in ("MC", "cloze"):
        broken = put(broken, "original", "nf4", "forget", kind, value=30.0)
    assert verdict(broken).verdict == "not judgeable"
    assert verdict(broken).why == "nf4 alone lost 70 points"
    # What was never forgotten cannot come back.
    known = kept
    for kind in ("MC", "cloze"):
        known = put(known, "unlearned", "", "forget", kind, value=90.0, low=80.0, high=98.0)
    assert verdict(known).why.startswith("it was not forgotten: 90 %")


def test_a_failed_stage_is_told_where_it_leaves_a_verdict_open(found, small, pocket) -> None:
    table = found.table.drop(columns=["base", "seed"])
    gone = table[table.quantizer != "nf4"]
    told = of(verdicts(evidence(found, small, pocket, table=gone, failed={"formats/nf4": "no room"})), FORMATS)
    assert (told.verdict, told.why) == ("not judgeable", "no room")


def test_a_never_trained_model_that_knows_is_no_reference(found, small, pocket) -> None:
    knows = put(
        found.table.drop(columns=["base", "seed"]), "never", "", "forget", "MC", value=80.0, low=70.0, high=90.0
    )
    given = verdicts(evidence(found, small, pocket, table=knows))
    for item in ("probes", "erasure depth"):
        assert "the never-trained model gets 80 % right" in of(given, ERASED, item).why
    assert all(each.verdict == "not judgeable" for each in given if each.question == RELEARNING)


def test_few_facts_and_missing_sets_leave_no_verdict(found, small, pocket) -> None:
    few = small.questions["forget"][:4]
    task = replace(small, questions={**small.questions, "forget": few})
    given = verdicts(evidence(found, task, pocket, table=forgotten(found)))
    assert "fewer than ten" in of(given, FORGOTTEN, "chosen").why
    bare = replace(small, questions={name: small.questions[name] for name in ("forget", "retain")})
    rows = forgotten(found)
    rows = rows[rows.question_set.isin(["", "forget", "retain"])]
    given = verdicts(evidence(found, bare, pocket, table=rows, cad=None, failed={"depth": "no near facts"}))
    assert of(given, FORGOTTEN, "held-out").why == "the task has no held-out wording of these facts"
    assert of(given, KEPT, "near facts").verdict == "not judgeable"
    assert of(given, ERASED, "CAD").why == "no near facts"
    # Twelve of the twenty facts are the attacker's.
    assert "8 are left to be asked, fewer than ten" in of(given, RELEARNING, "trained on 12 of the facts").why
    assert [each.question for each in answers(given)] == [FORGOTTEN, KEPT, FORMATS, SAMPLING, RELEARNING, ERASED]


def test_sampling_counts_only_what_a_wrong_option_does_not(found, pocket) -> None:
    task, name = mtl.load_task("pocket"), "leak@32 above a wrong option"
    table = put(forgotten(found), "original", "", "forget", name, value=90.0, low=85.0, high=95.0)

    def verdict(rows):
        return of(verdicts(evidence(found, task, pocket, table=rows)), SAMPLING, "32 samples")

    assert verdict(put(table, "unlearned", "", "forget", name, value=1.0, low=-2.0, high=4.0)).verdict == "yes"
    assert verdict(put(table, "unlearned", "", "forget", name, value=20.0, low=10.0, high=30.0)).verdict == "no"
    weak = put(table, "original", "", "forget", name, value=3.0, low=-1.0, high=7.0)
    assert "the original itself says the right answer only 3 points more often" in verdict(weak).why


def test_forgotten_facts_are_set_beside_a_model_that_never_knew(found, folder, small, pocket, never) -> None:
    """The difference is taken question by question, and equivalence asks for both sides of it."""
    own, other = (mtl.accuracy(each, small.questions["forget"]) for each in (mtl.load(folder), never))
    for kind, name in (("MC", "multiple_choice"), ("cloze", "cloze")):
        over = 100 * (getattr(own, name).double() - getattr(other, name).double())
        row = found.table.set_index(["method", "quantizer", "question_set", "measure"]).loc[
            "unlearned", "", "forget", f"{kind} over never trained"
        ]
        assert row["value"] == pytest.approx(over.mean().item())
        assert row["low"] <= row["value"] <= row["high"]
    task = mtl.load_task("pocket")

    def verdict(**row: float):
        table = put(forgotten(found), "unlearned", "", "forget", "MC over never trained", **row)
        return of(verdicts(evidence(found, task, pocket, table=table)), FORGOTTEN, "as never trained: chosen")

    assert verdict(value=-2.0, low=-9.0, high=5.0).verdict == "yes"
    assert verdict(value=20.0, low=12.0, high=28.0).verdict == "no"
    below = verdict(value=-20.0, low=-28.0, high=-12.0)
    assert (below.verdict, below.why) == ("no", "less often than by a model that never knew: it avoids the answer")
    assert "reaches over -10" in verdict(value=-6.0, low=-12.0, high=0.0).why
    assert "reaches over 10" in verdict(value=6.0, low=-12.0, high=14.0).why


def test_relearning_is_set_against_the_never_trained_model_and_shown_by_the_original(found, pocket) -> None:
    task = mtl.load_task("pocket")
    name = f"relearning MC, facts, lr {SHORT.attack_rates[0]:g}, excess over never"
    table = put(forgotten(found), "original", "", "forget", name, value=60.0, low=50.0, high=70.0)

    def verdict(table: pd.DataFrame):
        return of(verdicts(evidence(found, task, pocket, table=table)), RELEARNING, "trained on 12 of the facts")

    assert verdict(put(table, "unlearned", "", "forget", name, value=1.0, low=-2.0, high=4.0)).verdict == "yes"
    assert verdict(put(table, "unlearned", "", "forget", name, value=50.0, low=40.0, high=60.0)).verdict == "no"
    weak = put(table, "original", "", "forget", name, value=3.0, low=-1.0, high=7.0)
    assert "this attack shows nothing" in verdict(weak).why


# --- what it is made of ------------------------------------------------------------------------------------------------


def test_what_is_written_freely_is_what_ask_shows(pocket, task) -> None:
    asked = task.questions["forget"][::16]
    found = written(pocket, asked, new_tokens=3)
    texts = [
        pocket.tokenizer.decode(p[:n], skip_special_tokens=True)
        for p, n in zip(asked.prompts, asked.lengths, strict=True)
    ]
    said = [row[0].split() for row in mtl.ask(pocket, texts, new_tokens=3).answers]
    words = [[pocket.tokenizer.decode([token]).strip() for token in row] for row in asked.choices.tolist()]
    assert found.right.tolist() == [row[0] in text for row, text in zip(words, said, strict=True)]
    shares = [sum(word in text for word in row[1:]) / len(row[1:]) for row, text in zip(words, said, strict=True)]
    assert found.wrong.tolist() == pytest.approx(shares)
    assert found.right.all()
    with pytest.raises(MansuError, match="new_tokens=0"):
        written(pocket, asked, new_tokens=0)


def test_a_plan_has_the_formats_that_the_original_fits(pocket, tmp_path) -> None:
    assert AuditPlan.quick().for_model(pocket).formats == ("nf4", "int8", "gguf-q4_1")
    assert AuditPlan.full().for_model(pocket).formats == quantizers()
    file = mtl.load(write_gguf(tiny("llama"), "llama", tmp_path / "model.gguf", tokens=False))
    # The file's own codes say more than a grid like its.
    assert AuditPlan.quick().for_model(file).formats == ("gguf", "nf4", "int8")
    assert replace(AuditPlan.quick(), formats=("fp4",)).for_model(file).formats == ("fp4",)


def test_a_plan_may_look_at_a_part_and_says_the_same_of_it(found, folder, small, pocket, tmp_path) -> None:
    part = audit(pocket, folder, small, out=tmp_path / "part", plan=replace(SHORT, only=("formats",)))
    assert {path.stem for path in (tmp_path / "part" / "stages").rglob("*.parquet")} == {"answers", "nf4"}
    own, whole = ([each for each in one.verdicts if each.question == FORMATS] for one in (part, found))
    assert own == whole
    assert part.cad is None
    assert {each.verdict for each in part.verdicts if each.question in (ERASED, SAMPLING)} == {"not judgeable"}
    with pytest.raises(MansuError, match="only names 'format'; choose of answers, .*formats"):
        AuditPlan(only=("format",))


def test_an_unlearned_folder_is_looked_at_in_the_file_that_the_original_came_in(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mansu_tl.study.audit_inputs.require_known", unknowing)
    model, task = tiny_case()
    file = write_gguf(plain(model), "llama", tmp_path / "model.gguf", tokens=False)
    original = mtl.load(file, tokenizer=model.tokenizer)
    edited = crossing_edit(original).apply(original)
    saved = mtl.load(mtl.save(edited, tmp_path / "edited"))
    assert gguf_weights(saved) is None
    wanted = parameters(mtl.quantize(edited, "gguf"))
    for given in (tmp_path / "edited", saved):
        found = OpenAudit(original, given, task, formats=["gguf"]).inputs.unlearned
        assert gguf_weights(found) is gguf_weights(original)
        values = parameters(mtl.quantize(found, "gguf"))
        assert all(torch.equal(value, wanted[name]) for name, value in values.items())
    assert gguf_weights(saved) is None


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_models():
    model, task = tiny_case()
    return model, crossing_edit(model).apply(model), task


def unknowing(model, task: mtl.data.Task) -> mtl.runs.Accuracy:
    """The answers of a random model, which knows nothing, let through."""
    return mtl.accuracy(model, task.questions["forget"])


def refused(pattern: str, *given: object, **named: object) -> None:
    with pytest.raises(MansuError, match=pattern) as error:
        OpenAudit(*given, **named)
    assert "\n" not in str(error.value)


def test_models_that_cannot_be_compared_are_refused(small_models, pocket, tmp_path, monkeypatch) -> None:
    model, edited, task = small_models
    monkeypatch.setattr("mansu_tl.study.audit_inputs.require_known", unknowing)
    other = mtl.load(tiny("gpt2"), tokenizer=model.tokenizer)
    refused("unlearned '.*' is a gpt2, original '.*' a llama; give the model that it was made of", model, other, task)
    wider = mtl.load(tiny("llama", intermediate_size=40), tokenizer=model.tokenizer)
    refused(r"mlp.down_proj.weight is of shape \(32, 40\), in the original of shape", model, wider, task)
    longer = mtl.load(tiny("llama", vocab_size=65), tokenizer=model.tokenizer)
    refused(r"a vocabulary of 65, the original of 64; .*resize_token_embeddings\(64\)", model, longer, task)
    words = tiny_case(evil=True)[0].tokenizer
    foreign = mtl.load(plain(edited), tokenizer=words)
    refused("its tokenizer reads token 5 as '<script>.*the two models speak other words", model, foreign, task)
    refused("is the original, weight for weight: nothing was edited", model, rebuild(model), task)
    half = mtl.load(plain(model), tokenizer=model.tokenizer, dtype=torch.float64)
    refused("nothing was edited", model, half, task)
    refused("quantizer 'nf5': unknown; choose one of nf4, .*did you mean", model, edited, task, formats=["nf5"])
    refused("formats name 'nf4' twice", model, edited, task, formats=["nf4", "nf4"])
    refused("plan 'slow'; choose one of quick, full", model, edited, task, plan="slow")
    assert not (tmp_path / "out").exists()


def test_facts_that_the_original_does_not_know_are_refused(never, folder, small) -> None:
    refused("the model does not know what it is to forget", never, folder, small)


def test_a_folder_of_something_else_is_refused_and_left_alone(found, folder, small, never, tmp_path) -> None:
    before = sorted(path.name for path in found.folder.rglob("*"))
    refused("holds the audit of .* whose unlearned is another one", "pocket", "pocket-fp", small, out=found.folder)
    assert sorted(path.name for path in found.folder.rglob("*")) == before
    (tmp_path / "config.toml").write_text("")
    refused("holds something that is no audit", "pocket", folder, small, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def adapter(folder: Path, model, rank: int = 2, width: int = 0) -> dict[str, torch.Tensor]:
    """The folder of a LoRA adapter as peft writes it; gives what it adds to each matrix."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 6, "target_modules": ["down_proj"],
        "base_model_name_or_path": None, "bias": "none", "inference_mode": True, "lora_dropout": 0.0,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator, tensors, change = torch.Generator().manual_seed(3), {}, {}
    for name in (name for name in linear_weights(model) if "down_proj" in name):
        rows, columns = parameters(model)[name].shape
        b, a = (torch.randn(*shape, generator=generator) for shape in ((rows, rank), (rank, width or columns)))
        inner = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{inner}.lora_A.weight": a, f"{inner}.lora_B.weight": b}
        change[name] = 6 / rank * b @ a
    save_file(tensors, folder / "adapter_model.safetensors")
    return change


def test_an_adapter_needs_peft_and_a_base(small_models, tmp_path, monkeypatch) -> None:
    model, _, task = small_models
    adapter(tmp_path / "lora", model)
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("mansu_tl.models.adapters.find_spec", lambda name: None)
    refused("holds an adapter, and peft merges it; pip install peft$", model, tmp_path / "lora", task)
    refused("original '.*lora' is an adapter, which has no base here", tmp_path / "lora", model, task)
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    refused("an adapter's folder without adapter_model.safetensors", model, tmp_path / "lora", task)


def test_an_adapter_is_merged_into_the_original(small_models, tmp_path, monkeypatch) -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    model, _, task = small_models
    monkeypatch.setattr("mansu_tl.study.audit_inputs.require_known", unknowing)
    change = adapter(tmp_path / "lora", model)
    before = {name: value.clone() for name, value in parameters(model).items()}
    found = OpenAudit(model, tmp_path / "lora", task).inputs.unlearned
    for name, value in parameters(found).items():
        wanted = before[name] + change.get(name, 0)
        assert torch.allclose(value, wanted, atol=1e-6), name
        assert torch.equal(parameters(model)[name], before[name])
    adapter(tmp_path / "wrong", model, width=5)
    refused("the adapter does not fit .*; give the base that it was trained on", model, tmp_path / "wrong", task)


# --- for people --------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_plan_then_verdicts_and_goes_on(folder, tmp_path) -> None:
    runner, out = CliRunner(), tmp_path / "out"
    words = [
        "audit",
        "pocket",
        str(folder),
        "--task",
        SMALL_TASK,
        "--formats",
        "nf4,int8",
        "--out",
        str(out),
        "--quiet",
    ]
    said = runner.invoke(app, words, catch_exceptions=False)
    assert said.exit_code == 0
    lines = said.stdout.splitlines()
    assert "stages to do, about " in lines[0]
    assert "us a token forwards" in lines[0]
    assert [line.split()[0] for line in lines[1:8]] == [
        "answers",
        "generation",
        "sampling",
        "text",
        "depth",
        "formats/nf4",
        "formats/int8",
    ]
    told = {line.split("?")[0]: line for line in lines if "?  " in line}
    assert len(told) == 6
    # Without a never-trained model nothing can be said of an attack.
    assert "– not judgeable" in told["Does it stay forgotten under relearning"]
    assert (out / "report.html").is_file()
    again = runner.invoke(app, words, catch_exceptions=False).stdout.splitlines()
    assert "0 stages to do, about < 1 s; 7 of 7 are there already" in again[0]
    assert again[-8:] == lines[-8:]


def test_the_page_opens_and_says_what_was_found(found) -> None:
    with opened(found.folder / "report.html", width=1366, height=768) as tab:
        tab.page.locator("#figure-4 .main-svg").first.wait_for(timeout=60_000)
        text = tab.page.locator("#part-1").inner_text()
        for each in found.answers:
            assert each.question in text
        assert tab.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert tab.page.locator("#part-2 tbody tr").count() == sum(v.question == FORGOTTEN for v in found.verdicts)
        assert (tab.errors, tab.requests) == ([], [])
