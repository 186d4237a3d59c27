"""Making counterfactuals: corrupt prompts for prompts that come without one, and what can stand in for them.

A way that makes a prompt is a function registered by name. It is given all prompts of a set and makes each one's
counterfactual, of equal token length:

- `swap`: the prompt of another subject in the same words, whose answer is another one;
- `unseen`: an invented subject, which has no answer.

`noise`, `zero` and `mean` make no prompt: see `EmbeddingCorruption`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, product

from mansu_tl.errors import MansuError, unknown
from mansu_tl.registry import Registry

_STARTS = [
    "Bel",
    "Dor",
    "Fen",
    "Gal",
    "Hol",
    "Jor",
    "Kel",
    "Lor",
    "Mer",
    "Nor",
    "Pel",
    "Quin",
    "Ros",
    "Sel",
    "Tor",
    "Vel",
]
_ENDS = [
    "adin",
    "avik",
    "ebra",
    "ellon",
    "enka",
    "ibur",
    "igan",
    "imond",
    "orin",
    "oska",
    "ovar",
    "umel",
    "unda",
    "yth",
]
INVENTED_WORDS = (*_STARTS, *(start + end for start, end in product(_STARTS, _ENDS)))


# What is done to a subject's token embeddings instead of naming another subject.
EMBEDDED = ("noise", "zero", "mean")
# Of how many words invented names are made where one or two have too few tokens, and how many of each are tried.
_LONGER, _TRIES = range(3, 9), 500


@dataclass(frozen=True)
class EmbeddingCorruption:
    """A corrupt run without a corrupt prompt: the clean tokens, with other embeddings where they name the subject.

    Learned positional embeddings (gpt2) stay.

    Attributes:
        kind: "noise" adds Gaussian noise whose standard deviation is three times that of the embeddings of `tokens`, as in
            ROME's causal tracing (Meng et al. 2022, arXiv 2202.05262); "zero" and "mean" put zero, or the mean embedding of
            `tokens`, in the embeddings' place.
        tokens: of all subjects of the set that the pairs were made in, so that a part of it is corrupted as the whole.
        seed: of the noise; the noise of a pair depends on its tokens and on nothing else.
    """

    kind: str
    tokens: tuple[int, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in EMBEDDED:
            raise MansuError(f"corruption: kind={self.kind!r}; choose one of {', '.join(EMBEDDED)}")
        if not self.tokens:
            raise MansuError("corruption: no token of a subject given; pass those of all the set's subjects")


@dataclass(frozen=True)
class Subject:
    """A prompt that asks about something.

    Attributes:
        name: what errors call it.
        prompt: the text, which names the subject once.
        subject: the piece of it that does.
        answer: what is right for it.
    """

    name: str
    prompt: str
    subject: str
    answer: str

    @property
    def wording(self) -> tuple[str, str]:
        """The prompt before and behind its subject."""
        before, _, behind = self.prompt.partition(self.subject)
        return before, behind


@dataclass(frozen=True)
class Counterfactual:
    """A corrupt prompt, and what is right for it; "" where nothing is."""

    prompt: str
    answer: str = ""


Make = Callable[[Sequence[Subject], Callable[[str], int], random.Random], list[Counterfactual]]


def swap(subjects: Sequence[Subject], tokens: Callable[[str], int], rng: random.Random) -> list[Counterfactual]:
    """Every prompt about another of the subjects: same words, same number of tokens, another answer; drawn at random.

    Raises:
        MansuError: there is none for a prompt.
    """
    alike: dict[tuple[tuple[str, str], int], list[Subject]] = {}
    for one in subjects:
        alike.setdefault((one.wording, tokens(one.prompt)), []).append(one)
    made = []
    for one in subjects:
        others = [other for other in alike[one.wording, tokens(one.prompt)] if other.answer != one.answer]
        if not others:
            raise MansuError(
                f"{one.name}: no prompt in these words names another subject of as many tokens as {one.subject!r} with "
                'another answer; write "corrupt" yourself'
            )
        other = rng.choice(others)
        made.append(Counterfactual(other.prompt, other.answer))
    return made


def unseen(subjects: Sequence[Subject], tokens: Callable[[str], int], rng: random.Random) -> list[Counterfactual]:
    """Every prompt about an invented name, drawn until one has as many tokens: of one word, of two, then of more.

    Raises:
        MansuError: none of some thousand names has.
    """
    made = []
    for one in subjects:
        wanted, (before, behind) = tokens(one.prompt), one.wording
        firsts = rng.sample(INVENTED_WORDS, len(INVENTED_WORDS))
        names = [*firsts, *(f"{first} {rng.choice(INVENTED_WORDS)}" for first in firsts for _ in range(8))]
        longer = (" ".join(rng.choices(INVENTED_WORDS, k=words)) for words in _LONGER for _ in range(_TRIES))
        prompts = (f"{before}{name}{behind}" for name in chain(names, longer))
        found = next((prompt for prompt in prompts if tokens(prompt) == wanted), None)
        if found is None:
            raise MansuError(
                f'{one.name}: no invented name has as many tokens as {one.subject!r}; write "corrupt" yourself'
            )
        made.append(Counterfactual(found))
    return made


_WAYS = Registry[Make]("corruption", {"swap": swap, "unseen": unseen})


def register_corruption(name: str, make: Make) -> None:
    """Make a way known to task files (`corruption=`).

    Args:
        make: from all prompts of a set, the number of tokens of a text and a generator, a counterfactual for each.

    Raises:
        MansuError: the name is taken.
    """
    if name in EMBEDDED:
        raise MansuError(f"corruption {name!r}: registered already; choose another name")
    _WAYS.add(name, make)


def corruptions() -> tuple[str, ...]:
    """The names of all ways to corrupt."""
    return (*_WAYS, *EMBEDDED)


def require_corruption(kind: str) -> None:
    """Refuse a way to corrupt that is not known.

    Raises:
        MansuError: no such way.
    """
    if kind not in corruptions():
        raise unknown("corruption", kind, corruptions())


def measured_against(distractors: Sequence[str], counterfactual: Counterfactual) -> list[str]:
    """The distractors of a prompt that was given a counterfactual: its answer first, and as many as before."""
    others = [text for text in distractors if text != counterfactual.answer]
    return [counterfactual.answer, *others][: len(distractors)] if counterfactual.answer else others


def counterfactuals(
    subjects: Sequence[Subject], tokens: Callable[[str], int], kind: str = "swap", seed: int = 0
) -> list[Counterfactual]:
    """A counterfactual for every prompt of a set; the same seed gives the same ones.

    Args:
        tokens: the number of tokens of a text.
        kind: the name of a way that makes a prompt.

    Raises:
        MansuError: no such way, a subject that is not in its prompt once, or a prompt for which there is none.
    """
    make = _WAYS[kind]
    for one in subjects:
        if one.prompt.count(one.subject) != 1:
            raise MansuError(
                f"{one.name}: subject {one.subject!r} occurs {one.prompt.count(one.subject)} times in {one.prompt!r}; it "
                "must occur once"
            )
    return make(subjects, tokens, random.Random(f"mansu corruption {seed}"))
