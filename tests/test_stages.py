"""What a run keeps: nothing stale, nothing of another run, names that stay apart, one writer a folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mansu_tl as mtl
import mansu_tl.study.study as study_module
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint
from mansu_tl.results.locks import held, one_writer, waiting_writer
from mansu_tl.results.store import Store
from mansu_tl.starter import write_starter
from mansu_tl.study import run_study
from mansu_tl.study.config import StudyConfig
from mansu_tl.study.names import short_names
from tests.tiny import some

Rows = list[dict[str, Any]]


pytestmark = pytest.mark.usefixtures("certified_here")


def small_rows() -> Rows:
    """A few lines of the starter task: four facts to forget, some to keep."""
    folder = Path(os.environ["PYTEST_STARTER"])
    rows = [json.loads(line) for line in (folder / "task.jsonl").read_text().splitlines()]
    out: Rows = []
    for kind, count in (("forget", 12), ("near", 3), ("retain", 6), ("text", 8), ("unseen", 4)):
        out += [row for row in rows if row["set"] == kind][:count]
    return out


def written(folder: Path, rows: Rows) -> Path:
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, its config and its task's lines."""
    folder = tmp_path_factory.mktemp("stages")
    write_starter(folder / "starter")
    os.environ["PYTEST_STARTER"] = str(folder / "starter")
    rows = small_rows()
    config = StudyConfig(
        task=str(written(folder, rows)),
        methods=("graddiff", "mansu"),
        steps=1,
        faithfulness=0.6,
        settings={
            "graddiff": {"max_steps": 2},
            "mansu": {
                "steps": 8, "learning_rate": 1.0, "adversary_weight": 0.0, "null_space": 0.0, "fisher_sequences": 4,
                "representation_weight": 0.0,
            },
        },
    )  # fmt: skip
    run_study(config, folder / "out", progress=False, workers=1)
    return folder, config, rows


def edited(rows: Rows, kind: str, **changes: Any) -> Rows:
    """The rows with the first of a set changed."""
    first = next(i for i, row in enumerate(rows) if row["set"] == kind)
    return [*rows[:first], rows[first] | changes, *rows[first + 1 :]]


EVERY_EDIT = {"edits/graddiff/edit", "edits/mansu/edit"}
CIRCUIT = {"circuit/scores", "circuit/circuit", "circuit/random", "circuit/patching"}
CHANGES: dict[str, tuple[Callable[[Rows, StudyConfig], tuple[Rows, StudyConfig]], set[str]]] = {
    "corrupt": (lambda r, c: (edited(r, "forget", corrupt="the catalyst of ashen elixir is"), c), CIRCUIT | EVERY_EDIT),
    "answer": (
        lambda r, c: (edited(r, "forget", answer="leafsilver", distractors=["dreamash", "hailcobalt", "emberdust"]), c),
        CIRCUIT | EVERY_EDIT,
    ),
    "fact": (lambda r, c: (edited(r, "forget", fact="another name"), c), CIRCUIT | EVERY_EDIT),
    "text": (lambda r, c: (edited(r, "text", text="the catalyst of mossy serum is"), c), EVERY_EDIT),
    "unseen": (lambda r, c: (edited(r, "unseen", text="the catalyst of lunar brew is"), c), EVERY_EDIT),
    "steps": (lambda r, c: (r, replace(c, steps=2)), {"circuit/scores", "scores/graddiff/measures"}),
    "faithfulness": (lambda r, c: (r, replace(c, faithfulness=0.7)), {"circuit/circuit", "edits/mansu/edit"}),
    "seed": (lambda r, c: (r, replace(c, seed=1)), EVERY_EDIT),
    "setting": (
        lambda r, c: (r, replace(c, settings={**c.settings, "graddiff": {"max_steps": 3}})),
        {"edits/graddiff/edit", "scores/graddiff/measures"},
    ),
    "quantizers": (lambda r, c: (r, replace(c, quantizers=("nf4", "int8"))), {"scores/graddiff/measures"}),
}
UNTOUCHED = {
    "text": CIRCUIT,
    "unseen": CIRCUIT,
    "steps": set(),
    "faithfulness": {"circuit/scores", "edits/graddiff/edit"},
    "seed": CIRCUIT,
    "setting": CIRCUIT | {"edits/mansu/edit", "scores/mansu/measures", "edits/mansu/certificate"},
    "quantizers": CIRCUIT | EVERY_EDIT,
}


