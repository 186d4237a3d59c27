"""A forget/retain task from one JSON-lines file.

Every line is an object with a "set":

- "forget", "retain" or "near": a pair, with "clean", "corrupt", "answer", "distractors" (a list; the first one is the
  corrupt prompt's answer), and optionally "fact" (what the pair asks, so that several wordings count once; default: the
  clean prompt) and "held_out": true for wordings that are only evaluated, never trained on;
- "text": "text" whose likelihood is to be kept;
- "unseen": a "text" prompt in the forget set's form about something the model never met.

A pair of the retain or near sets is also kept as text, its answer attached.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mansu_tl.data.pairs import PromptPairs
from mansu_tl.data.task import Questions, Sequences, Task
from mansu_tl.data.text import TextSource, encode, pad, pad_id, text_source
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError

_PAIR_KEYS = {"set", "clean", "corrupt", "answer", "distractors", "fact", "held_out"}
_TEXT_KEYS = {"set", "text"}
_PAIR_SETS, _TEXT_SETS = ("forget", "retain", "near"), ("text", "unseen")


@torch_defaults()
def read_task(
    path: str | PathLike[str], tokenizer: TextSource, *, name: str | None = None, prepend_bos: bool | None = None
) -> Task:
    """Read a task file.

    Args:
        name: the task's name; the file's stem where not given.
        tokenizer: a tokenizer, or the hooked model itself.
        prepend_bos: put a BOS token in front of every prompt and text; None = what the family does, for a bare
            tokenizer yes if it has one.

    Raises:
        MansuError: no such file; a line that is no such object (with its number); an empty forget or retain set; sets
            that overlap; prompts of unequal token length; an answer of several tokens.
    """
    source = Path(path)
    tokenizer, prepend_bos = text_source(tokenizer, prepend_bos)
    rows = _rows(source)
    label = name or source.stem
    groups = {s: [row for row in rows if row["set"] == s] for s in (*_PAIR_SETS, *_TEXT_SETS)}
    for needed in ("forget", "retain"):
        if not [row for row in groups[needed] if not row.get("held_out", False)]:
            raise MansuError(f"{source}: the {needed} set is empty; give it at least one pair that is not held out")
    questions = {}
    for kind in _PAIR_SETS:
        for held_out in (False, True):
            asked = [row for row in groups[kind] if row.get("held_out", False) is held_out]
            if asked:
                questions[f"{kind}_paraphrase" if held_out else kind] = _questions(
                    tokenizer, asked, source, prepend_bos
                )
    seen = {k: [row for row in groups[k] if not row.get("held_out", False)] for k in _PAIR_SETS}

    def sequences(texts: Sequence[str]) -> Sequences:
        ids = [encode(tokenizer, text, prepend_bos) for text in texts]
        return Sequences(*pad(ids, pad_id(tokenizer))) if ids else empty

    empty = Sequences(torch.empty(0, 1, dtype=torch.long), torch.empty(0, dtype=torch.long))
    texts = [row["text"] for row in groups["text"]]
    return Task(
        name=label,
        forget_pairs=_pairs(tokenizer, seen["forget"], source, prepend_bos),
        retain_pairs=_pairs(tokenizer, seen["retain"], source, prepend_bos),
        retain_text=sequences([*map(_sentence, seen["retain"]), *texts]),
        near_text=sequences([*map(_sentence, seen["near"])]),
        unseen=sequences([row["text"] for row in groups["unseen"]]),
        questions=questions,
    )


def _rows(source: Path) -> list[dict[str, Any]]:
    if not source.is_file():
        raise MansuError(f"{source}: no such task file; give a JSON-lines file or an embedded name (pocket)")
    rows = []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise MansuError(f"{source}, line {number}: not JSON ({error.msg}); write one object a line") from None
        kind = row.get("set") if isinstance(row, dict) else None
        if kind not in (*_PAIR_SETS, *_TEXT_SETS):
            raise MansuError(
                f"{source}, line {number}: set is {kind!r}; choose one of {', '.join((*_PAIR_SETS, *_TEXT_SETS))}"
            )
        known = _PAIR_KEYS if kind in _PAIR_SETS else _TEXT_KEYS
        needed = {"clean", "corrupt", "answer", "distractors"} if kind in _PAIR_SETS else {"text"}
        if set(row) - known:
            raise MansuError(
                f"{source}, line {number}: unknown key {min(set(row) - known)!r}; known: {', '.join(sorted(known))}"
            )
        if needed - set(row):
            raise MansuError(f"{source}, line {number}: {min(needed - set(row))!r} is missing; a {kind} line needs it")
        rows.append(row | {"line": number})
    return rows


def _pairs(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], source: Path, prepend_bos: bool
) -> PromptPairs:
    _same_width(rows, source)
    return PromptPairs.from_text(
        tokenizer,
        [row["clean"] for row in rows],
        [row["corrupt"] for row in rows],
        [row["answer"] for row in rows],
        [row["distractors"] for row in rows],
        prepend_bos,
        labels=[f"{_fact(row)} / line {row['line']}" for row in rows],
        names=[f"{source}, line {row['line']}" for row in rows],
    )


def _questions(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], source: Path, prepend_bos: bool
) -> Questions:
    pairs = _pairs(tokenizer, rows, source, prepend_bos)
    choices = torch.cat([pairs.answers[:, None], pairs.distractors], 1)
    return Questions(pairs.clean, pairs.lengths, choices, tuple(_fact(row) for row in rows))


def _same_width(rows: list[dict[str, Any]], source: Path) -> None:
    for row in rows:
        if (
            not isinstance(row["distractors"], list)
            or len(row["distractors"]) != len(rows[0]["distractors"])
            or not row["distractors"]
        ):
            first = "at least one" if row is rows[0] else f"as many as line {rows[0]['line']} has, at least one"
            raise MansuError(
                f"{source}, line {row['line']}: distractors {row['distractors']!r}; give a list of {first}"
            )


def _fact(row: dict[str, Any]) -> str:
    return str(row.get("fact", row["clean"]))


def _sentence(row: dict[str, Any]) -> str:
    clean, answer = row["clean"], row["answer"]
    return clean + answer if clean.endswith(" ") or answer.startswith(" ") else f"{clean} {answer}"
