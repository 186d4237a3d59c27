"""The rows of a task: from a JSON-lines file, a JSON array or a table, every field of every row checked.

Every row is an object with a "set":

- "forget", "retain" or "near": a pair, with "clean", "corrupt", "answer", "distractors" (a list of texts; the first one is
  the corrupt prompt's answer), and optionally "fact" (what the pair asks, so that several wordings count once; default:
  the clean prompt), "held_out": true for wordings that are only evaluated, never trained on, and "answer_space": "auto",
  true or false (see `PromptPairs.from_text`);
- "text": "text" whose likelihood is to be kept;
- "unseen": a "text" prompt in the forget set's form about something the model never met.

Tables have every column in every row. A cell that says nothing (null, NaN, "", false, "auto") in a column that a row's set
does not have is passed over; null in a column that it has is a value that is missing, and the row is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mansu_tl.data.answers import require_answer_space
from mansu_tl.data.text import require_text
from mansu_tl.errors import MansuError
from mansu_tl.results.files import lines_of, local, read_text

PAIR_SETS, TEXT_SETS = ("forget", "retain", "near"), ("text", "unseen")
_NEEDED = {
    **dict.fromkeys(PAIR_SETS, ("clean", "corrupt", "answer", "distractors")),
    **dict.fromkeys(TEXT_SETS, ("text",)),
}
_OPTIONAL = {**dict.fromkeys(PAIR_SETS, ("fact", "held_out", "answer_space")), **dict.fromkeys(TEXT_SETS, ())}
_COLUMNS = {"set", *(key for table in (_NEEDED, _OPTIONAL) for keys in table.values() for key in keys)}
_NOTHING = (None, "", False, "auto")
_TABLES = {
    ".csv": "pd.read_csv", ".tsv": "pd.read_table", ".xlsx": "pd.read_excel", ".xls": "pd.read_excel",
    ".parquet": "pd.read_parquet", ".feather": "pd.read_feather", ".arrow": "pd.read_feather", ".pkl": "pd.read_pickle",
}  # fmt: skip

Row = dict[str, Any]
if TYPE_CHECKING:
    Rows = str | PathLike[str] | pd.DataFrame | Iterable[Mapping[str, Any]]
else:
    Rows = object  # anything else is told what to pass


def read_rows(source: Rows) -> tuple[str, str, list[Row]]:
    """What the task is called, where it is, and its rows, checked; each has a "name" for errors.

    Rows of a file are named by line, those of an array or a table by their place from 0, as in `rows[3]`.

    Raises:
        MansuError: no such file or another kind of file; a row that is no such object, by name; a doubled key, a field
            that is missing, unknown, empty or of another type.
    """
    if isinstance(source, str | PathLike):
        path = local(source)
        named = list(_of_file(path))
        title = path.name.removesuffix(".gz").rpartition(".")[0] or path.name
        where = str(path)
    else:
        named = list(_of_objects(source))
        title = where = "rows"
    if not named:
        raise MansuError(f"{where}: holds no row; write one object a line")
    return title, where, [_checked(name, row) for name, row in named]


def _of_file(path: Path) -> Iterable[tuple[str, object]]:
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
        whole = _json(text, str(path))
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(whole))
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


def _of_objects(source: object) -> Iterable[tuple[str, object]]:
    if isinstance(source, pd.DataFrame):
        columns = [str(column) for column in source.columns]
        if len(set(columns)) < len(columns):
            raise MansuError(f"rows: columns {columns} have one twice; rename it")
        values = source.to_numpy(dtype=object).tolist() if len(columns) else []
        yield from ((f"row {i}", dict(zip(columns, row, strict=True))) for i, row in enumerate(values))
        return
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise MansuError(
            f"task: got a {type(source).__name__}; pass a file, a DataFrame or a list of rows (one dict for each)"
        )
    yield from ((f"row {i}", row) for i, row in enumerate(source))


def _checked(name: str, found: object) -> Row:
    """The row's own fields, every one of its type."""
    if not isinstance(found, Mapping):
        shown = repr(found)
        raise MansuError(
            f"{name}: {shown if len(shown) < 60 else shown[:57] + '...'} is no object; write "
            '{"set": ..., "clean": ..., ...}'
        )
    row = {str(key): _plain(value) for key, value in found.items()}
    kind = row.get("set")
    if not isinstance(kind, str) or kind not in _NEEDED:
        raise MansuError(f"{name}: set is {kind!r}; choose one of {', '.join(_NEEDED)}")
    needed, optional = _NEEDED[kind], _OPTIONAL[kind]
    known = ("set", *needed, *optional)
    for key in sorted(set(row) - set(known)):
        if key not in _COLUMNS or row[key] not in _NOTHING:
            raise MansuError(f"{name}: unknown key {key!r}; known: {', '.join(sorted(known))}")
    for key in sorted(needed):
        if key not in row:
            raise MansuError(f"{name}: {key!r} is missing; a {kind} line needs it")
    out = {key: row[key] for key in known if key in row}
    for key, value in out.items():
        if value is None:
            raise MansuError(f"{name}: {key} is null; {_WAY_OUT.get(key, f'a {kind} line needs it')}")
        if key == "distractors":
            _require_list(name, value)
        elif key == "held_out":
            if not isinstance(value, bool):
                raise MansuError(
                    f"{name}: held_out is {value!r}; write true or false without quotes (in pandas: a column of bool)"
                )
        elif key == "answer_space":
            require_answer_space(value, name)
        else:
            require_text(value, f"{name}: {key}")
    return {"held_out": False, "fact": out.get("clean"), **out, "name": name}


_WAY_OUT = {
    "fact": "name the fact, or leave the key out (in pandas: frame['fact'].fillna(frame['clean']))",
    "held_out": "write true or false, or leave the key out (in pandas: frame['held_out'].eq(True))",
    "answer_space": 'write "auto", true or false, or leave the key out (in pandas: .fillna("auto"))',
}


def _require_list(name: str, value: object) -> None:
    if not isinstance(value, list) or not value:
        raise MansuError(f"{name}: distractors {value!r}; give a list of at least one text")
    for i, text in enumerate(value):
        require_text(text, f"{name}: distractor {i}")
        if text in value[:i]:
            raise MansuError(f"{name}: distractor {text!r} is there twice; give every wrong answer once")


def _plain(value: object) -> object:
    """A table's cell as JSON has it: NaN and its like are null, numpy's values Python's."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return None
    as_list = getattr(value, "tolist", None)  # numpy's arrays and numbers
    return as_list() if callable(as_list) else value
