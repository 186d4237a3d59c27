"""Hints: what a model still answers when the prompt helps it, and when a question to keep stands beside it.

The attacks of a user without any access but the prompt: other facts as examples (Lynch et al. 2024, arXiv 2402.16835;
Shumailov et al. 2024, arXiv 2407.00106), the options told beforehand, the answer's first letter or first token, other
wordings, and one question to be forgotten behind one to be kept (the combined queries of BLUR, Hu et al. 2025, arXiv
2506.15699). Some hints narrow the answer for anybody, so a never-trained model has to be asked alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerBase

from mansu_tl.data import Questions, Task
from mansu_tl.data.fit import require_task
from mansu_tl.data.text import pad, pad_id
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import require_copyable
from mansu_tl.models.kinds import require_bridge
from mansu_tl.results.intervals import with_interval
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.metrics import Accuracy, accuracy
from mansu_tl.verification.writing import greedy_answers, writing_copy

KINDS = (
    "plain", "other wordings", "examples, near facts", "examples, forget facts", "options named", "first letter",
    "first token", "combined, forget", "combined, retain",
)  # fmt: skip
Tokens = list[int]


@dataclass(frozen=True)
class Hints(Result):
    """Answers by hint.

    Attributes:
        label: which model.
        answers: by hint (`KINDS`, and what the caller added), question by question.
        chances: accuracy of guessing among the options, in percent, by hint.
        left_out: hints that these questions cannot be given, and why.
    """

    label: str
    answers: Mapping[str, Accuracy]
    chances: Mapping[str, float]
    left_out: Mapping[str, str]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a hint: multiple choice and cloze in percent, each with its 95 % interval over facts, and chance."""
        rows = []
        for hint, found in self.answers.items():
            row: dict[str, object] = {"label": self.label, "hint": hint, "questions": len(found.facts)}
            row |= with_interval("multiple_choice", found.multiple_choice, found.facts, scale=100.0)
            row |= with_interval("cloze", found.cloze, found.facts, scale=100.0)
            rows.append(row | {"chance": self.chances[hint]})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{hint} {found.mc_percent:.0f}/{found.cloze_percent:.0f}" for hint, found in self.answers.items()
        )
        return f"Hints({self.label}, MC/cloze: {shown} %)"

    def _notes(self) -> Sequence[Sequence[str]]:
        return ([f"{hint}: {why}" for hint, why in self.left_out.items()],)

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "in percent", "{:.1f}".format, rows=24),)


@torch_defaults()
def hints(
    model: TransformerBridge,
    task: Task,
    *,
    examples: int = 3,
    separator: str = ".\n",
    also: Mapping[str, Questions] | None = None,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
    label: str = "edited",
) -> Hints:
    """Ask a task's forget questions with each kind of hint in front.

    "examples": other facts of the question's relation (what stands in front of the fact's first colon) with their right
    answers. "options named": the options in random order. "first letter": "It begins with X" in front. "first token": the
    first token of an answer of several, behind the prompt; the rest is asked. "combined, forget": a retain question and the
    model's own greedy answer in front; "combined, retain": the retain question behind a forget question and the model's own
    answer to that. Our definitions, after the papers named in this module.

    Args:
        examples: facts in front of a question.
        separator: text between two sentences.
        also: further questions about the same facts by name, e.g. aliases or several hops, where there are some.
        kinds: which of `KINDS` to ask; "plain" is always there.
        seed: of the examples and orders.
        label: what the model is, for tables.

    Raises:
        MansuError: no bridge, a model without a tokenizer, an unknown kind, fewer than one example, a separator that the
            tokenizer does not know, or questions that do not fit the model.
    """
    require_bridge(model)
    require_task(task)
    if model.tokenizer is None:
        raise MansuError("hints: this model has no tokenizer; load it with tokenizer=")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise MansuError(f"hints: no kind {unknown[0]!r}; choose of {', '.join(KINDS)}")
    if examples < 1:
        raise MansuError(f"hints: examples={examples}; give at least one")
    require_copyable(model, task.questions["forget"].prompts)
    maker = _Maker(model, model.tokenizer, task, examples, separator, seed)
    asked, left_out = {"plain": task.questions["forget"]}, {}
    for kind in (kind for kind in KINDS if kind in kinds and kind != "plain"):
        made = maker.makers[kind]()
        if isinstance(made, str):
            left_out[kind] = made
        else:
            asked[kind] = made
    asked |= dict(also or {})
    answers = {name: accuracy(model, questions) for name, questions in asked.items()}
    return Hints(label, answers, {name: questions.chance for name, questions in asked.items()}, left_out)


