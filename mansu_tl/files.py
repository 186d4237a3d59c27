"""Reading and writing results: one safetensors file with JSON in its header, written whole or not at all."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mansu_tl.errors import MansuError

_FORMAT = "1"
_PACKED = {"zip": b"PK\x03\x04", "bzip2": b"BZh", "xz": b"\xfd7zXZ", "zstd": b"\x28\xb5\x2f\xfd"}
# Not str.splitlines, which also ends a line at U+0085, U+2028 and others that JSON leaves inside a string.
_LINE_END = re.compile(r"\r\n|\r|\n")


def write_whole(path: str | PathLike[str], write: Callable[[Path], object]) -> Path:
    """Call `write` with a temporary name beside `path`, then move the file into place.

    Raises:
        MansuError: the folder cannot be made or written to.
    """
    target = local(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    except OSError as error:
        raise MansuError(f"{target}: cannot write there ({error.strerror}); choose a folder you may write to") from None
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def read_text(path: str | PathLike[str]) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark, gzipped or not.

    Raises:
        MansuError: no such file, a folder, one that cannot be read or is packed in another way, or another encoding.
    """
    source = local(path)
    if source.is_dir():
        raise MansuError(f"{source}: this is a folder; pass the file that is in it")
    try:
        data = source.read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except FileNotFoundError:
        raise MansuError(f"{source}: no such file; check the path") from None
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise MansuError(f"{source}: cannot be read ({why}); pass a text file that you may read") from None
    for name, mark in _PACKED.items():
        if data.startswith(mark):
            raise MansuError(f"{source}: packed with {name}; unpack it first")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4096]:
        raise MansuError(f"{source}: UTF-16, UTF-32 or no text at all, not UTF-8; save it as UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = len(lines_of(data[: error.start].decode("utf-8")))
        raise MansuError(
            f"{source}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8 (Latin-1 or Windows-1252?); save the file "
            "as UTF-8"
        ) from None


def local(path: str | PathLike[str]) -> Path:
    """A path with `~` written out.

    Raises:
        MansuError: a user who has no home here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise MansuError(f"{path}: no such user's home; write the path out") from None


def lines_of(text: str) -> list[str]:
    """The lines of a text, whichever of LF, CRLF and CR ends them; U+2028 and its like belong to the line."""
    return _LINE_END.split(text)


def write_text(path: str | PathLike[str], text: str) -> Path:
    """Write a UTF-8 text file, whole or not at all."""
    return write_whole(path, lambda p: p.write_text(text, encoding="utf-8"))


def save_tensors(
    path: str | PathLike[str], kind: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
) -> Path:
    """Write tensors and JSON-able facts as one safetensors file marked as a `kind`."""
    header = {"mansu_tl": kind, "format": _FORMAT, "facts": json.dumps(dict(facts))}
    # Copies, because safetensors refuses tensors that share memory.
    flat = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    return write_whole(path, lambda p: save_file(flat, p, metadata=header))


def load_tensors(path: str | PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        MansuError: no such file, a file of another kind, or one that was cut short or tampered with.
    """
    source = local(path)
    if not source.is_file():
        raise MansuError(f"{source}: no such file; save a {kind} there first")
    try:
        with safe_open(source, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a safetensors handle is no dict
        facts = json.loads(header.get("facts", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise MansuError(f"{source}: cannot be read ({error}); it was cut short or is no safetensors file") from None
    if header.get("mansu_tl") != kind:
        raise MansuError(
            f"{source}: holds {header.get('mansu_tl', 'something else')!r}, not a {kind}; pass the right file"
        )
    if header.get("format") != _FORMAT:
        raise MansuError(f"{source}: format {header.get('format')!r} is unknown here; save it again with this version")
    return tensors, facts
