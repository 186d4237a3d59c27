"""Soft prompt: a few free embeddings in front of every question, optimised until known answers come out.

An attack in the embedding space (Schwinn et al. 2024, arXiv 2402.09063; prompt tuning is Lester et al. 2021, arXiv
2104.08691): the weights stay as they are, so what it brings out was in them. It is trained on some facts and asked about the
others (facts are cut into folds, every fact is held out once), so that it cannot carry the answers itself. What it can do
without the knowledge, a never-trained model under the same attack shows; a prompt found on one model can also be put in
front of another (`ask_behind`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from mansu_tl.data import Questions, Sequences
from mansu_tl.data.fit import require_fit, require_questions
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import float32_copy, home, require_copyable
from mansu_tl.results.intervals import with_interval
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.metrics import accuracy
from mansu_tl.runs.values import predicted
from mansu_tl.unlearning.batches import Sampler
from mansu_tl.verification.attacks import answered


@dataclass(frozen=True)
class SoftPrompt(Result):
    """What a model answers behind a soft prompt that was trained on other facts.

    Attributes:
        label: which model.
        prompts: by fold, in front of the questions of this fold's facts.
        fold: the fold of each question: its fact was not trained on there.
        multiple_choice: whether the right option has the highest score, behind the prompt.
        cloze: whether the answer is what greedy decoding writes, behind the prompt.
        log_odds: of the right option against the others together, in nats, behind the prompt.
        loss: by fold, of the trained answers before the first and behind the last step, in nats per token.
        steps: optimizer steps of every fold.
        learning_rate: of Adam, in units of the embeddings' root mean square.
        seed: of folds, first embeddings and batches.
        facts: the fact behind each question.
        chance: accuracy of guessing, as a share.
    """

    label: str
    prompts: Float[Tensor, "fold token d_model"]
    fold: Int[Tensor, " question"]
    multiple_choice: Bool[Tensor, " question"]
    cloze: Bool[Tensor, " question"]
    log_odds: Float[Tensor, " question"]
    loss: Float[Tensor, "fold 2"]
    steps: int
    learning_rate: float
    seed: int
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

    def __repr__(self) -> str:
        before, after = self.loss.double().mean(0).tolist()
        return (
            f"SoftPrompt({self.label}: {self.prompts.shape[1]} embeddings, trained answers {before:.2f} -> {after:.2f} nats; "
            f"held-out facts MC {100 * self.multiple_choice.double().mean():.1f} %, cloze "
            f"{100 * self.cloze.double().mean():.1f} %, chance {100 * self.chance:.0f} %)"
        )

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "held-out facts", "{:.2f}".format),)


@torch_defaults()
def soft_prompt(
    model: TransformerBridge | PreTrainedModel,
    questions: Questions,
    *,
    tokens: int = 4,
    folds: int = 2,
    steps: int = 60,
    learning_rate: float = 0.3,
    batch_size: int = 32,
    seed: int = 0,
    label: str = "edited",
    progress: bool = False,
) -> SoftPrompt:
    """Train a soft prompt on some facts' answers and ask about the others; the model is untouched.

    Args:
        questions: several wordings of a fact are held out together.
        tokens: embeddings in the prompt; they stand behind the BOS token where every question begins with the same token,
            else in front.
        folds: groups of facts; each is asked behind a prompt that the others trained.
        steps: of Adam, for each fold.
        learning_rate: constant, times the root mean square of the model's input embeddings.
        batch_size: questions a step.
        seed: of folds, first embeddings (those of tokens drawn from the vocabulary) and batches.
        label: what the model is, for tables.
        progress: show a progress bar over the folds' steps.

    Raises:
        MansuError: fewer than one embedding or step, folds outside 2..facts, a rate or batch size that is not positive,
            questions that do not fit the model with the prompt in front, a loss that is not finite, or a 4-bit model.
    """
    require_questions(questions)
    names = tuple(dict.fromkeys(questions.facts))
    if not 2 <= folds <= len(names):
        raise MansuError(f"soft prompt: folds={folds} of {len(names)} facts; choose 2..{len(names)}")
    if tokens < 1 or steps < 1 or batch_size < 1 or not learning_rate > 0:
        raise MansuError(
            f"soft prompt: tokens={tokens}, steps={steps}, batch_size={batch_size}, learning_rate={learning_rate}; all "
            "have to be positive"
        )
    require_copyable(model, questions.prompts)
    at = _place(questions)
    longer = _widened(questions, tokens, at)
    require_fit(model, longer)
    hf = float32_copy(model)
    generator = torch.Generator().manual_seed(seed)
    order = (torch.randperm(len(names), generator=generator) % folds).tolist()
    of_fact = dict(zip(names, order, strict=True))
    fold = torch.tensor([of_fact[fact] for fact in questions.facts])
    found: dict[str, Tensor] = {
        "multiple_choice": torch.zeros(len(questions), dtype=torch.bool),
        "cloze": torch.zeros(len(questions), dtype=torch.bool),
        "log_odds": torch.zeros(len(questions)),
    }
    prompts, losses = [], []
    bar = tqdm(total=folds * steps, desc=f"soft prompt {label}", unit="step", disable=not progress)
    with bar:
        for each in range(folds):
            held = (fold == each).nonzero()[:, 0]
            text = (fold != each).nonzero()[:, 0]
            draw = generator.manual_seed(seed + 1 + each)
            prompt, before, after = _trained(
                hf, longer[text], tokens, at, steps, learning_rate, batch_size, draw, bar.update
            )
            with _in_front(hf, prompt, at):
                answers = accuracy(hf, longer[held])
            for name, values in found.items():
                values[held] = getattr(answers, name)
            prompts.append(prompt.cpu())
            losses.append([before, after])
    return SoftPrompt(
        label, torch.stack(prompts), fold, found["multiple_choice"], found["cloze"], found["log_odds"],
        torch.tensor(losses), steps, float(learning_rate), seed, questions.facts, 1 / questions.options.shape[1],
    )  # fmt: skip


@torch_defaults()
def ask_behind(
    prompt: SoftPrompt, model: TransformerBridge | PreTrainedModel, questions: Questions, *, label: str = "edited"
) -> SoftPrompt:
    """Another model's answers behind the same soft prompts: what they say of a model that they were not made for.

    Args:
        questions: those that the prompts were made with.
        label: what the other model is, for tables.

    Raises:
        MansuError: other questions, a model of another width, or questions that do not fit it with the prompt in front.
    """
    require_questions(questions)
    if questions.facts != prompt.facts:
        raise MansuError("soft prompt: these are not the questions that the prompts were made with; pass the same")
    require_copyable(model, questions.prompts)
    hf, at = float32_copy(model), _place(questions)
    width = _embedding(hf).embedding_dim
    if width != prompt.prompts.shape[2]:
        raise MansuError(
            f"soft prompt: embeddings of {prompt.prompts.shape[2]} numbers, the model's have {width}; use one shape"
        )
    longer = _widened(questions, prompt.prompts.shape[1], at)
    require_fit(model, longer)
    right, cloze, odds = prompt.multiple_choice.clone(), prompt.cloze.clone(), prompt.log_odds.clone()
    losses = []
    for each, embeddings in enumerate(prompt.prompts):
        held, text = ((prompt.fold == each) == inside for inside in (True, False))
        with _in_front(hf, embeddings.to(home(hf)), at):
            answers = accuracy(hf, longer[held.nonzero()[:, 0]])
            loss = _loss(hf, longer[text.nonzero()[:, 0]]).item()
        right[held], cloze[held], odds[held] = answers.multiple_choice, answers.cloze, answers.log_odds
        losses.append([loss, loss])
    return replace(prompt, label=label, multiple_choice=right, cloze=cloze, log_odds=odds, loss=torch.tensor(losses))


def _embedding(hf: PreTrainedModel) -> torch.nn.Embedding:
    found = hf.get_input_embeddings()
    assert isinstance(found, torch.nn.Embedding)
    return found


def _place(questions: Questions) -> int:
    """Where the prompt goes: behind a first token that all questions share (BOS), else in front."""
    return 1 if bool((questions.prompts[:, 0] == questions.prompts[0, 0]).all()) else 0


def _widened(questions: Questions, tokens: int, at: int) -> Questions:
    """The questions with room for the prompt: tokens whose embeddings are going to be replaced."""
    rows = questions.prompts
    room = rows[:, :1].expand(-1, tokens)
    return replace(
        questions, prompts=torch.cat([rows[:, :at], room, rows[:, at:]], 1), lengths=questions.lengths + tokens
    )


@contextmanager
def _in_front(hf: PreTrainedModel, prompt: Float[Tensor, "token d_model"], at: int) -> Iterator[None]:
    """Inside, the embeddings of some positions of every row are the prompt's."""

    def put(module: object, inputs: object, out: Tensor) -> Tensor:
        rows = prompt.to(out.dtype)[None].expand(len(out), -1, -1)
        return torch.cat([out[:, :at], rows, out[:, at + len(prompt) :]], 1)

    with _embedding(hf).register_forward_hook(put):
        yield


