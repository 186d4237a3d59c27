"""LRE: facts by relation (Hernandez et al. 2023, arXiv 2308.09124), one JSON file a relation."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath

from mansu_tl.data.answers import joined
from mansu_tl.data.sources.contrast import Asked, drawn_task
from mansu_tl.data.sources.counterfact import Request
from mansu_tl.data.sources.registry import register_source
from mansu_tl.data.task import Task
from mansu_tl.data.text import TextSource, require_text, text_source
from mansu_tl.errors import MansuError
from mansu_tl.results.files import local, read_text

SUBJECT = "{}"


@dataclass(frozen=True)
class Relation:
    """Facts of one kind.

    Attributes:
        name: what the relation is called.
        wordings: texts that end where the answer begins, with {} for the subject; the first is trained on.
        facts: subject and answer of each.
    """

    name: str
    wordings: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        for wording in self.wordings:
            if wording.count(SUBJECT) != 1:
                raise MansuError(f"relation {self.name}: wording {wording!r} must have {SUBJECT} once, for the subject")
        if len(set(self.wordings)) < 2 or not self.facts:
            raise MansuError(
                f"relation {self.name}: {len(set(self.wordings))} wordings, {len(self.facts)} facts; give two wordings or "
                "more, one to train on and one to hold out, and facts"
            )
        for i, (subject, answer) in enumerate(self.facts):
            require_text(subject, f"relation {self.name}, fact {i}: subject")
            require_text(answer, f"relation {self.name}, fact {i}: answer")

    @classmethod
    def read(cls, path: str | PathLike[str]) -> Relation:
        """A relation as LRE's files have it (Hernandez et al. 2023, arXiv 2308.09124): templates, subjects, objects.

        Raises:
            MansuError: no such file, or one of another kind.
        """
        try:
            found = json.loads(read_text(local(path)))
            wordings = dict.fromkeys((*found["prompt_templates"], *found.get("prompt_templates_zs", ())))
            facts = dict.fromkeys((one["subject"], one["object"]) for one in found["samples"])
            name = str(found["name"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MansuError(
                f"{fspath(path)}: not one of LRE's relations ({type(error).__name__}: {error}); it needs name, "
                "prompt_templates and samples with subject and object"
            ) from None
        return cls(name, tuple(wordings), tuple(facts))

    def one_answer(self) -> Sequence[tuple[str, str]]:
        """The facts whose subject has one answer."""
        answers = Counter(subject for subject, _ in self.facts)
        return [fact for fact in self.facts if answers[fact[0]] == 1]


def lre_requests(place: str | PathLike[str], *, seed: int = 0) -> tuple[Request, ...]:
    """A relation's facts as CounterFact's requests, so that its scores can be taken.

    The first wording is the request's, the others are its paraphrases. The neighbours are all other subjects with the same
    answer, asked in the first wording; the new answer is drawn from the relation's other ones, as CounterFact's are.

    Raises:
        MansuError: see `Relation.read`, or a relation in which all subjects have one answer.
    """
    relation = Relation.read(place)
    facts = relation.one_answer()
    answers = sorted({answer for _, answer in facts})
    if len(answers) < 2:
        raise MansuError(f"{fspath(place)}: all subjects have one answer; a new one cannot be drawn")
    rng = random.Random(f"mansu new answers {seed}")
    first, *others = relation.wordings
    return tuple(
        Request(
            name=f"{relation.name}: {subject}",
            relation=relation.name,
            subject=subject,
            prompt=first.replace(SUBJECT, subject),
            true=answer,
            new=rng.choice([other for other in answers if other != answer]),
            paraphrases=tuple(wording.replace(SUBJECT, subject) for wording in others),
            neighbours=tuple(
                first.replace(SUBJECT, other) for other, same in facts if same == answer and other != subject
            ),
        )
        for subject, answer in facts
    )


def lre_task(
    source: str | PathLike[str],
    tokenizer: TextSource,
    *,
    retain: str = "",
    facts: int = 24,
    near: int = 60,
    far_facts: int = 60,
    seed: int = 0,
) -> Task:
    """Facts of one relation to forget, others of it as near ones, and those of other relations to keep.

    What the model knows is not asked: `mtl.build_task` does that, and takes only facts that it knows.

    Args:
        source: the relation.
        retain: the files of other relations, with commas between them.

    Raises:
        MansuError: no other relation, or what `Relation.read` and `drawn_task` refuse.
    """
    if not retain:
        raise MansuError(f"{fspath(source)}: nothing to keep; name another relation's file: retain=...")
    model, _ = text_source(tokenizer)
    about, *far = (Relation.read(place) for place in (source, *retain.split(",")))

    def asked(relation: Relation) -> list[Asked]:
        return [
            Asked(
                f"{relation.name}: {subject}", prompt := wording.replace(SUBJECT, subject),
                joined(model, prompt, answer)[len(prompt) :], f"{relation.name}: {subject}", held_out=bool(i),
            )
            for subject, answer in relation.one_answer()
            for i, wording in enumerate(relation.wordings[:2])
        ]  # fmt: skip

    others = [one for relation in far for one in asked(relation)]
    return drawn_task(
        asked(about), others, tokenizer, name=about.name, where=fspath(source), facts=facts, near=near,
        far_facts=far_facts, seed=seed,
    )  # fmt: skip


register_source(
    "lre", "a relation's facts in LRE's format, retain=OTHER.json", lre_task, fields=("prompt_templates", "samples")
)
