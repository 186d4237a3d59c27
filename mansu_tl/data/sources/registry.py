"""Tasks by source: every format is one file here, which registers itself by name.

A source is named by `kind=`, by its name in front ("tofu:FOLDER", options behind: "tofu:FOLDER?near=30"), or it knows its
own: "pocket", a file by its ending or by its first record's fields, a folder by what is in it.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote_plus

import pandas as pd

from mansu_tl.data.sources.records import first_fields
from mansu_tl.data.task import Task
from mansu_tl.data.text import TextSource
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError, near
from mansu_tl.registry import Registry

if TYPE_CHECKING:
    TaskSource = str | PathLike[str] | pd.DataFrame | Iterable[Mapping[str, Any]]
else:
    TaskSource = object  # anything else is told what to pass

_NAMED = re.compile(r"(?P<kind>[\w.-]+)(:(?P<rest>[^?]+))?(\?(?P<options>[^?]*))?")


@dataclass(frozen=True)
class Source:
    """A format that tasks are read from.

    Attributes:
        name: what `kind=` and "NAME:..." call it.
        about: one line for lists.
        read: `read(source, tokenizer, **options)` makes the task; its keyword-only arguments are the options.
        claims: whether something that is not named belongs to it.
        bare: it needs no tokenizer, and its name alone is a task.
        fields: of a record by which a file of this format is known; none = not by these.
    """

    name: str
    about: str
    read: Callable[..., Task]
    claims: Callable[[object], bool]
    bare: bool = False
    fields: frozenset[str] = frozenset()

    def options(self) -> dict[str, Any]:
        """What may be set, with its defaults."""
        parameters = inspect.signature(self.read).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


_SOURCES = Registry[Source]("source")


def register_source(
    name: str,
    about: str,
    read: Callable[..., Task],
    *,
    claims: Callable[[object], bool] = lambda source: False,
    bare: bool = False,
    fields: Iterable[str] = (),
) -> None:
    """Make a format known to `load_task`, `mansu-tl check`, `run` and `compare`; the last one to claim a source gets it.

    Args:
        name: letters, digits, ".", "-" and "_".
        about: one line that says what the source is.
        read: `read(source, tokenizer, **options)` gives a `Task`; for rows as task files have them `rows_reader` makes one.
            Options are its keyword-only arguments.
        claims: whether a source that nobody named belongs to this format; never without.
        bare: it needs no tokenizer, and its name alone is a task.
        fields: that every record of this format has; a file whose first record has them is taken for it where no other
            format has more of its fields.

    Raises:
        MansuError: a name that is taken or cannot be written in a config.
    """
    _SOURCES.add(name, Source(name, about, read, claims, bare, frozenset(fields)))


def sources() -> tuple[str, ...]:
    """The names of all sources, in the order in which they were registered."""
    return tuple(_SOURCES)


def source(name: str) -> Source:
    """The source of a name.

    Raises:
        MansuError: no such source.
    """
    return _SOURCES[name]


@torch_defaults()
def load_task(
    source: TaskSource, *, tokenizer: TextSource | None = None, kind: str | None = None, **options: Any
) -> Task:
    """A task from the embedded one ("pocket"), a file, a table, a list of rows, or another of `sources()`.

    A JSON-lines file (gzipped or not), JSON array, CSV, DataFrame or list of dicts holds rows; what is in one:
    `mansu_tl.data.sources.fields`. TOFU is "tofu:FOLDER".

    Args:
        tokenizer: the hooked model that the task is for, or its tokenizer; only "pocket" needs none.
        kind: the source's name, where it cannot be seen from `source`.
        options: what the source takes: `name` and `answer_space` ("auto", True, False: see `PromptPairs.from_text`) for
            rows, `seed` for "pocket" and "tofu", further ones in `mansu_tl.data.sources.source(NAME).options()`.

    Raises:
        MansuError: no such source or option, a source without a tokenizer, rows that cannot be read, or the embedded task
            for a model that speaks other words.

    Example:
        >>> task = mtl.load_task("pocket")
        >>> len(task.forget_pairs), len(task.questions["forget"])
        (192, 192)
    """
    chosen, place, written = _find(source, kind)
    known = chosen.options()
    options = written | options
    for option, value in options.items():
        if option not in known:
            raise MansuError(
                f"task: source {chosen.name!r} has no option {option!r}; known: {', '.join(known) or 'none'}"
            )
        if type(known[option]) is int and type(value) is not int:
            raise MansuError(f"task: {option}={value!r} for source {chosen.name!r}; give a whole number")
    if tokenizer is None and not chosen.bare:
        if kind is None and place is source and isinstance(source, str | PathLike) and not Path(source).exists():
            bare = [one.name for one in _SOURCES.values() if one.bare]
            raise MansuError(
                f"task {fspath(source)!r}: no such file or folder, and no embedded task, {', '.join(bare)}"
                f"{near(fspath(source), bare)}"
            )
        what = repr(fspath(source)) if isinstance(source, str | PathLike) else type(source).__name__
        raise MansuError(f"task {what}: needs a tokenizer to be read; pass tokenizer=model")
    return chosen.read(place, tokenizer, **options)


def beside(name: str, folder: Path) -> str:
    """A task's name as written in a file of `folder`, its paths made absolute where they lie there, in options too."""
    named = _NAMED.fullmatch(name)
    kind = f"{named['kind']}:" if named and named["rest"] and named["kind"] in _SOURCES else ""
    path, mark, options = name.removeprefix(kind).partition("?") if kind else (name, "", "")
    written = [option.partition("=") for option in options.split("&")]
    moved = [(key, equals, value, _moved(unquote_plus(value), folder)) for key, equals, value in written]
    there = "&".join(key + equals + (quote(new, safe="/,:") if new else value) for key, equals, value, new in moved)
    return f"{kind}{_moved(path, folder) or path}{mark}{there}"


