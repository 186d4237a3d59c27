"""A forget/retain task from rows: those of a table or a list of dicts, and whatever a file's reader yields.

The fields of a row are in `mansu_tl.data.sources.fields`. A pair of the retain or near sets is also kept as text, its
answer attached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerBase

from mansu_tl.data.answers import AnswerSpace, joined, require_answer_space
from mansu_tl.data.corruption import EMBEDDED, Subject, counterfactuals, measured_against, require_corruption
from mansu_tl.data.fit import require_fit
from mansu_tl.data.pairs import PromptPairs
from mansu_tl.data.sources.fields import PAIR_SETS, TEXT_SETS, Row, checked_row
from mansu_tl.data.sources.registry import register_source
from mansu_tl.data.task import HELD_OUT, Questions, Sequences, Task
from mansu_tl.data.text import TextSource, encode, pad, pad_id, text_source
from mansu_tl.errors import MansuError
from mansu_tl.results.files import local


def rows_reader(rows: Callable[[Any], Iterable[tuple[str, object]]]) -> Callable[..., Task]:
    """A source's `read`, for a format whose rows are those of a task file.

    Args:
        rows: from what `load_task` is given (a path, say) every row as a dict, with the name that errors call it.
    """

    def read(
        source: Any,
        tokenizer: TextSource,
        *,
        name: str | None = None,
        prepend_bos: bool | None = None,
        answer_space: AnswerSpace = "auto",
        corruption: str = "swap",
        seed: int = 0,
    ) -> Task:
        require_answer_space(answer_space, "task")
        title = where = "rows"
        if isinstance(source, str | PathLike):
            path = local(source)
            title, where = path.name.removesuffix(".gz").rpartition(".")[0] or path.name, str(path)
        found = [checked_row(row_name, row) for row_name, row in rows(source)]
        if not found:
            raise MansuError(f"{where}: holds no row; write one object a line")
        reader = _Reader(tokenizer, prepend_bos, answer_space)
        for kind in PAIR_SETS:
            reader.corrupt([row for row in found if row["set"] == kind], corruption, seed)
        return _task(name or title, where, found, reader)

    return read


def _task(name: str, where: str, rows: Sequence[Row], reader: _Reader) -> Task:
    groups = {s: [row for row in rows if row["set"] == s] for s in (*PAIR_SETS, *TEXT_SETS)}
    trained = {s: [row for row in groups[s] if not row["held_out"]] for s in PAIR_SETS}
    for needed in ("forget", "retain"):
        if not trained[needed]:
            raise MansuError(f"{where}: the {needed} set is empty; give it at least one pair that is not held out")
    for other in ("near", "retain"):
        _require_apart(where, groups["forget"], other, groups[other])
    asked = {}
    for kind in PAIR_SETS:
        for held_out in (False, True):
            chosen = [row for row in groups[kind] if row["held_out"] is held_out]
            if chosen:
                asked[f"{kind}_paraphrase" if held_out else kind] = reader.pairs(chosen)
    counts = Counter(row["set"] + HELD_OUT * row["held_out"] for row in rows)
    order = [kind + end for kind in (*PAIR_SETS, *TEXT_SETS) for end in ("", HELD_OUT)]
    return Task(
        name=name,
        forget_pairs=asked["forget"],
        retain_pairs=asked["retain"],
        retain_text=reader.sequences([*map(reader.sentence, trained["retain"]), *map(_text, groups["text"])], least=2),
        near_text=reader.sequences([*map(reader.sentence, trained["near"])], least=2),
        unseen=reader.sequences([*map(_text, groups["unseen"])], least=1),
        questions={key: Questions.of_pairs(pairs) for key, pairs in asked.items()},
        lines={key: counts[key] for key in order if counts[key]},
    )


class _Reader:
    """Rows as tokens."""

    def __init__(self, source: TextSource, prepend_bos: bool | None, answer_space: AnswerSpace) -> None:
        self.answer_space = answer_space
        self.embedded: dict[str, Any] = {}
        self.model = source if isinstance(source, TransformerBridge) else None
        self.tokenizer: PreTrainedTokenizerBase
        self.tokenizer, self.bos = text_source(source, prepend_bos)

    def corrupt(self, rows: Sequence[Row], kind: str, seed: int) -> None:
        """Give every row of a set that has a subject and no corrupt prompt one; its answer becomes distractor 0."""
        require_corruption(kind)
        pool = [row for row in rows if "subject" in row]
        if all("corrupt" in row for row in pool):
            return
        if kind in EMBEDDED:
            given = next((row for row in rows if "corrupt" in row), None)
            if given is not None:
                raise MansuError(
                    f"{given['name']}: corrupt is given, and other lines of the set have none; {kind} stands in for all of "
                    'them: leave "corrupt" out and name every "subject"'
                )
            self.embedded = {"corruption": kind, "seed": seed}
            return
        subjects = [Subject(*(row[key] for key in ("name", "clean", "subject", "answer"))) for row in pool]
        made = counterfactuals(subjects, lambda text: len(encode(self.tokenizer, text, False)), kind, seed)
        for row, other in zip(pool, made, strict=True):
            if "corrupt" not in row:
                row["distractors"] = measured_against(row["distractors"], other)
                row["corrupt"] = other.prompt

    def pairs(self, rows: Sequence[Row]) -> PromptPairs:
        """Rows of one set as pairs."""
        first = rows[0]
        for row in rows:
            if len(row["distractors"]) != len(first["distractors"]):
                raise MansuError(
                    f"{row['name']}: distractors {row['distractors']!r}, {len(first['distractors'])} at "
                    f"{first['name']}; give every line of a set the same number"
                )
        made = all("corrupt" not in row for row in rows)
        how: dict[str, Any] = {"subjects": [row["subject"] for row in rows], **self.embedded} if made else {}
        pairs = PromptPairs.from_text(
            self.tokenizer,
            [row["clean"] for row in rows],
            None if made else [row["corrupt"] for row in rows],
            [row["answer"] for row in rows],
            [row["distractors"] for row in rows],
            self.bos,
            labels=[f"{row['fact']} / {row['name'].rpartition(', ')[2]}" for row in rows],
            names=[row["name"] for row in rows],
            facts=[row["fact"] for row in rows],
            answer_space=[self._space(row) for row in rows],
            **how,
        )
        if self.model is not None:
            require_fit(self.model, pairs, [row["name"] for row in rows])
        return pairs

    def sentence(self, row: Row) -> tuple[str, str]:
        """A pair's prompt with its answer, and the row's name."""
        return joined(self.tokenizer, row["clean"], row["answer"], self._space(row)), row["name"]

    def sequences(self, texts: Sequence[tuple[str, str]], least: int) -> Sequences:
        """Named texts as tokens, at least `least` in each."""
        if not texts:
            return Sequences(torch.empty(0, 1, dtype=torch.long), torch.empty(0, dtype=torch.long))
        ids = [encode(self.tokenizer, text, self.bos) for text, _ in texts]
        for row, (text, name) in zip(ids, texts, strict=True):
            if len(row) < least:
                raise MansuError(
                    f"{name}: text {text!r} is {len(row)} token(s) long; {least} are the least that say something"
                )
        sequences = Sequences(*pad(ids, pad_id(self.tokenizer)))
        if self.model is not None:
            require_fit(self.model, sequences, [name for _, name in texts])
        return sequences

    def _space(self, row: Row) -> AnswerSpace:
        return row.get("answer_space", self.answer_space)


def _text(row: Row) -> tuple[str, str]:
    return row["text"], row["name"]


def _require_apart(where: str, forget: Sequence[Row], name: str, others: Sequence[Row]) -> None:
    """Refuse a fact, or a prompt, that is asked in the forget set and in another one, held-out wordings included."""
    for key, what in (("fact", "facts"), ("clean", "prompts")):
        first = {row[key]: row for row in reversed(forget)}
        both = {row[key]: row for row in reversed(others) if row[key] in first}
        if both:
            example = min(both)
            raise MansuError(
                f"{where}: forget and {name} share {len(both)} {what}, e.g. {example!r} ({first[example]['name']}; "
                f"{both[example]['name']}); remove it from one"
            )


def _objects(source: object) -> Iterator[tuple[str, object]]:
    if isinstance(source, pd.DataFrame):
        columns = [str(column) for column in source.columns]
        if len(set(columns)) < len(columns):
            raise MansuError(f"rows: columns {columns} have one twice; rename it")
        values = source.to_numpy(dtype=object).tolist() if len(columns) else []
        source = [dict(zip(columns, row, strict=True)) for row in values]
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise MansuError(
            f"task: got a {type(source).__name__}; pass a file, a DataFrame or a list of rows (one dict for each)"
        )
    yield from ((f"row {i}", row) for i, row in enumerate(source))


register_source("rows", "a DataFrame or a list of dicts, in Python", rows_reader(_objects), claims=lambda source: True)
