"""4-bit floating point as bitsandbytes quantizes to it: its default where nobody asks for NF4."""

from __future__ import annotations

import torch

from mansu_tl.quantization.grid import Grid

# Magnitudes of bitsandbytes.functional.get_4bit_type("fp4"), 0.50.2, in twelfths.
_TWELFTHS = (0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


def fp4(block_size: int = 64) -> Grid:
    """The FP4 grid: 15 codes, since bitsandbytes' two zeros (+0 and -0) decode to the same value and count as one."""
    positive = torch.tensor(_TWELFTHS) / 12
    levels = torch.cat([-positive.flip(0), torch.zeros(1), positive])
    return Grid("fp4" if block_size == 64 else f"fp4-{block_size}", levels, block_size)
