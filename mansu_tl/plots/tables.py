"""Verdicts as tables that a paper could print: scorecards, certificates, methods against properties."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import unescape
from itertools import accumulate
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mansu_tl.errors import MansuError
from mansu_tl.plots.panels import require_columns
from mansu_tl.plots.theme import Theme, fixed, new_figure, number, plain, theme_named
from mansu_tl.results.intervals import interval_over_seeds
from mansu_tl.verification import Certificate, Scorecard

# In pixels: a line, the room around it, the width of a page, of a character and of both paddings of a cell.
_LINE, _ROOM, _PAGE, _CHARACTER, _PADDING = 17, 9, 968, 6.5, 18
_LONGEST = 40  # characters of a line
_Limits = tuple[float | int, float | int]
_Verdict = bool | None


@dataclass(frozen=True)
class _Column:
    """A column: its heading and cells as HTML, verdicts that colour the cells, and whether they stand in the middle."""

    head: str
    cells: list[str]
    passed: Sequence[_Verdict] = ()
    centred: bool = False


def scorecard(cards: Scorecard | Sequence[Scorecard], *, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw one scorecard, or several side by side, one column a method.

    Every verdict is a mark, in a single card with a word, never a colour alone. The control is one column where all
    cards share it, else one beside each card.

    Raises:
        MansuError: no card, cards of the same title, or one without rows.
    """
    several = [cards] if isinstance(cards, Scorecard) else list(cards)
    if not several:
        raise MansuError("scorecard: none given; pass at least one")
    titles = [card.title for card in several]
    if len(set(titles)) != len(titles):
        raise MansuError(f"scorecards: the titles {titles} are not distinct; give each method its own title")
    tables = {card.title: card.to_dataframe() for card in several}
    for name, frame in tables.items():
        if frame.empty:
            raise MansuError(f"scorecard {name!r}: it has no row to draw; measure at least one property")
    draw = _one if len(several) == 1 else _many
    return draw(tables, title, theme_named(theme))


def certificate(
    certificates: Certificate | Sequence[Certificate], *, title: str | None = None, theme: str = "light"
) -> go.Figure:
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
    columns = [_Column(_bold("check"), list(required)), _Column(_bold("required"), list(required.values()))]
    for each in several:
        counts = (each.unedited_codes_changed, each.absmax_changed, len(each.others_changed), len(each.faults))
        changed = each.edited_codes_changed_share
        verdicts = [None, None, None, changed == 1, *(count == 0 for count in counts), each.passed]
        cells = [f"{each.n_edited:,}"]
        cells += [f"{number(100 * share)} %" for share in (each.edited_share_of_linear, each.edited_share_of_all)]
        cells += [f"{_MARKS[changed == 1]} {_exact_share(changed)}"]
        cells += [f"{_MARKS[count == 0]} {count:,}" for count in counts]
        columns.append(_Column(_bold(f"{each.quantizer}, {each.dtype}"), [*cells, _WORDS[each.passed]], verdicts))
    subtitle = "Codes recomputed by the quantizer's own library from the saved files; it says nothing of behaviour."
    return _table(title or "Certificate", subtitle, columns, [*[0] * (len(required) - 1), 1], theme_named(theme))


