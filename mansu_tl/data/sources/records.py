"""Benchmarks' records as dicts: from a file, from a folder as the hub lays it out, or from the hub by `datasets`.

A place is a path or a hub id, and behind "#" the part of it that is meant, CONFIG, CONFIG/SPLIT or SPLIT:
"wmdp-bio.jsonl", "mmlu#all/test", "cais/wmdp#wmdp-bio/test". What lies on this machine is never asked of the hub.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import pandas as pd

from mansu_tl.errors import MansuError, near
from mansu_tl.results.files import lines_of, local, read_text

_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
# How deep a part's files lie: SPLIT, CONFIG/SPLIT, data/CONFIG/SPLIT.
_DEPTHS = ("*", "*/*", "*/*/*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A split's file as the hub writes it: test-00000-of-00002.parquet, test.jsonl.
_SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        name: what errors call it: its file and line.
        fields: as the file has them.
    """

    name: str
    fields: Mapping[str, Any]

    def text(self, key: str) -> str:
        """A field that says something, as text.

        Raises:
            MansuError: it is missing, no text, or blank.
        """
        value = self.needed(key)
        if not isinstance(value, str) or not value.strip():
            raise MansuError(f"{self.name}: {key} is {_short(value)}; it must be text that says something")
        return value

    def texts(self, key: str, least: int = 1) -> tuple[str, ...]:
        """A field that is a list of texts.

        Raises:
            MansuError: it is missing, no list, too short, or holds something else than text.
        """
        value = self.needed(key)
        if not isinstance(value, list | tuple) or not all(isinstance(text, str) and text.strip() for text in value):
            raise MansuError(f"{self.name}: {key} is {_short(value)}; it must be a list of texts")
        if len(value) < least:
            raise MansuError(f"{self.name}: {key} has {len(value)} of at least {least}; complete the record")
        return tuple(value)

    def index(self, key: str, count: int) -> int:
        """A field that is an index into `count` things.

        Raises:
            MansuError: it is missing, no whole number, or out of range.
        """
        value = self.needed(key)
        if isinstance(value, str) and value.isdigit():
            value = int(value)  # a table's cell
        if isinstance(value, bool) or not isinstance(value, int):
            raise MansuError(f"{self.name}: {key} is {_short(value)}; it must be a whole number that counts from 0")
        if not 0 <= value < count:
            raise MansuError(f"{self.name}: {key} is {value}, and there are {count} to choose from, 0..{count - 1}")
        return value

    def within(self, key: str) -> Record:
        """A field that is an object, as a record of its own.

        Raises:
            MansuError: it is missing or no object.
        """
        value = self.needed(key)
        if not isinstance(value, Mapping):
            raise MansuError(f"{self.name}: {key} is {_short(value)}; it must be an object with fields of its own")
        return Record(f"{self.name}: {key}", value)

    def needed(self, key: str) -> Any:
        """A field as it is.

        Raises:
            MansuError: it is missing or null.
        """
        if self.fields.get(key) is None:
            have = [str(other) for other, value in self.fields.items() if value is not None]
            raise MansuError(
                f"{self.name}: field {key!r} is missing{near(key, have)}; it has {', '.join(have) or 'none'}"
            )
        return self.fields[key]


def read_records(place: str | PathLike[str]) -> tuple[Record, ...]:
    """All records of a place, in order.

    A JSON-lines file, JSON array or one JSON object (gzipped or not), CSV, TSV or Parquet, or a folder with files
    `SPLIT.*` or `SPLIT-00000-of-00001.parquet` of a split, in a folder a configuration where there are several. What is no
    path here and looks like OWNER/NAME is loaded from the hub.

    Raises:
        MansuError: no such place or part of it, a folder of several where none was named, an empty file, a record that
            is no object, or a hub id without `datasets` or a way to the hub.
    """
    path, part = _split(place)
    if _is(path, Path.is_dir):
        found = [record for file in _files(local(path), part) for record in _of_file(file)]
    elif _is(path, Path.is_file):
        if part:
            raise MansuError(f"{path}: a file, and #{part} names a part of a folder; leave it out")
        found = list(_of_file(local(path)))
    elif _HUB_ID.fullmatch(path) and not path.lower().removesuffix(".gz").endswith(_SUFFIXES):
        found = list(from_hub(path, part))
    else:
        raise MansuError(f"{path}: no such file or folder, and no hub id (OWNER/NAME); check the path")
    if not found:
        raise MansuError(f"{fspath(place)}: holds no record; download it again")
    return tuple(found)


def from_hub(name: str, part: str = "") -> Iterator[Record]:
    """A data set's records, by the `datasets` library; a folder on this machine is taken as the hub's own.

    Raises:
        MansuError: no `datasets`, or it cannot load that.
    """
    try:
        datasets = import_module("datasets")
    except ImportError:
        raise MansuError(
            f"{name}: loading from the hub needs the datasets library; pip install datasets, or give a local copy"
        ) from None
    config, _, split = part.partition("/")
    what = f"{name}#{part}" if part else name
    try:
        loaded = datasets.load_dataset(name, config or None, split=split or None)
    except Exception as error:  # of a dozen kinds: no way to the hub, no such set, a gated one, a broken file
        reason = " ".join(str(error).split())[:200]
        raise MansuError(
            f"{what}: cannot be loaded from the hub ({type(error).__name__}: {reason}); check the id, or give a local copy"
        ) from None
    if isinstance(loaded, Mapping):
        if len(loaded) != 1:
            raise MansuError(f"{what}: has splits {', '.join(loaded)}; name one: {name}#{config or 'CONFIG'}/SPLIT")
        loaded = next(iter(loaded.values()))
    for i, row in enumerate(loaded):
        yield Record(f"{what}, row {i}", row)


