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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import LinearWeight
from mansu_tl.results.files import read_packed, write_packed, write_text
from mansu_tl.results.result import Result, Table
from mansu_tl.verification.library_codes import LibraryQuantizer, library_codes, library_quantizer
from mansu_tl.verification.saved_model import SavedModel, bits, same_bits


@dataclass(frozen=True)
class CertificateRow:
    """What was found in one quantized matrix; counts of weights unless it says otherwise.

    Attributes:
        parameter: its HF name.
        dtype: what it is stored in.
        weights: how many it has.
        edited: how many the edit names.
        edited_codes_changed: how many of those have another code now; all of them must.
        unedited_values_changed: weights outside the edit whose stored bits differ; none may.
        unedited_codes_changed: weights outside the edit whose code differs; none may.
        blocks: how many scales the matrix has.
        absmax_changed: how many scales differ; none may. Under double quantization a block has two, its absmax and the
            8-bit scale that stands for it when the codes are decoded, and counts if either differs.
    """

    parameter: str
    dtype: str
    weights: int
    edited: int
    edited_codes_changed: int
    unedited_values_changed: int
    unedited_codes_changed: int
    blocks: int
    absmax_changed: int

    def faults(self) -> list[str]:
        """What is wrong, one line each."""
        kept = self.edited - self.edited_codes_changed
        found = (
            (kept, f"of {self.edited} edited weights keep their code"),
            (self.unedited_values_changed, "weights outside the edit changed their value"),
            (self.unedited_codes_changed, "weights outside the edit changed their code"),
            (self.absmax_changed, f"of {self.blocks} block scales changed"),
        )
        return [f"{self.parameter}: {count} {what}" for count, what in found if count]


