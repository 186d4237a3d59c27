"""What the page asks for: a list that begins with what is wanted; the answer is plain JSON.

A page with a model behind it sends its requests there; one that was saved holds the answers to some of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mansu_tl.errors import MansuError
from mansu_tl.explorer import pictures
from mansu_tl.explorer.live import Likely, asked, switched
from mansu_tl.explorer.results import ORIGINAL, Results, Stage
from mansu_tl.explorer.selection import parsed_item

_DIGITS = 5
_RULED_BLOCKS = 4
Answer = dict[str, Any]


def key_of(request: Sequence[Any]) -> str:
    """A request as the page's script writes it."""
    return json.dumps(list(request), separators=(",", ":"), ensure_ascii=False)


def answered(results: Results, request: object) -> Answer:
    """The answer to a request of the page; where it is refused, {"error": one line}."""
    try:
        return answer(results, request)
    except MansuError as error:
        return {"error": " ".join(str(error).split())}


def answer(results: Results, request: object) -> Answer:
    """The answer to a request.

    Raises:
        MansuError: no such request, or one that cannot be answered.
    """
    if not isinstance(request, list | tuple) or not request or request[0] not in _ANSWERS:
        raise MansuError(f"explorer: request {request!r}; it begins with one of {', '.join(_ANSWERS)}")
    what, *arguments = request
    kinds, make = _ANSWERS[what]
    if len(arguments) != len(kinds) or not all(map(_fits, arguments, kinds)):
        raise MansuError(f"explorer: request {what!r} takes {', '.join(kinds)}; got {arguments!r}")
    _require(results, dict(zip(kinds, arguments, strict=True)))
    return make(results, *arguments)


def short(value: float) -> float | None:
    """A number of a page, with five significant digits."""
    return None if math.isnan(value) else float(f"{value:.{_DIGITS}g}")


_FITS: dict[str, Callable[[Any], bool]] = {
    "method": lambda v: isinstance(v, str),
    "quantizer": lambda v: isinstance(v, str),
    "size": lambda v: type(v) is int,
    "pair": lambda v: type(v) is int,
    "pair or null": lambda v: v is None or type(v) is int,
    "pair or prompt": lambda v: type(v) is int or isinstance(v, str),
    "tokens": lambda v: type(v) is int,
    "names": lambda v: isinstance(v, list | tuple) and all(isinstance(each, str) for each in v),
}


def _fits(value: object, kind: str) -> bool:
    return _FITS.get(kind, lambda v: isinstance(v, str))(value)


def _require(results: Results, given: Mapping[str, Any]) -> None:
    """Refuse what is not there."""
    for what, known in (("method", ("", *results.edits)), ("quantizer", ("", *results.quantizers))):
        if what in given and given[what] not in known:
            raise MansuError(f"explorer: {what} {given[what]!r}; choose one of {', '.join(known[1:])}")
    for what in ("pair", "pair or null", "pair or prompt"):
        if type(given.get(what)) is int and not 0 <= given[what] < len(results.pairs):
            raise MansuError(f"explorer: pair {given[what]}; choose 0..{len(results.pairs) - 1}")
    if "item" in given:
        results.require_item(parsed_item(given["item"]))


def _stages(method: str, quantizer: str) -> tuple[Stage, ...]:
    """The three models of a method and a quantizer."""
    return ORIGINAL, (method, ""), (method, quantizer)


def _circuit(results: Results, size: int) -> Answer:
    circuit = results.circuit(size)
    rows = {name: i for i, name in enumerate(circuit.writers)}
    columns = {name: i for i, name in enumerate(circuit.readers)}
    edges = circuit.edges
    return {"writers": [rows[w] for w, _ in edges], "readers": [columns[r] for _, r in edges]}


def _scores(results: Results, method: str, quantizer: str, size: int, pair: int | None) -> Answer:
    stage = method, quantizer
    out: Answer = {"scores": [short(v) for v in results.edge_scores(stage, size, pair).tolist()]}
    if stage != ORIGINAL:
        found = results.divergence(stage, size, pair)
        out["cad"] = [short(found.value), *map(short, found.interval)]
    return out


def _faithfulness(results: Results, size: int) -> Answer:
    return {"faithfulness": short(results.faithfulness(size))}


