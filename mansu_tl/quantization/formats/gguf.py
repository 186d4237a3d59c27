"""The block formats of GGUF with one scale or two for 32 weights, rounded as llama.cpp rounds (`gguf.quants`, ggml-quants.c).

Codes are chosen under the scale in float32 and decoded under the same scale in float16, as the file keeps it. Blocks run
along rows, whose length has to be a multiple of 32. A model that came from a file has a grid of its own: quantizer "gguf".
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.quantization.grid import Grid, step
from mansu_tl.quantization.quantizer import About, register_quantizer

_BLOCK = 32


@dataclass(frozen=True, eq=False)
class _GgufGrid(Grid):
    """What these formats share: blocks that do not cross rows."""

    def _block(self, w: Tensor) -> int:
        if w.shape[-1] % _BLOCK:
            raise MansuError(
                f"{self.name}: rows of {w.shape[-1]} weights; GGUF blocks hold {_BLOCK}, choose another quantizer"
            )
        return _BLOCK

    @property
    def _last(self) -> int:
        return len(self.levels) - 1

    def _absmax(self, w: Float[Tensor, "out in"]) -> Float32[Tensor, " block *ends"]:
        return self._block_max(w)

    def _cell(self, index: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.ends(scale)
        lower, upper = self._boundaries(index, scale)
        return torch.maximum(lower, low), torch.minimum(upper, high)

    def _width(self, index: Tensor, scale: Tensor) -> Tensor:
        lower, upper = self._cell(index, scale)
        return (upper - lower).clamp(min=0)

    def _boundaries(self, index: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        size, zero = self._step(scale), self._zero(scale)
        lower, upper = zero + (index - 0.5) * size, zero + (index + 0.5) * size
        return torch.where(index == 0, -torch.inf, lower), torch.where(index == self._last, torch.inf, upper)

    def _inside(self, centre: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        low, high = self.ends(scale)
        value = torch.minimum(torch.maximum(centre, low), high).to(dtype)
        value = torch.where(value.double() >= high, step(value, torch.full_like(high, -1)), value)
        return torch.where(value.double() <= low, step(value, torch.ones_like(low)), value)

    def _at_end(self, values: Tensor, scale: Tensor) -> Tensor:
        low, high = self.ends(scale)
        return (values <= low) | (values >= high)

    @abstractmethod
    def _step(self, scale: Tensor) -> Tensor:
        """The width of one code, before it is rounded to float16."""

    @abstractmethod
    def _zero(self, scale: Tensor) -> Tensor:
        """The place of code 0."""


@dataclass(frozen=True, eq=False)
class OneScaleGrid(_GgufGrid):
    """Q4_0 and Q5_0: the weight of largest magnitude, with its sign, gets the outermost code.

    step = that weight / -n, file code = trunc(w / step + n + 1/2), value = float16(step) (code - n), for 2n codes. Where
    that weight is positive the file counts downward; codes here always count upward.
    """

    def _block_max(self, w: Float[Tensor, "out in"]) -> Float32[Tensor, " block"]:
        blocks = self._prepare(w).view(-1, self._block(w))
        return blocks.gather(1, blocks.abs().max(1, keepdim=True).indices).squeeze(1)

    def _code(
        self, values: Float32[Tensor, " weight"], scale: Float32[Tensor, " weight"], tail: Int[Tensor, " tail"]
    ) -> UInt8[Tensor, " weight"]:
        size = scale / -self._half
        code = (values * torch.where(size == 0, 0.0, 1 / size) + (self._half + 0.5)).trunc().clamp(0, self._last)
        return self._turned(code, scale).to(torch.uint8)

    def _value(self, index: Int[Tensor, "*any"], scale: Float[Tensor, " *any"]) -> Float[Tensor, "*any"]:
        size = (scale.float() / -self._half).half().to(scale.dtype)
        return size * (self._turned(index, scale) - self._half).to(scale.dtype)

    def ends(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Grid`."""
        return -scale.abs(), scale.abs()

    def _step(self, scale: Tensor) -> Tensor:
        return scale.abs() / self._half

    def _zero(self, scale: Tensor) -> Tensor:
        return -self._step(scale) * torch.where(scale > 0, self._half - 1, self._half)

    @property
    def _half(self) -> int:
        return len(self.levels) // 2

    def _turned(self, code: Tensor, scale: Tensor) -> Tensor:
        """From codes that count upward to those of the file, or back."""
        return torch.where(scale > 0, self._last - code, code)