def _moved(places: str, folder: Path) -> str:
    """Places with commas between them, absolute where all lie in a folder; "" where not."""
    found = []
    for place in [places] if places and (folder / places).exists() else places.split(","):
        path, mark, part = (place, "", "") if (folder / place).exists() else place.partition("#")
        if not path or not (folder / path).exists():
            return ""
        found.append(f"{(folder / path).resolve()}{mark}{part}")
    return ",".join(found)


def _find(given: object, kind: str | None) -> tuple[Source, Any, dict[str, Any]]:
    """The source that reads something, what is left for it to read, and the options written behind it."""
    if kind is not None:
        return source(kind), given, {}
    named = _NAMED.fullmatch(given) if isinstance(given, str) else None
    if named and named["kind"] in _SOURCES and (named["rest"] or _SOURCES[named["kind"]].bare):
        written = parse_qsl(named["options"] or "", keep_blank_values=True)
        return _SOURCES[named["kind"]], named["rest"] or named["kind"], {key: _value(value) for key, value in written}
    return _by_fields(given) or next(one for one in reversed(_SOURCES.values()) if one.claims(given)), given, {}


def _by_fields(given: object) -> Source | None:
    """The source whose records a local file's or folder's first one is like; None where it says nothing of the kind.

    Raises:
        MansuError: there are several.
    """
    have = first_fields(given)
    if not have or "set" in have:
        return None  # rows of a task file, or nothing that could be read
    fitting = [one for one in _SOURCES.values() if one.fields and one.fields <= have]
    most = max((len(one.fields) for one in fitting), default=0)
    found = [one for one in fitting if len(one.fields) == most]
    if len(found) > 1:
        names = " or ".join(one.name for one in found)
        raise MansuError(
            f"task {fspath(given)!r}: fields {', '.join(sorted(have))} may be {names}; say which, kind={found[0].name!r}"  # type: ignore[call-overload]
        )
    return found[0] if found else None


def _value(text: str) -> Any:
    """An option as written in a config: a number, true or false, else text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
