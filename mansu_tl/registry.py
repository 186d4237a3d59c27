"""Entries by name, to which a user adds: methods, quantizers, sources, corruptions and model families are one each.

What a user adds in a module of their own is a plugin: named in a study's config it is known to every worker too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import NoReturn, TypeVar

from mansu_tl.errors import MansuError, unknown

T = TypeVar("T")


class Registry(dict[str, T]):
    """Entries by name, in the order in which they were added.

    Args:
        kind: what an entry is called in errors.
        entries: what it begins with.

    Raises:
        MansuError: on looking up a name that is not there.
    """

    def __init__(self, kind: str, entries: Mapping[str, T] | None = None) -> None:
        super().__init__(entries or {})
        self.kind = kind

    def add(self, name: str, entry: T) -> T:
        """Make an entry known by its name.

        Raises:
            MansuError: a name that is taken, or that cannot be written in a config.
        """
        if name in self:
            raise MansuError(f"{self.kind} {name!r}: registered already; choose another name")
        if not re.fullmatch(r"[\w.-]+", name):
            raise MansuError(f'{self.kind} {name!r}: not a name; use letters, digits, ".", "-" and "_"')
        self[name] = entry
        return entry

    def __missing__(self, name: str) -> NoReturn:
        raise unknown(self.kind, name, self)


def import_plugins(modules: Iterable[str]) -> None:
    """Import modules that register what is a user's own; one that has been imported is left as it is.

    Args:
        modules: their names, "my_package.my_method".

    Raises:
        MansuError: one that cannot be imported.
    """
    for name in modules:
        if not all(part.isidentifier() for part in name.split(".")):
            raise MansuError(f'plugin {name!r}: not the name of a module; write "my_package.my_method"')
        try:
            import_module(name)
        except ImportError as error:
            raise MansuError(f"plugin {name!r}: {error}; install it, or put its folder on PYTHONPATH") from error
