"""The explorer as one HTML file: figures drawn beforehand, and a script that puts the chosen ones on the page.

Reduced against the live one: edges carry the mean over all pairs, prompts and attention are there for some pairs, circuits
in some sizes, and of each matrix the few blocks with most edited weights.
"""

from __future__ import annotations

import gzip
import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader
from plotly.offline import get_plotlyjs

from mansu_tl.errors import MansuError
from mansu_tl.explorer import pictures
from mansu_tl.explorer.results import ORIGINAL, Results, Stage
from mansu_tl.explorer.selection import Item, Selection, head_of, item_name
from mansu_tl.plots.theme import theme_named
from mansu_tl.results.files import write_text

_PAIRS, _SIZES, _BLOCKS = 8, 6, 3
_MOST_EDGES = 500  # of the largest circuit that is shown by default
_DIGITS = 4


def write(
    path: str | PathLike[str],
    results: Results,
    selection: Selection,
    pairs: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
) -> Path:
    """Write the page; plotly.js is in it, and it loads nothing. Arguments and errors as of `Explorer.save_html`."""
    shown_pairs = _pairs(results, selection, pairs)
    shown_sizes = _sizes(results, selection, sizes)
    data = _data(results, selection, shown_pairs, shown_sizes)
    # Packed, because it says the same things many times over; and in base64 no text can close the script element.
    packed = gzip.compress(json.dumps(data, separators=(",", ":"), allow_nan=False).encode(), mtime=0)
    text = b64encode(packed).decode()
    template = Environment(loader=PackageLoader("mansu_tl.explorer", "page"), autoescape=True).get_template("page.html")
    title = f"Explorer: {', '.join(results.titles.values())}"
    return write_text(path, template.render(title=title, plotly=get_plotlyjs(), data=text))


