"""The report: one HTML file with text, figures and tables that opens without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mansu_tl.errors import MansuError
from mansu_tl.plots.export import Drawing, html
from mansu_tl.results.files import write_text

_TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        heading: plain text.
        text: plain text, two sentences; an empty line starts a new paragraph.
        figure: drawn under the text.
        table: shown under the text, below the figure if there is one.
        folded: the table opens when it is clicked, or printed.
    """

    heading: str
    text: str
    figure: Drawing | None = None
    table: pd.DataFrame | None = None
    folded: bool = False


def write_report(
    path: str | PathLike[str],
    *,
    title: str,
    sections: Sequence[Section],
    environment: Mapping[str, object],
    summary: str = "",
) -> Path:
    """Write a self-contained HTML report: plotly.js is in it once, nothing is loaded from elsewhere.

    Whatever comes from outside (headings, text, cells) is escaped; figures escape their own labels.

    Args:
        path: of the file; it is written whole or not at all.
        title: plain text.
        sections: in order.
        environment: versions, seed, command and the like, shown as a table at the end.
        summary: plain text under the title.

    Raises:
        MansuError: no section, or a folder that cannot be written to.
    """
    if not sections:
        raise MansuError(f"report {str(path)!r}: it has no section; give it at least one")
    drawn = [
        "" if section.figure is None else html(section.figure, f"figure-{number}")
        for number, section in enumerate(sections, 1)
    ]
    page = (
        _templates()
        .get_template(_TEMPLATE)
        .render(
            title=title,
            sections=sections,
            environment=environment,
            summary=summary,
            drawn=drawn,
            plotly_js=get_plotlyjs(),
        )
    )
    return write_text(path, page)


def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    templates.filters |= {"kinds": _kinds, "cell": _cell, "tone": _tone}
    return templates


def _kinds(frame: pd.DataFrame) -> list[Markup]:
    """The attribute of every column: numbers stand to the right."""
    number = [pd.api.types.is_numeric_dtype(t) and not pd.api.types.is_bool_dtype(t) for t in frame.dtypes]
    return [Markup(' class="number"' if each else "") for each in number]


def _tone(value: Any) -> Markup:
    """The attribute of a cell that is a verdict: its mark says the same as its colour."""
    if not isinstance(value, str):
        return Markup("")
    return Markup({"✓": ' class="yes"', "✗": ' class="no"'}.get(value[:1], ""))


def _cell(value: Any) -> str:
    """A value for reading: four significant digits, marks beside yes and no, a dash for nothing."""
    if isinstance(value, (list, tuple, dict, set)):
        return str(value)
    if pd.isna(value):
        return "–"
    if pd.api.types.is_bool(value):
        return "✓ yes" if value else "✗ no"
    if pd.api.types.is_integer(value):
        return f"{value:,}"
    if pd.api.types.is_float(value):
        return f"{value:.4g}"
    return str(value)
