"""The formats that people ship: against what their libraries make of the same weights, their floors, and the list of them.

The libraries' values lie in tests/oracles/formats, with the script that made them; where one is installed whole files are
compared too.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import gguf
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import mansu_tl as mtl
from mansu_tl.errors import MansuError
from mansu_tl.models import linear_weights, parameters
from mansu_tl.models.gguf import decode, encode, fallback, gguf_weights, q4_k_m
from mansu_tl.quantization import find_grid, grid_of, gptq, quantized_values, quantizer, quantizer_table, quantizers
from tests.gguf_files import write_gguf
from tests.oracles.formats import make
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
    return {"plain": w.to(dtype), "shifted": (w + 0.01).to(dtype), "one sign": w.abs().to(dtype), "zeros": zeros.to(dtype)}


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
    if kind == "IQ4_NL":
        low, high = -groups.abs().amax(1, keepdim=True), groups.abs().amax(1, keepdim=True)
    else:
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / (codes - 1)
    plain = ((groups - low) / step).round() * step + low
    error = (quantizer(f"gguf-{kind.lower()}").roundtrip(w) - w).square().mean()
    # Scales of 6 and 8 bits cost a little: measured 0.89 to 1.13 of the plain error.
    assert error < 1.2 * (plain - groups).square().mean()


def test_large_matrices_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch):
    w = matrices(torch.float32)["plain"]
    whole = {kind: encode(kind, w) for kind in K_QUANTS}
    monkeypatch.setattr("mansu_tl.models.gguf.encode._AT_ONCE", 512)
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
    assert mixed["model.layers.0.mlp.down_proj.weight"] == "Q4_K"  # rows of 256
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
    w[0, 5] = -1.0
    encoded = grid.encode(w)
    assert encoded.codes[0, 5] == 0 and bool(grid.absmax_mask(w)[0, 5])
    assert not (encoded.codes[~grid.absmax_mask(w)] == 0).any()
    codes = torch.tensor([[0, 1, 1, 15, 15]], dtype=torch.uint8)
    direction = torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0]])
    assert grid.neighbour(codes, direction).tolist() == [[1, 2, 2, 14, 14]]
    # -8..7 between absmax / 7.5 steps, by hand.
    row = torch.linspace(-1, 0.9, 128)[None]
    assert torch.allclose(grid.roundtrip(row), (row * 7.5).round().clamp(-8, 7) / 7.5, atol=1e-7)


def test_gptq_takes_the_grid_that_its_libraries_ship():
    found = quantizer("gptq-w4a16-g128")
    assert found.name == gptq(grid_of("w4a16-g128")).name
    w = matrices(torch.float32)["plain"]
    identity = mtl.quantization.Inputs(torch.eye(256), torch.ones(256), 10)
    assert torch.equal(found.roundtrip(w, identity), grid_of("w4a16-g128").roundtrip(w))


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


@pytest.mark.parametrize("name", ["w4a16-g128", "fp8-tensor", "nvfp4", "mxfp4-floor", "gguf-q6_k", "gguf-q4_k"])
def test_a_checkpoint_that_rests_on_a_new_grid_is_found(name: str):
    model = mtl.load(tiny("llama", hidden_size=256, intermediate_size=256, head_dim=64))
    resting = find_grid(mtl.quantize(model, name), rows_of=2**13)
    frame = resting.to_dataframe().set_index("quantizer")
    # A block whose absmax was rounded may get another scale; llama.cpp's search finds nearly all again.
    assert frame.loc[name, "share"] > 0.97
    assert frame.drop(index=[name, "mxfp4-even"] if name == "mxfp4-floor" else name)["share"].max() < 0.97
    assert find_grid(model).best == ""


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
