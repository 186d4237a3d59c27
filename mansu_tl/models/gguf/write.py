"""From an edited model back to the file that it came from: the same types, the same order, other codes.

A tensor is written in one of four ways: "kept", every byte as it was, where no weight changed; "codes", the file's scales and
new codes, where every weight lies on a code (as the floor leaves them); "re-quantized" by `gguf` as llama.cpp does from dense
weights, where it has an encoder for the type; "nearest codes" under the file's scales where it has none (K-quants).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, quantize
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.models.gguf.blocks import LAYOUTS, Blocks
from mansu_tl.models.gguf.read import GgufWeights, Way, gguf_weights
from mansu_tl.models.tree import Model, parameters
from mansu_tl.results.files import local


@dataclass(frozen=True)
class Written:
    """One parameter as a file would hold it.

    Attributes:
        raw: its bytes, row by row in the file's order.
        how: "kept", "codes", "re-quantized" or "nearest codes".
    """

    raw: UInt8[Tensor, "row byte"]
    how: str


def require_gguf(model: Model, doing: str) -> GgufWeights:
    """The file that a model came from.

    Raises:
        MansuError: it came from none, or the file was changed since.
    """
    weights = gguf_weights(model)
    if weights is None:
        raise MansuError(
            f"{doing}: this model did not come from a GGUF file; load one with mansu_tl.load('model.gguf')"
        )
    weights.file.require_unchanged()
    return weights


def written(weights: GgufWeights, name: str, value: Float[Tensor, ...]) -> Written:
    """A parameter's bytes in the file that its model came from, whatever value it has now."""
    way = weights.ways[name]
    raw = weights.file.data(way.stored.name)
    value = value.detach().cpu()
    before = weights.value(name, raw).to(value.dtype)
    if torch.equal(value, before):
        return Written(raw, "kept")
    kind = way.stored.type
    if kind in LAYOUTS:
        # In the model's own dtype: a 16-bit model holds the codes' values rounded.
        blocks = LAYOUTS[kind].read(raw)
        moved = way.back((value != before).T if way.transposed else value != before)
        codes = torch.where(moved, nearest(blocks, way.back(_oriented(value, way))), blocks.codes).contiguous()
        on_codes = blocks.layout.write(raw, codes)
        if torch.equal(weights.value(name, on_codes).to(value.dtype), value):
            return Written(on_codes, "codes")
    dense = way.back(_oriented(torch.where(value == before, weights.value(name, raw), value.float()), way))
    try:
        return Written(_encoded(kind, dense, raw), "re-quantized")
    except NotImplementedError:  # what `gguf` says of a type that it only decodes
        if kind not in LAYOUTS:
            raise MansuError(
                f"{name}: edited, but gguf cannot encode {kind}; convert the file to another type"
            ) from None
        return Written(blocks.layout.write(raw, nearest(blocks, dense)), "nearest codes")


def _oriented(value: Float[Tensor, ...], way: Way) -> Float32[Tensor, ...]:
    """A parameter as the file has it, [out, in] and with its offset, but for the order of rows."""
    return (value.T if way.transposed else value).float() + way.offset


def nearest(blocks: Blocks, value: Float32[Tensor, "out in"]) -> UInt8[Tensor, "out in"]:
    """The code under the blocks' own scales whose value is nearest; a block without a step keeps its codes."""
    layout = blocks.layout
    grouped = value.reshape(len(value), -1, layout.group)
    moved = grouped if blocks.shift is None else grouped - blocks.shift.unsqueeze(2)
    codes = (moved / blocks.step.unsqueeze(2) + layout.zero).round().clamp(0, layout.codes - 1)
    still = (blocks.step == 0).unsqueeze(2).expand_as(codes)
    return torch.where(still, blocks.codes.view_as(codes), codes.nan_to_num(0).to(torch.uint8)).view_as(blocks.codes)


def save_gguf(model: Model, path: str | PathLike[str]) -> Path:
    """Write a model that came from a GGUF file as such a file again: same head, same types, only what was edited differs.

    What each tensor's way into the file is: `mansu_tl.models.gguf.write`. The file is written beside its final place and
    moved there. Our own; `mansu_tl.load` of the file gives the model that `mansu_tl.quantize(model, "gguf")` gives.

    Raises:
        MansuError: a model that did not come from a GGUF file, the file it came from is gone, changed or is `path` itself,
            a weight that is not finite, or a place that cannot be written to.

    Example:
        >>> model = mtl.load("model.gguf")
        >>> file = mtl.save_gguf(model, "copy.gguf")
        >>> mtl.certify("model.gguf", file).n_edited
        0
    """
    weights = require_gguf(model, "save_gguf")
    target = local(path)
    source = weights.file.path
    if target.exists() and target.samefile(source):
        raise MansuError(
            f"{target}: the file that the model came from; choose another name, nothing is written over it"
        )
    if target.is_dir():
        raise MansuError(f"{target}: a folder; give a file's name, such as {target / source.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as work:
            copy = Path(work) / "model.gguf"
            shutil.copyfile(source, copy)
            with copy.open("r+b") as handle:
                for name, value in parameters(model).items():
                    if not torch.isfinite(value).all():
                        raise MansuError(f"{name}: holds NaN or infinity; nothing was written")
                    result = written(weights, name, value)
                    if result.how != "kept":
                        handle.seek(weights.ways[name].stored.start)
                        handle.write(result.raw.contiguous().numpy().tobytes())
            os.replace(copy, target)
    except OSError as error:
        raise MansuError(
            f"{target}: cannot write there ({error.strerror or error}); choose a place you may write to"
        ) from None
    return target


def _encoded(kind: str, value: Tensor, raw: Tensor) -> Tensor:
    if kind == "F32":
        encoded = value.contiguous().view(torch.uint8)
    else:
        encoded = torch.from_numpy(quantize(value.contiguous().numpy(), GGMLQuantizationType[kind]))
        encoded = encoded.view(torch.uint8)
    return encoded.reshape(raw.shape)
