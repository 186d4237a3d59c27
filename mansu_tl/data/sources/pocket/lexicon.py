"""The words of the invented world, from `lexicon.json`: names, answers and the ways of saying each fact."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class RelationWords:
    """How one relation is spoken of: phrasings that end right before the answer, and the pool of one-word answers."""

    name: str
    templates: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class DomainWords:
    """One kind of thing: the two pools its names are made of, and its relations."""

    name: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    relations: tuple[RelationWords, ...]


def _domain(row: dict[str, Any]) -> DomainWords:
    relations = (RelationWords(r["name"], tuple(r["templates"]), tuple(r["answers"].split())) for r in row["relations"])
    return DomainWords(row["name"], tuple(row["first"].split()), tuple(row["second"].split()), tuple(relations))


_ALL = json.loads((resources.files(__package__) / "lexicon.json").read_text(encoding="utf-8"))
POTIONS, *_FAR = map(_domain, _ALL["domains"])
FAR_DOMAINS = tuple(_FAR)
LEAD_INS = tuple(_ALL["lead_ins"])
HOLDERS, OBJECTS, SINGULAR, PLURAL, SINGULAR_VERBS, PLURAL_VERBS, NEARNESS = (
    tuple(_ALL[key].split())
    for key in ("holders", "objects", "singular", "plural", "singular_verbs", "plural_verbs", "nearness")
)
