"""CAD against depth: where in the layers another model still holds what the original knew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mansu_tl.errors import MansuError
from mansu_tl.plots.panels import Panel, distinct, legend_below, new_panels, require_columns, series_styles
from mansu_tl.plots.theme import plain, theme_named
from mansu_tl.verification import CadByDepth

_ROOM = 0.12  # above and below the largest and the least value
_SAME = ["layer", "before_reading"]
_TICKS = 11  # names of layers that fit side by side under a panel


def cad_by_depth(
    results: Sequence[CadByDepth] | Mapping[str, CadByDepth] | pd.DataFrame,
    *,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw CAD by layer, on forget facts at the left and on near ones at the right, one line a model.

    Erasure shows at the left before the fact is read (the upright line) and not at the right; suppression shows only
    behind it; damage shows on both sides alike. Bands are 95 % intervals over facts.

    Args:
        results: those of `DepthReader.read`, or their tables, one below another.

    Raises:
        MansuError: none given, two of one label, or results of other layers.
    """
    look, tables = theme_named(theme), _tables(results)
    first = next(iter(tables.values()))
    how_to_read = (
        "Evidence of the answer in each layer's stream, as the original reads it: 0 = still there, 1 = gone, above 1 = "
        "inverted. Bands: 95 % intervals over facts."
    )
    panels = new_panels(
        look, title or "Where in depth the knowledge is gone", how_to_read,
        ["facts to be forgotten", "near facts, to be kept"], 2, (170, 360), 0, horizontal_spacing=0.07, shared_yaxes=True,
    )  # fmt: skip
    x, styles = list(range(len(first))), series_styles(list(tables), look)
    low = high = 0.0
    for label, table in tables.items():
        style, name = styles[label], plain(label)
        for panel, column in zip(panels, ("cad", "near_cad"), strict=True):
            ends = table[[f"{column}_low", f"{column}_high"]]
            low, high = min(low, float(np.nanmin(ends))), max(high, float(np.nanmax(ends)))
            panel.band(x, ends[f"{column}_low"].tolist(), ends[f"{column}_high"].tolist(), style.colour, name)
            panel.series(
                x, table[column].tolist(), name, style, group=name,
                data=table[["layer", f"{column}_low", f"{column}_high", "grafted_percent"]].to_numpy().tolist(),
                hover=f"{name}, behind %{{customdata[0]}}<br>CAD %{{y:.2f}} [%{{customdata[1]:.2f}}, %{{customdata[2]:.2f}}]"
                "<br>the original's layers from here on choose %{customdata[3]:.0f} % of the forget answers",
            )  # fmt: skip
    for panel in panels:
        panel.level(1.0, "gone", width=1, dash="dot", position="top left")
        _layers(panel, first, "stream behind")
        panel.y(range=[low - _ROOM, max(1.0, high) + _ROOM])
    panels[0].y(title_text="CAD")
    legend_below(panels[0].figure, 100, 10)
    return panels[0].figure


