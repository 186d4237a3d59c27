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
    reader = _Reader(tensors)
    result = reader.dataclass(cls, facts)
    if reader.left:
        raise MismatchError(f"{min(reader.left)!r} is unknown")
    return result


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


class _Reader:
    """Builds values as annotations say, from JSON nodes and the tensors that they name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.left = dict(tensors)
        self.shaped: list[tuple[str, Any, Tensor]] = []

    def dataclass(self, cls: type, node: Any, at: str = "") -> Any:
        where = f"{at}." if at else ""
        if not isinstance(node, dict):
            raise MismatchError(f"{at or cls.__name__!r} is no {cls.__name__}")
        hints = typing.get_type_hints(cls)
        known = {f.name: f for f in fields(cls) if f.init}
        needed = {name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
        for names, problem in ((needed - set(node), "missing"), (set(node) - set(known), "unknown")):
            if names:
                raise MismatchError(f"{where + min(names)!r} is {problem} in this {cls.__name__}")
        outer, self.shaped = self.shaped, []
        values = {name: self.value(hints[name], one, where + name) for name, one in node.items()}
        # One scope a dataclass: "pair" is as long in one of its fields as in every other.
        with jaxtyped("context"):
            for place, hint, tensor in self.shaped:
                if not isinstance(tensor, hint):
                    size = f"{tuple(tensor.shape)} of {tensor.dtype}"
                    raise MismatchError(f"{place!r} is {size}, not {_name(hint)} as the other fields have it")
        self.shaped = outer
        return cls(**values)

    def value(self, hint: Any, node: Any, at: str) -> Any:
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        kind = origin or hint
        if kind in (typing.Union, types.UnionType):
            return self.member(inner, node, at)
        # Any first: from Python 3.11 on it is a class, and nothing would be one of its instances.
        if hint is Any or kind is typing.Literal:
            if hint is Any or node in inner:
                return node
        elif issubclass(kind, Tensor | AbstractArray):
            return self.tensor(hint, node, at)
        elif is_dataclass(kind) and isinstance(kind, type):
            return self.dataclass(kind, node, at)
        elif kind is pd.DataFrame and isinstance(node, dict):
            return pd.DataFrame(node)
        elif kind is Path and isinstance(node, str):
            return Path(node)
        # A whole number may stand for a float, but true is neither.
        elif (type(node) is kind and kind in _PLAIN) or (kind is float and type(node) is int):
            return node
        elif kind is tuple and isinstance(node, list):
            return self.tuple(inner, node, at)
        elif issubclass(kind, Mapping) and isinstance(node, dict | list):
            keys, values = inner or (str, Any)
            pairs = node.items() if isinstance(node, dict) else node
            return {self.value(keys, key, at): self.value(values, one, f"{at}:{key}") for key, one in pairs}
        elif issubclass(kind, Sequence | AbstractSet) and kind is not str and isinstance(node, list):
            items = self.tuple((*(inner or (Any,)), ...), node, at)
            return frozenset(items) if issubclass(kind, AbstractSet) else list(items) if kind is list else items
        raise MismatchError(f"{at!r} is {_short(node)}, not {_name(hint)}")

    def member(self, hints: Sequence[Any], node: Any, at: str) -> Any:
        """The first member of a union that fits; where none does, what is wrong with the first that is not None."""
        if node is None and type(None) in hints:
            return None
        problems = []
        for hint in (hint for hint in hints if hint is not type(None)):
            left, shaped = dict(self.left), list(self.shaped)
            try:
                return self.value(hint, node, at)
            except MismatchError as problem:
                problems.append(problem)
                self.left, self.shaped = left, shaped
        raise problems[0]

    def tensor(self, hint: Any, node: Any, at: str) -> Tensor:
        name = node.removeprefix(_TENSOR) if isinstance(node, str) and node.startswith(_TENSOR) else None
        if name not in self.left:
            raise MismatchError(f"{at!r} is missing: no tensor of that name")
        self.shaped.append((at, hint, self.left[name]))
        return self.left.pop(name)

    def tuple(self, inner: Sequence[Any], node: list[Any], at: str) -> Any:
        hints = [inner[0]] * len(node) if len(inner) == 2 and inner[1] is ... else list(inner) or [Any] * len(node)
        if len(hints) != len(node):
            raise MismatchError(f"{at!r} has {len(node)} items, not {len(hints)}")
        return tuple(self.value(hint, one, f"{at}.{i}") for i, (hint, one) in enumerate(zip(hints, node, strict=True)))


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
