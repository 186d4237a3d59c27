"""A comparison's figures, from its tidy table alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from mansu_tl import plots
from mansu_tl.comparison.plan import ABLATIONS, CONTROLS, title_of
from mansu_tl.comparison.tables import BOUNDS, chance, summary
from mansu_tl.plots.export import write_html, write_images
from mansu_tl.unlearning import headline

_COST, _ATTACK = "held-out retain and near drop, points (mean)", "relearning excess, points"
_LEFT = "forget MC, %"


def figures(table: pd.DataFrame, *, theme: str = "light") -> dict[str, go.Figure]:
    """Every figure that the table has the rows for, by file name.

    - NAME_gaps: forget accuracy before and after each quantizer that all methods share;
    - NAME_quantizers: MANSU's PTQ gap under every quantizer;
    - NAME_plane: accuracy against CAD, in full precision and after the first quantizer;
    - NAME_frontier: relearning excess against what retention costs;
    - NAME_ablations: the same, and forget accuracy, for MANSU with one part changed;
    - NAME_methods: all methods and properties with intervals and bounds.

    Args:
        table: as `compare` returns it.
        theme: "light" or "dark".
    """
    out: dict[str, go.Figure] = {}
    for base in dict.fromkeys(table["base"]):
        part, stem = table.loc[table["base"] == base], str(base)
        guessed = chance(part)
        line = None if math.isnan(guessed) else guessed
        shared = _shared_quantizers(part)
        gaps = _gaps(part, shared)
        if len(gaps):
            out[f"{stem}_gaps"] = plots.ptq_gaps(
                gaps, chance=line, title=f"Does quantization bring it back? ({stem})", theme=theme
            )
        main = headline(str(method) for method in dict.fromkeys(part["method"]) if method not in CONTROLS)
        mine = _gaps(part.loc[part["method"] == main], None)
        if len(mine):
            # One line a quantizer, in one panel.
            lines = mine.assign(method=mine["quantizer"], quantizer=title_of(main))
            out[f"{stem}_quantizers"] = plots.ptq_gaps(
                lines, chance=line, title=f"{title_of(main)} under every quantizer ({stem})", theme=theme
            )
        methods = part.loc[~part["method"].isin(ABLATIONS)]
        plane = _plane(methods, shared[:1])
        if len(plane):
            out[f"{stem}_plane"] = plots.divergence_plane(plane, theme=theme)
        points = _frontier(methods)
        if len(points) > 1:
            out[f"{stem}_frontier"] = plots.frontier(
                points, _COST, _ATTACK, name="method", group="method", default=_default(points, main),
                title=f"Resistance against retention ({stem})", theme=theme,
            )  # fmt: skip
        parts = _frontier(part.loc[part["method"].isin([main, *ABLATIONS])], intervals=True)
        if len(parts) > 1:
            parts["method"] = parts["method"].str.removeprefix(f"{title_of(main)}, ")
            out[f"{stem}_ablations"] = plots.frontier(
                parts, _COST, [_ATTACK, _LEFT], name="method", group="method", default=_default(parts, main),
                title=f"What each part of {title_of(main)} is worth ({stem})", theme=theme,
            )  # fmt: skip
        rows = _properties(part)
        if len(rows):
            shown = set(rows["property"])
            limits = {
                name: bound.limits(chance(part, bound.measure)) for name, bound in BOUNDS.items() if name in shown
            }
            out[f"{stem}_methods"] = plots.methods_table(
                rows,
                {name: (low, high) for name, (low, high, _) in limits.items()},
                floors={name: floor for name, (_, _, floor) in limits.items() if math.isfinite(floor)},
                digits={"CAD, nf4": 2},
                theme=theme,
            )
    return out


def write_figures(figures_by_name: Mapping[str, go.Figure], folder: Path, *, png: bool = False) -> list[Path]:
    """One self-contained HTML page a figure, or one PNG (needs Chromium)."""
    if png:
        return write_images({folder / f"{name}.png": figure for name, figure in figures_by_name.items()})
    return [write_html(figure, folder / f"{name}.html", name) for name, figure in figures_by_name.items()]


def _shared_quantizers(part: pd.DataFrame) -> list[str]:
    """Quantizers that every edited method has been measured under."""
    sets = [set(group["quantizer"]) for method, group in part.groupby("method") if method != "never"]
    common = set.intersection(*sets) if sets else set()
    return [name for name in dict.fromkeys(part["quantizer"]) if name and name in common]


def _gaps(part: pd.DataFrame, names: list[str] | None) -> pd.DataFrame:
    found = part.loc[(part["measure"] == "forget MC") & ~part["method"].isin([*CONTROLS, *ABLATIONS])]
    before = found.loc[found["quantizer"] == ""].set_index(["method", "seed"])["value"]
    after = found.loc[found["quantizer"] != ""]
    if names is not None:
        after = after.loc[after["quantizer"].isin(names)]
    keys = list(zip(after["method"], after["seed"], strict=True))
    return pd.DataFrame(
        {
            "method": [title_of(method) for method in after["method"]],
            "quantizer": list(after["quantizer"]),
            "seed": list(after["seed"]),
            "value_before": [before[key] for key in keys],
            "value_after": list(after["value"]),
        }
    )


def _plane(part: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    means = summary(part)
    rows = []
    for method in dict.fromkeys(means["method"]):
        for name in ("", *names):
            here = means.loc[(means["method"] == method) & (means["quantizer"] == name)].set_index("measure")["mean"]
            if {"CAD", "forget MC"} <= set(here.index):
                rows.append(
                    {"label": title_of(method), "quantizer": name, "cad": here["CAD"], "accuracy": here["forget MC"]}
                )
    return pd.DataFrame(rows)


def _frontier(part: pd.DataFrame, *, intervals: bool = False) -> pd.DataFrame:
    """A point a method; intervals, over seeds or facts, where there is room for them."""
    if part.empty:
        return part
    found = summary(part).set_index(["method", "quantizer", "measure"])
    means = found["mean"]
    rows = []
    for method in dict.fromkeys(part["method"]):
        names = [(method, "", f"{name} held-out cloze drop") for name in ("retain", "near")]
        held = [float(means[name]) for name in names if name in means.index]
        key = (method, "", BOUNDS["relearning excess, lr 3e-4"].measure)
        # What was not edited has nothing to be brought back.
        if held and key in means.index and method not in CONTROLS:
            forgotten = float(means[(method, "", "forget MC")])
            row = {_COST: sum(held) / len(held), _ATTACK: float(means[key]), _LEFT: forgotten}
            for name, at in ((_ATTACK, key), (_LEFT, (method, "", "forget MC"))) if intervals else ():
                row |= {f"{name}_{end}": float(found.loc[at, end]) for end in ("low", "high")}
            rows.append({"method": title_of(str(method)), **row})
    return pd.DataFrame(rows)


def _default(points: pd.DataFrame, main: str) -> str | None:
    title = title_of(main)
    return title if title in set(points["method"]) else None


def _properties(table: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for name, bound in BOUNDS.items():
        found = table.loc[(table["quantizer"] == bound.quantizer) & (table["measure"] == bound.measure)]
        rows.append(
            found.assign(property=name, method=[title_of(method) for method in found["method"]])[
                ["base", "method", "property", "seed", "value", "low", "high"]
            ]
        )
    return pd.concat(rows, ignore_index=True)
