"""The rest of the registry: against its libraries where they run, brute force and the cases known in closed form."""

from __future__ import annotations

import importlib
from pathlib import Path

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mansu_tl.data import Sequences
from mansu_tl.errors import MansuError
from mansu_tl.models import linear_weights, load, orient, parameters, plain, rebuild
from mansu_tl.quantization import (
    Awq,
    Gptq,
    Grid,
    Inputs,
    awq,
    calibration,
    gptq,
    grid_of,
    inputs_of,
    quantize,
    quantized_values,
    quantizer,
    quantizers,
    register_quantizer,
    update_statistics,
)
from mansu_tl.registry import Registry
from tests.tiny import FAMILIES, crossed, tiny

module = importlib.import_module("mansu_tl.quantization.quantizer")  # the package has a function of that name

ASYMMETRIC = ("int4-asym-g64", "int4-asym-g128")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gaussian(*shape: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def correlated(features: int, rank: int = 6, tokens: int = 512, seed: int = 0) -> torch.Tensor:
    """Inputs in which a few directions carry most of the power and some features are much larger than others."""
    x = gaussian(tokens, rank, seed=seed, scale=1) @ gaussian(rank, features, seed=seed + 1, scale=1)
    x = x + gaussian(tokens, features, seed=seed + 2, scale=0.3)
    return x * (1 + 10 * (torch.arange(features) % 17 == 3))


def statistics_of(x: torch.Tensor) -> Inputs:
    return Inputs(x.T @ x / len(x), x.abs().mean(0), len(x))


def text(rows: int = 12, width: int = 14, seed: int = 0) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 64, (rows, width), generator=generator)
    return Sequences(tokens, torch.randint(4, width + 1, (rows,), generator=generator))


# --- the registry ------------------------------------------------------------------------------------------------


def test_every_name_makes_the_quantizer_of_that_name_and_kinds_part_them():
    names = quantizers()
    assert len(set(names)) == len(names)
    assert [quantizer(name).name for name in names] == list(names)
    kinds = ("grid", "calibrated", "library", "searched")
    assert [name for kind in kinds for name in quantizers(kind)] == list(names)
    # Only for a model that came from a file, so in no list that is gone through for any model.
    assert quantizers("file") == ("gguf",)
    assert "gguf" not in names
    assert all(isinstance(quantizer(name), Grid) for name in quantizers("grid"))
    assert {"nf4-dq", "nf4-128-dq", "int4-asym-g64", "int4-asym-g128", "int3-g64"} < set(quantizers("grid"))
    assert {"gptq-int4-g64", "gptq-int4-g128", "awq-int4-g64", "awq-int4-g128"} < set(quantizers("calibrated"))
    own = gptq(quantizer("nf4"))
    assert quantizer(own) is own
    assert own.name == "gptq-nf4"
    with pytest.raises(MansuError, match=r"unknown kind 'ptq'; choose one of grid, calibrated, library"):
        quantizers("ptq")


def test_a_quantizer_is_one_file(monkeypatch, tmp_path: Path):
    """Written beside the package and imported: the twin, the floor's cells and the statistics take it by name."""
    monkeypatch.setattr(module, "_QUANTIZERS", Registry("quantizer", module._QUANTIZERS))
    (tmp_path / "ternary.py").write_text(
        "import torch\n"
        "from mansu_tl.quantization import Grid, gptq, register_quantizer\n"
        "def ternary(block_size=64):\n"
        "    return Grid(f'ternary-g{block_size}', torch.tensor([-1.0, 0.0, 1.0]), block_size)\n"
        "register_quantizer('ternary-g64', ternary, 'grid')\n"
        "register_quantizer('gptq-ternary-g64', lambda: gptq(ternary()), 'calibrated')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("ternary")
    assert quantizers("grid")[-1] == "ternary-g64" and quantizers("calibrated")[-1] == "gptq-ternary-g64"
    bridge = load(tiny("llama"))
    for name in ("ternary-g64", "gptq-ternary-g64"):
        twin = parameters(quantize(bridge, name, text()))
        for key in linear_weights(bridge):
            # A grid's blocks cross rows, GPTQ's groups end with the row.
            rows = [twin[key].detach().reshape(-1)] if name == "ternary-g64" else twin[key].detach()
            assert all(len(block.unique()) <= 3 for row in rows for block in row.split(64))
    assert update_statistics(bridge, bridge, "ternary-g64").quantizer == "ternary-g64"
    with pytest.raises(MansuError, match="quantizer 'nf4': registered already"):
        register_quantizer("nf4", lambda: quantizer("fp4"), "grid")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda package: None)
    assert quantizers("library") == ()
    for name, extra in (("hqq-int4-g64", "hqq"), ("torchao-int4-g64", "torchao"), ("torchao-int8", "torchao")):
        with pytest.raises(MansuError, match=rf"{name}.*is not installed; pip install 'mansu-tl\[{extra}\]'"):
            quantizer(name)


