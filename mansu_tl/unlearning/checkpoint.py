"""An edit in progress, on disk: what an interrupted one goes on from, to the same result to the last bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.results.files import read_packed, write_packed

State = tuple[Mapping[str, Tensor], Mapping[str, Any]]
_KIND = "EditInProgress"
# Seconds between two: little is lost, and writing costs little beside the steps.
_EVERY = 20.0


class Checkpoint:
    """Where an edit's state is kept while it is made.

    Args:
        path: the file; None keeps nothing.
        key: a digest of everything that the edit depends on; a state of another one is not used.
    """

    def __init__(self, path: str | PathLike[str] | None = None, key: str = "") -> None:
        self.path, self.key = None if path is None else Path(path), key
        self._written = time.monotonic()

    def read(self) -> State | None:
        """The state of this same edit; None where there is none, or one that was cut short."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            tensors, facts = read_packed(self.path, _KIND)
        except MansuError:
            return None  # a file that cannot be read is made again from the start
        return (tensors, facts["state"]) if facts.get("key") == self.key else None

    def offer(self, state: Callable[[], State]) -> None:
        """Write the state if the last one is old enough; call it between two steps."""
        if self.path is None or time.monotonic() - self._written < _EVERY:
            return
        tensors, facts = state()
        write_packed(self.path, _KIND, tensors, {"key": self.key, "state": dict(facts)})
        self._written = time.monotonic()

    def done(self) -> None:
        """The edit is made: its state is not needed any more."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
