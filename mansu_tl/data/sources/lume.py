"""LUME (Ramakrishna et al. 2025, arXiv 2502.15097), the data of SemEval 2025's task 4: forget.jsonl and retain.jsonl.

A record has id, input, output and task. Ids end in "sc" or "qa" and a number: the continuation of a document, and a
question about it. The documents are to be written on, the questions answered.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike, fspath

from mansu_tl.data.answers import joined
from mansu_tl.data.sources.contrast import Asked, contrast_task
from mansu_tl.data.sources.records import Record, read_records, spread, title_of
from mansu_tl.data.sources.registry import register_source
from mansu_tl.data.task import Task
from mansu_tl.data.text import TextSource, text_source
from mansu_tl.errors import MansuError

CONTINUATION, QUESTION = "sc", "qa"
_ENDING = re.compile(rf"({CONTINUATION}|{QUESTION})\d+$")


@dataclass(frozen=True)
class LumeItem:
    """One record.

    Attributes:
        name: the file and line that it comes from.
        id: LUME's own.
        kind: "sc", a document to be continued, or "qa", a question.
        task: "Task1" (stories), "Task2" (invented people), "Task3" (real ones).
        prompt: the input.
        output: what belongs behind it.
    """

    name: str
    id: str
    kind: str
    task: str
    prompt: str
    output: str


def read_lume(place: str | PathLike[str]) -> tuple[LumeItem, ...]:
    """The records of one of LUME's files, a folder or a hub id.

    Raises:
        MansuError: see `read_records`; a field that is missing, or an id that says neither "sc" nor "qa".
    """
    return tuple(_item(record) for record in read_records(place))


def _item(record: Record) -> LumeItem:
    found = _ENDING.search(record.text("id"))
    if found is None:
        raise MansuError(
            f"{record.name}: id {record.text('id')!r} ends in neither sc nor qa with a number; keep LUME's ids"
        )
    texts = (record.text(key) for key in ("id", "task", "input", "output"))
    id_, task, prompt, output = texts
    return LumeItem(record.name, id_, found[1], task, prompt, output)


def lume_task(source: str | PathLike[str], tokenizer: TextSource, *, retain: str = "", limit: int = 0) -> Task:
    """A forget/retain task of LUME's questions; the documents to be kept are its text.

    Long continuations have no counterfactual; they are only scored, by `evaluate_lume`.

    Args:
        source: the file to forget.
        retain: the file to keep.
        limit: so many questions of each, evenly spread; 0 = all.

    Raises:
        MansuError: as `read_lume`, nothing to keep, or no question with a counterfactual of as many tokens.
    """
    if not retain:
        raise MansuError(f"{fspath(source)}: nothing to keep; name LUME's other file: retain=...")
    model, _ = text_source(tokenizer)
    items = {kind: read_lume(place) for kind, place in (("forget", source), ("retain", retain))}
    sets = {
        kind: [
            Asked(
                one.name,
                one.prompt,
                joined(model, one.prompt, one.output)[len(one.prompt) :],
                f"{one.id}, {one.prompt}",
            )
            for one in spread([one for one in each if one.kind == QUESTION], limit)
        ]
        for kind, each in items.items()
    }
    for kind, each in sets.items():
        if not each:
            raise MansuError(
                f"{fspath(source)}: the {kind} set has no question (an id with qa); give LUME's whole file"
            )
    kept = [f"{one.prompt} {one.output}" for one in items["retain"] if one.kind == CONTINUATION]
    return contrast_task(sets, tokenizer, name=title_of(source), where=fspath(source), text=spread(kept, limit))


register_source(
    "lume", "LUME's forget.jsonl, retain=retain.jsonl beside it", lume_task, fields=("id", "input", "output", "task")
)
