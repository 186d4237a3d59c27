"""Real 4-bit models: bitsandbytes' own `Linear4bit` layers under a hooked model.

Three things are put right, once, before any forward. On CPUs with AVX512-BF16 an eval-mode `Linear4bit` repacks its
weight at its first forward and computes in bfloat16, without autograd: switched off. A checkpoint says in which dtype
it computes: here that is the model's own. And TransformerLens makes the q, k and v of gpt2 and gpt_neox by slicing
the fused weight, which packed bytes do not allow: they read their rows of the packed matrix at every call instead. The
packed HF parameters stay the only weights there are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mansu_tl.errors import MansuError
from mansu_tl.models import library as bnb
from mansu_tl.models.families import Family, family_of
from mansu_tl.models.stored import is_read, quantization_settings, way_out
from mansu_tl.models.tree import Model, modules, quantization_state

KINDS = ("nf4", "fp4")
Splitter = Callable[[nn.Module], tuple[nn.Module, ...]]


def quantization_config(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How bitsandbytes is asked to load: blocks of 64, absmax in float32, computing in `dtype`."""
    if kind not in KINDS:
        raise MansuError(
            f"quantized={kind!r}: unknown; choose one of {', '.join(KINDS)}, or None for the dense model (its twin "
            "under any other quantizer is mansu_tl.quantize)"
        )
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype)


def stored_kind(config: PretrainedConfig, name: str) -> str | None:
    """The kind of real 4-bit layers that a checkpoint's config says it is stored in; None for one that becomes dense.

    Raises:
        MansuError: stored in codes that are not read.
    """
    settings = quantization_settings(config)
    if settings is None or is_read(settings):
        return None
    method = settings["quant_method"]
    if method != "bitsandbytes" or not settings.get("load_in_4bit", settings.get("_load_in_4bit", False)):
        what = "bitsandbytes in 8 bits" if method == "bitsandbytes" else method
        raise MansuError(
            f"{name}: this checkpoint is quantized with {what}, whose codes are not read here; {way_out(what)}"
        )
    return str(settings.get("bnb_4bit_quant_type", "fp4"))


def packed(model: Model) -> Iterator[tuple[str, Any]]:
    """The 4-bit layers by HF name."""
    for name, module in modules(model):
        if getattr(module._parameters.get("weight"), "quant_state", None) is not None:
            yield name, module


def is_four_bit(model: Model) -> bool:
    """Whether any layer is a 4-bit one."""
    return next(packed(model), None) is not None


def require_dense(model: Model, what: str) -> None:
    """Refuse a 4-bit model where only dense weights will do.

    Args:
        what: what was asked for, as in "editing".
    """
    for name, module in packed(model):
        raise MansuError(
            f"{name}.weight: holds packed {module.weight.dtype} weights, and {what} needs dense ones; load the dense "
            "checkpoint"
        )


def require_kind(model: Model, kind: str, name: str) -> None:
    """Refuse a model whose 4-bit layers are not of this kind."""
    for path, module in packed(model):
        stored = module.weight.quant_state.quant_type
        if stored != kind:
            raise MansuError(
                f"{name}: quantized={kind!r}, but {path} is stored in {stored} already; leave quantized= out, or pass "
                "the dense checkpoint"
            )


def convert(hf: PreTrainedModel, kind: str) -> PreTrainedModel:
    """The dense model with every linear layer but the output embedding made a 4-bit one, in place."""
    asked = quantization_config(kind, dense_dtype(hf))
    head = family_of(hf.config, type(hf).__name__).head
    for path, module in list(modules(hf)):
        if path == head or not isinstance(module, nn.Linear | Conv1D):
            continue
        weight = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
        codes, state = bnb.functional.quantize_4bit(weight.contiguous(), blocksize=64, quant_type=kind)
        hf.set_submodule(path, _layer(type(module), codes, state, module.bias))
    hf.config.quantization_config = asked
    return hf


