"""Checkpoints in Hugging Face format whose weights are stored in codes: read as dense models, or refused with the way out.

Read are those of compressed-tensors (int packed, int8, fp8, nvfp4, mxfp4), "fp8" (blocks under `weight_scale_inv`), GPTQ and
AWQ (gemm). Each value is what the library that wrote the checkpoint dequantizes. What a deployment does to activations is no
part of it. What a matrix was stored in is remembered beside the model (`stored_formats`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mansu_tl.errors import MansuError
from mansu_tl.models.tree import Model, hf_of

_REMEMBERED = "_mansu_tl_stored"
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Where the eight columns of a packed word of AWQ's gemm layout come from.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_TWIN = "its twin under a quantizer is mansu_tl.quantize"
# How a checkpoint of each method that is known and not read becomes one that is.
_WAYS_OUT: Mapping[str, str] = {
    "mxfp4": "save it dequantized, from_pretrained(..., quantization_config=Mxfp4Config(dequantize=True))",
    "bitsandbytes in 8 bits": f"pass the dense checkpoint ({_TWIN}(model, 'int8'))",
    "hqq": f"pass the dense checkpoint ({_TWIN}(model, 'hqq-int4-g64'))",
    "torchao": f"pass the dense checkpoint ({_TWIN}(model, 'int4wo-g128') or 'torchao-int4-g64')",
    "auto-round": "export it with format='auto_gptq' or 'auto_awq'",
}
_KNOWN = (
    "aqlm", "auto-round", "bitnet", "eetq", "fbgemm_fp8", "fp_quant", "higgs", "hqq", "mxfp4", "quanto", "quark", "spqr",
    "sinq", "torchao", "vptq",
)  # fmt: skip


@dataclass(frozen=True)
class StoredFormats:
    """Where a dense model's values came from.

    Attributes:
        folder: the checkpoint.
        formats: by HF parameter name, what the matrix was stored in, as quantizers are called where there is one.
    """

    folder: str
    formats: Mapping[str, str]


def stored_formats(model: Model) -> StoredFormats | None:
    """What a model's matrices were stored in; None for one that came from a dense checkpoint."""
    return hf_of(model).__dict__.get(_REMEMBERED)


def remember_formats(hf: PreTrainedModel, stored: StoredFormats | None) -> None:
    """Keep beside a model what it, or the model that it is a copy of, was stored in."""
    hf.__dict__[_REMEMBERED] = stored


def quantization_settings(config: PretrainedConfig) -> dict[str, Any] | None:
    """What a checkpoint's config says of its codes, `quant_method` as a plain name; None for a dense one."""
    asked: Any = getattr(config, "quantization_config", None)
    if asked is None:
        return None
    settings = dict(asked if isinstance(asked, dict) else asked.to_dict())
    method = settings.get("quant_method", "unknown")
    settings["quant_method"] = str(getattr(method, "value", method))
    return settings


