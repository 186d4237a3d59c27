"""What llm-compressor writes and vLLM serves: the formats of compressed-tensors (`calculate_qparams`, `fake_quantize`).

Weights only, rounded to nearest, in the dtype of the model. Each matrix has scales of its own: llm-compressor lets q, k and
v, and gate and up, share nvfp4's scale of the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from mansu_tl.quantization.asymmetric import AsymmetricGrid
from mansu_tl.quantization.grid import whole_blocks
from mansu_tl.quantization.quantizer import About, register_quantizer
from mansu_tl.quantization.stepped import SteppedGrid

_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NVFP4_SMALLEST = 0.125  # what compressed-tensors puts for a block scale of 0


@dataclass(frozen=True, eq=False)
class SymmetricGrid(SteppedGrid):
    """codes -8..7, step = absmax / 7.5: none but a weight at -absmax can have the lowest code."""

    def neighbour(self, codes: UInt8[Tensor, "out in"], direction: Float[Tensor, "out in"]) -> UInt8[Tensor, "out in"]:
        """As in `Grid`; from -7 downward it goes inward."""
        moved = super().neighbour(codes, direction)
        return torch.where((moved == 0) & (codes != 0), 2, moved)

    def _steps(self, absmax: Float[Tensor, " block"]) -> Float[Tensor, " block"]:
        return _not_zero(absmax / torch.full_like(absmax, (len(self.levels) - 1) / 2))


@dataclass(frozen=True, eq=False)
class ZeroPointGrid(AsymmetricGrid):
    """codes -8..7 between the block's ends (0 among them), step = (high - low) / 15, zero point = round(-8 - low / step).

    code = round(w / step + zero point): the zero point is added before rounding, where `AsymmetricGrid` adds it behind. A
    block's scale is [low, high, step, zero point + 8], in the model's dtype.
    """

    def ends(self, scale: Float[Tensor, "*any_ends"]) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
        """A block's own ends."""
        return scale[..., 0], scale[..., 1]

    def _prepare(self, w: Float[Tensor, "*any"]) -> Float[Tensor, " weight"]:
        return w.reshape(-1)

    def _block(self, w: Tensor) -> int:
        return whole_blocks(self.name, w, super()._block(w))

    def _block_max(self, w: Float[Tensor, "out in"]) -> Float32[Tensor, "block 4"]:
        low, high = super()._block_max(w).to(w.dtype).unbind(1)
        half = (self._last + 1) // 2
        size = (high - low) / torch.full_like(high, self._last)
        zero = (-half - low / size).nan_to_num(nan=0.0).clamp(-half, half - 1).round()
        return torch.stack([low, high, _not_zero(size), zero + half], 1).float()

    def _code(
        self, values: Float[Tensor, " weight"], scale: Float32[Tensor, "weight 4"], tail: Int[Tensor, " tail"]
    ) -> UInt8[Tensor, " weight"]:
        size, zero = (part.to(values.dtype) for part in self._affine(scale))
        half = (self._last + 1) // 2
        return ((values / size + (zero - half)).clamp(-half, half - 1).round() + half).to(torch.uint8)

    def _affine(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        return scale[..., 2], scale[..., 3]


@dataclass(frozen=True, eq=False)
class FloatGrid(SteppedGrid):
    """fp8: float8 e4m3, step = absmax / 448."""

    def _steps(self, absmax: Float[Tensor, " block"]) -> Float[Tensor, " block"]:
        return _not_zero(absmax / torch.full_like(absmax, _E4M3_MAX))


@dataclass(frozen=True, eq=False)
class MatrixFloatGrid(FloatGrid):
    """fp8 with one step for the whole matrix."""

    of_matrix: ClassVar[bool] = True

    def _block(self, w: Tensor) -> int:
        return w.numel()


@dataclass(frozen=True, eq=False)
class NvFloatGrid(SteppedGrid):
    """NVFP4: e2m1 in blocks of 16; a block's step is an e4m3 number over the matrix's own scale, 448 * 6 / its absmax."""

    of_matrix: ClassVar[bool] = True

    def _steps(self, absmax: Float[Tensor, " block"]) -> Float[Tensor, " block"]:
        largest = absmax.amax().clamp(min=torch.finfo(absmax.dtype).tiny)
        of_matrix = (_E4M3_MAX * _E2M1_MAX / largest).float()
        scale = of_matrix * (absmax / torch.full_like(absmax, _E2M1_MAX)).float()
        scale = scale.clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn).float()
        return torch.where(scale == 0, _NVFP4_SMALLEST, scale) / of_matrix.expand_as(scale)

    def _code(
        self, values: Float[Tensor, " weight"], scale: Float32[Tensor, "weight 2"], tail: Int[Tensor, " tail"]
    ) -> UInt8[Tensor, " weight"]:
        return super()._code(values.float(), scale, tail)  # the step is float32 there whatever the model is


def mirrored(magnitudes: Float32[Tensor, " level"]) -> Float32[Tensor, " code"]:
    """All levels of a float format from those that are not negative, 0 first; its two zeros are one."""
    return torch.cat([-magnitudes[1:].flip(0), magnitudes])


def w4a16(block_size: int = 128) -> SymmetricGrid:
    """Symmetric int4 of compressed-tensors, in groups of `block_size`."""
    return SymmetricGrid(f"w4a16-g{block_size}", torch.arange(-8, 8).float(), block_size)


def w4a16_asymmetric(block_size: int = 128) -> ZeroPointGrid:
    """Asymmetric int4 of compressed-tensors, in groups of `block_size`."""
    return ZeroPointGrid(f"w4a16-asym-g{block_size}", torch.arange(16) / 15, block_size)


def fp8(per: str = "channel") -> FloatGrid:
    """Float8 e4m3 with a scale a row ("channel") or one for the matrix ("tensor")."""
    finite = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    if per == "tensor":
        return MatrixFloatGrid("fp8-tensor", mirrored(finite), None)
    return FloatGrid("fp8", mirrored(finite), None)


def nvfp4() -> NvFloatGrid:
    """NVIDIA's 4-bit float format."""
    return NvFloatGrid("nvfp4", mirrored(torch.tensor(E2M1)), 16)


def _not_zero(scale: Tensor) -> Tensor:
    """A scale of 0 is the dtype's epsilon there, so that a block of zeros encodes to zeros."""
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


_LLM_COMPRESSOR = "vLLM, llm-compressor (compressed-tensors)"
register_quantizer(
    "w4a16-g128",
    w4a16,
    "grid",
    about=About("4", "128", "absmax / 7.5 in the model's dtype", f"{_LLM_COMPRESSOR}; GPTQ's"),
)
register_quantizer(
    "w4a16-asym-g128",
    w4a16_asymmetric,
    "grid",
    about=About("4", "128", "range / 15 in the model's dtype, int4 zero point", f"{_LLM_COMPRESSOR}; AWQ's"),
)
register_quantizer("fp8", fp8, "grid", about=About("8", "row", "absmax / 448 in the model's dtype", _LLM_COMPRESSOR))
register_quantizer(
    "fp8-tensor",
    partial(fp8, "tensor"),
    "grid",
    about=About("8", "matrix", "absmax / 448 in the model's dtype", _LLM_COMPRESSOR),
)
register_quantizer(
    "nvfp4",
    nvfp4,
    "grid",
    about=About("4", "16", "e4m3, under one float32 for the matrix", f"{_LLM_COMPRESSOR}, TensorRT on Blackwell"),
)
