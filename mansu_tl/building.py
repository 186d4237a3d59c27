"""From facts to a task: which of them a model knows, which are to be forgotten, what is near and what is far.

A fact counts as known where the model ranks its answer first among all the relation's answers, in at least two wordings: the
one that is trained on and one that is held out. Nothing is taken that cannot be used, and the table says why.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Sequences, Task
from mansu_tl.data.answers import joined, seam
from mansu_tl.data.corruption import Subject, counterfactuals
from mansu_tl.data.fit import require_fit
from mansu_tl.data.sources import load_task
from mansu_tl.data.sources.lre import SUBJECT as _SUBJECT
from mansu_tl.data.sources.lre import Relation
from mansu_tl.data.text import encode, in_chat, pad, pad_id, text_source
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import require_ready
from mansu_tl.models.cache import cache_argument, cache_of, cache_passed_on
from mansu_tl.models.state import home
from mansu_tl.models.tree import hf_of
from mansu_tl.results.files import local, write_text
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.likeliest import likeliest_of
from mansu_tl.runs.metrics import last_logits
from mansu_tl.runs.passes import last_token_only

# Prompts that are run at a time, and tokens that all of them begin with from which on these are run once.
_BATCH, _WORTH_SHARING = 64, 4


@dataclass(frozen=True)
class BuiltTask(Result):
    """A task made from facts, and what became of every fact.

    Attributes:
        lines: the task's rows, one JSON object a line, as task files have them.
        relation, subject, answer: of every fact that was looked at.
        used_as: "forget", "near", "retain" or "" for each.
        reason: why it was not used; "" where it was.
    """

    lines: tuple[str, ...]
    relation: tuple[str, ...]
    subject: tuple[str, ...]
    answer: tuple[str, ...]
    used_as: tuple[str, ...]
    reason: tuple[str, ...]

    def rows(self) -> list[dict[str, Any]]:
        """The task's rows."""
        return [json.loads(line) for line in self.lines]

    def task(self, model: TransformerBridge, name: str = "facts") -> Task:
        """The task, for a model."""
        return load_task(self.rows(), tokenizer=model, name=name)

    def write(self, path: str | PathLike[str]) -> Path:
        """Write the task as JSON lines, to be used wherever a task's file is."""
        return write_text(local(path), "\n".join(self.lines) + "\n")

    def to_dataframe(self) -> pd.DataFrame:
        """One row a fact."""
        names = ("relation", "subject", "answer", "used_as", "reason")
        return pd.DataFrame({name: getattr(self, name) for name in names})

    def __repr__(self) -> str:
        counts = Counter(self.used_as)
        used = ", ".join(f"{counts[kind]} {kind}" for kind in ("forget", "near", "retain"))
        return f"BuiltTask({used} facts of {len(self.subject)}, {len(self.lines)} rows)"

    def _tables(self) -> Sequence[Table]:
        frame = self.to_dataframe().groupby(["relation", "used_as", "reason"], sort=False).size().rename("facts")
        return (Table(frame.reset_index(), "what became of the facts"),)


