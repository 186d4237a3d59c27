"""Dense weights to the blocks of GGUF whose scales are searched: Q4_K, Q5_K, Q6_K and IQ4_NL, as llama.cpp writes them.

For every group of weights llama.cpp (ggml-quants.c: `make_qkx2_quants`, `make_qx_quants`, `quantize_row_iq4_nl_impl`) tries
some twenty scales around the largest weight's and keeps the one of least weighted error; the groups' scales are then rounded
under a float16 number of the super-block, and the codes taken anew. Written here from that algorithm, for all groups at
once. A sum over a group is added up in llama.cpp's order, because the search compares errors that differ in the last bits:
so the bytes are the same. Without an importance matrix ("imatrix"), which weighs errors by a text's activations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.models.gguf.blocks import LAYOUTS, low_high, pack_low_high

# What a code of IQ4_NL is worth, in steps (llama.cpp's kvalues_iq4nl).
IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_SMALLEST = 1e-15  # GROUP_MAX_EPS
_TRIES_IQ4 = 7
_AT_ONCE = 1 << 22


def encode(kind: str, w: Float[Tensor, "row weight"]) -> UInt8[Tensor, "row byte"]:
    """A matrix as bytes, row by row, as llama.cpp quantizes it without an importance matrix.

    Args:
        kind: "Q4_K", "Q5_K", "Q6_K" or "IQ4_NL".

    Raises:
        MansuError: another format, or rows that its blocks do not divide.
    """
    if kind not in _ENCODERS:
        raise MansuError(f"GGUF format {kind!r}: no searched scales; choose one of {', '.join(_ENCODERS)}")
    block, size, encoder = _ENCODERS[kind]
    if w.shape[1] % block:
        raise MansuError(f"{kind}: rows of {w.shape[1]} weights; its blocks hold {block}, choose another format")
    blocks = w.detach().float().reshape(-1, block)
    raw = torch.cat([encoder(part) for part in blocks.split(max(1, _AT_ONCE // block))])
    return raw.view(len(w), w.shape[1] // block * size)


def decode(kind: str, raw: UInt8[Tensor, "row byte"]) -> Float32[Tensor, "row weight"]:
    """What the bytes of a matrix are worth, bit for bit what `gguf.dequantize` gives."""
    if kind in LAYOUTS:
        return LAYOUTS[kind].read(raw).values()
    blocks = raw.view(-1, 18)
    levels = torch.tensor(IQ4_NL_LEVELS, dtype=torch.float32, device=raw.device)
    step = blocks[:, :2].contiguous().view(torch.float16).float()
    return (step * levels[low_high(blocks[:, 2:], 16).long()]).view(len(raw), -1)


# --- one scale and one minimum for 32 weights: Q4_K and Q5_K -----------------------------------------------------------


def _two_level(x: Float32[Tensor, "block 256"], last: int, first: float, tries: int) -> tuple[Tensor, Tensor]:
    """The first 16 bytes of Q4_K's and Q5_K's blocks, and all codes."""
    blocks = len(x)
    scale, least, searched = _scale_and_minimum(x.reshape(-1, 32), last, first, tries)
    scales, leasts = scale.view(blocks, 8), least.view(blocks, 8)
    most_scale, most_least = (value.amax(1, keepdim=True).clamp(min=0).abs() for value in (scales, leasts))  # no -0
    steps = _six_bits(scales * _over(63.0, most_scale))
    shifts = _six_bits(leasts * _over(63.0, most_least))
    d, dmin = (_divided(value, 63.0).half() for value in (most_scale, most_least))
    step = (d.float() * steps.float()).view(-1, 1)
    shift = (dmin.float() * shifts.float()).view(-1, 1)
    codes = ((x.reshape(-1, 32) + shift) / step).round().clamp(0, last)
    codes = torch.where(step == 0, searched.float(), codes).to(torch.uint8)
    low, high = steps.view(blocks, 2, 4).unbind(1)
    low_least, high_least = shifts.view(blocks, 2, 4).unbind(1)
    packed = torch.cat([low | high >> 4 << 6, low_least | high_least >> 4 << 6, high & 15 | (high_least & 15) << 4], 1)
    return torch.cat([_bytes(d), _bytes(dmin), packed], 1), codes.view(blocks, 256)


def _scale_and_minimum(
    x: Float32[Tensor, "group 32"], last: int, first: float, tries: int
) -> tuple[Float32[Tensor, " group"], Float32[Tensor, " group"], UInt8[Tensor, "group 32"]]:
    """Scale, minus the minimum, and codes of least error, each weight's error weighted by its size."""
    x = x.T.contiguous()
    # By float64: PyTorch's float32 root is off by a last bit now and then.
    size = _divided(_added(x * x), 32.0).double().sqrt().float()
    weight = size + x.abs()
    sum_w, sum_x = _added(weight), _added(weight * x)
    least, most = x.amin(0).clamp(max=0), x.amax(0)
    flat = least == most
    span = torch.where(flat, 1.0, most - least)
    inverse = _over(float(last), span)
    scale = 1 / inverse
    codes = (inverse * (x - least)).round().clamp(0, last)
    best = _added(_weighted_square(scale * codes + least - x, weight))
    for i in range(tries + 1):
        # The range is that of the best minimum so far.
        inverse = _over(_float32(first, 0.1, i, float(last)), torch.where(flat, 1.0, most - least))
        trial = (inverse * (x - least)).round().clamp(0, last)
        weighted = weight * trial
        sum_l, sum_l2, sum_xl = _added(weighted), _added(weighted * trial), _added(weighted * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_least = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = new_least > 0
        new_scale, new_least = torch.where(above, sum_xl / sum_l2, new_scale), new_least.clamp(max=0)
        error = _added(_weighted_square(new_scale * trial + new_least - x, weight))
        better = (determinant > 0) & (error < best)
        best, scale, least = (
            torch.where(better, new, old) for new, old in ((error, best), (new_scale, scale), (new_least, least))
        )
        codes = torch.where(better, trial, codes)
    zero = torch.zeros_like(scale)
    return torch.where(flat, zero, scale), -least, torch.where(flat, zero, codes).T.to(torch.uint8).contiguous()


def _q4_k(x: Tensor) -> Tensor:
    head, codes = _two_level(x, 15, -1.0, 20)
    return LAYOUTS["Q4_K"].pack(head, codes)


def _q5_k(x: Tensor) -> Tensor:
    head, codes = _two_level(x, 31, -0.5, 15)
    return LAYOUTS["Q5_K"].pack(head, codes)


# --- one scale for 16 weights: Q6_K ------------------------------------------------------------------------------------


def _q6_k(x: Tensor) -> Tensor:
    blocks = len(x)
    scale, searched = _one_scale(x.reshape(-1, 16), 32)
    scales = scale.view(blocks, 16)
    most = scales.gather(1, scales.abs().max(1, keepdim=True).indices)
    nothing = most.abs() < _SMALLEST
    inverse = _over(-128.0, torch.where(nothing, 1.0, most))
    steps = (inverse * scales).round().clamp(max=127)
    d = torch.where(nothing, 0.0, 1 / inverse).half()
    steps = torch.where(nothing, 0.0, steps).to(torch.int8)
    step = (d.float() * steps.float()).view(-1, 1)
    codes = (x.reshape(-1, 16) / step).round().clamp(-32, 31) + 32
    codes = torch.where(step == 0, searched.float(), codes)
    codes = torch.where(nothing.expand(-1, 16).reshape(-1, 1), 0.0, codes).to(torch.uint8).view(blocks, 256)
    raw = torch.cat([codes.new_zeros(blocks, 192), steps.view(torch.uint8), _bytes(d)], 1)
    return LAYOUTS["Q6_K"].pack(raw, codes)


def _one_scale(
    x: Float32[Tensor, "group 16"], half: int
) -> tuple[Float32[Tensor, " group"], UInt8[Tensor, "group 16"]]:
    """Scale (it may be negative) and codes of least error, each weight's error weighted by its square."""
    x = x.T.contiguous()
    largest = x.gather(0, x.abs().max(0, keepdim=True).indices)[0]
    nothing = largest.abs() < _SMALLEST
    largest = torch.where(nothing, 1.0, largest)
    weight = x * x
    weighted = weight * x
    codes = scale = best = torch.empty(0)
    for i in (0, *range(-9, 0), *range(1, 10)):
        trial = (_over(-_float32(float(half), 0.1, i), largest) * x).round().clamp(-half, half - 1)
        sum_lx, sum_l2 = _added(weighted * trial), _added(weight * trial * trial)
        fitted = torch.where(sum_l2 > 0, sum_lx / sum_l2, 0.0)
        if i == 0:
            codes, scale, best = trial, fitted, fitted * sum_lx
            continue
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        codes, scale = torch.where(better, trial, codes), torch.where(better, fitted, scale)
        best = torch.where(better, fitted * sum_lx, best)
    codes = torch.where(nothing, 0.0, codes + half).to(torch.uint8)
    return torch.where(nothing, 0.0, scale), codes.T.contiguous()


# --- sixteen uneven levels under one scale for 32 weights: IQ4_NL -------------------------------------------------------


def _iq4_nl(x: Tensor) -> Tensor:
    x = x.T.contiguous()
    levels = torch.tensor(IQ4_NL_LEVELS, dtype=torch.float32, device=x.device)
    largest = x.gather(0, x.abs().max(0, keepdim=True).indices)[0]
    nothing = largest.abs() < _SMALLEST
    largest = torch.where(nothing, 1.0, largest)
    weight = x * x
    scale = best = torch.empty(0)
    for i in (None, *range(-_TRIES_IQ4, _TRIES_IQ4 + 1)):
        inverse = 1 / _divided(-largest, levels[0]) if i is None else _over(float(i + IQ4_NL_LEVELS[0]), largest)
        value = levels[_nearest_level(inverse * x, levels)]
        sum_qx, sum_q2 = _added(weight * value * x), _added(weight * value * value)
        fitted = torch.where(sum_q2 > 0, sum_qx / sum_q2, 0.0)
        if i is None:
            scale, best = fitted, fitted * sum_qx
            continue
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        scale, best = torch.where(better, fitted, scale), torch.where(better, fitted * sum_qx, best)
    scale = torch.where(nothing, 0.0, scale)
    codes = _nearest_level(torch.where(scale == 0, 0.0, 1 / scale) * x, levels).T.to(torch.uint8)
    return torch.cat([_bytes(scale[:, None].half()), pack_low_high(codes, 16)], 1)


def _nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """The nearest level; of two equally near ones the higher."""
    above = torch.bucketize(values, levels, right=True).clamp(1, len(levels) - 1)
    return torch.where(values - levels[above - 1] < levels[above] - values, above - 1, above)


# --- float32 arithmetic in llama.cpp's order ---------------------------------------------------------------------------


def _added(x: Float32[Tensor, "weight group"]) -> Float32[Tensor, " group"]:
    """The sum over a group's weights, from the first to the last."""
    total = x[0].clone()
    for row in x[1:]:
        total += row
    return total


def _weighted_square(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * x)


def _over(number: float, x: Tensor) -> Tensor:
    """A number divided by a tensor (PyTorch would multiply by the reciprocal); 0 where the tensor is 0."""
    return torch.where(x == 0, 0.0, torch.full_like(x, number) / x)


def _divided(x: Tensor, number: float | Tensor) -> Tensor:
    """A tensor divided by a number (a GPU would multiply by the reciprocal)."""
    return x / torch.as_tensor(number, dtype=x.dtype, device=x.device).expand_as(x)


def _float32(start: float, step: float, times: int, end: float = 0.0) -> float:
    """start + step * times + end, each operation rounded to float32."""
    one, other, last = (torch.tensor(value, dtype=torch.float32) for value in (start, step, end))
    return float(one + other * times + last)


def _six_bits(x: Tensor) -> Tensor:
    return (x.round().to(torch.int64) & 255).clamp(max=63).to(torch.uint8)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8).view(len(x), -1)


# Weights and bytes of a block, and its encoder.
_ENCODERS: dict[str, tuple[int, int, Callable[[Tensor], Tensor]]] = {
    "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k),
    "Q6_K": (256, 210, _q6_k),
    "IQ4_NL": (32, 18, _iq4_nl),
}
