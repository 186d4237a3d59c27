"""Results in a notebook: what they show, what completion offers, how errors look, and progress bars."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
import torch
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from traitlets.config import Config

import mansu_tl as mtl
from mansu_tl import errors
from mansu_tl.circuit import Conflict, Graph, PathEffects
from mansu_tl.errors import NoEditError
from mansu_tl.results.result import Result, Table, bars
from mansu_tl.runs.metrics import Accuracy
from mansu_tl.verification import Certificate, Divergence, Scorecard
from mansu_tl.verification.certificate import CertificateRow
from mansu_tl.verification.scorecard import Row
from tests import checking
from tests.test_docs import ROOMS

EVIL = "<script>alert(1)</script>"
WRITERS, READERS = ("embed", "L0H0", "MLP0"), ("L0H0.q", "L0KV0.k", "L0KV0.v", "MLP0.in", "logits")


def edge_scores() -> mtl.circuit.EdgeScores:
    exists = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    tensor = torch.arange(15).reshape(3, 5).float() * exists / 8
    return mtl.circuit.EdgeScores(
        tensor, WRITERS, READERS, exists, "eap-ig", "midpoint", 5, "logit_difference", 2.5, -1.5, 0.25, "f" * 64
    )


def circuit() -> mtl.circuit.Circuit:
    return dataclasses.replace(mtl.circuit.Circuit.top(edge_scores(), 8, 0.875), how=f"edges of |score| >= {EVIL}")


def edit() -> mtl.unlearning.Edit:
    index = torch.tensor([3, 5])
    return mtl.unlearning.Edit(
        EVIL, "f" * 64, {EVIL: index}, {EVIL: torch.zeros(2)}, {EVIL: torch.tensor([0.125, -0.375])}
    )


def scorecard() -> Scorecard:
    row = Row("forgetting", EVIL, "nf4", 17.75, 10.0, 25.5, 99.25, "un-edited", "<= 30", True)
    return Scorecard(EVIL, (row, dataclasses.replace(row, value=31.5, passed=False)) * 20)


def divergence() -> Divergence:
    return Divergence(
        1.0625, (0.9375, 1.125), 0.75, (0.5, 1.0), torch.tensor([4.0, 2.0]), torch.tensor([-0.25, 0.5]),
        ("embed", "L0H0"), ("MLP0.in", "logits"), EVIL,
    )  # fmt: skip


def certificate() -> Certificate:
    row = CertificateRow(**{f.name: 0 for f in dataclasses.fields(CertificateRow)} | {"parameter": EVIL, "dtype": "x"})
    facts: dict[str, Any] = {field.name: "" for field in dataclasses.fields(Certificate)}
    facts |= {"quantizer": "nf4", "block_size": 64, "n_parameters": 4096, "n_linear": 4096, "rows": (row,)}
    facts |= {"others_changed": (), "problems": (f"config.json: {EVIL} differs",), "versions": {}}
    return Certificate(**facts)


def accuracy() -> Accuracy:
    right = torch.tensor([True, False])
    return Accuracy(right, ~right, torch.tensor([1.5, -0.25]), (EVIL, "b"))


# What each has to show, as text.
SHOWN = {
    edge_scores: ("8 edges", "residual 0.25", "1.7500"),
    circuit: ("8 edges", "0.875", "1.7500"),
    edit: ("2 weights", "0.25", "0.375"),
    scorecard: ("20 of 40 rows pass", "17.75", "31.50", "✓ pass", "✗ fail"),
    divergence: ("CAD 1.062", "[0.938, 1.125]", "4.0000", "-0.2500"),
    certificate: ("FAILED", "faults", "4096"),
    accuracy: ("MC 50.0 %", "1.50", "-0.25"),
}


@pytest.mark.parametrize("make", SHOWN, ids=lambda make: make.__name__)
def test_a_result_shows_its_numbers_in_one_line_and_tables_and_escapes_what_comes_from_data(make: Any) -> None:
    result = make()
    html = result._repr_html_()
    for text in SHOWN[make]:
        assert text in html, text
    assert "<script" not in html
    if EVIL in f"{result!r}":
        assert "&lt;script&gt;" in html
    if make in (edit, scorecard, certificate, accuracy):
        assert "<td>&lt;script&gt;" in html
    # One line names it, and no colour of ours is there to vanish on a dark page.
    assert html.startswith(f"<div><p><b>{type(result).__name__}</b> ")
    assert not re.search(r"(color|background)\s*[:=]", html)
    assert "\n" not in repr(result)
    assert len(repr(result)) < 300


def test_a_long_table_says_how_many_rows_it_has_and_a_scorecard_hides_none() -> None:
    html = Table(pd.DataFrame({"x": range(100)}), "numbers", rows=3).html()
    assert "numbers, 3 of 100 rows" in html
    assert html.count("<tr") == 4
    assert scorecard()._repr_html_().count("<tr") == 41
    long_name = "a" * 80
    assert long_name in Table(pd.DataFrame({"parameter": [long_name]})).html()


def test_every_result_of_a_room_has_the_same_look() -> None:
    """A class with to_dataframe() is a result; none of them may show pandas' or dataclasses' own text."""
    found = []
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) and hasattr(value, "to_dataframe") and value is not Result:
                found.append(name)
                assert issubclass(value, Result), f"{room}.{name}"
                assert "__repr__" in vars(value), f"{room}.{name} has the repr of a dataclass, tensors and all"
                dataclass_made = getattr(value.__repr__, "__wrapped__", value.__repr__).__qualname__
                assert "_recursive_repr" not in dataclass_made
                # Inputs that can be saved have the base's one row and no table of their own.
                if value.to_dataframe is not Result.to_dataframe:
                    assert value._tables is not Result._tables, f"{room}.{name} shows no table"
    assert {"EdgeScores", "Circuit", "Edit", "Certificate", "Scorecard", "Divergence"} <= set(found)
    assert len(found) >= 20


def test_completion_of_a_result_offers_its_public_names_only() -> None:
    result = circuit()
    names = dir(result)
    assert not [name for name in names if name.startswith("_")]
    assert {field.name for field in dataclasses.fields(result)} <= set(names)
    assert {"edges", "nodes", "top", "to_dataframe", "save"} <= set(names)
    assert set(names) == {name for name in object.__dir__(result) if not name.startswith("_")}


def test_bars_are_shown_as_asked_and_in_notebooks_only() -> None:
    assert [bars(True), bars(False), bars(None)] == [True, False, False]  # a kernel: below


def test_completion_of_the_package_and_its_rooms_offers_public_names_only() -> None:
    offered = set(dir(mtl))
    rooms = {name for name in offered if inspect.ismodule(getattr(mtl, name))}
    assert offered - rooms == set(mtl.__all__)
    assert len(mtl.__all__) <= 20
    assert rooms == {
        "circuit", "data", "explorer", "models", "patching", "plots", "quantization", "runs", "study", "unlearning",
        "verification",
    }  # fmt: skip
    # Python hangs every module that was imported on its package; nothing else may resolve.
    resolved = {name for name, value in vars(mtl).items() if not (name.startswith("_") or inspect.ismodule(value))}
    assert resolved == set(mtl.__all__)
    for room in set(ROOMS) - {"mansu_tl"}:
        module = importlib.import_module(room)
        assert dir(module) == sorted(module.__all__), room


def test_a_name_that_is_elsewhere_is_found_and_says_where() -> None:
    for module, name, place, value in (
        (mtl, "Questions", "mtl.data.Questions", mtl.data.Questions),
        (mtl, "Edit", "mtl.unlearning.Edit", mtl.unlearning.Edit),
        (mtl.study, "certify", "mtl.certify", mtl.certify),
        (mtl.data, "load_task", "mtl.load_task", mtl.load_task),
    ):
        with pytest.warns(FutureWarning, match=rf"\.{name} stands in {place} now$"):
            assert getattr(module, name) is value
    with pytest.raises(AttributeError, match="'mansu_tl' has no attribute 'nothing'$"):
        getattr(mtl, "nothing")  # noqa: B009 - type checkers would refuse the plain form


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    # The checker of these tests stands between the cell and the package, as a decorator of a library's would.
    monkeypatch.setattr(errors, "_LIBRARIES", (*errors._LIBRARIES, checking.__file__))
    InteractiveShell.clear_instance()
    config = Config()
    config.HistoryManager.enabled = False
    yield InteractiveShell.instance(config=config)
    InteractiveShell.clear_instance()


def test_the_shell_completes_to_public_names(shell: InteractiveShell) -> None:
    shell.user_ns |= {"mtl": mtl, "found": circuit()}

    def offered(text: str) -> set[str]:
        with provisionalcompleter():
            return {each.text.lstrip(".") for each in shell.Completer.completions(text, len(text))}

    assert offered("found.") == set(dir(shell.user_ns["found"]))
    assert offered("mtl.") == {name for name in dir(mtl) if not name.startswith("_")}


def test_an_error_in_a_cell_is_short_and_the_whole_traceback_is_one_command_away(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.user_ns |= {"mtl": mtl, "scores": edge_scores()}
    shell.run_cell("x = 1\nfound = mtl.circuit.Circuit.top(scores, 0)", store_history=True)
    lines = plain(capsys.readouterr().out)
    assert lines == [
        "MansuError: circuit: n=0 edges, the graph has 8; choose 1..8",
        "  Cell In[1], line 2: found = mtl.circuit.Circuit.top(scores, 0)",
        "  (%tb Verbose shows every call)",
    ]
    shell.run_cell("%tb Verbose")
    whole = "\n".join(plain(capsys.readouterr().out))
    assert "greedy_mask(scores, n, by)" in whole
    assert "circuit.py" in whole
    assert len(whole.splitlines()) > 15
    # Only for that one call.
    shell.run_cell("mtl.circuit.Circuit.top(scores, 0)")
    assert len(plain(capsys.readouterr().out)) == 3


def test_an_error_below_a_users_function_names_the_users_line(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.user_ns |= {"mtl": mtl, "scores": edge_scores()}
    shell.run_cell("def mine(n):\n    return mtl.circuit.Circuit.top(scores, n)\n\nmine(-1)", store_history=True)
    assert plain(capsys.readouterr().out)[1] == "  Cell In[1], line 2: return mtl.circuit.Circuit.top(scores, n)"


def test_other_errors_keep_their_traceback(shell: InteractiveShell, capsys: pytest.CaptureFixture[str]) -> None:
    shell.user_ns |= {"mtl": mtl}
    shell.run_cell("mtl.circuit.Circuit.top(None, 0)")
    assert len(plain(capsys.readouterr().out)) > 8


def test_without_a_shell_the_short_form_has_no_colours_and_names_the_file() -> None:
    with pytest.raises(NoEditError) as caught:
        raise NoEditError("no weight moved; raise the rate")
    lines = caught.value._render_traceback_()
    assert lines[0] == "NoEditError: no weight moved; raise the rate"
    assert Path(__file__).name in lines[1]


def test_every_progress_bar_is_one_that_becomes_a_widget_in_a_notebook() -> None:
    folder = Path(mtl.__file__).parent
    bars = {path: path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}
    users = {path.relative_to(folder).as_posix() for path, text in bars.items() if re.search(r"\bt(qdm|range)\(", text)}
    assert len(users) >= 19
    for path, text in bars.items():
        assert not re.search(r"^(import tqdm|from tqdm import)", text, re.MULTILINE), path
        if path.relative_to(folder).as_posix() in users and path.name != "train.py":
            assert re.search(r"disable=not (bars\(|self\.)?progress", text), (
                f"{path}: a bar that cannot be switched off"
            )


def test_the_calls_that_take_long_have_a_progress_bar() -> None:
    from mansu_tl import circuit, patching, study, verification

    long = [
        mtl.discover_circuit, mtl.edge_attribution, mtl.activation_patching, mtl.unlearn, mtl.quantize, mtl.scorecard,
        mtl.circuit_divergence, mtl.run_study, circuit.faithfulness_curve, circuit.minimality, circuit.patch_edges,
        circuit.path_patching, patching.node_attribution, patching.neuron_attribution, study.compare,
        verification.probe, verification.erasure_depth, verification.rediscover, verification.relearn,
        verification.compare_relearning,
    ]  # fmt: skip
    for call in long:
        assert "progress" in inspect.signature(call).parameters, call.__name__


def plain(text: str) -> list[str]:
    """Printed lines without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text).strip("\n").split("\n")


