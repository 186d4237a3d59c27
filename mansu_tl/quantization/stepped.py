"""Grids of levels times a step that is worked out from a block's absmax, as compressed-tensors and the OCP have them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Float32, Int, UInt8
from torch import Tensor

from mansu_tl.quantization.grid import Grid, step, whole_blocks


@dataclass(frozen=True, eq=False)
class SteppedGrid(Grid):
    """code = the level nearest to w / step, a tie to the even one; value = level * step.

    A block's scale is the pair [absmax, step], so that "absmax" is [block, 2] here. Blocks do not cross rows. Numbers are
    divided in the dtype of the matrix, as the libraries do, and the step is rounded to it where they keep it so.

    Attributes:
        levels: what each code is worth in steps, ascending; one of them is 0.
    """

    # Whether the scales hang on the whole matrix, so that some of its rows alone do not tell them.
    of_matrix: ClassVar[bool] = False

    def first_rows(self, w: Float[Tensor, "out in"], rows: int) -> Float[Tensor, "rows in"]:
        """As in `Quantizer`, under the scales of the whole matrix."""
        if not self.of_matrix:
            return super().first_rows(w, rows)
        part = w[:rows].contiguous()
        scales = self._block_max(w)[: part.numel() // self._block(part)]
        return self.centre(self.codes(part, scales), scales).to(w.dtype)

    @cached_property
    def _zero(self) -> int:
        return int(self.levels.abs().argmin())

    @abstractmethod
    def _steps(self, absmax: Float[Tensor, " block"]) -> Float[Tensor, " block"]:
        """What a level of 1 is worth in each block."""

    def ends(self, scale: Float[Tensor, "*any_ends"]) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
        """As in `Grid`."""
        return -scale[..., 0], scale[..., 0]

    def _prepare(self, w: Float[Tensor, "*any"]) -> Float[Tensor, " weight"]:
        return w.reshape(-1)

    def _block(self, w: Tensor) -> int:
        return whole_blocks(self.name, w, super()._block(w))

    def _absmax(self, w: Float[Tensor, "out in"]) -> Float32[Tensor, "block 2"]:
        return self._block_max(w)

    def _block_max(self, w: Float[Tensor, "out in"]) -> Float32[Tensor, "block 2"]:
        absmax = self._prepare(w).abs().view(-1, self._block(w)).amax(1)
        return torch.stack([absmax.float(), self._steps(absmax).float()], 1)

    def _code(
        self, values: Float[Tensor, " weight"], scale: Float32[Tensor, "weight 2"], tail: Int[Tensor, " tail"]
    ) -> UInt8[Tensor, " weight"]:
        unit = (values / scale[:, 1].to(values.dtype)).float()
        bounds = self.bounds.to(unit.device)
        code = torch.bucketize(unit, bounds)
        tie = (unit == torch.cat([bounds, bounds.new_full((1,), torch.nan)])[code]) & ((code - self._zero) % 2 == 1)
        return (code + tie).to(torch.uint8)

    def _value(self, index: Int[Tensor, "*any"], scale: Float[Tensor, " *any_ends"]) -> Float[Tensor, "*any"]:
        return self.levels.to(index.device, scale.dtype)[index] * scale[..., 1]

    def _cell(self, index: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.ends(scale)
        lower, upper = self._boundaries(index, scale)
        return torch.maximum(lower, low).minimum(high), torch.minimum(upper, high).maximum(low)

    def _width(self, index: Tensor, scale: Tensor) -> Tensor:
        lower, upper = self._cell(index, scale)
        return upper - lower

    def _boundaries(self, index: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        bounds, open_end = self.bounds.to(index.device, scale.dtype), scale.new_full((1,), torch.inf)
        size = scale[..., 1]
        return torch.cat([-open_end, bounds])[index] * size, torch.cat([bounds, open_end])[index] * size

    def _at_end(self, values: Tensor, scale: Tensor) -> Tensor:
        return values.abs() >= scale[..., 0]

    def _inside(self, centre: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        low, high = self.ends(scale)
        value = torch.minimum(torch.maximum(centre, low), high).to(dtype)
        return torch.where(value.double().abs() >= high, step(value, -value), value)

    def _place(
        self,
        start: Float[Tensor, " moved"],
        old: UInt8[Tensor, " moved"],
        target: UInt8[Tensor, " moved"],
        scale: Float32[Tensor, "moved 2"],
        in_tail: Bool[Tensor, " moved"],
    ) -> tuple[Float[Tensor, " moved"], Bool[Tensor, " moved"]]:
        """The outermost level may lie beyond the absmax: no weight of that block can reach it."""
        value, lost = super()._place(start, old, target, scale, in_tail)
        return value, lost | (value.double().abs() > scale[:, 0].double())
