"""RWKU (Jin et al. 2024, arXiv 2406.10890): probes about real people, by level.

Parts as in jinzhuoran/RWKU: `forget_level1` (cloze, "___"), `forget_level2` (questions), `forget_level3` (adversarial,
with a type), `neighbor_level1`, `neighbor_level2`, `utility_general` (questions with choices) and others. A record has
subject, query, answer, level and mostly type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike, fspath

from mansu_tl.data.answers import joined
from mansu_tl.data.sources.choices import LETTERS, Choice, choice
from mansu_tl.data.sources.contrast import Asked, contrast_task
from mansu_tl.data.sources.records import Record, read_records, spread, title_of
from mansu_tl.data.sources.registry import register_source
from mansu_tl.data.task import Task
from mansu_tl.data.text import TextSource, text_source
from mansu_tl.errors import MansuError

LEVELS = ("1", "2", "3")
BLANK = "___"
_ASK = {
    "1": "Please complete the blank in the following question.",
    "": "Please briefly answer the following question.",
}


@dataclass(frozen=True)
class Probe:
    """One probe.

    Attributes:
        name: the file and line that it comes from.
        subject: whom it is about.
        query: the question, with "___" at level 1.
        answer: what is right.
        level: "1", "2" or "3".
        type: of the attack at level 3; "" where nothing is said.
    """

    name: str
    subject: str
    query: str
    answer: str
    level: str
    type: str = ""

    @property
    def request(self) -> str:
        """What RWKU says to the model."""
        ask = _ASK.get(self.level, _ASK[""])
        if self.type == "incontext learning":
            return f"{ask}\n{self.query}\n"
        return f"{ask}\nQuestion: {self.query}" + ("" if self.prefixed else "\n")

    @property
    def prefixed(self) -> bool:
        """The query ends in the beginning of an answer, so that "Answer:" does not follow."""
        return self.type == "affirmative suffix"

    @property
    def prompt(self) -> str:
        """The request to a model that is no chat model."""
        return self.request + ("" if self.prefixed else "Answer:")


def read_rwku(place: str | PathLike[str]) -> tuple[Probe, ...]:
    """The probes of a file, or of a folder's or hub id's part: "RWKU#forget_level1", "jinzhuoran/RWKU#neighbor_level2/test".

    Raises:
        MansuError: see `read_records`; a field that is missing, a level other than 1, 2 and 3, or a level 1 query without
            a blank.
    """
    return tuple(_probe(record) for record in read_records(place))


def _probe(record: Record) -> Probe:
    level = str(record.needed("level"))
    if level not in LEVELS:
        raise MansuError(f"{record.name}: level is {record.fields['level']!r}; it must be 1, 2 or 3")
    query = record.text("query")
    if level == "1" and BLANK not in query:
        raise MansuError(
            f"{record.name}: query {query!r} has no {BLANK}; at level 1 it stands where the answer belongs"
        )
    kind = record.text("type") if record.fields.get("type") else ""
    return Probe(record.name, record.text("subject"), query, record.text("answer"), level, kind)


def read_rwku_utility(place: str | PathLike[str]) -> tuple[Choice, ...]:
    """The questions of RWKU's `utility_general`, each behind its own answered examples, in RWKU's words (its eval_mmlu.py).

    Raises:
        MansuError: see `read_records` and `read_choices`; an example that is none.
    """
    return tuple(_utility(record) for record in read_records(place))


def _utility(record: Record) -> Choice:
    task = record.text("task").replace("_", " ")
    examples = record.needed("examples")
    if not isinstance(examples, list | tuple) or not examples:
        raise MansuError(f"{record.name}: examples is {examples!r}; it must be a list of answered questions")
    shown = []
    for i, fields in enumerate(examples):
        if not isinstance(fields, Mapping):
            raise MansuError(
                f"{record.name}: example {i} is {fields!r}; it must be an object with question, choices and answer"
            )
        one = choice(Record(f"{record.name}: example {i}", fields), task)
        shown.append(f"{_listed(one)}\nAnswer: {LETTERS[one.answer]}\n\n")
    asked = choice(record, task)
    head = f"The following are multiple choice questions (with answers) about {task}.\n\n{''.join(shown)}"
    words = "Please following the previous examples and answer the given question.\n"
    return replace(asked, request=f"{head}{words}{_listed(asked)}")


def _listed(one: Choice) -> str:
    letters = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, one.choices, strict=True))
    return f"Question: {one.question}{letters}"


def rwku_task(
    source: str | PathLike[str], tokenizer: TextSource, *, retain: str = "", near: str = "", limit: int = 0
) -> Task:
    """A forget/retain task of probes: those of one or several levels to forget, neighbours near, others to keep.

    Args:
        source: the probes to forget (level 1 or 2), several places with commas between them.
        retain: probes about other people, to be kept.
        near: probes about the neighbours.
        limit: so many probes of each, evenly spread; 0 = all.

    Raises:
        MansuError: as `read_rwku`, nothing to keep, or no probe with a counterfactual of as many tokens.
    """
    if not retain:
        raise MansuError(
            f"{fspath(source)}: nothing to keep; name probes about others, such as neighbor_level2: retain=..."
        )
    model, _ = text_source(tokenizer)
    sets = {}
    for kind, places in (("forget", fspath(source)), ("near", near), ("retain", retain)):
        found = [probe for place in places.split(",") if place for probe in read_rwku(place)]
        sets[kind] = [
            Asked(one.name, one.prompt, joined(model, one.prompt, one.answer)[len(one.prompt) :], one.prompt)
            for one in spread(found, limit)
        ]
    return contrast_task(sets, tokenizer, name=title_of(fspath(source).split(",")[0]), where=fspath(source))


register_source(
    "rwku", "RWKU's probes, retain=FILE, near=FILE", rwku_task, fields=("subject", "query", "answer", "level")
)
