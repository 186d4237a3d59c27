"""Shortcuts that check themselves: with nothing patched, a shortened run has to give what the full run gives.

A shortened run leans on how TransformerLens hands things on to transformers. Where a release has changed that, the numbers
are wrong without a sign of it; so the first use of every shortcut on a model, with nothing patched, is compared with the
model's plain run, once per model and process.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.errors import MansuError
from mansu_tl.models.state import computing_dtype

_CHECKED = "_mansu_tl_checked"
_PACKAGES = ("transformers", "transformer-lens", "torch", "mansu-tl")
# Largest difference that rounding explains, in standard deviations of the compared values.
_LEAST, _HALF = 1e-3, 0.1


def require_exact(
    model: TransformerBridge, what: str, compare: Callable[[], tuple[Float[Tensor, ...], Float[Tensor, ...]]]
) -> None:
    """Compare a shortened run with the full one, unless this was done for this model before.

    Args:
        what: the shortcut's name.
        compare: gives the shortened run's values and the full run's, of one shape.
    """
    checked: set[str] = model.__dict__.setdefault(_CHECKED, set())
    if what in checked:
        return
    got, want = (value.detach().float().cpu() for value in compare())
    if not torch.isfinite(want).all():
        return  # broken weights are reported where they are measured
    scale = max(want.std(correction=0).item(), 1e-6)
    off = (got - want).abs().max().item() / scale
    most = _HALF if computing_dtype(model) in (torch.bfloat16, torch.float16) else _LEAST
    if not off <= most:
        installed = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
        raise MansuError(
            f"{what}: with nothing patched it differs from the plain run by {off:.2g} standard deviations, so its numbers "
            f"would be wrong; installed are {installed}; install the versions in constraints.txt"
        )
    checked.add(what)
