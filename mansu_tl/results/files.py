"""Files: text and results, read with errors that say what is wrong, written whole or not at all."""

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

_FORMAT = "2"
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


def write_packed(
    path: str | PathLike[str], kind: str, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]
) -> Path:
    """Write tensors and a JSON-able header as one file marked as a `kind`: safetensors, or JSON where its name says so.

    Raises:
        MansuError: tensors in a .json file, or a folder that cannot be written to.
    """
    record = json.dumps({"mansu_tl": kind, "format": _FORMAT, **header}, indent=2)
    if Path(path).suffix == ".json":
        if tensors:
            raise MansuError(f"{path}: a {kind} holds tensors; give a name that ends in .safetensors")
        return write_text(path, record + "\n")
    # Copies, because safetensors refuses tensors that share memory. One entry, because it keeps no order of several.
    flat = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    return write_whole(path, lambda p: save_file(flat, p, metadata={"record": record}))


def read_packed(path: str | PathLike[str], kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_packed` wrote.

    Raises:
        MansuError: no such file, a file of another kind or format, or one that was cut short.
    """
    source = local(path)
    if not source.is_file():
        raise MansuError(f"{source}: no such file; save a {kind} there first")
    tensors: dict[str, torch.Tensor] = {}
    what = "JSON" if source.suffix == ".json" else "safetensors"
    try:
        if what == "JSON":
            record = json.loads(source.read_text(encoding="utf-8"))
        else:
            with safe_open(source, framework="pt") as file:
                entries = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the handle is no dict
            record = json.loads(entries["record"]) if "record" in entries else entries
    except (SafetensorError, ValueError) as error:
        raise MansuError(f"{source}: cannot be read ({error}); it was cut short or is no {what} file") from None
    written = record.get("mansu_tl", "something else") if isinstance(record, dict) else "something else"
    if written != kind:
        raise MansuError(f"{source}: holds {written!r}, not a {kind}; pass the right file")
    if record.get("format") != _FORMAT:
        raise MansuError(f"{source}: format {record.get('format')!r} is unknown here; save it again with this version")
    return tensors, record
