"""Results on disk, so that an interrupted run continues where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from mansu_tl.data import Task
from mansu_tl.files import write_text


class Stages:
    """Results on disk, each beside a key of what it was made from."""

    def __init__(self, folder: Path, base: Mapping[str, Any]) -> None:
        self.folder, self.base = folder, {**base, "version": version("mansu-tl")}
        self.made = 0

    def tensor(self, name: str, kind: Any, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """A result with its own `save` and `load`."""
        return self._stage(f"{name}.safetensors", key, make, kind.load, lambda result, path: result.save(path))

    def json(self, name: str, kind: Any, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """A result whose `save` writes JSON."""
        return self._stage(f"{name}.json", key, make, kind.load, lambda result, path: result.save(path))

    def table(self, name: str, key: Mapping[str, Any], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """A table as CSV."""

        def read(path: Path) -> pd.DataFrame:
            return pd.read_csv(path, keep_default_na=False, na_values=["NaN"])

        def write(frame: pd.DataFrame, path: Path) -> None:
            write_text(path, frame.to_csv(index=False, na_rep="NaN"))

        return self._stage(f"{name}.csv", key, make, read, write)

    def done(self, name: str, key: Mapping[str, Any]) -> bool:
        """Whether a result with this file name is there and up to date."""
        path = self.folder / name
        stamp = path.with_name(path.name + ".key")
        return path.is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8") == self._digest(key)

    def value(self, name: str, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """Plain values as JSON."""

        def read(path: Path) -> Any:
            return json.loads(path.read_text(encoding="utf-8"))

        return self._stage(f"{name}.json", key, make, read, lambda result, path: write_text(path, json.dumps(result)))

    def _stage(
        self,
        name: str,
        key: Mapping[str, Any],
        make: Callable[[], Any],
        read: Callable[[Path], Any],
        write: Callable[[Any, Path], object],
    ) -> Any:
        path = self.folder / name
        stamp = path.with_name(path.name + ".key")
        if self.done(name, key):
            return read(path)
        result = make()
        self.made += 1
        # The key goes last: a run that is cut off in between does the stage again.
        stamp.unlink(missing_ok=True)
        write(result, path)
        write_text(stamp, self._digest(key))
        return result

    def _digest(self, key: Mapping[str, Any]) -> str:
        return hashlib.sha256(json.dumps({**self.base, **key}, sort_keys=True, default=str).encode()).hexdigest()


def task_key(task: Task) -> str:
    """A digest of everything in a task."""
    digest = hashlib.sha256(repr(task).encode())
    for part in (task.forget_pairs.clean, task.retain_text.tokens, task.near_text.tokens, task.unseen.tokens):
        digest.update(part.numpy().tobytes())
    for questions in task.questions.values():
        digest.update(questions.prompts.numpy().tobytes() + questions.choices.numpy().tobytes())
    return digest.hexdigest()
