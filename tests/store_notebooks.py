"""Run the notebooks from a clean kernel and store what they show, small enough for a repository.

    python -m tests.store_notebooks [NAME ...]      # such as 02_patching; all of them where none is named
    python -m tests.store_notebooks --redraw [NAME ...]     # runs nothing: the stored figures' images again, from their data

Figures become PNGs of twice the size at which they are shown, and keep their data in the output's metadata, so that a test
can compare them with a fresh run. Standard error, progress bars and times are dropped. Whoever runs a notebook gets live
plotly figures as always.
"""

from __future__ import annotations

import base64
import json
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import environ
from pathlib import Path
from typing import Any

import nbformat
import plotly.graph_objects as go
from nbclient import NotebookClient
from nbformat import NotebookNode

from mansu_tl.plots import write_images
from mansu_tl.plots.theme import theme_named
from mansu_tl.results.files import write_text
from tests.notebook_outputs import FIGURE, MADE_ON, PLOTLY, figure_data, packed, processor, unpacked, widget

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
MOST_BYTES = 3_000_000
# In pixels of the page; screens with twice as many get an image of twice as many.
WIDTH = 960
SCALE = 2


def run(path: Path) -> NotebookNode:
    """The notebook with the outputs of a run from a clean kernel; the file stays as it is."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(FOLDER)}}
    )
    with _one_thread():
        client.execute()
    return notebook


def store(notebook: NotebookNode) -> NotebookNode:
    """The same notebook with outputs that are small and say nothing about the day, and of the machine its processor."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _stored(cell.outputs)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        MADE_ON: processor(),
    }
    return notebook


def redrawn(path: Path) -> NotebookNode:
    """The stored notebook with the images of its figures drawn again, from the data beside them."""
    notebook = nbformat.read(path, as_version=4)
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    for output in shown:
        if FIGURE not in output.get("metadata", {}):
            continue
        figure = go.Figure(unpacked(output.metadata[FIGURE]))
        # What is stored has no theme: the package's figures, whose titles are bold, have its light one.
        ours = (figure.layout.title.text or "").startswith("<b>")
        figure.update_layout(template=theme_named("light").template if ours else "plotly_white")
        output.update(_image(json.loads(figure.to_json())))
    return notebook


def main(names: Sequence[str]) -> None:
    """Run and store the notebooks of these names, or draw their images again."""
    redraw, names = "--redraw" in names, [name for name in names if name != "--redraw"]
    paths = [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        start = time.perf_counter()
        notebook = redrawn(path) if redraw else store(run(path))
        seconds = time.perf_counter() - start
        text = nbformat.writes(notebook) + "\n"
        if len(text) > MOST_BYTES:
            raise SystemExit(f"{path.name}: {len(text):,} bytes with its outputs, over {MOST_BYTES:,}; show less")
        write_text(path, text)
        print(f"{path.name}: {seconds:.0f} s, {len(text):,} bytes")


def _stored(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    text = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    out = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
    for output in outputs:
        if output.output_type == "stream" or widget(output):
            continue
        if PLOTLY in output.get("data", {}):
            out.append(nbformat.v4.new_output("display_data", **_image(output.data[PLOTLY])))
        else:
            out.append(output)
    return out


def _image(figure: dict[str, Any]) -> dict[str, Any]:
    """The data and metadata of an output that shows a figure as an image, at half the size that the image has."""
    image = base64.b64encode(_png(figure)).decode()
    metadata = {FIGURE: packed(figure_data(figure)), "image/png": {"width": WIDTH}}
    return {"data": {"image/png": image}, "metadata": metadata}


def _png(figure: dict[str, Any]) -> bytes:
    drawn = go.Figure({"data": figure["data"], "layout": figure["layout"]})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        return smaller(write_images({path: drawn}, width=WIDTH, scale=SCALE)[0].read_bytes())


def smaller(png: bytes) -> bytes:
    """The same PNG, pixel for pixel, with its data compressed as far as zlib can; Chromium is in a hurry."""
    head, parts, at = png[:8], [], 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        parts.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + size]))
        at += 12 + size
    data = zlib.compress(zlib.decompress(b"".join(body for kind, body in parts if kind == b"IDAT")), 9)
    kept = [(kind, body) for kind, body in parts if kind in (b"IHDR", b"PLTE", b"tRNS")]
    return head + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [*kept, (b"IDAT", data), (b"IEND", b"")]
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in the same order wherever the notebooks run; the kernel takes its environment from here."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: environ.get(name) for name in names}
    environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                environ.pop(name)
            else:
                environ[name] = value


if __name__ == "__main__":
    main(sys.argv[1:])
