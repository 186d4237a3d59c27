"""AWQ (Lin et al. 2024, arXiv 2306.00978): scale up the features that large activations meet, then round."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.quantization.formats.grids import int4, int4_asymmetric
from mansu_tl.quantization.grid import Grid
from mansu_tl.quantization.quantizer import About, CalibratedQuantizer, Inputs, register_quantizer


@dataclass(frozen=True, eq=False)
class Awq(CalibratedQuantizer):
    """AWQ's scale search on a blockwise grid: Q(w) = round(w s) / s with s_j = (E|x_j|)^a.

    s is divided by sqrt(max s * min s), and a runs over 0, 1/20, ..., 19/20 as in the paper's code; the least output
    error on the calibration text wins, the smaller a on a tie. At a = 0 it is round-to-nearest. Ours: every matrix
    has its own s (a deployment folds s into what comes before, so that q, k, v share one, as gate and up do), the
    error is the matrix's own E|dW x|^2, exact from the second moment, instead of the attention block's, and there is
    no weight clipping.

    Attributes:
        grid: codes and group size.
        exponents: the values of a that are tried.
        sequential: False; inputs are those of the full-precision model.
    """

    name: str
    grid: Grid
    exponents: tuple[float, ...] = tuple(i / 20 for i in range(20))
    sequential: bool = False

    def __post_init__(self) -> None:
        if not self.exponents or not all(0 <= a <= 1 for a in self.exponents):
            raise MansuError(f"{self.name}: exponents={self.exponents}; give some between 0 and 1")

    def roundtrip(self, w: Float[Tensor, "out in"], inputs: Inputs) -> Float[Tensor, "out in"]:
        """Q(w) at the best exponent, in the dtype of `w`."""
        return self.search(w, inputs)[0]

    def search(
        self, w: Float[Tensor, "out in"], inputs: Inputs
    ) -> tuple[Float[Tensor, "out in"], float, dict[float, float]]:
        """Q(w) at the best exponent, that exponent, and every exponent's output error E|dW x|^2."""
        dense = w.float()
        errors: dict[float, float] = {}
        best, chosen = torch.empty(0), 0.0
        for exponent in self.exponents:
            scale = self._scale(inputs.magnitude, exponent)
            rounded = self.grid.roundtrip(dense * scale) / scale
            errors[exponent] = float(inputs.error(rounded - dense))
            if errors[exponent] == min(errors.values()) and list(errors.values()).count(errors[exponent]) == 1:
                best, chosen = rounded, exponent
        return best.to(w.dtype), chosen, errors

    def _scale(self, magnitude: Float[Tensor, " in"], exponent: float) -> Float[Tensor, " in"]:
        # The paper's code keeps features that are nearly always 0 from vanishing in the same way.
        scale = magnitude.pow(exponent).clamp(min=1e-4)
        return scale / (scale.max() * scale.min()).sqrt()


def awq(grid: Grid | None = None) -> Awq:
    """AWQ on a grid, int4 with groups of 64 unless another is given."""
    grid = grid or int4()
    return Awq(f"awq-{grid.name}", grid)


_OURS = "nobody: AWQ on a grid of ours"
for _name, _make, *_about in (
    ("awq-int4-g64", awq, "4", "64", "float32 absmax, / 7", _OURS),
    ("awq-int4-g128", lambda: awq(int4(128)), "4", "128", "float32 absmax, / 7", _OURS),
    (
        "awq-int4-asym-g128",
        lambda: awq(int4_asymmetric(128)),
        "4",
        "128",
        "range / 15, int4 zero point",
        "AutoAWQ's grid",
    ),
):
    register_quantizer(_name, _make, "calibrated", about=About(*_about))
