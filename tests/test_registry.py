"""What a user registers: a name is given once and found by it, and what a plugin registers is known to every process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mansu_tl.cli import app
from mansu_tl.errors import MansuError
from mansu_tl.registry import Registry, import_plugins
from mansu_tl.study import Comparison, StudyConfig, full, run
from mansu_tl.study.run import run_study
from mansu_tl.unlearning import registry
from tests.test_processes import CONFIG, environment
from tests.tiny import SMALL_TASK

PLUGIN = """
import os
from pathlib import Path
import torch
from mansu_tl.data.sources import register_source, source
from mansu_tl.quantization import Grid, register_quantizer
from mansu_tl.unlearning import Objective, Recipe, RetainSettings, trained
from mansu_tl.unlearning.objectives import ascent, divergence

LOG = Path(__file__).with_suffix(".log")
LOG.open("a").write(f"imported {os.getpid()}\\n")
register_quantizer("even-g64", lambda: Grid("even-g64", torch.linspace(-1, 1, 15), 64), "grid")
register_source("lines", "a task file by another name", source("jsonl").read)

@trained("ga-held", "GA, held", RetainSettings, searched=False)
def ga_held(settings, start):
    LOG.open("a").write(f"edits {os.getpid()}\\n")
    return Recipe(Objective(ascent, divergence, settings.retain_weight))
"""


def test_a_name_is_given_once_and_found_by_it() -> None:
    numbers = Registry("number", {"one": 1})
    assert numbers.add("int4-g64", 4) == numbers["int4-g64"] == 4
    assert list(numbers) == ["one", "int4-g64"] and numbers.get("two") is None and "two" not in numbers
    with pytest.raises(MansuError, match="number 'one': registered already; choose another name"):
        numbers.add("one", 2)
    for name in ("", "a b", "lines:", "é/"):
        with pytest.raises(MansuError, match="not a name; use letters"):
            numbers.add(name, 0)
    with pytest.raises(
        MansuError, match=r"number 'onn': unknown; choose one of one, int4-g64 \(did you mean 'one'\?\)"
    ):
        numbers["onn"]


def test_a_plugin_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_more.py").write_text("import no_such_module_at_all\n")
    for name, message in (
        ("not_there", "No module named 'not_there'; install it, or put its folder on PYTHONPATH"),
        ("needs_more", "No module named 'no_such_module_at_all'; install it"),
        ("./mine.py", "not the name of a module"),
        ("", "not the name of a module"),
    ):
        with pytest.raises(MansuError, match=f"plugin '{name}': {message}"):
            import_plugins([name])
    for kind in (StudyConfig, Comparison):
        with pytest.raises(MansuError, match="plugin 'not_there': No module"):
            kind(plugins=("not_there",))


def test_the_lists_know_a_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "listed.py").write_text(
        "from dataclasses import replace\n"
        "from mansu_tl.unlearning import method_flags, register\n"
        "register(replace(method_flags('ga'), name='listed', title='Listed'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_METHODS", Registry("method", registry._METHODS))
    shown = CliRunner().invoke(app, ["methods", "--plugin", "listed"])
    assert shown.exit_code == 0 and re.search(r"^listed +Listed", shown.output, re.MULTILINE)
    assert "listed" in full(plugins=("listed",)).methods


@pytest.mark.slow
def test_what_a_plugin_registers_is_run_in_processes_of_its_own(tmp_path: Path) -> None:
    """A method, a quantizer and a source of a module on PYTHONPATH, by the command line on two processes."""
    (tmp_path / "held.py").write_text(PLUGIN)
    (tmp_path / "config.toml").write_text(
        f'task = "lines:{SMALL_TASK}"\nmethods = ["ga-held"]\nquantizers = ["even-g64"]\nfaithfulness = 0.6\nsteps = 1\n'
        'plugins = ["held"]\n[ga-held]\nmax_steps = 3\ncheck_every = 2\nstop_over_chance = -100.0\n'
    )
    surroundings = environment()
    surroundings["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{surroundings['PYTHONPATH']}"
    words = ["run", "config.toml", "--out", "out", "--workers", "2", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "mansu_tl", *words], cwd=tmp_path, env=surroundings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "ga-held" in done.stdout and "unknown" not in done.stderr
    lines = (tmp_path / "held.log").read_text().splitlines()
    imported = [line.split()[1] for line in lines if line.startswith("imported")]
    assert len(imported) == len(set(imported)) >= 3  # the command and both of its processes
    assert next(line.split()[1] for line in lines if line.startswith("edits")) in imported[1:]
    assert 'plugins = ["held"]' in (tmp_path / "out" / "config.toml").read_text()


def test_what_no_plugin_registers_is_computed_by_the_caller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    everything = registry._METHODS
    known = Registry("method", {**everything, "mine": replace(everything["graddiff"], name="mine")})
    monkeypatch.setattr(registry, "_METHODS", known)
    config = replace(CONFIG, methods=("mine",), also=(), settings={"mine": CONFIG.settings["graddiff"]})

    def in_a_fresh_process(engine, work, cells, **rest):
        engine.close()
        monkeypatch.setattr(registry, "_METHODS", everything)
        reports = {cell: work(cell) for cell in cells}
        monkeypatch.setattr(registry, "_METHODS", known)
        return reports

    monkeypatch.setattr(run, "compute", in_a_fresh_process)
    with pytest.warns(UserWarning, match="method 'mine': unknown.*so it is in a fresh process.*under plugins"):
        study = run_study(config, tmp_path, progress=False, workers=2)
    assert list(study.results) == ["mine"]
