"""The numbers in the documentation are lines of committed tables, and those tables follow from the measures."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from mansu_tl.study import markdown, properties
from mansu_tl.study.table import read_table
from mansu_tl.unlearning import MansuSettings
from scripts import (
    comes_back,
    early_layers,
    extraction,
    fair_baselines,
    floors,
    meta_cad,
    pocket_bases,
    real_place,
    relearning_curves,
)
from tests.benchmarks import readme, real, tofu

ROOT = Path(__file__).resolve().parents[1]
COMPARE = ROOT / "figures" / "compare"


@pytest.fixture(scope="module")
def measures() -> pd.DataFrame:
    return read_table(COMPARE / "measures.csv")


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


def tables(lines: list[str]) -> list[tuple[str, list[str]]]:
    """(header, rows) of every Markdown table; the line of dashes is left out."""
    out: list[tuple[str, list[str]]] = []
    for i, line in enumerate(lines):
        if line.startswith("| ---"):
            continue
        if i + 1 < len(lines) and lines[i + 1].startswith("| ---"):
            out.append((line, []))
        else:
            out[-1][1].append(line)
    return out


def label(row: str) -> str:
    return row.split("|")[1].strip()


def test_every_row_of_a_table_has_a_name_of_its_own() -> None:
    for header, rows in tables((COMPARE / "tables.md").read_text(encoding="utf-8").split("\n")[:-1]):
        names = [label(row) for row in rows if row]
        assert len(set(names)) == len(names), header


def test_the_page_quotes_the_tables_in_order_and_nothing_else() -> None:
    text = (COMPARE / "tables.md").read_text(encoding="utf-8")
    source = dict(tables([line for line in text.splitlines() if line]))
    found = tables(quoted((ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")))
    assert found
    for header, rows in found:
        # Rows may be left out, never moved, changed or doubled; the first table is whole.
        rest = iter(source[header])
        assert all(row in rest for row in rows), header
    assert found[0][1] == source[found[0][0]]


def test_the_tofu_table_is_the_benchmarks() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "tofu.csv").fillna({"quantizer": ""})
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert quoted(page, "figures/tables/tofu.csv") == tofu.markdown(table).splitlines()


def test_the_real_models_table_is_what_the_demo_wrote_and_shows_the_contrast() -> None:
    lines = (ROOT / "figures" / "tables" / "demo_real.md").read_text(encoding="utf-8").splitlines()
    page = (ROOT / "docs" / "reference" / "unlearning.md").read_text(encoding="utf-8")
    assert quoted(page, "figures/tables/demo_real.md") == lines
    rows = {
        label(line).partition(":")[0]: [float(cell.split()[0]) for cell in line.split("|")[2:-1]]
        for line in lines
        if "right of" in line
    }
    original, mansu, mansu_shipped, graddiff, graddiff_shipped = range(5)
    for values in rows.values():
        assert values[mansu_shipped] == values[mansu]
    forget, near = rows["forget"], rows["near"]
    assert forget[original] == forget[graddiff_shipped] == 100 and forget[graddiff] < 20 and forget[mansu] < 20
    assert near[mansu] == 100 > near[graddiff]
    other = rows["forget_paraphrase"]
    assert other[mansu] < 20 and other[graddiff] > 90 and other[graddiff_shipped] == 100


def test_the_tables_of_a_pretrained_model_are_those_of_its_runs_and_show_what_is_said() -> None:
    folder, pages = ROOT / "figures" / "tables", ROOT / "docs"
    found = {name: pd.read_csv(folder / f"real_{name}.csv", dtype=str).fillna("") for name in ("settings", "trials")}
    text = (pages / "reference" / "unlearning.md").read_text(encoding="utf-8")
    assert quoted(text, "figures/tables/real_settings.csv") == real.settings(found["settings"]).splitlines()
    text = (pages / "evidence.md").read_text(encoding="utf-8")
    assert quoted(text, "figures/tables/real_trials.csv") == real.trials(found["trials"]).splitlines()
    trials = found["trials"]
    baselines = trials[~trials.method.isin(["original", "mansu-closed"])]
    shipped = baselines[(baselines.form == "shipped") & (baselines.questions == "forget")]
    assert len(shipped) == 32 and (shipped.mc_percent == "100").all()
    other = baselines[(baselines.form == "stored") & (baselines.questions == "forget, other words")]
    assert other.mc_percent.astype(int).min() == 96
    mine = trials[trials.method == "mansu-closed"].pivot(
        index=["relation", "quantizer", "null_space", "questions"],
        columns="form",
        values=["mc_percent", "cloze_percent"],
    )
    assert len(mine) == 24 and (mine.xs("stored", axis=1, level=1) == mine.xs("shipped", axis=1, level=1)).all(
        axis=None
    )


def test_what_was_chosen_is_the_same_in_the_file_on_facts_that_chose_nothing() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "real_test.csv", dtype=str).fillna("")
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    lines = [*real.test(table).splitlines(), *real.gaps(table).splitlines()]
    assert quoted(page, "figures/tables/real_test.csv") == lines
    scores = ["mc_percent", "cloze_percent", "log_odds"]
    by = table.set_index(["relation", "seed", "method", "form", "questions"])[scores].astype(float)
    mine = by.xs("mansu-closed", level="method")
    pd.testing.assert_frame_equal(mine.xs("stored", level="form"), mine.xs("shipped", level="form"))
    others = by.drop(["mansu-closed", "original"], level="method").xs("forget", level="questions")
    shipped = others.xs("shipped", level="form").mc_percent
    assert len(shipped) == 24 and (shipped >= 95).all()
    unseen = by.drop(["mansu-closed", "original"], level="method").xs("stored", level="form")
    unseen = unseen[unseen.index.isin(["forget_paraphrase", "forget, other words"], level="questions")]
    assert (unseen.mc_percent >= 75).all()


def test_mansu_takes_the_evidence_away_before_it_is_read_and_graddiff_where_it_is() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "real_cad.csv")
    read = int(table[table.label == table.label.iloc[0]].before_reading.sum()) - 1
    at = {label: rows.iloc[read] for label, rows in table.groupby("label")}
    behind = {label: rows.iloc[read + 1] for label, rows in table.groupby("label")}
    mine, theirs = at["MANSU, closed form"], at["GradDiff"]
    assert mine.layer == "L22" and mine.cad_low > 0.7 and mine.near_cad_high < 0.15 and mine.specificity_low > 0.6
    assert theirs.cad_high < 0.3 and behind["GradDiff"].cad_low > 0.9 and behind["GradDiff"].near_cad_low > 0.9
    assert behind["GradDiff, shipped"].cad_high < 0.1
    columns = [name for name in table.columns if name != "label"]
    stored, shipped = (
        table[table.label == f"MANSU, closed form{end}"][columns].reset_index(drop=True) for end in ("", ", shipped")
    )
    pd.testing.assert_frame_equal(stored, shipped)


def test_a_second_model_comes_back_after_graddiff_and_not_after_mansu() -> None:
    folder, page = ROOT / "figures" / "tables", (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    tried, table = (pd.read_csv(folder / f"real_gemma{end}.csv", dtype=str).fillna("") for end in ("_settings", ""))
    assert quoted(page, "figures/tables/real_gemma_settings.csv") == real.plain(tried).splitlines()
    assert quoted(page, "figures/tables/real_gemma.csv") == real.test(table).splitlines()
    trials = pd.read_csv(folder / "real_gemma_trials.csv", dtype=str).fillna("")
    assert quoted(page, "figures/tables/real_gemma_trials.csv") == real.trials(trials).splitlines()
    tried_out = trials[(trials.form == "shipped") & (trials.questions == "forget")]
    assert set(tried_out.method) == {"npo", "simnpo", "rmu"} and (tried_out.mc_percent.astype(float) >= 95).all()
    by = table.set_index(["method", "form", "relation", "seed", "questions"])[["mc_percent", "cloze_percent"]].astype(
        float
    )
    mine = by.xs("mansu-closed")
    pd.testing.assert_frame_equal(mine.xs("stored"), mine.xs("shipped"))
    back = by.xs("graddiff").xs("shipped").xs("forget", level="questions")
    assert len(back) == 6 and (back.mc_percent == 100).all()


def test_on_test_draws_every_baseline_is_intact_in_the_file_and_mansu_is_as_stored() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "real_cad_draws.csv")
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert quoted(page, "figures/tables/real_cad_draws.csv") == real.depths(table).splitlines()
    mine, others = (table[(table.method == "mansu-closed") == own] for own in (True, False))
    stored, shipped = (
        mine[mine.form == form].drop(columns="form").reset_index(drop=True) for form in ("stored", "shipped")
    )
    pd.testing.assert_frame_equal(stored, shipped)
    judged = others[others.judged]
    back = judged[judged.form == "shipped"]
    assert (
        len(back) == 22
        and set(back.verdict) == {"intact"}
        and (back.cad < 0.035).all()
        and (back.grafted_percent >= 95).all()
    )
    assert "erased" not in set(judged.verdict)
    lighter = pd.read_csv(ROOT / "figures" / "tables" / "real_cad_null50.csv").set_index(["task", "form"])
    assert lighter.xs("stored", level="form").equals(lighter.xs("shipped", level="form"))
    assert sorted(lighter.xs("stored", level="form").verdict) == ["erased", "undecided", "undecided"]
    own = stored[stored.judged]
    assert (
        len(own) == 11 and set(own.verdict) == {"undecided"} and (own.cad > 0.6).all() and (own.specificity > 0.3).all()
    )


def test_what_a_part_of_the_closed_form_is_worth_is_what_was_measured() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "real_ablations.csv")
    rows = table.set_index(["variant", "questions", "measure"])
    for kind in ("near", "near, kept back", "retain"):
        for measure in ("mc", "log_odds"):
            assert rows.loc[("null space off", kind, measure), "difference_high"] < 0
    primary = rows.xs("near, kept back, less forget", level="questions").xs("log_odds", level="measure")
    assert primary.difference_high["null space off"] < 0 and primary.p_holm["null space off"] < 0.005
    drawn = primary.loc["a quarter, drawn"]
    assert drawn.edits == 15 and drawn.difference_low < 0 < drawn.difference_high
    assert drawn.against == "a quarter of the neurons, the circuit's"
    # The same way on every draw: it forgets more, keeps less, and less of it is relearnt.
    for kind in ("forget", "near, kept back", "relearned"):
        assert rows.loc[("a quarter, drawn", kind, "log_odds"), "difference_low"] > 0
    assert primary.p_holm["Fisher on"] > 0.05
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    off, near = primary.loc["null space off"], rows.loc[("null space off", "near", "mc")]
    for said in (
        f"falls by {-off.difference:.2f} nats [{-off.difference_high:.2f}, {-off.difference_low:.2f}]",
        f"Near facts lose {-near.difference:.0f} points [{-near.difference_high:.0f}, {-near.difference_low:.0f}]",
        f"{-drawn.difference:.2f} nats behind on the primary endpoint "
        f"[{-drawn.difference_high:.2f}, {-drawn.difference_low:.2f}]",
    ):
        assert said.replace("0.", ".") in page.replace("0.", "."), said


def test_where_in_depth_an_edit_lies_is_what_was_measured() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "early_layers.csv", dtype={"value": str})
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert quoted(page, "figures/tables/early_layers.csv") == early_layers.page(table).splitlines()
    rows = table[table.measure != "verdict"].assign(value=lambda t: t.value.astype(float))
    by = rows.set_index(["measure", "variant", "seed"]).value
    for size in ("light", "full"):
        everywhere, early = (by.xs(name, level="variant") for name in (size, f"{size}, early layers"))
        assert (early["CAD at L1"] - everywhere["CAD at L1"] > 0.3).all()
        assert (early["added opposition"] < 0.1).all() and (everywhere["added opposition"] > 0.2).all()
        for layer in ("L1", "L2"):
            assert (early[f"logit lens {layer}, %"] < 27).all() and (everywhere[f"logit lens {layer}, %"] > 50).all()
        assert (early["near MC, %"] > 99).all() and (early["near log-odds, nats"] < 0.8 * 12.1).all()
        kept = by.xs(f"{size}, early layers, odds kept", level="variant")
        near, shipped = {"light": (0.15, 1), "full": (0.2, 2)}[size]
        assert (kept["near log-odds, nats"] > 0.85 * 12.1).all() and (kept["near CAD at L1"] < near).all()
        assert (kept["specificity at L1"] > 0.7).all() and (kept["CAD at L1"] > 0.7).all()
        assert (kept["added opposition"] < 0.1).all() and (kept["forget MC, %"] < 30).all()
        assert (kept["forget MC after NF4, %"] - kept["forget MC, %"]).abs().max() < shipped
    again = "relearning, 12 facts, 50 steps at {}, {}: over never trained, points"
    assert (kept[again.format("0.0003", "every weight")] < 5).all()
    assert (kept[again.format("0.001", "every weight")] > 10).all() and (
        kept[again.format("0.0003", "LoRA 8")] > 10
    ).all()
    verdicts = table[table.measure == "verdict"].groupby("variant").value.agg(list)
    assert all(set(verdicts[f"{size}, early layers"]) == {"undecided"} for size in ("light", "full"))
    assert all(verdicts[f"{size}, early layers, odds kept"] == ["erased", "erased"] for size in ("light", "full"))
    further = pd.read_csv(ROOT / "figures" / "tables" / "early_further.csv").set_index(["variant", "measure"]).value
    small = further["light, early layers, 1 %"].drop("verdict").astype(float)
    assert 25 < small["forget MC, %"] < 30 and small["edited weights"] < 0.01 * 688128


def test_the_trials_of_the_odds_are_what_the_settings_page_says() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "odds_trials.csv")
    page = (ROOT / "docs" / "reference" / "unlearning.md").read_text(encoding="utf-8")
    light = table[(table.settings == "light") & (table.margin == 0.1)].set_index("odds_weight")
    (row,) = (line for line in page.splitlines() if line.startswith("| `odds_weight` |"))
    for weight in (0.01, 0.1, 0.3):
        assert f"{light.loc[weight, 'near log-odds, nats']:.1f}" in row
    assert ", ".join(f"{light.loc[w, 'forget MC, %']:.0f}" for w in (0.01, 0.1, 0.3)) in row
    # What was chosen of these, and the other full settings that kept as much, by the verdict.
    full = table[table.settings == "full"].set_index(["odds_weight", "margin", "adversary_weight"])
    assert full.loc[(0.1, -0.7, 3), "verdict"] == full.loc[(0.1, -1.0, 6), "verdict"] == "erased"
    assert (full[full.verdict == "undecided"]["added opposition, high"] >= 0.1).all()


def test_the_trials_of_the_early_layers_have_the_settings_that_were_chosen_among_the_erased() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "early_trials.csv")
    names = [name for name in table.columns if name in vars(MansuSettings.early())]
    chosen = vars(MansuSettings.early()) | {"adversary_facts": 12}
    (mine,) = (row for row in table.to_dict("records") if all(row[name] == chosen[name] for name in names))
    erased = table[table.verdict == "erased"]
    again = "relearning, 12 facts at 1e-3, points"
    assert mine["verdict"] == "erased" and mine[again] == erased[again].min() and mine["added opposition"] < 0.05
    assert (table[table.depth == 1].verdict == "suppressed").all()


def test_fewer_weights_need_more_steps_and_other_attackers_do_not_help() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "early_attackers.csv")
    by = table[table.seed == 0].set_index("variant")
    one = [f"mansu-early, 1 %{end}" for end in ("", ", 600 steps", ", 1200 steps")]
    first, second, third = by.loc[one, "forget MC, %"]
    assert second < first - 10 and abs(third - second) < 5
    few = table[table.variant == one[1]]
    assert set(few.seed) == {0, 1, 2} and (few["edited weights"] < 0.01 * 688_128).all()
    assert (few["near log-odds, nats"] > 0.8 * 12.1).all() and (few["forget MC, %"] < 35).all()
    attacked = by.loc[["mansu-early, attackers of near text", "mansu-early, attackers of every kind"]]
    again = "relearning, {}, 50 steps at {}, {}, points"
    assert (attacked[again.format("near facts", "0.001", "every weight")] > 35).all()
    assert (attacked[again.format("12 facts", "0.0003", "LoRA 8")] > 10).all()


def test_the_place_on_a_pretrained_model_is_what_was_measured() -> None:
    table, both = (pd.read_csv(ROOT / "figures" / "tables" / f"real_place{end}.csv") for end in ("", "_pairs"))
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert quoted(page, "figures/tables/real_place.csv") == real_place.page(table).splitlines()
    assert (table.opposition < 0.05).all() and set(table.verdict) == {"undecided", "intact"}
    assert (table["forget, MC %"] == table["shipped forget, MC %"]).all()
    off = both[(both.variant == "place off") & (both.measure == "log_odds")].set_index("questions")
    primary = off.loc["near, kept back, less forget"]
    assert primary.difference_low < 0 < primary.difference_high and primary.p > 0.5
    assert off.loc["retain"].difference_high < -0.3


def test_baselines_of_more_trials_are_what_was_measured() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "fair_baselines.csv")
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert quoted(page, "figures/tables/fair_baselines.csv") == fair_baselines.page(table).splitlines()
    tried, rows = table[table.part == "validation"], table[table.part == "test"].set_index("method")
    assert (tried.groupby("method").size() == 4).all() and (rows.groupby("method").size() == 2).all()
    assert set(tried.method) == {"graddiff", "npo", "simnpo", "rmu"}
    assert rows.loc["npo", "forget MC after NF4, %"].max() < 30
    assert (
        set(rows.loc["rmu", "verdict"]) == {"suppressed"} and rows.loc["rmu", "relearning at 0.0003, points"].min() > 60
    )
    near = rows.groupby("method")["near log-odds, nats"].mean()
    assert abs(near["npo"] - near["mansu-early"]) < 0.2
    assert set(rows.loc["mansu-early", "verdict"]) == {"erased"} and "erased" not in set(
        rows.drop("mansu-early").verdict
    )
    assert (
        rows.loc[["npo", "graddiff"], "added opposition"].min()
        > 0.25
        > rows.loc["mansu-early", "added opposition"].max()
    )
    assert tried[tried.method == "simnpo"]["forget MC after NF4, %"].min() > 60


def test_a_floor_on_several_grids_holds_on_each_and_costs_forgetting() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "floors.csv")
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert quoted(page, "figures/tables/floors.csv") == floors.page(table).splitlines()
    held = table[table.floored]
    assert len(held) == 1 + 2 + 4 and (held["changed weights whose code changed, %"] == 100).all()
    assert (held["PTQ gap, MC, points"] <= 0).all()
    left = table.groupby("floor", sort=False)["forget MC as stored, %"].first()
    assert left["nf4"] < 25 and left.drop("nf4").min() > 60
    assert table[table.floor == "nf4+int4-asym-g64"]["PTQ gap, MC, points"].max() < 3.5


def test_the_budget_curves_are_what_was_measured() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "relearning_budgets.csv")
    page = (ROOT / "docs" / "erasure.md").read_text(encoding="utf-8")
    assert quoted(page, "figures/tables/relearning_budgets.csv") == relearning_curves.page(table).splitlines()
    last = table[(table.step == 50) & (table["rank"] == 0)].set_index(["label", "facts"]).over_reference
    for facts in (12, 24):
        assert last["mansu-early", facts] < 0.65 * last["mansu", facts]
    assert (last["mansu-early"] - last["mansu-early, nf4"]).abs().max() < 2


def test_near_facts_alone_bring_the_early_edit_back_and_longer_training_on_forget_facts_hardly_more() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "relearning_long.csv")
    page = (ROOT / "docs" / "erasure.md").read_text(encoding="utf-8")
    assert quoted(page, "figures/tables/relearning_long.csv") == relearning_curves.page(table).splitlines()
    by = table.set_index(["label", "text", "facts", "step"]).sort_index()
    near = by.xs(("mansu-early", "near facts", 0))
    assert (near.over_reference_low > 15).all() and near.over_reference[400] > 40
    assert (by.xs(("npo", "near facts", 0)).over_reference < 15).all()
    for facts in (12, 24):
        own = by.xs(("mansu-early", "forget facts", facts)).over_reference
        assert own[400] - own[50] < 3
    assert (by.xs("unrelated text", level="text").over_reference < 7).all()


def test_what_holds_on_another_base_checkpoint_is_what_was_measured() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "pocket_bases.csv", dtype={"value": str})
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert quoted(page, "figures/tables/pocket_bases.csv") == pocket_bases.page(table).splitlines()
    found = table[table.base != pocket_bases.ALL].set_index(["method", "base", "measure"]).value
    early, before = found["MANSU, early layers"], found["un-edited"]
    for base in ("embedded", "1", "2"):
        assert 17.5 <= float(early[base, "forget, NF4, chosen among four, %"]) < 23.5
        kept = "near, NF4, log-odds, nats"
        assert float(early[base, kept]) > 0.92 * float(before[base, kept])
        assert float(early[base, "near_paraphrase, NF4, said, %"]) > 97
    assert [early[base, "verdict"] for base in ("embedded", "1", "2")] == ["erased", "undecided", "erased"]
    assert all(
        found[method, base, "verdict"] != "erased" for method in ("GradDiff", "NPO") for base in ("embedded", "1", "2")
    )
    more = "relearning, 12 facts at 0.001: over never trained, points"
    assert float(early["1", more]) > float(found["NPO", "1", more])


def test_the_circuits_of_a_pretrained_models_facts_are_those_of_the_run() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "real_circuit.csv", dtype=str).fillna("")
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert quoted(page, "figures/tables/real_circuit.csv") == real.circuits(table).splitlines()
    faithful = table[table.measure == "faithfulness"].assign(value=lambda frame: frame.value.astype(float))
    own, near = (faithful[faithful.of == of].groupby("on").value.min() for of in ("forget", "near"))
    assert own["forget"] >= 0.85 and own["forget, other wording"] > 0.75 and own["near"] > 0.65
    assert near["forget"] > 0.65 and (faithful[faithful.of == "random edges"].value < 0.05).all()


def test_readmes_table_is_what_was_measured_and_shows_the_contrast() -> None:
    table = pd.read_csv(readme.OUT, dtype=str)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert quoted(page, "figures/tables/readme.csv") == readme.markdown(table).splitlines()
    prompts, shares = table[table.prompt != readme.SHARE], table[table.prompt == readme.SHARE].set_index("set")
    assert list(prompts.set.value_counts()[["forget", "near", "retain"]]) == [6, 2, 1]
    assert (prompts.original == prompts.right).all()
    lost = prompts[prompts.set == "forget"]
    assert (lost.GradDiff != lost.right).all()
    assert (lost["GradDiff, NF4"] == lost.right).all()
    assert (lost[["MANSU", "MANSU, NF4"]].to_numpy() != lost[["right"]].to_numpy()).all()
    assert float(shares.loc["forget", "GradDiff, NF4"]) > 95
    assert float(shares.loc["forget", "MANSU, NF4"]) < 5


def test_what_is_said_of_stories260k_is_in_its_scorecards() -> None:
    text = (
        (ROOT / "docs" / "evidence.md")
        .read_text(encoding="utf-8")
        .split("## A pretrained model: stories260K")[1]
        .split("\n## ")[0]
    )
    text = " ".join(text.split())
    table = pd.read_csv(ROOT / "notebooks" / "stories260k" / "scorecards.csv").fillna({"quantizer": ""})
    mansu, others = table[table.method == "mansu"], table[table.method != "mansu"]

    def span(measure: str, quantizer: str = "", digits: int = 0) -> str:
        values = others[(others.measure == measure) & (others.quantizer == quantizer)].value
        low, high = f"{values.min():.{digits}f}", f"{values.max():.{digits}f}"
        return low if low == high else f"{low}-{high}"

    verdicts = mansu.verdict.str.split(":").str[0].value_counts()
    lost = 100 - mansu[mansu.verdict.str.startswith("not judgeable")].control
    cad = mansu[mansu.measure == "CAD"].iloc[0]
    assert (mansu[mansu.measure.str.match("forget.*MC, %")].value == 0).all()
    for said in (
        f"MANSU fails {verdicts['fail']} of {len(mansu)} rows, and {verdicts['not judgeable']} more cannot be judged",
        f"NF4 alone loses {lost.min():.0f}-{lost.max():.0f} points",
        f"CAD is {cad.loc['value']:.2f} [{cad.interval_low:.2f}, {cad.interval_high:.2f}]",
        f"GradDiff, NPO and QUAIL end at {span('forget MC, %', digits=1)} % with {span('forget cloze, %')} % cloze left",
        f"to {span('forget MC, %', 'nf4', 1)} %",
        f"{span('retain cloze drop, points')} points of retain and {span('near cloze drop, points')} of near cloze",
    ):
        assert said in text, said


def test_specificity_tells_suppressors_from_models_that_never_knew() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "meta_cad.csv", keep_default_na=False)
    page = (ROOT / "docs" / "erasure.md").read_text(encoding="utf-8")
    scores, models = meta_cad.by_score(table), meta_cad.by_model(table)
    lines = [*real.plain(models).splitlines(), *real.plain(scores.round(3).astype(str)).splitlines()]
    assert quoted(page, "figures/tables/meta_cad.csv") == [line for line in lines if line]
    found = scores.set_index("score")
    assert found.AUC["specificity"] == 1 > found.AUC["UDS"]
    right = {"intact": "intact", "filter": "suppressed", "suppressor, middle": "suppressed", "damaged": "damaged",
             "suppressor, last": "suppressed", "never, 1": "erased", "never, 2": "erased"}  # fmt: skip
    plain = table[table.form == ""].set_index("model")
    for name, verdict in right.items():
        assert (plain.verdict[name] == verdict).all(), name
    # What it does not tell, and the page says so.
    assert (plain.verdict["suppressor, first"] == "undecided").all()


def test_what_attacks_without_training_find_is_in_their_table() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "extraction.csv", keep_default_na=False)
    page = (ROOT / "docs" / "erasure.md").read_text(encoding="utf-8")
    lines = real.plain(extraction.by_attack(table)).splitlines()
    assert quoted(page, "figures/tables/extraction.csv") == [line for line in lines if line]
    found = table.set_index(["model", "form", "attack", "measure"])

    def ends(model: str, attack: str, measure: str = "MC, %") -> tuple[float, float]:
        row = found.loc[(model, "", attack, measure)]
        return float(row.low), float(row.high)

    # Held-out facts behind a soft prompt, and the answer in the middle of the model: MANSU above the never-trained one.
    for attack in ("soft prompt", "logit lens, L0", "logit lens, L1", "logit lens, L2"):
        assert ends("MANSU", attack)[0] > ends("never trained", attack)[1], attack
    # Sampling: no more than a wrong option, up to the width of the intervals.
    for k in (1, 16, 128):
        right, wrong = (ends("MANSU", who, f"leak@{k}, %") for who in ("leak", "a wrong option leaks"))
        assert right[0] < wrong[1]
    # Membership: told by wrong answers as by right ones.
    for attack in ("LOSS", "Min-K", "Min-K++"):
        assert ends("MANSU", f"membership of wrong sentences, {attack}", "AUC")[0] > 0.85


def test_what_formats_bring_back_is_in_its_table() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "comes_back.csv", keep_default_na=False)
    page = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    lines = real.plain(comes_back.by_format(table)).splitlines()
    assert quoted(page, "figures/tables/comes_back.csv") == [line for line in lines if line]
    verdict = table.set_index(["model", "method", "format"]).comes_back
    # Each on the grid that its base rests on.
    own = {("pocket", "nf4"), ("SmolLM2", "gguf"), ("SmolLM2", "gguf-q4_1")}
    assert all(verdict[model, "GradDiff", name] == "yes" for model, name in own)
    assert not ((table.method == "MANSU") & (table.comes_back == "yes")).any()
    found = table[table.points != ""].astype(dict.fromkeys(("points", "points_low", "points_high"), float))
    assert (found.points_low <= found.points).all() and (found.points <= found.points_high).all()
    shown = found.in_format.astype(float) - found.stored.astype(float)
    assert (shown - found.points).abs().max() < 1e-3


def test_lora_survives_rounding_and_costs_neighbours() -> None:
    table = pd.read_csv(ROOT / "figures" / "tables" / "lora.csv", dtype=str).fillna("")
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert quoted(page, "figures/tables/lora.csv") == real.plain(table).splitlines()
    tried, chosen = table[table.part == "validation"], table[table.part == "the rest"]
    assert len(tried) == 4 and chosen.rate.nunique() == 1 and len(chosen) == 3
    scores = [f"forget MC{form}" for form in ("", " after NF4", " after int4-g64")]
    for _, row in chosen.iterrows():
        stored, nf4, int4 = (float(row[name].split()[0]) for name in scores)
        assert max(nf4, int4) - stored < 5
        assert float(row["near drop, held out"]) > 90


def test_auc_by_hand() -> None:
    assert meta_cad.auc([0.0, 0.5], [0.5, 1.0]) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert meta_cad.auc([1.0], [0.0]) == 0
