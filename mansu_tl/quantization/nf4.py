"""NormalFloat4 as bitsandbytes quantizes to it (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import torch

from mansu_tl.quantization.grid import Grid

# bitsandbytes.functional.get_4bit_type("nf4"), 0.50.2
_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def nf4(block_size: int = 64) -> Grid:
    """The NF4 grid; 64 is the block size of every bitsandbytes 4-bit model unless it was set otherwise."""
    name = "nf4" if block_size == 64 else f"nf4-{block_size}"
    return Grid(name, torch.tensor(_LEVELS), block_size)