class _Maker:
    """Questions with hints in front, as tokens; a text instead says why a hint cannot be given."""

    def __init__(
        self, model: TransformerBridge, tokenizer: PreTrainedTokenizerBase, task: Task, examples: int, separator: str,
        seed: int,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.task, self.examples = model, tokenizer, task, examples
        self.forget, self.seed = task.questions["forget"], seed
        between = self._text(separator)
        if between is None:
            raise MansuError(f"hints: the tokenizer does not know the separator {separator!r}; pass another separator=")
        self.between = between
        self.makers: dict[str, Callable[[], Questions | str]] = {
            "other wordings": self._wordings,
            "examples, near facts": lambda: self._examples("near"),
            "examples, forget facts": lambda: self._examples("forget"),
            "options named": self._options,
            "first letter": self._letter,
            "first token": self._token,
            "combined, forget": lambda: self._combined("retain", "forget"),
            "combined, retain": lambda: self._combined("forget", "retain"),
        }

    def _text(self, text: str) -> Tokens | None:
        """A text's tokens; None where one is unknown to the tokenizer."""
        ids = list(self.tokenizer.encode(text, add_special_tokens=False))
        return None if self.tokenizer.unk_token_id in ids else ids

    def _draws(self, kind: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + KINDS.index(kind))

    def _bodies(self, questions: Questions) -> tuple[list[Tokens], list[Tokens]]:
        """Each prompt's BOS token, if it has one, and the rest."""
        rows = [row[:n] for row, n in zip(questions.prompts.tolist(), questions.lengths.tolist(), strict=True)]
        cuts = [int(row[0] == self.tokenizer.bos_token_id and len(row) > 1) for row in rows]
        both = zip(rows, cuts, strict=True)
        heads, bodies = zip(*((row[:cut], row[cut:]) for row, cut in both), strict=True)
        return list(heads), list(bodies)

    def _behind(self, before: list[Tokens], questions: Questions) -> Questions:
        """The questions with some tokens in front of each, behind its BOS token."""
        heads, bodies = self._bodies(questions)
        rows = [[*head, *hint, *body] for head, hint, body in zip(heads, before, bodies, strict=True)]
        prompts, lengths = pad(rows, pad_id(self.tokenizer))
        return replace(questions, prompts=prompts, lengths=lengths, options=questions.options.cpu())

    def _wordings(self) -> Questions | str:
        return self.task.questions.get("forget_paraphrase", "the task has no questions in other wordings")

    def _examples(self, source: str) -> Questions | str:
        if source not in self.task.questions or not len(self.task.questions[source]):
            return f"the task asks no {source} questions"
        known = self.task.questions[source]
        _, bodies = self._bodies(known)
        sentences = [[*body, *texts[0]] for body, texts in zip(bodies, known.texts(), strict=True)]
        relations = [fact.partition(":")[0] for fact in known.facts]
        generator = self._draws(f"examples, {source} facts")
        hint = []
        for fact in self.forget.facts:
            rows = [i for i, r in enumerate(relations) if r == fact.partition(":")[0] and known.facts[i] != fact]
            order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            chosen = list({known.facts[i]: i for i in order}.values())[: self.examples]
            if len(chosen) < self.examples:
                return f"only {len(chosen)} other {source} facts of the relation of {fact!r}"
            hint.append([token for i in chosen for token in (*sentences[i], *self.between)])
        return self._behind(hint, self.forget)

    def _options(self) -> Questions | str:
        comma = self._text(",")
        if comma is None:
            return "the tokenizer does not know the comma"
        generator = self._draws("options named")
        hint = []
        for texts in self.forget.texts():
            order = torch.randperm(len(texts), generator=generator).tolist()
            listed = [token for i in order for token in (*texts[i], *comma)]
            hint.append([*listed[: -len(comma)], *self.between])
        return self._behind(hint, self.forget)

    def _letter(self) -> Questions | str:
        hint = []
        for texts in self.forget.texts():
            answer = str(self.tokenizer.decode(list(texts[0]))).strip()
            told = self._text(f"It begins with {answer[:1]}")
            if told is None:
                return "the tokenizer has no letters"
            hint.append([*told, *self.between])
        return self._behind(hint, self.forget)

    def _token(self) -> Questions | str:
        texts = self.forget.texts()
        rows = [i for i, each in enumerate(texts) if len(each[0]) > 1]
        if not rows:
            return "every answer is one token"
        options = []
        for i in rows:
            # A distractor that would be the same as another from its second token on stays whole.
            rest: list[tuple[int, ...]] = [texts[i][0][1:]]
            for other in texts[i][1:]:
                rest.append(other[1:] if other[1:] and other[1:] not in rest else other)
            options.append(rest)
        width = max(len(text) for each in options for text in each)
        filled = torch.tensor([[[*text, *[-1] * (width - len(text))] for text in each] for each in options])
        heads, bodies = self._bodies(self.forget[rows])
        longer = [[*h, *b, texts[i][0][0]] for i, h, b in zip(rows, heads, bodies, strict=True)]
        prompts, lengths = pad(longer, pad_id(self.tokenizer))
        return Questions(prompts, lengths, filled, tuple(self.forget.facts[i] for i in rows))

    def _combined(self, first: str, then: str) -> Questions:
        """A question of one set behind one of another, which the model has answered itself."""
        before, asked = self.task.questions[first], self.task.questions[then]
        generator = self._draws("combined, forget")
        order = torch.randperm(len(before), generator=generator)
        before = before[order.repeat(-(-len(asked) // len(before)))[: len(asked)]]
        heads, bodies = self._bodies(before)
        room = before.option_lengths[:, 0].tolist()
        prompts = [[*head, *body] for head, body in zip(heads, bodies, strict=True)]
        end, fill = self.tokenizer.eos_token_id, pad_id(self.tokenizer)
        written = greedy_answers(writing_copy(self.model, "hints"), prompts, fill, end, max(room))
        hint = [
            [*body, *answer[:most], *self.between] for body, answer, most in zip(bodies, written, room, strict=True)
        ]
        return self._behind(hint, asked)
