"""Results on disk, so that an interrupted run continues where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from mansu_tl.results.digest import digest
from mansu_tl.results.files import write_text, write_whole
from mansu_tl.results.locks import waiting_writer
from mansu_tl.results.result import Result

R = TypeVar("R", bound=Result)


class NotMadeError(Exception):
    """A stage that is not there, or out of date, was asked of a store that only reads."""


class Store:
    """Results on disk, each beside a key of everything that it was made from.

    Args:
        folder: where they lie.
        base: what every stage reads; the package's version is added.
        shared: several processes work on this folder at once; two of them do not both make a stage.
        making: make what is missing; else raise `NotMadeError`.

    Attributes:
        made: how many had to be made.
    """

    def __init__(
        self, folder: Path, base: Mapping[str, Any] | None = None, *, shared: bool = False, making: bool = True
    ) -> None:
        self.folder, self.base, self.shared = folder, {**(base or {}), "version": version("mansu-tl")}, shared
        self.making = making
        self.made = 0
        self._asked: dict[str, str] = {}

    def result(self, name: str, kind: type[R], key: Mapping[str, Any], make: Callable[[], R]) -> R:
        """A result of class `kind`, in a file of its own suffix."""
        found: R = self._stage(name + kind.suffix, key, make, kind.load, lambda result, path: result.save(path))
        return found

    def table(self, name: str, key: Mapping[str, Any], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """A table as parquet, which keeps every bit and type, as it is read back."""

        def write(frame: pd.DataFrame, path: Path) -> None:
            write_whole(path, lambda part: frame.to_parquet(part, index=False))

        self._stage(f"{name}.parquet", key, make, pd.read_parquet, write)
        return pd.read_parquet(self.folder / f"{name}.parquet")

    def done(self, name: str, key: Mapping[str, Any]) -> bool:
        """Whether a result with this file name is there and up to date."""
        return self._is(name, self._digest(key))

    def intact(self) -> bool:
        """Whether everything asked for is still there as it was made: no other writer came between."""
        return all(self._is(name, stamped) for name, stamped in self._asked.items())

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
        path, stamped = self.folder / name, self._digest(key)
        self._asked[name] = stamped
        # The second of two processes waits, and reads what the first has made.
        with waiting_writer(self.folder / ".locks", name.replace("/", ".")) if self.shared else nullcontext():
            if self._is(name, stamped):
                return read(path)
            if not self.making:
                raise NotMadeError(name)
            result = make()
            self.made += 1
            # The key goes last: a run that is cut off in between does the stage again.
            stamp = path.with_name(path.name + ".key")
            stamp.unlink(missing_ok=True)
            write(result, path)
            write_text(stamp, stamped)
        return result

    def _is(self, name: str, stamped: str) -> bool:
        path = self.folder / name
        stamp = path.with_name(path.name + ".key")
        return path.is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8") == stamped

    def _digest(self, key: Mapping[str, Any]) -> str:
        return digest({**self.base, **key})
