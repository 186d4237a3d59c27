"""95 % intervals of a mean: over facts, whose wordings are drawn together and count once, and over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
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
    drawn = drawn_facts(len(order), seed, resamples)
    return middle(total[drawn].sum(1) / count[drawn].sum(1))


def drawn_facts(count: int, seed: int = 0, resamples: int = _RESAMPLES) -> Int[Tensor, "draw fact"]:
    """The bootstrap's draws: `count` facts with replacement, `resamples` times."""
    return torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))


def fact_weights(groups: Int[Tensor, " row"], seed: int = 0) -> Float[Tensor, "draw row"]:
    """The share of every row in each of the bootstrap's draws of facts; a draw's shares sum to one.

    Args:
        groups: the fact behind each row, by number.
    """
    drawn = drawn_facts(int(groups.max()) + 1, seed)
    times = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    weights = times[:, groups.cpu()]
    return weights / weights.sum(1, keepdim=True)


def middle(draws: Float[Tensor, " draw"]) -> tuple[float, float]:
    """The ends of the middle 95 % of a bootstrap's draws."""
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return low, high


def with_interval(
    name: str,
    values: Float[Tensor, " row"] | Bool[Tensor, " row"],
    facts: Sequence[str],
    *,
    scale: float = 1.0,
    bounds: str | None = None,
) -> dict[str, float]:
    """Three cells of a table: the mean of `values` times `scale`, and the ends of its 95 % interval over facts.

    Args:
        name: of the mean's column.
        bounds: of the ends' columns, before "_low" and "_high"; `name` where not given.
    """
    low, high = interval_over_facts(values.double(), facts)
    ends = bounds or name
    return {name: scale * values.double().mean().item(), f"{ends}_low": scale * low, f"{ends}_high": scale * high}


def interval_over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of `values` by Student's t; NaN for fewer than two. In the values' units."""
    found = np.asarray(values, dtype=float)
    if len(found) < 2:
        return float("nan"), float("nan")
    from scipy import special  # takes half a second, and few runs need it

    half = special.stdtrit(len(found) - 1, 0.975) * found.std(ddof=1) / np.sqrt(len(found))
    return float(found.mean() - half), float(found.mean() + half)
