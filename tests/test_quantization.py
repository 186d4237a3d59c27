"""Grids against bitsandbytes itself, the twin against a real 4-bit model, statistics against brute force."""

from __future__ import annotations

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mansu_tl.errors import MansuError
from mansu_tl.models import linear_weights, load, orient, parameters, rebuild
from mansu_tl.quantization import (
    Encoded,
    Grid,
    quantize,
    quantized_values,
    quantizer,
    quantizers,
    update_statistics,
)
from tests.tiny import tiny

FOUR_BIT = {"nf4": ("nf4", 64), "nf4-128": ("nf4", 128), "nf4-32": ("nf4", 32), "fp4": ("fp4", 64)}
SYMMETRIC = ("nf4", "nf4-128", "fp4", "int8", "int4-g64", "int4-g128", "int3-g64")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def library_codes(w: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' codes, as ranks among its distinct levels, and its scales."""
    kind, block = FOUR_BIT[name]
    packed, state = bnbf.quantize_4bit(w, blocksize=block, quant_type=kind)
    packed = packed.reshape(-1).long()
    nibbles = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: w.numel()]
    table = bnbf.get_4bit_type(kind, device="cpu")
    return torch.searchsorted(table.unique(), table[nibbles]).view(w.shape), state.absmax


def library_values(w: torch.Tensor, name: str) -> torch.Tensor:
    """bitsandbytes' dequantized matrix; laid out as one row, since its CPU kernel fails on blocks that cross rows."""
    kind, block = FOUR_BIT[name]
    packed, state = bnbf.quantize_4bit(w, blocksize=block, quant_type=kind)
    padded = -(-w.numel() // block) * block
    packed = torch.nn.functional.pad(packed.reshape(-1), (0, padded // 2 - packed.numel()))
    state.shape = torch.Size((1, padded))
    return bnbf.dequantize_4bit(packed[:, None], state).reshape(-1)[: w.numel()].view(w.shape)


def matrices(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Matrices that a careless implementation gets wrong."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(24, 256, generator=generator) * 0.02
    outliers = plain.clone()
    outliers[::3, ::50] *= 60
    zeros = plain.clone()
    zeros[2:4] = 0
    ties = plain.clone()
    ties[:, 10], ties[:, 11] = 0.09, -0.09
    # Every boundary of the library's table, its float neighbours, and the levels, under a scale of 1 and of .37
    table = bnbf.get_4bit_type(FOUR_BIT[name][0], device="cpu").unique()
    middle = (table[:-1] + table[1:]) / 2
    row = torch.cat([middle, middle.nextafter(torch.tensor(9.0)), middle.nextafter(torch.tensor(-9.0)), table])
    boundaries = torch.zeros(4, 128)
    boundaries[:, : len(row)] = row[:128]
    boundaries[:, [0, 64, 127]] = 1.0
    boundaries[2:] *= 0.37
    cases = {
        "plain": plain,
        "outliers": outliers,
        "zeros": zeros,
        "ties": ties,
        "boundaries": boundaries,
        "tiny scale": plain * 1e-35,
        "subnormal": plain * 1e-40,
        "partial block": plain.reshape(-1)[: 7 * 45].view(7, 45),
        **{
            f"boundaries in a partial block, {s}": torch.cat([row[:62], torch.ones(1)])[None] * s
            for s in (0.37, 0.11, 0.6)
        },
        "partial block of zeros": torch.cat([plain[:1, :64], torch.zeros(1, 64)]).reshape(-1)[:96].view(3, 32),
        "crossing rows": plain.reshape(-1)[: 8 * 96].view(8, 96),
        "one weight": plain[:1, :1],
        "not contiguous": plain.T,
    }
    return {key: value.to(dtype) for key, value in cases.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FOUR_BIT)
def test_four_bit_grids_are_bitsandbytes_bit_for_bit(name, dtype):
    grid = quantizer(name)
    for case, w in matrices(name, dtype).items():
        encoded = grid.encode(w)
        codes, absmax = library_codes(w.contiguous(), name)
        assert torch.equal(encoded.codes.long(), codes), case
        assert torch.equal(encoded.absmax, absmax), case
        back = grid.roundtrip(w)
        assert back.dtype == dtype, case
        expected = library_values(w.contiguous(), name)
        # The AVX512 kernel flushes bfloat16 subnormals to zero, other kernels do not.
        flushed = (expected == 0) & (back.abs() < torch.finfo(dtype).tiny) & (dtype == torch.bfloat16)
        assert torch.equal(back[~flushed], expected[~flushed]), case


def test_tables_are_the_librarys_own():
    assert torch.equal(quantizer("nf4").levels, bnbf.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(quantizer("fp4").levels, bnbf.get_4bit_type("fp4", device="cpu").unique())
    assert len(quantizer("fp4").levels) == 15
    noted = (-0.848096, -0.610633, -0.459995, -0.339679, -0.234607, -0.137912, -0.045525, 0.03979, 0.120255)
    assert torch.allclose(quantizer("nf4").bounds[:9], torch.tensor(noted), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_is_the_weight_half_of_llm_int8(dtype):
    w = (torch.randn(40, 70, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    w[3] = 0
    encoded = quantizer("int8").encode(w)
    codes, absmax, _ = bnbf.int8_vectorwise_quant(w.half())
    assert torch.equal(encoded.codes.int() - 127, codes.int())
    assert torch.equal(encoded.absmax, absmax)
    assert torch.equal(quantizer("int8").roundtrip(w), bnbf.int8_vectorwise_dequant(codes, absmax).to(dtype))
    layer = bnb.nn.Int8Params(w.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    assert torch.equal(layer.data.int(), codes.int())


def test_int4_is_torchs_symmetric_fake_quantization():
    for name, group in (("int4-g64", 64), ("int4-g128", 128)):
        w = torch.randn(16, 256, generator=torch.Generator().manual_seed(2)) * 0.02
        groups = w.view(-1, group)
        scale = groups.abs().amax(1) / 7
        zero = torch.zeros(len(scale), dtype=torch.int32)
        expected = torch.fake_quantize_per_channel_affine(groups, scale, zero, 0, -7, 7).view(w.shape)
        assert torch.allclose(quantizer(name).roundtrip(w), expected, rtol=0, atol=1e-7)


def test_registry_names_what_it_knows():
    assert set(quantizers()) >= {"nf4", "nf4-128", "fp4", "int8", "int4-g64"}
    assert [quantizer(name).name for name in quantizers()] == list(quantizers())
    grid = quantizer("nf4")
    assert quantizer(grid) is grid
    with pytest.raises(MansuError, match=r"'gptq': unknown; choose one of nf4, .*int8"):
        quantizer("gptq")


# --- where weights sit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SYMMETRIC)
def test_cells_hold_their_weights_and_widths_and_distances_follow(name):
    grid = quantizer(name)
    w = (torch.randn(16, 256, generator=torch.Generator().manual_seed(3)) * 0.02).half().float()
    encoded = grid.encode(w)
    lower, upper = grid.cell(encoded.codes, encoded.absmax)
    slack = 4e-5 if name == "int8" else 1e-7  # LLM.int8 rounds to float16 first
    assert (w >= lower - slack).all()
    assert (w <= upper + slack).all()
    assert torch.allclose(grid.width(w), upper - lower, rtol=1e-4, atol=1e-8)
    centre = grid.centre(encoded.codes, encoded.absmax)
    assert ((centre >= lower - 1e-8) & (centre <= upper + 1e-8)).all()
    # Moving by less than the distance keeps the code, moving by a little more, one way or the other, changes it.
    distance = grid.boundary_distance(w)
    free = ~grid.absmax_mask(w) & (distance > 1e-4)
    for sign in (-1, 1):
        near = torch.where(free, w + sign * (distance - slack - 1e-7), w)
        inside = near.abs() <= encoded.scales()
        assert torch.equal(grid.codes(near, encoded.absmax)[inside], encoded.codes[inside])
    far = [grid.codes(w + sign * (distance + slack + 1e-7), encoded.absmax) != encoded.codes for sign in (-1, 1)]
    assert (far[0] | far[1]).all()


def test_zero_blocks_have_no_width_and_are_never_free():
    w = torch.zeros(3, 32)
    w[0] = torch.linspace(-1, 1, 32)
    grid = quantizer("nf4")  # rows 0 and 1 share a block, row 2 is a partial one
    assert torch.equal(grid.roundtrip(torch.zeros(3, 32)), torch.zeros(3, 32))
    assert (grid.width(w)[2] < 1e-37).all()
    assert (grid.boundary_distance(w)[2] < 1e-37).all()
    assert grid.boundary_distance(torch.zeros(1, 64)).eq(0).all()
    assert grid.absmax_mask(w)[2].all()
    assert grid.absmax_mask(w)[0].tolist() == [True] + [False] * 30 + [True]
    assert not grid.absmax_mask(w)[1].any()


def test_absmax_mask_counts_ties_in_bfloat16():
    w = (torch.randn(256, 256, generator=torch.Generator().manual_seed(4)) * 0.02).bfloat16()
    per_block = quantizer("nf4").absmax_mask(w).view(-1, 64).sum(1)
    assert (per_block >= 1).all()
    assert 0.002 < (per_block > 1).float().mean() < 0.04  # 1.5 % by the notes


def test_neighbours_move_one_code_and_inward_at_the_ends():
    codes = torch.tensor([[0, 0, 7, 7, 15, 15, 3]], dtype=torch.uint8)
    direction = torch.tensor([[-2.0, 1, -0.1, 0.1, 5, -5, 0]])
    assert quantizer("nf4").neighbour(codes, direction).tolist() == [[1, 1, 6, 8, 14, 14, 3]]


# --- the floor ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(sorted(FOUR_BIT)),
    shape=st.sampled_from([(4, 128), (3, 64), (5, 45), (2, 96), (1, 3)]),
    exponent=st.floats(-3, 2),
    share=st.floats(0, 1),
    adjacent=st.booleans(),
)
def test_floor_reaches_every_target_and_nothing_else(seed, dtype, name, shape, exponent, share, adjacent):
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(shape, generator=generator) * 10**exponent).to(dtype)
    grid = quantizer(name)
    old, absmax = library_codes(w, name)
    if adjacent:
        wish = grid.neighbour(old.to(torch.uint8), torch.randn(shape, generator=generator)).long()
    else:
        wish = torch.randint(0, len(grid.levels), shape, generator=generator)
    chosen = (torch.rand(shape, generator=generator) < share) & ~grid.absmax_mask(w)
    target = torch.where(chosen, wish, old)
    edited = target != old

    moved = grid.floor_target(w, target.to(torch.uint8), absmax)

    new, new_absmax = library_codes(moved, name)
    assert moved.dtype == dtype
    assert torch.equal(new, target)
    assert torch.equal(new_absmax, absmax)
    assert torch.equal(moved[~edited], w[~edited])
    # One width away, unless the cell's far end is nearer than that (or within a rounding step of it).
    step = (moved.double() - w.double()).abs()
    width = grid.width(w).double()
    lower, upper = grid.cell(target.to(torch.uint8), absmax)
    reach = torch.where(target > old, upper.double() - w.double(), w.double() - lower.double())
    ulp = w.double().abs().clamp(min=1e-30).maximum(moved.double().abs()) * torch.finfo(dtype).eps
    assert ((step >= width) | (reach - 2 * ulp <= width))[edited].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["int8", "int4-g64", "int3-g64"])
def test_floor_holds_on_uniform_grids(name, dtype):
    generator = torch.Generator().manual_seed(5)
    grid = quantizer(name)
    w = (torch.randn(64, 128, generator=generator) * 0.02).to(dtype)
    before = grid.encode(w)
    target = grid.neighbour(before.codes, torch.randn(w.shape, generator=generator))
    target = torch.where(grid.absmax_mask(w), before.codes, target)
    after = grid.encode(grid.floor_target(w, target, before.absmax))
    assert torch.equal(after.codes, target)
    assert torch.equal(after.absmax, before.absmax)


def test_floor_goes_to_the_centre_where_that_is_far_enough():
    grid = quantizer("nf4")
    w = torch.zeros(1, 64)
    w[0, 0] = 1.0
    w[0, 1] = 0.03  # close below the boundary .0398 of code 7: code 8's centre .0796 is nearer than one bin (.0853)
    w[0, 2] = -0.04  # the centre is further than one bin
    target = grid.encode(w).codes
    target[0, 1:3] = 8
    moved = grid.floor_target(w, target, grid.encode(w).absmax)
    assert moved[0, 2] == grid.levels[8]
    assert moved[0, 1] - 0.03 == pytest.approx(0.08532, abs=1e-4)
    assert torch.equal(moved[0, 3:], w[0, 3:])


def test_floor_refuses_what_it_cannot_do():
    grid = quantizer("nf4")
    w = torch.randn(2, 64, generator=torch.Generator().manual_seed(6))
    encoded = grid.encode(w)
    carrier = grid.absmax_mask(w)
    with pytest.raises(MansuError, match=r"2 weights to move carry their block's absmax"):
        grid.floor_target(w, torch.where(carrier, 7, encoded.codes), encoded.absmax)
    with pytest.raises(MansuError, match=r"target code 16: nf4 has codes 0 to 15"):
        grid.floor_target(w, torch.full_like(encoded.codes, 16), encoded.absmax)
    small = (w * 1e-7).half()  # float16 has few values down here
    encoded = grid.encode(small)
    free = ~grid.absmax_mask(small)
    with pytest.raises(
        MansuError, match=r"target cells of nf4 hold no torch.float16 value .*store the model in float32"
    ):
        grid.floor_target(
            small, torch.where(free, 7 + (encoded.codes <= 7), encoded.codes).to(torch.uint8), encoded.absmax
        )


# --- the twin ----------------------------------------------------------------------------------------------------


def four_bit(folder, kind: str):
    """A real bitsandbytes model on CPU, kept from repacking its weights."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu", attn_implementation="eager"
    )
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return model, layers


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_twin_equals_a_real_four_bit_model(tmp_path, name):
    hf = tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    hf.save_pretrained(tmp_path)
    real, layers = four_bit(tmp_path, name)
    bridge = load(hf)
    assert len(layers) == len(linear_weights(bridge)) == 14
    tokens = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(7))
    twin = quantize(bridge, name)
    with torch.no_grad():
        expected = real(tokens).logits
        assert (twin(tokens) - expected).abs().max() <= 1e-6
        assert (bridge(tokens) - expected).abs().max() > 1e-2  # quantization shows, and the original is untouched


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_twin_quantizes_every_linear_layer_and_nothing_else(family):
    bridge = load(tiny(family))
    linear, before = linear_weights(bridge), {k: v.clone() for k, v in parameters(bridge).items()}
    after = parameters(quantize(bridge, "nf4"))
    for name, value in before.items():
        if name not in linear:
            assert torch.equal(after[name], value), name
            continue
        oriented = value.T if linear[name].transposed else value
        expected = library_values(oriented.contiguous(), "nf4")
        assert torch.equal(after[name], expected.T if linear[name].transposed else expected), name
        assert not torch.equal(after[name], value), name
    assert all(torch.equal(value, before[name]) for name, value in parameters(bridge).items())


def test_quantized_values_take_values_that_are_not_applied_yet():
    bridge = load(tiny("gpt2"))
    name = "transformer.h.0.mlp.c_fc.weight"
    new = parameters(bridge)[name].detach() * 2
    values = quantized_values(bridge, "nf4", {name: new})
    assert torch.equal(values[name], 2 * quantized_values(bridge, "nf4")[name])
    assert set(values) == set(linear_weights(bridge))
    with pytest.raises(MansuError, match=r"c_fc.weight: value has shape \(3, 4\), expected \(48, 32\)"):
        orient(torch.zeros(3, 4), linear_weights(bridge)[name])


# --- statistics --------------------------------------------------------------------------------------------------


def updated(bridge, change) -> object:
    """The bridge with `change(w)` added to every quantized matrix."""
    live = parameters(bridge)
    return rebuild(bridge, {name: live[name].detach() + change(live[name].detach()) for name in linear_weights(bridge)})


def signs(size: float):
    """An update of one size and random sign on every weight."""
    generator = torch.Generator().manual_seed(8)
    return lambda w: size * (2 * torch.randint(0, 2, w.shape, generator=generator) - 1)


@pytest.fixture(scope="module")
def gaussian():
    """About 0.9 M weights drawn from N(0, 0.02)."""
    return load(tiny("llama", hidden_size=256, intermediate_size=256, head_dim=64, initializer_range=0.02))


@pytest.mark.parametrize(("size", "share", "cosine"), [(1e-4, 1.85, 0.131), (1e-3, 18.5, 0.418), (1e-2, 92.6, 0.964)])
def test_notes_table_of_updates_is_reproduced(gaussian, size, share, cosine):
    result = update_statistics(gaussian, updated(gaussian, signs(size)), "nf4")
    total = result.to_dataframe().iloc[-1]
    assert total.parameter == "total"
    assert total.weights == sum(w.in_features * w.out_features for w in linear_weights(gaussian).values())
    # The absmax moves with such an update, so weights flip for two reasons: compare with the notes' own numbers.
    assert 100 * total.codes_changed / total.weights == pytest.approx(share, abs=0.1 + 0.01 * share)
    assert total.cosine == pytest.approx(cosine, abs=0.012)
    assert total.projection == pytest.approx(1, abs=0.05)
    assert result.ratio_counts.sum() == total.changed
    assert result.ratio_flipped.sum() == total.codes_changed
    assert result.position_counts.sum() == total.weights


def test_notes_widths_and_distances_are_reproduced():
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(9)) * 0.02
    grid = quantizer("nf4")
    assert grid.width(w).mean().item() == pytest.approx(5.8e-3, abs=1e-4)
    assert grid.width(w).median().item() == pytest.approx(5.3e-3, abs=1e-4)
    assert grid.boundary_distance(w).mean().item() == pytest.approx(1.6e-3, abs=1e-4)
    assert grid.encode(w).absmax.mean().item() == pytest.approx(2.6 * 0.02, rel=0.01)


def test_dither_predicts_flips_on_ordinary_weights_but_not_on_resident_ones(gaussian):
    change = signs(3e-4)
    ordinary = update_statistics(gaussian, updated(gaussian, change)).to_dataframe().iloc[-1]
    assert ordinary.share == pytest.approx(ordinary.predicted_share, rel=0.05)

    resident = quantize(gaussian, "nf4")
    live = parameters(resident)
    keep = {name: quantizer("nf4").absmax_mask(live[name]) for name in linear_weights(resident)}
    values = {name: torch.where(keep[name], live[name], live[name] + change(live[name])) for name in keep}
    result = update_statistics(resident, rebuild(resident, values))
    total = result.to_dataframe().iloc[-1]
    assert total.codes_changed == 0
    assert total.predicted_share > 0.03
    assert total.projection == 0
    middle = len(result.position_counts) // 2
    assert result.position_counts[middle] == total.weights
    assert result.position_edges[middle] < 0.5 < result.position_edges[middle + 1]


def test_statistics_agree_with_brute_force():
    bridge = load(tiny("gpt2"))
    name = "transformer.h.1.attn.c_attn.weight"  # Conv1D: blocks run along the transposed matrix
    w = parameters(bridge)[name].detach()
    chosen = torch.rand(w.shape, generator=torch.Generator().manual_seed(10)) < 0.2
    w2 = torch.where(chosen, w * 1.1 + 0.003 + 0.4 * (chosen.cumsum(1) % 5 == 0), w)
    frame = update_statistics(bridge, rebuild(bridge, {name: w2}), "nf4").to_dataframe().set_index("parameter")
    old, old_absmax = library_codes(w.T.contiguous(), "nf4")
    new, new_absmax = library_codes(w2.T.contiguous(), "nf4")
    moved, touched = (old != new).T, w != w2
    row, total = frame.loc[name], frame.loc["total"]
    assert row.changed == touched.sum() == total.changed
    assert row.codes_changed == (moved & touched).sum() == total.codes_changed
    assert row.untouched_codes_changed == (moved & ~touched).sum()
    assert row.absmax_changed == (old_absmax != new_absmax).sum()
    assert row.absmax_changed > 0
    update = (w2 - w).double().flatten()
    realised = (library_values(w2.T.contiguous(), "nf4") - library_values(w.T.contiguous(), "nf4")).T.double().flatten()
    assert row.cosine == pytest.approx(float(torch.cosine_similarity(update, realised, dim=0)), rel=1e-6)
    assert row.projection == pytest.approx(float(update @ realised / (update @ update)), rel=1e-6)
    width = quantizer("nf4").width(w.T.contiguous()).T.double()
    ratio = width[touched] / (w2 - w).abs().double()[touched]
    assert row.median_ratio == pytest.approx(float(ratio.median()), rel=1e-6)
    assert total.median_ratio == pytest.approx(float(ratio.median()), rel=0.02)
    assert row.predicted == pytest.approx(float((1 / ratio).clamp(max=1).sum()), rel=1e-6)
    assert frame.loc["transformer.h.0.mlp.c_fc.weight"].changed == 0


def test_statistics_of_no_update_and_of_a_wrong_pair():
    bridge = load(tiny("llama"))
    result = update_statistics(bridge, bridge)
    total = result.to_dataframe().iloc[-1]
    assert total.changed == total.codes_changed == 0
    assert total[["share", "cosine", "projection", "median_ratio"]].isna().all()
    assert "0 of " in repr(result)
    assert "total" in result._repr_html_()
    with pytest.raises(MansuError, match=r"differs in shape or is missing in one model"):
        update_statistics(bridge, load(tiny("llama", intermediate_size=64)))


def test_values_know_themselves():
    encoded = quantizer("nf4").encode(torch.ones(2, 96))
    assert isinstance(encoded, Encoded)
    assert encoded.scales().shape == (2, 96)
    assert isinstance(quantizer("int8"), Grid)
