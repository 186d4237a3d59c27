"""The number formats of GGUF as data: where codes and scales lie in a block's bytes, both ways.

A weight is worth `step * (code - zero)`, or `step * (code - zero) + shift`, in float32 and in that order, which is bit for
bit what `gguf.quants` and llama.cpp make of it. A format is one class with two pure functions, as in `gguf/quants.py`:
`unpack` reads a block, `pack` puts other codes into it and leaves the scales alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from jaxtyping import Float32, UInt8
from torch import Tensor

LAYOUTS: dict[str, type[Layout]] = {}
# Codes [block, weight], steps [block, group] and, where the format has them, shifts [block, group].
Unpacked = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Blocks:
    """A matrix as its file holds it.

    Attributes:
        layout: its number format.
        codes: each weight's code, from 0.
        step: what one code is worth in each group of weights; may be negative.
        shift: what is added, or None where the format has none.
    """

    layout: type[Layout]
    codes: UInt8[Tensor, "out in"]
    step: Float32[Tensor, "out group"]
    shift: Float32[Tensor, "out group"] | None

    def values(self) -> Float32[Tensor, "out in"]:
        """What the codes are worth."""
        grouped = self.codes.view(len(self.codes), -1, self.layout.group)
        values = grouped.float().sub_(self.layout.zero).mul_(self.step.unsqueeze(2))
        if self.shift is not None:
            values.add_(self.shift.unsqueeze(2))
        return values.view(self.codes.shape)


class Layout(ABC):
    """One number format.

    Attributes:
        type: its name in `gguf`.
        block: weights in one block of bytes.
        group: weights that share a step.
        codes: how many codes there are.
        zero: the code that is worth 0, where nothing is added.
    """

    type: ClassVar[str]
    block: ClassVar[int]
    size: ClassVar[int]
    group: ClassVar[int] = 32
    codes: ClassVar[int]
    zero: ClassVar[int] = 0

    def __init_subclass__(cls) -> None:
        cls.type = cls.__name__
        cls.block, cls.size = GGML_QUANT_SIZES[GGMLQuantizationType[cls.type]]
        LAYOUTS[cls.type] = cls

    @staticmethod
    @abstractmethod
    def unpack(raw: UInt8[Tensor, "block byte"]) -> Unpacked:
        """Codes, steps and shifts of blocks of bytes."""

    @staticmethod
    @abstractmethod
    def pack(raw: UInt8[Tensor, "block byte"], codes: UInt8[Tensor, "block weight"]) -> UInt8[Tensor, "block byte"]:
        """The blocks with other codes under the scales that they have."""

    @classmethod
    def read(cls, raw: UInt8[Tensor, "row byte"]) -> Blocks:
        """A matrix from its rows' bytes."""
        rows = len(raw)
        codes, step, shift = cls.unpack(raw.view(-1, cls.size))
        return Blocks(cls, codes.view(rows, -1), step.view(rows, -1), None if shift is None else shift.view(rows, -1))

    @classmethod
    def write(cls, raw: UInt8[Tensor, "row byte"], codes: UInt8[Tensor, "row weight"]) -> UInt8[Tensor, "row byte"]:
        """A matrix's bytes with other codes."""
        return cls.pack(raw.view(-1, cls.size), codes.view(-1, cls.block)).view_as(raw)


class Q4_0(Layout):
    """4 bits, one float16 step for 32 weights."""

    codes, zero = 16, 8

    @staticmethod
    def unpack(raw: Tensor) -> Unpacked:
        """As in `Layout`."""
        return low_high(raw[:, 2:], 16), _half(raw, 0), None

    @staticmethod
    def pack(raw: Tensor, codes: Tensor) -> Tensor:
        """As in `Layout`."""
        return torch.cat([raw[:, :2], pack_low_high(codes, 16)], 1)


class Q4_1(Layout):
    """4 bits, one float16 step and one float16 minimum for 32 weights."""

    codes = 16

    @staticmethod
    def unpack(raw: Tensor) -> Unpacked:
        """As in `Layout`."""
        return low_high(raw[:, 4:], 16), _half(raw, 0), _half(raw, 2)

    @staticmethod
    def pack(raw: Tensor, codes: Tensor) -> Tensor:
        """As in `Layout`."""
        return torch.cat([raw[:, :4], pack_low_high(codes, 16)], 1)


class Q5_0(Layout):
    """5 bits, one float16 step for 32 weights."""

    codes, zero = 32, 16

    @staticmethod
    def unpack(raw: Tensor) -> Unpacked:
        """As in `Layout`."""
        return low_high(raw[:, 6:], 16) | _bits(raw[:, 2:6]) << 4, _half(raw, 0), None

    @staticmethod
    def pack(raw: Tensor, codes: Tensor) -> Tensor:
        """As in `Layout`."""
        return torch.cat([raw[:, :2], _from_bits(codes >> 4), pack_low_high(codes & 15, 16)], 1)


