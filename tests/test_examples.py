"""Every name of the front door has an example in its docstring: all compile, the cheap ones are run and checked."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import mansu_tl as mtl
from tests.gguf_files import write_gguf
from tests.tiny import tiny

ROOT = Path(__file__).resolve().parents[1]
# Minutes, or widgets.
COMPILED_ONLY = {"audit", "explore", "run_study", "scorecard"}


def example(name: str) -> doctest.DocTest:
    text = inspect.getdoc(getattr(mtl, name)) or ""
    assert "Example:" in text, f"mtl.{name}: no example in its docstring"
    return doctest.DocTestParser().get_doctest(text, {"mtl": mtl}, f"mtl.{name}", None, None)


@pytest.mark.parametrize("name", mtl.__all__)
def test_every_example_is_python(name: str) -> None:
    steps = example(name).examples
    assert 1 <= len(steps) <= 6
    for step in steps:
        compile(step.source, name, "single")


@pytest.mark.parametrize("name", sorted(set(mtl.__all__) - COMPILED_ONLY))
def test_an_example_gives_what_it_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_gguf(tiny("llama"), "llama", tmp_path / "model.gguf", tokens=False)
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    failed, tried = runner.run(example(name), out=told.append)
    assert tried
    assert not failed, "".join(told)


PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_name_that_a_page_uses_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    dotted = set(re.findall(r"\bmtl((?:\.[A-Za-z_]\w*)+)", text)) | set(
        re.findall(r"\bmansu_tl((?:\.[A-Za-z_]\w*)+)", re.sub(r"python -m mansu_tl\S*", "", text))
    )
    for path in sorted(dotted):
        value: object = mtl
        place = "mansu_tl"
        for name in path.removeprefix(".").split("."):
            place += f".{name}"
            # A function may have the name of a package beside it (`methods`), so a module is looked up by its place.
            value = getattr(value, name) if hasattr(value, name) else importlib.import_module(place)
