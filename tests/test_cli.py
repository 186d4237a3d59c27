"""The command line: a first task that runs as it stands, checks before the work, the documentation's own example, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

import mansu_tl as mtl
from mansu_tl.checking import check_study
from mansu_tl.cli import main
from mansu_tl.data.sources import sources
from mansu_tl.errors import MansuError
from mansu_tl.starter import write_starter
from mansu_tl.study.config import StudyConfig
from tests.terminal import terminal

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"


def cli(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mansu-tl", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0


def test_a_first_task_is_written_and_checked(tmp_path: Path, monkeypatch, capsys) -> None:
    assert cli(monkeypatch, "new", str(tmp_path / "mine")) == 0
    assert cli(monkeypatch, "check", str(tmp_path / "mine" / "config.toml")) == 0
    assert "148 lines: forget 24 + 12 held out, retain 24, near 12, text 60, unseen 16" in capsys.readouterr().out
    with pytest.raises(MansuError, match=r"config\.toml: is there already"):
        write_starter(tmp_path / "mine")


@pytest.mark.slow
def test_a_first_task_runs_as_it_stands(tmp_path: Path, monkeypatch, capsys) -> None:
    assert cli(monkeypatch, "new", str(tmp_path / "mine")) == 0
    commands = [line.strip().split() for line in capsys.readouterr().out.splitlines() if line.startswith("  mansu-tl")]
    assert [words[1] for words in commands] == ["check", "run"]
    assert cli(monkeypatch, *commands[0][1:]) == 0
    assert cli(monkeypatch, *commands[1][1:], "--quiet") == 0
    said = capsys.readouterr().out
    assert (tmp_path / "mine" / "results" / "report.html").is_file()
    # The table's verdict comes with the rows that made it.
    assert re.search(r"GradDiff on pocket fails \d+ of \d+ rows: .* is .*, asked ", said)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_pages_config_and_task_run_as_they_stand(tmp_path: Path, monkeypatch, capsys) -> None:
    config = next(block for block in blocks("toml") if "task =" in block)
    task = next(block for block in blocks("json") if '"set"' in block)
    (tmp_path / "CONFIG.toml").write_text(config, encoding="utf-8")
    (tmp_path / task_name(config)).write_text(task, encoding="utf-8")
    assert cli(monkeypatch, "run", str(tmp_path / "CONFIG.toml"), "--out", str(tmp_path / "out"), "--quiet") == 0
    said = capsys.readouterr()
    assert "report: " in said.out
    assert "fewer than ten" in said.err


def task_name(config: str) -> str:
    found = re.search(r'^task = "(.+?)"', config, re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def starter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("starter")
    write_starter(folder)
    return folder


def changed(starter: Path, folder: Path, config: dict[str, str] | None = None, **sets: int) -> Path:
    """The starter's files with lines of the config replaced and only so many lines of some sets."""
    rows = [json.loads(line) for line in (starter / "task.jsonl").read_text().splitlines()]
    kept = [
        row for i, row in enumerate(rows) if sum(r["set"] == row["set"] for r in rows[:i]) < sets.get(row["set"], 999)
    ]
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    text = (starter / "config.toml").read_text()
    for old, new in (config or {}).items():
        assert old in text
        text = text.replace(old, new)
    (folder / "config.toml").write_text(text)
    return folder / "config.toml"


WRONG = [
    ({'model = "pocket" ': 'model = "pocket-never" '}, {}, "does not know what it is to forget.*amber balm / catalyst"),
    ({'task = "task.jsonl"': 'task = "tsk.jsonl"'}, {}, "no such"),
    ({'never = "pocket-never"': 'never = "./nowhere"'}, {}, "nowhere"),
    ({"adversary_weight = 0.0 ": "adversary_facts = 12 "}, {}, "adversary_facts=12 of 12 forget facts leaves none"),
    ({"representation_weight = 0.0": "representation_weight = 1.0"}, {"unseen": 1}, "one never-seen prompt has no spread"),
    ({"margin = 0.1": "budget = 1e-9"}, {}, "budget=1e-09 of 688128 weights leaves nothing"),
    ({"margin = 0.1": "quantizer = 'gptq-int4-g64'"}, {}, "gptq-int4-g64"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "sets", "message"), WRONG)
