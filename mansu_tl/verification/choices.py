"""WMDP and MMLU as EleutherAI's lm-evaluation-harness scores them without examples: the likeliest letter behind "Answer:".

The harness's metric is `acc`: the letter with the highest log-probability, summed over its tokens, is the right one; a
tie goes to the first letter. Groups (`mmlu`, `wmdp`) weigh every question alike. Its standard error is the sample's
standard deviation over the root of the number of questions. Prompts: `mansu_tl.data.sources.choices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mansu_tl.data import Questions
from mansu_tl.data.answers import continuation
from mansu_tl.data.fit import require_fit
from mansu_tl.data.forced import forced
from mansu_tl.data.sources.choices import LETTERS, Choice
from mansu_tl.data.text import TextSource, in_chat, pad, pad_id, text_source, with_bos
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models.state import home, require_ready
from mansu_tl.results.result import Result, Table
from mansu_tl.results.serialise import MismatchError
from mansu_tl.runs.metrics import asked_logits
from mansu_tl.verification.writing import text_source_of


@dataclass(frozen=True)
class ChoiceScores(Result):
    """What a model finds likeliest, question by question.

    Attributes:
        title: the model's name in tables.
        log_probs: of every letter behind the prompt, in nats.
        answers: which letter is right, from 0.
        subjects: what each question is about.
    """

    title: str
    log_probs: Float[Tensor, "question letter"]
    answers: Int[Tensor, " question"]
    subjects: tuple[str, ...]

    @property
    def right(self) -> Bool[Tensor, " question"]:
        """Whether the likeliest letter is the right one; of equal ones the first counts."""
        best = self.log_probs.amax(1, keepdim=True)
        return (self.log_probs == best).int().argmax(1) == self.answers

    @property
    def accuracy(self) -> float:
        """Share of right answers, in [0, 1]; every question weighs alike."""
        return self.right.double().mean().item()

    @property
    def standard_error(self) -> float:
        """Of the accuracy; NaN for one question."""
        return _standard_error(self.right)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a subject with its number of questions, accuracy and standard error, then one for all."""
        rows = []
        for subject in dict.fromkeys(self.subjects):
            right = self.right[[i for i, other in enumerate(self.subjects) if other == subject]]
            rows.append((subject, len(right), right.double().mean().item(), _standard_error(right)))
        rows.append(("all", len(self.answers), self.accuracy, self.standard_error))
        return pd.DataFrame(rows, columns=["subject", "questions", "accuracy", "standard_error"])

    def _check(self) -> None:
        if len({len(self.log_probs), len(self.answers), len(self.subjects)}) > 1:
            raise MismatchError("its log-probabilities, answers and subjects differ in number")

    def __repr__(self) -> str:
        return f"ChoiceScores({self.title}: {100 * self.accuracy:.1f} % of {len(self.answers)} questions)"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), form="{:.3f}".format, rows=60),)


def _standard_error(right: Tensor) -> float:
    return (right.double().std() / len(right) ** 0.5).item() if len(right) > 1 else float("nan")


@torch_defaults()
def evaluate_choices(
    model: TransformerBridge | PreTrainedModel,
    items: Sequence[Choice],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    title: str = "model",
    chat: bool = False,
    batch_size: int = 16,
    progress: bool = False,
) -> ChoiceScores:
    """The letters' log-probabilities behind every question, and with them WMDP's and MMLU's accuracy without examples.

    Args:
        items: the questions, from `read_choices`.
        tokenizer: the model's own where not given.
        chat: put each question into the tokenizer's chat template, "Answer:" behind it, as RWKU does with its own.

    Raises:
        MansuError: no question, tokenizer or chat template, or a question that does not fit the model.
    """
    if not items:
        raise MansuError("choices: no question given; read some with read_choices")
    source = text_source_of(model, tokenizer, "choices")
    order = sorted(range(len(items)), key=lambda i: len(items[i].prompt))
    found = torch.empty(len(items), len(LETTERS))
    bar = tqdm(total=len(items), desc="choices", unit="question", disable=not progress)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        questions = _questions(source, [items[i] for i in chosen], chat)
        require_fit(model, questions)
        require_ready(model, questions.prompts)
        batch = forced(questions.to(home(model)))
        found[chosen] = batch.log_probs(asked_logits(model, batch.clean, batch.places)).cpu()
        bar.update(len(chosen))
    bar.close()
    if not torch.isfinite(found).all():
        bad = items[int((~torch.isfinite(found)).any(1).nonzero()[0])]
        raise MansuError(f"choices: the log-probabilities of {bad.name} are not finite; check the weights")
    answers = torch.tensor([item.answer for item in items])
    return ChoiceScores(title, found, answers, tuple(item.subject for item in items))


def _questions(source: TextSource, items: Sequence[Choice], chat: bool) -> Questions:
    """The prompts with the letters in their order; which one is right is not looked at."""
    tokenizer, bos = text_source(source)
    prompts = [item.prompt for item in items]
    if chat:
        prompts = [f"{text}Answer:" for text in in_chat(tokenizer, [item.asked for item in items], "choices")]
    rows, options = [], []
    for prompt, item in zip(prompts, items, strict=True):
        split = [continuation(tokenizer, prompt, letter, f"{item.name}: letter") for letter in LETTERS]
        rows.append(with_bos(tokenizer, split[0][0], bos and not chat))
        options.append([letter for _, letter in split])
    widest = max(len(letter) for row in options for letter in row)
    padded = torch.tensor([[[*letter, *[-1] * (widest - len(letter))] for letter in row] for row in options])
    return Questions(*pad(rows, pad_id(tokenizer)), padded, tuple(item.name for item in items))