def _pairs(results: Results, selection: Selection, asked: Sequence[int] | None) -> list[int]:
    count = len(results.pairs)
    if asked is None:
        few = min(_PAIRS, count)
        return sorted({selection.pair, *(i * count // few for i in range(few))})
    for pair in asked:
        if not 0 <= pair < count:
            raise MansuError(f"explorer: pair {pair}; choose 0..{count - 1}")
    return sorted({selection.pair, *asked})


def _sizes(results: Results, selection: Selection, asked: Sequence[int] | None) -> list[int]:
    if asked is not None:
        for size in asked:
            results.circuit(size)  # refuses one that is not there
        return sorted({selection.size, *asked})
    drawable = [n for n in results.sizes if results.circuit(n).n_edges and n <= max(_MOST_EDGES, selection.size)]
    at = drawable.index(selection.size)
    start = max(0, min(at - _SIZES // 2, len(drawable) - _SIZES))
    return sorted({*drawable[start : start + _SIZES], drawable[-1]})


def _data(results: Results, selection: Selection, pairs: list[int], sizes: list[int]) -> dict[str, Any]:
    """Everything the script needs: names, numbers, and figures by the key of what they show."""
    largest = results.circuit(max(sizes))
    items: list[Item] = [*largest.edges, *largest.nodes, "logits"]
    if selection.item not in items:
        items.insert(0, selection.item)
    stages: list[Stage] = [ORIGINAL]
    for method in results.edits:
        stages += [(method, ""), *((method, q) for q in results.quantizers)]
    mean = replace(selection, alone=False)
    graphs, scatters, scores_figures, attention_figures = {}, {}, {}, {}
    rulers: dict[str, Any] = {}
    head = next((i for i in items if head_of(i, largest.kv_groups)), None)
    for method in results.edits:
        for q in results.quantizers:
            at = replace(mean, method=method, quantizer=q, part="")
            for size in sizes:
                key = f"{method}|{q}|{size}"
                graphs[key] = _figure(pictures.graph(results, replace(at, size=size)))
                scatters[key] = _figure(pictures.scatter(results, replace(at, size=size)))
            scores_figures[f"{method}|{q}"] = _figure(pictures.item_scores(results, at))
            if head is not None:
                for pair in pairs:
                    figure = pictures.attention(results, replace(at, item=head, pair=pair))
                    attention_figures[f"{method}|{q}|{pair}"] = _figure(figure)
            rulers |= _rulers(results, at, items)
    heads = sorted({h for i in items if (h := head_of(i, largest.kv_groups))})
    return {
        "methods": [[name, results.titles[name]] for name in results.edits],
        "quantizers": list(results.quantizers),
        "sizes": [[n, results.circuit(n).n_edges, float(results.circuit(n).faithfulness)] for n in sizes],
        "pairs": [_pair(results, pair) for pair in pairs],
        "items": [_item(results, item, largest.kv_groups) for item in items],
        "start": {
            "method": selection.method,
            "quantizer": selection.quantizer,
            "size": selection.size,
            "pair": selection.pair,
            "item": item_name(selection.item),
        },
        "template": theme_named("light").template.to_plotly_json(),
        "graphs": graphs,
        "scatters": scatters,
        "curve": _figure(pictures.curve(results, mean)),
        "scores": scores_figures,
        "rulers": rulers,
        "attention": attention_figures,
        "values": {"|".join(stage): {item_name(i): _values(results, stage, i) for i in items} for stage in stages},
        "patterns": {
            "|".join(stage): {str(pair): {h: _pattern(results, stage, pair, h) for h in heads} for pair in pairs}
            for stage in stages
        },
        "answers": {
            "|".join(stage): {
                "title": results.title(stage),
                "rows": {str(p): _answer(results, stage, p) for p in pairs},
            }
            for stage in stages
        },
    }


def _rulers(results: Results, at: Selection, items: list[Item]) -> dict[str, Any]:
    """One ruler for each part of each item, or why there is none."""
    out: dict[str, Any] = {}
    for item in items:
        for part in results.parts(item):
            key = f"{at.method}|{at.quantizer}|{part.name}"
            if key not in out:
                try:
                    chosen = replace(at, item=item, part=part.name)
                    out[key] = _figure(pictures.ruler(results, chosen, _BLOCKS))
                except MansuError as error:
                    out[key] = {"message": str(error)}
                out[key]["edited"] = pictures.n_edited(results, at.method, part)
    return out


def _pair(results: Results, pair: int) -> dict[str, Any]:
    prompts = {"clean": results.tokens(pair), "corrupt": results.tokens(pair, corrupt=True)}
    names = dict(zip(("answer", "rival"), results.asked(pair), strict=True))
    return {"number": pair, "label": results.label(pair), **prompts, **names}


def _item(results: Results, item: Item, kv_groups: int) -> dict[str, Any]:
    return {
        "name": item_name(item),
        "edge": list(item) if isinstance(item, tuple) else None,
        "head": head_of(item, kv_groups),
        "parts": [part.name for part in results.parts(item)],
    }


def _values(results: Results, stage: Stage, item: Item) -> dict[str, Any]:
    values = pictures.item_values(results, stage, item)
    mean, low, high = pictures.mean_and_interval(results, values)
    return {"pairs": [_short(v) for v in values.tolist()], "mean": [_short(mean), _short(low), _short(high)]}


def _pattern(results: Results, stage: Stage, pair: int, head: str) -> list[list[float | None]]:
    pattern = results.pattern(stage, pair, head).tolist()
    return [[round(v, 3) if k <= q or v else None for k, v in enumerate(row)] for q, row in enumerate(pattern)]


def _answer(results: Results, stage: Stage, pair: int) -> list[Any]:
    found = results.answers(stage)
    return [_short(float(found.probability[pair])), _short(float(found.difference[pair])), found.likeliest[pair]]


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _figure(figure: go.Figure) -> dict[str, Any]:
    """A figure as plain JSON values, numbers shortened; its template is on the page once."""
    found: dict[str, Any] = json.loads(figure.to_json())
    found["layout"].pop("template", None)
    return _shortened({"data": found["data"], "layout": found["layout"]})


def _shortened(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _shortened(inner) for key, inner in value.items()}
    return [_shortened(inner) for inner in value] if isinstance(value, list) else value