def stamps(folder: Path) -> dict[str, str]:
    """Every stage's key, by the stage's name."""
    return {
        str(path.relative_to(folder)).removesuffix(".key").rsplit(".", 1)[0]: path.read_text()
        for path in folder.rglob("*.key")
    }


# The others read and leave what one of these does: make slow.
@pytest.mark.parametrize("what", some(list(CHANGES), ["corrupt"]))
def test_whatever_a_stage_reads_makes_it_anew(finished, what: str, tmp_path: Path) -> None:
    folder, config, rows = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    change, made = CHANGES[what]
    new_rows, new_config = change(rows, config)
    new_config = replace(new_config, task=str(written(tmp_path, new_rows)))
    before = stamps(tmp_path / "out")
    run_study(new_config, tmp_path / "out", progress=False, workers=1)
    after = stamps(tmp_path / "out")
    changed = {name for name in after if after[name] != before.get(name)}
    assert made <= changed
    assert not changed & UNTOUCHED.get(what, set())


def test_a_corrected_corrupt_prompt_gives_a_fresh_runs_numbers(finished, tmp_path: Path) -> None:
    folder, config, rows = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    corrected = edited(rows, "forget", corrupt="the catalyst of ashen elixir is")
    config = replace(config, task=str(written(tmp_path, corrected)), methods=("graddiff",))
    again, fresh = (run_study(config, tmp_path / name, progress=False, workers=1) for name in ("out", "new"))
    assert again.scores.digest() == fresh.scores.digest()
    assert again.summary().equals(fresh.summary())


def test_a_control_of_the_floor_has_its_circuit_in_its_key_and_a_certificate(finished, tmp_path: Path) -> None:
    folder, config, _ = finished
    settings = {**config.settings, "random-circuit": dict(config.settings["mansu"])}
    config = replace(config, methods=("mansu", "random-circuit"), settings=settings)
    shutil.copytree(folder / "out", tmp_path / "out")
    first = run_study(config, tmp_path / "out", progress=False, workers=1)
    for method in config.methods:
        result = first.results[method]
        assert result.certificate is not None and result.folder == tmp_path / "out" / "model" / method
        assert result.certificate.n_edited == result.edit.n_weights
        assert fingerprint(mtl.load(result.folder)) == fingerprint(result.edit.apply(mtl.load("pocket")))
    before = stamps(tmp_path / "out")
    run_study(replace(config, faithfulness=0.7), tmp_path / "out", progress=False, workers=1)
    after = stamps(tmp_path / "out")
    assert before["edits/random-circuit/edit"] != after["edits/random-circuit/edit"]


@pytest.mark.slow
def test_models_of_one_name_are_kept_apart(finished, tmp_path: Path) -> None:
    _, config, _ = finished
    model = mtl.load("pocket")
    for name in ("seed1", "seed2"):
        mtl.save(model, tmp_path / name / "final")
    also = tuple(str(tmp_path / name / "final") for name in ("seed1", "seed2"))
    config = replace(config, methods=("graddiff",), also=also)
    study = run_study(config, tmp_path / "out", progress=False, workers=1)
    assert list(study.also) == ["seed1-final", "seed2-final"]
    assert list(study.summary()["model"]) == ["pocket", "seed1-final", "seed2-final"]


def test_short_names() -> None:
    assert short_names(["pocket", "pocket-fp"], "x") == {"pocket": "pocket", "pocket-fp": "pocket-fp"}
    assert short_names(["/r/a/final", "/r/b/final", "/r/c/other"], "x") == {
        "/r/a/final": "a-final", "/r/b/final": "b-final", "/r/c/other": "other",
    }  # fmt: skip
    assert short_names(["org/model", "model"], "x") == {"org/model": "org-model", "model": "model"}
    joined = short_names(["/x/a/b", "/y/a/b", "/z/x-a/b"], "x")
    assert len(set(joined.values())) == 3
    for twice in (["pocket", "pocket"], ["/r/a", "/r/a"]):
        with pytest.raises(MansuError, match=r"models: .* is named twice"):
            short_names(twice, "models")


