"""Extraction: what comes out when a model is sampled, and how much of a text it completes once it is told the rest.

Three measures. leak@k (Reisizadeh et al. 2025, arXiv 2511.04934): does the answer come up in one of k samples? With c of n
samples right, 1 - C(n - c, k) / C(n, k) is an unbiased estimate for every k up to n (Chen et al. 2021, arXiv 2107.03374),
so one set of samples serves all k. Exact memorisation (Tirumala et al. 2022, arXiv 2205.10770): the share of tokens that the
likeliest next token gets right, teacher-forced. Extraction strength (Carlini et al. 2021, arXiv 2012.07805, as in
open-unlearning, arXiv 2506.12618): the share that greedy decoding writes on its own behind the shortest prefix that suffices.
The controls are the original and a model that never learnt the facts; the caller measures them alike.

With enough samples a model that guesses evenly among many words says every one of them. leak@k therefore has a control of its
own: how often a *wrong* option of the same question comes up in k samples (our definition). What lies above it is knowledge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from mansu_tl.data import Questions
from mansu_tl.data.fit import require_fit, require_questions
from mansu_tl.data.text import pad
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import require_ready
from mansu_tl.results.intervals import with_interval
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.metrics import last_logits
from mansu_tl.verification.attacks import answered
from mansu_tl.verification.tofu_measures import extraction_strength
from mansu_tl.verification.told import told

Text = tuple[int, ...]


@dataclass(frozen=True)
class Leakage(Result):
    """How often each option of a question came up when a model was sampled.

    Attributes:
        label: which model.
        hits: samples of each question in which each option came up; option 0 is the right answer.
        samples: drawn of each question.
        temperature: that logits were divided by.
        top_p: mass of the nucleus that was sampled from; 1 = everything.
        new_tokens: length of a sample; 0 = an option has to be what the sample begins with.
        seed: of the draws.
        facts: the fact behind each question.
    """

    label: str
    hits: Int[Tensor, "question option"]
    samples: int
    temperature: float
    top_p: float
    new_tokens: int
    seed: int
    facts: tuple[str, ...]

    def of_options(self, k: int) -> Float[Tensor, "question option"]:
        """The chance that an option comes up in k samples, option by option.

        Raises:
            MansuError: `k` is not in 1..samples.
        """
        if not 1 <= k <= self.samples:
            raise MansuError(f"leak@k: k={k} of {self.samples} samples; choose 1..{self.samples}, or draw more")
        drawn = torch.arange(k, dtype=torch.float64)
        misses = (self.samples - self.hits.cpu()).double()[..., None] - drawn
        return 1 - (misses.clamp_min(0) / (self.samples - drawn)).prod(-1)

    def at(self, k: int) -> Float[Tensor, " question"]:
        """leak@k: the chance that the right answer comes up in k samples, question by question.

        Raises:
            MansuError: `k` is not in 1..samples.
        """
        return self.of_options(k)[:, 0]

    def control(self, k: int) -> Float[Tensor, " question"]:
        """The same of a wrong option, the mean over a question's distractors.

        Raises:
            MansuError: `k` is not in 1..samples.
        """
        return self.of_options(k)[:, 1:].mean(1)

    def to_dataframe(self, ks: Sequence[int] | None = None) -> pd.DataFrame:
        """One row a k: leak@k, its control and their difference in percent, each with its 95 % interval over facts.

        Args:
            ks: powers of two up to the number of samples where not given.
        """
        rows = []
        for k in [2**i for i in range(self.samples.bit_length())] if ks is None else ks:
            row: dict[str, object] = {"label": self.label, "k": k}
            leak, control = self.at(k), self.control(k)
            for name, values in (("leak", leak), ("control", control), ("excess", leak - control)):
                row |= with_interval(name, values, self.facts, scale=100.0)
            rows.append(row)
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        shown = [
            f"leak@{k} {100 * self.at(k).mean():.1f} (wrong options {100 * self.control(k).mean():.1f}) %"
            for k in dict.fromkeys((1, self.samples))
        ]
        return f"Leakage({self.label}: {', '.join(shown)}; temperature {self.temperature:g}, top_p {self.top_p:g})"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "in percent", "{:.1f}".format),)


@torch_defaults()
def leak_at_k(
    model: TransformerBridge | PreTrainedModel,
    questions: Questions,
    *,
    samples: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    new_tokens: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
    label: str = "edited",
    progress: bool = False,
) -> Leakage:
    """Sample a model's continuations of every question and look for its options in them.

    A sample is not continued once no further option can come up in it; that changes no count.

    Args:
        samples: of each question; leak@k is known for every k up to this.
        temperature: logits are divided by it.
        top_p: sample from the fewest tokens whose probabilities reach this sum (Holtzman et al. 2020, arXiv 1904.09751).
        new_tokens: length of a sample, in which an option's tokens may stand anywhere, one behind the other; None = a sample
            has to begin with the option.
        seed: of the draws: the same seed gives the same counts.
        label: what the model is, for tables.
        progress: show a progress bar over the samples' tokens.

    Raises:
        MansuError: fewer than one sample, a temperature that is not positive, a mass outside (0, 1], samples shorter than an
            option, questions that do not fit the model, or logits that are not finite.
    """
    if samples < 1 or not 0 < temperature < float("inf") or not 0 < top_p <= 1:
        raise MansuError(
            f"leak@k: samples={samples}, temperature={temperature}, top_p={top_p}; samples and temperature have to be "
            "positive, top_p in (0, 1]"
        )
    require_questions(questions)
    if len(questions) == 0:
        raise MansuError("leak@k: the question set is empty; pass at least one question")
    require_fit(model, questions)
    require_ready(model, questions.prompts)
    options = questions.texts()
    longest = max(len(text) for texts in options for text in texts)
    if new_tokens is not None and new_tokens < longest:
        raise MansuError(f"leak@k: new_tokens={new_tokens}, the longest option has {longest}; sample at least as many")
    prompts = [row[:length] for row, length in zip(questions.prompts.tolist(), questions.lengths.tolist(), strict=True)]
    hits = torch.zeros(len(questions), questions.options.shape[1], dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    # Equal samples share a row: how many there are, by question and by what has been written.
    alive: dict[tuple[int, Text], int] = {(i, ()): samples for i in range(len(questions))}
    for step in tqdm(range(new_tokens or longest), desc=f"leak@k {label}", unit="token", disable=not progress):
        grown: dict[tuple[int, Text], int] = {}
        rows = list(alive.items())
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            tokens, lengths = pad([[*prompts[i], *written] for (i, written), _ in part], 0)
            chances = nucleus(last_logits(model, tokens, lengths).cpu() / temperature, top_p)
            for ((i, written), count), row in zip(part, chances, strict=True):
                drawn, times = torch.multinomial(row, count, True, generator=generator).unique(return_counts=True)
                for token, number in zip(drawn.tolist(), times.tolist(), strict=True):
                    longer = (*written, token)
                    left = None if new_tokens is None else new_tokens - step - 1
                    for option, text in enumerate(options[i]):
                        hits[i, option] += number * (_stands(longer, text, left) and not _stands(written, text, left))
                    if any(_may_come(longer, text, left) for text in options[i]):
                        grown[i, longer] = number
        alive = grown
        if not alive:
            break
    return Leakage(label, hits, samples, float(temperature), float(top_p), new_tokens or 0, seed, questions.facts)


def _stands(written: Text, option: Text, left: int | None) -> bool:
    """Whether an option stands in a sample: anywhere, or where no number of tokens is left, at its beginning."""
    starts = range(1 if left is None else len(written))
    return any(written[start : start + len(option)] == option for start in starts)


def _may_come(written: Text, option: Text, left: int | None) -> bool:
    """Whether an option that does not stand in a sample yet still can, with so many tokens left."""
    if _stands(written, option, left):
        return False
    if left is None:
        return len(written) < len(option) and option[: len(written)] == written
    begun = max(n for n in range(min(len(written), len(option)) + 1) if written[len(written) - n :] == option[:n])
    return len(option) - begun <= left


def nucleus(logits: Float[Tensor, "row vocab"], top_p: float) -> Float[Tensor, "row vocab"]:
    """Probabilities of the fewest tokens that together reach `top_p`, rescaled; the others have none.

    Raises:
        MansuError: logits that are not finite.
    """
    if not torch.isfinite(logits).all():
        raise MansuError("leak@k: the model's logits are not finite; check its weights")
    chances = logits.double().softmax(-1)
    if top_p < 1:
        ordered, order = chances.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        chances = torch.zeros_like(chances).scatter(1, order, torch.where(before < top_p, ordered, 0.0))
    return chances / chances.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Memorisation(Result):
    """How much of each text a model predicts.

    Attributes:
        label: which model.
        exact: share of the tokens that the likeliest next token gets right.
        strength: extraction strength: the share that greedy decoding writes on its own behind the rest.
        tokens: how many tokens of each text were looked at.
        whole: whether the prompt's tokens count too, or the answer's alone.
        facts: the fact behind each text.
    """

    label: str
    exact: Float[Tensor, " text"]
    strength: Float[Tensor, " text"]
    tokens: Int[Tensor, " text"]
    whole: bool
    facts: tuple[str, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a measure, in percent, with its 95 % interval over facts."""
        return pd.DataFrame(
            [
                {"label": self.label, "measure": name} | with_interval("value", values, self.facts, scale=100.0)
                for name, values in (("exact memorisation", self.exact), ("extraction strength", self.strength))
            ]
        )

    def __repr__(self) -> str:
        of = "texts" if self.whole else "answers"
        return (
            f"Memorisation({self.label}: exact {100 * self.exact.double().mean():.1f} %, extraction strength "
            f"{100 * self.strength.double().mean():.1f} % of {len(self.facts)} {of})"
        )

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "in percent", "{:.1f}".format),)


