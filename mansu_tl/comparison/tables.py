"""From the tidy table to means over seeds, and to the table of properties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd
from scipy import special

from mansu_tl.comparison.plan import title_of

_KEYS = ["base", "method", "quantizer", "measure"]
# Quantizers that need no more than a measure's mean to be judged: four bits or more.
_FEWER_BITS = ("int3-g64",)
# What quantization alone may do to the un-edited model before nothing can be judged: points lost, and CAD.
_CONTROL_LOSS, _CONTROL_DIVERGENCE = 10.0, 0.2


@dataclass(frozen=True)
class Bound:
    """When a property passes.

    Attributes:
        quantizer: under which it is measured; "" = full precision.
        measure: as the tidy table calls it.
        least, most: what the mean over seeds may be.
        over_chance: for multiple choice, points above chance; as many below chance with the whole interval is inverted
            knowledge, which does not pass either.
        control: how far the control may be from 0, in the measure's unit; where it is further, nothing can be judged.
    """

    quantizer: str
    measure: str
    least: float = -np.inf
    most: float = np.inf
    over_chance: float | None = None
    control: float = np.inf

    def limits(self, chance: float) -> tuple[float, float, float]:
        """What the mean may be at least and at most, and what the interval's upper end has to reach."""
        if self.over_chance is None:
            return self.least, self.most, -np.inf
        return self.least, chance + self.over_chance, max(0.0, chance - self.over_chance)


BOUNDS: Mapping[str, Bound] = MappingProxyType(
    {
        "forget MC": Bound("", "forget MC", over_chance=5.0),
        "forget cloze": Bound("", "forget cloze", most=3.0),
        "held-out forget MC": Bound("", "forget held-out MC", over_chance=5.0),
        "held-out forget cloze": Bound("", "forget held-out cloze", most=3.0),
        "retain drop": Bound("", "retain cloze drop", most=0.5),
        "held-out retain drop": Bound("", "retain held-out cloze drop", most=1.0),
        "near drop": Bound("", "near cloze drop", most=1.0),
        "held-out near drop": Bound("", "near held-out cloze drop", most=2.0),
        "PTQ gap, nf4": Bound("nf4", "PTQ gap, forget MC", most=0.0, control=_CONTROL_LOSS),
        "CAD, nf4": Bound("nf4", "CAD", least=0.95, most=1.05, control=_CONTROL_DIVERGENCE),
        "relearning excess, lr 3e-4": Bound("", "relearning MC, facts, lr 0.0003, excess over never", most=5.0),
        "relearning excess, lr 1e-3": Bound("", "relearning MC, facts, lr 0.001, excess over never", most=10.0),
        "edited, %": Bound("", "edited linear weights, %", most=2.0),
    }
)


def chance(table: pd.DataFrame, measure: str = "forget MC") -> float:
    """Multiple choice by guessing, in percent, as the table's own questions give it; NaN where it says nothing.

    Args:
        table: the rows of one base.
    """
    found = table.loc[table["measure"] == f"{measure}, chance", "value"]
    return float(found.iloc[0]) if len(found) else float("nan")


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds with its 95 % interval (Student's t), lowest and highest seed; one row a group.

    With one seed the interval is the row's own, over facts.

    Args:
        table: tidy, columns base, method, seed, quantizer, measure, value, low, high, control.
    """
    rows = []
    for key, group in table.groupby(_KEYS, sort=False):
        values = group["value"].to_numpy(dtype=float)
        low, high = _interval(values) if len(values) > 1 else (group["low"].iloc[0], group["high"].iloc[0])
        rows.append(
            {
                **dict(zip(_KEYS, key, strict=True)),
                "seeds": len(values),
                "mean": values.mean(),
                "low": low,
                "high": high,
                "lowest": values.min(),
                "highest": values.max(),
                "control": group["control"].astype(float).mean(),
            }
        )
    return pd.DataFrame(rows)


def properties(table: pd.DataFrame) -> pd.DataFrame:
    """One row a base and method, one column a property: mean and interval over seeds, and whether it is within its bound.

    The PTQ gap over all quantizers of four bits or more is the mean over them; its interval's upper end is the largest.
    """
    means = summary(table)
    parts = {str(base): table.loc[table["base"] == base] for base in dict.fromkeys(table["base"])}
    rows = []
    for (base, method), group in means.groupby(["base", "method"], sort=False):
        row: dict[str, object] = {
            "base": base,
            "method": title_of(str(method)),
            "seeds": int(group["seeds"].max()),
        }
        for name, bound in BOUNDS.items():
            row[name] = _cell(group, bound, chance(parts[str(base)], bound.measure))
        gaps: pd.DataFrame = group.loc[
            (group["measure"] == "PTQ gap, forget MC") & ~group["quantizer"].isin(_FEWER_BITS)
        ]
        broken = gaps["control"] < -_CONTROL_LOSS
        if len(gaps) and broken.all():
            row["PTQ gap, all"] = "not judgeable"
        elif len(gaps):
            judged = gaps.loc[~broken]
            mean, worst = judged["mean"].mean(), judged.sort_values("mean").iloc[-1]
            mark = "pass" if mean <= 0 and judged["high"].max() <= 1 else "fail"
            rest = f"; not judgeable: {', '.join(gaps.loc[broken, 'quantizer'])}" if broken.any() else ""
            row["PTQ gap, all"] = f"{mean:+.1f}, worst {worst['mean']:+.1f} ({worst['quantizer']}) {mark}{rest}"
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def _cell(group: pd.DataFrame, bound: Bound, guessed: float) -> str:
    found = group.loc[(group["quantizer"] == bound.quantizer) & (group["measure"] == bound.measure)]
    if not len(found):
        return ""
    row = found.iloc[0]
    interval = "" if np.isnan(row["low"]) else f" [{row['low']:.2f}, {row['high']:.2f}]"
    least, most, floor = bound.limits(guessed)
    if np.isnan(most):
        mark = "not judgeable: the table does not say what guessing gives"
    elif abs(row["control"]) > bound.control:
        mark = f"not judgeable: {bound.quantizer} alone gives {row['control']:.2f}"
    elif not np.isnan(row["high"]) and row["high"] < floor:
        mark = f"fail: inverted, guessing gives {guessed:.0f}"
    else:
        mark = "pass" if least <= round(row["mean"], 6) <= most else "fail"
    return f"{row['mean']:.2f}{interval} {mark}"


def _interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean, Student's t."""
    half = special.stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean() - half, values.mean() + half