def test_what_has_no_cells_is_refused_by_name():
    assert grid_of("int4-asym-g64").name == "int4-asym-g64"
    for name in quantizers("calibrated"):
        with pytest.raises(MansuError, match=rf"quantizer '{name}': .*no cells to count or cross; choose one of nf4, "):
            grid_of(name)
    bridge = load(tiny("llama"))
    with pytest.raises(MansuError, match=r"'gptq-int4-g64': .*no cells"):
        update_statistics(bridge, bridge, "gptq-int4-g64")


# --- double quantization -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "block"), [("nf4-dq", 64), ("nf4-128-dq", 128)])
def test_double_quantization_is_bitsandbytes_bit_for_bit(name, block, dtype):
    for rows in (8, 500):  # less and more than one block of 256 scales
        w = gaussian(rows, 256, seed=rows).to(dtype)
        packed, state = bnbf.quantize_4bit(w, blocksize=block, quant_type="nf4", compress_statistics=True)
        expected = bnbf.dequantize_4bit(packed, state)
        found = quantizer(name).roundtrip(w)
        assert found.dtype == dtype
        assert torch.equal(found, expected)
        assert not torch.equal(found, quantizer(name.removesuffix("-dq")).roundtrip(w))
        assert torch.equal(quantizer(name).encode(w).codes, quantizer(name.removesuffix("-dq")).encode(w).codes)


def test_double_quantized_scales_are_the_nearest_of_the_dynamic_type():
    # The 8-bit type of arXiv 2110.02861, written out: decades of 1, 2, 4, ... evenly spaced fractions.
    magnitudes = [
        10.0 ** (decade - 6) * (0.1 + 0.9 * (i + 0.5) / 2**decade) for decade in range(7) for i in range(2**decade)
    ]
    levels = torch.tensor(sorted([0.0, 1.0, *magnitudes, *(-m for m in magnitudes)], key=float), dtype=torch.float64)
    assert len(levels) == 256
    absmax = (1 + gaussian(4000, scale=0.2)).clamp(min=0.1) * 0.05
    w = torch.zeros(len(absmax), 64)
    w[:, 0] = absmax
    found = quantizer("nf4-dq").roundtrip(w)[:, 0]
    rest = torch.nn.functional.pad((absmax - absmax.mean()).double(), (0, -len(absmax) % 256)).view(-1, 256)
    outer = rest.abs().amax(1, keepdim=True)
    nearest = (rest / outer)[..., None].sub(levels).abs().argmin(-1)
    expected = (levels[nearest] * outer).view(-1)[: len(absmax)] + absmax.mean()
    same = (found - expected).abs() < 1e-7
    assert same.double().mean() > 0.995  # bitsandbytes' CPU kernel takes the next-nearest now and then
    assert (found / absmax - 1).abs().mean() < 0.005


def test_twin_equals_a_real_double_quantized_model(tmp_path):
    hf = tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    hf.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )
    real = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32, device_map="cpu", attn_implementation="eager"
    )
    for layer in real.modules():  # kept from repacking its weights for a kernel that computes in bfloat16
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    bridge = load(hf)
    tokens = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = real(tokens).logits
        assert (quantize(bridge, "nf4-dq")(tokens) - expected).abs().max() <= 1e-6
        assert (quantize(bridge, "nf4")(tokens) - expected).abs().max() > 1e-4


def test_floor_of_the_plain_grid_holds_under_double_quantization():
    w = gaussian(32, 128, seed=3)
    plain_grid, double = quantizer("nf4"), grid_of("nf4-dq")
    before = double.encode(w)
    target = torch.where(double.absmax_mask(w), before.codes, plain_grid.neighbour(before.codes, gaussian(32, 128)))
    moved = double.floor_target(w, target, before.absmax)
    assert torch.equal(moved, plain_grid.floor_target(w, target, before.absmax))
    # With every absmax held, only edited weights are decoded differently.
    changed = double.roundtrip(moved) != double.roundtrip(w)
    assert torch.equal(changed, target != before.codes)


