"""The certificate on what lies on disk: every storage dtype, ties, absmax elements, double quantization, tampering."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from mansu_tl.errors import MansuError
from mansu_tl.models import linear_weights, load, orient, parameters, rebuild, save
from mansu_tl.quantization import quantizer
from mansu_tl.verification.certificate import Certificate, certify, certify_in_fresh_process
from tests.tiny import tiny

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MATRIX = "model.layers.1.mlp.up_proj.weight"  # 48 x 32: 24 blocks of 64
OTHER = "model.layers.0.self_attn.k_proj.weight"


def codes(w: torch.Tensor, kind: str = "nf4") -> torch.Tensor:
    """bitsandbytes' codes, flat."""
    packed, _ = bnb.quantize_4bit(w.contiguous(), blocksize=64, quant_type=kind, compress_statistics=False)
    packed = packed.reshape(-1)
    return torch.stack([packed >> 4, packed & 15], 1).reshape(-1)


def bounds() -> torch.Tensor:
    """The midpoints of bitsandbytes' own NF4 table."""
    table = bnb.get_4bit_type("nf4", device="cpu")
    return (table[:-1] + table[1:]) / 2


def just_below(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The largest numbers of the dtype that are not above the values."""
    near = values.to(dtype)
    return torch.where(near.float() > values, torch.nextafter(near, torch.full_like(near, -torch.inf)), near)


def written(folder: Path, values: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32, family="llama") -> Path:
    """The tiny model with some matrices replaced, on disk."""
    return save(rebuild(load(tiny(family), dtype=dtype), values), folder)


def matrix(dtype: torch.dtype) -> torch.Tensor:
    return parameters(load(tiny("llama"), dtype=dtype))[MATRIX].detach().clone()


def flat(*indices: int) -> dict[str, torch.Tensor]:
    return {MATRIX: torch.tensor(indices)}


# --- ties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_on_a_boundary_in_a_fresh_process(tmp_path, dtype):
    """A tie has the lower code: the next number up is another one, the next number down is not."""
    base = matrix(dtype)
    at = just_below(bounds(), dtype)
    if dtype is torch.float32:
        assert torch.equal(at, bounds())  # exact ties, at a scale of 1
    base.view(-1)[:64] = 0
    base.view(-1)[:15], base.view(-1)[63] = at, 1.0
    assert codes(base)[:15].tolist() == list(range(15))
    up, down = base.clone(), base.clone()
    up.view(-1)[:15] = torch.nextafter(at, torch.full_like(at, torch.inf))
    down.view(-1)[:15] = torch.nextafter(at, torch.full_like(at, -torch.inf))
    before = written(tmp_path / "before", {MATRIX: base}, dtype)
    # A fresh process takes ten seconds to start; one dtype is enough for it.
    judge = certify_in_fresh_process if dtype is torch.float16 else certify
    risen = judge(before, written(tmp_path / "up", {MATRIX: up}, dtype), flat(*range(15)))
    assert risen.faults == ()
    assert risen.dtype == str(dtype).removeprefix("torch.")
    assert (risen.n_edited, risen.edited_codes_changed_share, risen.absmax_changed) == (15, 1.0, 0)
    fallen = certify(before, written(tmp_path / "down", {MATRIX: down}, dtype), flat(*range(15)))
    assert fallen.faults == (f"{MATRIX}: 15 of 15 edited weights keep their code",)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_absmax_elements_and_their_ties(tmp_path, dtype):
    base = matrix(dtype)
    top = base.view(-1)[:64].abs().max() * 2
    base.view(-1)[3], base.view(-1)[40] = top, -top  # a tie: the block keeps its scale if one of them goes
    base.view(-1)[64 + 5] = top  # alone in its block
    before = written(tmp_path / "before", {MATRIX: base}, dtype)

    def edited(name: str, index: int, value: torch.Tensor | float) -> Certificate:
        new = base.clone()
        new.view(-1)[index] = value
        return certify(before, written(tmp_path / name, {MATRIX: new}, dtype), flat(index))

    assert edited("one of two", 3, 0.0).passed
    assert edited("turned", 64 + 5, -top).passed  # the scale is its magnitude
    alone = edited("alone", 64 + 5, 0.0)
    assert not alone.passed
    assert alone.absmax_changed == 1
    assert f"{MATRIX}: 1 of 24 block scales changed" in alone.faults
    assert alone.unedited_codes_changed > 0  # the others of its block are read on another scale
    assert alone.edited_codes_changed_share == 1
    beyond = edited("beyond", 0, 3 * top)
    assert beyond.absmax_changed == 1
    assert not beyond.passed


# --- every dtype, double quantization ----------------------------------------------------------------------------


def floored(bridge, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A twentieth of all weights put across a boundary, and which."""
    generator = torch.Generator().manual_seed(0)
    grid, values, indices = quantizer(name), {}, {}
    for key, linear in linear_weights(bridge).items():
        w = orient(parameters(bridge)[key].detach(), linear)
        encoded = grid.encode(w)
        chosen = (torch.rand(w.shape, generator=generator) < 0.05) & ~grid.absmax_mask(w)
        wish = grid.neighbour(encoded.codes, torch.randn(w.shape, generator=generator))
        target = torch.where(chosen, wish, encoded.codes)
        values[key] = orient(grid.floor_target(w, target, encoded.absmax), linear).contiguous()
        indices[key] = orient(target != encoded.codes, linear).reshape(-1).nonzero().squeeze(1)
    return values, indices


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_floor_edit_holds_with_and_without_double_quantization(tmp_path, dtype, family):
    bridge = load(tiny(family), dtype=dtype)
    values, indices = floored(bridge, "nf4")
    before, after = save(bridge, tmp_path / "before"), save(rebuild(bridge, values), tmp_path / "after")
    plain, double = (certify(before, after, indices, name) for name in ("nf4", "nf4-dq"))
    assert plain.passed
    assert double.passed
    assert double.rows == plain.rows
    assert double.quantizer == "nf4-dq"
    assert all(double.claims.values())


def test_a_double_quantized_scale_moves_where_no_absmax_of_its_block_does(tmp_path):
    """The mean absmax of the matrix is subtracted first, so one absmax that moves moves the scales of other blocks."""
    base = matrix(torch.float32)
    index = int(base.view(-1)[:64].abs().argmax())
    new = base.clone()
    new.view(-1)[index] *= 1.5
    folders = [written(tmp_path / name, {MATRIX: w}) for name, w in (("before", base), ("after", new))]
    plain, double = (certify(*folders, flat(index), name) for name in ("nf4", "nf4-dq"))
    assert plain.absmax_changed == 1
    assert double.absmax_changed > 12
    # Beside bitsandbytes' own decoding: some weights of blocks whose absmax is held take another value.
    packed = [bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True) for w in (base, new)]
    first, second = (bnb.dequantize_4bit(*each).view(-1, 64) for each in packed)
    moved = (first != second).any(1)
    assert int(moved[1:].sum()) > 12
    assert int(moved.sum()) == double.absmax_changed