def test_what_would_stop_a_study_is_said_before_it_starts(
    config, sets, message, starter: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    path = changed(starter, tmp_path, config, **sets)
    assert cli(monkeypatch, "check", str(path)) == 2
    assert re.search(rf"  wrong  .*{message}", capsys.readouterr().err)
    if message == WRONG[0][2]:  # it asks the same check
        assert cli(monkeypatch, "run", str(path), "--out", str(tmp_path / "out"), "--quiet") == 2
        assert not list(tmp_path.glob("out/**/*.safetensors"))


def test_warnings_do_not_stop_a_study(starter: Path, tmp_path: Path) -> None:
    path = changed(starter, tmp_path, {"margin = 0.1": "null_space = 4.0"}, text=12, retain=8, near=4)
    found = check_study(StudyConfig.read(path))
    assert found.passed
    warned = [finding.detail for finding in found.findings if finding.state == "warning"]
    assert any("the widest matrix has 320 inputs" in detail for detail in warned)
    assert any("near: 4 facts" in detail for detail in warned)
    assert f"{len(warned)} warning" in repr(found)
    found.require()


def test_a_config_without_a_task_on_another_model_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "c.toml").write_text("model = 'some/folder'\n")
    for command in (["check"], ["run", "--out", str(tmp_path / "out")]):
        assert cli(monkeypatch, command[0], str(tmp_path / "c.toml"), *command[1:]) == 2
        assert "'some/folder' without a task" in capsys.readouterr().err
    assert StudyConfig.read(_written(tmp_path / "d.toml", "model = 'pocket-fp'\n")).task == "pocket"


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_ctrl_c_is_status_130_and_says_how_to_go_on(tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(*args: object, **rest: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mansu_tl.cli.run_study", interrupted)
    write_starter(tmp_path)
    words = ["run", str(tmp_path / "config.toml"), "--out", str(tmp_path / "out"), "--quiet"]
    assert cli(monkeypatch, *words) == 130
    said = capsys.readouterr().err
    assert "interrupted; what is finished is kept" in said and " ".join(words) in said


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(starter: Path, tmp_path: Path) -> None:
    path = changed(starter, tmp_path, {"steps = 60": "steps = 100000"})
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "mansu_tl",
        "run",
        str(path),
        "--out",
        str(tmp_path / "out"),
        "--quiet",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with terminal(command, environment) as run:
        # The first stages are there, and the edit that will never end is being made.
        deadline = time.monotonic() + 300
        while not (tmp_path / "out/scores/references/never.safetensors.key").is_file():
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(1.0)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "interrupted; what is finished is kept" in said and f"run {path} --out {tmp_path / 'out'} --quiet" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.parametrize(
    ("command", "names", "line"),
    [
        ("methods", mtl.unlearning.methods(), r"mansu +MANSU, takes the circuit, claims the floor"),
        (
            "quantizers",
            ("quantizer", *mtl.quantization.quantizer_table()["quantizer"]),
            r"w4a16-g128 +4 +128 +absmax / 7.5.* +vLLM, .* +fixed cells: can be floored and counted",
        ),
        ("sources", sources(), r"jsonl +\S.*"),
    ],
)
def test_what_there_is_is_listed_one_a_line(
    command: str, names: tuple[str, ...], line: str, monkeypatch, capsys
) -> None:
    assert cli(monkeypatch, command) == 0
    said = capsys.readouterr().out.splitlines()
    assert [each.split()[0] for each in said] == list(names)
    assert any(re.fullmatch(line, each) for each in said)
    assert all(len(each.split(maxsplit=1)) == 2 for each in said)
