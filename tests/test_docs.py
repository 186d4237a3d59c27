"""The documentation: every public name has a docstring and a place in the pages; the citation is valid; it builds."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import mansu_tl as mtl
from mansu_tl.models import fingerprint
from mansu_tl.unlearning import MansuSettings

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted(
    ".".join(path.parent.relative_to(ROOT).parts)
    for path in (ROOT / "mansu_tl").rglob("__init__.py")
    if "__all__" in path.read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(hooks: ModuleType) -> dict[str, str]:
    return {path.stem: hooks.expand(path.read_text(encoding="utf-8")) for path in (ROOT / "docs").rglob("*.md")}


def public(room: str) -> list[tuple[str, object]]:
    module = importlib.import_module(room)
    return [(name, getattr(module, name)) for name in module.__all__ if not name.startswith("__")]


def test_the_rooms_name_their_public_names() -> None:
    packages = {path.parent.name for path in (ROOT / "mansu_tl").glob("*/__init__.py")}
    assert {f"mansu_tl.{name}" for name in packages} | {"mansu_tl"} <= set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_has_a_docstring(room: str) -> None:
    for name, value in public(room):
        if callable(value) or inspect.ismodule(value):
            text = inspect.getdoc(value) or ""
            # A dataclass without one gets its signature.
            assert len(text) > 15, f"{room}.{name}"
            assert not text.startswith(f"{name}("), f"{room}.{name}"


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_has_a_place_in_the_pages(room: str, hooks: ModuleType, pages: dict[str, str]) -> None:
    shown = set(re.findall(r"^::: (\S+)$", "\n".join(pages.values()), re.MULTILINE))
    for name, value in public(room):
        if inspect.ismodule(value):
            assert name in pages, f"{room}.{name}: no page"
        elif inspect.isclass(value) or inspect.isfunction(value):
            assert f"{value.__module__}.{value.__qualname__}" in shown, f"{room}.{name}: on no page"
        else:
            assert hooks.defined(room, name) in shown, f"{room}.{name}: on no page"


def test_no_name_is_documented_twice(pages: dict[str, str]) -> None:
    shown = re.findall(r"^::: (\S+)$", "\n".join(pages.values()), re.MULTILINE)
    assert len(shown) == len(set(shown))


def test_every_command_is_on_the_command_line_page(pages: dict[str, str]) -> None:
    from typer.main import get_command

    from mansu_tl.cli import app

    page = pages["cli"]
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"## `mansu-tl {name}`" in page
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert f"`{parameter.opts[0]}`" in page


def test_a_notebook_becomes_a_page_with_its_outputs(hooks: ModuleType, tmp_path: Path) -> None:
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["\x1b[31ma <b>\n"]},
        {"output_type": "stream", "name": "stdout", "text": ["\n", "c"]},
        {"output_type": "display_data", "data": {"image/png": "QUJD", "text/plain": "Figure"}},
        {"output_type": "execute_result", "data": {"text/html": ["<p>x</p>\n\n", "<p>y</p>"], "text/plain": "x"}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "[prose](../docs/evidence.md#here)"]},
        {"cell_type": "code", "source": ["print('```')"], "outputs": outputs},
        {"cell_type": "markdown", "source": "<details><summary>Answer</summary>\n\n**42**\n\n</details>"},
    ]
    path = tmp_path / "09_try.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    page, images = hooks.notebook_page(path)
    assert page.startswith("# Title\n\n[prose](../evidence.md#here)")
    assert "````python\nprint('```')\n````" in page
    assert '<pre class="output">a &lt;b&gt;&#10;&#10;c</pre>' in page
    assert images == {"09_try_1_0.png": b"ABC"}
    assert "(09_try_1_0.png)" in page
    assert "<p>x</p> <p>y</p>" in page
    assert '<details markdown="1">' in page
    assert page.count("<details") == 1
    cells[1]["metadata"] = {"tags": ["solution"]}
    cells[1]["outputs"][2]["metadata"] = {"image/png": {"width": 960}}
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    folded = (
        hooks.notebook_page(path)[0]
        .split('<details markdown="1"><summary>Solution</summary>')[1]
        .split("</details>")[0]
    )
    assert "print('```')" in folded and "a &lt;b&gt;" in folded and '09_try_1_0.png){ width="960" }' in folded
    cells[1]["outputs"] = [{"output_type": "display_data", "data": {"application/vnd.plotly.v1+json": {}}}]
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    with pytest.raises(ValueError, match="store an image"):
        hooks.notebook_page(path)


def test_formulas_are_drawn_without_a_script_and_money_and_code_stay(hooks: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("latex2mathml", reason="pip install 'mansu-tl[docs]'")
    path = tmp_path / "08_math.ipynb"
    source = "$$a\n= \\frac{1}{2}$$\n\nand $x_1 * y$, from $5 to $10, `$PATH and $HOME`"
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": source}]}), encoding="utf-8")
    page, _ = hooks.notebook_page(path)
    assert page.count("<math") == 2
    assert "<mfrac>" in page
    assert 'display="block"' in page
    assert "from $5 to $10, `$PATH and $HOME`" in page


def test_the_page_for_those_who_come_from_elsewhere_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, "coming_from.md", "exec"), names)
    model, pairs = names["model"], names["pairs"]
    assert names["stream"].shape[:2] == pairs.clean.shape
    assert not torch.equal(names["without"], names["logits"])
    assert torch.equal(names["sweep"].tensor, mtl.activation_patching(model, pairs[:8]).tensor)
    assert names["circuit"].faithfulness >= 0.85 and 0 < names["kept"] < 1.1
    assert fingerprint(names["again"]) == fingerprint(names["edited"]) != fingerprint(model)
    assert len(names["before"].facts) == len(names["after"].facts) == len(names["asked"])


def test_the_citation_is_valid_and_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "type", "version", "license", "references"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["version"] == version("mansu-tl")
    for source in (citation, *citation["references"]):
        assert source["authors"]
        for author in source["authors"]:
            assert author.get("name") or author.get("family-names")
    identifiers = [i["value"] for r in citation["references"] for i in r["identifiers"]]
    assert {"arXiv:2605.15138", "arXiv:2601.15538"} <= set(identifiers)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for identifier in ("2605.15138", "2601.15538"):
        assert identifier in readme


def test_the_site_builds_offline_without_a_warning(tmp_path: Path, hooks: ModuleType) -> None:
    for name in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed; pip install 'mansu-tl[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {p.relative_to(tmp_path / "site").as_posix(): p.read_text() for p in (tmp_path / "site").rglob("*.html")}
    assert len(pages) >= 15 + len(hooks.notebooks())
    for path in hooks.notebooks():
        assert f"tutorials/{path.stem}.html" in pages
    for name, page in pages.items():
        # Links may lead out; nothing may be fetched.
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//[^>]*>", page)
        fetched += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect)[^>]*//[^>]*>", page)
        assert not fetched, f"{name}: {fetched[0]}"
    circuit = pages["reference/circuit.html"]
    assert 'id="mansu_tl.circuit.scores.EdgeScores"' in circuit
    # Axis names arrive as they were written, a single one included.
    assert '"writer reader"' in circuit
    assert '" pair"' in pages["reference/data.html"]


def test_every_setting_of_mansu_has_its_default_and_a_reason() -> None:
    lines = (ROOT / "docs" / "reference" / "unlearning.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    settings = MansuSettings()
    assert [(name.strip("`"), default) for name, default, _ in cells] == [
        (field.name, str(getattr(settings, field.name))) for field in dataclasses.fields(settings)
    ]
    assert all(len(reason) > 10 for _, _, reason in cells)