# --- asymmetric grids --------------------------------------------------------------------------------------------


def affine(w: torch.Tensor, group: int) -> torch.Tensor:
    """PyTorch's own affine quantizer, between ends that include 0."""
    groups = w.float().reshape(-1, group)
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scale = (high - low) / 15
    zero = (-torch.round(low / scale)).clamp(0, 15).int()
    return torch.fake_quantize_per_channel_affine(groups, scale, zero, 0, 0, 15).view(w.shape)


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_asymmetric_grids_are_pytorchs_affine_quantization(name):
    grid = grid_of(name)
    for shift in (-0.1, 0.0, 0.013, 0.1):  # one-sided blocks too
        w = gaussian(24, 256, seed=1) + shift
        assert torch.allclose(grid.roundtrip(w), affine(w, grid.block_size), rtol=0, atol=1e-7)
        assert len(grid.encode(w).codes.unique()) > 10


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_asymmetric_grids_are_torchaos_bit_for_bit(name):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives", reason="the extra torchao is not here")
    w = gaussian(24, 256, seed=2) + 0.004
    block = (1, grid_of(name).block_size)
    scale, zero = primitives.choose_qparams_affine(
        w, primitives.MappingType.ASYMMETRIC, block, torch.uint8, quant_min=0, quant_max=15, eps=1e-30
    )
    codes = primitives.quantize_affine(w, block, scale, zero, torch.uint8, 0, 15)
    values = primitives.dequantize_affine(codes, block, scale, zero, torch.uint8, 0, 15, output_dtype=torch.float32)
    assert torch.equal(grid_of(name).encode(w).codes, codes)
    assert torch.equal(grid_of(name).roundtrip(w), values)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(4, 128), (3, 64), (5, 45), (2, 96), (1, 3)]),
    shift=st.sampled_from([-3.0, -0.3, 0.0, 0.0, 0.3, 3.0]),
    share=st.floats(0, 1),
)
def test_asymmetric_floor_reaches_every_target_and_nothing_else(seed, dtype, shape, shift, share):
    generator = torch.Generator().manual_seed(seed)
    w = ((torch.randn(shape, generator=generator) + shift) * 0.1).to(dtype)
    grid = grid_of("int4-asym-g64")
    before = grid.encode(w)
    # Only codes that some value between the block's ends has: a zero point rounded on a tie leaves out one.
    bottom, top = (grid.flat_codes(before.scales()[..., i].reshape(-1), before.scales().view(-1, 2)) for i in (0, 1))
    wish = torch.randint(0, 16, shape, generator=generator)
    wish = wish.clamp(bottom.view(shape).long(), top.view(shape).long())
    chosen = (torch.rand(shape, generator=generator) < share) & ~grid.absmax_mask(w)
    target = torch.where(chosen, wish, before.codes.long()).to(torch.uint8)

    moved = grid.floor_target(w, target, before.absmax)

    after = grid.encode(moved)
    assert torch.equal(after.codes, target)
    assert torch.equal(after.absmax, before.absmax)
    assert torch.equal(moved[target == before.codes], w[target == before.codes])


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_asymmetric_cells_hold_their_weights_and_widths_and_distances_follow(name):
    grid = grid_of(name)
    w = gaussian(16, 256, seed=4) + 0.005
    encoded = grid.encode(w)
    assert encoded.absmax.shape == (w.numel() // grid.block_size, 2)
    assert encoded.scales().shape == (16, 256, 2)
    assert torch.equal(grid.codes(w, encoded.absmax), encoded.codes)
    lower, upper = grid.cell(encoded.codes, encoded.absmax)
    assert ((w >= lower - 1e-8) & (w <= upper + 1e-8)).all()
    assert torch.allclose(grid.width(w), upper - lower)
    mask = grid.absmax_mask(w).view(-1, grid.block_size)
    assert (mask.sum(1) == 2).all()  # the smallest and the largest weight of each block
    assert mask.gather(1, w.view(-1, grid.block_size).argmax(1, keepdim=True)).all()
    distance = grid.boundary_distance(w)
    far = [grid.codes(w + sign * (distance + 1e-7), encoded.absmax) != encoded.codes for sign in (-1, 1)]
    near = [grid.codes(w + sign * (distance - 1e-7), encoded.absmax) == encoded.codes for sign in (-1, 1)]
    assert (far[0] | far[1]).all()
    assert (near[0] & near[1])[distance > 1e-7].all()


def test_asymmetric_blocks_of_zeros_and_of_one_sign():
    grid = grid_of("int4-asym-g64")
    assert torch.equal(grid.roundtrip(torch.zeros(3, 32)), torch.zeros(3, 32))
    assert grid.boundary_distance(torch.zeros(1, 64)).eq(0).all()
    w = torch.linspace(0.5, 1.5, 64)[None]
    assert grid.encode(w).absmax.tolist() == [[0.0, 1.5]]
    assert grid.absmax_mask(w).sum() == 1
    assert torch.allclose(grid.roundtrip(w), (w * 10).round() / 10, atol=1e-6)
    with pytest.raises(MansuError, match=r"int4-asym-g64: a block has two ends, low and high"):
        grid.flat_codes(torch.zeros(3), torch.ones(3))
    with pytest.raises(MansuError, match=r"floor_target: 1 weights to move carry"):
        grid.floor_target(w, grid.encode(w).codes - grid.absmax_mask(w).to(torch.uint8), grid.encode(w).absmax)


def test_asymmetric_ties_of_the_ends_stay_inside_the_codes():
    # low = -high puts the zero point on a tie; so does any end at half a step.
    for low, high in ((-1.0, 1.0), (-5.5, 9.5), (-6.5, 8.5), (-4.5, 10.5)):
        w = torch.cat([torch.tensor([low, high]), torch.linspace(low, high, 62)])[None]
        encoded = grid_of("int4-asym-g64").encode(w)
        assert encoded.codes.max() <= 15
        step = (high - low) / 15
        assert (grid_of("int4-asym-g64").roundtrip(w) - w).abs().max() <= step / 2 + 1e-6


def test_statistics_count_blocks_of_asymmetric_grids():
    bridge = load(tiny("gpt2"))
    name = "transformer.h.0.mlp.c_fc.weight"
    value = parameters(bridge)[name].detach().clone()
    value.view(-1)[5] = 9.0
    frame = update_statistics(bridge, rebuild(bridge, {name: value}), "int4-asym-g64").to_dataframe()
    frame = frame.set_index("parameter")
    assert frame.loc[name].changed == 1
    assert frame.loc[name].absmax_changed == 1  # one block, whichever of its ends moved
    assert frame.loc[name].blocks == value.numel() // 64


def test_int3_has_seven_codes():
    w = torch.linspace(-1, 1, 64)[None]
    grid = grid_of("int3-g64")
    assert torch.allclose(grid.roundtrip(w), (3 * w).round() / 3, atol=1e-6)
    assert sorted(grid.encode(w).codes.unique().tolist()) == list(range(7))


# --- GPTQ --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int4-g64", "int4-g128", "int4-asym-g64", "nf4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gptq_is_round_to_nearest_when_inputs_are_uncorrelated(name, dtype):
    grid = grid_of(name)
    w = gaussian(24, 256, seed=5).to(dtype)
    diagonal = gaussian(256, seed=6, scale=1).square() + 0.1
    diagonal[7] = 0  # a feature that is never on
    for moment in (torch.eye(256), torch.diag(diagonal)):
        inputs = Inputs(moment, diagonal.sqrt(), 100)
        assert torch.equal(gptq(grid).roundtrip(w, inputs), grid.roundtrip(w))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), correlation=st.floats(-0.98, 0.98), power=st.floats(0.1, 10))