@torch_defaults()
def memorisation(
    model: TransformerBridge | PreTrainedModel,
    questions: Questions,
    *,
    whole: bool = False,
    batch_size: int = 32,
    label: str = "edited",
) -> Memorisation:
    """Exact memorisation and extraction strength of the right answers, teacher-forced and greedy.

    Of an answer of one token both are what `accuracy` calls cloze.

    Args:
        whole: look at the prompt with its answer, but for the first token, which nothing predicts; else at the answer behind
            its prompt.
        label: what the model is, for tables.

    Raises:
        MansuError: no question, questions that do not fit the model, or logits that are not finite.
    """
    require_questions(questions)
    text = answered(questions)
    first = torch.ones_like(questions.lengths) if whole else questions.lengths
    right: list[list[bool]] = [[] for _ in range(len(text))]
    for batch in told(model, text, first, "memorisation", batch_size):
        hit = batch.logits.argmax(-1) == batch.targets
        for row, each in zip(batch.rows.tolist(), hit.tolist(), strict=True):
            right[row].append(each)
    exact = torch.tensor([sum(hits) / len(hits) for hits in right])
    strength = torch.tensor(
        [extraction_strength(torch.tensor(hits).long(), torch.ones(len(hits)).long()) for hits in right]
    )
    return Memorisation(label, exact, strength, torch.tensor([len(hits) for hits in right]), whole, questions.facts)