def methods_table(
    rows: pd.DataFrame,
    bounds: Mapping[str, _Limits] | None = None,
    *,
    floors: Mapping[str, float | int] | None = None,
    digits: int | Mapping[str, int] = 1,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw one row a method and one column a property: mean over seeds, its 95 % interval below, and a pass mark.

    Args:
        rows: tidy, columns method, property, seed and value; with one seed the interval is taken from the columns low
            and high where there are such. A column base groups the methods.
        bounds: by property the least and the largest value that passes (-inf and inf for none), judged on the mean.
        floors: by property a value that the interval's upper end has to reach: an accuracy that lies clearly below it is
            inverted knowledge.
        digits: decimals, of all properties or by property (1 where not given).

    Raises:
        MansuError: a column is missing, no row, or a bound for a property that the table does not have.
    """
    look = theme_named(theme)
    require_columns("methods table", rows, ["method", "property", "seed", "value"])
    properties = list(dict.fromkeys(rows["property"].astype(str)))
    limits, lowest = dict(bounds or {}), dict(floors or {})
    unknown = [name for name in (*limits, *lowest) if name not in properties]
    if unknown:
        raise MansuError(f"methods table: bound for {unknown[0]!r}, which is no property of the table")
    tidy = rows.assign(base=rows["base"] if "base" in rows.columns else "").astype(
        {"base": str, "method": str, "property": str}
    )
    groups = dict(iter(tidy.groupby(["base", "method", "property"], sort=False)))
    methods = list(dict.fromkeys(zip(tidy["base"], tidy["method"], strict=True)))
    bases = [base for base, _ in methods]
    columns = [_Column(_bold("method"), [plain(method) for _, method in methods])]
    if len(set(bases)) > 1:
        columns.insert(0, _Column(_bold("base"), _thinned([_bold(base) for base in bases])))
    room = max(8, int((_PAGE / (len(properties) + 1 + 0.7 * len(columns)) - _PADDING) / _CHARACTER))
    for name in properties:
        places = digits if isinstance(digits, int) else digits.get(name, 1)
        cells = [_cell(groups.get((*key, name)), limits.get(name), lowest.get(name), places) for key in methods]
        head = _bold(*(textwrap.wrap(name, room, break_long_words=False) or [name]))
        head += _allowed(limits.get(name), lowest.get(name))
        columns.append(_Column(head, [text for text, _ in cells], [verdict for _, verdict in cells], centred=True))
    judged = [verdict for column in columns for verdict in column.passed if verdict is not None]
    each = sorted({int(n) for n in tidy.groupby(["base", "method", "property"])["seed"].nunique()})
    counts = str(each[0]) if len(each) == 1 else f"{each[0]} to {each[-1]}"
    subtitle = (
        f"Mean over {counts} seed{'s' if each[-1] > 1 else ''}, below it the 95 % interval"
        + (" of the mean (Student's t)" if each[-1] > 1 else " over facts")
        + ("; over facts where there is one seed" if each[-1] > 1 and 1 in each else "")
        + (f". ✓ = within the bound in the header, ✗ = not: {sum(judged)} of {len(judged)}." if judged else ".")
    )
    return _table(title or "Methods and properties", subtitle, columns, _runs(bases), look)


def _one(tables: Mapping[str, pd.DataFrame], title: str | None, look: Theme) -> go.Figure:
    ((name, frame),) = tables.items()
    rows = list(frame.itertuples())
    passed = [_passed(row) for row in rows]
    properties = [_wrapped(row.property) for row in rows]
    columns = [
        _Column(_bold("property"), _thinned(properties)),
        _Column(_bold("measure"), [_wrapped(row.measure) for row in rows]),
        _Column(_bold("precision"), [_wrapped(row.quantizer or "full") for row in rows]),
        _Column(_bold("value [95 % interval]"), [_value(row) for row in rows]),
        _Column(_bold("control"), [_wrapped(f"{_control(row)} ({row.control_name})") for row in rows]),
        _Column(_bold("bound"), [_bound(row) for row in rows]),
        _Column(_bold("verdict"), [_WORDS[verdict] for verdict in passed], passed),
    ]
    judged = [verdict for verdict in passed if verdict is not None]
    subtitle = f"{sum(judged)} of {len(judged)} judged rows pass."
    return _table(title or f"Scorecard: {name}", subtitle, columns, _runs(properties), look)


def _many(tables: Mapping[str, pd.DataFrame], title: str | None, look: Theme) -> go.Figure:
    cards = {
        name: {(str(row.property), str(row.measure), row.quantizer): row for row in frame.itertuples()}
        for name, frame in tables.items()
    }
    order = list(dict.fromkeys(key[0] for rows in cards.values() for key in rows))
    # Rows that only some cards have stay with their property.
    keys = sorted(dict.fromkeys(key for rows in cards.values() for key in rows), key=lambda key: order.index(key[0]))
    first = [next(rows[key] for rows in cards.values() if key in rows) for key in keys]
    shared = all(len({_control(rows[key]) for rows in cards.values() if key in rows}) == 1 for key in keys)
    properties = [_wrapped(key[0]) for key in keys]
    columns = [
        _Column(_bold("property"), _thinned(properties)),
        _Column(_bold("measure"), [_wrapped(key[1]) for key in keys]),
        _Column(_bold("precision"), [_wrapped(key[2] or "full") for key in keys]),
        _Column(_bold("bound"), [_bound(row) for row in first]),
    ]
    if shared:
        columns.append(_Column(_bold("control"), [_control(row) for row in first]))
    for name, rows in cards.items():
        here = [rows.get(key) for key in keys]
        passed = [None if row is None else _passed(row) for row in here]
        cells = ["–" if row is None else f"{_MARKS[_passed(row)]} {_value(row)}" for row in here]
        columns.append(_Column(_bold(name), cells, passed))
        if not shared:
            columns.append(_Column(_bold("its control"), ["–" if row is None else _control(row) for row in here]))
    counts = [f"{n} {sum(_passed(row) is True for row in rows.values())} of {len(rows)}" for n, rows in cards.items()]
    subtitle = f"✓ = within its bound, ✗ = not; in brackets 95 % intervals. Passed: {', '.join(counts)}."
    return _table(title or "Scorecards", subtitle, columns, _runs(properties), look)


def _table(title: str, subtitle: str, columns: Sequence[_Column], groups: Sequence[int], look: Theme) -> go.Figure:
    """The table, each column as wide as its longest line; every other group of rows is shaded."""
    figure = new_figure(look, title, subtitle)
    widths = [_PADDING + _CHARACTER * max(map(_length, (column.head, *column.cells))) for column in columns]
    rows = [[column.head for column in columns], *zip(*(column.cells for column in columns), strict=True)]
    head, *heights = [_ROOM + _LINE * (1 + max(cell.count("<br>") for cell in row)) for row in rows]
    stripes = [look.band if group % 2 else look.paper for group in groups]
    shades: dict[_Verdict, str] = {True: look.passed, False: look.failed}
    fills = []
    for column in columns:
        verdicts = column.passed or [None] * len(stripes)
        fills.append([shades.get(verdict, stripe) for verdict, stripe in zip(verdicts, stripes, strict=True)])
    shared = {
        "align": ["center" if column.centred else "left" for column in columns],
        "line": {"width": 1, "color": look.paper},
        "font": {"size": 11.5, "color": look.ink},
    }
    names, cells = [column.head for column in columns], [column.cells for column in columns]
    figure.add_table(
        columnwidth=widths,
        header={"values": names, "fill": {"color": look.grid}, "height": head, **shared},
        cells={"values": cells, "fill": {"color": fills}, "height": min(heights), **shared},
    )
    figure.update_layout(
        height=figure.layout.margin.t + head + sum(heights) + 36,
        margin={"l": 16, "r": 16, "b": 16},
        # A page that is too narrow would cut words; the table is as wide as it has to be.
        width=int(sum(widths)) + 32 if sum(widths) > _PAGE else None,
    )
    return figure


_MARKS: dict[_Verdict, str] = {True: "✓", False: "✗", None: "·"}
_WORDS: dict[_Verdict, str] = {True: "✓ pass", False: "✗ fail", None: "· not judgeable"}


def _bold(*lines: str) -> str:
    return "<br>".join(f"<b>{plain(line)}</b>" for line in lines)


def _wrapped(text: object) -> str:
    return "<br>".join(plain(line) for line in textwrap.wrap(str(text), _LONGEST))


def _length(cell: str) -> int:
    """Characters of a cell's longest line; bold ones are wider."""
    lines = [re.sub("</?b>", "", line) + line.count("<b>") * len(line) // 12 * " " for line in cell.split("<br>")]
    return max(len(unescape(line)) for line in lines)


def _runs(names: Sequence[str]) -> list[int]:
    """The number of the run that each name belongs to."""
    return list(accumulate(int(i > 0 and name != names[i - 1]) for i, name in enumerate(names)))


def _thinned(names: Sequence[str]) -> list[str]:
    """The same names, each once at the start of its run."""
    return [name if i == 0 or name != names[i - 1] else "" for i, name in enumerate(names)]


def _decimals(row: Any) -> int:
    """One for percentages and points, three otherwise."""
    return 1 if str(row.measure).endswith(("%", "points")) else 3


def _value(row: Any) -> str:
    return f"{fixed(float(row.value), _decimals(row))}{_interval(row.interval_low, row.interval_high, _decimals(row), ' ')}"


def _interval(low: float | int, high: float | int, digits: int, before: str) -> str:
    return "" if math.isnan(low) or math.isnan(high) else f"{before}[{fixed(low, digits)}, {fixed(high, digits)}]"


def _control(row: Any) -> str:
    return fixed(float(row.control), _decimals(row))


def _bound(row: Any) -> str:
    return _wrapped(str(row.bound).replace("<=", "≤").replace(">=", "≥"))


def _passed(row: Any) -> _Verdict:
    return None if str(row.verdict).startswith("not judgeable") or pd.isna(row.passed) else bool(row.passed)


def _exact_share(share: float | int) -> str:
    """A percentage that reads 100 only if it is."""
    text = number(100 * share, 6)
    return f"{'&lt; 100' if text == '100' and share != 1 else text} %"


def _cell(
    group: pd.DataFrame | None, bound: _Limits | None, floor: float | int | None, digits: int
) -> tuple[str, _Verdict]:
    """The text of a property's cell, and whether it passes."""
    values = [] if group is None else group["value"].dropna().astype(float).tolist()
    if group is None or not values:
        return "–", None
    mean, (low, high) = sum(values) / len(values), interval_over_seeds(values)
    if len(values) == 1 and {"low", "high"} <= set(group.columns):
        low, high = group[["low", "high"]].iloc[0].astype(float)
    # Rounded, so that a mean over seeds at the bound is not failed by the last bit.
    verdict = None if bound is None else bool(bound[0] <= round(mean, 6) <= bound[1])
    if floor is not None and (mean if math.isnan(high) else high) < floor:
        verdict = False
    sign = {True: " ✓", False: " ✗", None: ""}[verdict]
    return f"{fixed(mean, digits)}{sign}{_interval(low, high, digits, '<br>')}", verdict


def _allowed(bound: _Limits | None, floor: float | int | None) -> str:
    """What passes, below a property's name."""
    if bound is None or all(math.isinf(end) for end in bound):
        return ""
    low, high = bound
    if floor or not (math.isinf(low) or math.isinf(high)):
        text = f"{floor or low:g} to {high:g}"
    else:
        text = f"≤ {high:g}" if math.isinf(low) else f"≥ {low:g}"
    return f"<br>{text.replace('-', '−')}"
