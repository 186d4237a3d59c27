"""Which edges: by size of their score, by a threshold, greedily from the logits, or at random. Masks, not pruned."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mansu_tl.circuit.scores import EdgeScores
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError

RANKINGS = ("absolute", "signed")
SELECTIONS = ("top", "greedy")


def strength(scores: EdgeScores, by: str = "absolute") -> Float[Tensor, "writer reader"]:
    """What edges are ranked by: |score|, or the score itself (most positive first)."""
    if by not in RANKINGS:
        raise MansuError(f"circuit: unknown ranking by={by!r}; choose absolute or signed")
    return scores.tensor.abs() if by == "absolute" else scores.tensor


@torch_defaults()
def ranks(scores: EdgeScores, by: str = "absolute") -> Int64[Tensor, "writer reader"]:
    """The rank of every edge, 0 = highest, those that do not exist last; ties go to the earlier edge."""
    size = strength(scores, by).masked_fill(~scores.exists, -torch.inf).flatten()
    order = size.sort(descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).view_as(scores.exists)


def top_mask(scores: EdgeScores, n: int, by: str = "absolute") -> Bool[Tensor, "writer reader"]:
    """The `n` existing edges that rank highest; ties go to the earlier edge."""
    return ranks(scores, by) < n


@torch_defaults()
def greedy_mask(scores: EdgeScores, n: int, by: str = "absolute") -> Bool[Tensor, "writer reader"]:
    """`n` edges grown backwards from the logits, the strongest edge into what is already reached each time.

    The greedy search of EAP-IG's code (Hanna et al. 2024, arXiv 2403.17806): reaching a writer opens the edges into
    its own inputs. Every edge then leads on to the logits; ties go to the earlier edge.
    """
    feeders = [column.nonzero()[:, 0].tolist() for column in scores.feeds().T]
    ranked, exists = strength(scores, by).tolist(), scores.exists.tolist()
    mask = torch.zeros_like(scores.exists)
    opened: set[int] = set()
    heap: list[tuple[float, int, int]] = []

    def open_reader(r: int) -> None:
        if r not in opened:
            opened.add(r)
            for w in range(len(ranked)):
                if exists[w][r]:
                    heapq.heappush(heap, (-ranked[w][r], w, r))

    open_reader(scores.readers.index("logits"))
    for _ in range(n):
        if not heap:
            break
        _, w, r = heapq.heappop(heap)
        mask[w, r] = True
        for feeder in feeders[w]:
            open_reader(feeder)
    return mask


@torch_defaults()
def selected_mask(
    scores: EdgeScores, n: int, select: str = "top", by: str = "absolute", least: int = 0
) -> Bool[Tensor, "writer reader"]:
    """`n` edges, "top" or "greedy"."""
    if select not in SELECTIONS:
        raise MansuError(f"circuit: unknown selection {select!r}; choose top or greedy")
    total = int(scores.exists.sum())
    if not least <= n <= total:
        raise MansuError(f"circuit: n={n} edges, the graph has {total}; choose {least}..{total}")
    return top_mask(scores, n, by) if select == "top" else greedy_mask(scores, n, by)


def pruned_masks(
    scores: EdgeScores, sizes: Sequence[int], select: str = "top", by: str = "absolute"
) -> list[Bool[Tensor, "writer reader"]]:
    """The circuits of several sizes: `selected_mask`, pruned."""
    feeds, rank = scores.feeds(), ranks(scores, by)
    of_size = [selected_mask(scores, n, select, by) if select != "top" else rank < n for n in sizes]
    return [scores.pruned(mask, feeds) for mask in of_size]


@torch_defaults()
def random_mask(exists: Bool[Tensor, "writer reader"], n: int, seed: int) -> Bool[Tensor, "writer reader"]:
    """`n` existing edges drawn at random, not pruned: the control for a circuit of that size."""
    existing = exists.flatten().nonzero()[:, 0]
    draw = torch.randperm(existing.shape[0], generator=torch.Generator().manual_seed(seed))[:n]
    mask = torch.zeros(exists.numel(), dtype=torch.bool)
    mask[existing[draw]] = True
    return mask.view_as(exists)
