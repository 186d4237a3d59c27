"""The certificate: read back from disk, every edited weight's code has changed and nothing else has.

The codes are recomputed by bitsandbytes itself from the tensors in the two saved folders; no grid of this package is
involved. A certificate speaks of codes under the named quantizer, block size and dtype, never of behaviour.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from os import PathLike
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import LinearWeight
from mansu_tl.results.files import read_packed, write_packed, write_text
from mansu_tl.verification.certified import Certificate, CertificateRow
from mansu_tl.verification.gguf_files import certify_gguf
from mansu_tl.verification.library_codes import LibraryQuantizer, library_codes, library_quantizer
from mansu_tl.verification.saved_model import SavedModel, bits, same_bits


@torch_defaults()
def certify(
    original: str | PathLike[str],
    edited: str | PathLike[str],
    edit_indices: Mapping[str, Int[Tensor, " _"]] | None = None,
    quantizer: str | None = None,
) -> Certificate:
    """Compare two saved models code by code.

    Which matrices are quantized, and which are stored transposed (GPT-2), is read off the folders' configs. It holds
    one matrix of each model in memory at a time.

    Args:
        original: the folder before the edit.
        edited: the folder after it.
        edit_indices: by HF parameter name, flat indices of the weights that the edit names (see `Edit.indices`); by
            default everything whose stored bits differ is taken for the edit.
        quantizer: "nf4" (where nothing is given), "nf4-128", either with "-dq" behind it for double quantization, "fp4" or
            "int8" (the weights of LLM.int8). Two GGUF files are compared as they are, "gguf".

    Raises:
        MansuError: a folder that cannot be read, a quantizer that bitsandbytes does not have, or indices that do not
            fit the model. Everything that is merely wrong with the edited folder is a fault of the certificate.

    Example:
        >>> model, task = mtl.load("pocket"), mtl.load_task("pocket")
        >>> edited = mtl.unlearn(model, task, "graddiff", max_steps=1).apply(model)
        >>> mtl.certify(mtl.save(model, "original"), mtl.save(edited, "edited")).passed
        False
    """
    if all(Path(one).suffix.lower() == ".gguf" for one in (original, edited)):
        if quantizer not in (None, "gguf"):
            raise MansuError(f"quantizer {quantizer!r}: two GGUF files are compared in their own formats; leave it out")
        return certify_gguf(original, edited, edit_indices)
    quantizer = quantizer or "nf4"
    library = library_quantizer(quantizer)
    before, after = SavedModel(original), SavedModel(edited)
    _require_fitting(before, edit_indices)
    problems = list(dict.fromkeys((*before.problems, *after.problems)))
    keys = {*before.config, *after.config}
    problems += [f"config.json: {k} differs" for k in sorted(keys) if before.config.get(k) != after.config.get(k)]
    rows, others_changed = [], []
    for name in before.shapes:
        if name not in before or name not in after:
            continue  # already among the problems
        first, second = before.tensor(name), after.tensor(name)
        named = None if edit_indices is None else edit_indices.get(name, torch.empty(0, dtype=torch.long))
        if first.dtype != second.dtype or first.shape != second.shape:
            problems.append(f"{name}: {_form(first)} became {_form(second)}")
        elif tuple(first.shape) != before.shapes[name]:
            continue  # among the problems too
        elif name in before.linear:
            rows.append(_row(before.linear[name], first, second, named, library))
        elif not same_bits(first, second) or (named is not None and named.numel()):
            others_changed.append(name)
    return Certificate(
        quantizer=quantizer,
        block_size=library.block_size,
        dtype=", ".join(sorted({row.dtype for row in rows})),
        original=os.fspath(original),
        edited=os.fspath(edited),
        original_digest=before.digest(),
        edited_digest=after.digest(),
        n_parameters=sum(torch.Size(shape).numel() for shape in before.shapes.values()),
        n_linear=sum(linear.out_features * linear.in_features for linear in before.linear.values()),
        rows=tuple(rows),
        others_changed=tuple(others_changed),
        problems=tuple(problems),
        versions={name: version(name) for name in ("bitsandbytes", "torch", "transformers", "safetensors")},
    )


def certify_in_fresh_process(
    original: str | PathLike[str],
    edited: str | PathLike[str],
    edit_indices: Mapping[str, Int[Tensor, " _"]] | None = None,
    quantizer: str | None = None,
) -> Certificate:
    """`certify`, by a new Python process that has seen nothing but the folders and the indices.

    Raises:
        MansuError: as `certify`.
    """
    package = Path(__file__).resolve().parents[2]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as folder:
        answer, indices = Path(folder, "answer.json"), ""
        if edit_indices is not None:
            indices = str(write_packed(Path(folder, "indices.safetensors"), "EditIndices", edit_indices, {}))
        call = f"from {__name__} import _answer; import sys; _answer(*sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", call, os.fspath(original), os.fspath(edited), indices, quantizer or "", str(answer)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            check=False,
        )
        if not answer.is_file():
            raise RuntimeError(f"certify: the fresh process died with status {done.returncode}: {done.stderr[-2000:]}")
        record = json.loads(answer.read_text(encoding="utf-8"))
        if "refused" in record:
            raise MansuError(record["refused"])
        return Certificate.load(answer)


def _answer(original: str, edited: str, indices: str, quantizer: str, answer: str) -> None:
    """What the fresh process runs."""
    try:
        named = read_packed(indices, "EditIndices")[0] if indices else None
        certify(original, edited, named, quantizer or None).save(answer)
    except MansuError as error:
        write_text(answer, json.dumps({"refused": str(error)}))


def _require_fitting(model: SavedModel, edit_indices: Mapping[str, Tensor] | None) -> None:
    for name, index in (edit_indices or {}).items():
        if name not in model.shapes:
            raise MansuError(f"{name}: {model.folder} has no such parameter; pass the indices of an edit of this model")
        size = torch.Size(model.shapes[name]).numel()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
            worst = int(index.max()) if int(index.max()) >= size else int(index.min())
            raise MansuError(
                f"{name}: index {worst} is outside its {size} weights; pass flat indices of this parameter"
            )


def _row(
    linear: LinearWeight, first: Tensor, second: Tensor, named: Tensor | None, library: LibraryQuantizer
) -> CertificateRow:
    differs = (bits(first) != bits(second)).reshape(-1)
    edited = differs
    if named is not None:
        edited = torch.zeros_like(differs)
        edited[named.long()] = True
    old, old_scales = library_codes(first, linear, library)
    new, new_scales = library_codes(second, linear, library)
    moved = old != new
    return CertificateRow(
        parameter=linear.name,
        dtype=str(first.dtype).removeprefix("torch."),
        weights=first.numel(),
        edited=int(edited.sum()),
        edited_codes_changed=int((moved & edited).sum()),
        unedited_values_changed=int((differs & ~edited).sum()),
        unedited_codes_changed=int((moved & ~edited).sum()),
        blocks=len(old_scales),
        absmax_changed=int((old_scales != new_scales).any(1).sum()),
    )


def _form(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
