"""Figures as files: HTML, or images drawn by kaleido with a Chromium that is on the machine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from os import PathLike
from pathlib import Path
from shutil import which
from typing import Any

import plotly.graph_objects as go
from choreographer.browsers.chromium import Chromium
from jinja2 import Environment
from kaleido import Kaleido
from kaleido.errors import BrowserClosedError, BrowserFailedError, ChromeNotFoundError
from plotly.io import to_html
from plotly.offline import get_plotlyjs
from tqdm.auto import tqdm

from mansu_tl.errors import MansuError
from mansu_tl.results.files import write_text, write_whole

_FORMATS = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
_WIDTH, _HEIGHT = 1000, 600
_PAGE = Environment(autoescape=True).from_string(
    """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{{ title }}</title><link rel="icon" href="data:,"><script>{{ plotly|safe }}</script></head>
<body>{{ figure|safe }}</body>
</html>
"""
)


def write_image(
    figure: go.Figure,
    path: str | PathLike[str],
    width: int | None = None,
    height: int | None = None,
    scale: float | int = 2,
) -> Path:
    """Write a figure as an image; see `write_images`."""
    return write_images({path: figure}, width=width, height=height, scale=scale)[0]


def write_images(
    figures: Mapping[str | PathLike[str], go.Figure] | Mapping[str, go.Figure] | Mapping[Path, go.Figure],
    *,
    width: int | None = None,
    height: int | None = None,
    scale: float | int = 2,
    progress: bool = False,
) -> list[Path]:
    """Write figures as images, with one start of the browser.

    Args:
        figures: by path, which ends in .png, .svg, .pdf, .jpg, .jpeg or .webp.
        width: in pixels before scaling; by default the figure's own, else 1000.
        height: in pixels before scaling; by default the figure's own, else 600.
        scale: pixels of the image for each pixel of the figure.
        progress: show a bar.

    Raises:
        MansuError: a suffix of another format, no browser, one that does not start (then no file is written), or a
            folder that cannot be written to.
    """
    jobs = []
    for path, figure in figures.items():
        suffix = Path(path).suffix.lower()
        if suffix not in _FORMATS:
            raise MansuError(
                f"{Path(path)}: no image format is called {suffix!r}; end it in one of {', '.join(_FORMATS)}"
            )
        size = {"width": width or figure.layout.width or _WIDTH, "height": height or figure.layout.height or _HEIGHT}
        jobs.append((figure.to_dict(), {"format": suffix[1:], "scale": scale, **size}))
    images = _drawn(jobs, progress) if jobs else []
    pairs = zip(figures, images, strict=True)
    return [write_whole(path, partial(Path.write_bytes, data=image)) for path, image in pairs]


def write_html(figure: go.Figure, path: str | PathLike[str], title: str) -> Path:
    """Write a figure as a page of its own with a title, plotly.js included (5 MB); it opens without a network."""
    parts = {"title": title, "plotly": get_plotlyjs(), "figure": html(figure, "figure")}
    return write_text(path, _PAGE.render(parts))


def html(figure: go.Figure, name: str) -> str:
    """A figure as an HTML element with the id `name`, for a page that has plotly.js in it; no button for plotly's cloud."""
    config = {
        "displaylogo": False,
        "responsive": True,
        "showSendToCloud": False,
        "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
        "toImageButtonOptions": {"filename": name, "scale": 2},
    }
    return to_html(figure, config=config, include_plotlyjs=False, include_mathjax=False, full_html=False, div_id=name)


def browser() -> str | None:
    """The Chromium that draws images: `BROWSER_PATH` if set, else the first found; None if there is none."""
    named = os.environ.get("BROWSER_PATH")
    found = which(named) if named else Chromium.find_browser(skip_local=False)
    return found or None


def _drawn(jobs: Sequence[tuple[dict[str, Any], dict[str, Any]]], progress: bool) -> list[bytes]:
    path = browser()
    if path is None:
        named = os.environ.get("BROWSER_PATH")
        where = f"BROWSER_PATH={named} is no program" if named else "no Chromium, Chrome or Edge was found"
        raise MansuError(
            f"image: {where}; install Chromium (or run kaleido_get_chrome), set BROWSER_PATH to it, or write HTML"
        )
    # In a thread of its own, since a notebook already runs an event loop in this one.
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(asyncio.run, _draw(jobs, path, progress)).result()
        except (BrowserFailedError, BrowserClosedError, ChromeNotFoundError):
            raise MansuError(
                f"image: the browser {path} does not start; try {path} --headless --no-sandbox --version, or set "
                "BROWSER_PATH to another"
            ) from None


async def _draw(jobs: Sequence[tuple[dict[str, Any], dict[str, Any]]], path: str, progress: bool) -> list[bytes]:
    # MathJax would be fetched from the net, and no figure here needs it.
    async with Kaleido(mathjax=False, path=path) as kaleido:
        bar = tqdm(jobs, desc="images", unit="figure", disable=not progress)
        return [await kaleido.calc_fig(figure, opts=options) for figure, options in bar]
