"""Update statistics, predicted flips and the dither experiment: brute force against bitsandbytes, theory, real models."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch

from mansu_tl.errors import MansuError
from mansu_tl.models import linear_weights, load, parameters, rebuild
from mansu_tl.quantization import quantize, quantizer, update_statistics
from mansu_tl.quantization.dither import Dither, dither
from mansu_tl.quantization.statistics import UpdateStatistics, crossing_share, predicted_flips
from tests.tiny import FAMILIES, tiny

STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "models" / "stories260K"
NAME = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def gaussian():
    """About 0.9 M weights drawn from N(0, 0.02)."""
    return load(tiny("llama", hidden_size=256, intermediate_size=256, head_dim=64, initializer_range=0.02))


def library(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bitsandbytes' NF4 codes, the scale of each weight, and the dequantized weights."""
    packed, state = bnb.quantize_4bit(w.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=False)
    flat = packed.reshape(-1)
    codes = torch.stack([flat >> 4, flat & 15], 1).reshape(w.shape)
    scales = state.absmax.repeat_interleave(64).view(w.shape)
    return codes.long(), scales, bnb.dequantize_4bit(packed, state).view(w.shape)


def table() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bitsandbytes' own NF4 values, and each code's lower and upper boundary; the outermost end at -1 and 1."""
    values = bnb.get_4bit_type("nf4", device="cpu").double()
    middles = (values[:-1] + values[1:]) / 2
    return values, torch.cat([values[:1], middles]), torch.cat([middles, values[-1:]])


def noisy(bridge, size: float, seed: int = 8):
    """The bridge with +-`size` on every matrix weight that does not carry an absmax, and the old and new values."""
    generator = torch.Generator().manual_seed(seed)
    grid, values = quantizer("nf4"), {}
    for name in linear_weights(bridge):
        w = parameters(bridge)[name].detach()
        signs = 2.0 * torch.randint(0, 2, w.shape, generator=generator) - 1
        values[name] = torch.where(grid.absmax_mask(w), w, w + size * signs)
    return rebuild(bridge, values)


# --- statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.003, 0.05])
def test_every_measure_is_what_brute_force_finds(size):
    bridge = load(tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16))
    w = parameters(bridge)[NAME].detach()
    chosen = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    w2 = torch.where(chosen, w + size * torch.randn(w.shape, generator=torch.Generator().manual_seed(2)), w)
    result = update_statistics(bridge, rebuild(bridge, {NAME: w2}))
    frame = result.to_dataframe().set_index("parameter")
    row, total = frame.loc[NAME], frame.loc["total"]
    (codes, scales, q), (codes2, _, q2) = library(w), library(w2)
    values, lower, upper = table()
    width = (upper - lower)[codes] * scales
    d, dq, moved = (w2 - w).double(), (q2 - q).double(), w2 != w
    assert row.overlap == pytest.approx(float((codes == codes2).double().mean()), abs=1e-12)
    everything = sum(m.in_features * m.out_features for m in linear_weights(bridge).values())
    assert total.overlap == pytest.approx(1 - int((codes != codes2).sum()) / everything, abs=1e-12)
    assert row.codes_changed + row.untouched_codes_changed == int((codes != codes2).sum())
    assert row.mean_ratio == pytest.approx(float(width[moved].mean() / d[moved].abs().mean()), rel=1e-5)
    assert total.mean_ratio == pytest.approx(row.mean_ratio, rel=1e-9)  # no other matrix moved
    assert row.median_ratio == pytest.approx(float((width[moved] / d[moved].abs()).median()), rel=1e-5)
    assert row.cosine == pytest.approx(float((d * dq).sum() / (d.norm() * dq.norm())), rel=1e-5)
    assert row.projection == pytest.approx(float((d * dq).sum() / d.square().sum()), rel=1e-5)
    # Resting positions of all matrices, with 0 and 1 at the boundaries and .5 at the code's value.
    positions = []
    for name in linear_weights(bridge):
        old = parameters(bridge)[name].detach()
        code, scale, _ = library(old)
        x = (old / scale).double()
        side = torch.where(x < values[code], values[code] - lower[code], upper[code] - values[code])
        positions.append((0.5 + torch.where(side > 0, (x - values[code]) / side, 0.0) / 2).flatten())
    expected = torch.histc(torch.cat(positions).clamp(0, 1), 41, 0, 1)
    # Float32 rounding may put a weight on the other side of a bin's edge.
    assert (expected - result.position_counts).abs().sum() <= 4
    assert result.position_counts.sum() == everything


def test_the_papers_ratio_is_the_size_of_the_update_in_bins(gaussian):
    """A width of 5.8e-3 (mean over N(0, .02)) over updates of 1e-5 is 580: within the papers' 47 to 828."""
    total = update_statistics(gaussian, noisy(gaussian, 1e-5)).to_dataframe().iloc[-1]
    assert total.mean_ratio == pytest.approx(580, rel=0.03)
    assert total.median_ratio == pytest.approx(530, rel=0.03)
    assert total.overlap > 0.998
    # ... and yet it arrives in full on average: the ratio by itself says nothing about recovery.
    assert total.projection == pytest.approx(1, abs=0.15)


