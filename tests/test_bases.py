"""The table over base checkpoints, by hand, and one real cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import mansu_tl as mtl
from scripts import pocket_bases


def cell(right: list[float], cad: float | None) -> dict[str, Any]:
    """A cell in which every kind of question is answered alike."""
    asked = {
        kind: {"fact": ["a", "b"], "chosen among four, %": right, "said, %": [0.0, 0.0], "log-odds, nats": [1.0, 3.0]}
        for kind in pocket_bases.ASKED
    }
    found: dict[str, Any] = {"answers": asked, "NF4": asked}
    if cad is None:
        return found
    inside = {"CAD behind L1": cad, "added opposition": 0.1}
    inside |= {f"relearning, 12 facts at {rate:g}: over never trained, points": 4.0 for rate in pocket_bases.RATES}
    inside |= {"the same less near facts', behind L1": cad / 2, "logit lens behind L1, %": 20.0}
    return found | {"inside": inside, "verdict": "erased"}


def test_a_table_over_bases_by_hand() -> None:
    cells = {
        ("un-edited", "one", 0): cell([100.0, 100.0], None),
        ("MANSU", "one", 0): cell([0.0, 100.0], 0.5),
        ("MANSU", "two", 0): cell([0.0, 0.0], 0.9),
    }
    table = pocket_bases.table_of(cells).set_index(["method", "base", "measure"])
    forget = "forget, as stored, chosen among four, %"
    assert table.loc[("MANSU", "one", forget), "value"] == 50
    every = table.loc[("MANSU", "all", forget)]
    assert (every["value"], every["low"], every["high"]) == (25, 0, 75)  # one right answer of four facts
    # Student's t over two bases: .7 and 12.7 times .2.
    inside = table.loc[("MANSU", "all", "CAD behind L1")]
    assert inside["value"] == pytest.approx(0.7)
    assert inside["high"] - inside["value"] == pytest.approx(12.706 * 0.2, rel=1e-3)
    assert ("un-edited", "all", "CAD behind L1") not in table.index
    lines = pocket_bases.page(pocket_bases.table_of(cells)).splitlines()
    assert lines[0] == "|  | un-edited | MANSU |"
    assert lines[2] == "| forget, chosen among four, % | 100 | 50 / 0 |"
    assert "| CAD behind L1 |  | 0.50 / 0.90 |" in lines
    assert lines[-1] == "| verdict by depth |  | erased / erased |"


@pytest.mark.slow  # a circuit and a reader of every stage
def test_a_base_is_two_checkpoints_of_a_folder(tmp_path: Path, pocket) -> None:
    for name in ("pocket", "pocket-never"):
        mtl.save(mtl.load(name), tmp_path / "own" / name)
    base = pocket_bases.Base(str(tmp_path / "own"), tmp_path / "out")
    assert base.name == "own"
    found = base.cell("un-edited", 0)
    assert set(found) == {"answers", "NF4"}
    table: pd.DataFrame = pocket_bases.table_of({("un-edited", "own", 0): found})
    asked = mtl.accuracy(pocket, base.task.questions["near"])
    values = table[table.base == "own"].set_index("measure").value
    assert values["near, as stored, log-odds, nats"] == pytest.approx(asked.log_odds.double().mean().item(), abs=1e-4)
    assert values["near, NF4, chosen among four, %"] == 100
