"""A model that computes in float32 on weights as they are stored: its matrices are widened when they are run.

A float32 copy of a model in 16 bits is twice as large as the model. Here only embeddings, norms and biases are copied; a
matrix shares its storage with the model's and exists in float32 while its layer runs, forward and backward. Values and
gradients are those of `float32_copy`, bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mansu_tl.defaults import torch_defaults
from mansu_tl.models.copies import filled
from mansu_tl.models.four_bit import require_dense
from mansu_tl.models.placement import placed_as
from mansu_tl.models.tree import Model, blank, hf_of

_NARROW = (torch.bfloat16, torch.float16)


@torch_defaults()
def widened(model: Model) -> PreTrainedModel:
    """A plain HF model over the same matrices that computes in float32; frozen, and never to be trained in place.

    Raises:
        MansuError: folded, 4-bit or otherwise packed weights, or a gpt_neox bridge whose parts disagree.
    """
    require_dense(model, "a float32 view")
    fresh = blank(model)
    matrices = {f"{path}.weight" for path, module in fresh.named_modules() if isinstance(module, nn.Linear | Conv1D)}

    def value(names: list[str], old: Tensor) -> Tensor:
        # An embedding that is the head too is looked up in float32.
        shared = old.dtype in _NARROW and matrices.issuperset(names)
        return old if shared else old.to(torch.float32)

    filled(fresh, model, value)
    for module in fresh.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]
    fresh.config.dtype = torch.float32
    return placed_as(fresh, hf_of(model)).eval().requires_grad_(False)


def _forward(module: nn.Linear | Conv1D, x: Float[Tensor, "*any d_in"]) -> Float[Tensor, "*any d_out"]:
    if module.weight.dtype == x.dtype:
        forward: Any = type(module).forward
        return forward(module, x)
    return _Product.apply(x, module.weight, module.bias, isinstance(module, Conv1D))


class _Product(torch.autograd.Function):
    """x W^T + b, or x W + b where W is stored [in, out], with W widened in passing and no gradient for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.transposed = transposed
        wide = weight.to(x.dtype)
        if not transposed:
            return linear(x, wide, bias)
        flat = x.reshape(-1, x.shape[-1])
        out = flat @ wide if bias is None else torch.addmm(bias, flat, wide)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,), (grad,) = ctx.saved_tensors, grads
        wide = weight.to(grad.dtype)
        flat = grad.reshape(-1, grad.shape[-1]) @ (wide.T if ctx.transposed else wide)
        return flat.view(*grad.shape[:-1], -1), None, None, None