def test_dtypes_that_the_library_refuses_are_named(tmp_path):
    # float64 cannot be saved by the package's own road, so by hand.
    before = save(load(tiny("llama")), tmp_path / "before")
    tensors = load_file(before / "model.safetensors")
    save_file({k: v.double() for k, v in tensors.items()}, before / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MansuError, match=r"bitsandbytes does not quantize torch.float64; save the model in float32"):
        certify(before, before)


# --- tampering ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Before and after a floor edit, as bfloat16, and the edit's indices."""
    folder = tmp_path_factory.mktemp("pair")
    bridge = load(tiny("llama"), dtype=torch.bfloat16)
    values, indices = floored(bridge, "nf4")
    return save(bridge, folder / "before"), save(rebuild(bridge, values), folder / "after"), indices


@pytest.fixture
def copied(pair, tmp_path):
    return Path(shutil.copytree(pair[1], tmp_path / "copy"))


def test_any_byte_of_any_tensor_counts(pair, copied):
    before, _, indices = pair
    file = copied / "model.safetensors"
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for offset in torch.randint(start, len(whole), (24,), generator=generator).tolist():
        changed = bytearray(whole)
        changed[offset] ^= 1 << int(torch.randint(8, (), generator=generator))
        file.write_bytes(changed)
        result = certify(before, copied, indices)
        assert not result.passed, offset
        assert len(result.faults) >= 1
    file.write_bytes(whole)
    assert certify(before, copied, indices).passed


def test_one_weight_of_another_matrix_is_named(pair, copied):
    before, _, indices = pair
    tensors = load_file(copied / "model.safetensors")
    edited = set(indices[OTHER].tolist())
    carriers = quantizer("nf4").absmax_mask(tensors[OTHER]).view(-1)
    free = next(i for i in range(tensors[OTHER].numel()) if i not in edited and not carriers[i])
    tensors[OTHER].view(-1)[free] *= -1
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    result = certify_in_fresh_process(before, copied, indices)
    assert result.faults == (
        f"{OTHER}: 1 weights outside the edit changed their value",
        f"{OTHER}: 1 weights outside the edit changed their code",
    )
    claims = list(result.claims.values())
    assert claims == [True, False, False, True, True, True]


