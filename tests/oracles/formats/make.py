"""What the libraries that ship a format make of a few weights; never run by a test, and never with this package.

    pip install compressed-tensors==0.20.0 torchao==0.18.0 llama-cpp-python==0.3.36
    python tests/oracles/formats/make.py

writes vectors.safetensors beside it: the weights `w` [4, 256] in float32 (cast to the dtype first where a name says one), and
for each format and dtype the library's dequantized values; `stored/...`, what compressed-tensors puts into a checkpoint for
them; for GGUF's formats the bytes that llama.cpp writes.
"""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COMPRESSORS = {
    "w4a16-g128": "pack-quantized",
    "w4a16-asym-g128": "pack-quantized",
    "fp8": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4-even": "mxfp4-pack-quantized",
}
_GGML = {"Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "IQ4_NL": (20, 32, 18)}


def weights() -> torch.Tensor:
    """An ordinary row, one with outliers, one whose first half is 0 and whose second is positive, one with many ties."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(4, 256, generator=generator) * 0.02
    w[1, ::37] *= 30
    w[2] = w[2].abs()
    w[2, :128] = 0
    w[3] = (w[3] * 256).round() / 256
    return w


def compressed(w: torch.Tensor) -> dict[str, torch.Tensor]:
    """llm-compressor's round to nearest: scales by minimum and maximum, then compressed-tensors' own rounding."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    def args(**given):
        return QuantizationArgs(**given)

    formats = {
        "w4a16-g128": PRESET_SCHEMES["W4A16"]["weights"],
        "w4a16-asym-g128": args(num_bits=4, type="int", strategy="group", group_size=128, symmetric=False),
        "fp8": args(num_bits=8, type="float", strategy="channel", symmetric=True),
        "fp8-tensor": args(num_bits=8, type="float", strategy="tensor", symmetric=True),
        "nvfp4": PRESET_SCHEMES["NVFP4A16"]["weights"],
        "mxfp4-even": PRESET_SCHEMES["MXFP4A16"]["weights"],
    }
    found = {}
    for name, arguments in formats.items():
        for dtype, kind in _DTYPES.items():
            x, of_matrix = w.to(kind), None
            if arguments.group_size:
                groups = x.unflatten(-1, (-1, arguments.group_size))
                low, high = groups.amin(-1), groups.amax(-1)
            elif arguments.strategy == "channel":
                low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
            else:
                low, high = x.amin(), x.amax()
            if arguments.strategy == "tensor_group":
                of_matrix = generate_gparam(x.amin(), x.amax())
            scale, zero = calculate_qparams(low, high, arguments, global_scale=of_matrix)
            found[f"{name}/{dtype}"] = fake_quantize(x, scale, zero, arguments, global_scale=of_matrix).to(kind)
            if dtype == "float32" and name in _COMPRESSORS:
                parts = {
                    "weight": x,
                    "weight_scale": scale,
                    "weight_zero_point": zero,
                    "weight_global_scale": of_matrix,
                }
                scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
                stored = BaseCompressor.get_value_from_registry(_COMPRESSORS[name]).compress(
                    {key: value for key, value in parts.items() if value is not None}, scheme
                )
                found |= {f"stored/{name}/{key}": value for key, value in stored.items()}
    return found


def torchao(w: torch.Tensor) -> dict[str, torch.Tensor]:
    """The arithmetic of Int4WeightOnlyConfig (its packing needs a GPU), and both scale modes of MXFP4."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode
    from torchao.quantization import quant_primitives as library

    found = {}
    x, kind = w.bfloat16(), torch.bfloat16
    for size in (64, 128):
        scale, zero = library._choose_qparams_affine_tinygemm(
            x, library.MappingType.ASYMMETRIC, (1, size), torch.int32, 0, 15, scale_dtype=kind, zero_point_dtype=kind
        )
        codes = library._quantize_affine_tinygemm(x, (1, size), scale, zero, torch.int32, 0, 15)
        found[f"int4wo-g{size}/bfloat16"] = library._dequantize_affine_tinygemm(
            codes, (1, size), scale, zero, torch.int32, 0, 15, output_dtype=kind
        )
    for name, mode in (("floor", ScaleCalculationMode.FLOOR), ("even", ScaleCalculationMode.EVEN)):
        for dtype in ("float32", "bfloat16"):
            kind = _DTYPES[dtype]
            packed = MXTensor.to_mx(w.to(kind), torch.float4_e2m1fn_x2, 32, scaling_mode=mode)
            found[f"mxfp4-{name}/{dtype}/torchao"] = packed.dequantize(kind)
    return found


def llama(w: torch.Tensor) -> dict[str, torch.Tensor]:
    """ggml_quantize_chunk without an importance matrix."""
    import llama_cpp

    library = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/libggml-base.so*"))))
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    found = {}
    for name, (number, block, size) in _GGML.items():
        raw = torch.zeros(len(w), w.shape[1] // block * size, dtype=torch.uint8)
        assert chunk(number, w.data_ptr(), raw.data_ptr(), 0, *w.shape, None) == raw.numel()
        found[f"{name}/bytes"] = raw
    return found


if __name__ == "__main__":
    w = weights()
    found = {"w": w, **compressed(w), **torchao(w), **llama(w)}
    versions = {name: version(name) for name in ("compressed-tensors", "torchao", "llama-cpp-python", "torch")}
    save_file(
        {key: value.contiguous() for key, value in found.items()},
        Path(__file__).with_name("vectors.safetensors"),
        versions,
    )
