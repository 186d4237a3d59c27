"""What is in a GGUF file: its metadata, and which tensor lies where; the tensors' bytes are read when they are asked for."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from jaxtyping import UInt8
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.results.files import local

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Type number in the metadata -> how `struct` reads one value of it.
_PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_ALIGNMENT = 32


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies in a file.

    Attributes:
        name: GGUF's name of it.
        type: its number format, as `gguf` calls it ("Q4_1").
        shape: rows first, as PyTorch counts.
        start: the first of its bytes, from the beginning of the file.
        size: how many bytes it takes.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose head has been read (version 2 or 3, little-endian).

    Attributes:
        path: the file.
        metadata: every key of its head; arrays as lists.
        tensors: every tensor by GGUF's name.
        stamp: size and time of the last change when it was read, by which a later change is noticed.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    stamp: tuple[int, int]

    @classmethod
    def read(cls, path: str | PathLike[str]) -> GgufFile:
        """Read a file's head.

        Raises:
            MansuError: no such file, no GGUF file, another version, one that is cut short, a part of a split one, or a
                tensor in a format that `gguf` does not know.
        """
        file = local(path)
        if not file.is_file():
            raise MansuError(f"{file}: no such file; pass an existing GGUF file")
        status = file.stat()
        if not status.st_size:
            raise MansuError(f"{file}: an empty file, no GGUF; copy it again")
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            head = _Head(file, data)
            metadata = head.metadata()
            tensors = head.tensors(int(metadata.get("general.alignment", _ALIGNMENT)))
        parts = int(metadata.get("split.count", 1))
        if parts > 1:
            number = int(metadata.get("split.no", 0)) + 1
            raise MansuError(
                f"{file}: part {number} of {parts} of a split GGUF; join them first: llama-gguf-split --merge {file.name} "
                "joined.gguf"
            )
        last = max(tensors.values(), key=lambda one: one.start + one.size, default=None)
        if last is not None and last.start + last.size > status.st_size:
            missing = last.start + last.size - status.st_size
            raise MansuError(f"{file}: cut short, {missing:,} bytes of {last.name} are missing; copy it again")
        return cls(file, metadata, tensors, (status.st_size, status.st_mtime_ns))

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.metadata["general.architecture"])

    @cached_property
    def sha256(self) -> str:
        """The checksum of the whole file, in hex."""
        self.require_unchanged()
        digest = sha256()
        with self.path.open("rb") as handle:
            while chunk := handle.read(1 << 22):
                digest.update(chunk)
        return digest.hexdigest()

    def data(self, name: str) -> UInt8[Tensor, "row byte"]:
        """A copy of a tensor's bytes, row by row."""
        self.require_unchanged()
        stored = self.tensors[name]
        with self.path.open("rb") as handle:
            handle.seek(stored.start)
            raw = np.fromfile(handle, np.uint8, stored.size)
        rows = prod(stored.shape[:-1])
        return torch.from_numpy(raw).view(rows, -1)

    def require_unchanged(self) -> None:
        """Raise a `MansuError` where the file is gone or was written since its head was read."""
        try:
            status = self.path.stat()
        except OSError:
            raise MansuError(f"{self.path}: gone since the model was loaded from it; put it back") from None
        if (status.st_size, status.st_mtime_ns) != self.stamp:
            raise MansuError(f"{self.path}: changed since the model was loaded from it; load the model again")


class _Head:
    """A cursor over a file's head."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0
        if data[:4] != _MAGIC:
            raise MansuError(f"{path}: does not begin like a GGUF file; pass one that llama.cpp can run")
        self.at = 4
        version = self.number("I")
        if version not in _VERSIONS:
            what = "big-endian" if version >> 16 else f"version {version}"
            raise MansuError(f"{path}: GGUF of {what}; only little-endian versions 2 and 3 are read, convert it again")
        self.count, self.keys = self.number("Q"), self.number("Q")

    def number(self, kind: str) -> Any:
        """The next value of a `struct` format."""
        try:
            (value,) = struct.unpack_from(f"<{kind}", self.data, self.at)
        except struct.error:
            raise self._short() from None
        self.at += struct.calcsize(f"<{kind}")
        return value

    def text(self) -> str:
        """The next string."""
        length = self.number("Q")
        end = self.at + length
        if end > len(self.data):
            raise self._short()
        value = self.data[self.at : end].decode("utf-8", "replace")
        self.at = end
        return value

    def texts(self, count: int) -> list[str]:
        """The next strings: a vocabulary has hundreds of thousands."""
        data, at, length_at, found = self.data, self.at, struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            if at + 8 > len(data):
                raise self._short()
            end = at + 8 + length_at(data, at)[0]
            if end > len(data):
                raise self._short()
            found.append(data[at + 8 : end].decode("utf-8", "replace"))
            at = end
        self.at = at
        return found

    def value(self, kind: int) -> Any:
        """The next value of a metadata type."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            of, count = self.number("I"), self.number("Q")
            if of in _PLAIN:
                size = struct.calcsize(f"<{_PLAIN[of]}")
                if self.at + size * count > len(self.data):
                    raise self._short()
                values = list(struct.unpack_from(f"<{count}{_PLAIN[of]}", self.data, self.at))
                self.at += size * count
                return values
            return self.texts(count) if of == _STRING else [self.value(of) for _ in range(count)]
        if kind not in _PLAIN:
            raise MansuError(f"{self.path}: metadata of type {kind}, which no version 3 has; the file is broken")
        return self.number(_PLAIN[kind])

    def metadata(self) -> dict[str, Any]:
        """All keys."""
        values = {}
        for _ in range(self.keys):
            key = self.text()
            values[key] = self.value(self.number("I"))
        if "general.architecture" not in values:
            raise MansuError(f"{self.path}: its head names no architecture; the file is broken")
        return values

    def tensors(self, alignment: int) -> dict[str, Stored]:
        """All tensors, whose data begin behind the head."""
        listed = []
        for _ in range(self.count):
            name, dims = self.text(), self.number("I")
            shape = tuple(self.number("Q") for _ in range(dims))[::-1]
            listed.append((name, shape, self.number("I"), self.number("Q")))
        begin = -(-self.at // alignment) * alignment
        tensors = {}
        for name, shape, number, offset in listed:
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                raise MansuError(
                    f"{self.path}: {name} is of type {number}, which gguf does not know; update it or convert the file to "
                    "another type"
                ) from None
            block, size = GGML_QUANT_SIZES[kind]
            tensors[name] = Stored(name, kind.name, shape, begin + offset, prod(shape) // block * size)
        return tensors

    def _short(self) -> MansuError:
        return MansuError(f"{self.path}: its head ends too soon; copy the file again")
