"""Double quantization as bitsandbytes does it (QLoRA, arXiv 2305.14314, section 3): the scales are quantized too."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float32, UInt8
from torch import Tensor

from mansu_tl.models import library as bnb
from mansu_tl.quantization.grid import Grid

_NESTED_BLOCK = 256


@dataclass(frozen=True, eq=False)
class DoubleGrid(Grid):
    """A grid whose codes are decoded with 8-bit scales; codes, cells, widths and the floor stay those of `Grid`.

    Codes are taken under the true absmax, as in the library, so that a floor or a certificate for the plain grid holds
    for this one. The mean absmax of the matrix is subtracted before its scales are quantized: where an edit moves one
    absmax, nearly every value of the matrix moves a little (none does if all are held, as the floor does).
    """

    def centre(
        self, codes: UInt8[Tensor, "out in"], absmax: Float32[Tensor, " block *ends"]
    ) -> Float32[Tensor, "out in"]:
        """Each code's value under its block's quantized scale, in weight units."""
        return super().centre(codes, nested(absmax))


def doubled(grid: Grid) -> DoubleGrid:
    """The grid with double quantization, under its name with "-dq" behind it."""
    return DoubleGrid(f"{grid.name}-dq", grid.levels, grid.block_size)


def nested(absmax: Float32[Tensor, " block"]) -> Float32[Tensor, " block"]:
    """What 8-bit dynamic quantization in blocks of 256, after the mean is taken off, leaves of the scales.

    By bitsandbytes' own kernel for the device: the one for CPU (0.50.2) looks codes up in a table of 65,536 entries
    and so takes the next-nearest code for about .1 % of the scales, where the one for CUDA takes the nearest.
    """
    offset = absmax.mean()
    codes, state = bnb.functional.quantize_blockwise(absmax - offset, blocksize=_NESTED_BLOCK)
    return bnb.functional.dequantize_blockwise(codes, state) + offset
