"""TOFU as a forget/retain task: one-token questions inside its answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike

import torch
from transformers import PreTrainedTokenizerBase

from mansu_tl.data.corruption import INVENTED_WORDS
from mansu_tl.data.pairs import PromptPairs
from mansu_tl.data.sources.registry import register_source
from mansu_tl.data.sources.tofu.files import Item, answer_ids, prompt, read_tofu, text_of
from mansu_tl.data.sources.tofu.words import Book, Place, renamed
from mansu_tl.data.task import Questions, Sequences, Task
from mansu_tl.data.text import TextSource, pad, pad_id, text_source
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.results.files import local

CHOICES = 4
_ALTERNATIVES = 12
_NAME_DRAWS = 12


@dataclass(frozen=True)
class _Asked:
    """A place as a pair: tokens of the prompt, of its corrupt and never-seen forms, answer and options."""

    place: Place
    clean: list[int]
    corrupt: list[int]
    unseen: list[list[int]]
    options: list[int]


@torch_defaults()
def tofu_task(
    folder: str | PathLike[str],
    tokenizer: TextSource,
    *,
    per_answer: int = 2,
    near: int = 400,
    unseen_names: int = 3,
    longest: int = 80,
    seed: int = 0,
) -> Task:
    """TOFU's forget10 / retain90 as MANSU needs it; how it is chosen is our definition.

    - A place is an informative word of an answer: rare among the authors, neither in the question nor in the name. The
      prompt is the question and the answer up to that word; the answer is the word's first token.
    - Options are such words of other authors' answers that follow the same word, the likest question first.
    - The corrupt prompt is the same wording with another author's name of equal token length, where it can be that of
      the first option's author, whose word is then distractor 0.
    - forget_pairs: the `per_answer` rarest places of every forget answer whose prompt says the author's name.
    - near_text: the retain questions whose words are most like a forget question's; retain_text: all others.
    - unseen: every forget prompt with invented names in place of the author's. The wording stays, and gives many answers
      away by itself, so that MANSU needs a large `margin` here.
    - questions: "forget" = the forget pairs; "forget_paraphrase" = the same through the paraphrased question, the
      answer's own wording following it; "near" and "retain" = one place of every near text and of every other question
      of retain_perturbed; "retain_paraphrase" likewise through the paraphrased question.

    Args:
        folder: TOFU's files.
        tokenizer: the model's, or the hooked model itself.
        near: how many retain questions count as near.
        unseen_names: invented names a forget prompt, two at least: what never-seen prompts say needs a spread.
        longest: tokens of a prompt at most; later places of an answer are passed over.
        seed: draws corrupt authors where the first option's does not fit, and invented names.

    Raises:
        MansuError: files that are missing, a count that is too small, or a tokenizer for which no pair can be made.
    """
    counts = {"per_answer": per_answer, "near": near, "longest": longest, "unseen_names": unseen_names}
    for key, value in counts.items():
        least = 2 if key == "unseen_names" else 1
        if value < least:
            raise MansuError(f"TOFU task: {key}={value}; choose {least} or more")
    tofu = read_tofu(folder)
    if near >= len(tofu.retain):
        raise MansuError(f"TOFU task: near={near} of {len(tofu.retain)} retain questions leaves none; lower it")
    maker = _Maker(text_source(tokenizer)[0], Book((*tofu.forget, *tofu.retain)), unseen_names, longest, seed)
    forget = range(len(tofu.forget))
    kept = range(len(tofu.forget), len(maker.book.items))
    alike = {i: max((value for j, value in maker.book.likeness(i).items() if j in forget), default=0.0) for i in kept}
    nearest = sorted(kept, key=lambda i: (-alike[i], i))[:near]
    far = sorted(set(kept) - set(nearest))
    paraphrased = {
        item.question: item.paraphrased_question for item in (*tofu.forget_perturbed, *tofu.retain_perturbed)
    }
    asked_of = {item.question for item in tofu.retain_perturbed}
    far_asked = [i for i in far if maker.book.items[i].question in asked_of]
    places = [place for i in forget for place in maker.places(i, per_answer)]
    near_places, far_places = ([place for i in rows for place in maker.places(i, 1)] for rows in (nearest, far_asked))
    forget_asked = maker.pairs(places)
    forget_pairs = maker.prompt_pairs(forget_asked)
    questions = {
        "forget": Questions.of_pairs(forget_pairs),
        "forget_paraphrase": maker.questions([asked.place for asked in forget_asked], paraphrased),
        "near": maker.questions(near_places),
        "retain": maker.questions(far_places),
        "retain_paraphrase": maker.questions(far_places, paraphrased),
    }
    return Task(
        name="tofu",
        forget_pairs=forget_pairs,
        retain_pairs=maker.prompt_pairs(maker.pairs([*near_places, *far_places])),
        retain_text=maker.texts(far),
        near_text=maker.texts(nearest),
        unseen=maker.sequences([row for asked in forget_asked for row in asked.unseen]),
        questions={name: asked for name, asked in questions.items() if asked is not None},
    )


@dataclass(frozen=True)
class _Token:
    """A word's first token in its own answer, whether that is more than one character, and the prompt's length."""

    id: int
    telling: bool
    at: int


class _Maker:
    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, book: Book, unseen_names: int, longest: int, seed: int
    ) -> None:
        self.tokenizer, self.book, self.unseen_names, self.longest = tokenizer, book, unseen_names, longest
        self.rng = random.Random(f"mansu tofu task {seed}")
        self._tokens: dict[Place, _Token] = {}
        self._sizes: dict[str, int] = {}

    def pairs(self, places: Sequence[Place]) -> list[_Asked]:
        """Every place whose prompt says the author's name and has a counterfactual of equal length."""
        found = [asked for place in places if (asked := self._pair(place)) is not None]
        if not found:
            raise MansuError(
                "TOFU task: no counterfactual of equal token length for any question; use another tokenizer"
            )
        return found

    def _pair(self, place: Place) -> _Asked | None:
        item, name = self.book.items[place.item], self.book.names[self.book.author(place.item)]
        prefix = item.answer[: place.start - 1]
        clean, answer = self._ids(item.question, prefix, place.word)
        if not name or renamed(item.question + prefix, name, "X Y") == item.question + prefix:
            return None
        options = self._options(place, answer)
        others = [
            a for a, other in enumerate(self.book.names) if self._size(other) == self._size(name) and other != name
        ]
        self.rng.shuffle(others)
        preferred = [a for _, a in options if a in others]
        for author in (*preferred, *others):
            corrupt = self._renamed(item, prefix, place.word, name, self.book.names[author])
            if len(corrupt) == len(clean) and corrupt != clean:
                break
        else:
            return None
        # The corrupt author's own word first; the order of the others is by likeness.
        first = [token for token, a in options if a == author][:1]
        chosen = list(dict.fromkeys([*first, *(token for token, _ in options)]))[: CHOICES - 1]
        unseen = self._unseen(item, prefix, place.word, name, len(clean))
        return _Asked(place, clean, corrupt, unseen, [answer, *chosen])

    def places(self, item: int, count: int) -> list[Place]:
        """The rarest places of an answer whose first token says something and whose prompt is not too long."""
        places = self.book.places[item]
        return [p for p in places if self._token(p).telling and self._token(p).at <= self.longest][:count]

    def _token(self, place: Place) -> _Token:
        if place not in self._tokens:
            item = self.book.items[place.item]
            before, token = self._ids(item.question, item.answer[: place.start - 1], place.word)
            telling = len(text_of(self.tokenizer, [token]).strip()) > 1
            self._tokens[place] = _Token(token, telling, len(before))
        return self._tokens[place]

    def _options(self, place: Place, answer: int) -> list[tuple[int, int]]:
        """Distinct first tokens of words that could stand at a place, with their authors."""
        found: dict[int, int] = {}
        for other in self.book.alternatives(place):
            token = self._token(other)
            if token.telling and token.id != answer:
                found.setdefault(token.id, self.book.author(other.item))
            if len(found) == _ALTERNATIVES:
                break
        if len(found) < CHOICES - 1:
            raise MansuError(f"TOFU task: {len(found)} options for {place.word!r}; use a larger part of the files")
        return list(found.items())

    def _unseen(self, item: Item, prefix: str, word: str, name: str, length: int) -> list[list[int]]:
        """The prompt about invented authors: all of one length, the clean prompt's where enough names give that.

        Of one length, because what is closest in wording to a forget prompt stands for not knowing it: a single prompt
        would have no spread.
        """
        size = min(self._invented, key=lambda found: (abs(found - self._size(name)), found))
        names = self._invented[size]
        by_length: dict[int, list[list[int]]] = {}
        for invented in self.rng.sample(names, min(_NAME_DRAWS, len(names))):
            row = self._renamed(item, prefix, word, name, invented)
            by_length.setdefault(len(row), []).append(row)
        fitting = by_length.get(length, [])
        rows = fitting if len(fitting) >= self.unseen_names else max(by_length.values(), key=len)
        return rows[: self.unseen_names]

    @cached_property
    def _invented(self) -> dict[int, list[str]]:
        """Invented names by their number of tokens, of the sizes that at least `_NAME_DRAWS` have."""
        found: dict[int, list[str]] = {}
        for first in INVENTED_WORDS:
            for second in self.rng.sample(INVENTED_WORDS, 4):
                found.setdefault(self._size(f"{first} {second}"), []).append(f"{first} {second}")
        return {size: names for size, names in found.items() if len(names) >= _NAME_DRAWS}

    def _size(self, name: str) -> int:
        """Tokens of a name inside a sentence; 0 for no name."""
        if name not in self._sizes:
            self._sizes[name] = len(self.tokenizer.encode(f" {name}", add_special_tokens=False)) if name else 0
        return self._sizes[name]

    def _renamed(self, item: Item, prefix: str, word: str, old: str, new: str) -> list[int]:
        return self._ids(renamed(item.question, old, new), renamed(prefix, old, new), word)[0]

    def _ids(self, question: str, prefix: str, word: str) -> tuple[list[int], int]:
        """The prompt's tokens up to the word, and the word's first token."""
        before, after = answer_ids(self.tokenizer, f"{prompt(question)} {prefix}", word, end=False)
        return before, after[0]

    def questions(self, places: Sequence[Place], wording: dict[str, str] | None = None) -> Questions | None:
        """Questions about places, through another wording of the question where one is given."""
        rows, options, facts = [], [], []
        for place in places:
            item = self.book.items[place.item]
            question = item.question if wording is None else wording.get(item.question, "")
            if question:
                row, answer = self._ids(question, item.answer[: place.start - 1], place.word)
                rows.append(row)
                options.append([answer, *(token for token, _ in self._options(place, answer)[: CHOICES - 1])])
                facts.append(self._fact(place))
        if not rows:
            return None
        return Questions(*pad(rows, pad_id(self.tokenizer)), torch.tensor(options), tuple(facts))

    def prompt_pairs(self, asked: Sequence[_Asked]) -> PromptPairs:
        """The pairs as `PromptPairs`; a question is a fact, whatever place of its answer is asked for."""
        clean, lengths = pad([row.clean for row in asked], pad_id(self.tokenizer))
        corrupt, _ = pad([row.corrupt for row in asked], pad_id(self.tokenizer))
        options = torch.tensor([row.options for row in asked])[..., None]
        facts = tuple(self._fact(row.place) for row in asked)
        labels = tuple(f"{fact} / {row.place.word}" for fact, row in zip(facts, asked, strict=True))
        return PromptPairs(clean, corrupt, options, lengths, facts, labels)

    def texts(self, items: Sequence[int]) -> Sequences:
        """Questions and answers as in training."""
        chosen = [self.book.items[i] for i in items]
        split = [answer_ids(self.tokenizer, prompt(item.question), item.answer) for item in chosen]
        return self.sequences([[*before, *after] for before, after in split])

    def sequences(self, rows: Sequence[list[int]]) -> Sequences:
        """Token lists as `Sequences`."""
        return Sequences(*pad(rows, pad_id(self.tokenizer)))

    def _fact(self, place: Place) -> str:
        author = self.book.author(place.item)
        return f"{self.book.names[author] or f'author {author}'}, question {place.item}"


def _is_folder(source: object) -> bool:
    try:
        return isinstance(source, str | PathLike) and (local(source) / "forget10.json").is_file()
    except (OSError, ValueError):
        return False  # no name that a folder could have


register_source("tofu", "a folder with TOFU's files, as tofu:FOLDER", tofu_task, claims=_is_folder)