def test_statistics_are_kept(gaussian, tmp_path):
    result = update_statistics(gaussian, noisy(gaussian, 1e-3))
    again = UpdateStatistics.load(result.save(tmp_path / "s.safetensors"))
    for field in dataclasses.fields(UpdateStatistics):
        first, second = getattr(result, field.name), getattr(again, field.name)
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
    assert again.to_dataframe().equals(result.to_dataframe())
    bare = dataclasses.replace(result, width_sum=None, update_sum=None)
    again = UpdateStatistics.load(bare.save(tmp_path / "bare.safetensors"))
    assert again.to_dataframe()["mean_ratio"].isna().all()
    with pytest.raises(MansuError, match="not a Dither"):
        Dither.load(tmp_path / "s.safetensors")


# --- predicted flips ---------------------------------------------------------------------------------------------


def test_crossing_shares_by_hand():
    edges = torch.linspace(0, 1, 6, dtype=torch.float64)
    sizes = torch.tensor([0.05, 0.2, 0.5, 1.0, 3.0], dtype=torch.float64)
    even = crossing_share(sizes, edges, torch.full((5,), 7))
    assert torch.allclose(even, sizes.clamp(max=1))
    middle = torch.tensor([0, 0, 9, 0, 0])  # between .4 and .6: both boundaries are .4 to .6 away
    assert torch.allclose(
        crossing_share(torch.tensor([0.3, 0.4, 0.5, 0.6], dtype=torch.float64), edges, middle),
        torch.tensor([0.0, 0.0, 0.5, 1.0], dtype=torch.float64),
    )
    left = torch.tensor([3, 0, 0, 0, 0])  # between 0 and .2: one boundary near, the other .8 to 1 away
    assert torch.allclose(
        crossing_share(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), edges, left),
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64),
    )


@pytest.mark.parametrize("size", [3e-4, 2e-3])
def test_flips_are_predicted_by_position_on_every_base_and_by_chance_on_ordinary_ones(gaussian, size):
    for resident in (False, True):
        base = quantize(gaussian) if resident else gaussian
        statistics = update_statistics(base, noisy(base, size))
        frame = predicted_flips(statistics)
        total, bins = frame.iloc[-1], frame.iloc[:-1]
        row = statistics.to_dataframe().iloc[-1]
        assert total.changed == bins.changed.sum() == row.changed
        assert total.measured == pytest.approx(row.share, rel=1e-9)
        assert total.uniform == pytest.approx(row.predicted_share, rel=0.01)
        assert (bins.low < bins.high).all()
        if resident:
            assert total.by_position == pytest.approx(total.measured, abs=0.02)
            assert total.uniform > total.measured + 0.04
            assert (bins.measured[bins.high < 0.3] == 0).all()
            assert (bins.by_position[bins.high < 0.3] == 0).all()
        else:
            # Weights in the outermost cells have one boundary only, and an update may move an absmax.
            assert total.uniform == pytest.approx(total.measured, rel=0.03)
            assert total.by_position == pytest.approx(total.measured, rel=0.03)


def test_nothing_can_be_predicted_of_no_update():
    bridge = load(tiny("llama"))
    with pytest.raises(MansuError, match="it changed no weight"):
        predicted_flips(update_statistics(bridge, bridge))


# --- dither ------------------------------------------------------------------------------------------------------