@dataclass(frozen=True)
class Certificate(Result):
    """Which codes an edit changed, recomputed from the saved files.

    Attributes:
        quantizer: its name.
        block_size: weights that share a scale; 0 = a whole row.
        dtype: what the quantized matrices are stored in.
        original: the folder before the edit, as it was given.
        edited: the folder after it.
        original_digest: SHA-256 over the weight files of the original.
        edited_digest: SHA-256 over the weight files of the edited model.
        n_parameters: weights in the whole model, tied ones once.
        n_linear: weights in quantized matrices.
        rows: what was found, matrix by matrix.
        others_changed: parameters outside those (embeddings, norms, biases) that are not bit-identical; must be none.
        problems: whatever else is wrong, one line each: a different config, tensors missing or too many, other shapes.
        versions: of the libraries that computed it.
    """

    quantizer: str
    block_size: int
    dtype: str
    original: str
    edited: str
    original_digest: str
    edited_digest: str
    n_parameters: int
    n_linear: int
    rows: tuple[CertificateRow, ...]
    others_changed: tuple[str, ...]
    problems: tuple[str, ...]
    versions: Mapping[str, str]

    def total(self, count: str) -> int:
        """A count of `CertificateRow` over all matrices."""
        return sum(getattr(row, count) for row in self.rows)

    @property
    def n_edited(self) -> int:
        """Edited weights in quantized matrices."""
        return self.total("edited")

    @property
    def edited_share_of_linear(self) -> float:
        """Edited weights as a share of those that are quantized."""
        return self.n_edited / self.n_linear

    @property
    def edited_share_of_all(self) -> float:
        """Edited weights as a share of all parameters."""
        return self.n_edited / self.n_parameters

    @property
    def edited_codes_changed_share(self) -> float:
        """Share of edited weights with another code; must be 1. NaN if nothing was edited."""
        return self.total("edited_codes_changed") / self.n_edited if self.n_edited else float("nan")

    @property
    def unedited_codes_changed(self) -> int:
        """Weights outside the edit with another code; must be 0."""
        return self.total("unedited_codes_changed")

    @property
    def absmax_changed(self) -> int:
        """Block scales that differ; must be 0."""
        return self.total("absmax_changed")

    @property
    def faults(self) -> tuple[str, ...]:
        """Everything that keeps it from passing, one line each, the parameter's name first."""
        nothing = () if self.n_edited else ("edit: it names no weight of a quantized matrix",)
        others = (f"{name}: changed or named by the edit, but not quantized" for name in self.others_changed)
        return (*nothing, *self.problems, *others, *(fault for row in self.rows for fault in row.faults()))

    @property
    def passed(self) -> bool:
        """Whether every edited code changed and nothing else did."""
        return not self.faults

    @property
    def claims(self) -> Mapping[str, bool]:
        """What is claimed of the two folders, in words, and whether it holds; it passes if all of them do."""
        unit = f"{self.quantizer} ({f'blocks of {self.block_size}' if self.block_size else 'one scale a row'})"
        others = self.n_linear - self.n_edited
        return {
            f"each of the {self.n_edited} edited weights has another code under {unit}": (
                0 < self.n_edited == self.total("edited_codes_changed")
            ),
            f"none of the other {others} quantized weights has another code": not self.unedited_codes_changed,
            "every other quantized weight is bit-identical as stored": not self.total("unedited_values_changed"),
            f"all {self.total('blocks')} scales are bit-identical": not self.absmax_changed,
            "every parameter that is not quantized is bit-identical": not self.others_changed,
            "both folders hold what their config calls for, and the configs compute the same": not self.problems,
        }

    def require_unchanged(
        self, original: str | PathLike[str] | None = None, edited: str | PathLike[str] | None = None
    ) -> None:
        """Check that folders still hold the weight files that were certified, byte for byte; None is not looked at.

        Raises:
            MansuError: other files, or a folder that cannot be read.
        """
        for what, folder in (("original", original), ("edited", edited)):
            expected = getattr(self, f"{what}_digest")
            if folder is not None and (found := SavedModel(folder).digest()) != expected:
                raise MansuError(
                    f"{os.fspath(folder)}: not the {what} model that was certified (SHA-256 {found[:12]}... of its "
                    f"weight files, certified {expected[:12]}...); copy it again or make a new certificate"
                )

    def to_dataframe(self) -> pd.DataFrame:
        """One row a quantized matrix, columns as in `CertificateRow`."""
        return pd.DataFrame([asdict(row) for row in self.rows], columns=list(CertificateRow.__annotations__))

    suffix: ClassVar[str] = ".json"

    def _derived(self) -> Mapping[str, Any]:
        return {"passed": self.passed, "faults": list(self.faults), "claims": dict(self.claims)}

    def __repr__(self) -> str:
        return (
            f"Certificate({'passed' if self.passed else 'FAILED'}: {self.quantizer}, {self.dtype}, "
            f"{self.n_edited} weights edited = {self.edited_share_of_linear:.3%} of {self.n_linear} quantized, "
            f"{self.edited_codes_changed_share:.3%} of them changed their code, {len(self.faults)} faults)"
        )

    def _notes(self) -> Sequence[Sequence[str]]:
        more = [f"and {len(self.faults) - 10} more"] if len(self.faults) > 10 else []
        claims = [f"{'✓' if holds else '✗'} {claim}" for claim, holds in self.claims.items()]
        return claims, [*self.faults[:10], *more]

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "by matrix", rows=6),)


@torch_defaults()
def certify(
    original: str | PathLike[str],
    edited: str | PathLike[str],
    edit_indices: Mapping[str, Int[Tensor, " _"]] | None = None,
    quantizer: str = "nf4",
) -> Certificate:
    """Compare two saved models code by code.

    Which matrices are quantized, and which are stored transposed (GPT-2), is read off the folders' configs. It holds
    one matrix of each model in memory at a time.

    Args:
        original: the folder before the edit.
        edited: the folder after it.
        edit_indices: by HF parameter name, flat indices of the weights that the edit names (see `Edit.indices`); by
            default everything whose stored bits differ is taken for the edit.
        quantizer: "nf4", "nf4-128", either with "-dq" behind it for double quantization, "fp4" or "int8" (the weights
            of LLM.int8).

    Raises:
        MansuError: a folder that cannot be read, a quantizer that bitsandbytes does not have, or indices that do not
            fit the model. Everything that is merely wrong with the edited folder is a fault of the certificate.

    Example:
        >>> model, task = mtl.load("pocket"), mtl.load_task("pocket")
        >>> edited = mtl.unlearn(model, task, "graddiff", max_steps=1).apply(model)
        >>> mtl.certify(mtl.save(model, "original"), mtl.save(edited, "edited")).passed
        False
    """
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
    quantizer: str = "nf4",
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
            [sys.executable, "-c", call, os.fspath(original), os.fspath(edited), indices, quantizer, str(answer)],
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
        certify(original, edited, named, quantizer).save(answer)
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
