"""Verdicts as tables that a paper could print: scorecards and certificates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mansu_tl.errors import MansuError
from mansu_tl.plots.protocols import CertificateLike, ScorecardLike
from mansu_tl.plots.theme import Theme, fixed, new_figure, number, plain, theme_named

_KEY = ("property", "measure", "quantizer")
# In pixels: rows, further lines of a row, and what a row's width is reckoned with.
_ROW_HEIGHT, _LINE_HEIGHT = 25, 17
_PAGE, _CHARACTER, _FONT, _PADDING = 960, 5.2, 11, 16


@dataclass(frozen=True)
class _Column:
    """A column: its name, its texts, its share of the width, and verdicts that colour its cells."""

    name: str
    cells: list[str]
    width: float
    passed: list[bool | None] | None = None


def scorecard(
    cards: ScorecardLike | Sequence[ScorecardLike], *, title: str | None = None, theme: str = "light"
) -> go.Figure:
    """Draw one scorecard, or several side by side, one column a method.

    Every verdict is a mark, in a single card with a word, never a colour alone. The control is one column where all
    cards share it, else one beside each card.

    Args:
        cards: one, or one for each method.
        title: plain text; by default the card's title.
        theme: "light" or "dark".

    Raises:
        MansuError: no card, cards of the same title, or one without rows.
    """
    look = theme_named(theme)
    several = [cards] if isinstance(cards, ScorecardLike) else list(cards)
    if not several:
        raise MansuError("scorecard: none given; pass at least one")
    titles = [card.title for card in several]
    if len(set(titles)) != len(titles):
        raise MansuError(f"scorecards: the titles {titles} are not distinct; give each method its own title")
    tables = [card.to_dataframe() for card in several]
    for card, frame in zip(several, tables, strict=True):
        if frame.empty:
            raise MansuError(f"scorecard {card.title!r}: it has no row to draw; measure at least one property")
    if len(several) == 1:
        return _one(several[0].title, tables[0], title, look)
    return _many(titles, tables, title, look)


def certificate(
    certificates: CertificateLike | Sequence[CertificateLike], *, title: str | None = None, theme: str = "light"
) -> go.Figure:
    """Draw what one or more certificates found, one column a certificate, beside what is required.

    Args:
        certificates: one, or one for each quantizer.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: none given.
    """
    look = theme_named(theme)
    several = [certificates] if isinstance(certificates, CertificateLike) else list(certificates)
    if not several:
        raise MansuError("certificate: none given; pass at least one")
    checks = [
        ("edited weights", ""),
        ("share of the quantized weights", ""),
        ("share of all parameters", ""),
        ("edited weights whose code changed", "100 %"),
        ("other weights whose code changed", "0"),
        ("block scales changed", "0"),
        ("other parameters not bit-identical", "0"),
        ("faults in all", "0"),
        ("verdict", "✓ pass"),
    ]
    columns = [_Column("check", [c[0] for c in checks], 2.4), _Column("required", [c[1] for c in checks], 0.8)]
    columns += [_found(each) for each in several]
    subtitle = "Codes recomputed by the quantizer's own library from the saved files; it says nothing of behaviour."
    return _table(title or "Certificate", subtitle, columns, [0] * (len(checks) - 1) + [1], look)


def _found(each: CertificateLike) -> _Column:
    """One certificate's numbers, in the order of the checks."""
    counts = (each.unedited_codes_changed, each.absmax_changed, len(each.others_changed), len(each.faults))
    share = each.edited_codes_changed_share
    cells = [
        f"{each.n_edited:,}",
        f"{number(100 * each.edited_share_of_linear)} %",
        f"{number(100 * each.edited_share_of_all)} %",
        f"{_sign(share == 1)} {_exact_share(share)}",
        *(f"{_sign(count == 0)} {count:,}" for count in counts),
        _verdict(each.passed),
    ]
    verdicts: list[bool | None] = [None, None, None, share == 1, *(count == 0 for count in counts), each.passed]
    return _Column(f"{each.quantizer}, {each.dtype}", cells, 1.3, verdicts)


def _one(card_title: str, frame: pd.DataFrame, title: str | None, look: Theme) -> go.Figure:
    rows = list(frame.itertuples())
    properties = [str(row.property) for row in rows]
    passed = [_passed(row) for row in rows]
    columns = [
        _Column("property", _thinned(properties), 1.05),
        _Column("measure", [str(row.measure) for row in rows], 2.1),
        _Column("precision", [_precision(row.quantizer) for row in rows], 0.75),
        _Column("value [95 % interval]", [_value(row) for row in rows], 1.35),
        _Column("control", [f"{_control(row)} ({row.control_name})" for row in rows], 2.1),
        _Column("bound", [_bound(row.bound) for row in rows], 1.1),
        _Column("verdict", [_verdict(verdict) for verdict in passed], 0.75, passed),
    ]
    judged = [verdict for verdict in passed if verdict is not None]
    subtitle = f"{sum(judged)} of {len(judged)} judged rows pass."
    return _table(title or f"Scorecard: {card_title}", subtitle, columns, _runs(properties), look)


