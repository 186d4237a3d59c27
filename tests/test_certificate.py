"""The certificate on saved models: a floor edit passes, every kind of tampering fails and is named."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mansu_tl.errors import MansuError
from mansu_tl.models import linear_weights, load, orient, parameters, rebuild, save
from mansu_tl.quantization import quantizer
from mansu_tl.verification.certificate import Certificate, _answer, certify, certify_in_fresh_process
from tests.tiny import tiny

MATRIX = "model.layers.1.mlp.up_proj.weight"


def floor_edit(bridge, name: str, share: float = 0.05) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """New values, and the flat indices of the weights that moved to the next code."""
    generator = torch.Generator().manual_seed(0)
    grid, values, indices = quantizer(name), {}, {}
    for key, linear in linear_weights(bridge).items():
        w = orient(parameters(bridge)[key].detach(), linear)
        encoded = grid.encode(w)
        chosen = (torch.rand(w.shape, generator=generator) < share) & ~grid.absmax_mask(w)
        wish = grid.neighbour(encoded.codes, torch.randn(w.shape, generator=generator))
        target = torch.where(chosen, wish, encoded.codes)
        values[key] = orient(grid.floor_target(w, target, encoded.absmax), linear).contiguous()
        indices[key] = orient(target != encoded.codes, linear).reshape(-1).nonzero().squeeze(1)
    return values, indices


def saved_pair(folder: Path, family: str, dtype: torch.dtype, name: str):
    """Two saved models, before and after a floor edit, and the edit's indices."""
    bridge = load(tiny(family), dtype=dtype)
    values, indices = floor_edit(bridge, name)
    return save(bridge, folder / "before"), save(rebuild(bridge, values), folder / "after"), indices


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved_pair(tmp_path_factory.mktemp("llama"), "llama", torch.float32, "nf4")


@pytest.fixture
def tampered(llama, tmp_path):
    """A function that copies the edited folder and lets a change loose on its tensors."""
    before, after, indices = llama

    def make(change) -> tuple[Path, Path, dict[str, torch.Tensor]]:
        copy = tmp_path / "tampered"
        shutil.copytree(after, copy)
        tensors = load_file(copy / "model.safetensors")
        change(tensors)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return before, copy, indices

    return make


CASES = [
    *[("nf4", family, dtype) for family in ("llama", "gpt2", "gpt_neox") for dtype in (torch.float32, torch.bfloat16)],
    ("nf4-128", "gpt2", torch.bfloat16),
    ("fp4", "llama", torch.float32),
    ("fp4", "gpt2", torch.bfloat16),
    ("int8", "gpt2", torch.float32),
    ("int8", "llama", torch.bfloat16),
]


@pytest.mark.parametrize(("name", "family", "dtype"), CASES)
def test_floor_edit_passes(tmp_path, family, dtype, name):
    before, after, indices = saved_pair(tmp_path, family, dtype, name)
    result = certify(before, after, indices, name)
    assert result.faults == ()
    assert result.passed
    bridge = load(before)
    total = sum(value.numel() for value in parameters(bridge).values())
    linear = sum(parameters(bridge)[key].numel() for key in linear_weights(bridge))
    edited = sum(len(index) for index in indices.values())
    assert (result.n_parameters, result.n_linear, result.n_edited) == (total, linear, edited)
    assert result.edited_share_of_linear == pytest.approx(edited / linear)
    assert result.edited_share_of_all == pytest.approx(edited / total)
    assert (result.edited_codes_changed_share, result.unedited_codes_changed, result.absmax_changed) == (1.0, 0, 0)
    assert result.dtype == str(dtype).removeprefix("torch.")
    assert result.block_size == {"nf4": 64, "nf4-128": 128, "fp4": 64, "int8": 0}[name]
    frame = result.to_dataframe()
    assert frame.parameter.tolist() == list(linear_weights(bridge))
    assert dict(zip(frame.parameter, frame.edited, strict=True)) == {k: len(v) for k, v in indices.items()}
    # Without the indices, what differs on disk is the edit.
    assert certify(before, after, None, name).rows == result.rows


def test_certificate_speaks_of_its_own_quantizer_only(llama):
    before, after, indices = llama
    fp4 = certify(before, after, indices, "fp4")
    assert not fp4.passed
    assert fp4.edited_codes_changed_share < 1
    assert "edited weights keep their code" in fp4.faults[0]


