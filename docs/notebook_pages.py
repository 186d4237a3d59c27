"""A notebook as a page: prose, code, and the outputs that are stored in it; nothing is run."""

from __future__ import annotations

import base64
import json
import re
from html import escape
from pathlib import Path
from typing import Any

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?=\S)([^$\n]+?)(?<=\S)\$(?!\d)", re.DOTALL)
# Cells that a reader unfolds, by tag, and what stands on the fold.
_FOLDED = {"solution": "Solution", "check": "What the text says, as a check"}
# What a page can show, best first.
_IMAGES = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """The page as Markdown, and its images by file name; solutions and checks are folded with what they show.

    Raises:
        ValueError: an output that no page can show, such as a figure stored without an image.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    parts: list[str] = []
    images: dict[str, bytes] = {}
    for number, cell in enumerate(notebook["cells"]):
        source = _text(cell["source"])
        if cell["cell_type"] == "markdown":
            # Pages of docs/ lie beside the tutorials on the site.
            source = source.replace("](../docs/", "](../")
            # Markdown inside a hidden answer is rendered, as Jupyter does.
            parts.append(re.sub(r"<(details|summary)>", r'<\1 markdown="1">', _with_formulas(source)))
        elif cell["cell_type"] == "code" and source.strip():
            fold = next((_FOLDED[tag] for tag in cell.get("metadata", {}).get("tags", []) if tag in _FOLDED), "")
            parts += [f'<details markdown="1"><summary>{fold}</summary>'] if fold else []
            parts.append(_fenced(source, "python"))
            for output in _joined(cell["outputs"]):
                parts.append(_shown(output, f"{path.stem}_{number}", images))
            parts += ["</details>"] if fold else []
    link = f'*The notebook itself: [{path.name}]({path.name}){{ download="{path.name}" }}*'
    return "\n\n".join([*parts[:1], link, *parts[1:]]) + "\n", images


def _with_formulas(source: str) -> str:
    """TeX between dollars as MathML, which browsers draw by themselves; code is left alone."""
    pieces = _CODE.split(source)
    for i in range(0, len(pieces), 2):
        pieces[i] = _FORMULA.sub(lambda m: _mathml(m[1] or m[2], block=bool(m[1])), pieces[i])
    return "".join(pieces)


def _mathml(tex: str, block: bool) -> str:
    from latex2mathml.converter import convert

    mathml = convert(" ".join(tex.split()), display="block" if block else "inline")
    # Marks of Markdown that are left in a formula.
    mathml = mathml.replace("*", "&#42;").replace("_", "&#95;")
    return f"\n\n<div>{mathml}</div>\n\n" if block else f"<span>{mathml}</span>"


def _joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The outputs, with streams that follow each other as one."""
    joined: list[dict[str, Any]] = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output["output_type"] == "stream" == last.get("output_type") and output["name"] == last["name"]:
            last["text"] += _text(output["text"])
        else:
            joined.append({**output, "text": _text(output.get("text", ""))})
    return joined


def _shown(output: dict[str, Any], stem: str, images: dict[str, bytes]) -> str:
    kind = output["output_type"]
    if kind == "stream":
        return _printed(output["text"])
    if kind == "error":
        return _printed("\n".join(output["traceback"]))
    data = output["data"]
    for mime, ending in _IMAGES.items():
        if mime in data:
            name = f"{stem}_{len(images)}.{ending}"
            text = _text(data[mime])
            images[name] = text.encode() if ending == "svg" else base64.b64decode(text)
            width = output.get("metadata", {}).get(mime, {}).get("width")
            return f"![output of the cell above]({name})" + (f'{{ width="{width}" }}' if width else "")
    if "text/html" in data:
        # One line: an empty line would end the raw block.
        return f'<div class="output">{" ".join(_text(data["text/html"]).split())}</div>'
    if "text/markdown" in data:
        return _text(data["text/markdown"])
    if "text/plain" in data:
        return _printed(_text(data["text/plain"]))
    raise ValueError(f"{stem}: an output of {sorted(data)} without text or image; store an image of it")


def _printed(text: str) -> str:
    return f'<pre class="output">{escape(_ANSI.sub("", text).rstrip())}</pre>'.replace("\n", "&#10;")


def _fenced(text: str, language: str) -> str:
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def _text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)
