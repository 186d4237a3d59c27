"""torchao's int4 for GPUs (`Int4WeightOnlyConfig`, packing "tile_packed_to_4d", kernel tinygemm), computed here in tensors.

Everything is bfloat16 there: the weights before they are rounded, step, zero and result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mansu_tl.quantization.asymmetric import AsymmetricGrid
from mansu_tl.quantization.grid import whole_blocks
from mansu_tl.quantization.quantizer import About, register_quantizer

_HALF = 8


@dataclass(frozen=True, eq=False)
class TinygemmGrid(AsymmetricGrid):
    """code = round((w - zero + 8 step) / step) with step = (high - low) / 15 and zero = low + 8 step.

    The value is step (code - 8) + zero. The ends are the block's own smallest and largest weight, so that 0 need not be one
    of the values. A block's scale is [low, high, step, zero], each a bfloat16 number.
    """

    def ends(self, scale: Float[Tensor, "*any_ends"]) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
        """A block's own ends."""
        return scale[..., 0], scale[..., 1]

    def _prepare(self, w: Float[Tensor, "*any"]) -> Float[Tensor, " weight"]:
        return w.reshape(-1).bfloat16()

    def _block(self, w: Tensor) -> int:
        return whole_blocks(self.name, w, super()._block(w))

    def _block_max(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "block 4"]:
        low, high = torch.aminmax(self._prepare(w).view(-1, self._block(w)), dim=1)
        size = ((high - low) / torch.full_like(high, self._last)).clamp(min=torch.finfo(torch.bfloat16).smallest_normal)
        return torch.stack([low, high, size, low + size * _HALF], 1).float()

    def _code(
        self, values: Float[Tensor, " weight"], scale: Float[Tensor, "weight 4"], tail: Int[Tensor, " tail"]
    ) -> UInt8[Tensor, " weight"]:
        size, zero = scale[:, 2].bfloat16(), scale[:, 3].bfloat16()
        return ((values - (zero - size * _HALF)) / size).round().clamp(0, self._last).to(torch.uint8)

    def _value(self, index: Int[Tensor, "*any"], scale: Float[Tensor, " *any_ends"]) -> Float[Tensor, "*any"]:
        size, zero = scale[..., 2].bfloat16(), scale[..., 3].bfloat16()
        return ((index - _HALF).bfloat16() * size + zero).to(scale.dtype)

    def _boundaries(self, index: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        size, least = scale[..., 2], scale[..., 3] - scale[..., 2] * _HALF
        lower, upper = (index - 0.5) * size + least, (index + 0.5) * size + least
        return torch.where(index == 0, -torch.inf, lower), torch.where(index == self._last, torch.inf, upper)

    def _at_end(self, values: Tensor, scale: Tensor) -> Tensor:
        low, high = self.ends(scale)
        return (values <= low) | (values >= high)

    def _inside(self, centre: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        low, high = self.ends(scale)
        return torch.minimum(torch.maximum(centre, low), high).to(dtype)


def int4wo(block_size: int = 128) -> TinygemmGrid:
    """torchao's int4 weight-only format, in groups of `block_size`."""
    return TinygemmGrid(f"int4wo-g{block_size}", torch.arange(16) / 15, block_size)


for _size in (128, 64):
    register_quantizer(
        f"int4wo-g{_size}",
        partial(int4wo, _size),
        "grid",
        about=About(
            "4", str(_size), "bfloat16 step, and zero = least + 8 steps", "torchao Int4WeightOnlyConfig on GPUs"
        ),
    )
