"""Weights at rest on the NF4 grid, by bitsandbytes' own arithmetic."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mansu_tl.models import library as bnb

BLOCK = 64


def grid_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights a 4-bit load quantizes: every linear layer's except the output head's, by parameter name."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] != "lm_head"
    }


def nf4_image(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The weight after NF4 quantization (blocks of 64 along the in-features, fp32 scales) and dequantization."""
    size = {"blocksize": BLOCK, "quant_type": "nf4"}
    codes, state = bnb.functional.quantize_4bit(weight.contiguous(), **size, compress_statistics=False)
    return bnb.functional.dequantize_4bit(codes, state)


@torch.no_grad()
def rest_on_grid(model: nn.Module) -> None:
    """Replace every linear weight by its NF4 image, in place; doing it twice changes nothing more."""
    for weight in grid_weights(model).values():
        weight.copy_(nf4_image(weight.detach()))
