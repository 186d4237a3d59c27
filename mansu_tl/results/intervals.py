"""95 % intervals of a mean: over facts, whose wordings are drawn together and count once, and over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mansu_tl.defaults import torch_defaults

_RESAMPLES = 2000


@torch_defaults()
def interval_over_facts(
    values: Float[Tensor, " row"], facts: Sequence[str], seed: int = 0, resamples: int = _RESAMPLES
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `values`, resampling facts; in the values' units.

    Args:
        facts: the fact behind each value.
        seed: of the draws.
    """
    order = {fact: i for i, fact in enumerate(dict.fromkeys(facts))}
    index = torch.tensor([order[fact] for fact in facts])
    row = values.detach().double().cpu()
    total = torch.zeros(len(order), dtype=torch.float64).index_add_(0, index, row)
    count = torch.zeros(len(order), dtype=torch.float64).index_add_(0, index, torch.ones_like(row))
    drawn = torch.randint(len(order), (resamples, len(order)), generator=torch.Generator().manual_seed(seed))
    means = total[drawn].sum(1) / count[drawn].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def interval_over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of `values` by Student's t; NaN for fewer than two. In the values' units."""
    found = np.asarray(values, dtype=float)
    if len(found) < 2:
        return float("nan"), float("nan")
    from scipy import special  # takes half a second, and few runs need it

    half = special.stdtrit(len(found) - 1, 0.975) * found.std(ddof=1) / np.sqrt(len(found))
    return float(found.mean() - half), float(found.mean() + half)