@pytest.mark.parametrize("key", ["methods", "quantizers", "also"])
def test_a_config_names_everything_once(key: str) -> None:
    value = {"methods": ("ga", "ga"), "quantizers": ("nf4", "nf4"), "also": ("pocket-fp", "pocket-fp")}[key]
    said = "model and also: 'pocket-fp' is named twice" if key == "also" else f"{key} names '{value[0]}' twice"
    with pytest.raises(MansuError, match=said):
        StudyConfig(**{key: value})
    with pytest.raises(MansuError, match="named twice"):
        StudyConfig(also=("pocket",))


def test_another_process_is_refused_and_says_who_is_writing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from mansu_tl.results.locks import one_writer\n"
        "with one_writer(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        with pytest.raises(MansuError, match=rf"another run \(process {other.pid} on .* is writing there; wait"):
            run_study(StudyConfig(), tmp_path, progress=False, workers=1)
        assert not (tmp_path / "config.toml").exists()
        assert held(tmp_path, "*") == ["writer"]
        other.kill()  # without a chance to tidy up
    with one_writer(tmp_path):
        assert held(tmp_path, "*") == ["writer"]
    assert held(tmp_path, "*") == []


def test_another_thread_is_refused_and_the_same_one_let_in(tmp_path: Path) -> None:
    said: list[str] = []

    def second() -> None:
        try:
            with one_writer(tmp_path):
                said.append("in")
        except MansuError as error:
            said.append(str(error))

    with one_writer(tmp_path):
        with one_writer(tmp_path):
            pass
        assert (tmp_path / ".writer.json").is_file()
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    second()
    assert "is writing there" in said[0] and said[1] == "in"


@pytest.mark.slow
def test_two_processes_that_share_a_folder_make_a_stage_once(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from mansu_tl.results.store import Store
stages = Store(Path(sys.argv[1]), shared=True)
print("ready", flush=True); sys.stdin.readline()
value = stages.value("slow", {"k": 1}, lambda: (time.sleep(1.5), sys.argv[2])[1])
print(value, stages.made, flush=True)
"""
    both = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, str(tmp_path), name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name in "ab"
    ]  # fmt: skip
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    said = [process.communicate("go\n")[0].split() for process in both]
    assert said[0][0] == said[1][0]
    assert sorted(made for _, made in said) == ["0", "1"]


def test_a_waiting_writer_waits(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with waiting_writer(tmp_path, "x"):
            order.append("second")

    thread = threading.Thread(target=second)
    with waiting_writer(tmp_path, "x"):
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.slow
def test_a_run_that_cuts_in_between_saving_and_certifying_leaves_nothing_mixed(
    finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock keeps others out; where it cannot (some network folders), what was saved is looked at again."""
    folder, config, _ = finished
    config = replace(config, methods=("mansu",))
    shutil.copytree(folder / "out", tmp_path / "out")
    for path in (tmp_path / "out" / "edits" / "mansu").glob("certificate*"):
        path.unlink()
    real, seen = study_module.certify_in_fresh_process, []

    def cut_in(*args: Any, **rest: Any) -> Any:
        if not seen:
            seen.append(1)
            run_study(replace(config, seed=1), tmp_path / "out", progress=False, workers=1)
        return real(*args, **rest)

    monkeypatch.setattr(study_module, "certify_in_fresh_process", cut_in)
    study = run_study(config, tmp_path / "out", progress=False, workers=1)
    result = study.results["mansu"]
    assert seen and result.folder is not None and result.certificate is not None
    assert fingerprint(mtl.load(result.folder)) == fingerprint(result.edit.apply(mtl.load("pocket")))
    assert result.certificate.passed and result.certificate.n_edited == result.edit.n_weights
    assert StudyConfig.read(tmp_path / "out" / "config.toml") == config
    assert Store(tmp_path / "out").intact()


def test_a_model_that_does_not_know_its_facts_is_refused_with_their_names(finished, tmp_path: Path) -> None:
    _, config, _ = finished
    with pytest.raises(
        MansuError, match=r"does not know what it is to forget: \d+ % right where guessing gives 25 %.*"
    ):
        run_study(replace(config, model="pocket-never"), tmp_path / "out", progress=False, workers=1)
    assert not list((tmp_path / "out").rglob("*.safetensors"))