def test_gptq_takes_the_best_second_code_given_the_first(seed, correlation, power):
    w = gaussian(1, 2, seed=seed, scale=1)
    grid = Grid("micro", torch.arange(-7, 8) / 7, 2)
    moment = torch.tensor([[1.0, correlation * power**0.5], [correlation * power**0.5, power]])
    found = Gptq("micro", grid, damping=0.0).roundtrip(w, Inputs(moment, moment.diagonal().sqrt(), 10))
    levels = grid.levels * w.abs().max()
    assert found[0, 0] == grid.roundtrip(w)[0, 0]
    candidates = torch.stack([torch.tensor([found[0, 0], level]) for level in levels])
    errors = torch.stack([(c - w[0]) @ moment @ (c - w[0]) for c in candidates])
    assert (found[0] - w[0]) @ moment @ (found[0] - w[0]) <= errors.min() + 1e-6


def test_gptq_of_three_columns_is_the_papers_greedy_solution():
    """Column after column by brute force: round, then refit the columns that are left by least squares."""
    w, x = gaussian(5, 3, seed=9, scale=1), correlated(3, rank=2, seed=9)
    moment = (x.T @ x / len(x)).double()
    grid = Grid("micro", torch.arange(-7, 8) / 7, 3)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(3)
    scale = w.abs().amax(1, keepdim=True)
    rest, expected = w.double().clone(), torch.zeros(5, 3, dtype=torch.float64)
    for i in range(3):
        unit = rest[:, i : i + 1] / scale
        expected[:, i] = grid.levels.double()[(unit - grid.levels.double()).abs().argmin(1)] * scale[:, 0]
        done, free = slice(0, i + 1), slice(i + 1, 3)
        fixed = expected[:, done] - w.double()[:, done]
        rest[:, free] = w.double()[:, free] - fixed @ damped[done, free] @ torch.linalg.inv(damped[free, free])
    found = Gptq("micro", grid).roundtrip(w, Inputs(moment.float(), x.abs().mean(0), len(x)))
    assert torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize(("name", "features"), [("int4-g64", 192), ("int4-g128", 320), ("int4-asym-g64", 128)])
