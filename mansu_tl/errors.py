"""The one error type that a user's input can cause, and how a notebook shows it."""

from __future__ import annotations

import contextlib
import difflib
import linecache
import sys
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any

_PACKAGE = str(Path(__file__).parent)
# A decorator of contextlib's stands between the user's line and ours.
_LIBRARIES = ("site-packages", "dist-packages", contextlib.__file__)
# IPython's modes (%xmode) that someone who wants every call would not be in.
_SHORT_MODES = ("Context", "Minimal")


class MansuError(ValueError):
    """Bad input, a `ValueError`: one line that names the thing, its value and the way out.

    IPython and Jupyter show it with the line of the cell that caused it and without the calls inside the package:
    `%tb Verbose` shows those of the last error, `%xmode Verbose` of every error from then on. The command line prints it
    without a traceback and exits with status 2. Everything else that is raised is a bug.

    Example:
        >>> mtl.quantize(mtl.load("pocket"), "nf5")
        Traceback (most recent call last):
        mansu_tl.errors.MansuError: ...
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: it asks the exception before it writes a traceback of its own."""
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        if shell is not None and shell.InteractiveTB.mode not in _SHORT_MODES:
            return shell.InteractiveTB.structured_traceback(type(self), self, self.__traceback__, tb_offset=1)
        colour = shell is not None and str(shell.colors).lower() != "nocolor"
        name = type(self).__name__
        lines = [f"\x1b[31m{name}\x1b[39m: {self}" if colour else f"{name}: {self}"]
        caller = _caller(self, shell)
        return [*lines, *([f"  {caller}"] if caller else []), "  (%tb Verbose shows every call)"]


class NoEditError(MansuError):
    """A method ran with these settings and ended without an edit: its loss blew up, or no weight moved far enough."""


def near(name: str, names: Collection[str]) -> str:
    """What was probably meant by an unknown name, for the end of an error; "" where nothing is close."""
    lower = {each.lower(): each for each in names}
    close = difflib.get_close_matches(name.lower(), lower, 1)
    return f" (did you mean {lower[close[0]]!r}?)" if close else ""


def unknown(kind: str, name: str, names: Collection[str]) -> MansuError:
    """The error of a name that is none of those there are."""
    return MansuError(f"{kind} {name!r}: unknown; choose one of {', '.join(names)}{near(name, names)}")


def _caller(error: BaseException, shell: Any) -> str:
    """The last line of the user's own code on the way to the error."""
    user_line = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE):
            break
        if any(part in file for part in _LIBRARIES):
            continue
        cell = shell.compile.format_code_name(file) if shell is not None else None
        where = " ".join(cell) if cell else file
        user_line = f"{where}, line {line}: {linecache.getline(file, line).strip()}"
    return user_line
