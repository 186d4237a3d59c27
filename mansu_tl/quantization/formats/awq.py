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
    no weight clipping. With one matrix behind a norm it is AutoAWQ's search.

    Attributes:
        grid: codes and group size.
        exponents: the values of a that are tried.
        sequential: False; inputs are those of the full-precision model.
        duo: s_j = (E|x_j|)^a / (m_j^(1 - a) + 1e-4), m_j = the mean over rows of |w_j| in units of the largest of its
            group: the default of AutoAWQ and llm-compressor (`duo_scaling`), where a = 0 is not round-to-nearest.
    """

    name: str
    grid: Grid
    exponents: tuple[float, ...] = tuple(i / 20 for i in range(20))
    sequential: bool = False
    duo: bool = False

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
        share = self._share(dense) if self.duo else None
        for exponent in self.exponents:
            scale = self._scale(inputs.magnitude, exponent, share)
            rounded = self.grid.roundtrip(dense * scale) / scale
            errors[exponent] = float(inputs.error(rounded - dense))
            if errors[exponent] == min(errors.values()) and list(errors.values()).count(errors[exponent]) == 1:
                best, chosen = rounded, exponent
        return best.to(w.dtype), chosen, errors

    def _scale(
        self, magnitude: Float[Tensor, " in"], exponent: float, share: Float[Tensor, " in"] | None
    ) -> Float[Tensor, " in"]:
        scale = magnitude.pow(exponent)
        if share is not None:
            scale = scale / (share.pow(1 - exponent) + 1e-4)
        # The paper's code keeps features that are nearly always 0 from vanishing in the same way.
        scale = scale.clamp(min=1e-4)
        return scale / (scale.max() * scale.min()).sqrt()

    def _share(self, w: Float[Tensor, "out in"]) -> Float[Tensor, " in"]:
        """What part each feature's weights are of the largest in their group, its mean over rows."""
        groups = w.abs().split(self.grid.block_size or w.shape[1], 1)
        return torch.cat([part / (part.amax(1, keepdim=True) + 1e-6) for part in groups], 1).mean(0)


def awq(grid: Grid | None = None, *, duo: bool = False) -> Awq:
    """AWQ on a grid, int4 with groups of 64 unless another is given."""
    grid = grid or int4()
    return Awq(f"awq-{'duo-' * duo}{grid.name}", grid, duo=duo)


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
        "AutoAWQ without duo_scaling",
    ),
    (
        "awq-duo-int4-asym-g128",
        lambda: awq(int4_asymmetric(128), duo=True),
        "4",
        "128",
        "range / 15, int4 zero point",
        "AutoAWQ, its default without clipping",
    ),
):
    register_quantizer(_name, _make, "calibrated", about=About(*_about))
