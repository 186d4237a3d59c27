"""One writer a folder: a second run into the same results folder is refused while the first one works."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from mansu_tl.errors import MansuError
from mansu_tl.results.files import write_text


@contextmanager
def one_writer(folder: Path, name: str = "writer") -> Iterator[None]:
    """Hold a folder; the operating system lets go of it when the process ends, however it ends.

    A nested call from the same thread is let in: it is the same writer.

    Args:
        name: what is held, for folders of which parts can be held by themselves.

    Raises:
        MansuError: another process or thread holds it (which one, and since when), or the folder cannot be written to.
    """
    note = folder / f".{name}.json"
    lock = _lock(folder, name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise MansuError(
            f"{folder}: {_holder(note)} is writing there; wait until it is done, or give another results folder"
        ) from None
    try:
        if lock.lock_counter == 1:
            holder = {"process": os.getpid(), "host": platform.node(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
            write_text(note, json.dumps(holder))
        yield
    finally:
        if lock.lock_counter == 1:
            note.unlink(missing_ok=True)
        lock.release()


@contextmanager
def waiting_writer(folder: Path, name: str) -> Iterator[None]:
    """The same, but wait until the other writer is done."""
    with _lock(folder, name):
        yield


def held(folder: Path, pattern: str) -> list[str]:
    """The names (a glob pattern) that any process holds in a folder, this one's own among them."""
    out = []
    for path in sorted(folder.glob(f".{pattern}.lock")):
        probe = FileLock(path)
        try:
            probe.acquire(timeout=0)
        except Timeout:
            out.append(path.name.removeprefix(".").removesuffix(".lock"))
        else:
            probe.release()
    return out


def _lock(folder: Path, name: str) -> FileLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise MansuError(f"{folder}: cannot write there ({error.strerror}); choose a folder you may write to") from None
    return FileLock(folder / f".{name}.lock", is_singleton=True)


def _holder(note: Path) -> str:
    try:
        holder = json.loads(note.read_text(encoding="utf-8"))
        return f"another run (process {holder['process']} on {holder['host']}, since {holder['since']})"
    except (OSError, json.JSONDecodeError, KeyError):
        return "another run"
