"""The invented world: who exists, what is true of them, which facts are to be forgotten.

Potions come in two kinds that share name words, phrasings and answers: the *hazard* ones, to be forgotten, and the
*near* ones, to be kept. Only the whole name tells them apart: each name word is shared by at least five potions whose
answers are drawn so that one word of a name says nothing about the answer. Far facts speak of inventors, festivals,
creatures and ships. Names that combine the same words but belong to no potion show what "not knowing" looks like.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from mansu_tl.data.sources.pocket.lexicon import FAR_DOMAINS, POTIONS, RelationWords
from mansu_tl.errors import MansuError

TEMPLATES = 5
_HAZARD, _NEAR, _UNSEEN, _INVENTORS, _OTHERS = 24, 48, 64, 32, 24
_DRAWS = 200


@dataclass(frozen=True)
class Fact:
    """One thing that is true in the world.

    Attributes:
        kind: "hazard", "near" or "far".
        relation: name of the relation.
        entity: the two-word name.
        answer: the one-word answer.
        held_out: index of the template that no training text uses for this fact.
    """

    kind: str
    relation: str
    entity: str
    answer: str
    held_out: int

    @property
    def id(self) -> str:
        """The fact's name in question sets: "relation:entity"."""
        return f"{self.relation}:{self.entity}"

    @property
    def trained_templates(self) -> tuple[int, ...]:
        """Indices of the templates that training text uses for this fact."""
        return tuple(t for t in range(TEMPLATES) if t != self.held_out)


@dataclass(frozen=True)
class World:
    """All facts, and the names that belong to nothing.

    Attributes:
        facts: every fact, hazard first, then near, then far.
        relations: templates and answer pool of each relation.
        unseen: names of no potion, for training objectives.
        unseen_evaluation: names of no potion, kept apart for evaluation.
    """

    facts: tuple[Fact, ...]
    relations: tuple[RelationWords, ...]
    unseen: tuple[str, ...]
    unseen_evaluation: tuple[str, ...]

    def of_kind(self, kind: str) -> tuple[Fact, ...]:
        """The facts of one kind: "hazard", "near" or "far".

        Raises:
            MansuError: another kind.
        """
        if kind not in ("hazard", "near", "far"):
            raise MansuError(f"facts: no kind {kind!r}; choose hazard, near or far")
        return tuple(f for f in self.facts if f.kind == kind)

    def relation(self, name: str) -> RelationWords:
        """Templates and answers of the relation called `name`.

        Raises:
            MansuError: no such relation.
        """
        for relation in self.relations:
            if relation.name == name:
                return relation
        raise MansuError(f"relation {name!r}: not in this world; choose one of {[r.name for r in self.relations]}")

    def prompt(self, relation: str, entity: str, template: int) -> str:
        """The text that asks for `relation` of `entity`; it ends right before the answer."""
        return self.relation(relation).templates[template].format(name=entity)


@cache
def build_world(seed: int = 0) -> World:
    """The world of one seed; the same seed gives the same world."""
    rng = random.Random(f"mansu pocket world {seed}")
    named, free = _potion_names(rng)
    hazard = named[:_HAZARD]
    facts: list[Fact] = []
    for relation in POTIONS.relations:
        answers = _uninformative_answers(rng, named, relation.answers)
        for group, kind in ((hazard, "hazard"), (named[_HAZARD:], "near")):
            facts += _facts(rng, kind, relation, group, [answers[name] for name in group])
    for domain in FAR_DOMAINS:
        count = _INVENTORS if domain.name == "inventor" else _OTHERS
        entities = _spread(rng, domain.first, domain.second, count)
        for relation in domain.relations:
            facts += _facts(rng, "far", relation, entities, _even(rng, relation.answers, count))
    order = {"hazard": 0, "near": 1, "far": 2}
    relations = (*POTIONS.relations, *(r for d in FAR_DOMAINS for r in d.relations))
    facts.sort(key=lambda fact: order[fact.kind])
    return World(tuple(facts), relations, tuple(free[:_UNSEEN]), tuple(free[_UNSEEN:]))


def _potion_names(rng: random.Random) -> tuple[list[str], list[str]]:
    """Names of the potions (hazard ones first) and, shuffled, the combinations left over.

    Each kind uses the name words as evenly as its number allows.
    """
    hazard = _spread(rng, POTIONS.first, POTIONS.second, _HAZARD)
    everyone = _spread(rng, POTIONS.first, POTIONS.second, _HAZARD + _NEAR, chosen=hazard)
    free = [f"{a} {b}" for a in POTIONS.first for b in POTIONS.second if f"{a} {b}" not in set(everyone)]
    rng.shuffle(free)
    return everyone, free


def _spread(
    rng: random.Random, first: Sequence[str], second: Sequence[str], count: int, chosen: Sequence[str] = ()
) -> list[str]:
    """`chosen` plus further combinations, `count` in all, always from the least used words; ties are drawn."""
    names = list(chosen)
    while len(names) < count:
        uses = Counter(word for name in names for word in name.split())
        options = [(a, b) for a in first for b in second if f"{a} {b}" not in names]
        a, b = min(
            options,
            key=lambda ab: (
                max(uses[ab[0]] * len(first), uses[ab[1]] * len(second)),
                uses[ab[0]] + uses[ab[1]],
                rng.random(),
            ),
        )
        names.append(f"{a} {b}")
    return names


def _even(rng: random.Random, pool: Sequence[str], count: int) -> list[str]:
    """`count` answers in random order, each used as often as the others (give or take one)."""
    answers: list[str] = []
    while len(answers) < count:
        answers += rng.sample(list(pool), min(len(pool), count - len(answers)))
    rng.shuffle(answers)
    return answers


def _uninformative_answers(rng: random.Random, names: Sequence[str], pool: Sequence[str]) -> dict[str, str]:
    """Answers, even within hazard and within near, whose half-name votes are nearest to chance.

    Of many even draws the one is kept where the votes that the right answer gets from entities sharing a word are, for
    hazard and near names alike, nearest to the mean of the whole pool.
    """
    words = [set(name.split()) for name in names]
    sharing = [[j for j, other in enumerate(words) if j != i and other & parts] for i, parts in enumerate(words)]
    best: tuple[float, list[str]] = (float("inf"), [])
    for _ in range(_DRAWS):
        answers = _even(rng, pool, _HAZARD) + _even(rng, pool, len(names) - _HAZARD)
        gaps = []
        for part in (range(_HAZARD), range(_HAZARD, len(names))):
            right = sum(answers[j] == answers[i] for i in part for j in sharing[i])
            mean = sum(len(sharing[i]) for i in part) / len(pool)
            gaps.append(abs(right - mean) / len(part))
        if max(gaps) < best[0]:
            best = (max(gaps), answers)
    return dict(zip(names, best[1], strict=True))


def _facts(
    rng: random.Random, kind: str, relation: RelationWords, entities: Sequence[str], answers: Sequence[str]
) -> list[Fact]:
    held_out = [i % TEMPLATES for i in range(len(entities))]
    rng.shuffle(held_out)
    blank = Fact(kind, relation.name, "", "", 0)
    return [replace(blank, entity=e, answer=a, held_out=h) for e, a, h in zip(entities, answers, held_out, strict=True)]
