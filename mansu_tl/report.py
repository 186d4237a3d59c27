"""The report: one HTML file with text, figures and tables that opens without a network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from mansu_tl.errors import MansuError
from mansu_tl.plots.export import html
from mansu_tl.results.files import write_text

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1b1f24; font: 16px/1.55 Inter, "Helvetica Neue", Arial, "Liberation Sans",
  "DejaVu Sans", sans-serif; }
header, main, footer { max-width: 1280px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 36px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 12px; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 0 0 8px; }
p { margin: 0 0 14px; max-width: 74ch; }
nav ol { columns: 2 18em; padding-left: 1.4em; margin: 0 0 8px; }
a { color: #0072b2; }
section { border-top: 1px solid #e3e6ea; padding: 28px 0 16px; }
.wide { overflow-x: auto; }
.figure { min-width: 640px; }
table { border-collapse: collapse; font-size: .82rem; margin: 4px 0 16px; }
th, td { padding: 5px 12px 5px 0; text-align: left; border-bottom: 1px solid #e3e6ea; vertical-align: top; }
td:first-child { white-space: nowrap; }
details > summary { cursor: pointer; color: #0072b2; margin: 0 0 10px; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { text-align: right; }
thead th { border-bottom: 2px solid #9aa2ac; }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
footer { color: #5b6470; font-size: .86rem; padding-bottom: 40px; }
@media print {
  nav, details > summary { display: none; }
  details::details-content { content-visibility: visible; height: auto; }
  section { break-inside: avoid; }
}
"""


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
    figure: go.Figure | None = None
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
    contents = "".join(f'<li><a href="#part-{i}">{escape(s.heading)}</a></li>' for i, s in enumerate(sections, 1))
    body = "".join(_section(i, section) for i, section in enumerate(sections, 1))
    facts = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td><code>{escape(str(value))}</code></td></tr>'
        for key, value in environment.items()
    )
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
<script>window.PlotlyConfig = {{MathJaxConfig: "local"}};</script>
<script>{get_plotlyjs()}</script>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{_paragraphs(summary)}
<nav aria-label="Contents"><ol>{contents}</ol></nav>
</header>
<main>
{body}
<section id="environment">
<h2>How this was made</h2>
<div class="wide"><table><tbody>{facts}</tbody></table></div>
</section>
</main>
<footer>Figures can be zoomed, switched on and off in their legends, and saved as images. Written by mansu_tl.</footer>
</body>
</html>
"""
    return write_text(path, page)


def _section(number: int, section: Section) -> str:
    parts = [f"<h2>{number}. {escape(section.heading)}</h2>", _paragraphs(section.text)]
    if section.figure is not None:
        parts.append(_figure(number, section.heading, section.figure))
    if section.table is not None:
        table = f'<div class="wide">{_table(section.table)}</div>'
        count = f"{len(section.table):,} rows"
        parts.append(f"<details><summary>Show {count}</summary>{table}</details>" if section.folded else table)
    return f'<section id="part-{number}">\n{"".join(parts)}\n</section>\n'


def _figure(number: int, heading: str, figure: go.Figure) -> str:
    name = f"figure-{number}"
    label = escape(f"Figure: {heading}")
    return f'<div class="wide"><div class="figure" role="figure" aria-label="{label}">{html(figure, name)}</div></div>'


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{escape(part.strip())}</p>" for part in re.split(r"\n\s*\n", text) if part.strip())


def _table(frame: pd.DataFrame) -> str:
    numeric = [pd.api.types.is_numeric_dtype(t) and not pd.api.types.is_bool_dtype(t) for t in frame.dtypes]
    kinds = [' class="number"' if n else "" for n in numeric]
    head = "".join(f"<th{k}>{escape(str(name))}</th>" for k, name in zip(kinds, frame.columns, strict=True))
    rows = (
        "".join(f"<td{k}>{escape(_cell(value))}</td>" for k, value in zip(kinds, row, strict=True))
        for row in frame.itertuples(index=False)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"


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
