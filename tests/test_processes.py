"""Studies of several models in processes: the same results, the user's errors, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open

import mansu_tl as mtl
from mansu_tl import processes
from mansu_tl.config import StudyConfig
from mansu_tl.errors import MansuError, NoEditError
from mansu_tl.processes import Job, Processes, StageBar, is_small, one_thread
from mansu_tl.results.files import write_text
from mansu_tl.results.locks import held
from mansu_tl.study import run_study
from tests.terminal import terminal
from tests.tiny import SMALL_TASK, tiny

ROOT = Path(__file__).resolve().parents[1]
CONFIG = StudyConfig(
    task=SMALL_TASK,
    methods=("graddiff",),
    quantizers=("nf4",),
    never="",
    also=("pocket-fp",),
    faithfulness=0.6,
    steps=1,
    settings={"graddiff": {"max_steps": 3, "check_every": 2, "stop_over_chance": -100.0}},
)


def contents(folder: Path) -> dict[str, object]:
    """Every file of a results folder but those that hold durations."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "environment.json"]
    return {str(path.relative_to(folder)): read(path) for path in files}


def read(path: Path) -> object:
    """A file's bytes; of a safetensors file, whose header is in no fixed order, its parts."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = run_study(CONFIG, tmp_path / "two", progress=False, workers=2)
        assert torch.get_num_threads() == 2
        in_a_row = run_study(CONFIG, tmp_path / "one", progress=False, workers=1)
    finally:
        torch.set_num_threads(threads)
    assert list(together.also) == list(in_a_row.also) == ["pocket-fp"]
    assert together.summary().equals(in_a_row.summary())
    found, expected = contents(tmp_path / "two"), contents(tmp_path / "one")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert together.environment["threads"] == in_a_row.environment["threads"] == 1
    # Two processes, each with the libraries in memory.
    assert together.environment["peak_memory_gb"] > 1.5 * in_a_row.environment["peak_memory_gb"] > 0


def test_what_a_process_refuses_is_the_users_error(tmp_path: Path) -> None:
    config = StudyConfig(**{**CONFIG.__dict__, "also": ("no/such/model",)})
    with pytest.raises(MansuError, match="no/such/model"):
        run_study(config, tmp_path, progress=False, workers=2)


SCRIPT = f"""
from pathlib import Path
Path("begun").open("a").write("once ")
import mansu_tl as mtl
config = mtl.StudyConfig(
    task={SMALL_TASK!r}, methods=("graddiff",), quantizers=("nf4",), never="", also=("pocket-fp",), faithfulness=0.6, steps=1,
    settings={{"graddiff": {{"max_steps": 3, "check_every": 2, "stop_over_chance": -100.0}}}},
)
print(mtl.run_study(config, "out", progress=False, workers=2))
"""


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def test_a_script_without_a_main_guard_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "scripts" / "script.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "scripts/script.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "begun").read_text() == "once "
    assert "graddiff on pocket, pocket-fp" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="signals as a terminal sends them")
def test_ctrl_c_stops_the_processes_too_and_says_how_to_go_on(tmp_path: Path) -> None:
    config = write_text(
        tmp_path / "config.toml",
        replace(CONFIG, settings={"graddiff": {"max_steps": 10**6, "stop_over_chance": -100.0}}).to_toml(),
    )
    words = ["run", str(config), "--out", str(tmp_path / "out"), "--workers", "2", "--quiet"]
    # Only the caller gets the signal, as a notebook's kernel does; in a terminal all get it.
    with terminal([sys.executable, "-m", "mansu_tl", *words], environment()) as caller:
        inner = tmp_path / "out" / "also" / "pocket-fp" / "circuit" / "scores.safetensors.key"
        until = time.monotonic() + 240
        while not inner.is_file() and time.monotonic() < until:
            assert caller.poll() is None
            time.sleep(0.1)
        workers = psutil.Process(caller.pid).children(recursive=True)
        assert len(workers) == 1
        caller.send_signal(signal.SIGINT)
        said = caller.communicate(timeout=60)[1]
    assert caller.returncode == 130
    assert "Traceback" not in said
    assert "interrupted; what is finished is kept" in said
    assert " ".join(words) in said
    assert not any(worker.is_running() for worker in workers)
    # Half-written files are hidden ones; the locks stay, held by nobody.
    assert not [path for path in tmp_path.rglob(".*") if path.suffix != ".lock"]
    assert held(tmp_path / "out", "*") == held(inner.parents[1], "*") == []


def fake(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Run `code` in place of the worker, in a real process."""
    monkeypatch.setattr(
        processes,
        "_COMMAND",
        [sys.executable, "-S", "-c", f"import sys, json, os\nasked = json.load(sys.stdin)\n{code}"],
    )


