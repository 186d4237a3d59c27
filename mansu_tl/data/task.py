"""An unlearning task: what to forget, what to keep, and the questions that neither stage may train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mansu_tl.data.masks import real_tokens
from mansu_tl.data.pairs import PromptPairs
from mansu_tl.data.rows import (
    Asked,
    Rows,
    checked_lengths,
    require_options,
    set_fields,
    whole_numbers,
    with_values,
    without_padding,
)
from mansu_tl.errors import MansuError
from mansu_tl.results.result import Result, Table

HELD_OUT = ", held out"


@dataclass(frozen=True)
class Sequences(Rows):
    """Right-padded token sequences; whatever stands behind a sequence's length is replaced by token 0.

    Attributes:
        tokens: token ids.
        lengths: real tokens of each sequence.

    Raises:
        MansuError: tensors of the wrong shape or kind, a negative id, or a length outside 1..pos.
    """

    tokens: Int[Tensor, "row pos"]
    lengths: Int[Tensor, " row"]

    def __post_init__(self) -> None:
        tokens = whole_numbers("sequences: tokens", self.tokens, 2)
        lengths = checked_lengths("sequence", tokens, self.lengths)
        set_fields(self, tokens=without_padding("sequence", "text", tokens, lengths), lengths=lengths)

    @property
    def real(self) -> Bool[Tensor, "row pos"]:
        """Which tokens lie inside their sequence."""
        return real_tokens(self.tokens, self.lengths)

    def trimmed(self) -> Sequences:
        """The same without the columns that are padding in every row."""
        return with_values(self, tokens=self.tokens[:, : int(self.lengths.max())])

    def followed(self, behind: tuple[int, ...]) -> Sequences:
        """The same with some tokens behind each."""
        tokens = torch.nn.functional.pad(self.tokens, (0, len(behind)))
        rows = torch.arange(len(self), device=tokens.device)
        for step, token in enumerate(behind):
            tokens[rows, self.lengths + step] = token
        return with_values(self, tokens=tokens, lengths=self.lengths + len(behind))

    def joined(self, other: Sequences) -> Sequences:
        """These rows, then the other's, padded to one width."""
        if not len(other):
            return self
        width = max(self.tokens.shape[1], other.tokens.shape[1])
        rows = [torch.nn.functional.pad(text.tokens, (0, width - text.tokens.shape[1])) for text in (self, other)]
        return with_values(self, tokens=torch.cat(rows), lengths=torch.cat([self.lengths, other.lengths]))

    def __repr__(self) -> str:
        return f"Sequences({len(self)} sequences of up to {self.tokens.shape[1]} tokens)"


@dataclass(frozen=True)
class Questions(Asked):
    """Multiple-choice questions.

    Attributes:
        prompts: right-padded prompts; whatever stands behind a prompt's length is replaced by token 0.
        lengths: real tokens of each prompt.
        options: the tokens of every option, padded with -1, or one token an option without the last axis; option 0 is the
            right answer. Accuracy is read from logits, so order tells nothing.
        facts: the fact each question asks for, so that intervals can be taken over facts rather than templates.

    Raises:
        MansuError: tensors of the wrong shape or kind, a negative id, a length outside 1..pos, fewer than two options,
            an option given twice, or facts of another number.
    """

    prompts: Int[Tensor, "question pos"]
    lengths: Int[Tensor, " question"]
    options: Int[Tensor, "question option *token"]
    facts: tuple[str, ...]

    def __post_init__(self) -> None:
        prompts = whole_numbers("questions: prompts", self.prompts, 2)
        one_token = isinstance(self.options, Tensor) and self.options.ndim == 2
        options = whole_numbers("questions: options", self.options[..., None] if one_token else self.options, 3)
        lengths, facts = checked_lengths("question", prompts, self.lengths), tuple(self.facts)
        for what, count in (("options", len(options)), ("facts", len(facts))):
            if count != len(prompts):
                raise MansuError(f"questions: {count} {what} for {len(prompts)} prompts; give one for each")
        if options.device != prompts.device:
            raise MansuError(f"questions: options on {options.device}, prompts on {prompts.device}; put all on one")
        require_options("question", options)
        prompts = without_padding("question", "prompt", prompts, lengths)
        set_fields(self, prompts=prompts, lengths=lengths, options=options, facts=facts)

    @classmethod
    def of_pairs(cls, pairs: PromptPairs) -> Questions:
        """The clean prompts of pairs as questions, the answer among the distractors."""
        return cls(pairs.clean, pairs.lengths, pairs.options, pairs.facts)

    def __repr__(self) -> str:
        return f"Questions({len(self)} with {self.options.shape[1]} options, {len(set(self.facts))} facts)"


