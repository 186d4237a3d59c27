"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): round column by column, let later columns make up for the errors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.quantization.formats.compressed import w4a16
from mansu_tl.quantization.formats.grids import int4
from mansu_tl.quantization.grid import Grid
from mansu_tl.quantization.quantizer import About, CalibratedQuantizer, Inputs, register_quantizer


@dataclass(frozen=True, eq=False)
class Gptq(CalibratedQuantizer):
    """GPTQ on a blockwise grid, in its paper's plain order.

    Columns (in-features) go from the first to the last. Each is rounded to the grid under the scale of its group,
    which is measured when the group begins, on weights that hold the corrections so far (`groupsize` of the paper's
    code). Its error over the pivot then moves all later columns along the upper Cholesky factor of the inverse
    Hessian H^-1, H = E[x x^T] + damping * mean(diag E[x x^T]) * I. No column reordering ("act order"), no activation
    quantization, no packing. Ours: groups end with the row (a row that is no multiple of the group has a shorter last
    group, where plain rounding crosses rows), and a feature that is always 0 is rounded to nearest, not set to 0.
    With a diagonal Hessian it is round-to-nearest.

    Attributes:
        grid: codes and group size.
        damping: see above; the paper's code uses 1 %.
        sequential: each layer sees inputs from the layers that are quantized already.
    """

    name: str
    grid: Grid
    damping: float = 0.01
    sequential: bool = True

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise MansuError(f"{self.name}: damping={self.damping}; choose 0 or more (the paper's code has 0.01)")

    def roundtrip(self, w: Float[Tensor, "out in"], inputs: Inputs) -> Float[Tensor, "out in"]:
        """Q(w), in the dtype of `w`.

        Raises:
            MansuError: a Hessian that is not positive definite.
        """
        factor = self._inverse_factor(inputs.moment)
        left, result = w.float().clone(), torch.empty_like(w, dtype=torch.float32)
        rowwise = replace(self.grid, block_size=None)
        group = self.grid.block_size or w.shape[1]
        for first in range(0, w.shape[1], group):
            last = min(first + group, w.shape[1])
            scales = rowwise.encode(left[:, first:last].contiguous()).absmax
            errors = torch.empty(w.shape[0], last - first, device=w.device)
            for column in range(first, last):
                value = left[:, column]
                rounded = self.grid.flat_centre(self.grid.flat_codes(value, scales), scales)
                result[:, column] = rounded
                error = (value - rounded) / factor[column, column]
                left[:, column:last] -= error[:, None] * factor[column, column:last]
                errors[:, column - first] = error
            left[:, last:] -= errors @ factor[first:last, last:]
        return result.to(w.dtype)

    def _inverse_factor(self, moment: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
        """The upper triangular U with U^T U = H^-1."""
        diagonal = moment.diagonal()
        hessian = moment + torch.diag(torch.where(diagonal == 0, 1.0, self.damping * diagonal.mean()))
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if failed:
            raise MansuError(
                f"{self.name}: the inputs' second moment is not positive definite under damping={self.damping}; "
                "raise the damping or pass more calibration text"
            )
        return upper


def gptq(grid: Grid | None = None) -> Gptq:
    """GPTQ on a grid, int4 with groups of 64 unless another is given."""
    grid = grid or int4()
    return Gptq(f"gptq-{grid.name}", grid)


_OURS = "nobody: GPTQ on a grid of ours"
for _name, _make, *_about in (
    ("gptq-int4-g64", gptq, "4", "64", "float32 absmax, / 7", _OURS),
    ("gptq-int4-g128", lambda: gptq(int4(128)), "4", "128", "float32 absmax, / 7", _OURS),
    ("gptq-w4a16-g128", lambda: gptq(w4a16()), "4", "128", "absmax / 7.5", "GPTQModel, AutoGPTQ, llm-compressor"),
):
    register_quantizer(_name, _make, "calibrated", about=About(*_about))
