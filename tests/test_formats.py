"""The formats that people ship: against what their libraries make of the same weights, their floors, and the list of them.

The libraries' values lie in tests/oracles/formats, with the script that made them; where one is installed whole files are
compared too.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mansu_tl as mtl
from mansu_tl.errors import MansuError
from mansu_tl.models import linear_weights, parameters
from mansu_tl.models.gguf import decode, encode, fallback, gguf_weights, q4_k_m
from mansu_tl.models.stored import dense_state, stored_formats
from mansu_tl.quantization import (
    Awq,
    Gptq,
    Inputs,
    find_grid,
    gptq,
    grid_of,
    quantized_values,
    quantizer,
    quantizer_table,
    quantizers,
)
from tests.gguf_files import write_gguf
from tests.oracles.formats import calibrated, make
from tests.tiny import tiny

ORACLE = Path(make.__file__).with_name("vectors.safetensors")
NEW_GRIDS = ("w4a16-g128", "w4a16-asym-g128", "fp8", "fp8-tensor", "nvfp4", "mxfp4-floor", "mxfp4-even", "int4wo-g64")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
K_QUANTS = ("Q4_K", "Q5_K", "Q6_K", "IQ4_NL")


def vectors() -> dict[str, torch.Tensor]:
    with safe_open(ORACLE, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def matrices(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(12, 256, generator=generator) * 0.02
    zeros = w.clone()
    zeros[2:4] = 0
    return {
        "plain": w.to(dtype),
        "shifted": (w + 0.01).to(dtype),
        "one sign": w.abs().to(dtype),
        "zeros": zeros.to(dtype),
    }


# --- against the libraries ---------------------------------------------------------------------------------------


def test_every_format_gives_its_librarys_values_bit_for_bit():
    found = vectors()
    compared = set()
    for key, expected in found.items():
        name, _, dtype = key.partition("/")
        dtype = dtype.partition("/")[0]
        if dtype in DTYPES:
            assert torch.equal(quantizer(name).roundtrip(found["w"].to(DTYPES[dtype])), expected), key
            compared.add(name)
    assert compared == {*NEW_GRIDS, "int4wo-g128"}
    # Both encoders of MXFP4 are in there, and differ.
    assert not torch.equal(found["mxfp4-floor/float32/torchao"], found["mxfp4-even/float32"])


def test_blocks_of_gguf_with_searched_scales_are_llama_cpps_byte_for_byte():
    found = vectors()
    for kind in K_QUANTS:
        raw = encode(kind, found["w"])
        assert torch.equal(raw, found[f"{kind}/bytes"]), kind
        theirs = gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind])
        assert torch.equal(decode(kind, raw), torch.from_numpy(theirs.copy())), kind
        assert torch.equal(quantizer(f"gguf-{kind.lower()}").roundtrip(found["w"]), decode(kind, raw)), kind


@pytest.mark.parametrize("kind", K_QUANTS)
def test_a_searched_scale_is_better_than_the_largest_weights(kind: str):
    """Against the same codes spread evenly between a group's ends, whose scales are kept in float32."""
    w = matrices(torch.float32)["plain"]
    group, codes = (16, 64) if kind == "Q6_K" else (32, 32 if kind == "Q5_K" else 16)
    groups = w.view(-1, group)
    if kind in ("Q6_K", "IQ4_NL"):  # no minimum there
        low, high = -groups.abs().amax(1, keepdim=True), groups.abs().amax(1, keepdim=True)
    else:
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / (codes - 1)
    plain = ((groups - low) / step).round() * step + low
    error = (quantizer(f"gguf-{kind.lower()}").roundtrip(w) - w).square().mean()
    # Scales of 6 and 8 bits cost a little.
    assert error < 1.2 * (plain - groups).square().mean()


def test_large_matrices_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch):
    w = matrices(torch.float32)["plain"]
    whole = {kind: encode(kind, w) for kind in K_QUANTS}
    # By its module: the package has a function of that name.
    monkeypatch.setattr(importlib.import_module("mansu_tl.models.gguf.encoders"), "_AT_ONCE", 512)
    assert all(torch.equal(encode(kind, w), raw) for kind, raw in whole.items())
    with pytest.raises(MansuError, match=r"Q4_K: rows of 96 weights; its blocks hold 256, choose another format"):
        encode("Q4_K", torch.zeros(2, 96))
    with pytest.raises(MansuError, match=r"GGUF format 'Q2_K': no searched scales; choose one of Q4_K"):
        encode("Q2_K", torch.zeros(2, 256))


