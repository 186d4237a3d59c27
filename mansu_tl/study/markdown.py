"""The comparison's numbers as Markdown tables, for README and papers; written by no hand."""

from __future__ import annotations

import pandas as pd

from mansu_tl.study.plan import CONTROLS, ablations, title_of
from mansu_tl.study.table import by_key, summary
from mansu_tl.unlearning import floored, headline, method_flags, methods

# Quantizer, (question set, measure), decimals.
Number = tuple[str, tuple[str, str], int]
_EASY = ("forget", "relearning MC, facts, lr 0.0003, excess over never")
_HARD = ("forget", "relearning MC, facts, lr 0.001, excess over never")
_GAP, _GAP_NATS, _CAD = ("forget", "PTQ gap, MC"), ("forget", "PTQ gap, log-odds"), ("", "CAD")
_MANSU_ROWS = (
    ("forget MC, %", ("", ("forget", "MC"), 1)),
    ("forget cloze, %", ("", ("forget", "cloze"), 1)),
    ("forget MC, held-out wordings, %", ("", ("forget_paraphrase", "MC"), 1)),
    ("forget cloze, held-out wordings, %", ("", ("forget_paraphrase", "cloze"), 1)),
    ("retain cloze drop, points", ("", ("retain", "cloze drop"), 2)),
    ("retain cloze drop, held-out wordings, points", ("", ("retain_paraphrase", "cloze drop"), 2)),
    ("near cloze drop, points", ("", ("near", "cloze drop"), 2)),
    ("near cloze drop, held-out wordings, points", ("", ("near_paraphrase", "cloze drop"), 2)),
    ("PTQ gap after NF4, forget MC, points", ("nf4", _GAP, 2)),
    ("PTQ gap after NF4, answer log-odds, nats", ("nf4", _GAP_NATS, 3)),
    ("CAD after NF4", ("nf4", _CAD, 3)),
    ("relearning on 12 facts, lr 3e-4: excess over never trained, points", ("", _EASY, 1)),
    ("relearning on 12 facts, lr 1e-3: excess over never trained, points", ("", _HARD, 1)),
    ("relearning on 12 facts after NF4, lr 3e-4, points", ("nf4", _EASY, 1)),
    ("relearning on unrelated text, lr 3e-4, points", ("", ("forget", _EASY[1].replace("facts", "text")), 1)),
    ("edited linear weights, %", ("", ("", "edited linear weights, %"), 2)),
    ("NF4 codes changed, % of edited", ("nf4", ("", "codes changed, % of edited"), 1)),
    ("retain loss increase, measured, nats", ("", ("", "retain increase measured, nats"), 4)),
)
_METHOD_COLUMNS = (
    ("forget MC / cloze", (("", ("forget", "MC"), 1), ("", ("forget", "cloze"), 1))),
    ("MC after NF4", (("nf4", ("forget", "MC"), 1),)),
    ("gap int4-g64 / GPTQ", (("int4-g64", _GAP, 1), ("gptq-int4-g64", _GAP, 1))),
    ("retain / near drop, held out", tuple(("", (f"{k}_paraphrase", "cloze drop"), 1) for k in ("retain", "near"))),
    ("CAD / after NF4", (("", _CAD, 2), ("nf4", _CAD, 2))),
    ("relearning 3e-4 / 1e-3", (("", _EASY, 1), ("", _HARD, 1))),
    ("NF4 codes changed, %", (("nf4", ("", "codes changed, % of all"), 1),)),
    ("depth", (("", ("", "erasure depth"), 2),)),
)
_CONTROL_COLUMNS = (
    ("forget MC, %", ("", ("forget", "MC"), 1)),
    ("retain cloze drop, held out", ("", ("retain_paraphrase", "cloze drop"), 2)),
    ("near log-odds drop, nats", ("", ("near", "log-odds drop"), 1)),
    ("PTQ gap, NF4", ("nf4", _GAP, 1)),
    ("relearning 3e-4", ("", _EASY, 1)),
    ("relearning 1e-3", ("", _HARD, 1)),
)