@torch_defaults()
def build_task(
    model: TransformerBridge,
    forget: Relation | str | PathLike[str],
    far: Iterable[Relation | str | PathLike[str]] = (),
    *,
    facts: int = 24,
    near: int = 60,
    far_facts: int = 20,
    options: int = 4,
    unseen: int = 8,
    text: Sequence[str] = (),
    chat: bool = False,
    answer_tokens: int = 1,
    seed: int = 0,
) -> BuiltTask:
    """Make a forget/retain task of what a model knows. Our own.

    Args:
        forget: the relation whose facts are to be forgotten, or LRE's file of it; its other known facts are near ones.
        far: relations that are kept.
        facts: how many to forget, drawn from those that are known.
        near: how many of the same relation to keep, at most.
        far_facts: how many to keep of each far relation, at most.
        options: answers to choose from in each question, the right one among them.
        unseen: prompts about invented subjects.
        text: texts whose likelihood is to be kept, as they are.
        chat: put every wording into the tokenizer's chat template, as what a user says; the answer begins the reply.
        answer_tokens: the most that an answer may have; those of several are ranked by the mean log-probability per token.
        seed: of every draw.

    Raises:
        MansuError: fewer known facts than are to be forgotten plus one near one, no far fact known, a relation that
            cannot be read, or a tokenizer without a chat template.

    Example:
        >>> from mansu_tl.building import Relation
        >>> wordings = ("the catalyst of {} is", "{} only wakes when stirred with")
        >>> kept = Relation("kept", wordings, (("mossy serum", "songamber"), ("ashen nectar", "sunresin")))
        >>> gone = Relation("gone", wordings, (("amber balm", "dreamash"), ("lunar nectar", "windquartz")))
        >>> mtl.build_task(mtl.load("pocket"), gone, [kept], facts=1, unseen=1, options=2)
        BuiltTask(1 forget, 1 near, 2 retain facts of 4, 9 rows)
    """
    if facts < 1 or near < 1 or options < 2 or answer_tokens < 1:
        raise MansuError(
            f"build_task: facts={facts}, near={near}, options={options}, answer_tokens={answer_tokens}; give at least 1, "
            "1, 2 and 1"
        )
    rng = random.Random(f"mansu task {seed}")
    about = forget if isinstance(forget, Relation) else Relation.read(forget)
    others = [one if isinstance(one, Relation) else Relation.read(one) for one in far]
    doubled = [name for name, count in Counter(one.name for one in (about, *others)).items() if count > 1]
    if doubled:
        raise MansuError(f"build_task: relation {doubled[0]!r} is given twice; name every relation once")
    if chat:
        about, *others = (_in_chat(model, one) for one in (about, *others))
    judged = {relation.name: _Judged(model, relation, options, answer_tokens) for relation in (about, *others)}
    usable = [fact for fact, why in judged[about.name].why.items() if not why]
    if len(usable) <= facts:
        whys = Counter(why for why in judged[about.name].why.values() if why).most_common(2)
        raise MansuError(
            f"relation {about.name}: {len(usable)} facts can be used, {facts} to forget and a near one are asked for "
            f"({'; '.join(f'{count} {why}' for why, count in whys)}); lower facts, or take another relation"
        )
    rng.shuffle(usable)
    used = {(about.name, fact): "forget" for fact in usable[:facts]}
    used |= {(about.name, fact): "near" for fact in usable[facts : facts + near]}
    for relation in others:
        known = [fact for fact, why in judged[relation.name].why.items() if not why]
        used |= {(relation.name, fact): "retain" for fact in rng.sample(known, min(far_facts, len(known)))}
    if "retain" not in used.values():
        raise MansuError(
            f"build_task: none of {len(others)} far relations has a fact that the model knows; name others in far="
        )
    rows: list[dict[str, Any]] = []
    for (name, fact), kind in used.items():
        rows += judged[name].rows(fact, kind, options, rng)
    rows += [{"set": "unseen", "text": prompt} for prompt in _invented(model, judged[about.name], unseen, seed)]
    rows += [{"set": "text", "text": each} for each in text]
    listed = [(name, fact, why) for name, each in judged.items() for fact, why in each.why.items()]
    kinds = [used.get((name, fact), "") for name, fact, _ in listed]
    return BuiltTask(
        lines=tuple(json.dumps(row, ensure_ascii=False) for row in rows),
        relation=tuple(name for name, _, _ in listed),
        subject=tuple(subject for _, (subject, _), _ in listed),
        answer=tuple(answer for _, (_, answer), _ in listed),
        used_as=tuple(kinds),
        reason=tuple("" if kind else why or "not drawn" for kind, (_, _, why) in zip(kinds, listed, strict=True)),
    )