class Q5_1(Layout):
    """5 bits, one float16 step and one float16 minimum for 32 weights."""

    codes = 32

    @staticmethod
    def unpack(raw: Tensor) -> Unpacked:
        """As in `Layout`."""
        return low_high(raw[:, 8:], 16) | _bits(raw[:, 4:8]) << 4, _half(raw, 0), _half(raw, 2)

    @staticmethod
    def pack(raw: Tensor, codes: Tensor) -> Tensor:
        """As in `Layout`."""
        return torch.cat([raw[:, :4], _from_bits(codes >> 4), pack_low_high(codes & 15, 16)], 1)


class Q8_0(Layout):
    """8 bits, one float16 step for 32 weights; -128 is never written by a quantizer."""

    codes, zero = 256, 128

    @staticmethod
    def unpack(raw: Tensor) -> Unpacked:
        """As in `Layout`."""
        return raw[:, 2:] ^ 128, _half(raw, 0), None

    @staticmethod
    def pack(raw: Tensor, codes: Tensor) -> Tensor:
        """As in `Layout`."""
        return torch.cat([raw[:, :2], codes ^ 128], 1)


class Q4_K(Layout):
    """4 bits, 6-bit steps and minima for 32 weights under two float16 numbers for 256."""

    codes = 16

    @staticmethod
    def unpack(raw: Tensor) -> Unpacked:
        """As in `Layout`."""
        step, shift = _k_scales(raw)
        return low_high(raw[:, 16:], 32), step, shift

    @staticmethod
    def pack(raw: Tensor, codes: Tensor) -> Tensor:
        """As in `Layout`."""
        return torch.cat([raw[:, :16], pack_low_high(codes, 32)], 1)


class Q5_K(Layout):
    """5 bits, scales as in Q4_K."""

    codes = 32

    @staticmethod
    def unpack(raw: Tensor) -> Unpacked:
        """As in `Layout`."""
        step, shift = _k_scales(raw)
        high = raw[:, 16:48].unsqueeze(1) >> _shifts(range(8), raw) & 1
        return low_high(raw[:, 48:], 32) | high.flatten(1) << 4, step, shift

    @staticmethod
    def pack(raw: Tensor, codes: Tensor) -> Tensor:
        """As in `Layout`."""
        high = ((codes >> 4).view(-1, 8, 32) << _shifts(range(8), raw)).sum(1, dtype=torch.uint8)
        return torch.cat([raw[:, :16], high, pack_low_high(codes & 15, 32)], 1)


class Q6_K(Layout):
    """6 bits, 8-bit steps for 16 weights under one float16 number for 256."""

    codes, zero, group = 64, 32, 16

    @staticmethod
    def unpack(raw: Tensor) -> Unpacked:
        """As in `Layout`."""
        high = raw[:, 128:192].view(-1, 2, 1, 32) >> _shifts((0, 2, 4, 6), raw).view(1, 1, 4, 1) & 3
        step = _half(raw, 208) * raw[:, 192:208].contiguous().view(torch.int8).float()
        return low_high(raw[:, :128], 64) | high.flatten(1) << 4, step, None

    @staticmethod
    def pack(raw: Tensor, codes: Tensor) -> Tensor:
        """As in `Layout`."""
        parts = (codes >> 4).view(-1, 2, 4, 32) << _shifts((0, 2, 4, 6), raw).view(1, 1, 4, 1)
        high = parts.sum(2, dtype=torch.uint8).flatten(1)
        return torch.cat([pack_low_high(codes & 15, 64), high, raw[:, 192:]], 1)


def _half(raw: Tensor, at: int) -> Tensor:
    """The float16 number at a place of each block, as float32 [block, 1]."""
    return raw[:, at : at + 2].contiguous().view(torch.float16).float()


def _shifts(bits: range | tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(list(bits), dtype=torch.uint8, device=like.device).view(1, -1, 1)


def low_high(raw: Tensor, width: int) -> Tensor:
    """Codes from bytes, `width` at a time: first their lower halves, then their upper ones."""
    return torch.stack([raw.reshape(len(raw), -1, width) & 15, raw.reshape(len(raw), -1, width) >> 4], 2).flatten(1)


def pack_low_high(codes: Tensor, width: int) -> Tensor:
    """The other way."""
    low, high = codes.reshape(len(codes), -1, 2, width).unbind(2)
    return (low | high << 4).flatten(1)


def _bits(raw: Tensor) -> Tensor:
    """Single bits from bytes, lowest first."""
    return (raw.unsqueeze(2) >> _shifts(range(8), raw).view(1, 1, 8) & 1).flatten(1)


def _from_bits(bits: Tensor) -> Tensor:
    return (bits.reshape(len(bits), -1, 8) << _shifts(range(8), bits).view(1, 1, 8)).sum(2, dtype=torch.uint8)


def _k_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Steps and shifts of Q4_K and Q5_K: eight pairs of 6 bits, packed into twelve bytes."""
    first, second, third = raw[:, 4:16].view(-1, 3, 4).unbind(1)
    scale = torch.cat([first & 63, third & 15 | first >> 2 & 48], 1)
    least = torch.cat([second & 63, third >> 4 | second >> 2 & 48], 1)
    return _half(raw, 0) * scale.float(), -(_half(raw, 2) * least.float())
