"""Task files: one JSON object a line, gzipped or not, or a JSON array of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from mansu_tl.data.sources.registry import register_source
from mansu_tl.data.sources.rows import rows_reader
from mansu_tl.errors import MansuError
from mansu_tl.results.files import lines_of, local, read_text

_TABLES = {
    ".xlsx": "pd.read_excel", ".xls": "pd.read_excel", ".parquet": "pd.read_parquet", ".feather": "pd.read_feather",
    ".arrow": "pd.read_feather", ".pkl": "pd.read_pickle",
}  # fmt: skip


def _rows(source: str | PathLike[str]) -> Iterator[tuple[str, object]]:
    path = local(source)
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        raise MansuError(
            f"{path}: a table, and a task file has one JSON object a line; pass its rows: "
            f"load_task({_TABLES[suffix]}({path.name!r}), tokenizer=model)"
        )
    if not _exists(path):
        raise MansuError(f"{path}: no such task file; give a JSON-lines file or an embedded name (pocket)")
    text = read_text(path)
    if text.lstrip().startswith("["):
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(_json(text, str(path))))
        return
    for number, line in enumerate(lines_of(text), 1):
        # Files that were joined leave a byte-order mark at the seam.
        line = line.removeprefix("\ufeff").strip()
        if line:
            yield f"{path}, line {number}", _json(line, f"{path}, line {number}")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False  # no name that a file could have


def _json(text: str, name: str) -> Any:
    def one_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise MansuError(f"{name}: key {twice!r} is there twice; keep one")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=one_of_each)
    except json.JSONDecodeError as error:
        raise MansuError(f"{name}: not JSON ({error.msg}); write one object a line") from None
    except RecursionError:
        raise MansuError(f"{name}: nested too deeply; write one object a line") from None


register_source(
    "jsonl",
    "a file with one JSON object a line, or a JSON array of them",
    rows_reader(_rows),
    claims=lambda source: isinstance(source, str | PathLike),
)
