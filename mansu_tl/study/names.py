"""Short names that stay apart: the last part of a path, and as many more as tell it from the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mansu_tl.errors import MansuError
from mansu_tl.results.digest import digest


def short_names(sources: Sequence[str], what: str) -> dict[str, str]:
    """A short name for every model of a run, no two alike, by source.

    "runs/a/final" and "runs/b/final" become "a-final" and "b-final"; "pocket" stays "pocket".

    Args:
        what: where they were named, for the error.

    Raises:
        MansuError: the same source twice.
    """
    parts: dict[str, tuple[str, ...]] = {}
    for source in sources:
        path = Path(source)
        key = tuple(part for part in (path.resolve() if path.exists() else path).parts if part not in ("/", "\\"))
        if source in parts or key in parts.values():
            raise MansuError(f"{what}: {source!r} is named twice; name every model once")
        parts[source] = key or (source,)
    out = {}
    for source, key in parts.items():
        others = [other for other in parts.values() if other is not key]
        length = next((n for n in range(1, len(key) + 1) if all(other[-n:] != key[-n:] for other in others)), len(key))
        out[source] = "-".join(key[-length:])
    same = [source for source, name in out.items() if list(out.values()).count(name) > 1]
    # "a/b" beside "a-b": joined they are alike.
    return out | {source: f"{out[source]}-{digest(source)[:6]}" for source in same}
