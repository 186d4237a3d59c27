"""The fields of a task's row, every one of them checked.

Every row is an object with a "set":

- "forget", "retain" or "near": a pair, with "clean", "corrupt", "answer", "distractors" (a list of texts; the first one is
  the corrupt prompt's answer), and optionally "fact" (what the pair asks, so that several wordings count once; default:
  the clean prompt), "held_out": true for wordings that are only evaluated, never trained on, "answer_space": "auto",
  true or false (see `PromptPairs.from_text`), and "subject": the piece of the clean prompt that names what is asked about;
  with it "corrupt" may be left out and is made (`mansu_tl.data.corruption`);
- "text": "text" whose likelihood is to be kept;
- "unseen": a "text" prompt in the forget set's form about something the model never met.

Tables have every column in every row. A cell that says nothing (null, NaN, "", false, "auto") in a column that a row's set
does not have is passed over; null in a column that it has is a value that is missing, and the row is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from mansu_tl.data.answers import require_answer_space
from mansu_tl.data.text import require_text
from mansu_tl.errors import MansuError

PAIR_SETS, TEXT_SETS = ("forget", "retain", "near"), ("text", "unseen")
_PAIR, _PAIR_OPTIONAL = ("clean", "corrupt", "answer", "distractors"), ("fact", "held_out", "answer_space", "subject")
_COLUMNS = {"set", "text", *_PAIR, *_PAIR_OPTIONAL}
_NOTHING = (None, "", False, "auto")
_WAY_OUT = {
    "fact": "name the fact, or leave the key out (in pandas: frame['fact'].fillna(frame['clean']))",
    "held_out": "write true or false, or leave the key out (in pandas: frame['held_out'].eq(True))",
    "answer_space": 'write "auto", true or false, or leave the key out (in pandas: .fillna("auto"))',
}

Row = dict[str, Any]


def checked_row(name: str, found: object) -> Row:
    """The row's own fields, every one of its type, with "held_out" and "fact" filled in, and its "name".

    Raises:
        MansuError: no such object, or a field that is missing, unknown, empty or of another type.
    """
    if not isinstance(found, Mapping):
        shown = repr(found)
        raise MansuError(
            f"{name}: {shown if len(shown) < 60 else shown[:57] + '...'} is no object; write "
            '{"set": ..., "clean": ..., ...}'
        )
    row = {str(key): _plain(value) for key, value in found.items()}
    kind = row.get("set")
    if not isinstance(kind, str) or kind not in (*PAIR_SETS, *TEXT_SETS):
        # Another benchmark's file, most likely.
        way = (
            ""
            if "set" in row
            else f"; or say whose records with {', '.join(row)} these are: kind= one of mansu-tl sources"
        )
        raise MansuError(f"{name}: set is {kind!r}; choose one of {', '.join((*PAIR_SETS, *TEXT_SETS))}{way}")
    needed, optional = (_PAIR, _PAIR_OPTIONAL) if kind in PAIR_SETS else (("text",), ())
    known = ("set", *needed, *optional)
    for key in sorted(set(row) - set(known)):
        if key not in _COLUMNS or row[key] not in _NOTHING:
            raise MansuError(f"{name}: unknown key {key!r}; known: {', '.join(sorted(known))}")
    for key in sorted(needed):
        if key not in row and not (key == "corrupt" and row.get("subject")):
            raise MansuError(f"{name}: {key!r} is missing; a {kind} line needs it")
    out = {key: row[key] for key in known if key in row}
    for key, value in out.items():
        if value is None:
            raise MansuError(f"{name}: {key} is null; {_WAY_OUT.get(key, f'a {kind} line needs it')}")
        if key == "distractors":
            _require_list(name, value)
        elif key == "held_out":
            if not isinstance(value, bool):
                raise MansuError(
                    f"{name}: held_out is {value!r}; write true or false without quotes (in pandas: a column of bool)"
                )
        elif key == "answer_space":
            require_answer_space(value, name)
        else:
            require_text(value, f"{name}: {key}")
    if "subject" in out:
        _require_once(name, str(out["subject"]), str(out["clean"]))
    return {"held_out": False, "fact": out.get("clean"), **out, "name": name}


def _require_once(name: str, subject: str, prompt: str) -> None:
    if prompt.count(subject) != 1:
        raise MansuError(
            f"{name}: subject {subject!r} occurs {prompt.count(subject)} times in {prompt!r}; it must occur once"
        )


def _require_list(name: str, value: object) -> None:
    if not isinstance(value, list) or not value:
        raise MansuError(f"{name}: distractors {value!r}; give a list of at least one text")
    for i, text in enumerate(value):
        require_text(text, f"{name}: distractor {i}")
        if text in value[:i]:
            raise MansuError(f"{name}: distractor {text!r} is there twice; give every wrong answer once")


def _plain(value: object) -> object:
    """A table's cell as JSON has it: NaN and its like are null, numpy's values Python's."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return None
    as_list = getattr(value, "tolist", None)  # numpy's arrays and numbers
    return as_list() if callable(as_list) else value
