"""CounterFact and known_1000 (Meng et al. 2022, arXiv 2202.05262): facts, each with a subject, a true answer and wordings.

CounterFact's records hold a rewrite request with the true and a new answer, paraphrases, and neighbours: prompts about
other subjects of which the true answer is true. Flat records (subject, prompt, target_true, target_false) have no such
prompts, and known_1000's (subject, prompt, attribute, relation_id) no new answer: they are made as CounterFact's
authors made theirs, the new answer drawn from the relation's others, the neighbours taken from its subjects with the
same answer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath

from mansu_tl.data.answers import joined
from mansu_tl.data.sources.contrast import Asked, drawn_task
from mansu_tl.data.sources.records import Record, read_records, title_of
from mansu_tl.data.sources.registry import register_source
from mansu_tl.data.task import Task
from mansu_tl.data.text import TextSource, text_source
from mansu_tl.errors import MansuError


@dataclass(frozen=True)
class Request:
    """One fact, and what is asked beside it.

    Attributes:
        name: the file and line that it comes from.
        relation: what kind of fact it is.
        subject: what it is about.
        prompt: ends where the answer begins.
        true: the right answer.
        new: another one, which an edit would put in its place.
        paraphrases: the same fact in other words.
        neighbours: prompts about other subjects whose right answer is the same.
    """

    name: str
    relation: str
    subject: str
    prompt: str
    true: str
    new: str
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()

    @property
    def fact(self) -> str:
        """What is asked, whatever the words."""
        return f"{self.relation}: {self.subject}"


def read_counterfact(place: str | PathLike[str], *, seed: int = 0) -> tuple[Request, ...]:
    """The requests of a file, folder or hub id: CounterFact's own, flat ones, or known_1000's.

    Args:
        seed: of the new answers that are drawn where the records have none.

    Raises:
        MansuError: see `read_records`; a field that is missing, a prompt without its subject, a new answer that is the
            true one, or a relation in which there is no other answer to be drawn.
    """
    found = [_request(record) for record in read_records(place)]
    rng = random.Random(f"mansu new answers {seed}")
    answers: dict[str, dict[str, None]] = {}
    prompts: dict[tuple[str, str], list[str]] = {}
    for one in found:
        answers.setdefault(one.relation, {})[one.true] = None
        prompts.setdefault((one.relation, one.true), []).append(one.prompt)
    out = []
    for one in found:
        if not one.new:
            others = [other for other in answers[one.relation] if other != one.true]
            if not others:
                raise MansuError(
                    f"{one.name}: all of relation {one.relation!r} have the answer {one.true!r}; a new one cannot be drawn, "
                    "give more of its facts"
                )
            one = replace(one, new=rng.choice(others))
        if not one.neighbours:
            alike = prompts[one.relation, one.true]
            one = replace(one, neighbours=tuple(dict.fromkeys(text for text in alike if text != one.prompt)))
        out.append(one)
    return tuple(out)


def _request(record: Record) -> Request:
    if "requested_rewrite" in record.fields:
        asked = record.within("requested_rewrite")
        template, subject = asked.text("prompt"), asked.text("subject")
        if template.count("{}") != 1:
            raise MansuError(f"{asked.name}: prompt {template!r} must have {{}} once, for the subject")
        true, new = (asked.within(key).text("str") for key in ("target_true", "target_new"))
        relation = asked.text("relation_id") if "relation_id" in asked.fields else template
        prompt = template.replace("{}", subject)
        paraphrases, neighbours = (
            record.texts(key, least=0) if key in record.fields else ()
            for key in ("paraphrase_prompts", "neighborhood_prompts")
        )
    else:
        subject, prompt = record.text("subject"), record.text("prompt")
        true = record.text("attribute" if "attribute" in record.fields else "target_true").strip()
        key = next((key for key in ("target_new", "target_false") if key in record.fields), "")
        new = record.text(key).strip() if key else ""
        template = prompt.replace(subject, "{}")
        relation = record.text("relation_id") if "relation_id" in record.fields else template
        paraphrases, neighbours = (), ()
    if subject not in prompt:
        raise MansuError(f"{record.name}: subject {subject!r} is not in prompt {prompt!r}")
    if new == true:
        raise MansuError(f"{record.name}: the new answer {new!r} is the true one; give another")
    return Request(record.name, relation, subject, prompt, true, new, paraphrases, neighbours)


def counterfact_task(
    source: str | PathLike[str],
    tokenizer: TextSource,
    *,
    relation: str = "",
    facts: int = 24,
    near: int = 60,
    far_facts: int = 60,
    seed: int = 0,
) -> Task:
    """Facts of one relation to forget, others of it as near ones, and those of all other relations to keep.

    The request's prompt is trained on, the first paraphrase is held out. What the model knows is not asked.

    Args:
        source: the records.
        relation: whose facts are to be forgotten, "P103"; "" = the relation with the most.

    Raises:
        MansuError: no such relation, or what `read_counterfact` and `drawn_task` refuse.
    """
    found = read_counterfact(source, seed=seed)
    counts = Counter(one.relation for one in found)
    about = relation or counts.most_common(1)[0][0]
    if about not in counts:
        listed = ", ".join(name for name, _ in counts.most_common(6))
        raise MansuError(
            f"{fspath(source)}: has no relation {about!r}; it has {listed}{', ...' if len(counts) > 6 else ''}"
        )
    asked = _asked(found, tokenizer)
    kind = {one.fact: one.relation for one in found}
    sides: tuple[list[Asked], list[Asked]] = ([], [])
    for each in asked:
        sides[kind[each.fact] != about].append(each)
    if not sides[1]:
        raise MansuError(
            f"{fspath(source)}: all facts are of relation {about!r}; give a file with others, which are kept"
        )
    return drawn_task(
        *sides, tokenizer, name=title_of(source), where=fspath(source), facts=facts, near=near, far_facts=far_facts,
        seed=seed,
    )  # fmt: skip


def _asked(found: Sequence[Request], tokenizer: TextSource) -> list[Asked]:
    model, _ = text_source(tokenizer)
    out, seen = [], set()
    for one in found:
        if one.fact in seen:
            continue  # the same fact with another new answer
        seen.add(one.fact)
        for i, prompt in enumerate((one.prompt, *one.paraphrases[:1])):
            answer = joined(model, prompt, one.true)[len(prompt) :]
            out.append(Asked(one.name, prompt, answer, one.fact, held_out=bool(i)))
    return out


for _name, _about, _fields in (
    ("counterfact", "CounterFact's records, nested", ("requested_rewrite",)),
    (
        "counterfact-flat",
        "CounterFact's records, flat: subject, prompt, target_true",
        ("subject", "prompt", "target_true"),
    ),
    ("known_1000", "known_1000's records: subject, prompt, attribute", ("subject", "prompt", "attribute")),
):
    register_source(_name, _about, counterfact_task, fields=_fields)
