"""Cells in processes and on Ray: the same results, the user's errors, a killed worker, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from multiprocessing import popen_fork
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open

import mansu_tl as mtl
from mansu_tl.errors import MansuError, NoEditError
from mansu_tl.results.files import write_text
from mansu_tl.results.locks import held
from mansu_tl.study import engines
from mansu_tl.study.config import StudyConfig
from mansu_tl.study.engines import LocalProcesses, Ray, compute, engine_for, is_small, one_thread, require_engine
from mansu_tl.study.run import run_study
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
    """Every file of a results folder but those that hold durations and the locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): read(path) for path in files if not durations(path)}


def durations(path: Path) -> bool:
    return path.name == "environment.json" or path.name.startswith("measures.")


def read(path: Path) -> object:
    """A file's bytes; of a safetensors file, whose header is in no fixed order, its parts."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        in_a_row = run_study(CONFIG, tmp_path / "one", progress=False, workers=1)
        # What the processes did is read from their files, and nothing is done again here.
        monkeypatch.setattr("mansu_tl.study.bench.unlearn", None)
        monkeypatch.setattr("mansu_tl.study.bench.edge_attribution", None)
        together = run_study(CONFIG, tmp_path / "two", progress=False, workers=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert list(together.also) == list(in_a_row.also) == ["pocket-fp"]
    assert together.summary().equals(in_a_row.summary())
    timed = together.table["measure"] == "seconds, measuring"
    assert together.table[~timed].equals(in_a_row.table[~timed])
    found, expected = contents(tmp_path / "two"), contents(tmp_path / "one")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert together.environment["threads"] == in_a_row.environment["threads"] == 1
    # Two processes, each with the libraries in memory.
    assert together.environment["peak_memory_gb"] > 1.5 * in_a_row.environment["peak_memory_gb"] > 0


def test_what_a_model_refuses_is_the_users_error(tmp_path: Path) -> None:
    config = StudyConfig(**{**CONFIG.__dict__, "also": ("no/such/model",)})
    with pytest.raises(MansuError, match="no/such/model"):
        run_study(config, tmp_path, progress=False, workers=2)


SCRIPT = f"""
from pathlib import Path
Path("begun").open("a").write("once ")
import mansu_tl as mtl
config = mtl.study.StudyConfig(
    task={SMALL_TASK!r}, methods=("graddiff",), quantizers=("nf4",), never="", faithfulness=0.6, steps=1,
    settings={{"graddiff": {{"max_steps": 3, "check_every": 2, "stop_over_chance": -100.0}}}},
)
print(mtl.run_study(config, "out", progress=False, workers=2))
"""


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_script_without_a_main_guard_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "scripts" / "script.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "scripts/script.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "begun").read_text() == "once "
    assert "graddiff on pocket" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
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
        beside = psutil.Process(caller.pid).children(recursive=True)
        trackers = {process.pid for process in beside if "resource_tracker" in " ".join(process.cmdline())}
        caller.send_signal(signal.SIGINT)
        said = caller.communicate(timeout=60)[1]
    assert caller.returncode == 130
    assert "Traceback" not in said
    assert "interrupted; what is finished is kept" in said
    assert " ".join(words) in said
    # The workers end before the caller does; Python's own tracker of shared resources notices a moment later.
    workers = [process for process in beside if process.pid not in trackers]
    assert len(workers) == 2 and not any(alive(process) for process in workers)
    until = time.monotonic() + 10
    while any(alive(process) for process in beside) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(alive(process) for process in beside)
    # Half-written files are hidden ones; the locks stay, held by nobody.
    hidden = [path for path in tmp_path.rglob(".*") if path.suffix != ".lock" and path.name != ".locks"]
    assert not hidden
    assert held(tmp_path / "out", "*") == []


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def cell(folder: Path, name: str) -> str:
    """A piece of work: it says that it has begun, and does what its name says."""
    (folder / name).open("a").write(f"{os.getpid()} ")
    if name == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if name == "refuses":
        raise NoEditError("not this one")
    if name == "breaks":
        raise KeyError("a bug")
    first = len((folder / name).read_text().split()) == 1
    if name == "dies" or (name == "dies once" and first):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    return name.upper()


def test_one_process_does_many_cells_and_what_one_raises_is_raised_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="a bug"):
        compute(LocalProcesses(1), partial(cell, tmp_path), ["a", "b", "breaks", "c"])
    pids = {int(path.read_text()) for path in tmp_path.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} >= {"a", "b", "breaks"}
    assert len(pids) == 1 and pids != {os.getpid()}
    assert not psutil.pid_exists(pids.pop())


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers by fork, which begin with the libraries in memory: what is done when they die is the same."""
    monkeypatch.setattr(engines._Worker, "_Popen", staticmethod(popen_fork.Popen))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.skipif(os.name != "posix", reason="fork and SIGKILL")