class _Judged:
    """A relation's facts, and why each cannot be used ("" where it can).

    Attributes:
        usable: facts whose answer is not too long and the only one.
        why: the reason for each fact.
    """

    def __init__(self, model: TransformerBridge, relation: Relation, options: int, longest: int) -> None:
        self.relation = relation
        self._tokenizer, _ = text_source(model)
        first = relation.wordings[0].replace(_SUBJECT, relation.facts[0][0])
        tokens = {
            answer: seam(self._tokenizer, first, self._text(first, answer), answer_space=False)[1]
            for answer in dict.fromkeys(answer for _, answer in relation.facts)
        }
        answers = Counter(subject for subject, _ in relation.facts)
        short = {answer for answer, ids in tokens.items() if 1 <= len(ids) <= longest}
        self.usable = [fact for fact in relation.facts if fact[1] in short and answers[fact[0]] == 1]
        prompts = {
            fact: [encode(model, wording.replace(_SUBJECT, fact[0])) for wording in relation.wordings[:2]]
            for fact in self.usable
        }
        self._alike: dict[tuple[int, ...], list[tuple[str, str]]] = {}
        self._lengths = {fact: tuple(len(ids) for ids in prompts[fact]) for fact in self.usable}
        for fact in self.usable:
            self._alike.setdefault(self._lengths[fact], []).append(fact)
        few = len({answer for _, answer in self.usable}) < options
        known = set() if few else self._known(model, prompts, {answer: tuple(tokens[answer]) for answer in short})
        self.why: dict[tuple[str, str], str] = {}
        for fact in relation.facts:
            if answers[fact[0]] > 1:
                self.why[fact] = "has several answers"
            elif fact not in prompts:
                self.why[fact] = f"its answer is {len(tokens[fact[1]])} tokens"
            elif few:
                self.why[fact] = f"fewer than {options} answers to choose from"
            elif fact not in known:
                self.why[fact] = "not known in two wordings"
            else:
                self.why[fact] = "" if self.partners(fact) else "no other subject of as many tokens"

    def partners(self, fact: tuple[str, str]) -> list[tuple[str, str]]:
        """Facts with another answer whose prompts are as long, in the wording that is trained on and the one held out."""
        return [other for other in self._alike[self._lengths[fact]] if other[1] != fact[1]]

    def _known(
        self,
        model: TransformerBridge,
        prompts: Mapping[tuple[str, str], list[list[int]]],
        tokens: Mapping[str, tuple[int, ...]],
    ) -> set[tuple[str, str]]:
        """Facts that are right in the wording that is trained on and in the one that is held out."""
        pool = sorted({tokens[answer] for _, answer in self.usable})
        known = self.usable
        for i in range(2):
            asked = [prompts[fact][i] for fact in known]
            if all(len(text) == 1 for text in pool):
                found = _best(model, asked, [text[0] for text in pool])
                right = [best == tokens[fact[1]][0] for fact, best in zip(known, found, strict=True)]
            else:
                right = likeliest_of(model, asked, [tokens[answer] for _, answer in known], pool)
            known = [fact for fact, yes in zip(known, right, strict=True) if yes]
        return set(known)

    def rows(self, fact: tuple[str, str], kind: str, options: int, rng: random.Random) -> list[dict[str, Any]]:
        """The fact as rows of a task file: trained on in the first wording, held out in the second."""
        subject, answer = fact
        other = rng.choice(self.partners(fact))
        pool = sorted({each for _, each in self.usable} - {answer, other[1]})
        wrong = [other[1], *rng.sample(pool, options - 2)]
        return [
            {
                "set": kind,
                "clean": (clean := wording.replace(_SUBJECT, subject)),
                "corrupt": wording.replace(_SUBJECT, other[0]),
                "answer": self._text(clean, answer),
                "distractors": [self._text(clean, each) for each in wrong],
                "fact": f"{self.relation.name}: {subject}",
                "held_out": bool(i),
            }
            for i, wording in enumerate(self.relation.wordings[:2])
        ]

    def _text(self, prompt: str, answer: str) -> str:
        """An answer as it goes on behind a prompt, with the space that a writer puts there."""
        return joined(self._tokenizer, prompt, answer)[len(prompt) :]


def _in_chat(model: TransformerBridge, relation: Relation) -> Relation:
    """A relation whose wordings are what a user says in a chat."""
    tokenizer, _ = text_source(model)
    return replace(relation, wordings=tuple(in_chat(tokenizer, relation.wordings, "build_task")))


@torch.no_grad()
def _best(model: TransformerBridge, prompts: Sequence[list[int]], pool: list[int]) -> list[int]:
    """Which token of a pool has the highest logit behind each prompt; what all prompts begin with is run once."""
    if not prompts:
        return []
    rows = Sequences(*pad(prompts, 0))
    require_fit(model, rows)
    require_ready(model, rows.tokens)
    shared = int((rows.tokens == rows.tokens[0]).all(0).int().cumprod(0).sum())
    shared = min(shared, int(rows.lengths.min()) - 1)
    best = [0] * len(prompts)
    hf, place = hf_of(model), home(model)
    with cache_passed_on(model):
        cache = None
        if shared >= _WORTH_SHARING and len(prompts) > 1:
            cache = cache_of(hf(rows.tokens[:1, :shared].to(place), use_cache=True, logits_to_keep=1))
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            tokens, lengths = pad([prompts[i] for i in chosen], pad_id(text_source(model)[0]))
            if cache is None:
                logits = last_logits(model, tokens, lengths)
            else:
                behind = deepcopy(cache)
                behind.batch_repeat_interleave(len(chosen))
                with last_token_only(hf, lengths - shared):
                    given = {cache_argument(hf): behind}
                    logits = hf(tokens[:, shared:].to(place), use_cache=True, **given).logits[:, 0].float()
            for i, at in zip(chosen, logits[:, pool].argmax(1).tolist(), strict=True):
                best[i] = pool[at]
    return best


def _invented(model: TransformerBridge, judged: _Judged, count: int, seed: int) -> list[str]:
    """Prompts in the trained wording about names that nobody has."""
    wording = judged.relation.wordings[0]
    subjects = [
        Subject(name, wording.replace(_SUBJECT, name), name, answer)
        for name, answer in judged.usable
        if not judged.why[name, answer] and wording.replace(_SUBJECT, name).count(name) == 1
    ][:count]
    made = counterfactuals(subjects, lambda text: len(encode(model, text)), "unseen", seed)
    return list(dict.fromkeys(one.prompt for one in made))
