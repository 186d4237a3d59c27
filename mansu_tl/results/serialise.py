"""One way to and from disk for every result: its tensors by name, everything else as JSON, both checked on reading.

`pack` takes a frozen dataclass apart and `unpack` puts it together again, field by field as the class annotates it: text,
numbers, tuples, mappings, tables, paths, other dataclasses, and tensors whose dtype and shape jaxtyping checks. One axis
name has one length within one result.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import AbstractArray, jaxtyped
from torch import Tensor

from mansu_tl.errors import MansuError

_TENSOR = "tensor:"
_PLAIN = (str, int, float, bool)


class MismatchError(MansuError):
    """What a file holds is not what its class is made of: where, what, and what was expected."""


def pack(value: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A dataclass as tensors by name and JSON-able fields.

    Raises:
        MansuError: a field that cannot be written (a model, a function).
    """
    tensors: dict[str, Tensor] = {}
    return tensors, {f.name: _packed(getattr(value, f.name), f.name, tensors) for f in fields(value)}


def unpack(cls: type, tensors: Mapping[str, Tensor], facts: Any) -> Any:
    """The dataclass `cls` that `pack` took apart.

    Raises:
        MismatchError: a field is missing, unknown, or of another type, shape or dtype than the class says.
    """
    left = dict(tensors)
    out = _dataclass(cls, facts, "", left)
    if left:
        raise MismatchError(f"{min(left)!r} is unknown")
    return out


def _packed(value: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        tensors[at] = value
        return _TENSOR + at
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, pd.DataFrame):
        return {str(name): _packed(value[name].tolist(), f"{at}.{name}", tensors) for name in value.columns}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _packed(getattr(value, f.name), f"{at}.{f.name}", tensors) for f in fields(value)}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _packed(one, f"{at}:{key}", tensors) for key, one in value.items()}
        return [[_packed(key, at, tensors), _packed(one, f"{at}:{key}", tensors)] for key, one in value.items()]
    if isinstance(value, AbstractSet):
        return sorted(_packed(one, at, tensors) for one in value)
    if isinstance(value, Sequence):
        return [_packed(one, f"{at}.{i}", tensors) for i, one in enumerate(value)]
    raise MansuError(f"{at}: a {type(value).__name__} cannot be saved; save what it was computed from")


def _dataclass(cls: type, node: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    where = f"{at}." if at else ""
    if not isinstance(node, dict):
        raise MismatchError(f"{at or cls.__name__!r} is no {cls.__name__}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if f.init}
    unknown = sorted(set(node) - set(known))
    missing = [n for n, f in known.items() if n not in node and f.default is MISSING and f.default_factory is MISSING]
    if missing or unknown:
        shown = f"{where + missing[0]!r} is missing" if missing else f"{where + unknown[0]!r} is unknown"
        raise MismatchError(f"{shown} in this {cls.__name__}")
    # One scope a dataclass: "pair" is as long in one of its fields as in every other.
    with jaxtyped("context"):
        values = {name: _value(hints[name], one, where + name, tensors) for name, one in node.items()}
    return cls(**values)


def _value(hint: Any, node: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return node
    if origin in (typing.Union, types.UnionType):
        return _member(inner, node, at, tensors)
    if hint is Tensor or (isinstance(hint, type) and issubclass(hint, AbstractArray)):
        return _tensor(hint, node, at, tensors)
    if is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint, node, at, tensors)
    if hint is pd.DataFrame and isinstance(node, dict):
        return pd.DataFrame(node)
    if hint is Path and isinstance(node, str):
        return Path(node)
    if origin is typing.Literal and node in inner:
        return node
    if hint is type(None) and node is None:
        return None
    # A whole number may stand for a float, but true is neither.
    if hint in _PLAIN and (type(node) is hint or (hint is float and type(node) is int)):
        return node
    kind = origin or hint
    if kind is tuple and isinstance(node, list):
        return _tuple(inner, node, at, tensors)
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return _mapping(inner or (str, Any), node, at, tensors)
    if (
        isinstance(kind, type)
        and issubclass(kind, Sequence | AbstractSet)
        and kind is not str
        and isinstance(node, list)
    ):
        each = inner[0] if inner else Any
        found = [_value(each, one, f"{at}.{i}", tensors) for i, one in enumerate(node)]
        return frozenset(found) if issubclass(kind, AbstractSet) else found if kind is list else tuple(found)
    raise MismatchError(f"{at!r} is {_short(node)}, not {_name(hint)}")


def _member(hints: Sequence[Any], node: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    problems = []
    for hint in hints:
        before = dict(tensors)
        try:
            return _value(hint, node, at, tensors)
        except MismatchError as problem:
            tensors.update(before)
            if hint is not type(None):
                problems.append(problem)
    raise problems[0]


def _tensor(hint: Any, node: Any, at: str, tensors: dict[str, Tensor]) -> Tensor:
    if not isinstance(node, str) or not node.startswith(_TENSOR) or node.removeprefix(_TENSOR) not in tensors:
        raise MismatchError(f"{at!r} is missing: it is no tensor")
    value = tensors.pop(node.removeprefix(_TENSOR))
    if not isinstance(value, hint):
        raise MismatchError(
            f"{at!r} is {tuple(value.shape)} of {value.dtype}, not {_name(hint)} as the other fields have it"
        )
    return value


def _tuple(inner: tuple[Any, ...], node: list[Any], at: str, tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    hints = [inner[0]] * len(node) if len(inner) == 2 and inner[1] is ... else list(inner) or [Any] * len(node)
    if len(hints) != len(node):
        raise MismatchError(f"{at!r} has {len(node)} items, not {len(hints)}")
    return tuple(_value(hint, one, f"{at}.{i}", tensors) for i, (hint, one) in enumerate(zip(hints, node, strict=True)))


def _mapping(inner: tuple[Any, ...], node: Any, at: str, tensors: dict[str, Tensor]) -> dict[Any, Any]:
    if not isinstance(node, dict | list):
        raise MismatchError(f"{at!r} is {_short(node)}, not a mapping")
    pairs = node.items() if isinstance(node, dict) else [tuple(pair) for pair in node]
    return {_value(inner[0], key, at, tensors): _value(inner[1], one, f"{at}:{key}", tensors) for key, one in pairs}


def _short(node: Any) -> str:
    text = repr(node)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def require_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that hold NaN or infinity.

    Raises:
        MismatchError: one does.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise MismatchError(f"{name!r} holds numbers that are not finite; compute it again")
