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
    steps: Float[Tensor, "view level out in"],
    curvature: Float[Tensor, "view in in"],
    wanted: Float[Tensor, "view out in"],
    least: float,
    worth: Float[Tensor, "out in"] | None = None,
    most: int | None = None,
) -> Int[Tensor, "out in"]:
    """The moves that lower d H d^T - 2 d . b of every row most, in the mean over views, each by at least `least`.

    A view is a form in which the matrix is used: as stored, or under one of several quantizers.

    Args:
        steps: how far each weight has moved at levels -k, ..., 0, ..., k, in each view; a level that is not further out
            than the one before it in any view is not reached.
        curvature: H, the second moments of the inputs.
        wanted: b, by row.
        least: what moving a weight must gain; moving it again is free.
        worth: a factor on what each weight's moves gain, in (0, 1].
        most: how many weights may move; None = all.

    Returns:
        The level of each weight.
    """
    (views, levels), (rows, columns) = (steps.shape[0], steps.shape[1] // 2), steps.shape[2:]
    moves = torch.zeros(rows, columns, dtype=torch.int8, device=steps.device)
    moved = torch.zeros((), dtype=torch.long, device=steps.device)
    diagonal = curvature.diagonal(dim1=1, dim2=2).contiguous()
    row = torch.arange(rows, device=steps.device)  # of the matrix: those that what follows is about
    up, down, slope = steps[:, levels + 1].clone(), steps[:, levels - 1].clone(), -wanted
    price = torch.full_like(slope[0], least * views)
    upward, downward, part, cost = (torch.empty_like(price) for _ in range(4))
    for done in range(_MOST_ROUNDS * columns):
        # What a step s costs: (2 g + s h) s, in place because a row may take hundreds of them.
        for step, out in ((up, upward), (down, downward)):
            for view in range(views):
                to = part if view else out
                torch.mul(step[view], diagonal[view], out=to).add_(slope[view], alpha=2).mul_(step[view])
                if view:
                    out.add_(part)
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
                up, down, slope = (each[:, left] for each in (up, down, slope))
                worth = None if worth is None else worth[left]
                price, upward, downward, part, cost = (each[left] for each in (price, upward, downward, part, cost))
        here = torch.arange(len(row), device=steps.device), column
        rises = upward[here] <= downward[here]
        for view in range(views):
            step = torch.where(rises, up[view][here], down[view][here])
            slope[view] += torch.where(gains, step, 0.0)[:, None] * curvature[view][column]
        old = moves[row, column]
        level = old + torch.where(rises, 1, -1) * gains
        moved += (level != 0).sum() - (old != 0).sum()
        moves[row, column] = level.to(moves.dtype)
        price[here] = torch.where(level == 0, least * views, 0.0).to(price.dtype)
        at = level.long() + levels
        for view in range(views):
            reached = steps[view, at, row, column]
            up[view][here] = steps[view, (at + 1).clamp_max(2 * levels), row, column] - reached
            down[view][here] = steps[view, (at - 1).clamp_min(0), row, column] - reached
    return moves.long()