def test_two_zeros_of_fp4_are_one_code(tmp_path):
    bridge = load(tiny("llama"))
    values = [parameters(bridge)[MATRIX].detach().clone() for _ in range(2)]
    index = int((values[0].abs().view(-1) < 0.2 * values[0].abs().max()).nonzero()[0])
    for value, small in zip(values, (-1e-5, 1e-5), strict=True):
        value.view(-1)[index] = small
    folders = [save(rebuild(bridge, {MATRIX: value}), tmp_path / str(i)) for i, value in enumerate(values)]
    result = certify(*folders, {MATRIX: torch.tensor([index])}, "fp4")
    assert result.faults == (f"{MATRIX}: 1 of 1 edited weights keep their code",)
    assert certify(*folders, {MATRIX: torch.tensor([index])}, "nf4").edited_codes_changed_share == 0


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_a_turned_sign_is_another_code(llama, tmp_path, name):
    tensors = load_file(llama[0] / "model.safetensors")
    shutil.copytree(llama[0], tmp_path / "turned")
    index = unedited(llama[2], tensors)
    tensors[MATRIX].view(-1)[index] *= -1
    save_file(tensors, tmp_path / "turned" / "model.safetensors", metadata={"format": "pt"})
    assert certify(llama[0], tmp_path / "turned", {MATRIX: torch.tensor([index])}, name).passed


def test_fresh_process_says_the_same(llama):
    before, after, indices = llama
    assert certify_in_fresh_process(before, after, indices) == certify(before, after, indices)


def test_fresh_process_hands_refusals_on(llama, tmp_path, monkeypatch):
    def here(command, **_):  # in this process, to save its start
        _answer(*command[3:])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("mansu_tl.verification.certificate.subprocess.run", here)
    with pytest.raises(MansuError, match=r"nowhere: no config.json there"):
        certify_in_fresh_process(llama[0], tmp_path / "nowhere", llama[2])
    monkeypatch.setattr(
        "mansu_tl.verification.certificate.subprocess.run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, "", "killed"),
    )
    with pytest.raises(RuntimeError, match=r"died with status 1: killed"):
        certify_in_fresh_process(*llama)