def test_swapped_files_fail(pair, copied, tmp_path):
    before, after, indices = pair
    shutil.copy(before / "model.safetensors", copied)  # the original passed off as the edited model
    result = certify(before, copied, indices)
    assert result.edited_codes_changed_share == 0
    assert len(result.faults) == sum(len(index) > 0 for index in indices.values())
    save(load(tiny("llama", seed=1), dtype=torch.bfloat16), tmp_path / "stranger")  # another model of the same shape
    shutil.copy(tmp_path / "stranger" / "model.safetensors", copied)
    result = certify(before, copied, indices)
    assert any("weights outside the edit changed their value" in fault for fault in result.faults)
    assert any(fault.startswith("model.embed_tokens.weight: changed") for fault in result.faults)
    assert not certify(after, before, {name: index[:0] for name, index in indices.items()}).passed


def sharded(folder: Path) -> dict[str, str]:
    """Two shards instead of one file; which tensor is in which."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    write_index(folder, where)
    return where


def write_index(folder: Path, where: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_shards_that_are_missing_swapped_or_doubled(pair, copied):
    before, _, indices = pair
    where = sharded(copied)
    assert certify(before, copied, indices).passed
    first, second = copied / "model-0.safetensors", copied / "model-1.safetensors"

    second.rename(copied / "aside")
    with pytest.raises(MansuError, match=r"model-1.safetensors: named in model.safetensors.index.json but not there"):
        certify(before, copied, indices)
    with pytest.raises(MansuError, match=r"model-1.safetensors: named in"):
        certify_in_fresh_process(before, copied, indices)

    first.rename(second)
    (copied / "aside").rename(first)
    faults = certify(before, copied, indices).faults
    assert len(faults) == len(where)
    assert f"{MATRIX}: in {where[MATRIX]} by the index of {copied}, but stored in " in "\n".join(faults)

    swapped = {name: {"model-0.safetensors": second.name}.get(file, first.name) for name, file in where.items()}
    write_index(copied, {name: file for name, file in swapped.items() if name != MATRIX})
    assert certify(before, copied, indices).faults == (
        f"{MATRIX}: stored in {swapped[MATRIX]}, but the index of {copied} does not name it",
    )
    write_index(copied, swapped)
    assert certify(before, copied, indices).passed

    for file in (first, second):
        tensors = load_file(file)
        if MATRIX not in tensors:
            save_file({**tensors, MATRIX: torch.zeros(48, 32)}, file, metadata={"format": "pt"})
    faults = certify(before, copied, indices).faults
    assert any(
        f.startswith(f"{MATRIX}: stored more than once in {copied} (model-0.safetensors, model-1") for f in faults
    )

    write_index(copied, {name: "../" + file for name, file in swapped.items()})
    with pytest.raises(MansuError, match=r"names '\.\./model-0.safetensors', which is no file in this folder"):
        certify(before, copied, indices)


# --- what it claims ----------------------------------------------------------------------------------------------


def test_claims_are_said_kept_and_checked(pair, tmp_path):
    before, after, indices = pair
    result = certify(before, after, indices)
    edited = sum(len(index) for index in indices.values())
    assert next(iter(result.claims)) == f"each of the {edited} edited weights has another code under nf4 (blocks of 64)"
    assert all(result.claims.values())
    row = certify(before, after, indices, "int8")
    assert "under int8 (one scale a row)" in next(iter(row.claims))
    assert not all(row.claims.values())  # an edit made for nf4
    assert all(claim.split()[0] in result._repr_html_() for claim in result.claims)
    assert not next(iter(certify(before, before).claims.values()))  # nothing edited, nothing claimed

    path = result.save(tmp_path / "certificate.json")
    record = json.loads(path.read_text())
    assert record["claims"] == dict(result.claims)
    assert Certificate.load(path) == result
    for claims in ({"everything is forgotten": True}, None):
        path.write_text(json.dumps({**record, "claims": claims}))
        with pytest.raises(MansuError, match=r"its verdict does not follow from its numbers"):
            Certificate.load(path)


def test_a_folder_is_held_against_the_certificate(pair, copied):
    before, after, indices = pair
    result = certify(before, after, indices)
    result.require_unchanged(original=before, edited=copied)
    file = copied / "model.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    result.require_unchanged(original=before)
    with pytest.raises(MansuError, match=r"copy: not the edited model that was certified \(SHA-256 [0-9a-f]{12}\.\.\."):
        result.require_unchanged(edited=copied)
    with pytest.raises(MansuError, match=r"not the original model that was certified"):
        result.require_unchanged(original=after)
