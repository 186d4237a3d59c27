"""The explorer as one HTML page: its data as JSON, a script that draws it, and a way to the model where there is one.

A page that is saved to a file holds the answers to what it may be asked: edges carry the mean over all pairs, prompts and
attention are there for some pairs and heads, circuits in some sizes, scores pair by pair of the strongest edges, and of the
weights the most edited ones. It says so where one asks for more.
"""

from __future__ import annotations

import gzip
import json
import math
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from plotly.offline import get_plotlyjs
from tqdm.auto import tqdm

from mansu_tl.circuit import Circuit
from mansu_tl.circuit.graph import writers_behind
from mansu_tl.errors import MansuError
from mansu_tl.explorer import pictures
from mansu_tl.explorer.requests import answered, key_of, short
from mansu_tl.explorer.results import ORIGINAL, Results, Stage
from mansu_tl.explorer.selection import Selection, item_name
from mansu_tl.models import parameters
from mansu_tl.plots.theme import theme_named
from mansu_tl.results.files import write_text
from mansu_tl.results.result import bars
from mansu_tl.verification import CadByDepth

_PAIRS, _SIZES = 8, 6
_MOST_EDGES = 500  # of the largest circuit in a file, if the chosen one is not larger
_ITEMS, _HEADS, _RULERS = (
    200,
    40,
    24,
)  # in a file: edges pair by pair, heads' patterns, weights of a method and quantizer
_SLOW = 20_000_000  # parameters of a model whose edges are scored in minutes
Request = tuple[Any, ...]


def write(
    path: str | PathLike[str],
    results: Results,
    selection: Selection,
    depth: Sequence[CadByDepth],
    pairs: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    progress: bool | None = None,
) -> Path:
    """Write the page with everything in it; it loads nothing. Arguments and errors as of `Explorer.save_html`."""
    return write_text(path, alone(results, selection, depth, pairs, sizes, progress))


def alone(
    results: Results,
    selection: Selection,
    depth: Sequence[CadByDepth],
    pairs: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    progress: bool | None = None,
) -> str:
    """The page without a model behind it."""
    shown_pairs = _pairs(results, selection, pairs)
    shown_sizes = _sizes(results, selection, sizes)
    requests = list(dict.fromkeys(_requests(results, selection, shown_pairs, shown_sizes)))
    asked = tqdm(requests, "page", unit="answer", disable=not bars(progress))
    answers = {key_of(request): answered(results, request) for request in asked}
    return render(results, selection, depth, {"kind": "none"}, shown_pairs, shown_sizes, answers)


def render(
    results: Results,
    selection: Selection,
    depth: Sequence[CadByDepth],
    live: Mapping[str, str],
    pairs: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    answers: Mapping[str, Any] | None = None,
) -> str:
    """The page as text.

    Args:
        live: how it reaches the model: {"kind": "none"}, "frame" (the page around it), or "http" with its token.
        pairs: that can be chosen; all where not given.
        sizes: that can be chosen; all where not given.
        answers: to requests, by their keys.
    """
    sizes = results.sizes if sizes is None else sizes
    data = {
        **_facts(results, sizes, range(len(results.pairs)) if pairs is None else pairs),
        "start": chosen(selection),
        "template": theme_named("light").template.to_plotly_json(),
        "depth": [_depth(each) for each in depth],
        "live": dict(live),
        "answers": dict(answers or {}),
    }
    # Packed, because it says the same things many times over; and in base64 no text can close the script element.
    packed = gzip.compress(json.dumps(data, separators=(",", ":"), allow_nan=False).encode(), mtime=0)
    template = Environment(loader=PackageLoader("mansu_tl.explorer", "page"), autoescape=True).get_template("page.html")
    title = f"Explorer: {', '.join(results.titles.values())}"
    return template.render(title=title, plotly=get_plotlyjs(), data=b64encode(packed).decode())


def chosen(selection: Selection) -> dict[str, Any]:
    """What is chosen, as the page's script has it."""
    return {**asdict(selection), "item": item_name(selection.item)}


