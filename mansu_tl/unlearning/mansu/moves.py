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
    moves = torch.zeros(rows, columns, dtype=torch.long, device=steps.device)
    up, down = steps[levels + 1].clone(), steps[levels - 1].clone()
    slope, diagonal = -wanted.clone(), curvature.diagonal().contiguous()
    price = torch.full_like(slope, least)
    best, other = torch.empty_like(slope), torch.empty_like(slope)
    every = torch.arange(rows, device=steps.device)
    moved = 0
    for _ in range(_MOST_ROUNDS * columns):
        if most is not None and moved >= most:
            break
        # What a step s gains: -(2 g + s h) s, in place because a row may take hundreds of them.
        for step, out in ((up, best), (down, other)):
            torch.mul(step, diagonal, out=out).add_(slope, alpha=2).mul_(step).neg_()
        upward = best >= other
        torch.maximum(best, other, out=best)
        if worth is not None:
            best.mul_(worth)
        gain, column = best.sub_(price).max(1)
        row = every[gain > 0]
        if not len(row):
            break
        column = column[row]
        direction = torch.where(upward[row, column], 1, -1)
        step = torch.where(direction > 0, up[row, column], down[row, column])
        slope[row] += step[:, None] * curvature[column]
        old = moves[row, column]
        level = old + direction
        if most is not None:
            moved += int((level != 0).sum() - (old != 0).sum())
        moves[row, column] = level
        price[row, column] = torch.where(level == 0, least, 0.0)
        at = level + levels
        here = steps[at, row, column]
        up[row, column] = steps[(at + 1).clamp_max(2 * levels), row, column] - here
        down[row, column] = steps[(at - 1).clamp_min(0), row, column] - here
    return moves