def test_dither_is_what_brute_force_finds():
    bridge = load(tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16))
    sizes, shares = (0.05, 0.4, 1.5), (0.0, 0.5, 1.0)
    result = dither(bridge, "nf4", sizes, shares, seed=5)
    generator = torch.Generator().manual_seed(5)
    _, lower, upper = table()
    moved, flips = torch.zeros(3, 3, dtype=torch.long), torch.zeros(3, 3, dtype=torch.long)
    inner, square, realised = (torch.zeros(3, 3, dtype=torch.float64) for _ in range(3))
    for name in linear_weights(bridge):
        base = parameters(bridge)[name].detach()
        up = torch.randn(base.shape, generator=generator) >= 0
        for i, share in enumerate(shares):
            w = base + share * (library(base)[2] - base)
            codes, scales, q = library(w)
            for j, size in enumerate(sizes):
                step = size * (upper - lower)[codes].float() * scales
                rise, fall = w + step < scales, w - step > -scales
                new = torch.where(up & rise | ~fall, w + step, w - step)
                free = (w.abs() < scales) & (rise | fall)
                new = torch.where(free, new, w)
                codes2, scales2, q2 = library(new)
                assert torch.equal(scales, scales2)
                moved[i, j] += int(free.sum())
                flips[i, j] += int((codes != codes2).sum())
                d, dq = (new.double() - w.double()), (q2 - q).double()
                inner[i, j] += (d * dq).sum()
                square[i, j] += d.square().sum()
                realised[i, j] += dq.square().sum()
    # Widths differ by a float32 rounding between the two, so that a weight may fall on the other side.
    assert (result.moved - moved).abs().max() <= 2
    assert (result.flips - flips).abs().max() <= 3
    for found, expected in ((result.inner, inner), (result.update_square, square), (result.realised_square, realised)):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6)
    frame = result.to_dataframe()
    assert frame["overlap"].tolist() == pytest.approx(
        (1 - flips.double() / result.weights).flatten().tolist(), abs=1e-3
    )
    assert result.weights == sum(w.in_features * w.out_features for w in linear_weights(bridge).values())


@pytest.mark.parametrize("noise", ["signs", "normal"])
def test_ordinary_weights_flip_as_theory_says(gaussian, noise):
    """E min(1, |d| / width): r for signs of r <= 1 bins; for normal ones r sqrt(2/pi) (1 - e^-1/2r²) + erfc(1/r sqrt 2)."""
    sizes = (0.003, 0.03, 0.3, 0.7, 1.0)
    frame = dither(gaussian, "nf4", sizes, (0.0,), noise=noise, seed=3).to_dataframe().set_index("size")
    for r, row in frame.iterrows():
        theory = min(1.0, r)
        if noise == "normal":
            theory = r * math.sqrt(2 / math.pi) * (1 - math.exp(-1 / (2 * r * r))) + math.erfc(1 / (r * math.sqrt(2)))
        deviation = math.sqrt(max(theory * (1 - theory), 1e-9) / row.moved)
        assert row.uniform == pytest.approx(theory, rel=0.005)
        assert row.by_position == pytest.approx(theory, rel=0.01, abs=4 * deviation)
        assert row.flips == pytest.approx(theory, rel=0.01, abs=4 * deviation)
        assert row.flips == pytest.approx(row.by_position, abs=4 * deviation + 1e-6)
        assert row.projection == pytest.approx(1, abs=0.1 if r < 0.01 else 0.03 if r < 1 else 0.1)


def test_resident_weights_do_not_flip_below_half_a_bin_and_all_do_beyond(gaussian):
    values, lower, upper = table()
    near = torch.minimum(values - lower, upper - values)[1:-1] / (upper - lower)[1:-1]
    first = float(near.min())  # .36: the code -.696 lies off the middle of its cell
    assert 0.35 < first < 0.37
    sizes = (0.01, 0.1, first - 0.002, first + 0.002, 0.49, 0.51, 1.01 - first, 0.99)
    result = dither(gaussian, "nf4", sizes, (1.0,))
    frame = result.to_dataframe()
    flips = frame["flips"].tolist()
    assert flips[:3] == [0, 0, 0]
    assert 0 < flips[3] < 0.05
    assert flips[4] < 0.5 < flips[5]
    assert flips[6:] == [1, 1]
    # By hand: how many of the weights have each code, and which of its boundaries lie within reach.
    count = torch.zeros(16, dtype=torch.float64)
    for name in linear_weights(gaussian):
        codes = library(parameters(gaussian)[name].detach())[0]
        count += torch.bincount(codes.flatten(), minlength=16)
    inside = slice(1, -1)  # the outermost codes' values are absmax elements
    for r, share in zip(sizes, frame["by_position"], strict=True):
        reached = ((values - lower) / (upper - lower) < r).double() + ((upper - values) / (upper - lower) < r).double()
        expected = float((reached / 2 * count)[inside].sum() / count[inside].sum())
        assert share == pytest.approx(expected, abs=0.002)
    assert frame["moved"].iloc[0] == int(count[inside].sum())
    assert result.position_counts[0, 20] == result.weights
    assert frame["projection"].tolist()[:3] == [0, 0, 0]
    assert frame["cosine"].isna().tolist()[:4] == [True, True, True, False]