_PARTS: dict[str, type] = {
    "forget_pairs": PromptPairs,
    "retain_pairs": PromptPairs,
    "retain_text": Sequences,
    "near_text": Sequences,
    "unseen": Sequences,
    "questions": Mapping,
}


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
        lines: where the task was read from rows, how many there were by set, "forget" those that training may see and
            "forget, held out" those that it may not; together all rows of the file. Of a benchmark's questions also how many
            were left out for want of a counterfactual.

    Raises:
        MansuError: a part of the wrong kind, an empty forget, retain or text set, or a fact that is asked in the forget
            set and in another one, held-out wordings included.
    """

    name: str
    forget_pairs: PromptPairs
    retain_pairs: PromptPairs
    retain_text: Sequences
    near_text: Sequences
    unseen: Sequences
    questions: Mapping[str, Questions]
    lines: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, kind in _PARTS.items():
            if not isinstance(getattr(self, key), kind):
                found = type(getattr(self, key)).__name__
                raise MansuError(f"task {self.name!r}: {key} is a {found}; give {kind.__name__}, or use load_task")
        for key, asked in self.questions.items():
            if not isinstance(asked, Questions):
                raise MansuError(f"task {self.name!r}: questions[{key!r}] is a {type(asked).__name__}; give Questions")
        for key in ("forget", "retain"):
            if key not in self.questions or len(self.questions[key]) == 0:
                raise MansuError(f"task {self.name!r}: the {key} set is empty; give it at least one question")
        if len(self.retain_text) == 0:
            raise MansuError(f"task {self.name!r}: retain_text is empty; give text whose likelihood is to be kept")
        for other in ("near", "retain"):
            both = sorted(self._facts("forget") & self._facts(other))
            if both:
                raise MansuError(
                    f"task {self.name!r}: forget and {other} share {len(both)} facts, e.g. {both[0]!r}; remove it from one"
                )

    def _facts(self, name: str) -> set[str]:
        """The facts that a set asks, in held-out wordings too."""
        sets = (self.questions[key] for key in (name, f"{name}_paraphrase") if key in self.questions)
        return {fact for questions in sets for fact in questions.facts}

    def to(self, device: str | torch.device) -> Task:
        """The same task with its tensors on `device`."""
        moved = {key: value.to(device) for key, value in self.questions.items()}
        parts = {part: getattr(self, part).to(device) for part in _PARTS if part != "questions"}
        return with_values(self, **parts, questions=moved)

    def __repr__(self) -> str:
        sets = ", ".join(f"{key} {len(value)}" for key, value in self.questions.items())
        texts = f"{len(self.forget_pairs)} forget pairs, {len(self.retain_text)} retain texts"
        return f"Task({self.name!r}: {texts}; questions: {sets}{self._lines()})"

    def _lines(self) -> str:
        """Every line of the file, by set."""
        if not self.lines:
            return ""
        names = dict.fromkeys(key.removesuffix(HELD_OUT) for key in self.lines)
        counts = {name: (self.lines.get(name, 0), self.lines.get(name + HELD_OUT, 0)) for name in names}
        sets = [f"{name} {seen}" + (f" + {held} held out" if held else "") for name, (seen, held) in counts.items()]
        return f"; {sum(self.lines.values())} lines: {', '.join(sets)}"

    def _tables(self) -> Sequence[Table]:
        rows = [{"questions": k, "number": len(v), "facts": len(set(v.facts))} for k, v in self.questions.items()]
        return (Table(pd.DataFrame(rows)),)
