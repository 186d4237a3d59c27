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
    """GPTQ on a blockwise grid, in its paper's plain order unless told otherwise.

    Columns (in-features) go from the first to the last. Each is rounded to the grid under the scale of its group,
    which is measured when the group begins, on weights that hold the corrections so far (`groupsize` of the paper's
    code). Its error over the pivot then moves all later columns along the upper Cholesky factor of the inverse
    Hessian H^-1, H = E[x x^T] + damping * mean(diag E[x x^T]) * I. No activation quantization, no packing. Ours:
    groups end with the row (a row that is no multiple of the group has a shorter last group, where plain rounding
    crosses rows), and a feature that is always 0 is rounded to nearest, not set to 0. With a diagonal Hessian it is
    round-to-nearest.

    Attributes:
        grid: codes and group size.
        damping: see above; the paper's code uses 1 %.
        sequential: each layer sees inputs from the layers that are quantized already.
        static_groups: every group's scale is measured before anything is rounded, as llm-compressor does.
        act_order: columns go from the largest diagonal of H to the smallest ("act order"); it needs `static_groups`.
    """

    name: str
    grid: Grid
    damping: float = 0.01
    sequential: bool = True
    static_groups: bool = False
    act_order: bool = False

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise MansuError(f"{self.name}: damping={self.damping}; choose 0 or more (the paper's code has 0.01)")
        if self.act_order and not self.static_groups:
            raise MansuError(f"{self.name}: act_order=True takes columns of all groups in turn; add static_groups=True")

    def roundtrip(self, w: Float[Tensor, "out in"], inputs: Inputs) -> Float[Tensor, "out in"]:
        """Q(w), in the dtype of `w`.

        Raises:
            MansuError: a Hessian that is not positive definite.
        """
        order = torch.arange(w.shape[1], device=w.device)
        if self.act_order:
            order = inputs.moment.diagonal().argsort(descending=True)
        factor = self._inverse_factor(inputs.moment[order][:, order])
        left, result = w.float()[:, order], torch.empty_like(w, dtype=torch.float32)
        group = self.grid.block_size or w.shape[1]
        before = [self._scales(part) for part in w.float().split(group, 1)] if self.static_groups else []
        groups = (order // group).tolist()
        for first in range(0, w.shape[1], group):
            last = min(first + group, w.shape[1])
            reached = torch.empty(0) if before else self._scales(left[:, first:last])
            errors = torch.empty(w.shape[0], last - first, device=w.device)
            for column in range(first, last):
                scales = before[groups[column]] if before else reached
                value = left[:, column]
                rounded = self.grid.flat_centre(self.grid.flat_codes(value, scales), scales)
                result[:, order[column]] = rounded
                error = (value - rounded) / factor[column, column]
                left[:, column:last] -= error[:, None] * factor[column, column:last]
                errors[:, column - first] = error
            left[:, last:] -= errors @ factor[first:last, last:]
        return result.to(w.dtype)

    def _scales(self, part: Float[Tensor, "out some"]) -> Float[Tensor, " out *ends"]:
        """One scale a row for some of its columns."""
        return replace(self.grid, block_size=None).encode(part.contiguous()).absmax

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


def gptq(grid: Grid | None = None, *, act_order: bool = False) -> Gptq:
    """GPTQ on a grid, int4 with groups of 64 unless another is given; `act_order` with scales that are measured before."""
    grid = grid or int4()
    return Gptq(f"gptq-{'act-' * act_order}{grid.name}", grid, static_groups=act_order, act_order=act_order)


_OURS = "nobody: GPTQ on a grid of ours"
for _name, _make, *_about in (
    ("gptq-int4-g64", gptq, "4", "64", "float32 absmax, / 7", _OURS),
    ("gptq-int4-g128", lambda: gptq(int4(128)), "4", "128", "float32 absmax, / 7", _OURS),
    ("gptq-w4a16-g128", lambda: gptq(w4a16()), "4", "128", "absmax / 7.5", "AutoGPTQ, GPTQModel without act order"),
    (
        "gptq-act-w4a16-g128",
        lambda: gptq(w4a16(), act_order=True),
        "4",
        "128",
        "absmax / 7.5, measured before",
        "llm-compressor, its default; AutoGPTQ desc_act with static_groups",
    ),
):
    register_quantizer(_name, _make, "calibrated", about=About(*_about))