def test_gptq_and_awq_beat_round_to_nearest_on_correlated_inputs(name, features):
    grid = grid_of(name)
    w, x = gaussian(48, features, seed=10), correlated(features)
    inputs, held_out = statistics_of(x[:384]), x[384:]
    plain_error = inputs.error(grid.roundtrip(w) - w)
    found = {make.__name__: make(grid).roundtrip(w, inputs) for make in (gptq, awq)}
    # Ratios measured: GPTQ .016-.087, AWQ .47-.55; on the held-out tokens the same.
    assert inputs.error(found["gptq"] - w) < 0.2 * plain_error
    assert inputs.error(found["awq"] - w) < 0.8 * plain_error
    for value in found.values():  # and on tokens that were not used
        new, old = ((held_out @ (v - w).T).square().mean() for v in (value, grid.roundtrip(w)))
        assert new < old


def test_output_error_is_the_mean_over_tokens():
    x, change = correlated(16, tokens=50), gaussian(7, 16)
    expected = (x @ change.T).square().sum(1).mean()
    assert torch.allclose(statistics_of(x).error(change), expected, rtol=1e-4)


def test_gptq_rounds_a_shorter_last_group_under_its_own_scale():
    w = gaussian(8, 96, seed=11)
    w[:, 64:] *= 0.01
    found = gptq().roundtrip(w, Inputs(torch.eye(96), torch.ones(96), 10))
    expected = torch.cat([grid_of("int4-g64").roundtrip(part.contiguous()) for part in (w[:, :64],)], 1)
    assert torch.equal(found[:, :64], expected)
    last = Grid("rows", torch.arange(-7, 8) / 7, 32).roundtrip(w[:, 64:].contiguous())
    assert torch.allclose(found[:, 64:], last)


def test_gptq_refuses_what_it_cannot_invert():
    x = torch.ones(1, 8)
    with pytest.raises(
        MansuError, match=r"gptq-int4-g64: the inputs' second moment is not positive definite under dam"
    ):
        Gptq("gptq-int4-g64", grid_of("int4-g64"), damping=0.0).roundtrip(torch.randn(2, 8), statistics_of(x))
    with pytest.raises(MansuError, match=r"own: damping=-1.0; choose 0 or more"):
        Gptq("own", grid_of("int4-g64"), damping=-1.0)


# --- AWQ ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awq_without_a_scale_is_round_to_nearest(dtype):
    w = gaussian(24, 256, seed=12).to(dtype)
    inputs = statistics_of(correlated(256))
    for name in ("int4-g64", "int4-asym-g128", "nf4"):
        grid = grid_of(name)
        assert torch.equal(Awq("own", grid, exponents=(0.0,)).roundtrip(w, inputs), grid.roundtrip(w))