def _curve(results: Results) -> Answer:
    curve = results.curve()
    control = curve.control.mean(0).tolist() if len(curve.control) else []
    return {
        "sizes": list(curve.sizes),
        "faithfulness": [short(v) for v in curve.faithfulness.tolist()],
        "random": [short(v) for v in control],
    }


def _answers(results: Results, method: str, quantizer: str) -> Answer:
    found = results.answers((method, quantizer))
    rows = zip(found.probability.tolist(), found.difference.tolist(), found.likeliest, strict=True)
    return {"rows": [[short(p), short(d), text] for p, d, text in rows]}


def _values(results: Results, method: str, quantizer: str, item: str) -> Answer:
    values = pictures.item_values(results, (method, quantizer), parsed_item(item))
    return {
        "pairs": [short(v) for v in values.tolist()],
        "mean": [short(v) for v in pictures.mean_and_interval(results, values)],
    }


def _pattern(results: Results, method: str, quantizer: str, pair: int, head: str) -> Answer:
    if "H" not in head:
        raise MansuError(f"explorer: {head} has no attention pattern; choose a head")
    results.require_item(head)
    rows = results.pattern((method, quantizer), pair, head).tolist()
    return {"pattern": [[round(v, 3) for v in row[: q + 1]] for q, row in enumerate(rows)]}


def _parts(results: Results, method: str, item: str) -> Answer:
    parts = results.parts(parsed_item(item))
    return {"parts": [[part.name, pictures.n_edited(results, method, part)] for part in parts]}


def _ruler(results: Results, method: str, quantizer: str, part: str) -> Answer:
    drawn = pictures.ruler_of(results, method, quantizer, results.part(part), _RULED_BLOCKS)
    figure: dict[str, Any] = json.loads(drawn.to_json())
    figure["layout"].pop("template", None)  # on the page once
    return {"figure": _shortened({"data": figure["data"], "layout": figure["layout"]})}


def _ask(results: Results, method: str, quantizer: str, prompt: str, tokens: int) -> Answer:
    stages = _stages(method, quantizer)
    found = asked(results, stages, prompt, tokens)
    rows = zip(found.said.models, found.said.answers[0], found.likely, strict=True)
    return {"rows": [{"model": name, "says": text, "likely": _listed(likely)} for name, text, likely in rows]}


def _switch(
    results: Results,
    method: str,
    quantizer: str,
    size: int,
    off: Sequence[str],
    asked_of: int | str,
    inside: str,
    kind: str,
    counterfactual: str,
) -> Answer:
    found = switched(results, _stages(method, quantizer), size, off, asked_of, inside, kind, counterfactual)
    return {
        "rows": [
            {
                "model": name,
                "probability": [short(v) for v in found.probability[i].tolist()],
                "difference": [short(v) for v in found.difference[i].tolist()],
                "says": list(found.says[i]),
                "likely": [_listed(each) for each in found.likely[i]],
            }
            for i, name in enumerate(found.models)
        ]
    }


def _listed(likely: Likely) -> list[list[Any]]:
    return [[token, short(p)] for token, p in zip(likely.tokens, likely.probabilities, strict=True)]


def _shortened(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _shortened(inner) for key, inner in value.items()}
    return [_shortened(inner) for inner in value] if isinstance(value, list) else value


# By name: what the arguments are, and what makes the answer.
_ANSWERS: dict[str, tuple[tuple[str, ...], Callable[..., Answer]]] = {
    "circuit": (("size",), _circuit),
    "scores": (("method", "quantizer", "size", "pair or null"), _scores),
    "faithfulness": (("size",), _faithfulness),
    "curve": ((), _curve),
    "answers": (("method", "quantizer"), _answers),
    "values": (("method", "quantizer", "item"), _values),
    "pattern": (("method", "quantizer", "pair", "head"), _pattern),
    "parts": (("method", "item"), _parts),
    "ruler": (("method", "quantizer", "part"), _ruler),
    "ask": (("method", "quantizer", "prompt", "tokens"), _ask),
    "switch": (
        ("method", "quantizer", "size", "names", "pair or prompt", "inside", "kind", "counterfactual"),
        _switch,
    ),
}
