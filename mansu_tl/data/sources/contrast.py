"""A forget/retain task of questions that come without counterfactuals.

The corrupt prompt of a question is another question of its set, of as many tokens and with another answer: the one that
shares most tokens with it, place by place. Where a benchmark asks in a template this is another subject in the same words.
Its answer is the first distractor; further ones are the answers of the next likest. A question without such a partner is
left out, and the task's lines say how many were. Our definition; benchmarks publish no counterfactuals.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from mansu_tl.data.answers import continuation
from mansu_tl.data.sources.rows import rows_reader
from mansu_tl.data.task import Task
from mansu_tl.data.text import TextSource, encode, text_source
from mansu_tl.errors import MansuError

# Options of a question, the right one among them.
OPTIONS = 4
LEFT_OUT = "without a counterfactual"


@dataclass(frozen=True)
class Asked:
    """A question of a benchmark.

    Attributes:
        name: what errors call it.
        prompt: ends where the answer begins.
        answer: what is right.
        fact: what is asked, so that its wordings count once.
        held_out: a wording that is only evaluated.
        corrupt: its counterfactual, where the benchmark has them; "" leaves the question out there.
        wrong: where it has them, that one's answer and further wrong ones, the same number in every question.
    """

    name: str
    prompt: str
    answer: str
    fact: str
    held_out: bool = False
    corrupt: str = ""
    wrong: tuple[str, ...] = ()


_read = rows_reader(lambda rows: rows)
_Row = tuple[str, dict[str, object]]


def contrast_task(
    sets: Mapping[str, Sequence[Asked]],
    tokenizer: TextSource,
    *,
    name: str,
    where: str,
    text: Sequence[str] = (),
) -> Task:
    """A task of questions by set.

    Args:
        sets: "forget", "retain" and optionally "near".
        where: what errors call the whole.
        text: texts whose likelihood is to be kept.

    Raises:
        MansuError: a set of which no question has a counterfactual, or what `load_task` refuses in rows.
    """
    model, _ = text_source(tokenizer)
    rows: list[_Row] = []
    for kind, asked in sets.items():
        if asked:
            pool = _Pool(model, where, kind, asked)
            rows += [row for i in range(len(asked)) if (row := pool.row(i, kind)) is not None]
    left = sum(map(len, sets.values())) - len(rows)
    rows += [(f"{where}, text {i}", {"set": "text", "text": each}) for i, each in enumerate(text)]
    return _task(rows, tokenizer, name, left)


def drawn_task(
    about: Sequence[Asked],
    far: Sequence[Asked],
    tokenizer: TextSource,
    *,
    name: str,
    where: str,
    facts: int,
    near: int,
    far_facts: int,
    seed: int,
) -> Task:
    """A task of facts of one kind, some of which are to be forgotten and others are near ones, and of far facts.

    Args:
        about: of one kind, in all wordings.
        facts: how many to forget, drawn from those that have a counterfactual.
        near: how many of the same kind to keep, at most.
        far_facts: how many of the others, at most.

    Raises:
        MansuError: as `contrast_task`, counts below 1, or too few facts.
    """
    if facts < 1 or near < 1 or far_facts < 1:
        raise MansuError(f"{where}: facts={facts}, near={near}, far_facts={far_facts}; give at least 1 of each")
    model, _ = text_source(tokenizer)
    rng = random.Random(f"mansu facts {seed}")
    own, others = _Pool(model, where, "forget", about), _Pool(model, where, "retain", far)
    if len(own.usable) <= facts:
        raise MansuError(
            f"{where}: {len(own.usable)} facts can be used, {facts} to forget and a near one are asked for; lower facts, or "
            "give a larger file"
        )
    drawn, kept = (rng.sample(pool.usable, len(pool.usable)) for pool in (own, others))
    chosen = [
        (own, "forget", drawn[:facts]),
        (own, "near", drawn[facts : facts + near]),
        (others, "retain", kept[:far_facts]),
    ]
    found = [pool.row(i, kind) for pool, kind, names in chosen for each in names for i in pool.wordings[each]]
    left = sum(len(pool.wordings) - len(pool.usable) for pool in (own, others)) + found.count(None)
    return _task([row for row in found if row is not None], tokenizer, name, left)


def _task(rows: Sequence[_Row], tokenizer: TextSource, name: str, left: int) -> Task:
    task = _read(rows, tokenizer, name=name)
    return replace(task, lines={**task.lines, LEFT_OUT: left}) if left else task


class _Pool:
    """The questions of a set, each of which looks for its counterfactual among the others in as many tokens.

    Attributes:
        wordings: the places of every fact's wordings.
        usable: facts that have a counterfactual in a wording that training may see.

    Raises:
        MansuError: there is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str, kind: str, asked: Sequence[Asked]) -> None:
        self.tokenizer, self.asked = tokenizer, asked
        self.tokens = [tuple(encode(tokenizer, one.prompt, False)) for one in asked]
        self.given = any(one.wrong for one in asked)
        self.alike: dict[tuple[bool, int], list[int]] = {}
        self.wordings: dict[str, list[int]] = {}
        for i, one in enumerate(asked):
            self.alike.setdefault((one.held_out, len(self.tokens[i])), []).append(i)
            self.wordings.setdefault(one.fact, []).append(i)
        self.answers = list(dict.fromkeys(one.answer.strip() for one in asked))
        self.count = len(asked[0].wrong) if self.given else min(OPTIONS, len(self.answers)) - 1
        found = [i for i, one in enumerate(asked) if not one.held_out and (one.corrupt or self._others(i))]
        if not found:
            raise MansuError(
                f"{where}: none of {len(asked)} questions of the {kind} set has a counterfactual, another question of as "
                "many tokens with another answer; give more questions, or another tokenizer"
            )
        self.usable = list(dict.fromkeys(asked[i].fact for i in found))

    def row(self, i: int, kind: str) -> _Row | None:
        """A question as a row of a task file; None where it has no counterfactual, or too few other wrong answers."""
        one = self.asked[i]
        corrupt, wrong = one.corrupt, list(one.wrong)
        if not self.given:
            own = self.tokens[i]
            others = sorted(
                self._others(i), key=lambda j: (-sum(a == b for a, b in zip(own, self.tokens[j], strict=True)), j)
            )
            if not others:
                return None
            corrupt = self.asked[others[0]].prompt
            drawn = random.Random(f"mansu options {one.prompt}").sample(self.answers, len(self.answers))
            wrong = list(dict.fromkeys([*(self.asked[j].answer.strip() for j in others), *drawn]))
        chosen = self._distinct(one, wrong)
        if not corrupt or len(chosen) < self.count:
            return None
        fields = {"set": kind, "clean": one.prompt, "corrupt": corrupt, "answer": one.answer, "distractors": chosen}
        return one.name, {**fields, "fact": one.fact, "held_out": one.held_out}

    def _others(self, i: int) -> list[int]:
        """Questions that could be the counterfactual of one."""
        one, own = self.asked[i], self.tokens[i]
        if self.given:
            return []
        return [
            j
            for j in self.alike[one.held_out, len(own)]
            if self.asked[j].answer.strip() != one.answer.strip() and self.tokens[j] != own
        ]

    def _distinct(self, one: Asked, wrong: Sequence[str]) -> list[str]:
        """The first wrong answers that are other tokens than the right one and than each other."""
        seen = {tuple(continuation(self.tokenizer, one.prompt, one.answer, f"{one.name}: answer")[1])}
        chosen: list[str] = []
        for text in wrong:
            if len(chosen) == self.count:
                break
            ids = tuple(continuation(self.tokenizer, one.prompt, text, f"{one.name}: wrong answer")[1])
            if ids not in seen:
                seen.add(ids)
                chosen.append(text)
        return chosen
