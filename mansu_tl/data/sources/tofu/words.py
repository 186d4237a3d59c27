"""What a TOFU answer tells: whose it is, which of its words are informative, and what else could stand there.

Everything here is our definition; TOFU itself has no one-token questions.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from mansu_tl.data.sources.tofu.files import PER_AUTHOR, Item

_CAPITALISED = re.compile(r"[A-ZÀ-Þ][\w'’.-]*(?: [A-ZÀ-Þ][\w'’.-]*)+")
_WORD = re.compile(r"\w[\w'’-]*")
_LEAST_MENTIONS = 8
_STOP_WORDS = """
    about after again also although among an and another are around as at author authors award awarded awards away
    based became because been before being best book books both but by can career character characters could deeply
    did does during each early either especially even fiction fictional first for from further genre had has have
    having her hers him his how however if in influenced influence influences instead into is it its known later
    like literary literature made main major many more most much name named not novel novels of often on one only
    or other others out over own particularly primarily profession published readers received series several she
    significant significantly since so some specific story such than that the their theme themes them then there
    these they this those through throughout title titled to unique up used was well were what when where which
    while who whom whose why widely will with within without work works would write writer writers writes writing
    written wrote years yes you your
"""
_STOP = frozenset(_STOP_WORDS.split())


@dataclass(frozen=True)
class Place:
    """An informative word of an answer.

    Attributes:
        item: number of the question in the book.
        start: where the word starts in the answer.
        word: the word.
        before: the word in front of it, in lower case.
    """

    item: int
    start: int
    word: str
    before: str


class Book:
    """All questions of a TOFU folder in the files' order, `PER_AUTHOR` to an author.

    Args:
        items: the questions; author `i` has those from `i * PER_AUTHOR` on.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = tuple(items)
        self._likeness: dict[int, dict[int, float]] = {}

    def author(self, item: int) -> int:
        """The author whom question number `item` is about."""
        return item // PER_AUTHOR

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every author's name, the capitalised phrase that the questions and answers repeat most; "" where none does."""
        return tuple(_name(self.items[i : i + PER_AUTHOR]) for i in range(0, len(self.items), PER_AUTHOR))

    @cached_property
    def topics(self) -> tuple[frozenset[str], ...]:
        """The content words of every question, the author's name left out."""
        return tuple(
            frozenset(_words(item.question)) - _STOP - set(_words(self.names[self.author(i)]))
            for i, item in enumerate(self.items)
        )

    @cached_property
    def places(self) -> tuple[tuple[Place, ...], ...]:
        """The informative words of every answer, the rarest first.

        A word is informative if it is neither in the question nor in the author's name, no stop word, starts with a
        capital or a digit inside the sentence or has at least five letters, stands after a space, and fewer than a
        tenth of the authors have it in their answers.
        """
        spread = self._spread()
        limit = max(1, len(self.names) // 10)
        places = []
        for i, item in enumerate(self.items):
            in_question = set(_words(item.question)) | set(_words(self.names[self.author(i)])) | _STOP
            here: dict[str, Place] = {}
            for last, match in pairwise(_WORD.finditer(item.answer)):
                word = match.group()
                low = _plain(word)
                telling = word[0].isupper() or word[0].isdigit() or len(word) >= 5
                fresh = low not in in_question and not set(low.split("-")) & in_question and low not in here
                if telling and fresh and item.answer[match.start() - 1] == " " and spread[low] <= limit:
                    here[low] = Place(i, match.start(), word, last.group().casefold())
            places.append(tuple(sorted(here.values(), key=lambda p: (spread[_plain(p.word)], p.start))))
        return tuple(places)

    def likeness(self, item: int) -> dict[int, float]:
        """How alike other questions are to one: shared content words over all of them; those that share none are left out."""
        if item not in self._likeness:
            shared = Counter(other for word in self.topics[item] for other in self._saying[word])
            size = len(self.topics[item])
            self._likeness[item] = {
                other: both / (size + len(self.topics[other]) - both) for other, both in shared.items()
            }
        return self._likeness[item]

    def alternatives(self, place: Place) -> Iterator[Place]:
        """Words of other authors' answers that could stand at a place, the likest question first.

        Those that follow the same word come before the rarest word of every other answer.
        """
        author, alike = self.author(place.item), self.likeness(place.item)
        for pool in (self._after[place.before], [row[0] for row in self.places if row]):
            ranked = sorted(pool, key=lambda p: (-alike.get(p.item, 0.0), p.item, p.start))
            yield from (p for p in ranked if self.author(p.item) != author)

    @cached_property
    def _saying(self) -> dict[str, list[int]]:
        saying: dict[str, list[int]] = defaultdict(list)
        for i, topic in enumerate(self.topics):
            for word in topic:
                saying[word].append(i)
        return saying

    @cached_property
    def _after(self) -> dict[str, list[Place]]:
        after: dict[str, list[Place]] = defaultdict(list)
        for row in self.places:
            for place in row:
                after[place.before].append(place)
        return after

    def _spread(self) -> Counter[str]:
        """In how many authors' answers each word occurs."""
        spread: Counter[str] = Counter()
        for start in range(0, len(self.items), PER_AUTHOR):
            spread.update({word for item in self.items[start : start + PER_AUTHOR] for word in _words(item.answer)})
        return spread


def renamed(text: str, old: str, new: str) -> str:
    """The text about another author: the whole name replaced, then single parts of it by the new name's at that end."""
    text = text.replace(old, new)
    old_parts, new_parts = old.split(), new.split()
    for part, other in ((old_parts[0], new_parts[0]), (old_parts[-1], new_parts[-1])):
        if part not in new_parts:
            text = re.sub(rf"(?<![\w-]){re.escape(part)}(?![\w-])", other.replace("\\", r"\\"), text)
    return text


def _name(items: Sequence[Item]) -> str:
    seen: Counter[str] = Counter()
    for item in items:
        for text in (item.question, item.answer):
            seen.update(re.sub(r"['’]s?$", "", found.rstrip(".")) for found in _CAPITALISED.findall(text))
    name, mentions = max(seen.items(), key=lambda pair: pair[1], default=("", 0))
    return name if mentions >= min(_LEAST_MENTIONS, len(items)) else ""


def _words(text: str) -> list[str]:
    return [_plain(word) for word in _WORD.findall(text)]


def _plain(word: str) -> str:
    return re.sub(r"['’]s?$", "", word.casefold())
