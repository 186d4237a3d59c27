"""What every result is: a frozen dataclass with a digest, one file on disk, a table, and a look in a notebook."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pandas as pd

from mansu_tl.errors import MansuError
from mansu_tl.results.digest import Digested, digest
from mansu_tl.results.files import read_packed, write_packed
from mansu_tl.results.serialise import MismatchError, pack, unpack

R = TypeVar("R", bound="Result")


def four_digits(value: float) -> str:
    """A number with four significant digits."""
    return f"{value:.4g}"


def bars(progress: bool | None) -> bool:
    """Whether to show progress bars: as asked, and where nothing was asked, in a notebook."""
    if progress is not None:
        return progress
    ipython = sys.modules.get("IPython")
    return ipython is not None and type(ipython.get_ipython()).__name__ == "ZMQInteractiveShell"


@dataclass(frozen=True)
class Table:
    """A table below the line that sums a result up.

    Attributes:
        frame: its cells.
        caption: what its rows are.
        form: how a float is written.
        rows: show at most so many, and say how many there are.
        index: show the row names.
    """

    frame: pd.DataFrame
    caption: str = ""
    form: Callable[[float], str] = four_digits
    rows: int = 12
    index: bool = False

    def html(self) -> str:
        """The caption and the table; all text is escaped."""
        total = len(self.frame)
        notes = [self.caption] if self.caption else []
        if total > self.rows:
            notes.append(f"{self.rows} of {total} rows")
        above = f"<p><small>{escape(', '.join(notes))}</small></p>" if notes else ""
        # Without this pandas cuts the names of parameters short.
        with pd.option_context("display.max_colwidth", None):
            shown = self.frame.head(self.rows)
            return above + shown.to_html(index=self.index, float_format=self.form, na_rep="", border=0)


class Result(Digested):
    """Base of the results: `save`, `load`, `digest`, `to_dataframe`, and a look in a notebook.

    In a notebook a result is its `repr` as one line over small tables, and completion offers its public names. No colour
    is set anywhere, so light and dark themes use their own.

    Attributes:
        suffix: of its file where a folder of results names it: ".json" for results without tensors that people read.
    """

    suffix: ClassVar[str] = ".safetensors"

    def save(self, path: str | PathLike[str]) -> Path:
        """Write one file, whole or not at all: tensors and JSON in safetensors, JSON alone where the path ends in .json.

        Raises:
            MansuError: a result that holds what cannot be written (a model), or tensors where JSON is asked for.
        """
        try:
            tensors, facts = pack(self)
        except MansuError as problem:
            raise MansuError(f"{type(self).__name__}: {problem}") from None
        header = {**self._derived(), "fields": facts, "digest": self.digest()}
        return write_packed(path, type(self).__name__, tensors, header)

    @classmethod
    def load(cls: type[R], path: str | PathLike[str]) -> R:
        """Read what `save` wrote, every field checked against its type, shape and dtype, the whole against its digest.

        Raises:
            MansuError: no such file, one of another kind, or one that was cut short or changed.
        """
        tensors, header = read_packed(path, cls.__name__)
        try:
            result: R = unpack(cls, tensors, header.get("fields"))
            result._check()
            if digest(result) != header.get("digest"):
                raise MismatchError("its numbers are not those that were saved")
            if any(header.get(name) != value for name, value in result._derived().items()):
                raise MismatchError("its verdict does not follow from its numbers")
        except MansuError as problem:
            raise MansuError(f"{path}: {problem}; the file was cut or changed, save it again") from None
        return result

    def to_dataframe(self) -> pd.DataFrame:
        """Its plain fields in one row, where a class has no table of its own."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return pd.DataFrame([{k: v for k, v in plain.items() if v is None or isinstance(v, str | int | float)}])

    def _check(self) -> None:
        """Refuse, with `MismatchError`, fields that have their types but do not fit each other."""

    def _derived(self) -> Mapping[str, Any]:
        """What follows from the fields and is written beside them for those who read the file; JSON-able."""
        return {}

    def _tables(self) -> Sequence[Table]:
        return ()

    def _notes(self) -> Sequence[Sequence[str]]:
        """Lists of short lines between the first line and the tables."""
        return ()

    def _repr_html_(self) -> str:
        name, _, facts = repr(self).partition("(")
        lists = [
            f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" for lines in self._notes() if lines
        ]
        tables = [table.html() for table in self._tables()]
        line = f"<p><b>{escape(name)}</b> {escape(facts.removesuffix(')'))}</p>"
        return "<div>" + "".join([line, *lists, *tables]) + "</div>"

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if not name.startswith("_")]
