"""The whole road in one run: results folder, resuming, report, command line, and what a user can get wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from pandas.io.formats.style import Styler
from transformers import AutoModelForCausalLM

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.cli import main
from mansu_tl.errors import MansuError
from mansu_tl.explorer import Explorer, ExplorerServer, open_results
from mansu_tl.models import parameters
from mansu_tl.study import run_study
from mansu_tl.study.config import StudyConfig
from mansu_tl.study.further import Further, further_of
from mansu_tl.study.report import study_figures, write_study_report
from mansu_tl.unlearning import Edit
from mansu_tl.verification import DepthReader, Relearning, RelearningCurve, Scorecard, SideBySide
from tests.browser import opened
from tests.tiny import SMALL_TASK

STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "models" / "stories260K"

CONFIG = StudyConfig(
    task=SMALL_TASK,
    methods=("mansu", "graddiff"),
    never="pocket-never",
    faithfulness=0.6,
    steps=2,
    settings={
        "mansu": {"steps": 12, "learning_rate": 0.5, "fisher_sequences": 8},
        "graddiff": {"max_steps": 4, "check_every": 2, "stop_over_chance": -100.0},
    },
)


@pytest.fixture(scope="module")
def study(tmp_path_factory, certified_here):
    return run_study(CONFIG, tmp_path_factory.mktemp("study"), progress=False, workers=1)


def test_the_results_folder_holds_what_the_design_names(study) -> None:
    for name in (
        "config.toml", "environment.json", "circuit/scores.safetensors", "circuit/circuit.safetensors",
        "edits/mansu/edit.safetensors", "edits/graddiff/edit.safetensors", "scores/summary.csv",
        "scores/mansu/scorecard.csv", "scores/mansu/updates.csv", "model/mansu/model.safetensors",
        "edits/mansu/certificate.json",
    ):  # fmt: skip
        assert (study.folder / name).is_file(), name
    environment = json.loads((study.folder / "environment.json").read_text())
    assert environment["seed"] == 0
    assert environment["versions"]["torch"] == torch.__version__
    assert StudyConfig.read(study.folder / "config.toml") == CONFIG
    assert not list(study.folder.rglob("*.tmp"))


def test_the_saved_model_is_the_edited_one_and_its_certificate_holds(study) -> None:
    result = study.results["mansu"]
    edited = result.edit.apply(mtl.load("pocket"))
    saved = AutoModelForCausalLM.from_pretrained(study.folder / "model" / "mansu")
    for name, value in saved.named_parameters():
        assert torch.equal(value, parameters(edited)[name]), name
    assert result.certificate.passed
    assert result.certificate.n_edited == result.edit.n_weights
    assert result.certificate.edited_codes_changed_share == 1
    assert result.certificate.unedited_codes_changed == 0


def test_results_on_disk_are_the_results_in_memory(study) -> None:
    assert Circuit.load(study.folder / "circuit" / "circuit.safetensors").edges == study.circuit.edges
    assert (
        Edit.load(study.folder / "edits/graddiff/edit.safetensors").n_weights
        == study.results["graddiff"].edit.n_weights
    )
    assert Scorecard.load(study.folder / "scores/mansu/scorecard.safetensors") == study.results["mansu"].card
    assert set(study.results["mansu"].divergences) == {"", "nf4"}
    assert len(study.references) == 3
    assert study.references["never trained on it"].interval[0] > 0.8
    assert all(abs(d.value) < 0.1 for title, d in study.references.items() if "never" not in title)


def test_a_finished_run_is_read_back_and_a_changed_one_redone(study, monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = {p: p.stat().st_mtime_ns for p in study.folder.rglob("*.safetensors")}
    again = run_study(CONFIG, study.folder, progress=False)
    assert {p: p.stat().st_mtime_ns for p in study.folder.rglob("*.safetensors")} == stamps
    assert again.summary().equals(study.summary())
    # Half-written results have no key, so they are made again.
    target = study.folder / "edits/graddiff/edit.safetensors"
    target.with_name(target.name + ".key").unlink()
    target.write_bytes(b"cut off")
    run_study(CONFIG, study.folder, progress=False)
    assert Edit.load(target).n_weights == study.results["graddiff"].edit.n_weights


def test_the_report_opens_alone_and_says_what_is_in_the_study(study) -> None:
    path = write_study_report(study)
    page = path.read_text(encoding="utf-8")
    assert page.count("plotly.js v") == 1
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']https?:", page)
    figures = study_figures(study)
    assert {"circuit_stages", "edges_before_after", "divergence", "ruler", "certificate", "scorecard"} <= set(figures)
    assert figures["ruler"].data
    tables = [name for name, each in figures.items() if isinstance(each, Styler)]
    assert sorted(tables) == ["certificate", "scorecard"]
    assert page.count('class="plotly-graph-div"') == len(figures) - len(tables)
    assert f"{study.circuit.n_edges} of {int(study.scores.exists.sum())} edges" in page
    assert study.environment["versions"]["transformer-lens"] in page


def test_the_report_says_what_the_models_say_and_whether_they_were_attacked(study) -> None:
    page = write_study_report(study).read_text(encoding="utf-8")
    assert "No attack was run" in page
    assert "passes every row of" not in page
    curve = RelearningCurve(
        "MANSU",
        "split 0",
        "facts",
        1e-3,
        0,
        (0, 50),
        torch.ones(3, 2, 2),
        torch.zeros(3, 2, 2),
        torch.zeros(2),
        ("a", "b"),
    )
    attack = Relearning((curve, replace(curve, label="never trained")), "never trained")
    said = SideBySide(("the catalyst of amber balm is",), ("original", "MANSU"), (("dreamash", "glowsand"),))
    page = write_study_report(study, further=Further(said, attack)).read_text(encoding="utf-8")
    assert "No attack was run" not in page
    assert "after 50 steps on some of the facts at a learning rate of 0.001" in page
    assert "MANSU 100 %, never trained 100 %" in page
    assert "glowsand" in page
    assert "the catalyst of amber balm is" in page


@pytest.mark.slow
def test_what_the_demo_adds_is_kept_and_read_again(study) -> None:
    found = further_of(study, progress=False)
    assert found.answers.models == ("original", "GradDiff", "GradDiff, nf4", "MANSU", "MANSU, nf4")
    assert {curve.label for curve in found.relearning.curves} == {"GradDiff", "MANSU", "never trained"}
    again = further_of(study, progress=False)
    assert (again.answers, again.relearning.digest()) == (found.answers, found.relearning.digest())


def test_the_report_opens_in_a_browser_without_a_network_or_a_complaint(study) -> None:
    with opened(write_study_report(study)) as tab:
        plots = sum(not isinstance(each, Styler) for each in study_figures(study).values())
        tab.page.wait_for_function(
            "n => document.querySelectorAll('.plotly-graph-div .main-svg').length >= n", arg=plots
        )
        trace = tab.page.evaluate(
            "document.querySelector('#figure-3').data.findIndex(t => t.customdata && t.customdata.length)"
        )
        assert re.search(r"score [−]?\d", tab.hover("#figure-3", trace, 0))
        assert (tab.errors, tab.dialogs, tab.requests) == ([], [], [])


def test_a_finished_study_can_be_explored(study) -> None:
    explorer = Explorer.of_study(study)
    assert list(explorer.results.edits) == ["mansu", "graddiff"]
    circuit = explorer.results.circuit(explorer.selection.size)
    assert circuit.edges == study.circuit.edges
    assert circuit.faithfulness == pytest.approx(study.circuit.faithfulness, abs=1e-5)
    found = explorer.results.divergence(("mansu", "nf4"), explorer.selection.size, None)
    assert found.value == pytest.approx(study.results["mansu"].divergences["nf4"].value, abs=1e-4)


def test_a_results_folder_is_explored_from_its_files(study, tmp_path, monkeypatch, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in study.folder.rglob("*") if path.is_file()}
    explorer = open_results(study.folder)
    assert explorer.results.circuit(explorer.selection.size).digest() == study.circuit.digest()
    for method, result in study.results.items():
        for name, found in result.divergences.items():
            shown = explorer.results.divergence((method, name), explorer.selection.size, None)
            assert shown.digest() == found.digest()
    assert before == {path: path.stat().st_mtime_ns for path in study.folder.rglob("*") if path.is_file()}
    (tmp_path / "config.toml").write_text(study.config.to_toml(), encoding="utf-8")
    with pytest.raises(MansuError, match=r"no circuit/scores.safetensors in it, so its run is not finished"):
        open_results(tmp_path)
    with pytest.raises(MansuError, match=r"nothing: no such folder"):
        open_results(tmp_path / "nothing")
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "audit.json").write_text("{}", encoding="utf-8")
    with pytest.raises(MansuError, match=r"the --out of an audit.*its page is .*report.html.*mtl.explore\(model"):
        open_results(tmp_path / "audit")

    def interrupted(server: ExplorerServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ExplorerServer, "serve_forever", interrupted)
    assert cli(monkeypatch, "explore", str(study.folder), "--no-browser") == 0
    assert re.search(r"http://127\.0\.0\.1:\d+/\?token=\S{20,}\n.*\n\nexplorer ended", capsys.readouterr().out)
    assert cli(monkeypatch, "explore", str(study.folder), "--no-browser", "--port", "99999") == 2


def test_cad_by_depth_of_a_results_folder_is_found(study, tmp_path) -> None:
    model = mtl.load(study.config.model)
    pairs = mtl.load_task(study.config.task, tokenizer=model).forget_pairs
    found = DepthReader(model, pairs[:4], pairs[:4], steps=1).read(model, label="itself")
    folder = tmp_path / "run"
    shutil.copytree(study.folder, folder, ignore=shutil.ignore_patterns("model", "*.html"))
    found.save(folder / "scores" / "depth.safetensors")
    kept = {each.digest() for result in study.results.values() for each in result.depths.values()}
    assert {each.digest() for each in open_results(folder).depth} == kept | {found.digest()}


@pytest.mark.slow
def test_a_study_runs_on_a_table(tmp_path, monkeypatch) -> None:
    """The same rows as CSV are the same task, and run as well."""
    rows = [json.loads(line) for line in Path(SMALL_TASK).read_text(encoding="utf-8").splitlines()]
    pd.DataFrame(rows).to_csv(tmp_path / "task.csv", index=False)
    config = tmp_path / "c.toml"
    config.write_text(
        'model = "pocket"\ntask = "task.csv"\nmethods = ["graddiff"]\nsteps = 1\nfaithfulness = 0.5\n'
        "[graddiff]\nmax_steps = 2\ncheck_every = 2\n",
        encoding="utf-8",
    )
    places = StudyConfig.read(config).task, SMALL_TASK
    by_csv, by_json = (mtl.load_task(place, tokenizer=mtl.load("pocket")).questions for place in places)
    assert {name: asked.digest() for name, asked in by_csv.items()} == {k: v.digest() for k, v in by_json.items()}
    assert cli(monkeypatch, "run", str(config), "--out", str(tmp_path / "out"), "--workers", "1", "--quiet") == 0
    assert (tmp_path / "out" / "report.html").is_file()


def cli(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mansu-tl", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0


def test_the_command_line_reports_a_finished_folder(study, monkeypatch, capsys) -> None:
    assert cli(monkeypatch, "report", str(study.folder)) == 0
    out = capsys.readouterr().out
    assert str(study.folder / "report.html") in out
    assert "graddiff" in out


def test_version_in_a_fresh_process() -> None:
    command = [
        sys.executable,
        "-c",
        "from mansu_tl.cli import main; import sys; sys.argv=['mansu-tl','--version']; main()",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 0
    assert done.stdout.strip() == f"mansu-tl {mtl.__version__}"
    assert "Traceback" not in done.stderr
    assert "gemm_4bit" not in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle = 'pocket'", "unknown key 'modle'; known keys are .*did you mean 'model'"),
        ("methods = ['manzu']", "method 'manzu': unknown; choose one of .*did you mean 'mansu'"),
        ("quantizers = ['nf3']", "nf3"),
        ("seed = 'one'", "seed = 'one' should be a whole number"),
        ("methods = []", "methods is empty"),
        ("faithfulness = 2.0", "faithfulness=2.0"),
        ("[mansu]\nbudgett = 1", "unknown setting 'budgett'.*did you mean 'budget'"),
        ("model = ", "not TOML"),
        ("model = 'no/such/folder/at/all'", "no/such/folder"),
        ("model = './nowhere'", "nowhere"),
        ("task = 'nowhere.jsonl'", "no such task file"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(text, message, tmp_path, monkeypatch, capsys) -> None:
    config = tmp_path / "c.toml"
    config.write_text(text)
    assert cli(monkeypatch, "run", str(config), "--out", str(tmp_path / "out"), "--quiet") == 2
    err = capsys.readouterr().err.strip()
    assert re.search(message, err), err
    assert err.count("\n") == 0
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, capsys) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert cli(monkeypatch, "demo", "--out", str(blocked / "demo"), "--quiet") == 2
    assert "cannot write there" in capsys.readouterr().err
    assert cli(monkeypatch, "report", str(tmp_path)) == 2
    assert "no results folder" in capsys.readouterr().err
    with pytest.raises(MansuError, match="no such config file"):
        StudyConfig.read(tmp_path / "nothing.toml")


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no pretrained story model at {STORIES}")
@pytest.mark.slow
def test_real_input_a_pretrained_story_model(tmp_path: Path) -> None:
    source = Path(__file__).resolve().parents[1] / "notebooks" / "stories260k"
    full = StudyConfig.read(source / "pronouns.toml")
    quick = StudyConfig(
        model=str(STORIES),
        task=full.task,
        methods=("mansu",),
        settings={"mansu": {"steps": 30, "fisher_sequences": 16}},
    )
    study = run_study(quick, tmp_path, progress=False, workers=1)
    result = study.results["mansu"]
    card = result.card
    row = next(r for r in card.rows if r.measure == "forget MC, %" and r.quantizer == "")
    assert row.control == 100.0  # the model knows every forget pronoun before the edit
    assert row.value < 100.0
    assert result.certificate.passed
    assert study.circuit.faithfulness >= 0.85
    assert write_study_report(study).stat().st_size > 1_000_000
