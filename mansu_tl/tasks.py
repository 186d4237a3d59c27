"""Tasks by name or by file."""

from __future__ import annotations

from os import PathLike

from mansu_tl.data import Task
from mansu_tl.data.jsonl import read_task
from mansu_tl.data.text import TextSource
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.pocket import pocket_task


@torch_defaults()
def load_task(source: str | PathLike[str], *, tokenizer: TextSource | None = None, seed: int = 0) -> Task:
    """The embedded task ("pocket", for any of the three embedded models), or one read from a JSON-lines file.

    Args:
        tokenizer: the hooked model that the task is for, or its tokenizer; needed for a file.
        seed: draws the distractors and corrupt prompts of the embedded task.

    Raises:
        MansuError: no such file, or a file without a tokenizer; see `mansu_tl.data.jsonl` for the rest.
    """
    if str(source) == "pocket":
        return pocket_task(seed)
    if tokenizer is None:
        raise MansuError(f"task {str(source)!r}: a file needs a tokenizer; pass tokenizer=model")
    return read_task(source, tokenizer)