def first_fields(place: object) -> frozenset[str]:
    """The fields of the first record of a file or folder; none where there is no such thing to be read.

    The hub is only asked where a part of it is named.

    Raises:
        MansuError: what is named there cannot be loaded.
    """
    if not isinstance(place, str | PathLike):
        return frozenset()
    path, part = _split(place)
    if part and not _is(path, Path.exists) and _HUB_ID.fullmatch(path):
        found = next(iter(from_hub(path, part)), None)
        return frozenset(map(str, found.fields)) if found else frozenset()
    try:
        if _is(path, Path.is_dir):
            files = _files(local(path), part)
        elif _is(path, Path.is_file):
            files = [local(path)]
        else:
            return frozenset()
        record = next(iter(_of_file(files[0])), None) if _suffix(files[0]) in _SUFFIXES else None
    except MansuError:
        return frozenset()  # whoever reads it in earnest says what is wrong
    return frozenset(map(str, record.fields)) if record else frozenset()


def title_of(place: str | PathLike[str]) -> str:
    """A short name of a place."""
    path, part = _split(place)
    stem = Path(path).name.removesuffix(".gz")
    return (stem.removesuffix(Path(stem).suffix) if _is(path, Path.is_file) else stem) + (f" {part}" if part else "")


def spread(records: Sequence[Any], limit: int) -> tuple[Any, ...]:
    """At most `limit` of them, evenly spread; 0 = all.

    Raises:
        MansuError: a negative limit.
    """
    if limit < 0:
        raise MansuError(f"limit={limit}; give a number from 0 up, 0 = all")
    if not limit or limit >= len(records):
        return tuple(records)
    return tuple(records[i * len(records) // limit] for i in range(limit))


def _split(place: str | PathLike[str]) -> tuple[str, str]:
    if "#" not in fspath(place) or _is(fspath(place), Path.exists):
        return fspath(place), ""
    path, _, part = fspath(place).partition("#")
    return path, part.strip("/")


def _is(path: str, what: Callable[[Path], bool]) -> bool:
    try:
        return what(local(path))
    except (OSError, ValueError):
        return False  # no name that a file could have


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _files(folder: Path, part: str) -> list[Path]:
    """The files of a folder's part, by its path or by the names of its split's shards."""
    below = (path for depth in _DEPTHS for path in folder.glob(depth))
    held = sorted(path for path in below if _suffix(path) in _SUFFIXES and path.is_file())
    parts: dict[str, list[Path]] = {}
    for path in held:
        inside = path.relative_to(folder)
        stem = _SHARD.sub("", inside.name.removesuffix(".gz").removesuffix(_suffix(path)))
        above = "/".join(step for step in inside.parts[:-1] if step != "data")
        parts.setdefault(f"{above}/{stem}".strip("/"), []).append(path)
    chosen = [name for name in parts if not part or name == part or part in (name.partition("/")[0], Path(name).name)]
    if not parts:
        raise MansuError(f"{folder}: holds no file of {', '.join(_SUFFIXES)}; check the path")
    if not chosen:
        raise MansuError(f"{folder}: has no part {part!r}{near(part, list(parts))}; it has {_listed(list(parts))}")
    if len(chosen) > 1:
        raise MansuError(
            f"{folder}: {f'#{part} is' if part else 'has'} several parts, {_listed(chosen)}; name one: "
            f"{folder.name}#{chosen[0]}"
        )
    return parts[chosen[0]]


def _listed(names: Collection[str]) -> str:
    shown = list(names)[:8]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _of_file(path: Path) -> Iterator[Record]:
    suffix = _suffix(path)
    if suffix == ".parquet":
        rows: Iterator[tuple[str, Any]] = _parquet(path)
    elif suffix in (".csv", ".tsv"):
        rows = _table(path, "," if suffix == ".csv" else "\t")
    else:
        rows = _json_rows(path)
    for name, row in rows:
        if not isinstance(row, Mapping):
            raise MansuError(f"{name}: {_short(row)} is no record; a record is an object with fields")
        yield Record(name, row)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    text = read_text(path)
    if text.lstrip().startswith("["):
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(_json(text, str(path))))
        return
    lines = [(number, line) for number, line in enumerate(lines_of(text), 1) if line.strip()]
    if len(lines) > 1 and lines[0][1].strip() == "{":
        yield f"{path}", _json(text, str(path))  # one object over many lines
        return
    for number, line in lines:
        yield f"{path}, line {number}", _json(line, f"{path}, line {number}")


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise MansuError(f"{name}: not JSON ({error}); write one object a line, or an array of them") from None


def _table(path: Path, separator: str) -> Iterator[tuple[str, Any]]:
    try:
        frame = pd.read_csv(io.StringIO(read_text(path)), sep=separator, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise MansuError(f"{path}: no table ({error}); write one row a line under a line of column names") from None
    for i, row in enumerate(frame.to_dict("records")):
        yield f"{path}, row {i}", {str(key): text for key, text in row.items() if text != ""}


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow  # takes a while, and most files are text
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise MansuError(f"{path}: no Parquet file ({' '.join(str(error).split())[:120]}); download it again") from None
    yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows))


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) < 60 else shown[:57] + "..."
