"""Task files as tables: CSV and TSV, a column a field; a cell that says nothing is no field.

A list of distractors is one cell: ["Rome", "Oslo"], as JSON or Python write it; other text is a single one.
"""

from __future__ import annotations

import ast
import io
from collections.abc import Iterator
from os import PathLike, fspath

import pandas as pd

from mansu_tl.data.sources.registry import register_source
from mansu_tl.data.sources.rows import rows_reader
from mansu_tl.errors import MansuError
from mansu_tl.results.files import local, read_text

_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def _suffix(source: str | PathLike[str]) -> str:
    return local(fspath(source).removesuffix(".gz")).suffix.lower()


def _rows(source: str | PathLike[str]) -> Iterator[tuple[str, object]]:
    path = local(source)
    separator = _SEPARATORS.get(_suffix(source), ",")
    try:
        frame = pd.read_csv(io.StringIO(read_text(path)), sep=separator, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise MansuError(f"{path}: no table ({error}); write one row a line under a line of column names") from None
    for i, row in enumerate(frame.to_dict("records")):
        name = f"{path}, row {i}"
        yield name, {key: _cell(name, str(key), text) for key, text in row.items() if text}


def _cell(name: str, key: str, text: str) -> object:
    if key == "distractors":
        if not text.startswith("["):
            return [text]
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise MansuError(f'{name}: distractors {text!r} is no list; write ["one", "another"]') from None
    flags = {"true": True, "false": False} if key in ("held_out", "answer_space") else {}
    return flags.get(text.lower(), text)


register_source(
    "csv",
    "a CSV or TSV file with a column a field",
    rows_reader(_rows),
    claims=lambda source: isinstance(source, str | PathLike) and _suffix(source) in _SEPARATORS,
)