def _many(titles: list[str], tables: list[pd.DataFrame], title: str | None, look: Theme) -> go.Figure:
    found = [{tuple(getattr(row, k) for k in _KEY): row for row in frame.itertuples()} for frame in tables]
    keys = sorted(dict.fromkeys(key for rows in found for key in rows), key=_order(found))
    first = [next(rows[key] for rows in found if key in rows) for key in keys]
    shared = all(len({_control(rows[key]) for rows in found if key in rows}) == 1 for key in keys)
    properties = [str(key[0]) for key in keys]
    columns = [
        _Column("property", _thinned(properties), 1.1),
        _Column("measure", [str(key[1]) for key in keys], 2.2),
        _Column("precision", [_precision(key[2]) for key in keys], 0.75),
        _Column("bound", [_bound(row.bound) for row in first], 1.0),
    ]
    if shared:
        columns.append(_Column("control", [_control(row) for row in first], 0.65))
    for name, rows in zip(titles, found, strict=True):
        here = [rows.get(key) for key in keys]
        passed = [None if row is None else _passed(row) for row in here]
        cells = ["–" if row is None else f"{_sign(_passed(row))} {_value(row)}" for row in here]
        columns.append(_Column(name, cells, 1.45, passed))
        if not shared:
            columns.append(_Column("its control", ["–" if row is None else _control(row) for row in here], 0.9))
    counts = [
        f"{name} {sum(_passed(row) is True for row in rows.values())} of {len(rows)}"
        for name, rows in zip(titles, found, strict=True)
    ]
    subtitle = f"✓ = within its bound, ✗ = not; in brackets 95 % intervals. Passed: {', '.join(counts)}."
    return _table(title or "Scorecards", subtitle, columns, _runs(properties), look)


def _order(found: Sequence[dict[tuple[Any, ...], Any]]) -> Any:
    """Rows that only some cards have stay with their property, the properties in the order of their first row."""
    properties = list(dict.fromkeys(key[0] for rows in found for key in rows))
    return lambda key: properties.index(key[0])


def _table(title: str, subtitle: str, columns: list[_Column], groups: list[int], look: Theme) -> go.Figure:
    """The table; text is escaped here, groups of rows are told apart by every other one's shade."""
    heading = [column.name for column in columns]
    lines = sum(
        max(math.ceil(len(text) * _CHARACTER / room) for text, room in zip(row, _rooms(columns), strict=True))
        for row in (heading, *zip(*(column.cells for column in columns), strict=True))
    )
    n_rows = len(groups) + 1
    figure = new_figure(look, title, subtitle)
    rows = _ROW_HEIGHT * n_rows + _LINE_HEIGHT * max(0, lines - n_rows)
    figure.update_layout(height=figure.layout.margin.t + rows + 32)
    shared = {"align": "left", "height": _ROW_HEIGHT, "line": {"width": 0}, "font": {"size": _FONT, "color": look.ink}}
    figure.add_table(
        columnwidth=[column.width for column in columns],
        header={"values": [f"<b>{plain(name)}</b>" for name in heading], "fill": {"color": look.grid}, **shared},
        cells={
            "values": [[plain(text) for text in column.cells] for column in columns],
            "fill": {"color": [_fills(column, groups, look) for column in columns]},
            **shared,
        },
    )
    figure.update_layout(margin={"l": 16, "r": 16, "b": 16})
    return figure


def _rooms(columns: list[_Column]) -> list[float]:
    """What each column leaves for text, in pixels, on a page of ordinary width."""
    total = sum(column.width for column in columns)
    return [_PAGE * column.width / total - _PADDING for column in columns]


def _fills(column: _Column, groups: list[int], look: Theme) -> list[str]:
    stripes = [look.band if group % 2 else look.paper for group in groups]
    if column.passed is None:
        return stripes
    shades = {True: look.passed, False: look.failed, None: ""}
    return [shades[verdict] or stripe for verdict, stripe in zip(column.passed, stripes, strict=True)]


def _runs(names: list[str]) -> list[int]:
    """The number of the run that each name belongs to."""
    out: list[int] = []
    for i, name in enumerate(names):
        out.append(0 if i == 0 else out[-1] + (name != names[i - 1]))
    return out


def _thinned(names: list[str]) -> list[str]:
    """The same names, each once at the start of its run."""
    return [name if i == 0 or name != names[i - 1] else "" for i, name in enumerate(names)]


def _precision(quantizer: object) -> str:
    return str(quantizer) if quantizer else "full"


def _decimals(row: Any) -> int:
    """One for percentages and points, three otherwise."""
    return 1 if str(row.measure).endswith(("%", "points")) else 3


def _value(row: Any) -> str:
    digits = _decimals(row)
    low, high = float(row.interval_low), float(row.interval_high)
    interval = "" if math.isnan(low) or math.isnan(high) else f" [{fixed(low, digits)}, {fixed(high, digits)}]"
    return fixed(float(row.value), digits) + interval


def _control(row: Any) -> str:
    return fixed(float(row.control), _decimals(row))


def _bound(text: object) -> str:
    return str(text).replace("<=", "≤").replace(">=", "≥")


def _passed(row: Any) -> bool | None:
    judgeable = not str(getattr(row, "verdict", "")).startswith("not judgeable")
    return bool(row.passed) if judgeable and not pd.isna(row.passed) else None


def _sign(passed: bool | None) -> str:
    return {True: "✓", False: "✗", None: "·"}[passed]


def _verdict(passed: bool | None) -> str:
    return {True: "✓ pass", False: "✗ fail", None: "· not judgeable"}[passed]


def _exact_share(share: float) -> str:
    """A percentage that reads 100 only if it is."""
    text = number(100 * share, 6)
    return f"{'< 100' if text == '100' and share != 1 else text} %"
