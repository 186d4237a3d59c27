"""A blockwise absmax quantizer with a fixed codebook, as tensors: codes, cells, widths and the floor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Float32, Int, Shaped, UInt8
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.quantization.quantizer import AnyQuantizer, Quantizer, quantizer, quantizers

# bitsandbytes divides by nothing smaller than this, so that a block of zeros encodes to zeros.
_SMALLEST_SCALE = 1e-38
_MOST_STEPS = 64


@dataclass(frozen=True)
class Encoded:
    """A quantized matrix.

    Attributes:
        codes: each weight's code, an index into the grid's sorted levels.
        absmax: each block's scale; an asymmetric grid's two ends of it, [block, 2].
        block_size: consecutive elements of `codes.reshape(-1)` that share a scale; the last block may be shorter.
    """

    codes: UInt8[Tensor, "out in"]
    absmax: Float32[Tensor, " block *ends"]
    block_size: int

    def scales(self) -> Float32[Tensor, "out in *ends"]:
        """Each weight's scale: its block's absmax (or two ends)."""
        return _spread_over(self.codes, self.absmax, self.block_size)


@dataclass(frozen=True, eq=False)
class Grid(Quantizer):
    """A quantizer: codes are cells of `weight / absmax of its block`, cut at the midpoints of sorted levels.

    Matrices are oriented [out, in] (GPT-2's `Conv1D` is transposed first). A block runs over consecutive elements of
    `w.reshape(-1)`, so it crosses rows where `in` is no multiple of the block size, and the last one may be shorter:
    this is bitsandbytes' own layout. (bitsandbytes 0.50.2 encodes such matrices correctly everywhere, but its CPU
    kernel decodes them wrongly; decoding here follows its reference and CUDA kernels.)

    "absmax" below is whatever the grid keeps of a block: its absmax, or its two ends (`AsymmetricGrid`).

    Attributes:
        levels: the value of each code at absmax 1, ascending from -1 to 1.
        block_size: elements that share a scale; None = a row is a block.
    """

    name: str
    levels: Float32[Tensor, " code"]
    block_size: int | None
    # Whether a block's scale is given and measured on no weight, as in a file: an edited weight is its code's value then.
    given_scales: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size < 1:
            raise MansuError(f"{self.name}: block_size={self.block_size}; give at least 1, or None for whole rows")

    @cached_property
    def bounds(self) -> Float32[Tensor, " bound"]:
        """The boundaries between neighbouring codes at absmax 1; a value on one belongs to the lower code."""
        return (self.levels[:-1] + self.levels[1:]) / 2

    def of(self, parameter: str) -> Grid:
        """The grid of one parameter, by HF name: itself, but for the grid of a file, whose scales are given."""
        return self

    # --- encode and decode ---------------------------------------------------------------------------------------

    def encode(self, w: Float[Tensor, "out in"]) -> Encoded:
        """Quantize a matrix exactly as the quantizer's own library does."""
        absmax = self._absmax(w)
        return Encoded(self.codes(w, absmax), absmax, self._block(w))

    def codes(self, w: Float[Tensor, "out in"], absmax: Float32[Tensor, " block *ends"]) -> UInt8[Tensor, "out in"]:
        """The code of every value under scales that are given instead of measured."""
        values = self._prepare(w)
        scale = _spread(absmax, values.numel(), self._block(w))
        tail = torch.arange(self._tail(w), values.numel(), device=w.device)
        return self._code(values, scale, tail).view(w.shape)

    def flat_codes(
        self, values: Float[Tensor, " weight"], scales: Float32[Tensor, " weight *ends"]
    ) -> UInt8[Tensor, " weight"]:
        """The code of values picked from anywhere, each under the scale of the block that it came from."""
        return self._code(self._prepare(values), scales, torch.empty(0, dtype=torch.long, device=values.device))

    def flat_centre(
        self, codes: UInt8[Tensor, " weight"], scales: Float32[Tensor, " weight *ends"]
    ) -> Float32[Tensor, " weight"]:
        """The values of codes picked from anywhere, each under the scale of the block that it came from."""
        return self._value(codes.long(), scales)

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The values that a quantized matrix stands for, cast to `dtype` last."""
        return self.centre(encoded.codes, encoded.absmax).to(dtype)

    def roundtrip(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Q(w): what the deployed model uses in place of `w`, in the dtype of `w`."""
        return self.decode(self.encode(w), w.dtype)

    # --- where a weight sits -------------------------------------------------------------------------------------

    def centre(
        self, codes: UInt8[Tensor, "out in"], absmax: Float32[Tensor, " block *ends"]
    ) -> Float32[Tensor, "out in"]:
        """Each code's value, in weight units."""
        return self._value(codes.long(), _spread_over(codes, absmax, self._block(codes)))

    def cell(
        self, codes: UInt8[Tensor, "out in"], absmax: Float32[Tensor, " block *ends"]
    ) -> tuple[Float32[Tensor, "out in"], Float32[Tensor, "out in"]]:
        """Each code's lower and upper boundary, in weight units; the outermost cells end at -absmax and +absmax."""
        return self._cell(codes.long(), _spread_over(codes, absmax, self._block(codes)))

    def width(self, w: Float[Tensor, "out in"]) -> Float32[Tensor, "out in"]:
        """Each weight's local bin width, absmax * (upper - lower boundary of its cell), in weight units."""
        encoded = self.encode(w)
        return self._width(encoded.codes.long(), encoded.scales())

    def boundary_distance(self, w: Float[Tensor, "out in"]) -> Float32[Tensor, "out in"]:
        """How far each weight is from the nearest boundary to another code, in weight units."""
        encoded = self.encode(w)
        lower, upper = self._boundaries(encoded.codes.long(), encoded.scales())
        values = self._prepare(w).view(w.shape)
        # infinity * 0 in a block of zeros: such a weight is on every boundary at once
        return torch.minimum(values - lower, upper - values).nan_to_num(nan=0.0, posinf=torch.inf).clamp(min=0)

    def absmax_mask(self, w: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """Which weights carry their block's absmax, ties included: editing one would move the whole block's scale."""
        values = self._prepare(w)
        return self._at_end(values, _spread(self._block_max(w), values.numel(), self._block(w))).view(w.shape)

    def neighbour(self, codes: UInt8[Tensor, "out in"], direction: Float[Tensor, "out in"]) -> UInt8[Tensor, "out in"]:
        """The next code in the direction's sign; an outermost code that would leave the grid moves inward instead.

        A direction of 0 keeps the code.
        """
        top = len(self.levels) - 1
        moved = codes.long() + direction.sign().long()
        return torch.where(moved < 0, 1, torch.where(moved > top, top - 1, moved)).to(torch.uint8)

    def ends(self, scale: Float[Tensor, "*any_ends"]) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
        """Between what values a block's weights stay without moving its scale."""
        return -scale, scale

    # --- the floor -----------------------------------------------------------------------------------------------

    def floor_target(
        self,
        w: Float[Tensor, "out in"],
        codes_target: UInt8[Tensor, "out in"],
        absmax: Float32[Tensor, " block *ends"],
        *,
        leave_unreachable: bool = False,
    ) -> Float[Tensor, "out in"]:
        """The floor: every weight whose target code differs moves strictly into the target cell, in the dtype of `w`.

        It moves to the code's centre if that is at least one local bin width away, otherwise to the point one width
        away, and to the centre again where the cell has no such point. An outermost cell's centre is the absmax
        itself: the last value short of it is taken, the absmax only where the dtype has none. |w'| never exceeds its
        block's absmax, so no scale moves and no other weight changes its code; the result re-encodes to
        `codes_target` exactly. Our definition (the paper's formula is not public in full).

        Args:
            w: the weights before.
            codes_target: the code each weight shall have; where it is the present code the weight stays bit-identical.
            absmax: the scales that `w` is encoded under.
            leave_unreachable: keep a weight bit-identical whose target cell holds no value of the dtype of `w`.

        Raises:
            MansuError: a target that is no code of this grid, one for a weight that carries its block's absmax, or
                a target cell that holds no value of the dtype of `w` (unless those are left).
        """
        if int(codes_target.max()) >= len(self.levels):
            raise MansuError(
                f"target code {int(codes_target.max())}: {self.name} has codes 0 to {len(self.levels) - 1}"
            )
        codes = self.codes(w, absmax)
        index = (codes_target != codes).reshape(-1).nonzero().squeeze(1)
        result = w.clone(memory_format=torch.contiguous_format)
        if not len(index):
            return result
        scale = _spread(absmax, w.numel(), self._block(w))[index]
        carriers = int(self._at_end(self._prepare(w)[index], scale).sum())
        if carriers:
            raise MansuError(
                f"floor_target: {carriers} weights to move carry their block's absmax; leave out absmax_mask(w)"
            )
        target = codes_target.reshape(-1)[index]
        start, old = w.reshape(-1)[index], codes.reshape(-1)[index]
        placed, lost = self._place(start, old, target, scale, index >= self._tail(w))
        if lost.any() and not leave_unreachable:
            smallest = float(scale[lost].abs().view(int(lost.sum()), -1).amax(1).min())
            raise MansuError(
                f"floor_target: {int(lost.sum())} target cells of {self.name} hold no {w.dtype} value (smallest block "
                f"absmax {smallest:.3g}); leave those weights out or store the model in float32"
            )
        result.view(-1)[index] = torch.where(lost, start, placed)
        return result

    def _place(
        self,
        start: Float[Tensor, " moved"],
        old: UInt8[Tensor, " moved"],
        target: UInt8[Tensor, " moved"],
        scale: Float32[Tensor, " moved *ends"],
        in_tail: Bool[Tensor, " moved"],
    ) -> tuple[Float[Tensor, " moved"], Bool[Tensor, " moved"]]:
        """Values inside the target cells, one bin width away from `start` where the cells allow it; and which cells
        hold no value at all."""
        dtype, tail = start.dtype, in_tail.nonzero().squeeze(1)
        s, begin = scale.double(), start.double()
        up = torch.where(target > old, 1.0, -1.0).double()
        bin_width = self._width(old.long(), scale).double()
        inner = self._inside(self._value(target.long(), s), s, dtype)
        reach = (begin + up * bin_width).to(dtype)
        # Rounding to the dtype may fall short of one width.
        reach = torch.where((reach.double() - begin) * up < bin_width, step(reach, up), reach)
        fits = (self._code(self._prepare(reach), scale, tail) == target) & ~self._at_end(reach.double(), s)
        centre_will_do = (inner.double() - begin) * up >= bin_width
        value = torch.where(fits & ~centre_will_do, reach, inner)

        # The outermost codes take in everything up to the absmax, so that no step leads past it.
        previous, lost = torch.zeros_like(up), torch.zeros_like(up, dtype=torch.bool)
        for _ in range(_MOST_STEPS):
            code = self._code(self._prepare(value), scale, tail).long()
            direction = (target.long() - code).sign().double()
            # Stepped past the cell from either side: there is nothing in between.
            lost |= direction * previous < 0
            direction = torch.where(lost, 0.0, direction)
            if not direction.any():
                return value, lost
            previous = torch.where(direction == 0, previous, direction)
            value = torch.where(direction == 0, value, step(value, direction))
        return value, lost | (direction != 0)

    # --- what a different rounding rule replaces -----------------------------------------------------------------

    def _prepare(self, w: Float[Tensor, "*any"]) -> Float32[Tensor, " weight"]:
        """The flat values that the library compares."""
        return w.reshape(-1).float()

    def _code(
        self, values: Float32[Tensor, " weight"], scale: Float32[Tensor, " weight *ends"], tail: Int[Tensor, " tail"]
    ) -> UInt8[Tensor, " weight"]:
        """Codes of flat values; `tail` are the indices of those in a shorter last block."""
        safe = scale.clamp(min=_SMALLEST_SCALE)
        unit = values * (1.0 / safe)
        # bitsandbytes divides there instead of multiplying by the reciprocal: not always the same float.
        unit[tail] = values[tail] / safe[tail]
        return torch.bucketize(unit.clamp_(-1, 1), self.bounds.to(values.device), out_int32=True).to(torch.uint8)

    def _absmax(self, w: Float[Tensor, "out in"]) -> Float32[Tensor, " block *ends"]:
        """Each block's scale."""
        absmax = self._block_max(w)
        if self._tail(w) < w.numel():
            absmax[-1].clamp_(min=_SMALLEST_SCALE)  # bitsandbytes does so in the shorter last block only
        return absmax

    def _value(self, index: Int[Tensor, "*any"], scale: Float[Tensor, " *any_ends"]) -> Float[Tensor, "*any"]:
        """Each code's value, in the dtype of the scale."""
        return self.levels.to(index.device, scale.dtype)[index] * scale

    def _cell(self, index: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Each code's ends, which are those of the block for the outermost codes."""
        edges = self._edges(index.device)
        return edges[index] * scale, edges[index + 1] * scale

    def _width(self, index: Tensor, scale: Tensor) -> Tensor:
        return self._edges(index.device).diff()[index] * scale

    def _boundaries(self, index: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The boundaries to the codes below and above, infinite where there is none."""
        bounds, open_end = self.bounds.to(index.device), torch.full((1,), torch.inf, device=index.device)
        return torch.cat([-open_end, bounds])[index] * scale, torch.cat([bounds, open_end])[index] * scale

    def _at_end(self, values: Tensor, scale: Tensor) -> Tensor:
        """Whether a value carries, or would move, its block's scale."""
        return values.abs() >= scale

    def _inside(self, centre: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The dtype's value nearest to each centre that leaves the block's scale alone."""
        value = centre.to(dtype)
        return torch.where(value.double().abs() >= scale, step(value, -value), value)

    # --- shapes --------------------------------------------------------------------------------------------------

    def _block_max(self, w: Float[Tensor, "out in"]) -> Float32[Tensor, " block *ends"]:
        values, tail = self._prepare(w).abs(), self._tail(w)
        whole = values[:tail].view(-1, self._block(w)).amax(1)
        return torch.cat([whole, values[tail:].amax().view(1)]) if tail < len(values) else whole

    def _block(self, w: Tensor) -> int:
        return self.block_size if self.block_size is not None else w.shape[1]

    def _tail(self, w: Tensor) -> int:
        return w.numel() - w.numel() % self._block(w)

    def _edges(self, device: torch.device) -> Float32[Tensor, " edge"]:
        return torch.cat([self.levels[:1], self.bounds, self.levels[-1:]]).to(device)


def grid_of(name: str | AnyQuantizer) -> Grid:
    """The quantizer of that name where it has fixed cells, which floors and update statistics need.

    Raises:
        MansuError: as `quantizer`, or a quantizer without cells.
    """
    found = quantizer(name)
    if not isinstance(found, Grid):
        raise MansuError(
            f"quantizer {found.name!r}: a weight's code there depends on other weights, so it has no cells to count or "
            f"cross; choose one of {', '.join(quantizers('grid'))}"
        )
    return found


def whole_blocks(name: str, w: Shaped[Tensor, "*rows in"], block: int) -> int:
    """The block size of a format whose blocks do not cross rows.

    Raises:
        MansuError: rows that it does not divide.
    """
    if w.shape[-1] % block:
        raise MansuError(f"{name}: rows of {w.shape[-1]} weights; its blocks hold {block}, choose another quantizer")
    return block


def _spread(absmax: Float[Tensor, " block *ends"], n: int, block_size: int) -> Float[Tensor, " weight *ends"]:
    """Each of `n` weights' block value."""
    return absmax.repeat_interleave(block_size, 0)[:n]


def _spread_over(
    codes: UInt8[Tensor, "out in"], absmax: Float[Tensor, " block *ends"], block_size: int
) -> Float[Tensor, "out in *ends"]:
    """Each code's block value."""
    return _spread(absmax, codes.numel(), block_size).view(*codes.shape, *absmax.shape[1:])


def step(values: Float[Tensor, " moved"], direction: Tensor) -> Float[Tensor, " moved"]:
    """The next value of the dtype in the direction's sign."""
    return torch.nextafter(values, torch.copysign(torch.full_like(values, torch.inf), direction.to(values.dtype)))
