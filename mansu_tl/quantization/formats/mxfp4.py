"""MXFP4 (OCP Microscaling Formats 1.0, https://www.opencompute.org): e2m1 in blocks of 32 under a power of two.

Two encoders are in use and give different models. The specification (section 6.3; torchao's FLOOR, llama.cpp) takes
2^(floor(log2 absmax) - 2), so that an absmax above 7 steps is cut off at 6. The other (torchao's EVEN, compressed-tensors)
first rounds the absmax to a number of e2m1's precision: from 1.75 times a power of two on it takes the next power.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from mansu_tl.quantization.formats.compressed import E2M1, mirrored
from mansu_tl.quantization.quantizer import About, register_quantizer
from mansu_tl.quantization.stepped import SteppedGrid

_LARGEST_EXPONENT = 2  # of e2m1
_BIAS = 127  # of e8m0


@dataclass(frozen=True, eq=False)
class MicroscaledGrid(SteppedGrid):
    """step = 2^(floor(log2 absmax) - 2), or one power more.

    Attributes:
        up_from: the multiple of a power of two from which an absmax counts as the next one.
    """

    up_from: float

    def _steps(self, absmax: Float[Tensor, " block"]) -> Float[Tensor, " block"]:
        mantissa, exponent = torch.frexp(absmax.float())
        floor = exponent - 1 + (2 * mantissa >= self.up_from)
        stored = torch.where(absmax == 0, 0, floor - _LARGEST_EXPONENT + _BIAS).clamp(0, 2 * _BIAS)
        return torch.ldexp(torch.ones_like(mantissa), stored - _BIAS)


def mxfp4(scales: str = "floor") -> MicroscaledGrid:
    """MXFP4 with its scales by "floor" or by "even", as torchao calls the two encoders."""
    return MicroscaledGrid(f"mxfp4-{scales}", mirrored(torch.tensor(E2M1)), 32, 2.0 if scales == "floor" else 1.75)


for _scales, _about in {
    "floor": About("4", "32", "power of two, floor of log2", "the OCP specification; torchao FLOOR"),
    "even": About("4", "32", "power of two, of the rounded absmax", "vLLM, llm-compressor; torchao EVEN"),
}.items():
    register_quantizer(f"mxfp4-{_scales}", partial(mxfp4, _scales), "grid", about=_about)
