"""The grids: a format is its levels, its block size and how its scales are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from mansu_tl.models import library as bnb
from mansu_tl.quantization.asymmetric import AsymmetricGrid
from mansu_tl.quantization.grid import Grid
from mansu_tl.quantization.quantizer import About, register_quantizer

# bitsandbytes.functional.get_4bit_type("nf4"), 0.50.2
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Magnitudes of bitsandbytes.functional.get_4bit_type("fp4"), 0.50.2, in twelfths.
_FP4_TWELFTHS = (0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
_NESTED_BLOCK = 256


@dataclass(frozen=True, eq=False)
class UniformGrid(Grid):
    """Codes -n..n of absmax / n each, counted from 0 here; a tie goes to the even one (`torch.round`)."""

    @property
    def steps(self) -> int:
        """n, the largest code's magnitude."""
        return len(self.levels) // 2

    def _code(
        self, values: Float32[Tensor, " weight"], scale: Float32[Tensor, " weight *ends"], tail: Int[Tensor, " tail"]
    ) -> UInt8[Tensor, " weight"]:
        unit = (values * (self.steps / scale)).nan_to_num(nan=0.0)  # 0 * infinity in a block of zeros
        return (unit.round().clamp(-self.steps, self.steps) + self.steps).to(torch.uint8)

    def _absmax(self, w: Tensor) -> Float32[Tensor, " block"]:
        return self._block_max(w)


@dataclass(frozen=True, eq=False)
class Int8Grid(UniformGrid):
    """The weight half of LLM.int8 (arXiv 2208.07339): row-wise absmax on weights that were cast to float16 first.

    As `bnb.nn.Linear8bitLt` does. A deployed LLM.int8 model also rounds activations to int8, except for outlier
    features; that is not part of this grid.
    """

    def _prepare(self, w: Float[Tensor, "*any"]) -> Float32[Tensor, " weight"]:
        return w.reshape(-1).half().float()

    def _value(self, index: Int[Tensor, "*any"], scale: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        if scale.dtype != torch.float32:
            return super()._value(index, scale)
        return (index.float() - self.steps) * scale * (1 / 127)  # in the order in which bitsandbytes multiplies


@dataclass(frozen=True, eq=False)
class DoubleGrid(Grid):
    """A grid with double quantization as bitsandbytes does it (QLoRA, arXiv 2305.14314, section 3): 8-bit scales.

    Codes are taken under the true absmax, as in the library, so that a floor or a certificate for the plain grid holds
    for this one. The mean absmax of the matrix is subtracted before its scales are quantized: where an edit moves one
    absmax, nearly every value of the matrix moves a little (none does if all are held, as the floor does).
    """

    def centre(
        self, codes: UInt8[Tensor, "out in"], absmax: Float32[Tensor, " block *ends"]
    ) -> Float32[Tensor, "out in"]:
        """Each code's value under its block's quantized scale, in weight units.

        By bitsandbytes' own kernel for the device: the one for CPU (0.50.2) looks codes up in a table of 65,536 entries
        and so takes the next-nearest code for about .1 % of the scales, where the one for CUDA takes the nearest.
        """
        offset = absmax.mean()
        eight_bit, state = bnb.functional.quantize_blockwise(absmax - offset, blocksize=_NESTED_BLOCK)
        return super().centre(codes, bnb.functional.dequantize_blockwise(eight_bit, state) + offset)


def nf4(block_size: int = 64) -> Grid:
    """NormalFloat4 as bitsandbytes quantizes to it (QLoRA, arXiv 2305.14314); in blocks of 64 unless set otherwise."""
    return Grid("nf4" if block_size == 64 else f"nf4-{block_size}", torch.tensor(_NF4), block_size)


def fp4(block_size: int = 64) -> Grid:
    """4-bit floating point, bitsandbytes' default: 15 codes, since its two zeros (+0, -0) decode to the same value."""
    positive = torch.tensor(_FP4_TWELFTHS) / 12
    levels = torch.cat([-positive.flip(0), torch.zeros(1), positive])
    return Grid("fp4" if block_size == 64 else f"fp4-{block_size}", levels, block_size)


def doubled(grid: Grid) -> DoubleGrid:
    """The grid with double quantization, under its name with "-dq" behind it."""
    return DoubleGrid(f"{grid.name}-dq", grid.levels, grid.block_size)


def int4(block_size: int = 64) -> UniformGrid:
    """Symmetric int4 of our own: codes -7..7, step = absmax / 7, one a group of `block_size` consecutive in-features.

    Nobody ships it: the symmetric int4 of GPTQ and compressed-tensors has codes -8..7 and steps of absmax / 7.5
    ("w4a16-g128"). Earlier results were measured under it.
    """
    return UniformGrid(f"int4-g{block_size}", _evenly(7), block_size)


def int3(block_size: int = 64) -> UniformGrid:
    """Symmetric int3: codes -3..3, one scale a group."""
    return UniformGrid(f"int3-g{block_size}", _evenly(3), block_size)


def int8() -> Int8Grid:
    """The LLM.int8 weight grid: 255 codes, one scale a row."""
    return Int8Grid("int8", _evenly(127), None)


def int4_asymmetric(block_size: int = 64) -> AsymmetricGrid:
    """Asymmetric int4: 16 codes between a group's smallest and largest weight, with a zero point."""
    return AsymmetricGrid(f"int4-asym-g{block_size}", torch.arange(16) / 15, block_size)


def _evenly(steps: int) -> Float32[Tensor, " code"]:
    """The 2 * steps + 1 values from -1 to 1."""
    return torch.arange(-steps, steps + 1) / steps


_ABSMAX, _BNB, _NOBODY = "float32 absmax", "bitsandbytes", "nobody: ours, see w4a16-g128"
_NESTED = "8-bit absmax, float32 for 256 of them"
for _name, _make, *_about in (
    ("nf4", nf4, "4", "64", _ABSMAX, f"{_BNB} load_in_4bit, QLoRA"),
    ("nf4-128", lambda: nf4(128), "4", "128", _ABSMAX, _BNB),
    ("nf4-32", lambda: nf4(32), "4", "32", _ABSMAX, _BNB),
    ("nf4-dq", lambda: doubled(nf4()), "4", "64", _NESTED, f"{_BNB}, QLoRA with double quantization"),
    ("nf4-128-dq", lambda: doubled(nf4(128)), "4", "128", _NESTED, _BNB),
    ("fp4", fp4, "4", "64", _ABSMAX, f"{_BNB}, its default"),
    ("int8", int8, "8", "row", _ABSMAX, f"{_BNB} load_in_8bit, its weights"),
    ("int4-g64", int4, "4", "64", "float32 absmax, / 7", _NOBODY),
    ("int4-g128", lambda: int4(128), "4", "128", "float32 absmax, / 7", _NOBODY),
    ("int4-asym-g64", int4_asymmetric, "4", "64", "float32 range / 15, int4 zero point", "torchao's affine int4"),
    (
        "int4-asym-g128",
        lambda: int4_asymmetric(128),
        "4",
        "128",
        "float32 range / 15, int4 zero point",
        "torchao's affine int4",
    ),
    ("int3-g64", int3, "3", "64", "float32 absmax, / 3", "nobody: ours"),
):
    register_quantizer(_name, _make, "grid", about=About(*_about))