@dataclass(frozen=True, eq=False)
class TwoScaleGrid(_GgufGrid):
    """Q4_1 and Q5_1: codes 0..n between a block's smallest and largest weight.

    step = (largest - smallest) / n, code = trunc((w - smallest) / step + 1/2), value = float16(step) code +
    float16(smallest). The scale of a block is the pair of its ends.
    """

    def _block_max(self, w: Float[Tensor, "out in"]) -> Float32[Tensor, "block 2"]:
        return torch.stack(torch.aminmax(self._prepare(w).view(-1, self._block(w)), dim=1), 1)

    def _code(
        self, values: Float32[Tensor, " weight"], scale: Float32[Tensor, "weight 2"], tail: Int[Tensor, " tail"]
    ) -> UInt8[Tensor, " weight"]:
        size = self._step(scale)
        unit = (values - scale[:, 0]) * torch.where(size == 0, 0.0, 1 / size) + 0.5
        return unit.trunc().clamp(0, self._last).to(torch.uint8)

    def _value(self, index: Int[Tensor, "*any"], scale: Float[Tensor, " *any_ends"]) -> Float[Tensor, "*any"]:
        size, low = self._step(scale.float()).half().float(), scale[..., 0].half().float()
        return (size * index.float() + low).to(scale.dtype)

    def ends(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Grid`."""
        low, high = scale.unbind(-1)
        return low, high

    def _step(self, scale: Tensor) -> Tensor:
        low, high = scale.unbind(-1)
        # By a tensor: a GPU multiplies by a Python number's reciprocal instead, another step in the last bit.
        return (high - low) / torch.full_like(high, self._last)

    def _zero(self, scale: Tensor) -> Tensor:
        return scale[..., 0]


@dataclass(frozen=True, eq=False)
class EightBitGrid(_GgufGrid):
    """Q8_0: 255 codes, step = absmax / 127, a tie goes away from zero."""

    def _code(
        self, values: Float32[Tensor, " weight"], scale: Float32[Tensor, " weight"], tail: Int[Tensor, " tail"]
    ) -> UInt8[Tensor, " weight"]:
        size = self._step(scale)
        unit = values * torch.where(size == 0, 0.0, 1 / size)
        whole = unit.abs().floor()
        away = whole + (2 * (unit.abs() - whole)).floor()
        return (unit.sign() * away + self._last // 2).clamp(0, self._last).to(torch.uint8)

    def _value(self, index: Int[Tensor, "*any"], scale: Float[Tensor, " *any"]) -> Float[Tensor, "*any"]:
        return (index - self._last // 2).to(scale.dtype) * self._step(scale.float()).half().to(scale.dtype)

    def _step(self, scale: Tensor) -> Tensor:
        return scale / torch.full_like(scale, self._last // 2)

    def _zero(self, scale: Tensor) -> Tensor:
        return -scale


_KINDS = {
    "q4_0": (OneScaleGrid, 16),
    "q4_1": (TwoScaleGrid, 16),
    "q5_0": (OneScaleGrid, 32),
    "q5_1": (TwoScaleGrid, 32),
    "q8_0": (EightBitGrid, 255),
}


def gguf_grid(kind: str) -> Grid:
    """The grid of a GGUF block format: "q4_0", "q4_1", "q5_0", "q5_1" or "q8_0".

    Raises:
        MansuError: another format; those with nested scales have a grid only in a file.
    """
    if kind not in _KINDS:
        raise MansuError(f"GGUF format {kind!r}: no grid without a file; choose one of {', '.join(_KINDS)}")
    make, codes = _KINDS[kind]
    return make(f"gguf-{kind}", torch.arange(codes) / (codes - 1), _BLOCK)


_ONE, _TWO, _USED_BY = "float16 step", "float16 step and minimum", "llama.cpp, Ollama, LM Studio"
for _kind, _scale in {"q4_0": _ONE, "q4_1": _TWO, "q5_0": _ONE, "q5_1": _TWO, "q8_0": _ONE}.items():
    register_quantizer(
        f"gguf-{_kind}", partial(gguf_grid, _kind), "grid", about=About(_kind[1], str(_BLOCK), _scale, _USED_BY)
    )
