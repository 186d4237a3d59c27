"""An unlearning task: what to forget, what to keep, and the questions that neither stage may train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from mansu_tl.data.pairs import PromptPairs
from mansu_tl.defaults import moved
from mansu_tl.errors import MansuError
from mansu_tl.notebook import Result, Table


@dataclass(frozen=True)
class Sequences(Result):
    """Right-padded token sequences.

    Attributes:
        tokens: token ids.
        lengths: real tokens of each sequence.
    """

    tokens: Int[Tensor, "row pos"]
    lengths: Int[Tensor, " row"]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: slice | list[int] | Tensor) -> Sequences:
        """The chosen rows, as `Sequences`."""
        picked = torch.arange(len(self), device="cpu")[index.cpu() if isinstance(index, Tensor) else index]
        return Sequences(self.tokens[picked], self.lengths[picked])

    def to(self, device: str | torch.device) -> Sequences:
        """The same sequences on `device`."""
        return Sequences(moved(self.tokens, device), moved(self.lengths, device))

    def __repr__(self) -> str:
        return f"Sequences({len(self)} sequences of up to {self.tokens.shape[1]} tokens)"


@dataclass(frozen=True)
class Questions(Result):
    """Multiple-choice questions with one-token options.

    Attributes:
        prompts: right-padded prompts.
        lengths: real tokens of each prompt.
        choices: the options; column 0 is the right answer. Accuracy is read from logits, so order tells nothing.
        facts: the fact each question asks for, so that intervals can be taken over facts rather than templates.
    """

    prompts: Int[Tensor, "question pos"]
    lengths: Int[Tensor, " question"]
    choices: Int[Tensor, "question option"]
    facts: tuple[str, ...]

    def __len__(self) -> int:
        return self.prompts.shape[0]

    def __getitem__(self, index: slice | list[int] | Tensor) -> Questions:
        """The chosen questions, as `Questions`."""
        picked = torch.arange(len(self), device="cpu")[index.cpu() if isinstance(index, Tensor) else index]
        facts = tuple(self.facts[i] for i in picked.tolist())
        return Questions(self.prompts[picked], self.lengths[picked], self.choices[picked], facts)

    @property
    def chance(self) -> float:
        """Multiple choice by guessing, in percent: the mean over questions of 100 / options."""
        return 100 / self.choices.shape[1]

    def to(self, device: str | torch.device) -> Questions:
        """The same questions on `device`."""
        prompts, lengths, choices = (moved(part, device) for part in (self.prompts, self.lengths, self.choices))
        return Questions(prompts, lengths, choices, self.facts)

    def __repr__(self) -> str:
        return f"Questions({len(self)} with {self.choices.shape[1]} options, {len(set(self.facts))} facts)"


@dataclass(frozen=True)
class Task(Result):
    """A forget/retain task.

    Attributes:
        name: short name, used in file names and titles.
        forget_pairs: the knowledge to remove, as pairs over the templates that training may see.
        retain_pairs: knowledge to keep, as pairs.
        retain_text: sequences whose likelihood must be kept (general and far facts).
        near_text: sequences of neighbouring facts, the first to suffer; may be empty.
        unseen: prompts in the forget set's form about things the model never met: what "not knowing" looks like.
            May be empty, then the corrupt prompts stand in.
        questions: evaluation sets by name: "forget", "forget_paraphrase", "near", "near_paraphrase", "retain",
            "retain_paraphrase"; the paraphrase sets use held-out templates. "forget" and "retain" must be there.
    """

    name: str
    forget_pairs: PromptPairs
    retain_pairs: PromptPairs
    retain_text: Sequences
    near_text: Sequences
    unseen: Sequences
    questions: Mapping[str, Questions]

    def __post_init__(self) -> None:
        for key in ("forget", "retain"):
            if key not in self.questions or len(self.questions[key]) == 0:
                raise MansuError(f"task {self.name!r}: the {key} set is empty; give it at least one question")
        if len(self.retain_text) == 0:
            raise MansuError(f"task {self.name!r}: retain_text is empty; give text whose likelihood is to be kept")
        both = _overlap(self.questions["forget"], self.questions["retain"])
        if both:
            raise MansuError(
                f"task {self.name!r}: forget and retain share {len(both)} facts, e.g. {both[0]!r}; remove it from one"
            )

    def to(self, device: str | torch.device) -> Task:
        """The same task with its tensors on `device`."""
        return Task(
            self.name,
            self.forget_pairs.to(device),
            self.retain_pairs.to(device),
            self.retain_text.to(device),
            self.near_text.to(device),
            self.unseen.to(device),
            {key: value.to(device) for key, value in self.questions.items()},
        )

    def __repr__(self) -> str:
        sets = ", ".join(f"{key} {len(value)}" for key, value in self.questions.items())
        texts = f"{len(self.forget_pairs)} forget pairs, {len(self.retain_text)} retain texts"
        return f"Task({self.name!r}: {texts}; questions: {sets})"

    def _tables(self) -> Sequence[Table]:
        rows = [{"questions": k, "number": len(v), "facts": len(set(v.facts))} for k, v in self.questions.items()]
        return (Table(pd.DataFrame(rows)),)


def _overlap(a: Questions, b: Questions) -> list[str]:
    return sorted(set(a.facts) & set(b.facts))
