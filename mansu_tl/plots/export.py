"""Figures and tables as files: HTML, or images drawn by kaleido with a Chromium that is on the machine."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from os import PathLike
from pathlib import Path
from shutil import which
from typing import Any, TypeAlias

import plotly.graph_objects as go
from choreographer.browsers.chromium import Chromium
from jinja2 import Environment
from kaleido import Kaleido
from kaleido.errors import BrowserClosedError, BrowserFailedError, ChromeNotFoundError
from pandas.io.formats.style import Styler
from plotly.io import to_html
from plotly.offline import get_plotlyjs
from tqdm.auto import tqdm

from mansu_tl.errors import MansuError
from mansu_tl.results.files import write_text, write_whole

Drawing: TypeAlias = go.Figure | Styler
_FORMATS = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
_TABLE_FORMATS = (".png", ".pdf", ".jpg", ".jpeg", ".webp")
_FORMS = {"jpg": "jpeg"}  # as the browser calls them
_WIDTH, _HEIGHT, _SLIDE = 1000, 560, 16 / 9
_WIDEST_TABLE = 1280  # unless its words need more
_MARGINS = ("marginTop", "marginBottom", "marginLeft", "marginRight")
# The page takes the table's colour, and tells how large the table is with a margin around it.
_MEASURE = """(table => {
  document.body.style.background = getComputedStyle(table).backgroundColor;
  const box = table.getBoundingClientRect();
  return [box.right + box.left, box.bottom + box.top];
})(document.querySelector("table"))"""
_PAGE = Environment(autoescape=True).from_string(
    """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{{ title }}</title><link rel="icon" href="data:,">
{% if plotly %}<script>{{ plotly|safe }}</script>{% endif %}</head>
<body style="margin: 16px">{{ figure|safe }}</body>
</html>
"""
)


def write_image(
    figure: Drawing,
    path: str | PathLike[str],
    width: int | None = None,
    height: int | None = None,
    scale: float | int = 2,
) -> Path:
    """Write a figure or table as an image; see `write_images`."""
    return write_images({path: figure}, width=width, height=height, scale=scale)[0]


def write_images(
    figures: Mapping[str | PathLike[str], Drawing] | Mapping[str, Drawing] | Mapping[Path, Drawing],
    *,
    width: int | None = None,
    height: int | None = None,
    scale: float | int = 2,
    progress: bool = False,
) -> list[Path]:
    """Write figures and tables as images, with one start of the browser.

    Args:
        figures: by path, which ends in .png, .pdf, .jpg, .jpeg or .webp, of figures also in .svg.
        width: in pixels before scaling; by default the figure's own, else 1000, or 16:9 of the height where that is more, so
            that it fits a slide; a table takes what its words need.
        height: in pixels before scaling; by default the figure's own, else 560. A table is as high as its rows.
        scale: pixels of the image for each pixel of the figure.
        progress: show a bar.

    Raises:
        MansuError: a suffix of another format, no browser, one that does not start (then no file is written), or a
            folder that cannot be written to.
    """
    jobs = []
    for path, figure in figures.items():
        suffix, formats = Path(path).suffix.lower(), _TABLE_FORMATS if isinstance(figure, Styler) else _FORMATS
        if suffix not in formats:
            raise MansuError(
                f"{Path(path)}: no image format is called {suffix!r}; end it in one of {', '.join(formats)}"
            )
        if isinstance(figure, Styler):
            jobs.append(partial(_photograph, table=figure, form=suffix[1:], width=width or _WIDEST_TABLE, scale=scale))
            continue
        down = height or figure.layout.height or _HEIGHT
        across = width or figure.layout.width or max(_WIDTH, round(_SLIDE * down))
        size = {"width": across, "height": down}
        options = {"format": suffix[1:], "scale": scale, **size}
        jobs.append(partial(Kaleido.calc_fig, fig=figure.to_dict(), opts=options))
    images = _drawn(jobs, progress) if jobs else []
    pairs = zip(figures, images, strict=True)
    return [write_whole(path, partial(Path.write_bytes, data=image)) for path, image in pairs]


def write_html(figure: Drawing, path: str | PathLike[str], title: str) -> Path:
    """Write a figure or table as a page of its own with a title, which opens without a network.

    A figure's page has plotly.js in it (5 MB).
    """
    return write_text(path, _page(figure, title))


def html(figure: Drawing, name: str) -> str:
    """A figure or table as an HTML element with the id `name`; a figure needs plotly.js on its page, and has no button for
    plotly's cloud.
    """
    if isinstance(figure, Styler):
        return str(figure.to_html(table_uuid=name))
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


def _drawn(jobs: Sequence[Callable[[Kaleido], Awaitable[bytes]]], progress: bool) -> list[bytes]:
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


async def _draw(jobs: Sequence[Callable[[Kaleido], Awaitable[bytes]]], path: str, progress: bool) -> list[bytes]:
    # MathJax would be fetched from the net, and no figure here needs it.
    async with Kaleido(mathjax=False, path=path) as kaleido:
        bar = tqdm(jobs, desc="images", unit="figure", disable=not progress)
        return [await job(kaleido) for job in bar]


async def _photograph(kaleido: Kaleido, table: Styler, form: str, width: int, scale: float) -> bytes:
    """A table as wide as the page at most, or as its words need, and everything of it."""
    tab = await kaleido.create_tab("about:blank")

    async def ask(command: str, **details: Any) -> dict[str, Any]:
        answer: dict[str, Any] = (await tab.send_command(command, details))["result"]
        return answer

    await ask("Emulation.setDeviceMetricsOverride", width=width, height=_HEIGHT, deviceScaleFactor=scale, mobile=True)
    frame = (await ask("Page.getFrameTree"))["frameTree"]["frame"]["id"]
    await ask("Page.setDocumentContent", frameId=frame, html=_page(table, "table"))
    measured = await ask("Runtime.evaluate", expression=_MEASURE, returnByValue=True)
    across, down = measured["result"]["value"]
    if form == "pdf":
        paper = {"paperWidth": across / 96, "paperHeight": down / 96, "printBackground": True}
        image = await ask("Page.printToPDF", **paper, **dict.fromkeys(_MARGINS, 0))
    else:
        clip = {"x": 0, "y": 0, "width": across, "height": down, "scale": 1}
        image = await ask(
            "Page.captureScreenshot", format=_FORMS.get(form, form), clip=clip, captureBeyondViewport=True
        )
    await kaleido.close_tab(tab.target_id)
    return base64.b64decode(image["data"])


def _page(figure: Drawing, title: str) -> str:
    plotly = "" if isinstance(figure, Styler) else get_plotlyjs()
    return _PAGE.render(title=title, plotly=plotly, figure=html(figure, "figure"))
