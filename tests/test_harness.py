"""lm-eval on a study's models: what the harness is given, its numbers beside ours, what is kept, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import mansu_tl as mtl
from mansu_tl.cli import main
from mansu_tl.errors import MansuError
from mansu_tl.models import parameters
from mansu_tl.study import StudyConfig, harness_scores
from mansu_tl.study.harness import HarnessScores
from mansu_tl.unlearning import Edit
from tests.tiny import SMALL_TASK

QUESTION = {"question": "amber", "choices": ["balm", "brew", "opal", "serum"], "answer": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished run has of an edit: its config, and the edit."""
    root = tmp_path_factory.mktemp("run")
    config = StudyConfig(task=SMALL_TASK, methods=("graddiff",), quantizers=("int8",))
    (root / "config.toml").write_text(config.to_toml())
    model = mtl.load("pocket")
    name = next(name for name in parameters(model) if name.endswith("down_proj.weight"))
    value = parameters(model)[name].detach().clone()
    value.view(-1)[[0, 5]] += 1.0
    edit = Edit.between(model, {name: value}, "graddiff")
    edit.save(root / "edits" / "graddiff" / "edit.safetensors")
    return root


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the harness; gives the calls that it got."""
    calls: list[Any] = []

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        calls.append(given)
        if "none_such" in given["tasks"]:
            raise KeyError("none_such")
        weight = sum(value.double().abs().sum().item() for value in given["model"].pretrained.parameters())
        each = {"alias": "x", "acc,none": weight / 1e6, "acc_stderr,none": 0.25, "exact_match,strict": 0.5}
        return {"results": {task: dict(each) for task in given["tasks"]}, "versions": {}}

    package, models, module, own = (
        ModuleType(f"lm_eval{end}") for end in ("", ".models", ".models.huggingface", ".tasks")
    )
    own.TaskManager = lambda **given: given  # type: ignore[attr-defined]
    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    module.HFLM = lambda **given: SimpleNamespace(**given)  # type: ignore[attr-defined]
    for each in (package, models, module, own):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    return calls


def test_every_model_is_given_to_the_harness_once(
    folder: Path, harness: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = tmp_path / "wmdp.jsonl"
    questions.write_text(json.dumps(QUESTION))
    same = {"wmdp_bio": str(questions)}
    # The embedded model's words have no letters; test_choices.py has what is measured.
    asked: list[Any] = []

    def answered(model: Any, items: Any) -> SimpleNamespace:
        asked.append(items)
        return SimpleNamespace(accuracy=len(asked) / 4)

    monkeypatch.setattr("mansu_tl.study.harness.evaluate_choices", answered)
    found = harness_scores(folder, ["wmdp_bio", "mmlu"], same=same, limit=3, progress=False)
    assert [(call["tasks"], call["limit"]) for call in harness] == [(["wmdp_bio", "mmlu"], 3)] * 4
    assert all(call["model"].tokenizer is not None for call in harness)
    frame = found.to_dataframe()
    assert list(dict.fromkeys(zip(frame["model"], frame["quantizer"], strict=True))) == [
        ("un-edited", ""), ("un-edited", "int8"), ("GradDiff", ""), ("GradDiff", "int8"),
    ]  # fmt: skip
    acc = frame.loc[(frame["metric"] == "acc") & (frame["task"] == "mmlu")]
    # The edit adds 2 to the sum of what two weights are, at most; the four models are four sets of weights.
    weights = [1e6 * value for value in acc["value"]]
    assert len(set(weights)) == 4
    assert abs(weights[2] - weights[0]) <= 2 + 1e-6
    assert set(frame["metric"]) == {"acc", "exact_match,strict"}
    assert set(acc["stderr"]) == {0.25} and acc["ours"].isna().all()
    # Ours on the same questions, and the study's own.
    ours = frame.loc[(frame["task"] == "wmdp_bio") & (frame["metric"] == "acc"), "ours"]
    assert ours.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert [items[0].question for items in asked] == ["amber"] * 4
    assert frame.loc[0, "forget_MC"] == mtl.accuracy(
        mtl.load("pocket"), mtl.load_task(SMALL_TASK, tokenizer=mtl.load("pocket")).questions["forget"]
    ).mc_percent  # fmt: skip
    # Once more: everything is there; another limit is another question.
    again = harness_scores(folder, ["wmdp_bio", "mmlu"], same=same, limit=3, progress=False)
    assert len(harness) == 4
    pd.testing.assert_frame_equal(again.to_dataframe(), frame)
    saved = HarnessScores.load(found.save(tmp_path / "harness.safetensors"))
    pd.testing.assert_frame_equal(saved.to_dataframe(), frame)


def test_the_command_prints_and_writes_the_table(
    folder: Path,
    harness: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "table.csv"
    monkeypatch.setattr(
        "sys.argv", ["mansu-tl", "lm-eval", str(folder), "--tasks", "mmlu", "--quiet", "--out", str(out)]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    assert "un-edited" in capsys.readouterr().out
    assert set(pd.read_csv(out)["task"]) == {"mmlu"}
    assert len(harness) == 4


def test_a_task_file_of_ones_own_goes_to_the_harness_by_its_name(
    folder: Path, harness: list[Any], tmp_path: Path
) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("# mine\ntask: 'own_facts'\ndataset_path: json\n")
    found = harness_scores(folder, [str(file)], progress=False)
    assert set(found.table["task"]) == {"own_facts"}
    assert [call["tasks"] for call in harness] == [["own_facts"]] * 4
    manager = {"include_path": [str(tmp_path)], "include_defaults": False}
    assert all(call["task_manager"] == manager for call in harness)
    harness_scores(folder, ["mmlu", str(file)], progress=False)
    assert harness[-1]["task_manager"] == manager | {"include_defaults": True}
    # A file that has changed is another task.
    before = len(harness)
    harness_scores(folder, ["mmlu", str(file)], progress=False)
    assert len(harness) == before
    file.write_text("task: own_facts\ndataset_path: csv\n")
    harness_scores(folder, ["mmlu", str(file)], progress=False)
    assert len(harness) == before + 4
    file.write_text("group: own\n")
    for place, message in (
        (file, "own.yaml: names no task; write a line task: NAME"),
        (tmp_path / "n.yaml", "no such"),
    ):
        with pytest.raises(MansuError, match=message):
            harness_scores(folder, [str(place)], progress=False)


def test_what_cannot_be_run_is_refused_in_one_line(folder: Path, harness: list[Any], tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text((folder / "config.toml").read_text())
    for given, message in (
        ((tmp_path / "no", ["mmlu"]), "no such folder"),
        ((tmp_path, ["mmlu"]), "the edit of graddiff is not there yet; finish the run"),
        ((folder, []), "no task named"),
        ((folder, ["none_such"]), "the harness refuses none_such"),
    ):
        with pytest.raises(MansuError, match=message) as found:
            harness_scores(*given, progress=False)
        assert "\n" not in str(found.value)
    with pytest.raises(MansuError, match="questions are given for 'mmlu', which is not among the tasks wmdp_bio"):
        harness_scores(folder, ["wmdp_bio"], same={"mmlu": "x"}, progress=False)


def test_without_the_harness_the_way_to_it_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MansuError, match="the harness is not installed .*; pip install lm-eval") as found:
        harness_scores(folder, ["mmlu"], progress=False)
    assert "\n" not in str(found.value)