def test_rows_that_256_does_not_divide_are_stored_as_llama_cpp_does():
    assert [fallback(kind, 576) for kind in K_QUANTS] == ["Q5_0", "Q5_1", "Q8_0", "IQ4_NL"]  # SmolLM2's width
    assert [fallback(kind, 1536) for kind in K_QUANTS] == list(K_QUANTS)
    assert {fallback(kind, 80) for kind in K_QUANTS} == {"F16"}
    w = matrices(torch.float32)["plain"]
    for name, other in (("gguf-q4_k", "gguf-q5_0"), ("gguf-q5_k", "gguf-q5_1"), ("gguf-q6_k", "gguf-q8_0")):
        part = w[:, :96].contiguous()
        assert torch.equal(quantizer(name).roundtrip(part), quantizer(other).roundtrip(part))
        assert not torch.equal(quantizer(name).roundtrip(w), quantizer(other).roundtrip(w))
    odd = w[:, :80]
    assert torch.equal(quantizer("gguf-q4_k").roundtrip(odd), odd.half().float())


# What `llama_model_quantize` (llama-cpp-python 0.3.36) made of models of these shapes, for "Q4_K_M".
_LLAMA = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 10, **_LLAMA}),
    "tied": ("llama", {"num_hidden_layers": 3, "tie_word_embeddings": True, **_LLAMA}),
    "mixed": ("llama", {"num_hidden_layers": 9, "hidden_size": 64, "intermediate_size": 256, "head_dim": 16}),
    "narrow": ("llama", {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 80, "head_dim": 16}),
    "gpt2": ("gpt2", {"num_hidden_layers": 9, "hidden_size": 256, "n_inner": 512}),
}


def types_of(shape: str) -> dict[str, str]:
    family, options = _SHAPES[shape]
    with torch.device("meta"):
        hf = tiny(family, **options)
    return q4_k_m(hf)


def test_q4_k_m_gives_each_matrix_llama_cpps_type():
    found = types_of("llama")
    layers = {i for i in range(10) if found[f"model.layers.{i}.mlp.down_proj.weight"] == "Q6_K"}
    assert layers == {0, 3, 6, 8, 9}  # an eighth of 10 is 1; 7/8 of it 8; every third in between
    assert layers == {i for i in range(10) if found[f"model.layers.{i}.self_attn.v_proj.weight"] == "Q6_K"}
    assert (found["lm_head.weight"], found["model.embed_tokens.weight"]) == ("Q6_K", "Q4_K")
    assert {kind for name, kind in found.items() if "q_proj" in name or "up_proj" in name} == {"Q4_K"}
    assert types_of("tied")["model.embed_tokens.weight"] == "Q6_K"
    mixed = types_of("mixed")
    assert mixed["model.layers.1.mlp.down_proj.weight"] == "Q4_K"  # rows of 256
    assert mixed["model.layers.1.self_attn.v_proj.weight"] == "Q5_0"
    assert mixed["model.layers.8.self_attn.v_proj.weight"] == mixed["lm_head.weight"] == "Q8_0"
    assert types_of("narrow")["model.layers.0.mlp.down_proj.weight"] == "F16"
    fused = types_of("gpt2")
    assert [fused[f"transformer.h.{i}.attn.c_attn.weight"] for i in (0, 1, 2, 8)] == ["Q6_K", "Q4_K", "Q4_K", "Q6_K"]
    assert "transformer.wpe.weight" not in fused


