"""A comparison's figures, from its tidy table alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from mansu_tl import plots
from mansu_tl.comparison.plan import ABLATIONS, title_of
from mansu_tl.comparison.tables import BOUNDS, summary
from mansu_tl.plots.export import write_html, write_images

_CONTROLS = {"original": "un-edited", "never": "never trained"}


def figures(table: pd.DataFrame, *, theme: str = "light") -> dict[str, go.Figure]:
    """Every figure that the table has the rows for, by file name.

    - NAME_gaps: forget accuracy before and after each quantizer that all methods share;
    - NAME_quantizers: MANSU's PTQ gap under every quantizer;
    - NAME_plane: accuracy against CAD, in full precision and after the first quantizer;
    - NAME_frontier: relearning excess against what retention costs;
    - methods: all methods and properties with intervals and bounds.

    Args:
        table: as `compare` returns it.
        theme: "light" or "dark".
    """
    out: dict[str, go.Figure] = {}
    for base in dict.fromkeys(table["base"]):
        part, stem = table.loc[table["base"] == base], Path(str(base)).name
        shared = _shared_quantizers(part)
        gaps = _gaps(part, shared)
        if len(gaps):
            out[f"{stem}_gaps"] = plots.ptq_gaps(
                gaps, chance=25.0, title=f"Does quantization bring it back? ({stem})", theme=theme
            )
        mine = _gaps(part.loc[part["method"] == "mansu"], None)
        if len(mine):
            out[f"{stem}_quantizers"] = plots.ptq_gaps(
                mine, chance=25.0, title=f"MANSU under every quantizer ({stem})", theme=theme
            )
        plane = _plane(part, shared[:1])
        if len(plane):
            out[f"{stem}_plane"] = plots.divergence_plane(plane, theme=theme)
        cost, attack = "held-out retain and near drop, points (mean)", "relearning excess, points"
        points = _frontier(part, cost, attack)
        if len(points) > 1:
            out[f"{stem}_frontier"] = plots.frontier(
                points, cost, attack, name="method", title=f"Resistance against retention ({stem})", theme=theme
            )
    rows = _properties(table)
    if len(rows):
        out["methods"] = plots.methods_table(
            rows, {name: (low, high) for name, (_, _, low, high) in BOUNDS.items() if name in set(rows["property"])},
            digits={"CAD, nf4": 2}, theme=theme,
        )  # fmt: skip
    return out


def write_figures(figures_by_name: Mapping[str, go.Figure], folder: Path, *, png: bool = False) -> list[Path]:
    """One self-contained HTML page a figure, or one PNG (needs Chromium)."""
    if png:
        return write_images({folder / f"{name}.png": figure for name, figure in figures_by_name.items()})
    return [write_html(figure, folder / f"{name}.html", name) for name, figure in figures_by_name.items()]


def _title(method: str) -> str:
    return _CONTROLS.get(method) or title_of(method)


def _shared_quantizers(part: pd.DataFrame) -> list[str]:
    """Quantizers that every edited method has been measured under."""
    sets = [set(group["quantizer"]) for method, group in part.groupby("method") if method != "never"]
    common = set.intersection(*sets) if sets else set()
    return [name for name in dict.fromkeys(part["quantizer"]) if name and name in common]


def _gaps(part: pd.DataFrame, names: list[str] | None) -> pd.DataFrame:
    found = part.loc[(part["measure"] == "forget MC") & ~part["method"].isin([*_CONTROLS, *ABLATIONS])]
    before = found.loc[found["quantizer"] == ""].set_index(["method", "seed"])["value"]
    after = found.loc[found["quantizer"] != ""]
    if names is not None:
        after = after.loc[after["quantizer"].isin(names)]
    keys = list(zip(after["method"], after["seed"], strict=True))
    return pd.DataFrame(
        {
            "method": [_title(method) for method in after["method"]],
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
                    {"label": _title(method), "quantizer": name, "cad": here["CAD"], "accuracy": here["forget MC"]}
                )
    return pd.DataFrame(rows)


def _frontier(part: pd.DataFrame, cost: str, attack: str) -> pd.DataFrame:
    means = summary(part).set_index(["method", "quantizer", "measure"])["mean"]
    rows = []
    for method in dict.fromkeys(part["method"]):
        names = [(method, "", f"{name} held-out cloze drop") for name in ("retain", "near")]
        held = [float(means[name]) for name in names if name in means.index]
        key = (method, "", BOUNDS["relearning excess, lr 3e-4"][1])
        forgotten = means.get((method, "", "forget MC"))
        # What has not forgotten has nothing to be brought back.
        if held and key in means.index and forgotten is not None and forgotten <= 40:
            rows.append({"method": _title(str(method)), cost: sum(held) / len(held), attack: means[key]})
    return pd.DataFrame(rows)


def _properties(table: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for name, (quantizer, measure, _, _) in BOUNDS.items():
        found = table.loc[(table["quantizer"] == quantizer) & (table["measure"] == measure)]
        rows.append(
            found.assign(property=name, method=[_title(method) for method in found["method"]])[
                ["base", "method", "property", "seed", "value", "low", "high"]
            ]
        )
    return pd.concat(rows, ignore_index=True)
