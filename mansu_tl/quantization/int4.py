"""Symmetric 4-bit integers, round to nearest: the plain grid that GPTQ-style formats store to."""

from __future__ import annotations

from mansu_tl.quantization.uniform import UniformGrid, uniform_levels


def int4(block_size: int = 64) -> UniformGrid:
    """The symmetric int4 grid: codes -7..7, one scale a group of `block_size` consecutive in-features."""
    return UniformGrid(f"int4-g{block_size}", uniform_levels(7), block_size, 7)
