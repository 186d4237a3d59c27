"""A comparison's figures, from its tidy table alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from mansu_tl import plots
from mansu_tl.plots.export import Drawing, write_html, write_images
from mansu_tl.study.plan import CONTROLS, NEVER, ablations, title_of
from mansu_tl.study.table import by_key, chance, judged, summary
from mansu_tl.unlearning import headline
from mansu_tl.verification.verdicts import GOALS

_COST, _ATTACK = "held-out retain and near drop, points (mean)", "relearning excess, points"
_BACK = 10.0  # points of multiple choice: knowledge came back
_LEFT, _RIGHT = "forget MC, %", "forget multiple choice, %"


def figures(table: pd.DataFrame, *, theme: str = "light") -> dict[str, Drawing]:
    """Every figure that the table has the rows for, by file name.

    - NAME_gaps: forget accuracy before and after each quantizer that all methods share;
    - NAME_quantizers: MANSU's PTQ gap under every quantizer;
    - NAME_plane: accuracy against CAD, in full precision and after the first quantizer;
    - NAME_frontier: relearning excess against what retention costs;
    - NAME_ablations: the same, and forget accuracy, for MANSU with one part changed;
    - NAME_methods: all methods and properties, and how many are within their bounds;
    - NAME_parts: the same of MANSU with one part changed.

    Args:
        table: as `compare` returns it.
        theme: "light" or "dark".
    """
    out: dict[str, Drawing] = {}
    for base in dict.fromkeys(table["base"].astype(str)):
        part = table.loc[table["base"] == base]
        drawn = _of_base(part, base, theme)
        out |= {f"{base}_{name}": figure for name, figure in drawn.items()}
    return out


def write_figures(figures_by_name: Mapping[str, Drawing], folder: Path, *, png: bool = False) -> list[Path]:
    """One self-contained HTML page a figure, or one PNG (needs Chromium)."""
    if png:
        return write_images({folder / f"{name}.png": figure for name, figure in figures_by_name.items()})
    return [write_html(figure, folder / f"{name}.html", name) for name, figure in figures_by_name.items()]


def _of_base(part: pd.DataFrame, base: str, theme: str) -> dict[str, Drawing]:
    out: dict[str, Drawing] = {}
    guessed, shared = chance(part), _shared_quantizers(part)
    line = None if math.isnan(guessed) else guessed
    means = summary(part)
    gaps = _gaps(means)
    dumbbells: dict[str, Any] = {"panels": "quantizer", "chance": line, "measure": _RIGHT, "theme": theme}
    compared = gaps.loc[gaps["quantizer"].isin(shared)]
    if len(compared):
        title = f"{_back(compared)} ({base})"
        out["gaps"] = plots.ptq_gap(_titled(compared), title=title, **dumbbells)
    main = headline(str(method) for method in dict.fromkeys(part["method"]) if method not in CONTROLS)
    leading = gaps.loc[gaps["method"] == main]
    if len(leading):
        # One line a quantizer, in one panel.
        lines = leading.assign(method=leading["quantizer"], quantizer=title_of(main))
        title = f"{_worst(leading, title_of(main))} ({base})"
        out["quantizers"] = plots.ptq_gap(lines, title=title, **dumbbells)
    whole = means.loc[~means["method"].isin([*ablations()])]
    plane = _plane(whole, shared[:1])
    if len(plane):
        title = f"{_follows(plane)} ({base})"
        out["plane"] = plots.divergence_plane(plane, title=title, theme=theme)
    look: dict[str, Any] = {"name": "method", "group": "method", "theme": theme}
    points = _frontier(whole)
    if len(points) > 1:
        title = f"Resistance against retention ({base})"
        out["frontier"] = plots.frontier(points, _COST, _ATTACK, default=_default(points, main), title=title, **look)
    changed = _frontier(means.loc[means["method"].isin([main, *ablations()])], intervals=True)
    if len(changed) > 1:
        changed["method"] = changed["method"].str.removeprefix(f"{title_of(main)}, ")
        title = f"What each part of {title_of(main)} is worth ({base})"
        out["ablations"] = plots.frontier(
            changed, _COST, [_ATTACK, _LEFT], default=_default(changed, main), title=title, **look
        )
    rows, changed_parts = judged(part), [main, *ablations()]
    whole_rows = rows.loc[~rows["method"].isin([*ablations()])]
    part_rows = rows.loc[rows["method"].isin(changed_parts)]
    for name, table, kind in (("methods", whole_rows, "methods"), ("parts", part_rows, f"parts of {title_of(main)}")):
        if len(table) and (name == "methods" or table["method"].nunique() > 1):
            title = f"{_within(table)} ({base}, {kind})"
            look = {"digits": {"CAD, nf4": 2}, "intervals": False, "title": title, "theme": theme}
            out[name] = plots.methods_table(_titled(table), **look)
    return out


def _back(gaps: pd.DataFrame) -> str:
    """In how many methods a quantizer brings the forget facts back."""
    worst = (gaps["after"] - gaps["before"]).groupby(gaps["method"]).max()
    back = int((worst > _BACK).sum())
    return (
        f"Quantization brings the facts back for {back or 'none'} of {len(worst)} methods by more than {_BACK:g} points"
    )


def _worst(gaps: pd.DataFrame, title: str) -> str:
    """What a method's worst quantizer adds."""
    row = gaps.assign(gap=gaps["after"] - gaps["before"]).sort_values("gap").iloc[-1]
    return f"{title} under {len(gaps)} quantizers: at most {row['gap']:+.1f} points ({row['quantizer']})"