@pytest.mark.parametrize("shape", _SHAPES)
def test_q4_k_m_is_the_file_that_llama_cpp_writes(shape: str, tmp_path: Path):
    """Every type and every value, against llama.cpp itself."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="the extra llama is not installed")
    family, options = _SHAPES[shape]
    dense = write_gguf(tiny(family, **options), family, tmp_path / "dense.gguf")
    asked = llama_cpp.llama_model_quantize_default_params()
    asked.ftype, asked.nthread = 15, 1
    made = tmp_path / "q4_k_m.gguf"
    assert llama_cpp.llama_model_quantize(str(dense).encode(), str(made).encode(), ctypes.byref(asked)) == 0
    model, theirs = mtl.load(dense), mtl.load(made)
    found, types = quantized_values(model, "gguf-q4_k_m"), gguf_weights(theirs).types
    assert {name: types[name] for name in found} == q4_k_m(model)
    assert all(torch.equal(value, parameters(theirs)[name]) for name, value in found.items())
    assert {types[name] for name in types if name not in found} == {"F32"}


def test_q4_k_m_is_a_quantizer_of_whole_models():
    model = mtl.load("pocket")
    twin, kinds = mtl.quantize(model, "gguf-q4_k_m"), q4_k_m(model)
    linear = linear_weights(model)
    embedding = next(name for name in kinds if "embed" in name or "wte" in name)
    for name, value in parameters(model).items():
        assert torch.equal(parameters(twin)[name], value) == (name not in kinds), name
    assert kinds[embedding] == "Q8_0" and embedding not in linear
    expected = quantizer("gguf-q8_0").roundtrip(parameters(model)[embedding].detach())
    assert torch.equal(parameters(twin)[embedding], expected)


# --- cells and floors --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(NEW_GRIDS),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(list(DTYPES.values())),
    shift=st.sampled_from([-0.3, 0.0, 0.0, 0.3]),
    share=st.floats(0, 1),
)
def test_the_floor_reaches_its_targets_and_moves_no_scale(name, seed, dtype, shift, share):
    generator = torch.Generator().manual_seed(seed)
    w = ((torch.randn(4, 256, generator=generator) + shift) * 0.1).to(dtype)
    grid = grid_of(name)
    before = grid.encode(w)
    wish = grid.neighbour(before.codes, torch.randn(w.shape, generator=generator))
    free = ~grid.absmax_mask(w) & (torch.rand(w.shape, generator=generator) < share)
    target = torch.where(free, wish, before.codes)

    moved = grid.floor_target(w, target, before.absmax, leave_unreachable=True)

    after = grid.encode(moved)
    assert torch.equal(after.absmax, before.absmax)
    assert torch.equal(moved[target == before.codes], w[target == before.codes])
    reached = moved != w
    assert torch.equal(after.codes[reached], target[reached])
    assert torch.equal(after.codes[~reached], before.codes[~reached])
    # What is left is an outermost level beyond the absmax, or too narrow a cell for 8 bits of mantissa.
    if dtype == torch.float32 and name != "fp8-tensor" and free.sum() > 100:
        assert reached.sum() > 0.9 * (target != before.codes).sum()


@pytest.mark.parametrize("name", NEW_GRIDS)
def test_cells_hold_their_weights_and_code_values(name: str):
    grid = grid_of(name)
    for case, w in matrices(torch.float32).items():
        encoded = grid.encode(w)
        lower, upper = grid.cell(encoded.codes, encoded.absmax)
        slack = 1e-3 if name.startswith("int4wo") else 1e-7  # bfloat16 there
        assert ((w >= lower - slack) & (w <= upper + slack)).all(), case
        assert torch.equal(grid.decode(encoded, w.dtype), grid.roundtrip(w)), case
        # Rounding again changes nothing where the scale stays: a step is worked out from the absmax, which rounding may move.
        held = grid.centre(grid.codes(grid.roundtrip(w), encoded.absmax), encoded.absmax)
        assert torch.equal(held, grid.roundtrip(w)), case
        assert (grid.width(w) >= 0).all(), case


def test_the_lowest_code_of_w4a16_is_for_the_largest_weight_alone():
    grid = grid_of("w4a16-g128")
    w = matrices(torch.float32)["plain"]
    w[0, 5] = -7.5
    encoded = grid.encode(w)
    assert encoded.codes[0, 5] == 0 and bool(grid.absmax_mask(w)[0, 5])
    assert not (encoded.codes[~grid.absmax_mask(w)] == 0).any()
    codes = torch.tensor([[0, 1, 1, 15, 15]], dtype=torch.uint8)
    direction = torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0]])
    assert grid.neighbour(codes, direction).tolist() == [[1, 2, 2, 14, 14]]
    # -8..7 under a step of absmax / 7.5 = 1, by hand; -7.5 is a tie, which goes to the even code.
    row = torch.linspace(-7.5, 7.4, 128)[None]
    assert torch.equal(grid.roundtrip(row), row.round().clamp(-8, 7))


def test_gptq_takes_the_grid_that_its_libraries_ship():
    found = quantizer("gptq-w4a16-g128")
    assert found.name == gptq(grid_of("w4a16-g128")).name
    w = matrices(torch.float32)["plain"]
    identity = mtl.quantization.Inputs(torch.eye(256), torch.ones(256), 10)
    assert torch.equal(found.roundtrip(w, identity), grid_of("w4a16-g128").roundtrip(w))


def calibrated_vectors() -> dict[str, torch.Tensor]:
    return load_file(Path(calibrated.__file__).with_name("calibrated.safetensors"))


@pytest.mark.parametrize("key", list(calibrated_vectors()))
def test_gptq_and_awq_are_what_their_libraries_make(key: str):
    """AutoGPTQ, llm-compressor and AutoAWQ on the same weights and inputs, to the last code."""
    setting = key.partition("/")[2]
    (grid,) = (name for name in ("w4a16-g128", "w4a16-asym-g128", "int4-asym-g128") if setting.endswith(f"-{name}"))
    kind = setting.removesuffix(f"-{grid}")
    w, x = calibrated.weights(), calibrated.inputs()
    inputs = Inputs(x.T @ x / len(x), x.abs().mean(0), len(x))
    chosen: Gptq | Awq
    if kind.startswith("gptq"):
        chosen = Gptq(kind, grid_of(grid), static_groups=kind != "gptq", act_order=kind == "gptq-act")
    else:
        chosen = Awq(kind, grid_of(grid), duo=kind == "awq-duo")
    value, found = calibrated_vectors()[key], chosen.roundtrip(w, inputs)
    assert torch.allclose(found, value, rtol=1e-5, atol=1e-7)
    # Round to nearest is something else: 50 to 90 % of the weights agree.
    assert torch.isclose(grid_of(grid).roundtrip(w), value, rtol=1e-5, atol=1e-7).float().mean() < 0.9


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("gptq-w4a16-g128", "autogptq/gptq-w4a16-g128"),
        ("gptq-act-w4a16-g128", "llm-compressor/gptq-act-w4a16-g128"),
        ("awq-int4-asym-g128", "autoawq/awq-int4-asym-g128"),
        ("awq-duo-int4-asym-g128", "autoawq/awq-duo-int4-asym-g128"),
    ],
)
def test_calibrated_formats_by_name_are_the_libraries_settings(name: str, key: str):
    chosen, x = quantizer(name), calibrated.inputs()
    assert chosen.name == name
    found = chosen.roundtrip(calibrated.weights(), Inputs(x.T @ x / len(x), x.abs().mean(0), len(x)))  # type: ignore[call-arg]
    assert torch.allclose(found, calibrated_vectors()[key], rtol=1e-5, atol=1e-7)


def test_act_order_needs_scales_that_are_measured_before():
    with pytest.raises(
        MansuError, match=r"own: act_order=True takes columns of all groups in turn; add static_groups="
    ):
        Gptq("own", grid_of("w4a16-g128"), act_order=True)


def test_rows_that_a_block_does_not_divide_are_refused_by_name():
    for name in ("w4a16-g128", "w4a16-asym-g128", "nvfp4", "mxfp4-floor", "int4wo-g64"):
        with pytest.raises(MansuError, match=rf"{name}: rows of 72 weights; its blocks hold \d+, choose another quant"):
            quantizer(name).roundtrip(torch.zeros(2, 72))
    assert quantizer("fp8").roundtrip(torch.ones(2, 72)).eq(1).all()


def test_what_has_searched_scales_has_no_cells():
    for name in quantizers("searched"):
        with pytest.raises(MansuError, match=rf"quantizer '{name}': .*no cells to count or cross"):
            grid_of(name)


# --- what a checkpoint rests on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp8-tensor", "mxfp4-floor", "gguf-q6_k", "gguf-q4_k"])
def test_a_checkpoint_that_rests_on_a_new_grid_is_found(name: str):
    model = mtl.load(tiny("llama", hidden_size=256, intermediate_size=256, head_dim=64))
    resting = find_grid(mtl.quantize(model, name), rows_of=2**13)
    frame = resting.to_dataframe().set_index("quantizer")
    # A block whose absmax was rounded may get another scale; llama.cpp's search finds nearly all again.
    assert frame.loc[name, "share"] > 0.97
    assert frame.drop(index=[name, "mxfp4-even"] if name == "mxfp4-floor" else name)["share"].max() < 0.97
    assert find_grid(model).best == ""


def test_symmetric_int4_does_not_give_itself_back():
    """Its largest weight lies at 7.5 steps and is rounded to 7 (or -8): the next rounding has another step."""
    grid = grid_of("w4a16-g128")
    once = grid.roundtrip(matrices(torch.float32)["plain"])
    assert not torch.equal(grid.roundtrip(once), once)
    power = grid_of("mxfp4-floor")
    assert torch.equal(power.roundtrip(power.roundtrip(once)), power.roundtrip(once))


# --- checkpoints in codes ----------------------------------------------------------------------------------------


def small_model() -> Any:
    return tiny("llama", hidden_size=128, intermediate_size=128, head_dim=32)


def folder_of(hf: Any, folder: Path, settings: dict[str, Any], packed: Callable[[torch.Tensor], dict]) -> Path:
    """A checkpoint in which every linear layer but the output is stored by `packed`."""
    state = {}
    for name, value in hf.state_dict().items():
        module = name.rpartition(".")[0]
        if name in linear_weights(hf):
            state |= {f"{module}.{key}": part.contiguous() for key, part in packed(value).items()}
        else:
            state[name] = value.clone()
    hf.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def words(codes: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """int32 words of rows of codes, written out bit by bit: the first code in the lowest bits."""
    rows = []
    for row in codes.tolist():
        number = sum(code << bits * i for i, code in enumerate(row))
        found = [number >> 32 * i & 0xFFFFFFFF for i in range(len(row) * bits // 32)]
        rows.append([word - (1 << 32) if word >> 31 else word for word in found])
    return torch.tensor(rows, dtype=torch.int32)


def affine(w: torch.Tensor, group: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes 0..15 [out, in], zero points and scales [out, group]."""
    groups = w.view(len(w), -1, group)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = ((high - low) / 15).to(dtype)
    zero = (-low / scale.float()).round().clamp(1, 15)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
    return codes.view(w.shape).int(), zero.int(), scale


