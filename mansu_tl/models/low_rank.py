"""Low-rank adapters: what is trained in the place of some matrices (LoRA)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

Factors = Mapping[str, tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank columns"]]]


def low_rank_factors(
    values: Mapping[str, Tensor], names: Iterable[str], rank: int, seed: int
) -> dict[str, tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank columns"]]]:
    """Two factors A B for each of some matrices, as they are before training (Hu et al. 2021, arXiv 2106.09685, sec. 4.1).

    A is normal with deviation 1 / sqrt(rank), B zero, so that training begins at the matrices themselves.

    Args:
        values: parameters by name; the factors are float32, on their devices.
        names: the matrices.
        seed: of A.
    """
    generator, factors = torch.Generator().manual_seed(seed), {}
    for name in names:
        rows, columns = values[name].shape
        first = (torch.randn(rows, rank, generator=generator) / rank**0.5).to(values[name].device)
        # Zero on the side of the input, whichever way the matrix is stored: the first step then moves one factor.
        factors[name] = first, torch.zeros(rank, columns, device=values[name].device)
    return factors


def with_adapters(
    values: Mapping[str, Tensor], factors: Factors, scale: float
) -> dict[str, Float[Tensor, "rows columns"]]:
    """The matrices that adapters change, W + scale A B, as functions of the factors."""
    return {name: values[name] + scale * (a @ b) for name, (a, b) in factors.items()}
