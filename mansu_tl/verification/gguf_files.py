"""The certificate of a GGUF file: against the file that it was made from, every byte is accounted for.

Whether a weight's code changed is seen in what `gguf` itself dequantizes from either file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from math import prod
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize
from jaxtyping import Int, UInt8
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.models.gguf import LAYOUTS, GgufFile, Layout, open_gguf
from mansu_tl.models.gguf.read import Way
from mansu_tl.verification.certified import Certificate, CertificateRow

_MOST_NAMED = 20


def certify_gguf(
    original: str | PathLike[str],
    edited: str | PathLike[str],
    edit_indices: Mapping[str, Int[Tensor, " _"]] | None = None,
) -> Certificate:
    """Compare a GGUF file with the one that it was made from: codes, scales, other tensors, the head.

    Args:
        original: the file before the edit.
        edited: the file after it (`mansu_tl.models.gguf.save_gguf`).
        edit_indices: by HF parameter name, flat indices of the weights that the edit names (see `Edit.indices`); by default
            every weight whose code differs.

    Raises:
        MansuError: a file that cannot be read, or indices that do not fit the model. Whatever is merely wrong with the
            edited file is a fault of the certificate.
    """
    hf, weights = open_gguf(Path(original), os.fspath(original))
    other = GgufFile.read(edited)
    for name, index in (edit_indices or {}).items():
        size = prod(weights.ways[name].stored.shape) if name in weights.ways else 0
        if name not in weights.ways or (index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size):
            raise MansuError(
                f"{name}: {os.fspath(original)} has no such weights; pass the indices of an edit of this model"
            )
    problems = _head_problems(weights.file, other)
    rows, others = [], []
    for name, way in weights.ways.items() if weights.file.tensors == other.tensors else ():
        named = None if edit_indices is None else edit_indices.get(name, torch.empty(0, dtype=torch.long))
        before, after = weights.file.data(way.stored.name), other.data(way.stored.name)
        if way.stored.type in LAYOUTS:
            rows.append(_row(name, way, before, after, named))
        elif not torch.equal(before, after) or (named is not None and named.numel()):
            others.append(name)
    return Certificate(
        quantizer="gguf",
        block_size=32,
        dtype=", ".join(sorted({row.dtype for row in rows})),
        original=os.fspath(original),
        edited=os.fspath(edited),
        original_digest=weights.file.sha256,
        edited_digest=other.sha256,
        n_parameters=sum(parameter.numel() for parameter in hf.parameters()),
        n_linear=sum(row.weights for row in rows),
        rows=tuple(rows),
        others_changed=tuple(others),
        problems=tuple(problems),
        versions={name: version(name) for name in ("gguf", "torch", "transformers")},
    )


def _head_problems(before: GgufFile, after: GgufFile) -> list[str]:
    """What differs outside the tensors, one line each."""
    if before.tensors != after.tensors:
        names = sorted(n for n in {*before.tensors, *after.tensors} if before.tensors.get(n) != after.tensors.get(n))
        return [f"{name}: lies elsewhere, or is of another type or size" for name in names[:_MOST_NAMED]]
    old, new = (np.memmap(file.path, np.uint8, "r") for file in (before, after))
    if len(old) != len(new):
        return [f"{after.path}: {len(new):,} bytes instead of {len(old):,}"]
    inside = sorted((one.start, one.start + one.size) for one in before.tensors.values())
    gaps = zip([0, *(end for _, end in inside)], [*(start for start, _ in inside), len(old)], strict=True)
    differ = [start + at for start, end in gaps for at in np.flatnonzero(old[start:end] != new[start:end]).tolist()]
    return [f"{after.path}: byte {at:,}, which belongs to no tensor, differs" for at in differ[:_MOST_NAMED]]


def _row(name: str, way: Way, before: Tensor, after: Tensor, named: Tensor | None) -> CertificateRow:
    layout, kind = LAYOUTS[way.stored.type], GGMLQuantizationType[way.stored.type]
    old, new = (torch.from_numpy(dequantize(raw.numpy(), kind)).view(torch.int32) for raw in (before, after))
    moved = old != new
    edited = moved
    if named is not None:
        flags = torch.zeros(moved.numel(), dtype=torch.bool)
        flags[named.long()] = True
        stored = flags.view(moved.shape[::-1] if way.transposed else moved.shape)
        edited = way.back(stored.T if way.transposed else stored)
    scales = ((before ^ after) & ~_code_bits(layout, before)).view(-1, layout.size).bool().any(1)
    return CertificateRow(
        parameter=name,
        dtype=way.stored.type,
        weights=moved.numel(),
        edited=int(edited.sum()),
        edited_codes_changed=int((moved & edited).sum()),
        unedited_values_changed=int((moved & ~edited).sum()),
        unedited_codes_changed=int((moved & ~edited).sum()),
        blocks=len(scales),
        absmax_changed=int(scales.sum()),
    )


def _code_bits(layout: type[Layout], raw: UInt8[Tensor, "row byte"]) -> UInt8[Tensor, "row byte"]:
    """Which bits of a matrix's bytes are codes; the others are scales."""
    codes = layout.read(raw).codes
    return layout.write(raw, torch.zeros_like(codes)) ^ layout.write(raw, torch.full_like(codes, layout.codes - 1))
