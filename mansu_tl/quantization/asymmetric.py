"""Evenly spaced grids between the smallest and the largest weight of each block: round to nearest, with a zero point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.quantization.grid import Grid, step


@dataclass(frozen=True, eq=False)
class AsymmetricGrid(Grid):
    """Codes 0..n between a block's ends low = min(0, smallest weight) and high = max(0, largest weight).

    step = (high - low) / n, zero point z = -round(low / step), code = clamp(round(w / step) + z, 0, n), value
    (code - z) * step: the affine quantization of torchao, GPTQ (arXiv 2210.17323) and others; zero is always one of
    the values. A block's scale is the pair of its ends, so that "absmax" is [block, 2] here, and the weights that
    carry it are those that lie on an end other than 0.

    Attributes:
        levels: the codes' places between the ends, 0 to 1, before the zero point is rounded.
    """

    def ends(self, scale: Float[Tensor, "*any_ends"]) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
        """A block's own ends."""
        low, high = scale.unbind(-1)
        return low, high

    def _code(
        self, values: Float32[Tensor, " weight"], scale: Float32[Tensor, " weight *ends"], tail: Int[Tensor, " tail"]
    ) -> UInt8[Tensor, " weight"]:
        if scale.ndim != 2:
            raise MansuError(f"{self.name}: a block has two ends, low and high; pass the scales as [weight, 2]")
        size, zero = self._affine(scale)
        inside = values.clamp(scale[:, 0], scale[:, 1])
        unit = (inside * (1.0 / size)).nan_to_num(nan=0.0)  # 0 * infinity in a block of zeros
        return (unit.round() + zero).clamp(0, self._last).to(torch.uint8)

    def _absmax(self, w: Float[Tensor, "out in"]) -> Float32[Tensor, " block *ends"]:
        return self._block_max(w)

    def _block_max(self, w: Float[Tensor, "out in"]) -> Float32[Tensor, " block *ends"]:
        values, tail = self._prepare(w), self._tail(w)
        parts = [values[:tail].view(-1, self._block(w)), values[tail:].view(1, -1)]
        ends = [torch.stack(torch.aminmax(part, dim=1), 1) for part in parts if part.numel()]
        return torch.cat(ends).clamp(
            min=torch.tensor([-torch.inf, 0.0], device=w.device), max=torch.tensor([0.0, torch.inf], device=w.device)
        )

    def _value(self, index: Int[Tensor, "*any"], scale: Float[Tensor, " *any_ends"]) -> Float[Tensor, "*any"]:
        # The step is a float32 number whatever it is multiplied in.
        size, zero = self._affine(scale.float())
        return (index - zero).to(scale.dtype) * size.to(scale.dtype)

    def _cell(self, index: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.ends(scale)
        lower, upper = self._boundaries(index, scale)
        # A zero point rounded on a tie may leave an outermost boundary beyond the end.
        return torch.maximum(lower, low).minimum(high), torch.minimum(upper, high).maximum(low)

    def _width(self, index: Tensor, scale: Tensor) -> Tensor:
        lower, upper = self._cell(index, scale)
        return upper - lower

    def _boundaries(self, index: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        size, zero = self._affine(scale)
        place = index - zero
        lower, upper = (place - 0.5) * size, (place + 0.5) * size
        return torch.where(index == 0, -torch.inf, lower), torch.where(index == self._last, torch.inf, upper)

    def _at_end(self, values: Tensor, scale: Tensor) -> Tensor:
        low, high = self.ends(scale)
        # An end of 0 is given, not carried: no weight lies beyond it, and none may.
        below = torch.where(low < 0, values <= low, values < low)
        return below | torch.where(high > 0, values >= high, values > high)

    def _inside(self, centre: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        low, high = self.ends(scale)
        value = torch.minimum(torch.maximum(centre, low), high).to(dtype)
        value = torch.where((value.double() >= high) & (high > 0), step(value, torch.full_like(high, -1)), value)
        return torch.where((value.double() <= low) & (low < 0), step(value, torch.ones_like(low)), value)

    @property
    def _last(self) -> int:
        return len(self.levels) - 1

    def _affine(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Step and zero point."""
        low, high = scale.unbind(-1)
        # By a tensor: a GPU multiplies by a Python number's reciprocal instead, another step in the last bit.
        size = (high - low) / torch.full_like(high, self._last)
        zero = -(low / size).nan_to_num(nan=0.0).round()
        return size, zero.clamp(0, self._last)
