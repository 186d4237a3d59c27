"""What a notebook showed: read from its outputs, and compared with what another run showed.

Words and whole numbers have to be equal. Decimal numbers may differ by 2 % or by one in the last digit that is printed.
Figures are compared by their data (traces and layout), never by pixels. This holds on the kind of processor that made the
outputs; on another one sums are rounded otherwise, hundreds of steps of an edit part ways, and single questions and
weights with them: there three quarters of the numbers have to agree.
"""

from __future__ import annotations

import base64
import json
import platform
import re
import zlib
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nbformat import NotebookNode

PLOTLY = "application/vnd.plotly.v1+json"
# Where a stored figure keeps its data: in the metadata of the output whose image stands in for it.
FIGURE = "figure"
TOLERANCE = 0.02
# Points near zero are compared on the scale of their trace; numbers that are not drawn have none.
OF_THE_LARGEST = 2e-3
_DRAWN = ("x", "y", "z")
_DIGITS = 5
_NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?")
_VOLATILE = (
    (re.compile(r"0x[0-9a-f]{6,}"), "<address>"),
    (re.compile(r"(?:/[\w.~-]+){2,}/?"), "<path>"),
    (re.compile(r"\b\d+(?:\.\d+)? ?(?:ms|s|seconds|minutes)\b"), "<time>"),
)

Shown = tuple[str, Any]
# Where a stored notebook says on what it was run.
MADE_ON = "made_on"
ELSEWHERE = 0.25


def processor() -> str:
    """The kind of processor, as far as it decides how sums are rounded."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    model = found[1] if found else platform.processor()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def numbers(value: Any) -> int:
    """How many numbers are in what was shown."""
    if isinstance(value, dict):
        return sum(map(numbers, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(numbers, value))
    return len(_NUMBER.findall(value)) if isinstance(value, str) else int(_is_number(value))


def shown(cell: NotebookNode) -> list[Shown]:
    """What a code cell showed, in order: ("text", str) or ("figure", plotly's data), standard output first."""
    outputs: list[NotebookNode] = cell.get("outputs", [])
    text = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    out: list[Shown] = [("text", text)] if text else []
    for output in outputs:
        if output.output_type not in ("display_data", "execute_result"):
            continue
        if FIGURE in output.metadata:
            out.append(("figure", unpacked(output.metadata[FIGURE])))
        elif PLOTLY in output.data:
            out.append(("figure", figure_data(output.data[PLOTLY])))
        elif "text/html" in output.data:
            out.append(("text", _words(output.data["text/html"])))
        elif "text/plain" in output.data and not widget(output):
            out.append(("text", output.data["text/plain"]))
    return out


def widget(output: NotebookNode) -> bool:
    """Whether an output is a live widget, such as a progress bar, of which nothing can be stored."""
    return any(kind.startswith("application/vnd.jupyter.widget") for kind in output.get("data", {}))


def figure_data(figure: dict[str, Any]) -> Any:
    """A figure's traces and layout without its theme, numbers cut to what a picture can show."""
    layout = {key: value for key, value in figure.get("layout", {}).items() if key != "template"}
    return _rounded({"data": figure["data"], "layout": layout})


def packed(data: Any) -> str:
    """Figure data as a short text."""
    return base64.b64encode(zlib.compress(json.dumps(data, separators=(",", ":")).encode(), 9)).decode()


def unpacked(text: str) -> Any:
    """What `packed` packed."""
    return json.loads(zlib.decompress(base64.b64decode(text)))


def differences(old: list[Shown], new: list[Shown]) -> Iterator[str]:
    """What two runs of a cell show differently, a line each."""
    if [kind for kind, _ in old] != [kind for kind, _ in new]:
        yield f"shows {[kind for kind, _ in new]}, stored {[kind for kind, _ in old]}"
        return
    for (kind, before), (_, after) in zip(old, new, strict=True):
        yield from _text(before, after) if kind == "text" else _values(before, after, "figure", 0.0)


def _text(old: str, new: str) -> Iterator[str]:
    a, b = (_masked(text) for text in (old, new))
    words = [_NUMBER.sub("#", text).split() for text in (a, b)]
    if words[0] != words[1]:
        yield f"words: {' '.join(b.split())[:300]!r}, stored {' '.join(a.split())[:300]!r}"
        return
    for x, y in zip(_NUMBER.findall(a), _NUMBER.findall(b), strict=True):
        if not _same(x, y):
            yield f"number: {y}, stored {x}"


def _masked(text: str) -> str:
    for pattern, name in _VOLATILE:
        text = pattern.sub(name, text)
    return text


def _same(old: str, new: str) -> bool:
    x, y = (float(t.replace(",", "").replace("−", "-")) for t in (old, new))
    if all(re.fullmatch(r"[-+−]?[\d,]+", t) for t in (old, new)):
        return x == y
    return abs(x - y) <= max(TOLERANCE * max(abs(x), abs(y)), 1.001 * max(_last_place(old), _last_place(new)))


def _last_place(number: str) -> float:
    """The worth of the last digit printed; none in a whole number beside a decimal one, which was rounded for reading."""
    mantissa, _, power = number.lower().partition("e")
    return 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))


def _values(old: Any, new: Any, where: str, scale: float) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for key in old:
            yield from _values(old[key], new[key], f"{where}.{key}", _largest(old[key]) if key in _DRAWN else 0.0)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _values(a, b, f"{where}[{i}]", scale)
    elif isinstance(old, str) and isinstance(new, str):
        yield from (f"{where}: {line}" for line in _text(old, new))
    elif _is_number(old) and _is_number(new):
        if abs(old - new) > max(TOLERANCE * max(abs(old), abs(new)), OF_THE_LARGEST * scale, 1e-6):
            yield f"{where}: {new}, stored {old}"
    elif old != new:
        yield f"{where}: {str(new)[:120]}, stored {str(old)[:120]}"


def _largest(value: Any) -> float:
    if isinstance(value, list):
        return max((_largest(v) for v in value), default=0.0)
    return abs(value) if _is_number(value) else 0.0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        if {"dtype", "bdata"} <= value.keys():
            array = np.frombuffer(base64.b64decode(value["bdata"]), np.dtype(value["dtype"]))
            shape = [int(n) for n in str(value.get("shape", array.size)).split(",")]
            return _rounded(array.reshape(shape).tolist())
        return {key: _rounded(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        # JSON has no NaN; a point that is not drawn.
        return None if value != value else float(f"{value:.{_DIGITS}g}")
    return value


def _words(html: str) -> str:
    """The text of an HTML output, without its style sheet."""
    return unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<style.*?</style>", " ", html, flags=re.S)))