def cad_by_depth_draws(table: pd.DataFrame, *, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw CAD by layer over several draws of facts, a panel a group and form, one line a method.

    Lines are means over the draws, bands reach from the lowest to the highest of them.

    Args:
        table: a row a draw and layer, with the columns "group" (panels side by side), "form" (panels one below another),
            "method", "draw", "layer", "cad" and "before_reading"; layers in order.

    Raises:
        MansuError: a missing column, no row, or a group whose draws were read at other layers.
    """
    what = "CAD by depth over draws"
    require_columns(what, table, ["group", "form", "method", "draw", *_SAME, "cad"])
    look, styles = theme_named(theme), series_styles(list(dict.fromkeys(table["method"])), theme_named(theme))
    groups, forms = (list(dict.fromkeys(table[name])) for name in ("group", "form"))
    how_to_read = (
        "Evidence of the answer in each layer's stream, as the original reads it: 0 = still there, 1 = gone. Lines: means "
        "over draws of facts; bands: lowest to highest."
    )
    panels = new_panels(
        look, title or "Where in depth the knowledge is gone", how_to_read,
        [f"{group}, {form}" for form in forms for group in groups], len(groups), (190, 250), 95,
        horizontal_spacing=0.035, shared_yaxes=True,
    )  # fmt: skip
    low, high = min(0.0, float(table["cad"].min())), max(1.0, float(table["cad"].max()))
    for i, panel in enumerate(panels):
        group, form = groups[i % len(groups)], forms[i // len(groups)]
        part = table[(table["group"] == group) & (table["form"] == form)]
        if part.empty:
            continue
        first = next(iter(part.groupby(["method", "draw"], sort=False)))[1].reset_index(drop=True)
        for method, found in part.groupby("method", sort=False):
            wide = {draw: one.reset_index(drop=True) for draw, one in found.groupby("draw", sort=False)}
            for draw, one in wide.items():
                if not one[_SAME].equals(first[_SAME]):
                    raise MansuError(f"{what}: {group}, draw {draw}, was read at other layers; draw one model a group")
            values = np.stack([one["cad"].to_numpy(dtype=float) for one in wide.values()])
            x, name, ends = list(range(len(first))), plain(str(method)), (values.min(0), values.max(0))
            panel.band(x, ends[0].tolist(), ends[1].tolist(), styles[str(method)].colour, name)
            panel.series(
                x, values.mean(0).tolist(), name, styles[str(method)], group=name,
                data=[[layer, len(wide), *each] for layer, *each in zip(first["layer"], *ends, strict=True)],
                hover=f"{name}, behind %{{customdata[0]}}<br>CAD %{{y:.2f}}, mean of %{{customdata[1]}} draws "
                "(%{customdata[2]:.2f} to %{customdata[3]:.2f})",
            )  # fmt: skip
        panel.level(1.0, "gone" if i == 0 else "", width=1, dash="dot", position="top left")
        title_below = "stream behind" if i >= len(panels) - len(groups) else ""
        _layers(panel, first, title_below, most=6, said="bottom right" if i == 0 else "")
        panel.y(range=[low - _ROOM, high + _ROOM])
        if i % len(groups) == 0:
            panel.y(title_text="CAD")
    legend_below(panels[0].figure, 100, 10)
    return panels[0].figure


def grafting(
    results: Sequence[CadByDepth] | Mapping[str, CadByDepth] | pd.DataFrame,
    *,
    chance: float | None = None,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw how many forget answers come back when the original's layers are put on another model's stream, by the layer
    behind which they are, one line a model.

    Where the line is high, the model still carries the fact there and only its own later layers keep it from being said; the
    last point is the model itself.

    Args:
        results: as in `cad_by_depth`.
        chance: what guessing gives, in percent; drawn where given.

    Raises:
        MansuError: as `cad_by_depth`.
    """
    look, tables = theme_named(theme), _tables(results)
    first = next(iter(tables.values()))
    how_to_read = (
        "Forget answers chosen when all layers behind one are the original's again: 100 % = the fact is still carried there; "
        "the last point is the model as it is."
    )
    (panel,) = new_panels(
        look, title or "What the original's later layers still read", how_to_read, [""], 1, (150, 380), 0
    )
    x, styles = list(range(len(first))), series_styles(list(tables), look)
    for label, table in tables.items():
        name = plain(label)
        panel.series(
            x, table["grafted_percent"].tolist(), name, styles[label], group=name, data=table[["layer"]].to_numpy().tolist(),
            hover=f"{name}, the original from behind %{{customdata[0]}} on<br>%{{y:.0f}} % of the forget answers",
        )  # fmt: skip
    if chance is not None:
        panel.level(chance, "guessing", width=1, dash="dot", position="bottom left")
    _layers(panel, first, "the original's layers from behind")
    panel.y(range=[-4, 106], title_text="forget answers chosen, %")
    legend_below(panel.figure, 90, 10)
    return panel.figure


def _layers(panel: Panel, table: pd.DataFrame, title: str, most: int = _TICKS, said: str = "top") -> None:
    """The axis of layers, and where among them the fact is read; `said` = where that is written, "" = nowhere."""
    names = [plain(name) for name in table["layer"]]
    every = max(1, round(len(names) / most))
    at = list(range(len(names)))[::every]
    panel.level(
        int(table["before_reading"].sum()) - 0.5, "read here" if said else "", upright=True, width=1, position=said
    )
    panel.x(tickvals=at, ticktext=names[::every], title_text=title, showgrid=False, zeroline=False)


def _tables(results: Sequence[CadByDepth] | Mapping[str, CadByDepth] | pd.DataFrame) -> dict[str, pd.DataFrame]:
    """A table a model, by label; all of the same layers."""
    if isinstance(results, pd.DataFrame):
        require_columns("CAD by depth", results, ["label", *_SAME, "cad", "near_cad", "grafted_percent"])
        tables = {str(label): table.reset_index(drop=True) for label, table in results.groupby("label", sort=False)}
    else:
        found = list(results.items()) if isinstance(results, Mapping) else [(each.label, each) for each in results]
        labels = distinct("CAD by depth", [label for label, _ in found])
        tables = dict(zip(labels, [each.to_dataframe() for _, each in found], strict=True))
    first = next(iter(tables.values()))
    for label, each in tables.items():
        if not each[_SAME].equals(first[_SAME]):
            raise MansuError(f"CAD by depth: {label!r} was read at other layers; compare models with one original")
    return tables
