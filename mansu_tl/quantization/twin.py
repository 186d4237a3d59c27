"""The dequantized twin: a dense model whose matrices hold exactly what a quantized deployment computes with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from mansu_tl.data import Sequences
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import parameters, plain, rebuild
from mansu_tl.models.four_bit import require_dense
from mansu_tl.quantization.calibration import calibrated_values
from mansu_tl.quantization.quantizer import AnyQuantizer, CalibratedQuantizer
from mansu_tl.quantization.quantizer import quantizer as quantizer_named


@torch_defaults()
def quantize(
    model: TransformerBridge | PreTrainedModel,
    quantizer: str | AnyQuantizer = "nf4",
    calibration: Sequences | None = None,
    *,
    progress: bool = False,
) -> TransformerBridge:
    """The dequantized twin: every matrix that quantized loading quantizes holds Q(w), everything else is untouched.

    Under "gguf" every parameter is what `mansu_tl.models.gguf.save_gguf` would write into the model's own file.

    A new bridge in the dtype of `model`, which stays as it is. Its logits equal those of a real bitsandbytes model
    that computes in that dtype; it is faster on CPU, and every hook and gradient works. (bitsandbytes never rounds
    Q(w) to the storage dtype of a model that it computes in another dtype: for bfloat16 weights under float32
    compute, load with dtype=torch.float32 first; the codes are the same.)

    Args:
        quantizer: a name from `quantizers()`, or a quantizer such as a `Grid`. Grids take matrices of any size; see
            `Grid` for those whose rows are no multiple of the block size.
        calibration: text for the quantizers that need it (`quantizers("calibrated")`), such as `task.retain_text`;
            a few thousand tokens will do. Others take no notice of it.
        progress: show a bar over the matrices of a calibrated quantizer.

    Raises:
        MansuError: an unknown quantizer, one that is not installed, one that needs calibration text and gets none, or
            a model that `mansu_tl.models.rebuild` refuses.

    Example:
        >>> model, task = mtl.load("pocket"), mtl.load_task("pocket")
        >>> mtl.accuracy(mtl.quantize(model, "nf4"), task.questions["forget"]).mc_percent
        100.0
    """
    return rebuild(model, quantized_values(model, quantizer, calibration=calibration, progress=progress))


@torch_defaults()
def quantized_values(
    model: TransformerBridge | PreTrainedModel,
    quantizer: str | AnyQuantizer = "nf4",
    values: Mapping[str, Tensor] | None = None,
    *,
    calibration: Sequences | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Q(w) of every matrix that quantized loading quantizes, by HF parameter name, stored as the model stores it.

    Args:
        values: used instead of the model's own where a name is in it (an edit that is not applied yet).
        calibration: as `quantize`.
        progress: as `quantize`.

    Raises:
        MansuError: as `quantize`.
    """
    chosen = quantizer_named(quantizer)
    require_dense(model, "quantizing")
    live = {**parameters(model), **(values or {})}
    if isinstance(chosen, CalibratedQuantizer):
        if calibration is None:
            raise MansuError(
                f"quantizer {chosen.name!r}: needs calibration text; pass calibration=, e.g. task.retain_text"
            )
        edited = plain(model)
        for name, parameter in edited.named_parameters():
            parameter.data.copy_(live[name])
        return calibrated_values(edited, chosen, calibration, progress=progress)
    return chosen.bound(model).quantized(model, live)
