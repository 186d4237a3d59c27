"""The embedded forget/retain task: forget the hazard potions, keep everything else."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mansu_tl.data.answers import continuation
from mansu_tl.data.pairs import PromptPairs
from mansu_tl.data.sources.pocket.corpus import fact_sentences, generic_text
from mansu_tl.data.sources.pocket.lexicon import POTIONS
from mansu_tl.data.sources.pocket.tokens import build_tokenizer, text_ids
from mansu_tl.data.sources.pocket.world import TEMPLATES, Fact, World, build_world
from mansu_tl.data.sources.registry import register_source
from mansu_tl.data.task import Questions, Sequences, Task
from mansu_tl.data.text import TextSource, encode, pad, pad_id
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError

CHOICES = 4
_GENERIC_TEXTS = 192


@torch_defaults()
def pocket_task(seed: int = 0) -> Task:
    """The embedded task over the shipped world: 48 hazard facts to forget, 304 facts to keep.

    - forget_pairs: every hazard fact through its 4 trained templates; the corrupt prompt names another hazard potion.
    - retain_pairs: every near and far fact once, through one trained template each.
    - retain_text: every far fact through its trained templates, then generic text; near_text: the near facts likewise.
    - unseen: both potion relations of 64 names that belong to no potion, through all templates.
    - questions: "forget", "near", "retain" over trained templates (far facts through two of them) and each set's
      "_paraphrase" over the held-out one; "unseen": 32 further names without a potion, whose "right" answer is drawn
      at random, so that chance is 25 %.

    Args:
        seed: draws the corrupt prompts, distractors and choices; the facts stay those the checkpoints know.
    """
    world = build_world()
    tokenizer = build_tokenizer(world)
    rng = random.Random(f"mansu pocket task {seed}")
    hazard, near, far = (world.of_kind(kind) for kind in ("hazard", "near", "far"))
    forget_pairs = _pairs(tokenizer, world, rng, [(f, t) for f in hazard for t in f.trained_templates])
    retain_pairs = _pairs(tokenizer, world, rng, [(f, rng.choice(f.trained_templates)) for f in (*near, *far)])
    generic = [generic_text(rng).text for _ in range(_GENERIC_TEXTS)]
    unseen = [
        world.prompt(r.name, name, t) for t in range(TEMPLATES) for name in world.unseen for r in POTIONS.relations
    ]
    questions = {
        "forget": _questions(tokenizer, world, rng, [(f, t) for f in hazard for t in f.trained_templates]),
        "forget_paraphrase": _questions(tokenizer, world, rng, [(f, f.held_out) for f in hazard]),
        "near": _questions(tokenizer, world, rng, [(f, t) for f in near for t in f.trained_templates]),
        "near_paraphrase": _questions(tokenizer, world, rng, [(f, f.held_out) for f in near]),
        "retain": _questions(
            tokenizer, world, rng, [(f, t) for f in far for t in sorted(rng.sample(f.trained_templates, 2))]
        ),
        "retain_paraphrase": _questions(tokenizer, world, rng, [(f, f.held_out) for f in far]),
        "unseen": _questions(tokenizer, world, rng, _nobody(world, rng)),
    }
    return Task(
        name="pocket",
        forget_pairs=forget_pairs,
        retain_pairs=retain_pairs,
        retain_text=_sequences(tokenizer, text_ids(tokenizer, [*fact_sentences(world, far), *generic])),
        near_text=_sequences(tokenizer, text_ids(tokenizer, fact_sentences(world, near))),
        unseen=_sequences(tokenizer, [encode(tokenizer, prompt) for prompt in unseen]),
        questions=questions,
    )


def _nobody(world: World, rng: random.Random) -> list[tuple[Fact, int]]:
    """Facts that are not: an answer at random for each evaluation name, through two templates each."""
    drawn = []
    for name in world.unseen_evaluation:
        for relation in POTIONS.relations:
            fact = Fact("unseen", relation.name, name, rng.choice(relation.answers), held_out=-1)
            drawn += [(fact, t) for t in sorted(rng.sample(range(TEMPLATES), 2))]
    return drawn


def _pairs(
    tokenizer: PreTrainedTokenizerBase, world: World, rng: random.Random, asked: Sequence[tuple[Fact, int]]
) -> PromptPairs:
    """Pairs against another fact of the same kind and relation whose answer differs."""
    clean, corrupt, answers, distractors, facts, labels = [], [], [], [], [], []
    for fact, template in asked:
        other = rng.choice(
            [f for f in world.of_kind(fact.kind) if f.relation == fact.relation and f.answer != fact.answer]
        )
        clean.append(world.prompt(fact.relation, fact.entity, template))
        corrupt.append(world.prompt(fact.relation, other.entity, template))
        answers.append(fact.answer)
        distractors.append([other.answer, *_wrong(world, rng, fact, CHOICES - 2, other.answer)])
        facts.append(f"{fact.entity} / {fact.relation}")
        labels.append(f"{facts[-1]} / t{template}")
    return PromptPairs.from_text(tokenizer, clean, corrupt, answers, distractors, labels=labels, facts=facts)


def _questions(
    tokenizer: PreTrainedTokenizerFast, world: World, rng: random.Random, asked: Sequence[tuple[Fact, int]]
) -> Questions:
    options = [[fact.answer, *_wrong(world, rng, fact, CHOICES - 1)] for fact, _ in asked]
    texts = [world.prompt(fact.relation, fact.entity, template) for fact, template in asked]
    prompts, lengths = pad([encode(tokenizer, text) for text in texts], pad_id(tokenizer))
    # A word is one token, the same behind every prompt.
    first = {word: text for text, row in zip(texts, options, strict=True) for word in row}
    ids = {word: continuation(tokenizer, text, word, "option", most_tokens=1)[1][0] for word, text in first.items()}
    choices = torch.tensor([[ids[word] for word in row] for row in options])
    return Questions(prompts, lengths, choices, tuple(fact.id for fact, _ in asked))


def _wrong(world: World, rng: random.Random, fact: Fact, count: int, other: str = "") -> list[str]:
    return rng.sample([a for a in world.relation(fact.relation).answers if a not in (fact.answer, other)], count)


def _sequences(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> Sequences:
    return Sequences(*pad(rows, pad_id(tokenizer)))


def _read(_: object, model: TextSource | None, *, seed: int = 0) -> Task:
    """The embedded task, refused for a model with another vocabulary: its tokens are numbers already."""
    tokenizer = getattr(model, "tokenizer", model)
    if tokenizer is not None and tokenizer.get_vocab() != build_tokenizer(build_world()).get_vocab():
        raise MansuError(
            "task 'pocket': it is written in the words of the embedded models, and this model has others; give a task file "
            "(mansu-tl new DIR writes one to change)"
        )
    return pocket_task(seed)


register_source("pocket", "the embedded task of invented facts, for the embedded models", _read, bare=True)
