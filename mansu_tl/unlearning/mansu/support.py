"""Which weights an edit may spend its budgets on."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def choose_support(
    latent: Float[Tensor, " weight"],
    change: Float[Tensor, " weight"],
    changed: Bool[Tensor, " weight"],
    importance: Float[Tensor, " weight"] | None,
    budget: int,
    fisher_budget: float,
) -> Bool[Tensor, " weight"]:
    """The changed weights of largest latent update, in bins, against their cost to the retain set.

    Args:
        change: what the quantized model feels of each update, in weight units.
        importance: diagonal Fisher information, or None.
        budget: how many weights at most.
        fisher_budget: nats that k/2 sum F d^2 over the k chosen may reach; 0 = no limit.
    """
    priority = latent.abs()
    if importance is not None:
        cost = 0.5 * importance * change.square()
        typical = cost[changed].mean().clamp_min(1e-12) if bool(changed.any()) else cost.new_tensor(1.0)
        priority = priority / (1 + (cost / typical).sqrt())
    priority = torch.where(changed, priority, 0.0)
    kept = torch.zeros_like(changed)
    order = priority.topk(min(budget, priority.numel())).indices
    if importance is not None and fisher_budget:
        # Both factors of the bound grow along the order, so it holds for a prefix. Running sums of floats have no
        # deterministic form on a GPU.
        spent = cost[order].double().cpu().cumsum(0) * torch.arange(1, len(order) + 1)
        order = order[: int((spent <= fisher_budget).sum())]
    kept[order] = True
    return kept & changed
