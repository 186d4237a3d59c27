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
        corrupt: a counterfactual, where the benchmark has one; "" in a set where others have one leaves the question out.
        wrong: with it its answer and further wrong ones, the same number in every question.
    """

    name: str
    prompt: str
    answer: str
    fact: str
    held_out: bool = False
    corrupt: str = ""
    wrong: tuple[str, ...] = ()


_read = rows_reader(lambda rows: rows)
_Rows = list[tuple[str, dict[str, object]]]


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
    rows = {kind: _every_wording(model, where, kind, asked) for kind, asked in sets.items() if asked}
    left = sum(map(len, sets.values())) - sum(map(len, rows.values()))
    return _task(rows, tokenizer, name, where, text, left)


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
    pools = {kind: _every_wording(model, where, kind, asked) for kind, asked in (("forget", about), ("retain", far))}
    left = len(about) + len(far) - sum(map(len, pools.values()))
    rng = random.Random(f"mansu facts {seed}")
    names = {
        kind: list(dict.fromkeys(str(row["fact"]) for _, row in rows if not row["held_out"]))
        for kind, rows in pools.items()
    }
    if len(names["forget"]) <= facts:
        raise MansuError(
            f"{where}: {len(names['forget'])} facts can be used, {facts} to forget and a near one are asked for; lower "
            "facts, or give a larger file"
        )
    for each in names.values():
        rng.shuffle(each)
    chosen = {
        "forget": set(names["forget"][:facts]),
        "near": set(names["forget"][facts : facts + near]),
        "retain": set(names["retain"][:far_facts]),
    }
    rows = {
        kind: [
            (called, {**row, "set": kind})
            for called, row in pools["retain" if kind == "retain" else "forget"]
            if row["fact"] in kept
        ]
        for kind, kept in chosen.items()
    }
    return _task(rows, tokenizer, name, where, (), left)


def _task(
    rows: Mapping[str, _Rows], tokenizer: TextSource, name: str, where: str, text: Sequence[str], left: int
) -> Task:
    texts = [(f"{where}, text {i}", {"set": "text", "text": each}) for i, each in enumerate(text)]
    task = _read([row for each in rows.values() for row in each] + texts, tokenizer, name=name)
    return replace(task, lines={**task.lines, LEFT_OUT: left}) if left else task


def _every_wording(model: PreTrainedTokenizerBase, where: str, kind: str, asked: Sequence[Asked]) -> _Rows:
    """The rows of a set, those that training may see and those held out each among their own."""
    parts = [[one for one in asked if one.held_out is held_out] for held_out in (False, True)]
    rows = [row for part in parts if part for row in _rows(model, kind, part)]
    if not any(not row["held_out"] for _, row in rows):
        raise MansuError(
            f"{where}: none of {len(asked)} questions of the {kind} set has a counterfactual, another question of as "
            "many tokens with another answer; give more questions, or another tokenizer"
        )
    return rows


def _rows(tokenizer: PreTrainedTokenizerBase, kind: str, asked: Sequence[Asked]) -> _Rows:
    tokens = [tuple(encode(tokenizer, one.prompt, False)) for one in asked]
    alike: dict[int, list[int]] = {}
    for i, ids in enumerate(tokens):
        alike.setdefault(len(ids), []).append(i)
    answers = list(dict.fromkeys(one.answer.strip() for one in asked))
    given = any(one.corrupt for one in asked)
    count = len(asked[0].wrong) if given else min(OPTIONS, len(answers)) - 1
    out = []
    for i, one in enumerate(asked):
        corrupt, wrong = one.corrupt, list(one.wrong)
        if not given:
            others = [
                j
                for j in alike[len(tokens[i])]
                if asked[j].answer.strip() != one.answer.strip() and tokens[j] != tokens[i]
            ]
            if not others:
                continue
            others.sort(key=lambda j: (-sum(a == b for a, b in zip(tokens[i], tokens[j], strict=True)), j))
            corrupt = asked[others[0]].prompt
            drawn = random.Random(f"mansu options {one.prompt}").sample(answers, len(answers))
            wrong = list(dict.fromkeys([*(asked[j].answer.strip() for j in others), *drawn]))
        chosen = _distinct(tokenizer, one, wrong, count)
        if corrupt and len(chosen) == count:
            row = {"set": kind, "clean": one.prompt, "corrupt": corrupt, "answer": one.answer, "distractors": chosen}
            out.append((one.name, {**row, "fact": one.fact, "held_out": one.held_out}))
    return out


def _distinct(tokenizer: PreTrainedTokenizerBase, one: Asked, wrong: Sequence[str], count: int) -> list[str]:
    """The first wrong answers that are other tokens than the right one and than each other."""
    seen = {tuple(continuation(tokenizer, one.prompt, one.answer, f"{one.name}: answer")[1])}
    chosen: list[str] = []
    for text in wrong:
        if len(chosen) == count:
            break
        ids = tuple(continuation(tokenizer, one.prompt, text, f"{one.name}: wrong answer")[1])
        if ids not in seen:
            seen.add(ids)
            chosen.append(text)
    return chosen
