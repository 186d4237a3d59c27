"""A comparison's result: its tables and figures, all from the tidy table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mansu_tl.results.files import write_text
from mansu_tl.results.result import Result, Table
from mansu_tl.study.bench import Bench
from mansu_tl.study.figures import figures, write_figures
from mansu_tl.study.markdown import markdown
from mansu_tl.study.plan import CONTROLS, Cell, Comparison
from mansu_tl.study.table import properties, summary, write_table
from mansu_tl.unlearning.search import Search


@dataclass(frozen=True)
class ComparisonResult(Result):
    """What a comparison found.

    Attributes:
        folder: where everything is.
        table: one row a base, method, seed, quantizer, question set and measure.
        searches: one row a base, method and learning rate.
    """

    folder: Path
    table: pd.DataFrame
    searches: pd.DataFrame

    def to_dataframe(self) -> pd.DataFrame:
        """The tidy table."""
        return self.table

    def __repr__(self) -> str:
        return f"ComparisonResult({self.folder}: {len(self.table)} measurements, {len(self.searches)} learning rates tried)"

    def _tables(self) -> Sequence[Table]:
        return (Table(properties(self.table), rows=60),)


def comparison_cell(bench: Bench, cell: Cell) -> tuple[pd.DataFrame, Search | None]:
    """One cell of a comparison: its tidy rows, and the search for its method's learning rate."""
    if cell.method in CONTROLS:
        return bench.table(cell), None
    edit = bench.edit(cell)
    table = bench.table(cell, lambda: bench.subject(edit.apply(bench.model)), edit=edit.digest())
    return table, bench.search(cell.method)


def compared(
    plan: Comparison, folder: Path, done: Mapping[Cell, tuple[pd.DataFrame, Search | None]], *, png: bool
) -> ComparisonResult:
    """The result of a plan's cells; writes its tables (CSV, parquet, Markdown) and figures."""
    table = pd.concat([rows for rows, _ in done.values()], ignore_index=True)
    tried = {(plan.names[cell.base], cell.method): found for cell, (_, found) in done.items() if found is not None}
    frames = [found.to_dataframe() for found in tried.values()]
    for frame, (base, _) in zip(frames, tried, strict=True):
        frame.insert(0, "base", base)
    searches = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    tables = {"measures": table, "searches": searches, "summary": summary(table), "properties": properties(table)}
    for name, frame in tables.items():
        write_table(frame, folder / name)
    write_text(folder / "tables.md", markdown(table, searches))
    drawn = figures(table)
    for image in (False, True) if png else (False,):
        write_figures(drawn, folder / "figures", png=image)
    return ComparisonResult(folder, table, searches)
