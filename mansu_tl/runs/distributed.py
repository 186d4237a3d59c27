"""Sharing pairs and text out over processes that `torchrun` or `accelerate launch` started.

The process group is the caller's (`torch.distributed.init_process_group` or accelerate's): gloo on CPU, nccl on GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mansu_tl.errors import MansuError


def require_group() -> None:
    """Refuse to work alone where several processes were asked for."""
    if not (dist.is_available() and dist.is_initialized()):
        raise MansuError(
            "data_parallel=True: no process group; start with torchrun or accelerate launch and call "
            "torch.distributed.init_process_group, or leave data_parallel out"
        )


def share(count: int) -> slice:
    """This process's contiguous share of `count` items; shares differ by one item at most and may be empty."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return slice(rank * count // world, (rank + 1) * count // world)


def turns(count: int) -> range:
    """This process's items of `count` that are taken in turn: of a sorted list every process has short and long ones."""
    return range(dist.get_rank(), count, dist.get_world_size())


def summed(values: Tensor) -> Tensor:
    """The sum of every process's tensor, on every process."""
    on = values.to(_device())
    dist.all_reduce(on)
    return on.to(values.device)


def gathered(values: Tensor, count: int) -> Tensor:
    """The processes' shares of `count` rows put together again, on every process."""
    whole = values.new_zeros(count, *values.shape[1:])
    whole[share(count)] = values
    return summed(whole)


def of_all(values: Tensor) -> Tensor:
    """The values as they are; their gradient is the sum of what every process's part of a loss gives.

    Every process has to take the gradient, those without an item too.
    """
    return _OfAll.apply(values)


def over_all(loss: Tensor) -> Tensor:
    """The sum of every process's part of a loss; each part's gradient is its own process's."""
    return _OverAll.apply(loss)


class _OfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return summed(grads[0].clone())


class _OverAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return summed(loss.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
