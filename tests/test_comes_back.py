"""Which format brings facts back: the table is the audit's, and the picture draws the table with a sign in every cell."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import mansu_tl as mtl
from mansu_tl import plots
from mansu_tl.errors import MansuError
from mansu_tl.models import parameters
from mansu_tl.study import AuditPlan, audit
from mansu_tl.study.audit_verdicts import FORMATS
from mansu_tl.study.pictures import pictures
from scripts import comes_back

MADE = pd.DataFrame(
    [
        ("nf4", "pocket", "GradDiff", "yes", 69.2, 59.1, 78.8),
        ("nf4", "pocket", "MANSU", "no", -0.4, -2.0, 0.0),
        ("fp4", "pocket", "GradDiff", "not judgeable", 4.0, 0.0, 9.0),
        ("gguf-q4_k", "pocket", "MANSU", "not applicable", float("nan"), float("nan"), float("nan")),
    ],
    columns=["format", "model", "method", "comes_back", "points", "points_low", "points_high"],
)


def test_formats_that_nobody_ships_or_that_do_not_fit_are_told_apart(pocket) -> None:
    names = comes_back.formats()
    assert {"gguf", "nf4", "gguf-q4_k_m", "awq-int4-asym-g128"} <= set(names)
    assert not {"int3-g64", "gptq-int4-g64"} & set(names)
    # pocket's rows are 128 and 320 long, and a K-quant's block is 256.
    assert {value.shape[1] for name, value in parameters(pocket).items() if "proj" in name} == {128, 320}
    misfits = [name for name in names if comes_back.misfit(pocket, name)]
    assert misfits == ["gguf", "gguf-q4_k", "gguf-q5_k", "gguf-q6_k", "gguf-q4_k_m"]
    assert "rows of 128 and 320 weights" in comes_back.misfit(pocket, "gguf-q4_k")


def test_rows_are_the_audits(pocket, tmp_path) -> None:
    task = mtl.load_task("pocket")
    edited = mtl.unlearn(pocket, task, "graddiff", max_steps=6, check_every=3).apply(pocket)
    plan = AuditPlan(formats=("int8", "w4a16-g128"), only=("formats",))
    found = audit(pocket, edited, task, out=tmp_path / "audit", plan=plan)
    int8, other = comes_back.rows_of(found, "GradDiff", "pocket")
    twin, asked = mtl.quantize(edited, "int8"), task.questions["forget"]
    stored, after = (mtl.accuracy(model, asked) for model in (edited, twin))
    assert (int8["stored"], int8["in_format"]) == pytest.approx((stored.mc_percent, after.mc_percent))
    assert int8["original"] == pytest.approx(mtl.accuracy(mtl.quantize(pocket, "int8"), asked).mc_percent)
    assert int8["points"] == pytest.approx(after.mc_percent - stored.mc_percent)
    assert int8["nats"] == pytest.approx((after.log_odds - stored.log_odds).double().mean().item(), abs=1e-5)
    assert int8["points_low"] <= int8["points"] <= int8["points_high"]
    verdict = next(each for each in found.verdicts if (each.question, each.item) == (FORMATS, "int8"))
    assert int8["comes_back"] == {"yes": "no", "no": "yes"}.get(verdict.verdict, verdict.verdict)
    # 320 is no multiple of 128.
    assert other["comes_back"] == "not applicable" and "rows of 320 weights" in other["why"]


def test_a_table_of_formats_by_models() -> None:
    nats = [14.62, -0.01, 0.7, float("nan")]
    ends = {f"nats_{end}": [value + by for value in nats] for end, by in (("low", -0.5), ("high", 0.25))}
    shown = comes_back.by_format(MADE.assign(nats=nats, **ends))
    assert list(shown.columns) == ["format", "GradDiff, pocket", "MANSU, pocket"]
    assert shown.iloc[0].tolist() == [
        "nf4",
        "yes: 69 [59, 79] points, 14.6 [14.1, 14.9] nats",
        "no: 0 [-2, 0] points, 0.0 [-0.5, 0.2] nats",
    ]
    assert shown.iloc[2].tolist() == ["gguf-q4_k", "not measured", "not applicable"]


def test_every_cell_has_a_sign() -> None:
    figure = plots.comes_back(MADE)
    (heat,) = figure.data
    assert [list(row) for row in heat.text] == [["✗ +69", "✓ 0"], ["? +4", ""], ["", "–"]]
    assert list(heat.y) == ["nf4", "fp4", "gguf-q4_k"] and heat.zmax == -heat.zmin == pytest.approx(69.2)
    for rows, message in (
        (MADE.assign(comes_back="perhaps"), "verdict 'perhaps'; choose one of yes, no"),
        (pd.concat([MADE, MADE]), "two rows for one format, model and method"),
        (MADE.drop(columns="points"), "points"),
    ):
        with pytest.raises(MansuError, match=message):
            plots.comes_back(rows)


def test_the_picture_counts_what_comes_back(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    MADE.to_csv(tmp_path / "tables" / "comes_back.csv", index=False)
    (picture,) = pictures(tmp_path)
    title = picture.draw("light").layout.title.text
    assert "GradDiff's in 1 of 1, MANSU's in 0 of 1" in title
