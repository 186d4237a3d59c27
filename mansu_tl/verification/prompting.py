"""What prompts share that are found on some facts and judged on others: folds of facts, room in the questions, the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from mansu_tl.data import Questions
from mansu_tl.data.forced import Places
from mansu_tl.errors import MansuError
from mansu_tl.models import home
from mansu_tl.models.limits import vocabulary_size
from mansu_tl.results.intervals import with_interval
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.metrics import accuracy
from mansu_tl.runs.values import last_token_logits
from mansu_tl.verification.attacks import answered

# Numbers of one pass's logits, and rows of a pass that is made many times (small ones stay in the cache).
_MOST_NUMBERS, _ROWS = 2**26, 128


class HeldOut(Result):
    """What was answered behind prompts that were found on other facts; the fields are a subclass's."""

    label: str
    multiple_choice: Bool[Tensor, " question"]
    cloze: Bool[Tensor, " question"]
    log_odds: Float[Tensor, " question"]
    facts: tuple[str, ...]
    chance: float

    def to_dataframe(self) -> pd.DataFrame:
        """One row a measure: value on held-out facts in percent (log-odds in nats), with its 95 % interval over facts."""
        scales = {"multiple_choice": 100.0, "cloze": 100.0, "log_odds": 1.0}
        return pd.DataFrame(
            [
                {"label": self.label, "measure": name}
                | with_interval("value", getattr(self, name), self.facts, scale=scale)
                for name, scale in scales.items()
            ]
        )

    def _in_words(self) -> str:
        return (
            f"held-out facts MC {100 * self.multiple_choice.double().mean():.1f} %, cloze "
            f"{100 * self.cloze.double().mean():.1f} %, chance {100 * self.chance:.0f} %"
        )

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "held-out facts", "{:.2f}".format),)


def fold_of(questions: Questions, folds: int, generator: torch.Generator, attack: str) -> Int[Tensor, " question"]:
    """The fold of each question, drawn fact by fact.

    Args:
        attack: whose folds they are, for the error.

    Raises:
        MansuError: folds outside 2..facts.
    """
    names = tuple(dict.fromkeys(questions.facts))
    if not 2 <= folds <= len(names):
        raise MansuError(f"{attack}: folds={folds} of {len(names)} facts; choose 2..{len(names)}")
    order = (torch.randperm(len(names), generator=generator) % folds).tolist()
    of_fact = dict(zip(names, order, strict=True))
    return torch.tensor([of_fact[fact] for fact in questions.facts])


def in_front(questions: Questions) -> Int[Tensor, " question"]:
    """Where a prompt in front goes: behind a first token that all questions share (BOS), else before the first."""
    shared = bool((questions.prompts[:, 0] == questions.prompts[0, 0]).all())
    return torch.full_like(questions.lengths, int(shared))


def inserted(questions: Questions, tokens: Int[Tensor, " token"], at: Int[Tensor, " question"]) -> Questions:
    """The questions with some tokens put in at a position of each prompt, its length at the most."""
    old, count = questions.prompts, len(tokens)
    places = torch.arange(old.shape[1] + count, device=old.device).expand(len(old), -1)
    behind = places - at[:, None]
    kept = old.gather(1, torch.where(behind < count, places, places - count).clamp(max=old.shape[1] - 1))
    inside = (behind >= 0) & (behind < count)
    prompts = torch.where(inside, tokens.to(old)[behind.clamp(0, count - 1)], kept)
    return replace(questions, prompts=prompts, lengths=questions.lengths + count)


@dataclass(frozen=True)
class Told:
    """Questions with their right answers attached, as they are run for the answers' likelihood.

    Attributes:
        tokens: prompt and answer, right-padded.
        places: the positions that predict the answers' tokens.
        targets: these tokens.
    """

    tokens: Int[Tensor, "row pos"]
    places: Places
    targets: Int[Tensor, " place"]

    @classmethod
    def of(cls, questions: Questions, device: torch.device) -> Told:
        """Questions as they are, on a device."""
        text = answered(questions).trimmed().to(device)
        lengths = questions.lengths.to(device)
        at = torch.arange(text.tokens.shape[1], device=device)
        rows, positions = ((at >= lengths[:, None]) & text.real).nonzero(as_tuple=True)
        return cls(text.tokens, Places(rows, positions - 1), text.tokens[rows, positions])

    def losses(
        self, hf: PreTrainedModel, suffixes: Int[Tensor, "suffix token"], at: Int[Tensor, " row"]
    ) -> Float[Tensor, " suffix"]:
        """Mean cross-entropy of the answers' tokens, in nats, with each of some suffixes written over the rows.

        Args:
            at: the position of a suffix's first token in each row.
        """
        wide = at[:, None] + torch.arange(suffixes.shape[1], device=at.device)
        numbers = len(self.targets) * (vocabulary_size(hf) or 1)
        at_once = max(1, min(_ROWS // len(self.tokens), _MOST_NUMBERS // numbers))
        found = []
        for some in suffixes.split(at_once):
            tokens = self.tokens.repeat(len(some), 1)
            tokens = tokens.scatter(1, wide.repeat(len(some), 1), some.repeat_interleave(len(self.tokens), 0))
            logits = last_token_logits(hf, {}, tokens, self.places.repeated(len(some), len(self.tokens)))
            nats = torch.nn.functional.cross_entropy(logits, self.targets.repeat(len(some)), reduction="none")
            found.append(nats.view(len(some), -1).mean(1))
        return torch.cat(found)

    def loss(self, hf: PreTrainedModel) -> Float[Tensor, ""]:
        """Mean cross-entropy of the answers' tokens, in nats."""
        logits = last_token_logits(hf, {}, self.tokens, self.places)
        return torch.nn.functional.cross_entropy(logits, self.targets)


# By fold: a context in which the questions that it gives stand behind the fold's prompt.
Put = Callable[[int], AbstractContextManager[Questions]]


def asked_in_folds(hf: PreTrainedModel, fold: Int[Tensor, " question"], put: Put) -> dict[str, Tensor]:
    """Every question's answers behind the prompt of its fold, by measure."""
    found = {name: torch.zeros(len(fold), dtype=torch.bool) for name in ("multiple_choice", "cloze")}
    found["log_odds"] = torch.zeros(len(fold))
    for each in range(int(fold.max()) + 1):
        rows = (fold == each).nonzero()[:, 0]
        with put(each) as questions:
            answers = accuracy(hf, questions[rows])
        for name, values in found.items():
            values[rows] = getattr(answers, name)
    return found


@torch.no_grad()
def trained_losses(hf: PreTrainedModel, fold: Int[Tensor, " question"], put: Put) -> Float[Tensor, " fold"]:
    """The loss of the answers that each fold's prompt was trained on, in nats per token."""
    losses = []
    for each in range(int(fold.max()) + 1):
        with put(each) as questions:
            losses.append(Told.of(questions[(fold != each).nonzero()[:, 0]], home(hf)).loss(hf).cpu())
    return torch.stack(losses)


@contextmanager
def as_it_is(questions: Questions) -> Iterator[Questions]:
    """Questions that hold their prompt themselves."""
    yield questions


def embedding_of(hf: PreTrainedModel) -> torch.nn.Embedding:
    """The module that embeds tokens."""
    found = hf.get_input_embeddings()
    assert isinstance(found, torch.nn.Embedding)
    return found
