"""What a user gets wrong: one clear line, nothing lost. What an interrupted run leaves behind: nothing half-written."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint, linear_weights, parameters, rebuild
from mansu_tl.quantization import quantize
from mansu_tl.quantization.dither import dither
from mansu_tl.quantization.formats.hqq import hqq
from mansu_tl.quantization.formats.torchao import torchao
from mansu_tl.results import files
from mansu_tl.results.store import Store
from mansu_tl.unlearning import Edit, MansuSettings, unlearn
from mansu_tl.unlearning.mansu.plan import mansu_needs
from mansu_tl.verification import certify
from tests.tiny import sliced_task, tiny

QUICK = {
    "steps": 12,
    "learning_rate": 0.5,
    "fisher_sequences": 4,
    "adversary_weight": 0.0,
    "representation_weight": 0.0,
}


@pytest.fixture(scope="module")
def task():
    return sliced_task(24, retain=48)


@pytest.fixture(scope="module")
def circuit(model, task) -> Circuit:
    return mtl.discover_circuit(model, task.forget_pairs, faithfulness=0.5, steps=2)


def refused(message: str):
    """A MansuError that is one line and says this."""
    return pytest.raises(MansuError, match=rf"^(?=[^\n]*\Z).*{message}")


# --- a quantizer that the shapes cannot take ---------------------------------------------------------------------


def test_a_group_size_that_no_row_fits_is_named_with_the_row():
    narrow = mtl.load(tiny("llama", hidden_size=40, head_dim=10, intermediate_size=41))
    with refused(r"torchao-int4-g64: rows of 40 are no multiple of the group size 64; choose another quantizer"):
        quantize(narrow, torchao())
    with refused(r"hqq-int4-g64: a matrix of \(20, 41\) is no multiple of the group size 64; choose another"):
        hqq().roundtrip(torch.ones(20, 41))


def test_a_block_size_that_bitsandbytes_cannot_decode_is_refused_on_loading():
    with refused(r"q_proj.weight has rows of 40, no multiple of the block size 64; .*use the dense model or its twin"):
        mtl.load(tiny("llama", hidden_size=40, head_dim=10), quantized="nf4")


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4-g128", "int4-asym-g64", "gptq-int4-g64", "awq-int4-g64"])
def test_every_shape_is_taken_by_the_quantizers_of_the_package(name):
    """Blocks cross rows and the last one is shorter, where a library would refuse."""
    narrow = mtl.load(tiny("llama", hidden_size=40, head_dim=10, intermediate_size=41))
    text = mtl.data.Sequences(
        torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(0)), torch.full((8,), 12)
    )
    twin = quantize(narrow, name, text)
    assert all(torch.isfinite(value).all() for value in parameters(twin).values())


def test_quantizers_without_cells_have_no_floor(model, task, circuit):
    with refused(r"'gptq-int4-g64': a weight's code there depends on other weights.*choose one of nf4"):
        unlearn(model, task, circuit=circuit, quantizer="gptq-int4-g64", **QUICK)
    with refused(r"quantizer '': unknown; choose one of"):
        unlearn(model, task, circuit=circuit, quantizer="nf4+", **QUICK)


# --- budgets, null spaces and circuits that leave nothing --------------------------------------------------------


def test_a_retain_set_too_small_for_its_null_space(model, task, circuit):
    few = dataclasses.replace(task, retain_text=task.retain_text[slice(0, 3)])
    for options in ({}, {"projector": True, "null_space": 0.0}):
        with refused(
            r"retain text: 30 tokens, fewer than the 320 inputs of the widest matrix.*give at least 320 tokens"
        ):
            unlearn(model, few, circuit=circuit, **options, **QUICK)
    off = unlearn(model, few, circuit=circuit, null_space=0.0, projector=False, **QUICK)  # the way out it names
    assert off.n_weights > 0


def test_a_null_space_that_holds_no_direction(model, task, circuit):
    with refused(r"null space of model\.layers.*: every one of 128 input directions holds more than leak=1e-12"):
        unlearn(model, task, circuit=circuit, projector=True, leak=1e-12, **QUICK)
    with refused(r"null space: leak=0\.0; choose a share"):
        unlearn(model, task, circuit=circuit, projector=True, leak=0.0, **QUICK)


def test_an_empty_retain_set(task):
    with refused(r"task 'pocket': retain_text is empty; give text whose likelihood is to be kept"):
        dataclasses.replace(task, retain_text=task.retain_text[slice(0, 0)])


def test_a_retain_budget_that_leaves_nothing(model, task, circuit):
    with refused(r"or every one that did costs more than the budgets allow; raise .*retain_budget \(now 1e-30\)"):
        unlearn(model, task, circuit=circuit, retain_budget=1e-30, **QUICK)
    with refused(r"retain_budget=-1\.0 nats; choose 0 \(none\) or more"):
        unlearn(model, task, circuit=circuit, retain_budget=-1.0, **QUICK)


def test_an_attacker_of_no_kind_or_without_what_he_trains_on(model, task, circuit):
    for kinds in ("wieghts", "near+near", ""):
        with refused(rf"adversary_kinds='{re.escape(kinds)}'; join some of weights, adapters, near by '\+', each once"):
            unlearn(model, task, circuit=circuit, **{**QUICK, "adversary_kinds": kinds})
    bare = dataclasses.replace(task, near_text=task.near_text[slice(0, 0)])
    options = {**QUICK, "adversary_weight": 1.0, "discover_near": 0.0, "adversary_kinds": "weights+near"}
    with refused(
        r'adversary_kinds has "near", and there is no near text; give the task some, raise discover_near, or leave'
    ):
        unlearn(model, bare, circuit=circuit, **options)
    said = [what for state, what in mansu_needs(model, bare, MansuSettings(**options)) if state == "wrong"]
    assert any(what.startswith('mansu: adversary_kinds has "near"') for what in said)


@pytest.mark.parametrize("budget", [0.0, -1.0, 1e-9])
def test_a_budget_of_no_weight(model, task, circuit, budget):
    says = (
        "of 688128 weights leaves nothing to edit; raise it"
        if budget > 0
        else "; choose a share of the linear weights, above 0"
    )
    with refused(rf"budget={budget}.*{says}"):
        unlearn(model, task, circuit=circuit, budget=budget, **QUICK)


@pytest.mark.parametrize("restrict", ["circuit", "random"])
def test_a_circuit_without_an_editable_weight(model, task, circuit, restrict):
    scores = mtl.edge_attribution(model, task.forget_pairs, steps=1)
    mask = torch.zeros_like(circuit.mask)
    mask[scores.writers.index("embed"), scores.readers.index("logits")] = True
    direct = Circuit.from_mask(scores, mask, "embedding to unembedding, by hand")
    with refused(r"circuit: it has no head and no MLP, so no weight can be edited; discover a larger one"):
        unlearn(model, task, circuit=direct, restrict=restrict, **QUICK)


def test_a_circuit_whose_weights_all_carry_a_scale(model, task, circuit):
    flat = rebuild(model, {name: torch.zeros_like(parameters(model)[name]) for name in linear_weights(model)})
    with refused(r"no weight is left to edit \(all candidates carry their block's absmax\); use a larger circuit"):
        unlearn(flat, task, circuit=circuit, **QUICK)


def test_a_model_that_is_quantized_already(task, circuit):
    four_bit = mtl.load("pocket", quantized="nf4")
    for call in (lambda: unlearn(four_bit, task, circuit=circuit, **QUICK), lambda: dither(four_bit)):
        with refused(r"holds packed torch.uint8 weights, .*needs dense ones; load the dense checkpoint"):
            call()


# --- an edit for another model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edit(model) -> Edit:
    """One weight, by hand."""
    name = next(iter(linear_weights(model)))
    value = parameters(model)[name].detach().clone()
    value.view(-1)[7] *= -1
    return Edit.between(model, {name: value}, "by hand")


def test_an_edit_belongs_to_one_model_bit_for_bit(model, edit, tmp_path):
    with refused(
        r"edit: the edit was made for another model \(fingerprint [0-9a-f]{12}\.\.\., this one .*load that one"
    ):
        edit.apply(mtl.load("pocket-fp"))  # the same shapes, other weights
    name = list(linear_weights(model))[3]
    value = parameters(model)[name].detach().clone()
    value.view(-1)[0] = torch.nextafter(value.view(-1)[0], torch.tensor(1.0))
    with refused(r"made for another model"):
        edit.apply(rebuild(model, {name: value}))  # one bit of one weight
    with refused(r"made for another model"):
        edit.apply(edit.apply(model))  # twice
    with refused(r"does not hold the edit's values; revert what apply\(\) gave"):
        edit.revert(model)
    loaded = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert fingerprint(loaded.revert(loaded.apply(model))) == fingerprint(model)


def test_a_certificate_of_another_model(model, edit, tmp_path):
    before = mtl.save(mtl.load(tiny("llama")), tmp_path / "tiny")
    with refused(r"layers\.2\.self_attn.*: .*tiny has no such parameter; pass the indices of an edit of this model"):
        certify(before, before, {"model.layers.2.self_attn.q_proj.weight": torch.tensor([0])})
    after = mtl.save(model, tmp_path / "pocket")
    faults = certify(before, after, None).faults
    assert any(fault.startswith("config.json: hidden_size differs") for fault in faults)


@pytest.mark.parametrize("keep", [0, 9, 200])
def test_a_file_that_was_cut_short(edit, tmp_path, keep):
    path = edit.save(tmp_path / "edit.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with refused(r"edit.safetensors: cannot be read \(.*\); it was cut short or is no safetensors file"):
        Edit.load(path)


# --- interrupted -------------------------------------------------------------------------------------------------


class Interrupted:
    """Does what `real` does until the n-th time, and is interrupted there."""

    def __init__(self, real, at: int = 1) -> None:
        self.real, self.left = real, at

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left:
            return self.real(*args, **kwargs)
        raise KeyboardInterrupt


def half(tensors, path, metadata):
    """`save_file`, interrupted in the middle."""
    Path(path).write_bytes(b"half")
    raise KeyboardInterrupt


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("what", ["write", "chmod", "replace"])
def test_a_result_is_there_whole_or_as_it_was(edit, tmp_path, monkeypatch, what):
    path = tmp_path / "edit.safetensors"
    edit.save(path)
    before = everything(tmp_path)
    other = dataclasses.replace(edit, method="another")
    with monkeypatch.context() as patched:
        if what == "write":
            patched.setattr(files, "save_file", half)
        else:
            patched.setattr(files.os, what, Interrupted(getattr(os, what)))
        for target in (path, tmp_path / "new.safetensors"):
            with pytest.raises(KeyboardInterrupt):
                other.save(target)
            if what != "write":
                patched.setattr(files.os, what, Interrupted(getattr(os, what)))
    assert everything(tmp_path) == before
    assert Edit.load(path).method == "by hand"


def test_a_model_folder_is_there_whole_or_as_it_was(model, edit, tmp_path, monkeypatch):
    folder = mtl.save(model, tmp_path / "model")
    before = everything(tmp_path)
    edited = edit.apply(model)
    for target in (folder, tmp_path / "new"):
        with monkeypatch.context() as patched:
            real = type(edited.original_model).save_pretrained

            def half(self, where, **options):
                real(self, where, **options)  # noqa: B023 - called at once
                (Path(where) / "model.safetensors").write_bytes(b"half")
                raise KeyboardInterrupt

            patched.setattr(type(edited.original_model), "save_pretrained", half)
            with pytest.raises(KeyboardInterrupt):
                mtl.save(edited, target)
        assert everything(tmp_path) == before
    assert fingerprint(mtl.load(mtl.save(edited, folder))) == fingerprint(edited)
    assert sorted(everything(tmp_path)) == sorted(before)


@pytest.mark.parametrize(
    ("method", "inside"), [("mansu", "mansu.terms.retain_loss"), ("ga", "batches.last_token_logits")]
)
def test_an_interrupted_edit_leaves_the_model_as_it_was(model, task, circuit, monkeypatch, method, inside):
    untouched = fingerprint(model)
    where = f"mansu_tl.unlearning.{inside}"
    module, name = where.rsplit(".", 1)
    options = {"circuit": circuit, **QUICK} if method == "mansu" else {"max_steps": 4, "stop_over_chance": -100.0}
    with monkeypatch.context() as patched:
        patched.setattr(where, Interrupted(getattr(sys.modules[module], name), at=3))
        with pytest.raises(KeyboardInterrupt):
            unlearn(model, task, method, **options)
    assert fingerprint(model) == untouched
    if method == "ga":
        first, second = (unlearn(each, task, method, **options) for each in (model, mtl.load("pocket")))
        assert all(torch.equal(first.new[name], second.new[name]) for name in second.new)


def test_an_interrupted_run_continues_where_it_stopped(edit, tmp_path, monkeypatch):
    """Three stages; cut off while the second is made, while it is written, and before it is marked as done."""
    made: list[str] = []

    def stages() -> list[object]:
        run = Store(tmp_path, {"seed": 0})
        first = run.result("a/edit", Edit, {}, lambda: made.append("first") or edit)
        table = run.table("b/table", {}, lambda: made.append("second") or pd.DataFrame({"x": [1.5, 2.5]}))
        last = run.value("c/value", {}, lambda: made.append("third") or [1, 2])
        return [first.n_weights, table["x"].tolist(), last]

    def cut(at: int) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(files.os, "replace", Interrupted(os.replace, at=at))
            with pytest.raises(KeyboardInterrupt):
                stages()

    cut(3)  # the table's own move into place, after the edit's and its key's
    assert made == ["first", "second"]
    assert sorted(everything(tmp_path)) == ["a/edit.safetensors", "a/edit.safetensors.key"]
    cut(2)  # the table is there, its key is not: it does not count
    assert made == ["first", "second", "second"]
    assert sorted(everything(tmp_path))[-1] == "b/table.parquet"
    assert stages() == [1, [1.5, 2.5], [1, 2]]
    assert made == ["first", "second", "second", "second", "third"]
    whole = everything(tmp_path)
    assert stages() == [1, [1.5, 2.5], [1, 2]]
    assert made[-1] == "third"
    assert len(made) == 5
    assert everything(tmp_path) == whole
