"""How results look in a notebook: one line and small tables, and completions that show only what is public."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import pandas as pd

from mansu_tl.digest import Digested


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
    """What a result is in a notebook: its `repr` as one line over small tables, and completion by public names.

    No colour is set anywhere, so light and dark themes use their own.
    """

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
