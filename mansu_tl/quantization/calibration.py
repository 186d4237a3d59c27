"""What a calibration text sends into each matrix, and the road of a whole model through a calibrated quantizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import MappingProxyType

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mansu_tl.data import Sequences
from mansu_tl.data.fit import require_fit, require_sequences
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import LinearWeight, linear_weights, orient
from mansu_tl.models.tree import family
from mansu_tl.quantization.quantizer import CalibratedQuantizer, Inputs
from mansu_tl.runs import distributed
from mansu_tl.runs.values import watched

_MOST_BYTES = 2**30


class _Enough(Exception):  # noqa: N818 - no error
    """Every matrix of a pass has been seen; what lies behind the last of them is not run."""


@torch_defaults()
@torch.no_grad()
def inputs_of(
    model: PreTrainedModel,
    names: Iterable[str],
    text: Sequences,
    batch_size: int = 32,
    *,
    weights: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
    data_parallel: bool = False,
) -> dict[str, Inputs]:
    """The inputs of each named matrix over the real tokens of a text, in one pass of the model.

    Args:
        weights: by a matrix's name, what each token's input is multiplied by, [token, 1], made of what the matrix gives out.
        data_parallel: share the batches out over the processes of `torch.distributed`, each of which gets the whole.

    Raises:
        MansuError: no text, or inputs that are not finite.
    """
    require_sequences(text)
    if len(text) == 0:
        raise MansuError("calibration: the text is empty; pass at least one sequence, e.g. task.retain_text")
    require_fit(model, text)
    names = list(names)
    moments: dict[str, Tensor] = {}
    magnitudes: dict[str, Tensor] = {}
    count = 0
    real = torch.empty(0)
    left_out: set[str] = set()

    def add(name: str, entered: Tensor, left: Tensor) -> None:
        at = real.to(entered.device)
        x = entered[at].float()
        if name in weights:
            x = x * weights[name](left[at])
        for kept, part in ((moments, x.T @ x), (magnitudes, x.abs().sum(0))):
            kept[name] = kept[name].add_(part) if name in kept else part
        left_out.discard(name)
        if not left_out:
            raise _Enough

    text = text.to(next(model.parameters()).device)
    order = text.lengths.cpu().argsort(stable=True)  # alike in length, so that little is padded
    batches = order.split(batch_size)
    if data_parallel:
        batches = tuple(batches[i] for i in distributed.turns(len(batches)))
    with watched(model, names, add):
        for rows in batches:
            batch = text[rows].trimmed()
            real, left_out = batch.real, set(names)
            count += int(real.sum())
            # Padding lies to the right of every real token, where causal attention does not look.
            with suppress(_Enough):
                model.base_model(batch.tokens, use_cache=False)
    if data_parallel:
        count = int(distributed.summed(torch.tensor(count)))
        for name in names:
            on, width = model.get_parameter(name).device, linear_weights(model)[name].in_features
            for kept, shape in ((moments, (width, width)), (magnitudes, (width,))):
                kept[name] = distributed.summed(kept.get(name, torch.zeros(shape, device=on)))
    for name, moment in moments.items():
        if not torch.isfinite(moment).all():
            raise MansuError(f"calibration: inputs of {name} are not finite; check the weights and the text")
    return {name: Inputs(moment.div_(count), magnitudes[name].div_(count), count) for name, moment in moments.items()}


@torch.no_grad()
def calibrated_values(
    model: PreTrainedModel, quantizer: CalibratedQuantizer, text: Sequences, *, progress: bool = False
) -> dict[str, Tensor]:
    """Q(w) of every matrix that quantized loading quantizes, as stored; `model` is used up where sequential.

    A sequential quantizer (GPTQ) goes layer by layer, and each layer's inputs come from the layers already quantized:
    one pass over the text a layer. All matrices of one layer are taken together. Others look at the full-precision
    model, as many layers in one pass as a gibibyte of second moments allows.
    """
    linear = linear_weights(model)
    groups = _groups(model, linear, 0 if quantizer.sequential else _MOST_BYTES)
    parameters = dict(model.named_parameters())
    values: dict[str, Tensor] = {}
    with tqdm(total=len(linear), desc=quantizer.name, unit="matrix", disable=not progress) as bar:
        for names in groups:
            inputs = inputs_of(model, names, text)
            for name in names:
                w = orient(parameters[name].detach(), linear[name])
                values[name] = orient(quantizer.roundtrip(w, inputs.pop(name)), linear[name]).contiguous()
                bar.update()
            if quantizer.sequential:
                for name in names:
                    parameters[name].copy_(values[name])
    return values


def _groups(model: PreTrainedModel, linear: Mapping[str, LinearWeight], most: int) -> list[list[str]]:
    """The matrices layer by layer, neighbouring layers together while their second moments fit in `most` bytes."""
    prefix = f"{family(model).layers}."
    layers: dict[str, list[str]] = {}
    for name in linear:
        layers.setdefault(name.removeprefix(prefix).split(".", 1)[0], []).append(name)
    groups: list[list[str]] = []
    held = 0
    for names in layers.values():
        size = sum(4 * linear[name].in_features ** 2 for name in names)
        if groups and held + size <= most:
            groups[-1] += names
            held += size
        else:
            groups.append(list(names))
            held = size
    return groups
