"""Every name of the front door has an example in its docstring: all compile, the cheap ones are run and checked."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

import pytest

import mansu_tl as mtl

# Minutes, or widgets.
COMPILED_ONLY = {"explore", "run_study", "scorecard"}


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
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    failed, tried = runner.run(example(name), out=told.append)
    assert tried
    assert not failed, "".join(told)
