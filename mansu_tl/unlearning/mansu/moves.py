"""Which weights of a matrix go to which code, so that it writes something else for some inputs and the same for others.

A least-squares problem in whole steps: every weight moves by steps that its floor allows, each row of the matrix on its
own. Solved greedily, the move that gains most first; after each the row's gradient is brought up to date, so that later
moves pay for what earlier ones got wrong (as GPTQ's error compensation does, here over steps instead of rounding errors).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Moves of a row in one go at most, as a multiple of its weights: every weight may move and come back.
_MOST_ROUNDS = 2
# Rounds between two looks at which rows are done: a GPU waits for each, and rows that are done cost as much as others.
_ROUNDS = 8
# They are taken out where no more than this share of the rows is left.
_WORTH = 0.9


def best_moves(
    steps: Float[Tensor, "level out in"],
    curvature: Float[Tensor, "in in"],
    wanted: Float[Tensor, "out in"],
    least: float,
    worth: Float[Tensor, "out in"] | None = None,
    most: int | None = None,
) -> Int[Tensor, "out in"]:
    """The moves that lower d H d^T - 2 d . b of every row most, each by at least `least`.

    Args:
        steps: how far each weight has moved at levels -k, ..., 0, ..., k; a level that is not further out than the one
            before it is not reached.
        curvature: H, the second moments of the inputs.
        wanted: b, by row.
        least: what moving a weight must gain; moving it again is free.
        worth: a factor on what each weight's moves gain, in (0, 1].
        most: how many weights may move; None = all.

    Returns:
        The level of each weight.
    """
    levels, (rows, columns) = steps.shape[0] // 2, steps.shape[1:]
    moves = torch.zeros(rows, columns, dtype=torch.int8, device=steps.device)
    moved = torch.zeros((), dtype=torch.long, device=steps.device)
    diagonal = curvature.diagonal().contiguous()
    row = torch.arange(rows, device=steps.device)  # of the matrix: those that what follows is about
    up, down, slope = steps[levels + 1].clone(), steps[levels - 1].clone(), -wanted.clone()
    price = torch.full_like(slope, least)
    upward, downward, cost = (torch.empty_like(slope) for _ in range(3))
    for done in range(_MOST_ROUNDS * columns):
        # What a step s costs: (2 g + s h) s, in place because a row may take hundreds of them.
        for step, out in ((up, upward), (down, downward)):
            torch.mul(step, diagonal, out=out).add_(slope, alpha=2).mul_(step)
        torch.minimum(upward, downward, out=cost)
        if worth is not None:
            cost.mul_(worth)
        lowest, column = cost.add_(price).min(1)
        gains = lowest < 0
        if most is not None:
            gains &= moved < most
        if done % _ROUNDS == 0:
            left = gains.nonzero()[:, 0]
            if not len(left):
                break
            if len(left) <= _WORTH * len(row):
                # Rows do not know of each other: one that gains nothing any more never will.
                row, column, gains = row[left], column[left], gains[left]
                up, down, slope, price = (each[left] for each in (up, down, slope, price))
                worth = None if worth is None else worth[left]
                upward, downward, cost = (each[left] for each in (upward, downward, cost))
        here = torch.arange(len(row), device=steps.device), column
        rises = upward[here] <= downward[here]
        slope += torch.where(gains, torch.where(rises, up[here], down[here]), 0.0)[:, None] * curvature[column]
        old = moves[row, column]
        level = old + torch.where(rises, 1, -1) * gains
        moved += (level != 0).sum() - (old != 0).sum()
        moves[row, column] = level.to(moves.dtype)
        price[here] = torch.where(level == 0, least, 0.0).to(price.dtype)
        at = level.long() + levels
        reached = steps[at, row, column]
        up[here] = steps[(at + 1).clamp_max(2 * levels), row, column] - reached
        down[here] = steps[(at - 1).clamp_min(0), row, column] - reached
    return moves.long()