def gptq_parts(w: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, zero, scale = affine(w, 32, torch.float16)
    parts = {"qweight": words(codes).T, "qzeros": words(zero.T - 1), "scales": scale.T}
    return parts | {"g_idx": torch.arange(w.shape[1], dtype=torch.int32) // 32}


def awq_parts(w: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, zero, scale = affine(w, 32, torch.float16)
    place = [0, 2, 4, 6, 1, 3, 5, 7]

    def shuffled(x: torch.Tensor) -> torch.Tensor:
        return words(x.reshape(len(x), -1, 8)[:, :, place].flatten(1))

    return {"qweight": shuffled(codes.T), "qzeros": shuffled(zero.T), "scales": scale.T}


def affine_values(w: torch.Tensor) -> torch.Tensor:
    codes, zero, scale = affine(w, 32, torch.float16)
    spread = [x.repeat_interleave(32, 1) for x in (zero, scale)]
    return ((codes - spread[0]).half() * spread[1]).float()


def blocks_of_fp8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek's: one scale for 64 x 64 weights here."""
    blocks = w.view(len(w) // 64, 64, -1, 64)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.view(w.shape), scale


def block_values(w: torch.Tensor) -> torch.Tensor:
    codes, scale = blocks_of_fp8(w)
    return (codes.float().view(len(w) // 64, 64, -1, 64) * scale[:, None, :, None]).view(w.shape)


CODES: dict[str, tuple[dict[str, Any], Callable, Callable, str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, gptq_parts, affine_values, "gptq-int4-g32"),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq_parts, affine_values, "awq-int4-asym-g32"),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        lambda w: dict(zip(("weight", "weight_scale_inv"), blocks_of_fp8(w), strict=True)),
        block_values,
        "fp8-block",
    ),
}


@pytest.mark.parametrize("method", CODES)
def test_checkpoints_in_codes_become_dense_models(method: str, tmp_path: Path):
    settings, packed, values, called = CODES[method]
    hf = small_model()
    model = mtl.load(folder_of(hf, tmp_path / "packed", settings, packed))
    linear = linear_weights(hf)
    for name, value in parameters(model).items():
        original = dict(hf.named_parameters())[name].detach()
        assert torch.equal(value, values(original) if name in linear else original), name
    resting = find_grid(model, ["nf4"])
    assert resting.types == {called: resting.weights} and resting.file == str(tmp_path / "packed")
    assert "came from" in repr(resting)
    # Saved, it is an ordinary folder; a copy remembers where it came from.
    again = mtl.load(mtl.save(model, tmp_path / "dense"))
    assert all(torch.equal(value, parameters(model)[name]) for name, value in parameters(again).items())
    assert find_grid(again, ["nf4"]).file == ""
    assert stored_formats(mtl.models.rebuild(model)) == stored_formats(model)


@pytest.mark.parametrize("name", ["w4a16-g128", "w4a16-asym-g128", "fp8", "nvfp4", "mxfp4-even"])
def test_what_compressed_tensors_stores_is_read_as_it_dequantizes_it(name: str, tmp_path: Path):
    found = vectors()
    parts = {key.rpartition("/")[2]: value for key, value in found.items() if key.startswith(f"stored/{name}/")}
    settings = {"quant_method": "compressed-tensors"}
    (tmp_path / "folder").mkdir()
    state = {f"a.q_proj.{key}": value for key, value in parts.items()} | {"a.q_proj.input_scale": torch.ones(1)}
    save_file({**state, "norm.weight": torch.ones(3)}, tmp_path / "folder/model.safetensors")
    values, stored = dense_state(tmp_path / "folder", settings, torch.float32, "folder")
    assert values.keys() == {"a.q_proj.weight", "norm.weight"}
    assert torch.equal(values["a.q_proj.weight"], found[f"{name}/float32"])
    assert stored.formats == {"a.q_proj.weight": "mxfp4" if name == "mxfp4-even" else name}


def test_a_whole_folder_of_compressed_tensors_loads(tmp_path: Path):
    grid = grid_of("w4a16-g128")

    def packed(w: torch.Tensor) -> dict[str, torch.Tensor]:
        encoded = grid.encode(w)
        shape = torch.tensor(w.shape)
        scale = encoded.absmax[:, 1].view(len(w), -1)
        return {"weight_packed": words(encoded.codes.int()), "weight_scale": scale, "weight_shape": shape}

    hf = small_model()
    model = mtl.load(
        folder_of(hf, tmp_path, {"quant_method": "compressed-tensors", "format": "pack-quantized"}, packed)
    )
    twin = mtl.quantize(hf, "w4a16-g128")
    assert all(torch.equal(value, parameters(twin)[name]) for name, value in parameters(model).items())
    tokens = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens), twin(tokens))
    assert next(mtl.load(tmp_path, dtype=torch.bfloat16).original_model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq"}, "quantized with hqq, whose codes are not read here; pass the dense checkpoint"),
        ({"quant_method": "mxfp4"}, r"quantized with mxfp4, .*Mxfp4Config\(dequantize=True\)"),
        ({"quant_method": "torchao"}, r"quantized with torchao, .*mansu_tl.quantize\(model, 'int4wo-g128'\)"),
        ({"quant_method": "auto-round"}, "quantized with auto-round, .*export it with format='auto_gptq'"),
        ({"quant_method": "aqlm"}, "quantized with aqlm, whose codes are not read here; pass the dense checkpoint"),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            r"bitsandbytes in 8 bits, .*mansu_tl.quantize\(model, 'int8'",
        ),
        ({"quant_method": "ternary"}, "quantized with ternary, .*a method that is not known here"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ of 3 bits, whose codes cross words; pass the dense checkpoint"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ of 4 bits in layout 'gemv'; export it .*GEMM"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, "with sparsity"),
        ({"quant_method": "fp8"}, "says that it is quantized with fp8, and holds no matrix in codes"),
    ],
)
def test_codes_that_are_not_read_are_refused_with_the_way_out(settings: dict, message: str, tmp_path: Path):
    folder_of(small_model(), tmp_path, settings, lambda w: {"weight": w.clone()})
    with pytest.raises(MansuError, match=message) as caught:
        mtl.load(tmp_path)
    assert "\n" not in str(caught.value)


# --- the list ----------------------------------------------------------------------------------------------------


def test_every_quantizer_says_what_it_stores_and_who_uses_it():
    table = quantizer_table().set_index("quantizer")
    assert set(quantizers()) | set(quantizers("file")) <= set(table.index)
    assert (table.drop(columns="package") != "").all().all()
    for name in quantizers("grid"):
        block = quantizer(name).block_size
        said = table.loc[name, "block"]
        assert said == ("matrix" if name == "fp8-tensor" else "row" if block is None else str(block)), name
    assert table.loc[["int4-g64", "int4-g128"], "used_by"].str.startswith("nobody").all()


def test_the_documented_table_is_the_registrys():
    page = (Path(mtl.__file__).parents[1] / "docs/reference/quantization.md").read_text(encoding="utf8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| `[\w.-]+` \|", line)]
    found = pd.DataFrame(rows, columns=["quantizer", "bits", "block", "scale", "used_by", "kind"])
    found["quantizer"] = found["quantizer"].str.strip("`")
    expected = quantizer_table()
    own = [name for name in expected["quantizer"] if "ternary" not in name]
    expected = expected.set_index("quantizer").loc[own].reset_index().drop(columns="package")
    pd.testing.assert_frame_equal(found, expected)
