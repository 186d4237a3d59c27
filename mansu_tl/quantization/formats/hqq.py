"""HQQ (Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog) by its own library, the extra `hqq`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.quantization.quantizer import About, Quantizer, register_quantizer


@dataclass(frozen=True, eq=False)
class Hqq(Quantizer):
    """hqq's own optimized half-quadratic rounding, dequantized by hqq; groups run along in-features (axis 1).

    Attributes:
        bits: 1, 2, 3, 4 or 8, as hqq has them.
        group_size: consecutive elements that share scale and zero; must divide the matrix's size.
    """

    name: str
    bits: int
    group_size: int

    def roundtrip(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Q(w), in the dtype of `w`.

        Raises:
            MansuError: a matrix that the group size does not divide.
        """
        if w.numel() % self.group_size:
            raise MansuError(
                f"{self.name}: a matrix of {tuple(w.shape)} is no multiple of the group size {self.group_size}; "
                "choose another quantizer"
            )
        with warnings.catch_warnings():
            # Importing it compiles code, which has PyTorch warn of its own deprecated parts.
            warnings.simplefilter("ignore")
            from hqq.core.quantize import Quantizer as Library

        codes, meta = Library.quantize(
            w.contiguous(),
            nbits=self.bits,
            group_size=self.group_size,
            axis=1,
            device=str(w.device),
            compute_dtype=torch.float32,
        )
        return Library.dequantize(codes, {**meta, "compute_dtype": torch.float32}).to(w.dtype)


def hqq(bits: int = 4, group_size: int = 64) -> Hqq:
    """HQQ with `bits` bits and groups of `group_size`."""
    return Hqq(f"hqq-int{bits}-g{group_size}", bits, group_size)


register_quantizer(
    "hqq-int4-g64",
    hqq,
    package="hqq",
    about=About("4", "64", "float step and zero, optimised", "HQQ, transformers HqqConfig"),
)
