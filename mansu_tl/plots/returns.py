"""Which format brings forgotten facts back: formats by models, the verdict as a sign in every cell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mansu_tl.errors import MansuError
from mansu_tl.plots.panels import BARE, new_panel, require_columns
from mansu_tl.plots.theme import plain, signed, theme_named

# As on an audit's page, where yes is what one hopes for.
_SIGNS = {"yes": "✗", "no": "✓", "not judgeable": "?", "not applicable": "–"}
_ROW = 22  # pixels a format
_HEADS = 26  # pixels that the models' names need above


def comes_back(rows: pd.DataFrame, *, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw what every format brings back of every model's forgotten facts: points by colour, the verdict as a sign.

    Args:
        rows: columns format, model, method, comes_back ("yes", "no", "not judgeable" or "not applicable"), and points with
            points_low and points_high: forget facts that are right in the format minus those right as stored, in percentage
            points, with a 95 % interval; NaN where the format does not apply.

    Raises:
        MansuError: no row, a column is missing, an unknown verdict, or two rows for one cell.
    """
    look, what = theme_named(theme), "comes back"
    require_columns(what, rows, ["format", "model", "method", "comes_back", "points", "points_low", "points_high"])
    unknown = sorted(set(rows["comes_back"]) - set(_SIGNS))
    if unknown:
        raise MansuError(f"{what}: verdict {unknown[0]!r}; choose one of {', '.join(_SIGNS)}")
    tidy = rows.assign(column=rows["method"].map(plain) + "<br>" + rows["model"].map(plain))
    if tidy.duplicated(["format", "column"]).any():
        raise MansuError(f"{what}: two rows for one format, model and method; give one")
    formats, columns = (list(dict.fromkeys(tidy[key])) for key in ("format", "column"))
    table = tidy.set_index(["format", "column"]).reindex(pd.MultiIndex.from_product([formats, columns]))
    shape = (len(formats), len(columns))
    z = pd.to_numeric(table["points"]).to_numpy(float).reshape(shape)
    texts = [_text(verdict, points) for verdict, points in zip(table["comes_back"], z.ravel().tolist(), strict=True)]
    ends = zip(pd.to_numeric(table["points_low"]), pd.to_numeric(table["points_high"]), strict=True)
    hover = [
        [verdict, f"{signed(low)} to {signed(high)}"]
        for verdict, (low, high) in zip(table["comes_back"], ends, strict=True)
    ]
    top = max(5.0, float(np.nanmax(np.abs(z), initial=0.0)))
    low, zero, high = look.diverging
    how_to_read = (
        "✗ comes back, ✓ stays forgotten, ? not judgeable, – not applicable: the audit's verdict over every wording, chosen "
        "and said. Number and colour: forget facts chosen right in the format minus as stored, in points."
    )
    if table["comes_back"].isna().any():
        how_to_read += " Empty: not measured."
    panel = new_panel(look, title or "Which format brings it back?", how_to_read, 170 + _ROW * len(formats))
    panel.heat(
        z, [[0, high], [0.5, zero], [1, low]], (-top, top), "points", gap=2,
        hover="%{y}, %{x}<br>comes back: %{customdata[0]}<br>%{z:.1f} points (%{customdata[1]})",
        texts=_rows(texts, shape[1]), customdata=_rows(hover, shape[1]), x=columns, y=[plain(name) for name in formats],
    )  # fmt: skip
    panel.x(**BARE, side="top")
    panel.y(**BARE, autorange="reversed")
    panel.figure.update_traces(textfont_size=13)
    panel.figure.update_layout(margin_t=panel.figure.layout.margin.t + _HEADS, margin_b=24)
    return panel.figure


def _text(verdict: object, points: float) -> str:
    if verdict not in _SIGNS:
        return ""  # a cell without a row
    shown = f" {signed(round(points), 0)}" if points == points else ""
    return f"{_SIGNS[str(verdict)]}{shown}"


def _rows(cells: list[Any], across: int) -> list[list[Any]]:
    return [cells[i : i + across] for i in range(0, len(cells), across)]