def repack(fresh: PreTrainedModel, source: Model) -> None:
    """Put copies of the 4-bit layers of `source` into a fresh model of its config, bytes and statistics as they are."""
    for path, old in packed(source):
        state = copy.deepcopy(quantization_state(old.weight))
        codes = old.weight.data.detach().clone()
        fresh.set_submodule(path, _layer(type(fresh.get_submodule(path)), codes, state, old.bias))


def compute_from_codes(hf: PreTrainedModel, name: str) -> None:
    """Make every 4-bit layer compute in the model's dtype, from its codes as stored."""
    dtype = dense_dtype(hf)
    for path, layer in packed(hf):
        state = quantization_state(layer.weight)
        assert state is not None
        columns, block = state.shape[1], state.blocksize
        if layer.weight.device.type == "cpu" and columns % block:
            raise MansuError(
                f"{name}: {path}.weight has rows of {columns}, no multiple of the block size {block}; bitsandbytes "
                "decodes such matrices wrongly on the CPU, use the dense model or its twin (mansu_tl.quantize)"
            )
        for scale in (state.absmax, None if state.state2 is None else state.state2.absmax):
            if scale is not None and not torch.isfinite(scale).all():
                raise MansuError(f"{name}: {path}.weight holds NaN or infinity; the checkpoint is broken")
        if layer.weight.is_floating_point():
            # Bytes stored as floats: TransformerLens would cast its activations to their dtype.
            layer.weight.data = layer.weight.data.view(torch.uint8).view(-1, 1)
            layer.weight.quant_storage = layer.quant_storage = torch.uint8
        layer.support_avx512bf16_for_cpu = False
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
        # What dequantizing rounds to: in a narrower one than the forward's, gradients would belong to other weights.
        state.dtype = dtype


def dense_dtype(hf: PreTrainedModel) -> torch.dtype:
    """The dtype of what is not packed."""
    embedding: Any = hf.get_input_embeddings().weight
    return embedding.dtype


def splitter(kind: Family, heads: int, dense: Splitter) -> Splitter:
    """What a bridge calls on an attention module to get q, k and v, `dense` where the fused matrix is not 4-bit."""
    path = kind.q.rpartition(".")[2]

    def split(attention: nn.Module) -> tuple[nn.Module, ...]:
        fused = attention.get_submodule(path)
        if getattr(fused._parameters["weight"], "quant_state", None) is None:
            return dense(attention)
        return tuple(_FusedPart(fused, kind, heads, part) for part in range(3))

    return split


class _FusedPart(nn.Module):
    """The q, k or v rows of a packed fused matrix, read at every call."""

    def __init__(self, fused: nn.Module, kind: Family, heads: int, part: int) -> None:
        super().__init__()
        # In a tuple, so that the matrix is not registered (and saved, counted, moved) a second time.
        self.source = (fused,)
        self.kind, self.heads, self.part = kind, heads, part

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_out"]:
        # Dequantized again on the way back, as by bitsandbytes itself: the graph keeps no dense matrix.
        out: Tensor = checkpoint(self._product, x, use_reentrant=False, preserve_rng_state=False)
        return out

    def _product(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_out"]:
        weight: Any = self.source[0]._parameters["weight"]
        bias = self.source[0]._parameters.get("bias")
        whole = bnb.functional.dequantize_4bit(weight.data, quantization_state(weight))
        rows = self.kind.fused_parts(whole, self.heads)[self.part].flatten(0, 1).contiguous()
        offset = None if bias is None else self.kind.fused_parts(bias, self.heads)[self.part].flatten()
        return nn.functional.linear(x, rows, offset)


def _layer(source: type[nn.Module], codes: Tensor, state: Any, bias: Tensor | None) -> Any:
    """A 4-bit layer, as `from_pretrained` puts it in the place of a `source`."""
    layer = bnb.modules.Linear4bit(
        state.shape[1], state.shape[0], bias=False, quant_type=state.quant_type, device="meta"
    )
    layer.source_cls = source  # transformers' mark, no module
    layer.weight = bnb.modules.Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=codes.dtype,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state, layer.quant_storage = state, codes.dtype
    # A parameter even where there is none (None), so that it lists after the weight as in a dense layer.
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False))
    return layer.eval()
