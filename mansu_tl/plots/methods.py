"""Methods against properties: the table that a paper prints."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from html import unescape

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from scipy import special

from mansu_tl.errors import MansuError
from mansu_tl.plots.series import require_columns
from mansu_tl.plots.theme import Theme, fixed, new_figure, plain, theme_named

# In pixels: a line, the font, the width of a page, and of a character in it, plain and bold, and both paddings of a cell.
_LINE, _FONT, _PAGE, _CHARACTER, _BOLD, _PADDING = 17, 11.5, 968, 6.3, 7.2, 18


def methods_table(
    rows: pd.DataFrame,
    bounds: Mapping[str, tuple[float | int, float | int]] | None = None,
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
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: a column is missing, no row, or a bound for a property that the table does not have.
    """
    look = theme_named(theme)
    require_columns("methods table", rows, ["method", "property", "seed", "value"])
    properties = list(dict.fromkeys(rows["property"].astype(str)))
    limits, lowest = dict(bounds or {}), dict(floors or {})
    places = dict.fromkeys(properties, digits) if isinstance(digits, int) else dict(digits)
    unknown = [name for name in (*limits, *lowest) if name not in properties]
    if unknown:
        raise MansuError(f"methods table: bound for {unknown[0]!r}, which is no property of the table")
    keys = ["base", "method"] if "base" in rows.columns else ["method"]
    methods = list(dict.fromkeys(zip(*(rows[key].astype(str) for key in keys), strict=True)))
    several = len({key[0] for key in methods}) > 1 and len(keys) > 1
    verdicts: list[list[bool | None]] = []
    columns: list[list[str]] = []
    if several:
        bases = [key[0] for key in methods]
        columns.append([f"<b>{plain(b)}</b>" if i == 0 or b != bases[i - 1] else "" for i, b in enumerate(bases)])
        verdicts.append([None] * len(methods))
    columns.append([plain(key[-1]) for key in methods])
    verdicts.append([None] * len(methods))
    groups = {
        tuple(map(str, key)): group
        for key, group in rows.groupby([*(rows[k].astype(str) for k in keys), rows["property"].astype(str)])
    }
    for name in properties:
        cells = [
            _cell(groups.get((*key, name)), limits.get(name), lowest.get(name), places.get(name, 1)) for key in methods
        ]
        columns.append([text for text, _ in cells])
        verdicts.append([verdict for _, verdict in cells])
    room = max(8, int((_PAGE / (len(properties) + 1.7 + 0.75 * several) - _PADDING) / _BOLD))
    header = [
        *(["base"] if several else []),
        "method",
        *(_header(name, limits.get(name), lowest.get(name), room) for name in properties),
    ]
    each = sorted({int(n) for n in rows.groupby([*keys, "property"])["seed"].nunique()})
    seeds = each[-1]
    judged = [v for column in verdicts for v in column if v is not None]
    figure = new_figure(
        look,
        title or "Methods and properties",
        f"Mean over {_seeds(each)} seed{'s' if seeds > 1 else ''}, below it the 95 % interval"
        + (" of the mean (Student's t)" if seeds > 1 else " over facts")
        + ("; over facts where there is one seed" if seeds > 1 and 1 in each else "")
        + (f". ✓ = within the bound in the header, ✗ = not: {sum(judged)} of {len(judged)}." if judged else "."),
    )
    tall = any("<br>" in text for column in columns for text in column)
    row_height = (2 if tall else 1) * _LINE + 12
    head_height = _LINE * max(text.count("<br>") + 1 for text in header) + 14
    widths = [
        max(_width(name, _BOLD), *(_width(cell, _CHARACTER) for cell in column))
        for name, column in zip(header, columns, strict=True)
    ]
    shared = {
        "align": ["left"] * (2 if several else 1) + ["center"] * len(properties),
        "line": {"width": 1, "color": look.paper},
    }
    figure.add_table(
        columnwidth=widths,
        header={
            "values": [name if name.startswith("<b>") else f"<b>{name}</b>" for name in header],
            "fill": {"color": look.grid},
            "height": head_height,
            "font": {"size": _FONT, "color": look.ink},
            **shared,
        },
        cells={
            "values": columns,
            "fill": {
                "color": [_fills(column, [key[0] for key in methods] if several else [], look) for column in verdicts]
            },
            "height": row_height,
            "font": {"size": _FONT, "color": look.ink},
            **shared,
        },
    )
    figure.update_layout(
        height=figure.layout.margin.t + head_height + row_height * len(methods) + 36,
        margin={"l": 16, "r": 16, "b": 16},
        # A page that is too narrow would cut words; the table is as wide as it has to be.
        width=int(sum(widths)) + 32 if sum(widths) > _PAGE else None,
    )
    return figure


def _cell(
    group: pd.DataFrame | None,
    bound: tuple[float | int, float | int] | None,
    floor: float | int | None,
    digits: int,
) -> tuple[str, bool | None]:
    """The text of a cell, and whether it passes."""
    values = np.array([]) if group is None else group["value"].to_numpy(float)
    values = values[~np.isnan(values)]
    if group is None or not len(values):
        return "–", None
    mean = float(values.mean())
    if len(values) > 1:
        half = float(special.stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / math.sqrt(len(values)))
        ends: tuple[float, float] | None = (mean - half, mean + half)
    elif {"low", "high"} <= set(group.columns) and not group[["low", "high"]].isna().any(axis=None):
        ends = (float(group["low"].iloc[0]), float(group["high"].iloc[0]))
    else:
        ends = None
    # Rounded, so that a mean over seeds at the bound is not failed by the last bit.
    verdict = None if bound is None else bool(bound[0] <= round(mean, 6) <= bound[1])
    if floor is not None and (mean if ends is None else ends[1]) < floor:
        verdict = False
    sign = {True: " ✓", False: " ✗", None: ""}[verdict]
    below = "" if ends is None else f"<br>[{fixed(ends[0], digits)}, {fixed(ends[1], digits)}]"
    return f"{fixed(mean, digits)}{sign}{below}", verdict


def _seeds(counts: list[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _width(text: str, character: float | int) -> float:
    """Pixels that a cell's longest line takes."""
    lines = text.replace("<b>", "").replace("</b>", "").split("<br>")
    return max(len(unescape(line)) for line in lines) * character + _PADDING


def _header(name: str, bound: tuple[float | int, float | int] | None, floor: float | int | None, room: int) -> str:
    """A property's name, wrapped, and what passes below it."""
    wrapped = "<br>".join(
        f"<b>{plain(line)}</b>" for line in textwrap.wrap(name, room, break_long_words=False) or [name]
    )
    if bound is None or all(math.isinf(end) for end in bound):
        return wrapped
    low, high = bound
    if floor:
        text = f"{floor:g} to {high:g}"
    elif math.isinf(low):
        text = f"≤ {high:g}"
    elif math.isinf(high):
        text = f"≥ {low:g}"
    else:
        text = f"{low:g} to {high:g}"
    return f"{wrapped}<br>{text.replace('-', '−')}"


def _fills(verdicts: list[bool | None], bases: list[str], look: Theme) -> list[str]:
    order = list(dict.fromkeys(bases))
    stripes = [look.band if bases and order.index(base) % 2 else look.paper for base in bases or [""] * len(verdicts)]
    shades = {True: look.passed, False: look.failed}
    return [stripe if v is None else shades[v] for v, stripe in zip(verdicts, stripes, strict=True)]
