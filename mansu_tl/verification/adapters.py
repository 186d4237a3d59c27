"""What an attacker trains: every parameter, or low-rank adapters on the linear layers (LoRA)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from mansu_tl.models import linear_weights, parameters
from mansu_tl.models.low_rank import Factors, low_rank_factors, with_adapters

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
    factors: Factors

    @classmethod
    def of(cls, hf: PreTrainedModel, rank: int, seed: int) -> Trained:
        """All parameters of a model (rank 0), or adapters W + (16 / rank) A B on its linear layers; see `low_rank_factors`.

        Args:
            hf: a copy that may be changed.
            seed: of A.
        """
        if rank == 0:
            hf.requires_grad_(True)
            return cls(hf, tuple(hf.parameters()), 0, {})
        hf.requires_grad_(False)
        factors = low_rank_factors(parameters(hf), linear_weights(hf), rank, seed)
        for each in (each for pair in factors.values() for each in pair):
            each.requires_grad_(True)
        return cls(hf, tuple(each for pair in factors.values() for each in pair), rank, factors)

    def values(self) -> dict[str, Float[Tensor, "out in"]]:
        """The matrices that adapters change, as functions of what is trained."""
        return with_adapters(parameters(self.hf), self.factors, _ALPHA / self.rank) if self.factors else {}

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