def test_gpt2_indices_are_those_of_the_stored_matrix(tmp_path):
    before, after, indices = saved_pair(tmp_path, "gpt2", torch.float32, "nf4")
    name = "transformer.h.0.mlp.c_fc.weight"
    old, new = (load_file(folder / "model.safetensors")[name].reshape(-1) for folder in (before, after))
    assert torch.equal((old != new).nonzero().squeeze(1), indices[name])
    nx, nf = 32, 48
    transposed = {**indices, name: indices[name] % nf * nx + indices[name] // nf}
    assert not certify(before, after, transposed).passed


# --- tampering ---------------------------------------------------------------------------------------------------


def unedited(indices: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> int:
    """A flat index outside the edit and not its block's absmax."""
    free = torch.ones(tensors[MATRIX].numel(), dtype=torch.bool)
    free[indices[MATRIX]] = False
    free &= ~quantizer("nf4").absmax_mask(tensors[MATRIX]).reshape(-1)
    return int(free.nonzero()[5])


def test_one_weight_nudged_within_its_bin_is_seen(llama, tampered):
    def nudge(tensors):
        flat = tensors[MATRIX].view(-1)
        index = unedited(llama[2], tensors)
        flat[index] = torch.nextafter(flat[index], torch.tensor(0.0))

    result = certify(*tampered(nudge))
    assert not result.passed
    assert result.faults == (f"{MATRIX}: 1 weights outside the edit changed their value",)
    assert result.unedited_codes_changed == 0


def test_one_weight_moved_to_another_code_is_seen(llama, tampered):
    def move(tensors):
        flat = tensors[MATRIX].view(-1)
        index = unedited(llama[2], tensors)
        flat[index] = -flat[index]

    result = certify(*tampered(move))
    assert result.unedited_codes_changed == 1
    assert f"{MATRIX}: 1 weights outside the edit changed their code" in result.faults


def test_one_edited_weight_put_back_is_seen(llama, tampered):
    old = load_file(llama[0] / "model.safetensors")[MATRIX].view(-1)

    def put_back(tensors):
        index = llama[2][MATRIX][3]
        tensors[MATRIX].view(-1)[index] = old[index]

    result = certify(*tampered(put_back))
    assert result.faults == (f"{MATRIX}: 1 of {len(llama[2][MATRIX])} edited weights keep their code",)
    assert 0.9 < result.edited_codes_changed_share < 1


def test_one_block_scale_that_moved_is_seen(llama, tampered):
    index = llama[2][MATRIX][0]

    def scale(tensors):
        tensors[MATRIX].view(-1)[index] = 1.5 * tensors[MATRIX].abs().max()

    result = certify(*tampered(scale))
    assert result.absmax_changed == 1
    assert f"{MATRIX}: 1 of 24 block scales changed" in result.faults


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_other_parameters_have_to_be_identical(tampered, name):
    def change(tensors):
        tensors[name].view(-1)[-1] *= 1.0001

    result = certify(*tampered(change))
    assert result.others_changed == (name,)
    assert result.faults == (f"{name}: changed or named by the edit, but not quantized",)


def test_minus_zero_is_not_zero(tmp_path):
    bridge = load(tiny("llama"))
    name = "model.norm.weight"
    plus, minus = (torch.zeros_like(parameters(bridge)[name]) * sign for sign in (1, -1))
    folders = [save(rebuild(bridge, {name: value}), tmp_path / str(i)) for i, value in enumerate((plus, minus))]
    assert certify(*folders).others_changed == (name,)


def test_extra_missing_and_misshapen_tensors_are_named(tampered):
    def change(tensors):
        tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2, 2)
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(16, 16)
        tensors[MATRIX] = tensors[MATRIX].half()

    before, copy, indices = tampered(change)
    faults = certify(before, copy, indices).faults
    assert f"model.layers.0.self_attn.q_proj.weight: missing in {copy}" in faults
    assert f"model.layers.0.mlp.extra.weight: not a parameter of this model, but in {copy}" in faults
    assert f"model.layers.0.self_attn.k_proj.weight: shape (16, 16) in {copy}, the config says (16, 32)" in faults
    assert f"{MATRIX}: float32 (48, 32) became float16 (48, 32)" in faults
    # Both wrong in the same way: still no pass, and no crash.
    faults = certify(copy, copy, {}).faults
    assert f"model.layers.0.self_attn.k_proj.weight: shape (16, 16) in {copy}, the config says (16, 32)" in faults


def test_config_and_adapter_are_part_of_the_model(tampered):
    before, copy, indices = tampered(lambda tensors: None)
    assert certify(before, copy, indices).passed
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1, "transformers_version": "0"}))
    (copy / "adapter_config.json").write_text("{}")
    faults = certify(before, copy, indices).faults
    assert faults == (
        f"adapter_config.json: {copy} holds an adapter, which transformers would load on top",
        "config.json: rms_norm_eps differs",
    )