def _facts(results: Results, sizes: Sequence[int], pairs: Sequence[int]) -> dict[str, Any]:
    """What holds of every choice."""
    ranking = results.ranking
    layers, heads, _ = ranking.sizes
    return {
        "methods": [[name, results.titles[name]] for name in results.edits],
        "quantizers": list(results.quantizers),
        "layers": layers,
        "heads": heads,
        "groups": ranking.group,
        "writers": list(ranking.writers),
        "readers": list(ranking.readers),
        "total": int(ranking.exists.sum()),
        "slow": sum(weight.numel() for weight in parameters(results.model).values()) > _SLOW,
        "metric": ranking.metric.replace("_", " "),
        "sizes": [[n, results.circuit(n).n_edges, _known(results, n)] for n in sizes],
        "pairs": [_pair(results, pair) for pair in pairs],
        "names": [results.label(pair) for pair in range(len(results.pairs))],
    }


def _known(results: Results, size: int) -> float | None:
    """Faithfulness where it needs no run."""
    own = results.own
    return short(own[1].faithfulness) if own is not None and own[0] == size else None


def _pair(results: Results, pair: int) -> dict[str, Any]:
    prompts = {"clean": results.tokens(pair), "corrupt": results.tokens(pair, corrupt=True)}
    names = dict(zip(("answer", "rival"), results.asked(pair), strict=True))
    return {"number": pair, "label": results.label(pair), **prompts, **names}


def _depth(found: CadByDepth) -> dict[str, Any]:
    verdict, table = found.verdict(), found.to_dataframe()
    columns = ("cad", "cad_low", "cad_high", "near_cad", "near_cad_low", "near_cad_high", "grafted_percent")
    return {
        "label": found.label,
        "verdict": verdict.name,
        "why": verdict.why,
        "layers": table["layer"].tolist(),
        "read": int(table["before_reading"].sum()) - 0.5,
        "judged": found.judged,
        **{name: [None if math.isnan(v) else short(v) for v in table[name].astype(float)] for name in columns},
    }


def _requests(results: Results, selection: Selection, pairs: Sequence[int], sizes: Sequence[int]) -> Iterator[Request]:
    """What a page in a file can be asked, of what it offers."""
    stages: list[Stage] = [ORIGINAL]
    for method in results.edits:
        stages += [(method, ""), *((method, q) for q in results.quantizers)]
    largest = results.circuit(max(sizes))
    nodes = [*largest.nodes, "logits"]
    items = [*nodes, *map(item_name, largest.edges[:_ITEMS])]
    first = item_name(selection.item)
    items += [first] if first not in items else []
    yield ("curve",)
    for size in sizes:
        yield ("circuit", size)
        yield ("faithfulness", size)
        for stage in stages:
            yield ("scores", *stage, size, None)
    heads = _heads(largest)
    for stage in stages:
        yield ("answers", *stage)
        yield from (("values", *stage, item) for item in items)
        yield from (("pattern", *stage, pair, head) for pair in pairs for head in heads)
    for method in results.edits:
        yield from (("parts", method, item) for item in items)
        edited = _most_edited(results, method, nodes)
        for q in results.quantizers:
            yield from (("ruler", method, q, part) for part in edited)


def _heads(circuit: Circuit) -> list[str]:
    """The heads of a circuit through which most |score| goes."""
    flow: dict[str, float] = {}
    table = circuit.to_dataframe()
    for writer, reader, score in zip(table["writer"], table["reader"], table["score"], strict=True):
        for head in (writer, *writers_behind(reader, circuit.kv_groups)):
            if "H" in head:
                flow[head] = flow.get(head, 0.0) + abs(score)
    return sorted(flow, key=lambda head: -flow[head])[:_HEADS]


def _most_edited(results: Results, method: str, nodes: Sequence[str]) -> list[str]:
    """The nodes' weights of which a method has edited most."""
    counts = {part.name: pictures.n_edited(results, method, part) for node in nodes for part in results.parts(node)}
    return sorted(counts, key=lambda name: -counts[name])[:_RULERS]


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
    offered = [n for n in results.sizes if n <= max(_MOST_EDGES, selection.size)]
    at = offered.index(selection.size)
    start = max(0, min(at - _SIZES // 2, len(offered) - _SIZES))
    return sorted({*offered[start : start + _SIZES], offered[-1]})
