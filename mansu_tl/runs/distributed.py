"""Sharing pairs out over processes that `torchrun` or `accelerate launch` started.

The process group is the caller's (`torch.distributed.init_process_group` or accelerate's): gloo on CPU, nccl on GPUs.
"""

from __future__ import annotations

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


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