def test_graphs_and_path_effects_say_what_they_are() -> None:
    scores = edge_scores()
    assert repr(Graph(scores.writers, scores.readers, scores.exists)) == "Graph(3 writers, 5 readers, 8 edges)"
    assert issubclass(PathEffects, Result)
    assert issubclass(Conflict, Result)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_a_real_kernel_shows_a_bar_a_table_and_a_short_error() -> None:
    pytest.importorskip("ipywidgets", reason="progress bars are widgets where ipywidgets is installed")
    cells = [
        "import mansu_tl as mtl\npairs = mtl.load_task('pocket').forget_pairs[:4]\nmodel = mtl.load('pocket')",
        "mtl.edge_attribution(model, pairs, steps=2, progress=True)",
        "mtl.circuit.Circuit.top(None, 0)",
        "mtl.load_task('nowhere')",
        "from mansu_tl.results.result import bars\nbars(None)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    NotebookClient(notebook, timeout=300, kernel_name="python3", allow_errors=True).execute()
    _, scored, bug, mistake, asked = (cell.outputs for cell in notebook.cells)
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in scored)
    shown = scored[-1]["data"]["text/html"]
    assert "<b>EdgeScores</b> 343 edges" in shown
    assert "10 of 343 rows" in shown
    assert len(plain("\n".join(bug[0]["traceback"]))) > 8
    lines = plain("\n".join(mistake[0]["traceback"]))
    assert lines[0].startswith("MansuError: ")
    assert lines[1] == "  Cell In[4], line 1: mtl.load_task('nowhere')"
    assert len(lines) == 3
    assert asked[-1]["data"]["text/plain"] == "True"
