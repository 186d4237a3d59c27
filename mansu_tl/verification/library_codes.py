"""What bitsandbytes makes of a stored matrix: its codes and scales. No grid of this package is involved."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.models import LinearWeight, orient
from mansu_tl.models import library as bnb

_MINUS_ZERO = 8  # bitsandbytes' FP4 has two zeros; they decode to the same value


@dataclass(frozen=True)
class LibraryQuantizer:
    """How bitsandbytes is called.

    Attributes:
        kind: "nf4", "fp4", or "int8" for LLM.int8.
        block_size: weights that share a scale; 0 = a whole row.
        nested: whether the scales are quantized to 8 bits too.
    """

    kind: str
    block_size: int
    nested: bool = False


_LIBRARY: MappingProxyType[str, LibraryQuantizer] = MappingProxyType(
    {
        "nf4": LibraryQuantizer("nf4", 64),
        "nf4-128": LibraryQuantizer("nf4", 128),
        "nf4-dq": LibraryQuantizer("nf4", 64, nested=True),
        "nf4-128-dq": LibraryQuantizer("nf4", 128, nested=True),
        "fp4": LibraryQuantizer("fp4", 64),
        "int8": LibraryQuantizer("int8", 0),
    }
)


def library_quantizer(name: str) -> LibraryQuantizer:
    """How bitsandbytes is called for a quantizer of that name.

    Raises:
        MansuError: bitsandbytes does not have it.
    """
    if name not in _LIBRARY:
        raise MansuError(f"quantizer {name!r}: no library here to certify it; choose one of {', '.join(_LIBRARY)}")
    return _LIBRARY[name]


def library_codes(
    stored: Float[Tensor, "rows columns"], linear: LinearWeight, quantizer: LibraryQuantizer
) -> tuple[UInt8[Tensor, " weight"], Float32[Tensor, "block scale"]]:
    """bitsandbytes' codes in the stored order of the weights, and the scales of each block.

    A block has one scale, its absmax; under double quantization two: its absmax, by which the codes are chosen, and
    the scale by which they are decoded. Two matrices with the same of both are decoded alike on every device.

    Raises:
        MansuError: a dtype that bitsandbytes does not quantize.
    """
    if stored.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise MansuError(
            f"{linear.name}: bitsandbytes does not quantize {stored.dtype}; save the model in float32 or bfloat16"
        )
    w = orient(stored, linear).contiguous()
    if quantizer.kind == "int8":
        signed, absmax, _ = bnb.functional.int8_vectorwise_quant(w.half())
        codes, scales = (signed.to(torch.int16) + 128).to(torch.uint8), [absmax]
    else:
        codes, scales = _four_bit(w, quantizer)
    codes = codes.view(w.shape)
    return orient(codes, linear).reshape(-1), torch.stack(scales, 1)


def _four_bit(w: Tensor, quantizer: LibraryQuantizer) -> tuple[Tensor, list[Tensor]]:
    kind, size = quantizer.kind, quantizer.block_size
    packed, state = bnb.functional.quantize_4bit(w, blocksize=size, quant_type=kind, compress_statistics=False)
    scales = [state.absmax]
    if quantizer.nested:
        # The codes that such a model stores are those of this call.
        packed, state = bnb.functional.quantize_4bit(w, blocksize=size, quant_type=kind, compress_statistics=True)
        scales.append(bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset)
    packed = packed.reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: w.numel()]
    if quantizer.kind == "fp4":
        codes = torch.where(codes == _MINUS_ZERO, 0, codes)
    return codes, scales
