"""The tidy table of studies and comparisons: kept, read, summed up over seeds and judged.

Columns base, method, seed, quantizer ("" = full precision), question_set ("" = none), measure, value, low, high, control.
"""

from __future__ import annotations

from collections.abc import Hashable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mansu_tl.results.files import write_text, write_whole
from mansu_tl.results.intervals import interval_over_seeds
from mansu_tl.study.plan import title_of
from mansu_tl.verification.verdicts import GAP_OVER_ALL, GAP_UPPER_END, GOALS, NOT_JUDGEABLE

_CHANCE = "MC, chance"
_KEYS = ["base", "method", "quantizer", "question_set", "measure"]
# Quantizers that are not counted among those that a floored edit has to survive: fewer than four bits.
_FEWER_BITS = ("int3-g64",)


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """A table as CSV, and as parquet, which keeps the types that CSV loses."""
    write_text(path.with_name(f"{path.name}.csv"), frame.to_csv(index=False))
    write_whole(path.with_name(f"{path.name}.parquet"), lambda part: frame.to_parquet(part, index=False))


def read_table(path: str | PathLike[str]) -> pd.DataFrame:
    """The tidy table from its CSV: empty text is text, an empty number is NaN."""
    numbers = {key: ["", "NaN"] for key in ("value", "low", "high", "control")}
    return pd.read_csv(path, keep_default_na=False, na_values=numbers)


def of_measure(table: pd.DataFrame, quantizer: str, question_set: str, measure: str) -> pd.DataFrame:
    """The rows of one measure."""
    return table.loc[
        (table["quantizer"] == quantizer) & (table["question_set"] == question_set) & (table["measure"] == measure)
    ]


def chance(table: pd.DataFrame, question_set: str = "forget") -> float:
    """Multiple choice by guessing, in percent, as the table's own questions give it; NaN where it says nothing.

    Args:
        table: the rows of one base.
    """
    rows = of_measure(table, "", question_set, _CHANCE)["value"]
    return float(rows.iloc[0]) if len(rows) else float("nan")


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds with its 95 % interval (Student's t), lowest and highest seed; one row a group.

    With one seed the interval is the row's own, over facts.
    """
    groups = table.astype({"control": float}).groupby(_KEYS, sort=False)
    out = groups.agg(
        seeds=("value", "size"), low=("low", "first"), high=("high", "first"),
        lowest=("value", "min"), highest=("value", "max"), control=("control", "mean"),
    )  # fmt: skip
    values = groups["value"].agg(list)
    out.insert(1, "mean", [np.mean(each) for each in values])
    ends = np.array([interval_over_seeds(each) for each in values]).reshape(-1, 2)
    out[["low", "high"]] = np.where((out[["seeds"]] > 1).to_numpy(), ends, out[["low", "high"]])
    return out.reset_index()


def by_key(means: pd.DataFrame) -> dict[tuple[Hashable, ...], Any]:
    """The rows of a summary by base, method, quantizer, question set and measure."""
    return {tuple(row[: len(_KEYS)]): row for row in means.itertuples(index=False)}


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """Every property of every method against its goal: one row a base, method and property.

    Columns base, method, property, value (mean over seeds), low and high (its interval), seeds, bound (in words) and verdict.
    """
    means, rows = summary(table), []
    guessing = table.loc[table["measure"] == _CHANCE]
    by_base = {base: guessing.loc[guessing["base"] == base] for base in dict.fromkeys(table["base"])}
    for name, goal in GOALS.items():
        guesses = {base: chance(part, goal.question_set) for base, part in by_base.items()}
        for row in of_measure(means, goal.quantizer, goal.question_set, goal.measure).to_dict("records"):
            mean, low, high = row["mean"], row["low"], row["high"]
            facts = {"chance": guesses[row["base"]], "control": row["control"], "quantizer": goal.quantizer}
            verdict, bound = goal.bound.verdict(mean, low, high, **facts), goal.bound.text(facts["chance"])
            rows.append((row["base"], row["method"], name, mean, low, high, row["seeds"], bound, verdict))
    columns = ["base", "method", "property", "value", "low", "high", "seeds", "bound", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def properties(table: pd.DataFrame) -> pd.DataFrame:
    """One row a base and method, one column a property: mean and interval over seeds, and whether it is within its bound.

    The PTQ gap over all quantizers of four bits or more is the mean over them; its interval's upper end is the largest.
    """
    texts, rows = {}, []
    for base, method, name, value, low, high, _, _, verdict in judged(table).itertuples(index=False):
        interval = "" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]"
        texts[base, method, name] = f"{value:.2f}{interval} {verdict}"
    for (base, method), group in summary(table).groupby(["base", "method"], sort=False):
        row: dict[str, object] = {"base": base, "method": title_of(str(method)), "seeds": int(group["seeds"].max())}
        row |= {name: texts.get((base, method, name), "") for name in GOALS}
        row["PTQ gap, all"] = _gap_over_all(group)
        rows.append(row)
    return pd.DataFrame(rows)


def _gap_over_all(group: pd.DataFrame) -> str:
    gaps: pd.DataFrame = group.loc[
        (group["question_set"] == "forget")
        & (group["measure"] == "PTQ gap, MC")
        & ~group["quantizer"].isin(_FEWER_BITS)
    ]
    broken = gaps["control"] < -GAP_OVER_ALL.control
    judgeable = gaps.loc[~broken]
    if not len(judgeable):
        return NOT_JUDGEABLE if len(gaps) else ""
    mean, worst = judgeable["mean"].mean(), judgeable.sort_values("mean").iloc[-1]
    mark = "pass" if mean <= GAP_OVER_ALL.most and judgeable["high"].max() <= GAP_UPPER_END else "fail"
    rest = f"; {NOT_JUDGEABLE}: {', '.join(gaps.loc[broken, 'quantizer'])}" if broken.any() else ""
    return f"{mean:+.1f}, worst {worst['mean']:+.1f} ({worst['quantizer']}) {mark}{rest}"