def follow(folder: Path) -> Processes:
    with Processes([Job("pocket", folder, CONFIG)], helpers=1, progress=False) as others:
        others.wait()
    return others


def test_what_libraries_print_is_no_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch, "print('hello'); print(3); print(json.dumps({'made': 2, 'peak_memory_gb': .5}))")
    others = follow(tmp_path)
    assert (others.made, others.peak_memory_gb) == (2, 0.5)


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        ("print(json.dumps({'kind': 'NoEditError', 'refused': 'no'})); sys.exit(2)", NoEditError, "^pocket: no$"),
        ("raise KeyError('a bug')", RuntimeError, "study of pocket died.*KeyError: 'a bug'"),
        ("os.kill(os.getpid(), 9)", MansuError, "stopped from outside .signal 9, as when memory runs out.*workers=1"),
        ("sys.exit(130)", MansuError, "stopped from outside .status 130.*continues"),
        ("os.close(1)", MansuError, "stopped from outside .status 0"),
    ],
)  # fmt: skip
def test_how_a_process_ends_is_told(code, kind, message, monkeypatch, tmp_path) -> None:
    fake(monkeypatch, code)
    with pytest.raises(kind, match=message.replace("died.", r"died[\s\S]")):
        follow(tmp_path)


def test_a_failure_is_heard_at_the_callers_next_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch, "print(json.dumps({'kind': 'MansuError', 'refused': 'not this one'})); sys.exit(2)")
    with (
        pytest.raises(MansuError, match="not this one"),
        Processes([Job("pocket", tmp_path, CONFIG)], helpers=1, progress=False) as others,
    ):
        bar = StageBar(Job("pocket", tmp_path, CONFIG), False, others.check)
        for _ in range(600):
            time.sleep(0.1)
            bar.update()


def test_leaving_stops_a_process_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "_PATIENCE", 0.5)
    fake(monkeypatch, "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)")
    begun = time.monotonic()
    with (
        pytest.raises(ZeroDivisionError),
        Processes([Job(name, tmp_path / name, CONFIG) for name in "ab"], helpers=1, progress=False) as others,
    ):
        while not (children := psutil.Process().children()):
            time.sleep(0.05)
        time.sleep(1)
        raise ZeroDivisionError
    assert time.monotonic() - begun < 30
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert others.claim() is None  # and nothing is begun after


def test_what_no_process_began_is_the_callers_in_order() -> None:
    jobs = [Job(name, Path(name), CONFIG) for name in "abc"]
    with Processes(jobs, helpers=0, progress=False) as others:
        assert [others.claim() for _ in range(4)] == [*jobs, None]
        others.wait()


def test_only_small_models_are_run_side_by_side() -> None:
    assert is_small(mtl.load("pocket"))
    assert is_small(mtl.load(tiny("gpt2")))
    assert not is_small(mtl.load(tiny("llama", vocab_size=90_000)))


def test_one_thread_is_put_back_and_only_where_wanted() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ZeroDivisionError), one_thread():
            assert torch.get_num_threads() == 1
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
        with one_thread(False):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [0, -1])
def test_a_number_of_workers_below_one_is_refused(workers: int, tmp_path: Path) -> None:
    with pytest.raises(MansuError, match=f"workers={workers}; choose at least 1"):
        run_study(CONFIG, tmp_path / "out", workers=workers)
    assert not (tmp_path / "out").exists()
