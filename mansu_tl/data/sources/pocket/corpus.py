"""What the model reads: sentences that state the world's facts, and generic text that states none.

A fact sentence is an optional lead-in, a trained template and the answer. Generic text is copying, in-context binding
and agreement. A text is the words between BOS and EOS.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from mansu_tl.data.sources.pocket import lexicon
from mansu_tl.data.sources.pocket.world import Fact, World
from mansu_tl.errors import MansuError

_SKILLS = (3, 2, 1)
_COPY_LENGTHS = range(4, 11)


@dataclass(frozen=True)
class Generic:
    """A generic text.

    Attributes:
        skill: "copy", "bind" or "agree".
        text: the words.
        asked: how many words at the end, before the full stop, follow from the words before them.
    """

    skill: str
    text: str
    asked: int


def fact_sentence(world: World, fact: Fact, template: int, lead_in: str = "") -> str:
    """The sentence stating `fact` through one of its templates.

    Raises:
        MansuError: the template is held out for this fact.
    """
    if template == fact.held_out:
        raise MansuError(f"fact {fact.id!r}: template {template} is held out; choose one of {fact.trained_templates}")
    sentence = f"{world.prompt(fact.relation, fact.entity, template)} {fact.answer} ."
    return f"{lead_in} {sentence}" if lead_in else sentence


def fact_sentences(world: World, facts: tuple[Fact, ...]) -> list[str]:
    """Every sentence of `facts` over their trained templates, without lead-ins."""
    return [fact_sentence(world, fact, t) for fact in facts for t in fact.trained_templates]


def generic_text(rng: random.Random) -> Generic:
    """One generic text; the skills that are slow to learn are the more frequent ones."""
    return rng.choices((_copying, _binding, _agreement), _SKILLS)[0](rng)


def vocabulary(world: World) -> list[str]:
    """Every word that any text can hold, in a fixed order."""
    domains = (lexicon.POTIONS, *lexicon.FAR_DOMAINS)
    groups: list[tuple[str, ...]] = [(".", ",", ":", ";", "echo", "holds", "the")]
    groups += [pool for d in domains for pool in (d.first, d.second)]
    for relation in world.relations:
        groups.append(relation.answers)
        groups += [tuple(t.replace("{name}", " ").split()) for t in relation.templates]
    groups += [tuple(lead_in.split()) for lead_in in lexicon.LEAD_INS]
    groups += [lexicon.HOLDERS, lexicon.OBJECTS, lexicon.SINGULAR, lexicon.PLURAL]
    groups += [lexicon.SINGULAR_VERBS, lexicon.PLURAL_VERBS, lexicon.NEARNESS]
    return list(dict.fromkeys(word for group in groups for word in group))


def _copying(rng: random.Random) -> Generic:
    # Potion words are left out: a copied list could otherwise spell a potion's name.
    words = rng.sample(_COPIED, rng.choice(_COPY_LENGTHS))
    return Generic("copy", f"echo : {' '.join(words)} ; {' '.join(words)} .", len(words))


def _binding(rng: random.Random) -> Generic:
    count = rng.choice((2, 3))
    holdings = list(zip(rng.sample(lexicon.HOLDERS, count), rng.sample(lexicon.OBJECTS, count), strict=True))
    asked = rng.sample(holdings, count)
    sentences = [f"{holder} holds {held}" for holder, held in (*holdings, *asked)]
    return Generic("bind", " . ".join(sentences) + " .", 1)


def _agreement(rng: random.Random) -> Generic:
    kind = rng.randrange(len(lexicon.SINGULAR))
    plural = rng.random() < 0.5
    subject = (lexicon.PLURAL if plural else lexicon.SINGULAR)[kind]
    other = rng.choice(lexicon.PLURAL if rng.random() < 0.5 else lexicon.SINGULAR)
    # Each noun has its own verb, so that the right form is the one likely continuation.
    verb = (lexicon.PLURAL_VERBS if plural else lexicon.SINGULAR_VERBS)[kind]
    return Generic("agree", f"the {subject} {rng.choice(lexicon.NEARNESS)} the {other} {verb} .", 1)


_COPIED = (
    *lexicon.OBJECTS,
    *lexicon.SINGULAR,
    *lexicon.PLURAL,
    *lexicon.HOLDERS,
    *(answer for domain in lexicon.FAR_DOMAINS for relation in domain.relations for answer in relation.answers),
)
