"""The numbers in README and docs are lines of committed tables, and those tables follow from the measures."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from mansu_tl.comparison import markdown, properties
from tests.benchmarks import tofu

ROOT = Path(__file__).resolve().parents[1]
COMPARE = ROOT / "figures" / "compare"


@pytest.fixture(scope="module")
def measures() -> pd.DataFrame:
    table = pd.read_csv(COMPARE / "measures.csv", keep_default_na=False, na_values=["", "nan"])
    return table.assign(quantizer=table["quantizer"].fillna(""))


def quoted(text: str, source: str = "figures/compare/tables.md") -> list[str]:
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if line == f"<!-- {source} -->":
            inside = True
        elif line == "<!-- end -->":
            inside = False
        elif inside and line:
            lines.append(line)
    return lines


def test_the_committed_tables_follow_from_the_committed_measures(measures) -> None:
    searches = pd.read_csv(COMPARE / "searches.csv")
    assert markdown(measures, searches) == (COMPARE / "tables.md").read_text(encoding="utf-8")
    stored = pd.read_csv(COMPARE / "properties.csv", keep_default_na=False)
    found = properties(measures)
    assert list(stored["method"]) == list(found["method"])
    for column in found:
        if column != "seeds":
            assert list(stored[column].astype(str)) == list(found[column].astype(str))


@pytest.mark.parametrize("page", ["README.md", "docs/evidence.md"])
def test_a_page_quotes_the_tables_and_nothing_else(page) -> None:
    tables = set((COMPARE / "tables.md").read_text(encoding="utf-8").splitlines())
    lines = quoted((ROOT / page).read_text(encoding="utf-8"))
    assert len(lines) > 20
    assert [line for line in lines if line not in tables] == []


def test_the_tofu_table_is_the_benchmarks() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "tofu.csv").fillna({"quantizer": ""})
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert quoted(page, "figures/tables/tofu.csv") == tofu.markdown(table).splitlines()