def is_read(settings: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of these settings is dequantized here."""
    return settings["quant_method"] in _READERS


def way_out(method: str) -> str:
    """What to do with a checkpoint whose codes are not read."""
    if method in _WAYS_OUT:
        return _WAYS_OUT[method]
    known = "" if method in _KNOWN else ", a method that is not known here"
    return f"pass the dense checkpoint ({_TWIN}){known}"


def dense_state(
    folder: Path, settings: Mapping[str, Any], dtype: torch.dtype, name: str
) -> tuple[dict[str, Tensor], StoredFormats]:
    """All parameters of a checkpoint, dequantized, and what each was stored in.

    Raises:
        MansuError: a layout of the method that is not read.
    """
    method = settings["quant_method"]
    reader = _READERS[method](settings, name)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in _tensors(folder):
        module, _, leaf = key.rpartition(".")
        modules.setdefault(module, {})[leaf] = value
    state, formats = {}, {}
    for module, parts in modules.items():
        found = reader(parts)
        if found is not None:
            weight, formats[f"{module}.weight"] = found
            # In the dtype of the model, to which its own library rounds last.
            parts = {"weight": weight.to(dtype), **({"bias": parts["bias"]} if "bias" in parts else {})}
        for leaf, value in parts.items():
            if leaf not in _BESIDE:
                state[f"{module}.{leaf}" if module else leaf] = value
    if not formats:
        raise MansuError(
            f"{name}: says that it is quantized with {method}, and holds no matrix in codes; convert it again"
        )
    return state, StoredFormats(str(folder), formats)


# Scales of activations and of the cache, which are no weights.
_BESIDE = ("input_scale", "output_scale", "k_scale", "v_scale", "q_scale", "input_global_scale", "input_zero_point")


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                yield key, file.get_tensor(key)


Reader = Callable[[Mapping[str, Tensor]], tuple[Tensor, str] | None]


def _compressed(settings: Mapping[str, Any], name: str) -> Reader:
    """compressed-tensors, and "fp8": what a module's tensors are called says how they are stored."""
    sparse = settings.get("sparsity_config") or {}
    if sparse.get("format", "dense") != "dense":
        raise MansuError(f"{name}: compressed-tensors with sparsity ({sparse['format']}); pass the dense checkpoint")

    def read(parts: Mapping[str, Tensor]) -> tuple[Tensor, str] | None:
        scale = parts.get("weight_scale", parts.get("weight_scale_inv"))
        if scale is None:
            return None
        if "weight_packed" not in parts:
            weight = parts["weight"]
            kind = "fp8" if weight.is_floating_point() else "w8a8"
            per = "-tensor" if scale.numel() == 1 and len(weight) > 1 else "" if scale.shape[-1] == 1 else "-block"
            return weight.to(scale.dtype) * _over_blocks(scale, weight), kind + per
        packed = parts["weight_packed"]
        if packed.dtype == torch.uint8:
            return _four_bit_floats(packed, scale, parts.get("weight_global_scale"))
        rows, columns = (int(each) for each in parts["weight_shape"])
        bits = packed.shape[1] * 32 // columns
        half = 1 << (bits - 1)
        codes = _unpacked(packed, bits, columns) - half
        group = columns // scale.shape[1]
        groups = parts.get("weight_g_idx")
        of = torch.arange(columns) // group if groups is None or (groups < 0).any() else groups.long()
        name = (
            f"w{bits}a16"
            + ("-asym" if "weight_zero_point" in parts else "")
            + (f"-g{group}" if group < columns else "")
        )
        if "weight_zero_point" in parts:
            zeros = _unpacked(parts["weight_zero_point"].T.contiguous(), bits, rows).T - half
            codes = codes - zeros[:, of]
        return codes.to(scale.dtype) * scale[:, of], name

    return read


def _four_bit_floats(packed: Tensor, scale: Tensor, of_matrix: Tensor | None) -> tuple[Tensor, str]:
    """nvfp4 and mxfp4: two e2m1 numbers a byte, the lower half first."""
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
    values = torch.tensor(_E2M1)[codes & 7] * torch.where(codes < 8, 1.0, -1.0)
    if of_matrix is None:
        steps, name = torch.ldexp(torch.ones(scale.shape), scale.int() - 127), "mxfp4"
    else:
        steps, name = scale.float() / of_matrix.float(), "nvfp4"
    return values * steps.repeat_interleave(values.shape[1] // steps.shape[1], 1), name


def _gptq(settings: Mapping[str, Any], name: str) -> Reader:
    """GPTQ as AutoGPTQ and GPTQModel pack it: words along the input features; zero points less one in version 1."""
    bits = int(settings.get("bits", 4))
    if bits not in (2, 4, 8):
        raise MansuError(f"{name}: GPTQ of {bits} bits, whose codes cross words; {way_out('gptq')}")
    less = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1

    def read(parts: Mapping[str, Tensor]) -> tuple[Tensor, str] | None:
        if "qweight" not in parts:
            return None
        scales = parts["scales"]
        columns, rows = parts["qweight"].shape[0] * 32 // bits, scales.shape[1]
        codes = _unpacked(parts["qweight"].T.contiguous(), bits, columns)
        zeros = _unpacked(parts["qzeros"], bits, rows) + less & (1 << bits) - 1
        group = -(-columns // len(scales))
        of = parts["g_idx"].long() if "g_idx" in parts else torch.arange(columns) // group
        return ((codes.T - zeros[of]).to(scales.dtype) * scales[of]).T.contiguous(), f"gptq-int{bits}-g{group}"

    return read


def _awq(settings: Mapping[str, Any], name: str) -> Reader:
    """AWQ's gemm layout: eight output features a word, in an order of its own."""
    bits, version = int(settings.get("bits", settings.get("w_bit", 4))), str(settings.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise MansuError(f"{name}: AWQ of {bits} bits in layout {version!r}; export it in 4 bits with version='GEMM'")
    order = torch.tensor(_AWQ_ORDER).argsort()

    def columns_of(words: Tensor) -> Tensor:
        return _unpacked(words, 4, words.shape[1] * 8).view(len(words), -1, 8)[:, :, order].flatten(1)

    def read(parts: Mapping[str, Tensor]) -> tuple[Tensor, str] | None:
        if "qweight" not in parts:
            return None
        scales, codes, zeros = parts["scales"], columns_of(parts["qweight"]), columns_of(parts["qzeros"])
        group = len(codes) // len(scales)
        of = torch.arange(len(codes)) // group
        return ((codes - zeros[of]).to(scales.dtype) * scales[of]).T.contiguous(), f"awq-int4-asym-g{group}"

    return read


def _unpacked(words: Int[Tensor, "row word"], bits: int, count: int) -> Int[Tensor, "row code"]:
    """Codes of so many bits from int32 words, lowest bits first, across words where they do not fit."""
    starts = torch.arange(count) * bits
    wide = words.long() & 0xFFFFFFFF
    wide = torch.nn.functional.pad(wide, (0, 1))
    both = wide[:, starts // 32] | wide[:, starts // 32 + 1] << 32
    return (both >> starts % 32 & (1 << bits) - 1).int()


def _over_blocks(scale: Float[Tensor, "*any"], weight: Shaped[Tensor, "out in"]) -> Float[Tensor, "*any_scale"]:
    """Scales that can be multiplied with a matrix: one, one a row, or one a block of rows and columns."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 1:
        return scale[:, None]
    if scale.shape == (len(weight), 1):
        return scale
    high, wide = (-(-size // count) for size, count in zip(weight.shape, scale.shape, strict=True))
    return scale.repeat_interleave(high, 0)[: len(weight)].repeat_interleave(wide, 1)[:, : weight.shape[1]]


_READERS: dict[str, Callable[[Mapping[str, Any], str], Reader]] = {
    "compressed-tensors": _compressed,
    "fp8": _compressed,
    "gptq": _gptq,
    "awq": _awq,
}
