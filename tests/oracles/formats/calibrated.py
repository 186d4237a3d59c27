"""What the libraries of GPTQ and AWQ make of a few weights and inputs; never run by a test, and never with this package.

    pip install --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.19.0 autoawq==0.2.7.post3 auto-gptq==0.7.1
    python tests/oracles/formats/calibrated.py

(and what they import: loguru, peft, auto-round, nvidia-ml-py, zstandard; AutoGPTQ's wheel is for Python 3.11) writes
calibrated.safetensors beside it: the dequantized values of `weights()` under the inputs `inputs()`, float32, by library and
setting. AutoGPTQ's file is run alone, since the package imports what transformers no longer has; its call that waits for a
GPU is left out.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

GROUP = 128


def weights() -> torch.Tensor:
    """Eight rows of 256."""
    return torch.randn(8, 256, generator=torch.Generator().manual_seed(3)) * 0.02


def inputs() -> torch.Tensor:
    """512 tokens whose features go together, some of them far larger than others."""
    generator = torch.Generator().manual_seed(4)
    mixed = torch.randn(512, 48, generator=generator) @ torch.randn(48, 256, generator=generator)
    return (mixed + torch.randn(512, 256, generator=generator)) * torch.rand(256, generator=generator).pow(4)


def autogptq() -> dict[str, torch.Tensor]:
    """GPTQ.fasterquant, in the plain order, and by activation under scales that are measured before."""
    folder = Path(find_spec("auto_gptq").submodule_search_locations[0]) / "quantization"
    made = spec_from_file_location("quantization", folder / "gptq.py", submodule_search_locations=[str(folder)])
    library = module_from_spec(made)
    library.__package__ = "quantization"
    import sys

    sys.modules["quantization"] = library
    made.loader.exec_module(library)
    library.torch.cuda.synchronize = lambda: None
    found = {}
    for symmetric, grid in ((True, "w4a16-g128"), (False, "int4-asym-g128")):
        for name, chosen in {"gptq": {}, "gptq-act": {"actorder": True, "static_groups": True}}.items():
            layer = torch.nn.Linear(256, 8, bias=False)
            layer.weight.data = weights()
            each = library.GPTQ(layer)
            each.quantizer.configure(4, perchannel=True, sym=symmetric)
            each.add_batch(inputs(), None)
            each.fasterquant(group_size=GROUP, **chosen)
            found[f"autogptq/{name}-{grid}"] = layer.weight.data.clone()
    return found


def llm_compressor() -> dict[str, torch.Tensor]:
    """quantize_weight under the scales of its observer (minimum and maximum), by activation (its default) and not."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    found = {}
    w, x = weights(), inputs()
    for symmetric, grid in ((True, "w4a16-g128"), (False, "w4a16-asym-g128")):
        for name, order in {"gptq-act": "static", "gptq-static": None}.items():
            args = QuantizationArgs(
                num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=symmetric, actorder=order
            )
            groups = w.unflatten(-1, (-1, GROUP))
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
            values, _, fallback = quantize_weight(
                w.clone()[None], (x.T @ x / len(x))[None], scale[None], zero[None], None, args
            )
            assert not fallback.any()
            found[f"llm-compressor/{name}-{grid}"] = values[0]
    return found


class Kept(torch.nn.Linear):
    """AutoAWQ keeps the weights that it scales in place with `.cpu()`, a copy on a GPU only."""

    def state_dict(self, *args, **kwargs):
        """A copy."""
        return {key: value.clone() for key, value in super().state_dict(*args, **kwargs).items()}


def autoawq() -> dict[str, torch.Tensor]:
    """AwqQuantizer._search_best_scale of one matrix, by activations alone and by activations and weights (its default)."""
    from awq.quantize.quantizer import AwqQuantizer

    found = {}
    for name, duo in {"awq": False, "awq-duo": True}.items():
        layer = Kept(256, 8, bias=False)
        layer.weight.data = weights()
        holder = torch.nn.ModuleDict({"before": torch.nn.LayerNorm(256), "layer": layer})
        each = SimpleNamespace(
            w_bit=4, group_size=GROUP, zero_point=True, duo_scaling=duo, max_chunk_memory=2**30,
            n_parallel_calib_samples=None, _sanitize_kwargs=lambda given, module: given,
        )  # fmt: skip
        for method in ("pseudo_quantize_tensor", "_module_forward", "_compute_best_scale", "_compute_loss"):
            setattr(each, method, getattr(AwqQuantizer, method).__get__(each))
        _, _, scales = AwqQuantizer._search_best_scale(each, holder, holder["before"], [layer], inputs())
        found[f"autoawq/{name}-int4-asym-g128"] = each.pseudo_quantize_tensor(weights() * scales)[0] / scales
    return found


if __name__ == "__main__":
    found = autogptq() | llm_compressor() | autoawq()
    versions = {
        name: version(name) for name in ("auto-gptq", "llmcompressor", "compressed-tensors", "autoawq", "torch")
    }
    save_file(
        {key: value.detach().contiguous() for key, value in found.items()},
        Path(__file__).with_name("calibrated.safetensors"),
        versions,
    )