def test_awq_takes_the_exponent_of_least_output_error():
    w, x = gaussian(32, 128, seed=13), correlated(128)
    inputs, grid = statistics_of(x), grid_of("int4-g64")
    value, chosen, errors = awq(grid).search(w, inputs)
    assert list(errors) == [i / 20 for i in range(20)]
    brute = {}
    for exponent in errors:
        s = x.abs().mean(0) ** exponent
        s = s / (s.max() * s.min()).sqrt()
        change = grid.roundtrip(w * s) / s - w
        brute[exponent] = float((x @ change.T).square().sum(1).mean())
    assert all(errors[a] == pytest.approx(brute[a], rel=1e-3) for a in errors)
    assert chosen == min(brute, key=brute.__getitem__) > 0
    assert float(inputs.error(value - w)) == pytest.approx(errors[chosen])
    with pytest.raises(MansuError, match=r"own: exponents=\(\); give some between 0 and 1"):
        Awq("own", grid, exponents=())


def test_awq_keeps_features_that_are_never_on():
    x = correlated(64)
    x[:, 5] = 0
    assert torch.isfinite(awq().roundtrip(gaussian(8, 64), statistics_of(x))).all()


# --- calibration and the twin ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_sees_what_each_matrix_is_given(family):
    """Against TransformerLens-free bookkeeping: outputs of the real tokens, one sequence at a time, unpadded."""
    hf, sequences = tiny(family), text()
    linear = linear_weights(hf)
    found = inputs_of(hf, linear, sequences, batch_size=5)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in linear}
    handles = [
        hf.get_submodule(name.removesuffix(".weight")).register_forward_hook(
            lambda module, inputs, out, name=name: seen[name].append(inputs[0][0])
        )
        for name in linear
    ]
    with torch.no_grad():
        for i in range(len(sequences)):
            hf(sequences.tokens[i : i + 1, : int(sequences.lengths[i])], use_cache=False)
    for handle in handles:
        handle.remove()
    for name in linear:
        x = torch.cat(seen[name])
        assert found[name].tokens == len(x) == int(sequences.lengths.sum())
        assert torch.allclose(found[name].moment, x.T @ x / len(x), rtol=1e-3, atol=1e-4), name
        assert torch.allclose(found[name].magnitude, x.abs().mean(0), rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize(("family", "name"), crossed(FAMILIES, ["awq-int4-asym-g128", "gptq-int4-g64"]))
def test_calibrated_twins_of_every_family(family, name):
    hf = tiny(family)
    bridge = load(hf)
    before = {key: value.clone() for key, value in parameters(bridge).items()}
    twin = quantize(bridge, name, calibration=text())
    after, linear = parameters(twin), linear_weights(bridge)
    for key, value in before.items():
        assert torch.equal(parameters(bridge)[key], value), key
        assert torch.equal(after[key], value) == (key not in linear), key
    assert torch.isfinite(twin(text().tokens)).all()


def test_gptq_goes_through_the_layers_in_order_on_quantized_inputs():
    hf, sequences = tiny("llama"), text()
    linear = linear_weights(hf)
    found = quantized_values(hf, "gptq-int4-g64", calibration=sequences)
    half, method = plain(hf), gptq()
    for layer in (0, 1):
        names = [name for name in linear if f"layers.{layer}." in name]
        inputs = inputs_of(half, names, sequences)
        for name in names:
            w = orient(parameters(half)[name].detach(), linear[name])
            assert torch.equal(found[name], method.roundtrip(w, inputs[name])), name
        with torch.no_grad():
            for name in names:
                half.get_parameter(name).copy_(found[name])
    dense = inputs_of(hf, ["model.layers.1.mlp.up_proj.weight"], sequences)
    w = parameters(hf)["model.layers.1.mlp.up_proj.weight"].detach()
    other = method.roundtrip(w, dense["model.layers.1.mlp.up_proj.weight"])
    assert not torch.equal(other, found["model.layers.1.mlp.up_proj.weight"])


def test_memory_bounds_the_layers_of_one_pass_and_changes_nothing(monkeypatch):
    hf = tiny("gpt_neox", num_hidden_layers=3)
    passes: list[list[str]] = []

    def counted(model, names, sequences):
        passes.append(list(names))
        return inputs_of(model, names, sequences)

    monkeypatch.setattr(calibration, "inputs_of", counted)
    together = quantized_values(hf, "awq-int4-g64", calibration=text())
    assert len(passes) == 1
    layer = sum(4 * weight.in_features**2 for weight in linear_weights(hf).values()) // 3
    for most, expected in ((2 * layer, [2, 1]), (layer - 1, [1, 1, 1])):
        passes.clear()
        monkeypatch.setattr(calibration, "_MOST_BYTES", most)
        apart = quantized_values(hf, "awq-int4-g64", calibration=text())
        assert [len(names) // 4 for names in passes] == expected
        assert all(torch.equal(apart[name], together[name]) for name in together)


def test_calibrated_values_take_an_edit_that_is_not_applied_yet():
    bridge, sequences = load(tiny("gpt2")), text()
    name = "transformer.h.0.attn.c_proj.weight"
    new = parameters(bridge)[name].detach() * 1.5
    for quantizer_name in ("gptq-int4-g64", "awq-int4-g64"):
        lazily = quantized_values(bridge, quantizer_name, {name: new}, calibration=sequences)
        applied = quantized_values(rebuild(bridge, {name: new}), quantizer_name, calibration=sequences)
        assert all(torch.equal(lazily[key], applied[key]) for key in applied)


def test_calibration_is_asked_for_by_name_and_others_ignore_it():
    bridge = load(tiny("llama"))
    with pytest.raises(MansuError, match=r"'gptq-int4-g64': needs calibration text; pass calibration=, e.g. task.reta"):
        quantize(bridge, "gptq-int4-g64")
    empty = Sequences(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    with pytest.raises(MansuError, match=r"calibration: the text is empty"):
        quantize(bridge, "awq-int4-g64", calibration=empty)
    with_text = parameters(quantize(bridge, "nf4", text()))
    assert all(torch.equal(value, with_text[key]) for key, value in parameters(quantize(bridge, "nf4")).items())


def test_calibration_refuses_inputs_that_are_not_finite():
    hf = tiny("llama")
    with torch.no_grad():
        hf.model.layers[0].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(MansuError, match=r"calibration: inputs of model.layers.0.mlp.down_proj.weight are not finite"):
        inputs_of(hf, ["model.layers.0.mlp.down_proj.weight"], text())


# --- optional libraries ------------------------------------------------------------------------------------------


def test_hqq_is_hqqs_own():
    pytest.importorskip("hqq", reason="the extra hqq is not installed")
    method = quantizer("hqq-int4-g64")
    from hqq.core.quantize import Quantizer as Library

    w = gaussian(24, 128, seed=14)
    codes, meta = Library.quantize(w, nbits=4, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32)
    found = method.roundtrip(w)
    unpacked = Library.unpack[meta["packing"]](codes, dtype=torch.float32).view(-1, 64)
    assert torch.allclose(found, ((unpacked - meta["zero"]) * meta["scale"]).view(w.shape), atol=1e-7)
    assert len(found.view(-1, 64)[0].unique()) <= 16
    assert (found - w).square().mean() < 1.1 * (grid_of("int4-asym-g64").roundtrip(w) - w).square().mean()
    assert method.roundtrip(w.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(MansuError, match=r"hqq-int4-g64: a matrix of \(3, 7\) is no multiple of the group size 64"):
        method.roundtrip(torch.zeros(3, 7))


@pytest.mark.parametrize(("name", "steps", "group"), [("torchao-int4-g64", 15, 64), ("torchao-int8", 255, 128)])
def test_torchao_is_symmetric_rounding(name, steps, group):
    pytest.importorskip("torchao", reason="the extra torchao is not installed")
    w = gaussian(24, 128, seed=15)
    groups = w.view(-1, group)
    scale = groups.abs().amax(1, keepdim=True) / (steps / 2)
    half = (steps + 1) // 2  # the largest weight lies on a tie: multiply by the reciprocal, as the library does
    expected = ((groups * (1 / scale)).round().clamp(-half, half - 1) * scale).view(w.shape)
    assert torch.allclose(quantizer(name).roundtrip(w), expected, atol=1e-6)
    assert quantizer(name).roundtrip(w.bfloat16()).dtype == torch.bfloat16
    if name.endswith("g64"):
        with pytest.raises(MansuError, match=r"torchao-int4-g64: rows of 7 are no multiple of the group size 64"):
            quantizer(name).roundtrip(torch.zeros(3, 7))


@pytest.mark.parametrize("name", ["hqq-int4-g64", "torchao-int4-g64", "torchao-int8"])
def test_twins_by_optional_libraries(name):
    pytest.importorskip(name.split("-")[0], reason=f"the extra {name.split('-')[0]} is not installed")
    bridge = load(tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16))
    after = parameters(quantize(bridge, name))
    for key, value in parameters(bridge).items():
        assert torch.equal(after[key], value) == (key not in linear_weights(bridge)), key
