"""What an attacker trains: every parameter, or low-rank adapters on the linear layers (LoRA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from mansu_tl.models import linear_weights, parameters

_ALPHA = 16.0


@dataclass(frozen=True)
class Trained:
    """Values that an optimizer moves, and the model's parameters that follow from them.

    Attributes:
        moving: what the optimizer is given.
        rank: of the adapters; 0 = the parameters themselves move.
    """

    hf: PreTrainedModel
    moving: tuple[Tensor, ...]
    rank: int
    factors: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, hf: PreTrainedModel, rank: int, seed: int) -> Trained:
        """All parameters of a model (rank 0), or adapters W + (16 / rank) A B on its linear layers (Hu et al. 2021,
        arXiv 2106.09685): A normal with deviation 1 / sqrt(rank), B zero, so that training begins at the model itself.

        Args:
            hf: a copy that may be changed.
            seed: of A.
        """
        if rank == 0:
            hf.requires_grad_(True)
            return cls(hf, tuple(hf.parameters()), 0, {})
        hf.requires_grad_(False)
        generator, live = torch.Generator().manual_seed(seed), parameters(hf)
        factors = {}
        for name in linear_weights(hf):
            rows, columns = live[name].shape
            first = (torch.randn(rows, rank, generator=generator) / rank**0.5).to(live[name])
            # Zero on the side of the input, whichever way the matrix is stored: the first step then moves one factor.
            second = torch.zeros(rank, columns).to(live[name])
            factors[name] = first.requires_grad_(True), second.requires_grad_(True)
        return cls(hf, tuple(each for pair in factors.values() for each in pair), rank, factors)

    def values(self) -> dict[str, Float[Tensor, "out in"]]:
        """The matrices that adapters change, as functions of what is trained."""
        live = parameters(self.hf)
        return {name: live[name] + _ALPHA / self.rank * (a @ b) for name, (a, b) in self.factors.items()}

    @contextmanager
    def merged(self) -> Iterator[PreTrainedModel]:
        """Inside, the model has the adapters in its weights."""
        live = parameters(self.hf)
        kept = {name: live[name].data for name in self.factors}
        try:
            with torch.no_grad():
                for name, value in self.values().items():
                    live[name].data = value
            yield self.hf
        finally:
            for name, value in kept.items():
                live[name].data = value