def _trained(
    hf: PreTrainedModel,
    questions: Questions,
    tokens: int,
    at: int,
    steps: int,
    rate: float,
    batch_size: int,
    generator: torch.Generator,
    tick: Callable[[], object],
) -> tuple[Float[Tensor, "token d_model"], float, float]:
    """A prompt that makes these questions' answers likelier, and the answers' loss before and behind it all."""
    table = _embedding(hf).weight.detach()
    with torch.no_grad():
        drawn = torch.randint(len(table), (tokens,), generator=generator).to(table.device)
        prompt = _embedding(hf)(drawn[None])[0].clone().requires_grad_(True)
    optimizer = torch.optim.Adam([prompt], lr=rate * prompt.detach().square().mean().sqrt().item())
    draw = Sampler(len(questions), batch_size, generator)
    with _in_front(hf, prompt, at):
        with torch.no_grad():
            before = _loss(hf, questions).item()
        for _ in range(steps):
            optimizer.zero_grad()
            _loss(hf, questions[draw()]).backward()
            optimizer.step()
            tick()
        with torch.no_grad():
            after = _loss(hf, questions).item()
    if not math.isfinite(after):
        raise MansuError(f"soft prompt: the loss is {after} after {steps} steps; lower learning_rate={rate}")
    return prompt.detach(), before, after


def _loss(hf: PreTrainedModel, questions: Questions) -> Float[Tensor, ""]:
    """Mean cross-entropy of the right answers' tokens, in nats."""
    text: Sequences = answered(questions).trimmed().to(home(hf))
    found = predicted(hf, {}, text)
    counts = found.places >= (questions.lengths.to(found.rows.device) - 1)[found.rows]
    return torch.nn.functional.cross_entropy(found.logits[counts], found.targets[counts])
