"""Verdicts as tables that a paper could print: scorecards, certificates, methods against properties.

A table is pandas' `Styler`: HTML in a notebook, a report and `write_html`, an image by `write_image`, `.to_latex()` for a
paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from mansu_tl.errors import MansuError
from mansu_tl.plots.panels import distinct, require_columns
from mansu_tl.plots.theme import FONT, fixed, number, theme_named
from mansu_tl.results.digest import digest
from mansu_tl.verification import Certificate, Scorecard
from mansu_tl.verification.scorecard import Row

_MARKS: dict[bool | None, str] = {True: "✓", False: "✗", None: "·"}
_Cell = tuple[str, bool | None]  # its text, and whether it passes
_Cells = Mapping[tuple[str, ...], Mapping[str, _Cell]]  # by names of the row and name of the column
_NOTHING: _Cell = ("–", None)


def scorecard(cards: Scorecard | Sequence[Scorecard], *, title: str | None = None, theme: str = "light") -> Styler:
    """Draw one scorecard, or several side by side, one column a method.

    Every verdict is a mark, never a colour alone. The control is one column where all cards share it, else one beside
    each card.

    Raises:
        MansuError: no card, cards of the same title, or one without rows.
    """
    several = [cards] if isinstance(cards, Scorecard) else list(cards)
    titles = distinct("scorecard", [card.title for card in several])
    empty = [card.title for card in several if not card.rows]
    if empty:
        raise MansuError(f"scorecard {empty[0]!r}: it has no row to draw; measure at least one property")
    rows = [(card.title, row) for card in several for row in card.rows]
    properties = list(dict.fromkeys(row.property for _, row in rows))
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    # Rows that only some cards have stay with their property.
    for name, row in sorted(rows, key=lambda each: properties.index(each[1].property)):
        found.setdefault((row.property, row.measure, row.quantizer or "full"), {})[name] = row
    shared = all(len({_control(row) for row in here.values()}) == 1 for here in found.values())
    cells: dict[tuple[str, ...], dict[str, _Cell]] = {}
    for key, here in found.items():
        first = next(iter(here.values()))
        cells[key] = {"bound": (_symbols(first.bound), None)}
        if shared:
            named = f" ({first.control_name})" if len(several) == 1 else ""
            cells[key]["control"] = (f"{_control(first)}{named}", None)
        for name in titles:
            each = here.get(name)
            cells[key][name] = _NOTHING if each is None else (f"{_MARKS[_passed(each)]} {_value(each)}", _passed(each))
            if not shared:
                cells[key][f"{name}, control"] = _NOTHING if each is None else (_control(each), None)
    passes = [repr(card).partition("(")[2].removesuffix(")") for card in several]
    how_to_read = f"✓ = within its bound, ✗ = not; in brackets 95 % intervals. {'; '.join(passes)}."
    default = "Scorecards" if len(several) > 1 else f"Scorecard: {titles[0]}"
    return _table(title or default, how_to_read, cells, ("property", "measure", "precision"), theme)


def certificate(
    certificates: Certificate | Sequence[Certificate], *, title: str | None = None, theme: str = "light"
) -> Styler:
    """Draw what one or more certificates found, one column a certificate, beside what is required.

    Raises:
        MansuError: none given.
    """
    several = [certificates] if isinstance(certificates, Certificate) else list(certificates)
    if not several:
        raise MansuError("certificate: none given; pass at least one")
    required = {
        "edited weights": "",
        "share of the quantized weights": "",
        "share of all parameters": "",
        "edited weights whose code changed": "100 %",
        "other weights whose code changed": "0",
        "block scales changed": "0",
        "other parameters not bit-identical": "0",
        "faults in all": "0",
        "verdict": "✓ pass",
    }
    cells: dict[tuple[str, ...], dict[str, _Cell]] = {
        (check,): {"required": (asked, None)} for check, asked in required.items()
    }
    for each in several:
        counts = (each.unedited_codes_changed, each.absmax_changed, len(each.others_changed), len(each.faults))
        changed = each.edited_codes_changed_share
        column = [
            (f"{each.n_edited:,}", None),
            *((f"{number(100 * share)} %", None) for share in (each.edited_share_of_linear, each.edited_share_of_all)),
            (f"{_MARKS[changed == 1]} {_exact_share(changed)}", changed == 1),
            *((f"{_MARKS[count == 0]} {count:,}", count == 0) for count in counts),
            (f"{_MARKS[each.passed]} {'pass' if each.passed else 'fail'}", each.passed),
        ]
        for check, cell in zip(required, column, strict=True):
            cells[check,][f"{each.quantizer}, {each.dtype}"] = cell
    subtitle = "Codes recomputed by the quantizer's own library from the saved files; it says nothing of behaviour."
    return _table(title or "Certificate", subtitle, cells, ("check",), theme)


def methods_table(
    rows: pd.DataFrame,
    *,
    digits: int | Mapping[str, int] = 1,
    intervals: bool = True,
    title: str | None = None,
    theme: str = "light",
) -> Styler:
    """Draw one row a method and one column a property: its value, its 95 % interval below, and a pass mark.

    Args:
        rows: one row a method and property: columns method, property, value, low and high (NaN where there is no
            interval), bound (in words), verdict ("pass", "fail", "fail: why", "" or anything else = not judged) and
            seeds. A column base groups the methods.
        digits: decimals, of all properties or by property (1 where not given).
        intervals: write them; without, a row is one line, and how many properties are within their bounds closes it.

    Raises:
        MansuError: a column is missing, no row, or two rows for one method and property.
    """
    require_columns("methods table", rows, ["method", "property", "value", "low", "high", "bound", "verdict", "seeds"])
    names = (["base"] if "base" in rows.columns and rows["base"].nunique() > 1 else []) + ["method"]
    if rows.duplicated([*names, "property"]).any():
        raise MansuError("methods table: two rows for one method and property; give one, the mean over seeds")
    found: dict[tuple[str, ...], dict[str, _Cell]] = {}
    for row in rows.to_dict("records"):
        places = digits if isinstance(digits, int) else digits.get(row["property"], 1)
        passed = {"pass": True, "fail": False}.get(row["verdict"].partition(":")[0])
        mark = "" if passed is None else f" {_MARKS[passed]}"
        interval = _interval(row["low"], row["high"], places, "\n") if intervals else ""
        cell = (f"{fixed(row['value'], places)}{mark}{interval}", passed)
        found.setdefault(tuple(row[name] for name in names), {})[row["property"]] = cell
    heads = {row["property"]: f"{row['property']}\n{_symbols(row['bound'])}" for row in rows.to_dict("records")}
    cells = {key: {head: row.get(name, _NOTHING) for name, head in heads.items()} for key, row in found.items()}
    if not intervals:
        for here in cells.values():
            marks = [passed for _, passed in here.values() if passed is not None]
            here["within"] = (f"{sum(marks)} of {len(marks)}", None)
    judged = [passed for here in cells.values() for _, passed in here.values() if passed is not None]
    least, most = int(rows["seeds"].min()), int(rows["seeds"].max())
    seeds = f"{most if least == most else f'{least} to {most}'} seed{'s' if most > 1 else ''}"
    subtitle = (
        f"Mean over {seeds}"
        + intervals
        * (
            ", below it the 95 % interval"
            + (" of the mean (Student's t)" if most > 1 else " over facts")
            + ("; over facts where there is one seed" if most > 1 and least == 1 else "")
        )
        + (
            f". ✓ = within the bound in the header, ✗ = not; {sum(judged)} of {len(judged)} are within."
            if judged
            else "."
        )
    )
    return _table(title or "Methods and properties", subtitle, cells, names, theme)


def _table(title: str, subtitle: str, cells: _Cells, names: Sequence[str], theme: str) -> Styler:
    """The cells under a caption, rows named by the columns `names`; a line parts rows that differ in the first of them."""
    look = theme_named(theme)
    rows = [[*((name, None) for name in key), *row.values()] for key, row in cells.items()]
    columns = [*names, *next(iter(cells.values()))]
    texts = pd.DataFrame([[text for text, _ in row] for row in rows], columns=columns)
    starts = texts[names[0]] != texts[names[0]].shift()
    texts[names[0]] = texts[names[0]].where(starts, "")
    shades: dict[bool | None, str] = {True: look.passed, False: look.failed}
    css = [
        [
            (f"border-top: 1px solid {look.grid};" if start else "")
            + (f"background-color: {shades[passed]}; white-space: pre;" if passed in shades else "")
            for _, passed in row
        ]
        for start, row in zip(starts, rows, strict=True)
    ]
    ground = f"color: {look.ink}; background-color: {look.paper};"
    styles: list[Any] = [
        {"selector": "", "props": f"font: 12px/1.4 {FONT}; border-collapse: collapse; margin: 0; {ground}"},
        {
            "selector": "caption",
            "props": f"caption-side: top; text-align: left; padding: 0 0 14px; {ground} color: {look.muted};",
        },
        {"selector": "caption b", "props": f"display: block; font-size: 17px; color: {look.ink};"},
        {"selector": "tr", "props": f"white-space: pre-line; {ground}"},
        {"selector": "th, td", "props": "padding: 4px 9px; border-bottom: 0; text-align: left; vertical-align: top;"},
        {"selector": "th", "props": f"background-color: {look.grid};"},
    ]
    return (
        Styler(texts, uuid=digest([title, texts])[:8], cell_ids=False)
        .hide(axis="index")
        .format(escape="html")
        .format_index(escape="html", axis=1)
        .apply(lambda _: np.array(css, dtype=object), axis=None)
        .set_caption(f"<b>{escape(title)}</b>{escape(subtitle)}")
        .set_table_styles(styles)
    )


def _symbols(bound: str) -> str:
    return bound.replace("<=", "≤").replace(">=", "≥").replace("-", "−")


def _value(row: Row) -> str:
    return f"{fixed(row.value, _decimals(row))}{_interval(row.interval_low, row.interval_high, _decimals(row), ' ')}"


def _control(row: Row) -> str:
    return fixed(row.control, _decimals(row))


def _decimals(row: Row) -> int:
    """One for percentages and points, three otherwise."""
    return 1 if row.measure.endswith(("%", "points")) else 3


def _passed(row: Row) -> bool | None:
    return row.passed if row.judgeable else None


def _interval(low: float, high: float, digits: int, before: str) -> str:
    return "" if math.isnan(low) or math.isnan(high) else f"{before}[{fixed(low, digits)}, {fixed(high, digits)}]"


def _exact_share(share: float) -> str:
    """A percentage that reads 100 only if it is."""
    text = number(100 * share, 6)
    return f"{'< 100' if text == '100' and share != 1 else text} %"