def test_tied_copy_that_differs_is_seen(tmp_path):
    before, after, indices = saved_pair(tmp_path, "gpt2", torch.float32, "nf4")
    tensors = load_file(after / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    save_file(tensors, after / "model.safetensors", metadata={"format": "pt"})
    fault = f"lm_head.weight: tied to transformer.wte.weight by the config, but differs in {after}"
    assert certify(before, after, indices).faults == (fault,)


def test_sharded_and_bare_checkpoints_are_read(tmp_path):
    before, after, indices = saved_pair(tmp_path, "gpt2", torch.float32, "nf4")
    expected = certify(before, after, indices)
    # As on the hub: keys of the bare model, and a buffer that transformers ignores.
    tensors = load_file(before / "model.safetensors")
    bare = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    save_file({**bare, "h.0.attn.bias": torch.ones(1)}, before / "model.safetensors", metadata={"format": "pt"})
    tensors = load_file(after / "model.safetensors")
    names = sorted(tensors)
    where = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i}.safetensors"
        save_file({name: tensors[name] for name in part}, after / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (after / "model.safetensors").unlink()
    (after / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    result = certify(before, after, indices)
    assert result.faults == ()
    assert result.rows == expected.rows
    (after / "model-1.safetensors").unlink()
    with pytest.raises(MansuError, match=r"model-1.safetensors: named in model.safetensors.index.json but not there"):
        certify(before, after, indices)


def test_an_edit_of_nothing_is_no_pass(llama):
    before, after, _ = llama
    assert certify(before, before).faults == ("edit: it names no weight of a quantized matrix",)
    assert not certify(before, after, {}).passed


def test_unreadable_folders_are_refused(llama, tampered, tmp_path):
    before, copy, indices = tampered(lambda tensors: None)
    with pytest.raises(MansuError, match=r"nowhere: no config.json there"):
        certify(before, tmp_path / "nowhere", indices)
    whole = (copy / "model.safetensors").read_bytes()
    for size in (len(whole) - 100, 20, 0):
        (copy / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(MansuError, match=r"model.safetensors: cannot be read"):
            certify(before, copy, indices)
    (copy / "model.safetensors").unlink()
    with pytest.raises(MansuError, match=r"no model.safetensors there"):
        certify(before, copy, indices)
    (copy / "config.json").write_text("{")
    with pytest.raises(MansuError, match=r"config.json cannot be read"):
        certify(before, copy, indices)


def test_indices_that_do_not_fit_are_refused(llama):
    before, after, indices = llama
    with pytest.raises(MansuError, match=r"no such parameter"):
        certify(before, after, {"model.layers.9.mlp.up_proj.weight": torch.tensor([0])})
    with pytest.raises(MansuError, match=r"index 1536 is outside its 1536 weights"):
        certify(before, after, {MATRIX: torch.tensor([0, 1536])})
    with pytest.raises(MansuError, match=r"index -1 is outside its 1536 weights"):
        certify(before, after, {MATRIX: torch.tensor([-1, 3])})
    with pytest.raises(MansuError, match=r"'int4-g64': no library here to certify it; choose one of nf4"):
        certify(before, after, indices, "int4-g64")
    named = certify(before, after, {**indices, "model.norm.weight": torch.tensor([0])})
    assert named.others_changed == ("model.norm.weight",)


# --- on disk -----------------------------------------------------------------------------------------------------


def test_round_trip(llama, tampered, tmp_path):
    before, after, indices = llama
    passing = certify(before, after, indices)
    failing = certify(*tampered(lambda tensors: tensors["model.norm.weight"].add_(1)))
    for name, result in (("passing", passing), ("failing", failing)):
        path = result.save(tmp_path / f"{name}.json")
        assert Certificate.load(path) == result
        assert json.loads(path.read_text())["passed"] is (name == "passing")
    assert passing.original_digest == failing.original_digest
    assert passing.edited_digest != failing.edited_digest
    assert "passed" in repr(passing)
    assert "FAILED" in failing._repr_html_()
    assert "model.norm.weight" in failing._repr_html_()


def test_altered_certificates_are_refused(llama, tampered, tmp_path):
    path = certify(*tampered(lambda tensors: tensors["model.norm.weight"].add_(1))).save(tmp_path / "c.json")
    record = json.loads(path.read_text())
    for change in ({"passed": True}, {"faults": [], "passed": True}):
        path.write_text(json.dumps({**record, **change}))
        with pytest.raises(MansuError, match=r"verdict does not follow from its numbers"):
            Certificate.load(path)
    path.write_text(json.dumps({**record, "fields": {**record["fields"], "others_changed": []}}))
    with pytest.raises(MansuError, match=r"numbers are not those that were saved"):
        Certificate.load(path)
    for text in (
        "",
        "[]",
        "{}",
        '{"mansu_tl": "Certificate", "format": "1"}',
        '{"mansu_tl": "Certificate", "format": "2"}',
        json.dumps({**record, "mansu_tl": "Edit"}),
    ):
        path.write_text(text)
        with pytest.raises(MansuError, match=r"[Cc]ertificate"):
            Certificate.load(path)
    with pytest.raises(MansuError, match=r"no such file"):
        Certificate.load(tmp_path / "none.json")


def test_html_shows_names_as_text(tampered):
    result = certify(*tampered(lambda tensors: tensors.update({"<script>": torch.zeros(1)})))
    assert "<script>" not in result._repr_html_()
    assert "&lt;script&gt;" in result._repr_html_()
