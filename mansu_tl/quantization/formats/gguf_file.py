"""Quantizer "gguf": the file that a model came from, with the types and the scales that it has.

Scales are given, so that every code of the file can change and no weight is held: the floor is literal here, an edited weight
lies exactly on another code of its block. What a whole model becomes is what `mansu_tl.models.gguf.save_gguf` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Float32, Int, UInt8
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.models.gguf import Blocks, GgufWeights
from mansu_tl.models.gguf.write import require_gguf, written
from mansu_tl.models.tree import Model
from mansu_tl.quantization.grid import Grid
from mansu_tl.quantization.quantizer import About, register_quantizer


@dataclass(frozen=True, eq=False)
class FileGrid(Grid):
    """The codes of a GGUF file; `bound` to a model that came from one, `of` one of its matrices.

    A block's scale is [step, shift, zero, last]: code c of 0..last is worth step * (c - zero) + shift. Codes count upward
    here also where the file's step is negative.

    Attributes:
        weights: the file; None until the grid is bound.
        blocks: the codes and scales of one matrix.
    """

    given_scales: ClassVar[bool] = True
    weights: GgufWeights | None = None
    blocks: Blocks | None = None
    parameter: str = ""

    def bound(self, model: Model) -> FileGrid:
        """The grid of the file that a model came from.

        Raises:
            MansuError: it came from none.
        """
        return replace(self, weights=require_gguf(model, f"quantizer {self.name!r}"))

    def of(self, parameter: str) -> FileGrid:
        """The grid of one parameter.

        Raises:
            MansuError: it is not stored in codes that are read.
        """
        if self.weights is None:
            raise MansuError(f"quantizer {self.name!r}: it is the file that a model came from; give the model with it")
        blocks = self.weights.blocks(parameter)
        count = blocks.layout.codes
        return replace(
            self,
            levels=torch.arange(count) / (count - 1),
            block_size=blocks.layout.group,
            blocks=blocks,
            parameter=parameter,
        )

    def quantized(self, model: Model, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every parameter of a model as the file would give it back."""
        assert self.weights is not None
        values = {}
        for name, value in live.items():
            result = written(self.weights, name, value)
            kept = result.how == "kept"
            values[name] = value.detach() if kept else self.weights.value(name, result.raw).to(value)
        return values

    def absmax_mask(self, w: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """No weight carries a scale: those are the file's."""
        return torch.zeros_like(w, dtype=torch.bool)

    def ends(self, scale: Float[Tensor, "*any_ends"]) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
        """No value moves a scale."""
        return torch.full_like(scale[..., 0], -torch.inf), torch.full_like(scale[..., 0], torch.inf)

    # --- what a different rounding rule replaces -----------------------------------------------------------------

    def _absmax(self, w: Float[Tensor, "out in"]) -> Float32[Tensor, "block 4"]:
        blocks = self.blocks
        assert blocks is not None
        last, zero = blocks.layout.codes - 1, blocks.layout.zero
        step = blocks.step.flatten()
        shift = torch.zeros_like(step) if blocks.shift is None else blocks.shift.flatten()
        zeros = torch.where(step < 0, last - zero, zero).to(step)
        return torch.stack([step.abs(), shift, zeros, torch.full_like(step, last)], 1).to(w.device)

    def _code(
        self, values: Float32[Tensor, " weight"], scale: Float32[Tensor, "weight 4"], tail: Int[Tensor, " tail"]
    ) -> UInt8[Tensor, " weight"]:
        step, shift, zero, last = scale.unbind(-1)
        unit = ((values - shift) / step).nan_to_num(nan=0.0)
        return torch.minimum((unit + zero).round().clamp(min=0), last).to(torch.uint8)

    def _value(self, index: Int[Tensor, "*any"], scale: Float[Tensor, " *any_ends"]) -> Float[Tensor, "*any"]:
        step, shift, zero, _ = scale.float().unbind(-1)
        return (step * (index.float() - zero) + shift).to(scale.dtype)

    def _cell(self, index: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        centre, half = self._value(index, scale), scale[..., 0] / 2
        return centre - half, centre + half

    def _boundaries(self, index: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = self._cell(index, scale)
        return torch.where(index == 0, -torch.inf, lower), torch.where(index == scale[..., 3], torch.inf, upper)

    def _width(self, index: Tensor, scale: Tensor) -> Tensor:
        return scale[..., 0]

    def _at_end(self, values: Tensor, scale: Tensor) -> Tensor:
        return torch.zeros_like(values, dtype=torch.bool)

    def _place(
        self,
        start: Float[Tensor, " moved"],
        old: UInt8[Tensor, " moved"],
        target: UInt8[Tensor, " moved"],
        scale: Float32[Tensor, "moved 4"],
        in_tail: Bool[Tensor, " moved"],
    ) -> tuple[Float[Tensor, " moved"], Bool[Tensor, " moved"]]:
        """The values that the file has for the target codes; neighbours lie one width apart."""
        value = self._value(target.long(), scale).to(start.dtype)
        return value, self._code(self._prepare(value), scale, in_tail.nonzero().squeeze(1)) != target


register_quantizer(
    "gguf",
    lambda: FileGrid("gguf", torch.linspace(0, 1, 256), None),
    "file",
    about=About("the file's", "the file's", "the file's own, kept", "the GGUF file that the model came from"),
)