def markdown(table: pd.DataFrame, searches: pd.DataFrame | None = None) -> str:
    """MANSU over seeds, its PTQ gap by quantizer, its controls, and every method at its best learning rate, as Markdown.

    Args:
        table: the tidy table of `compare`.
        searches: the learning rates that were tried; the chosen one is shown beside its method, with a star where no
            rate reached the forgetting that was asked for.
    """
    means = summary(table)
    cell = _Cells(means)
    bases = [str(base) for base in dict.fromkeys(table["base"])]
    parts = []
    edited = [str(name) for name in dict.fromkeys(table["method"]) if name not in CONTROLS]
    main = headline(edited) if edited else ""
    if floored(main):
        seeds = int(means.loc[means["method"] == main, "seeds"].max())
        parts.append(_main(cell, bases, main, seeds))
        parts.append(_quantizers(cell, bases, main, table))
    rates = _rates(searches)
    parts += [controls for base in bases if (controls := _controls(cell, base, means))]
    parts += [_methods(cell, base, means, rates) for base in bases]
    return "\n\n".join(parts) + "\n"


class _Cells:
    """One number of a method on a base, with its interval where asked."""

    def __init__(self, means: pd.DataFrame) -> None:
        self.rows = by_key(means)

    def __call__(self, base: str, method: str, number: Number, *, interval: bool = False) -> str:
        quantizer, measure, decimals = number
        row = self.rows.get((base, method, quantizer, *measure))
        if row is None:
            return "-"
        ends = (row.mean, row.low, row.high)
        mean, low, high = (f"{round(value, decimals) or 0.0:.{decimals}f}" for value in ends)  # no "-0.0"
        return f"{mean} [{low}, {high}]" if interval and low != "nan" else mean


def _lines(header: list[str], rows: list[list[str]]) -> str:
    marks = ["---"] * len(header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, marks, *rows))


def _main(cell: _Cells, bases: list[str], main: str, seeds: int) -> str:
    name = title_of(main)
    title = f"{name}, mean over {seeds} seeds [95 %]" if seeds > 1 else f"{name}, one seed [95 % over facts]"
    rows = [[row, *(cell(base, main, number, interval=True) for base in bases)] for row, number in _MANSU_ROWS]
    return _lines([title, *(f"`{base}`" for base in bases)], [row for row in rows if set(row[1:]) != {"-"}])


def _quantizers(cell: _Cells, bases: list[str], main: str, table: pd.DataFrame) -> str:
    names = [q for q in dict.fromkeys(table.loc[table["method"] == main, "quantizer"]) if q]
    header = [text for base in bases for text in (f"`{base}`: forget MC, points", "log-odds, nats")]
    gaps = (_GAP, 1), (_GAP_NATS, 2)
    rows = [
        [f"`{name}`", *(cell(base, main, (name, *gap), interval=True) for base in bases for gap in gaps)]
        for name in names
    ]
    return _lines([f"PTQ gap of {title_of(main)}", *header], rows)


def _controls(cell: _Cells, base: str, means: pd.DataFrame) -> str:
    """MANSU beside itself with one part changed; "" where no part was."""
    every = _seeds(means, base)
    main = headline(name for name in every if name not in CONTROLS) if set(every) - set(CONTROLS) else ""
    controls = [name for name in methods() if method_flags(name).control_of == main]
    names = [name for name in (main, *controls, *ablations()) if name in every]
    if not floored(main) or names == [main]:
        return ""
    rows = [
        [
            title_of(name),
            str(every[name]),
            *(cell(base, name, number, interval=True) for _, number in _CONTROL_COLUMNS),
        ]
        for name in names
    ]
    title = f"{title_of(main)} and its controls on `{base}`, mean [95 %]"
    return _lines([title, "seeds", *(name for name, _ in _CONTROL_COLUMNS)], rows)


def _methods(cell: _Cells, base: str, means: pd.DataFrame, rates: dict[tuple[str, str], str]) -> str:
    rows = []
    for method, seeds in _seeds(means, base).items():
        cells = [title_of(method), rates.get((base, method), ""), "" if method in CONTROLS else str(seeds)]
        rows.append([*cells, *(" / ".join(cell(base, method, each) for each in parts) for _, parts in _METHOD_COLUMNS)])
    return _lines([f"`{base}`", "rate", "seeds", *(name for name, _ in _METHOD_COLUMNS)], rows)


def _seeds(means: pd.DataFrame, base: str) -> dict[str, int]:
    """Methods in the table's order, each with its number of seeds."""
    part = means.loc[means["base"] == base]
    return {str(name): int(count) for name, count in part.groupby("method", sort=False)["seeds"].max().items()}


def _rates(searches: pd.DataFrame | None) -> dict[tuple[str, str], str]:
    if searches is None or not len(searches):
        return {}
    chosen = searches.loc[searches["chosen"].astype(bool)]
    return {
        (str(row["base"]), str(row["method"])): f"{row['rate']:g}{'' if row['reached'] else ' *'}"
        for _, row in chosen.iterrows()
    }
