"""What a caller has switched in PyTorch stays outside: this package computes the same under any of its settings.

Notebooks switch gradients off for good, set another default dtype or device, or run a cell under `inference_mode` or
`autocast`. Every public function that makes or runs tensors is entered through `torch_defaults`. Two settings are the
caller's own and hold inside too: deterministic algorithms and the precision of matrix products (TF32).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def torch_defaults() -> Iterator[None]:
    """PyTorch as it starts up: gradients on, float32, new tensors on the CPU, no autocast, no inference mode.

    A context manager, and as `@torch_defaults()` a decorator; what was set is set again afterwards.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        # Entering a device costs time in every later call, so only where one is set.
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


def moved(tensor: Tensor, device: str | torch.device) -> Tensor:
    """The tensor on a device; one made under `inference_mode` as a copy, since no graph can hold it."""
    there = tensor.to(device)
    return there.clone() if there.is_inference() and not torch.is_inference_mode_enabled() else there
