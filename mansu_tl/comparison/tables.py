"""From the tidy table to means over seeds, and to the table of properties."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import pandas as pd
from scipy import stats

from mansu_tl.comparison.plan import title_of

_KEYS = ["base", "method", "quantizer", "measure"]
_CONTROLS = MappingProxyType({"original": "un-edited", "never": "never trained"})
# Quantizers that need no more than a measure's mean to be judged: four bits or more.
_FEWER_BITS = ("int3-g64",)

# property -> (measure, bound, whether the bound is a lower one); quantizer "" unless said.
BOUNDS: Mapping[str, tuple[str, str, float, float]] = MappingProxyType(
    {
        "forget MC": ("", "forget MC", -np.inf, 30.0),
        "forget cloze": ("", "forget cloze", -np.inf, 3.0),
        "held-out forget MC": ("", "forget held-out MC", -np.inf, 30.0),
        "held-out forget cloze": ("", "forget held-out cloze", -np.inf, 3.0),
        "retain drop": ("", "retain cloze drop", -np.inf, 0.5),
        "held-out retain drop": ("", "retain held-out cloze drop", -np.inf, 1.0),
        "near drop": ("", "near cloze drop", -np.inf, 1.0),
        "held-out near drop": ("", "near held-out cloze drop", -np.inf, 2.0),
        "PTQ gap, nf4": ("nf4", "PTQ gap, forget MC", -np.inf, 0.0),
        "CAD, nf4": ("nf4", "CAD", 0.95, 1.05),
        "relearning excess, lr 3e-4": ("", "relearning MC, facts, lr 0.0003, excess over never", -np.inf, 5.0),
        "relearning excess, lr 1e-3": ("", "relearning MC, facts, lr 0.001, excess over never", -np.inf, 10.0),
        "edited, %": ("", "edited linear weights, %", -np.inf, 2.0),
    }
)  # fmt: skip


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
    rows = []
    for (base, method), group in means.groupby(["base", "method"], sort=False):
        row: dict[str, object] = {
            "base": base,
            "method": _CONTROLS.get(str(method)) or title_of(str(method)),
            "seeds": int(group["seeds"].max()),
        }
        for name, (quantizer, wanted, least, most) in BOUNDS.items():
            row[name] = _cell(group, quantizer, wanted, least, most)
        gaps: pd.DataFrame = group.loc[
            (group["measure"] == "PTQ gap, forget MC") & ~group["quantizer"].isin(_FEWER_BITS)
        ]
        if len(gaps):
            mean, worst = gaps["mean"].mean(), gaps.sort_values("mean").iloc[-1]
            mark = "pass" if mean <= 0 and gaps["high"].max() <= 1 else "fail"
            row["PTQ gap, all"] = f"{mean:+.1f}, worst {worst['mean']:+.1f} ({worst['quantizer']}) {mark}"
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def _cell(group: pd.DataFrame, quantizer: str, wanted: str, least: float, most: float) -> str:
    found = group.loc[(group["quantizer"] == quantizer) & (group["measure"] == wanted)]
    if not len(found):
        return ""
    row = found.iloc[0]
    interval = "" if np.isnan(row["low"]) else f" [{row['low']:.2f}, {row['high']:.2f}]"
    mark = "pass" if least <= round(row["mean"], 6) <= most else "fail"
    return f"{row['mean']:.2f}{interval} {mark}"


def _interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean, Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean() - half, values.mean() + half
