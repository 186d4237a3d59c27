"""One hash for a value: what a stage read, so that what was kept is used again only if nothing of it has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from os import PathLike, fspath
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor


def digest(value: Any) -> str:
    """SHA-256 (hex) over everything in a value: type, names, order, numbers, and every tensor's bytes.

    Takes dataclasses, tensors (on any device: the device does not count), mappings (order does not count), sequences,
    sets, tables, text, numbers (numpy's as Python's), paths and None. A number's type counts: 50 is not 50.0.

    Raises:
        TypeError: a value of another kind, which would be hashed by where it lies in memory.
    """
    sha = hashlib.sha256()
    for piece in _pieces(value):
        sha.update(piece)
    return sha.hexdigest()


class Digested:
    """Gives a frozen dataclass its `digest()`."""

    def digest(self) -> str:
        """SHA-256 (hex) over its class and all of its fields; the same on every device and in every process."""
        return digest(self)


def _pieces(value: Any) -> Iterator[bytes | memoryview]:
    if isinstance(value, np.generic):  # a number that came out of an array or a table
        value = value.item()
    if isinstance(value, Tensor):
        yield from _named("tensor", f"{value.dtype} {tuple(value.shape)}")
        flat = value.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _named("fields", type(value).__name__)
        for field in fields(value):
            yield from _named("field", field.name)
            yield from _pieces(getattr(value, field.name))
        yield b")"
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        yield from _named(type(value).__name__, repr(value))
    elif isinstance(value, PathLike):
        yield from _named("path", fspath(value))
    elif isinstance(value, pd.DataFrame):
        yield from _named("table", str(value.shape))
        yield from _pieces([list(value.index), {str(name): value[name].tolist() for name in value.columns}])
    elif isinstance(value, Mapping):
        yield from _named("mapping", str(len(value)))
        for name, one in sorted(((digest(key), one) for key, one in value.items()), key=lambda pair: pair[0]):
            yield name.encode()
            yield from _pieces(one)
    elif isinstance(value, Set):
        yield from _named("set", str(len(value)))
        yield from (one.encode() for one in sorted(map(digest, value)))
    elif isinstance(value, Sequence):
        yield from _named("sequence", str(len(value)))
        for one in value:
            yield from _pieces(one)
    else:
        raise TypeError(f"digest: {type(value).__name__} has no content that could be hashed")


def _named(kind: str, text: str) -> Iterator[bytes]:
    """Kind, length and text, so that no two values run together to the same bytes."""
    raw = text.encode("utf-8", "surrogatepass")
    yield f"{kind}:{len(raw)}:".encode()
    yield raw
