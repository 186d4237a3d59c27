"""Tasks by name or by file."""

from __future__ import annotations

from os import PathLike, fspath

from mansu_tl.data.answers import AnswerSpace
from mansu_tl.data.jsonl import read_task
from mansu_tl.data.lines import Rows
from mansu_tl.data.sources.pocket import pocket_task
from mansu_tl.data.sources.pocket.tokens import build_tokenizer
from mansu_tl.data.sources.pocket.world import build_world
from mansu_tl.data.task import Task
from mansu_tl.data.text import TextSource
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError


@torch_defaults()
def load_task(
    source: Rows,
    *,
    tokenizer: TextSource | None = None,
    seed: int = 0,
    name: str | None = None,
    answer_space: AnswerSpace = "auto",
) -> Task:
    """The embedded task ("pocket", for any of the three embedded models), or one read from a file or a table.

    Files hold one JSON object a line (gzipped or not), or a JSON array of them; a DataFrame or a list of dicts holds the
    same rows. What is in a row: `mansu_tl.data.lines`.

    Args:
        tokenizer: the hooked model that the task is for, or its tokenizer; needed for a file or a table.
        seed: draws the distractors and corrupt prompts of the embedded task.
        name: the task's name; the file's stem where not given, "rows" for a table.
        answer_space: whether a space stands between a prompt and its answers where a row does not say: "auto" = as a
            writer would put it, True = always, False = never.

    Raises:
        MansuError: no such file, a file or table without a tokenizer, rows that `read_task` refuses, or the embedded task
            for a model that speaks other words.

    Example:
        >>> task = mtl.load_task("pocket")
        >>> len(task.forget_pairs), len(task.questions["forget"])
        (192, 192)
    """
    if isinstance(source, str) and source == "pocket":
        _require_pockets_words(tokenizer)
        return pocket_task(seed)
    if tokenizer is None:
        what = repr(fspath(source)) if isinstance(source, str | PathLike) else type(source).__name__
        raise MansuError(f"task {what}: needs a tokenizer to be read; pass tokenizer=model")
    return read_task(source, tokenizer, name=name, answer_space=answer_space)


def _require_pockets_words(source: TextSource | None) -> None:
    """Refuse the embedded task, whose tokens are numbers already, for a model with another vocabulary."""
    tokenizer = getattr(source, "tokenizer", source)
    if tokenizer is not None and tokenizer.get_vocab() != build_tokenizer(build_world()).get_vocab():
        raise MansuError(
            "task 'pocket': it is written in the words of the embedded models, and this model has others; give a task file "
            "(mansu-tl new DIR writes one to change)"
        )
