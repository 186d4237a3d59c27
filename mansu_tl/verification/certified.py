"""What a certificate says: matrix by matrix, which codes an edit changed, and what else differs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from mansu_tl.errors import MansuError
from mansu_tl.models.gguf import GgufFile
from mansu_tl.results.result import Result, Table
from mansu_tl.verification.saved_model import SavedModel


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
            if folder is not None and (digest := _digest(folder)) != expected:
                raise MansuError(
                    f"{os.fspath(folder)}: not the {what} model that was certified (SHA-256 {digest[:12]}... of its "
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


def _digest(saved: str | PathLike[str]) -> str:
    path = Path(saved)
    return GgufFile.read(path).sha256 if path.suffix.lower() == ".gguf" else SavedModel(path).digest()