def test_half_way_weights_keep_their_codes_below_a_quarter_of_a_bin(gaussian):
    frame = dither(gaussian, "nf4", (0.01, 0.1, 0.17, 0.4), (0.5,)).to_dataframe()
    assert frame["flips"].tolist()[:3] == [0, 0, 0]  # .18 = half of the least distance of a code to a boundary
    assert 0.2 < frame["flips"].iloc[3] < 0.4
    assert frame["flips"].iloc[3] == pytest.approx(frame["by_position"].iloc[3], rel=0.01)


@pytest.mark.parametrize("name", ["fp4", "nf4-128", "nf4-dq", "int8", "int4-g64", "int4-asym-g64", "int3-g64"])
def test_every_grid_dithers(gaussian, name):
    frame = dither(gaussian, name, (0.1, 0.3), (0.0, 1.0)).to_dataframe()
    ordinary, resident = frame[frame.residence == 0], frame[frame.residence == 1]
    assert (ordinary.flips / ordinary.by_position - 1).abs().max() < 0.03
    if name != "fp4":  # its cells are wide where weights are few: positions are not even
        assert (ordinary.flips / ordinary.uniform - 1).abs().max() < 0.06
        # Double quantization moves the codes' values off the middle of their cells, by less than 1 %.
        assert (resident.flips == 0).all()
    assert set(frame.quantizer) == {name}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_dithers_and_stays_as_it_is(family):
    hf = tiny(family)
    before = {name: value.clone() for name, value in hf.named_parameters()}
    frame = dither(hf, sizes=(0.3,)).to_dataframe()
    assert frame["flips"].iloc[0] == pytest.approx(0.3, abs=0.03)
    assert frame["flips"].iloc[2] == 0
    assert all(torch.equal(value, before[name]) for name, value in hf.named_parameters())


def test_dither_is_seeded_and_kept(tmp_path):
    bridge = load(tiny("gpt2"))
    first, again, other = (dither(bridge, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.flips, again.flips)
    assert not torch.equal(first.flips, other.flips)
    loaded = Dither.load(first.save(tmp_path / "d.safetensors"))
    assert loaded.to_dataframe().equals(first.to_dataframe())
    assert (loaded.quantizer, loaded.noise, loaded.seed, loaded.weights) == ("nf4", "signs", 1, first.weights)
    assert torch.equal(loaded.position_counts, first.position_counts)
    assert "signs of 0.001 to 1 bins" in repr(first)
    assert "by_position" in first._repr_html_()


def test_zero_blocks_get_no_update():
    bridge = load(tiny("llama"))
    w = parameters(bridge)[NAME].detach().clone()
    w.view(-1)[:64] = 0
    some, all_of_them = (dither(each, sizes=(0.1,)) for each in (rebuild(bridge, {NAME: w}), bridge))
    assert int(all_of_them.moved[0, 0] - some.moved[0, 0]) == 63  # and the absmax of that block never had one
    assert torch.isfinite(some.inner).all()


def test_dither_refuses_what_it_cannot_do():
    bridge = load(tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16))
    for options, message in (
        ({"sizes": ()}, r"sizes=\(\); give some above 0"),
        ({"sizes": (0.1, 0.0)}, r"sizes=\(0.1, 0.0\)"),
        ({"sizes": (math.nan,)}, r"sizes=\(nan,\)"),
        ({"residence": (1.5,)}, r"residence=\(1.5,\); give some between 0"),
        ({"residence": ()}, r"residence=\(\)"),
        ({"noise": "pink"}, r"noise='pink'; choose one of signs, normal"),
        ({"quantizer": "gptq-int4-g64"}, r"no cells"),
    ):
        with pytest.raises(MansuError, match=message):
            dither(bridge, **options)
    with pytest.raises(MansuError, match=r"dither"):
        dither(load(tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16), quantized="nf4"))


# --- real models -------------------------------------------------------------------------------------------------


def at_three_tenths(source: str) -> list[float]:
    return dither(load(source), sizes=(0.3,)).to_dataframe()["flips"].tolist()


def test_the_shipped_bases_differ_in_where_their_weights_rest():
    assert at_three_tenths("pocket") == [0, 0, 0]
    ordinary, half, resident = at_three_tenths("pocket-fp")
    assert ordinary == pytest.approx(0.3, abs=0.01)
    assert 0.05 < half < 0.15
    assert resident == 0


@pytest.mark.skipif(not STORIES.is_dir(), reason="no real checkpoint on this machine")
def test_a_real_checkpoint_has_ordinary_weights():
    ordinary, half, resident = at_three_tenths(str(STORIES))
    assert ordinary == pytest.approx(0.3, abs=0.01)
    assert 0.05 < half < 0.15
    assert resident == 0
