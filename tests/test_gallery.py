"""The gallery: what is drawn from the committed files is what is stored, and drawing needs no model."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
from typer.testing import CliRunner

from mansu_tl.cli import app
from mansu_tl.errors import MansuError
from mansu_tl.study import collect, figure_data, pictures, write_gallery
from mansu_tl.study.gallery import page
from tests.test_plots import needs_browser

FIGURES = Path(__file__).parents[1] / "figures"
LISTED = pictures(FIGURES)
STORED = json.loads((FIGURES / "data.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("picture", LISTED, ids=[each.name for each in LISTED])
def test_pictures_draw_the_stored_numbers(picture) -> None:
    drawn, stored = figure_data(picture.draw("light")), STORED[picture.name]
    assert [(t["name"], t["type"], t["texts"]) for t in drawn] == [(t["name"], t["type"], t["texts"]) for t in stored]
    for new, old in zip(drawn, stored, strict=True):
        assert new["numbers"].keys() == old["numbers"].keys()
        for key, values in new["numbers"].items():
            assert values == pytest.approx(old["numbers"][key], rel=1e-6, abs=1e-9), key


def test_the_page_lists_what_is_there() -> None:
    assert set(STORED) == {each.name for each in LISTED}
    assert (FIGURES / "README.md").read_text(encoding="utf-8") == page(LISTED)
    for picture in LISTED:
        assert (FIGURES / f"{picture.name}.png").stat().st_size > 5_000
        assert all((FIGURES / at).exists() for at in picture.source.split(", "))
    files = [path for part in ("results", "tables") for path in (FIGURES / part).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000


def test_data_tell_figures_apart() -> None:
    figure = go.Figure(go.Scatter(x=[1.0, 2.0], y=[3.0, -4.0], text=["a", "b"], name="n"))
    (data,) = figure_data(figure)
    assert data["numbers"]["y"] == [2, -0.5, 3.5]
    moved = go.Figure(figure).update_traces(y=[3.0, -4.1])
    renamed = go.Figure(figure).update_traces(text=["a", "c"])
    assert figure_data(moved)[0]["numbers"]["y"] != data["numbers"]["y"]
    assert figure_data(renamed)[0]["texts"] != data["texts"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "frontier.csv").write_bytes((FIGURES / "tables" / "frontier.csv").read_bytes())
    return tmp_path


def test_a_gallery_without_images(folder: Path) -> None:
    result = CliRunner().invoke(app, ["figures", "--folder", str(folder), "--no-png", "--quiet"])
    assert result.exit_code == 0, result.output
    assert {path.name for path in folder.iterdir()} == {"tables", "README.md", "data.json"}
    stored = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    table = pd.read_csv(folder / "tables" / "frontier.csv")
    points = next(trace for trace in stored["frontier"] if trace["name"] == "settings")
    assert points["numbers"]["y"][:2] == pytest.approx(
        [len(table), table["relearning excess at lr 1e-3, points"].mean()]
    )


@needs_browser
def test_a_gallery_with_images(folder: Path) -> None:
    written = write_gallery(folder, dark=True, svg=True, progress=False)
    assert {path.name for path in written} == {
        "data.json", "README.md",
        *(f"{name}{end}" for name in ("frontier", "sensitivity_attacker") for end in (".png", "_dark.png", ".svg")),
    }  # fmt: skip
    assert all(path.stat().st_size > 100 for path in written)


def test_without_a_browser_the_message_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/no/such/chromium")
    with pytest.raises(MansuError, match="/no/such/chromium is no program; install Chromium"):
        write_gallery(folder, progress=False)
    assert json.loads((folder / "data.json").read_text(encoding="utf-8"))["frontier"]


def test_gallery_errors(tmp_path: Path) -> None:
    with pytest.raises(MansuError, match="nothing to draw"):
        write_gallery(tmp_path)
    with pytest.raises(MansuError, match="no config.toml in it"):
        collect(tmp_path, tmp_path / "out")
