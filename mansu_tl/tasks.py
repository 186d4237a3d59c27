"""Tasks by name or by file."""

from __future__ import annotations

from os import PathLike

from transformers import PreTrainedTokenizerBase

from mansu_tl.data import Task
from mansu_tl.data.jsonl import read_task
from mansu_tl.errors import MansuError
from mansu_tl.pocket import pocket_task


def load_task(source: str | PathLike[str], *, tokenizer: PreTrainedTokenizerBase | None = None, seed: int = 0) -> Task:
    """The embedded task ("pocket", for any of the three embedded models), or one read from a JSON-lines file.

    Args:
        tokenizer: of the model the task is for; needed for a file.
        seed: draws the distractors and corrupt prompts of the embedded task.

    Raises:
        MansuError: no such file, or a file without a tokenizer; see `mansu_tl.data.jsonl` for the rest.
    """
    if str(source) == "pocket":
        return pocket_task(seed)
    if tokenizer is None:
        raise MansuError(f"task {str(source)!r}: a file needs a tokenizer; pass tokenizer=model.tokenizer")
    return read_task(source, tokenizer)