def test_a_killed_worker_loses_one_cell_and_a_cell_that_is_lost_twice_is_told(forked, tmp_path: Path) -> None:
    message = "^dies: the process was stopped from outside, twice.*goes on.*workers=1"
    with pytest.raises(MansuError, match=message):
        compute(LocalProcesses(2), partial(cell, tmp_path), ["dies once", "a", "dies", "b"])
    begun = {path.name: len(path.read_text().split()) for path in tmp_path.iterdir()}
    assert begun == {"dies once": 2, "a": 1, "dies": 2, "b": 1}


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.skipif(os.name != "posix", reason="fork")
def test_a_refusal_stops_a_process_that_hangs(forked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engines, "_PATIENCE", 0.5)
    begun = time.monotonic()
    with pytest.raises(NoEditError, match="^not this one$"):
        compute(LocalProcesses(2), partial(after, tmp_path, "hangs"), ["hangs", "refuses"])
    assert time.monotonic() - begun < 120
    assert not psutil.pid_exists(int((tmp_path / "hangs").read_text()))


def after(folder: Path, first: str, name: str) -> str:
    """The work, begun when another one is."""
    while name != first and not (folder / first).exists():
        time.sleep(0.1)
    return cell(folder, name)


@pytest.mark.slow
def test_a_worker_whose_caller_is_killed_ends(tmp_path: Path) -> None:
    code = (
        "import sys; from functools import partial; from pathlib import Path; from tests.test_processes import cell\n"
        "from mansu_tl.study.engines import LocalProcesses, compute\n"
        "compute(LocalProcesses(1), partial(cell, Path(sys.argv[1])), ['hangs'])"
    )
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], env=environment(), cwd=ROOT
    ) as run:
        until = time.monotonic() + 120
        while not (tmp_path / "hangs").exists() and time.monotonic() < until:
            assert run.poll() is None
            time.sleep(0.1)
        worker = int((tmp_path / "hangs").read_text())
        run.kill()
    until = time.monotonic() + 30
    while psutil.pid_exists(worker) and time.monotonic() < until:
        time.sleep(0.1)
    assert not psutil.pid_exists(worker)


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine with two workers."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'mansu-tl[ray]'")
    runtime = {"env_vars": {"PYTHONPATH": environment()["PYTHONPATH"]}}
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, runtime_env=runtime)
    yield ray
    ray.shutdown()


def test_on_ray_a_killed_worker_loses_one_cell_and_the_run_goes_on(cluster, tmp_path: Path) -> None:
    engine = Ray()
    assert engine.slots == 2
    found = compute(engine, partial(cell, tmp_path), ["a", "dies once", "b", "c"])
    assert found == {"a": "A", "dies once": "DIES ONCE", "b": "B", "c": "C"}
    begun = {name: len((tmp_path / name).read_text().split()) for name in found}
    assert begun == {"a": 1, "dies once": 2, "b": 1, "c": 1}
    with pytest.raises(MansuError, match="^dies: the process was stopped from outside, twice"):
        compute(Ray(), partial(cell, tmp_path), ["dies", "b"])
    with pytest.raises(NoEditError, match="^not this one$"):
        compute(Ray(), partial(cell, tmp_path), ["refuses"])
    assert cluster.is_initialized()  # it was not begun here, so it is not ended here


def test_a_study_on_ray_gives_the_same_numbers(cluster, tmp_path: Path) -> None:
    config = StudyConfig(**{**CONFIG.__dict__, "also": ()})
    here = run_study(config, tmp_path / "here", progress=False, workers=1)
    there = run_study(config, tmp_path / "ray", progress=False, on="ray")
    assert there.summary().equals(here.summary())
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")


def test_on_ray_a_cell_on_a_gpu_gets_one_of_its_own(cluster) -> None:
    engine = engine_for("ray", None, 2, "cuda")
    assert engine is not None and engine.slots == 1
    assert compute(engine, os.getenv, ["CUDA_VISIBLE_DEVICES"]) == {"CUDA_VISIBLE_DEVICES": "0"}


def test_engines_are_chosen_by_name() -> None:
    assert engine_for("processes", 1, 9) is engine_for("processes", 4, 1) is None
    local = engine_for("processes", 4, 3)
    assert isinstance(local, LocalProcesses) and local.slots == 3
    with pytest.raises(MansuError, match="engine 'slurm': unknown; choose one of processes, ray"):
        require_engine("slurm", None)


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_ray_is_installed", lambda: False)
    with pytest.raises(MansuError, match=r"Ray is not installed; pip install 'mansu-tl\[ray\]'"):
        require_engine("ray", None)


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
