"""The gallery on disk: images, a page that lists them, and the numbers that they draw."""

from __future__ import annotations

import base64
import hashlib
import json
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from pandas.io.formats.style import Styler

from mansu_tl.errors import MansuError
from mansu_tl.plots import write_html, write_images
from mansu_tl.plots.export import Drawing
from mansu_tl.results.files import write_text
from mansu_tl.study.pictures import COMPARE, RESULTS, TABLES, Picture, pictures

DATA, PAGE = "data.json", "README.md"
_SCALE = 1.5


def write_gallery(
    folder: str | PathLike[str],
    *,
    images: bool = True,
    dark: bool = False,
    svg: bool = False,
    html: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Draw every picture that the folder's `results/`, `tables/` and `compare/` have the files for.

    Writes NAME.png, a README.md that says of each picture what it shows and where it comes from, and data.json with the
    numbers drawn, against which a later drawing can be compared. No model is loaded.

    Args:
        folder: e.g. figures.
        images: write PNGs (needs Chromium).
        dark: also NAME_dark.png.
        svg: also NAME.svg of what is no table.
        html: also NAME.html, which can be zoomed and opens offline (5 MB each).
        progress: show a bar.

    Raises:
        MansuError: the folder has no files to draw from, or images are asked for and there is no browser.
    """
    root = Path(folder)
    listed = pictures(root)
    if not listed:
        raise MansuError(
            f"{root}: nothing to draw, there is no {RESULTS}/study.json, {TABLES}/*.csv or {COMPARE}/measures.csv in it; "
            "make results with --results RUN, or name the right folder"
        )
    light = {each.name: each.draw("light") for each in listed}
    data = {name: figure_data(figure) for name, figure in light.items()}
    written = [write_text(root / DATA, _json(data)), write_text(root / PAGE, page(listed))]
    if html:
        written += [write_html(figure, root / f"{name}.html", name) for name, figure in light.items()]
    jobs: dict[Path, Drawing] = {}
    if images:
        jobs |= {root / f"{name}.png": figure for name, figure in light.items()}
    if svg:
        jobs |= {root / f"{name}.svg": figure for name, figure in light.items() if not isinstance(figure, Styler)}
    if dark:
        jobs |= {root / f"{each.name}_dark.png": each.draw("dark") for each in listed}
    return [*written, *write_images(jobs, scale=_SCALE, progress=progress)]


def page(listed: list[Picture]) -> str:
    """The page that lists the pictures, as Markdown."""
    parts = [
        "# Figures\n\nMade by `mansu-tl figures` from the result files in this folder; no model is run for it. "
        "`data.json` has the numbers drawn, which the tests compare with a fresh drawing.\n"
    ]
    for each in listed:
        sources = ", ".join(f"[`{at}`]({at})" for at in each.source.split(", "))
        made = f"`{each.command}`" if each.command.startswith(("mansu-tl", "python")) else each.command
        parts.append(
            f"## {each.name}\n\n![{each.name}]({each.name}.png)\n\n{each.sentence}\n\nFrom {sources}; made by: {made}.\n"
        )
    return "\n".join(parts)


def figure_data(figure: Drawing) -> list[dict[str, Any]]:
    """What a figure draws, trace by trace, small enough to be kept; a table's traces are its columns.

    Returns:
        For each trace its name, type, for every array of numbers in it how many there are, their mean and their mean
        size, and a digest of all its texts.
    """
    if isinstance(figure, Styler):
        columns = figure.data.to_dict("list")  # type: ignore[attr-defined]
        return [_trace_data({"name": name, "type": "column", "cells": cells}) for name, cells in columns.items()]
    return [_trace_data(trace) for trace in figure.to_dict()["data"]]


def _trace_data(trace: dict[str, Any]) -> dict[str, Any]:
    numbers: dict[str, list[float]] = {}
    texts: list[str] = []
    _walk(trace, "", numbers, texts)
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
    summed = {key: [len(v), float(np.mean(v)), float(np.mean(np.abs(v)))] for key, v in numbers.items()}
    return {"name": trace.get("name", ""), "type": trace["type"], "numbers": summed, "texts": digest}


def _walk(value: Any, path: str, numbers: dict[str, list[float]], texts: list[str]) -> None:
    if isinstance(value, dict) and {"bdata", "dtype"} <= set(value):
        # plotly packs arrays.
        value = np.frombuffer(base64.b64decode(value["bdata"]), dtype=np.dtype(value["dtype"]))
    if isinstance(value, dict):
        for key, inner in value.items():
            _walk(inner, f"{path}.{key}" if path else str(key), numbers, texts)
    elif isinstance(value, list | tuple | np.ndarray):
        for inner in value:
            _walk(inner, path, numbers, texts)
    elif isinstance(value, str):
        texts.append(f"{path}={value}")
    elif isinstance(value, bool) or value is None:
        return
    elif np.isfinite(value):
        numbers.setdefault(path, []).append(float(value))


def _json(data: dict[str, list[dict[str, Any]]]) -> str:
    """One trace a line, nine digits a number."""
    lines = []
    for name, traces in data.items():
        rows = ",\n".join("  " + json.dumps(_rounded(trace), ensure_ascii=False) for trace in traces)
        lines.append(f"{json.dumps(name)}: [\n{rows}\n ]")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _rounded(trace: dict[str, Any]) -> dict[str, Any]:
    numbers = {key: [n, float(f"{a:.9g}"), float(f"{b:.9g}")] for key, (n, a, b) in trace["numbers"].items()}
    return {**trace, "numbers": numbers}
