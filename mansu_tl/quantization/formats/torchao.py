"""Weight-only integers by torchao (https://github.com/pytorch/ao) itself, the extra `torchao`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.quantization.quantizer import About, Quantizer, register_quantizer


@dataclass(frozen=True, eq=False)
class Torchao(Quantizer):
    """torchao's `IntxWeightOnlyConfig` (symmetric, codes -8..7 at 4 bits), dequantized by torchao.

    Its format for GPUs (`Int4WeightOnlyConfig`) packs for a kernel that a CPU does not have: it is the grid "int4wo-g128".

    Attributes:
        bits: 1 to 8.
        group_size: in-features that share a scale, must divide a row; None = the whole row.
    """

    name: str
    bits: int
    group_size: int | None

    def roundtrip(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Q(w), in the dtype of `w`.

        Raises:
            MansuError: rows that the group size does not divide.
        """
        if self.group_size and w.shape[1] % self.group_size:
            raise MansuError(
                f"{self.name}: rows of {w.shape[1]} are no multiple of the group size {self.group_size}; "
                "choose another quantizer"
            )
        import torchao.quantization as library  # transformers has imported it already where it is installed

        group = library.PerAxis(0) if self.group_size is None else library.PerGroup(self.group_size)
        config = library.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{self.bits}"), granularity=group)
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(w.contiguous().clone(), requires_grad=False)
        library.quantize_(layer, config, device=None)
        weight: Any = layer.weight
        return weight.dequantize().to(w.dtype)


def torchao(bits: int = 4, group_size: int | None = 64) -> Torchao:
    """torchao's symmetric integers with `bits` bits, in groups or, with None, a scale a row."""
    group = "" if group_size is None else f"-g{group_size}"
    return Torchao(f"torchao-int{bits}{group}", bits, group_size)


_USED_BY = "torchao IntxWeightOnlyConfig"
register_quantizer(
    "torchao-int4-g64",
    torchao,
    package="torchao",
    about=About("4", "64", "absmax / 7.5 in the model's dtype", _USED_BY),
)
register_quantizer(
    "torchao-int8",
    lambda: torchao(8, None),
    package="torchao",
    about=About("8", "row", "absmax / 127.5 in the model's dtype", _USED_BY),
)