def _follows(plane: pd.DataFrame) -> str:
    """How closely CAD goes with what is answered."""
    found = plane["cad"].corr(plane["accuracy"])
    return (
        "Answers against circuit"
        if math.isnan(found)
        else f"CAD follows the answers: correlation {found:.2f}".replace("-", "−")
    )


def _within(rows: pd.DataFrame) -> str:
    """Which method is within most of its bounds."""
    edited = rows.loc[~rows["method"].isin([*CONTROLS])]
    passed = (
        edited["verdict"]
        .eq("pass")
        .groupby(edited["method"], sort=False)
        .sum()
        .sort_values(ascending=False, kind="stable")
    )
    of = edited.groupby("method", sort=False).size()
    if passed.empty:
        return "Methods and properties"
    best = passed.index[passed == passed.iloc[0]]
    names, most = " and ".join(title_of(str(method)) for method in best), of[best[0]]
    found = f"{names}, {passed.iloc[0]} of {most}"
    return f"Within every bound: {found}" if passed.iloc[0] == most else f"None is within every bound; most: {found}"


def _titled(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(method=[title_of(str(method)) for method in rows["method"]])


def _shared_quantizers(part: pd.DataFrame) -> list[str]:
    """Quantizers that every edited method has been measured under."""
    measured = [set(group["quantizer"]) for method, group in part.groupby("method") if method != NEVER]
    common = set.intersection(*measured) if measured else set()
    return [name for name in dict.fromkeys(part["quantizer"]) if name and name in common]


def _gaps(means: pd.DataFrame) -> pd.DataFrame:
    """Forget accuracy before and after every quantizer and the gap, means over seeds; a row a method and quantizer."""
    means = means.loc[~means["method"].isin([*CONTROLS, *ablations()]) & (means["question_set"] == "forget")]
    right, gaps = (means.loc[means["measure"] == measure] for measure in ("MC", "PTQ gap, MC"))
    before, after = (right.loc[(right["quantizer"] == "") == full] for full in (True, False))
    keys, ends = ["method", "quantizer"], {"mean": "", "lowest": "_low", "highest": "_high"}

    def named(rows: pd.DataFrame, name: str) -> pd.DataFrame:
        return rows[[*keys, *ends]].rename(columns={key: f"{name}{end}" for key, end in ends.items()})

    out = after[[*keys, "seeds"]].merge(named(before, "before").drop(columns="quantizer"), on="method")
    return out.merge(named(after, "after"), on=keys).merge(named(gaps, "gap").drop(columns="gap"), on=keys)


def _plane(means: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """CAD and forget accuracy, a row a method and quantizer."""
    found, rows = by_key(means), []
    for base, method in dict.fromkeys(zip(means["base"], means["method"], strict=True)):
        for name in ("", *names):
            cad, right = (found.get((base, method, name, *each)) for each in (("", "CAD"), ("forget", "MC")))
            if cad and right:
                rows.append({"label": title_of(method), "quantizer": name, "cad": cad.mean, "accuracy": right.mean})
    return pd.DataFrame(rows)


def _frontier(means: pd.DataFrame, *, intervals: bool = False) -> pd.DataFrame:
    """A point a method; intervals, over seeds or facts, where there is room for them."""
    found, rows = by_key(means), []
    goal = GOALS["relearning excess, lr 3e-4"]
    for base, method in dict.fromkeys(zip(means["base"], means["method"], strict=True)):
        held = [found.get((base, method, "", f"{name}_paraphrase", "cloze drop")) for name in ("retain", "near")]
        lost = [each.mean for each in held if each]
        excess = found.get((base, method, goal.quantizer, goal.question_set, goal.measure))
        # What was not edited has nothing to be brought back.
        if not lost or not excess or method in CONTROLS:
            continue
        row: dict[str, object] = {"method": title_of(str(method)), _COST: sum(lost) / len(lost)}
        for name, measured in ((_ATTACK, excess), (_LEFT, found[base, method, "", "forget", "MC"])):
            row[name] = measured.mean
            if intervals:
                row |= {f"{name}_low": measured.low, f"{name}_high": measured.high}
        rows.append(row)
    return pd.DataFrame(rows)


def _default(points: pd.DataFrame, main: str) -> str | None:
    title = title_of(main)
    return title if title in set(points["method"]) else None
