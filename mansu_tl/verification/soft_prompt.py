"""Soft prompt: a few free embeddings in front of every question, optimised until known answers come out.

An attack in the embedding space (Schwinn et al. 2024, arXiv 2402.09063; prompt tuning is Lester et al. 2021, arXiv
2104.08691): the weights stay as they are, so what it brings out was in them. It is trained on some facts and asked about the
others (facts are cut into folds, every fact is held out once), so that it cannot carry the answers itself. What it can do
without the knowledge, a never-trained model under the same attack shows; a prompt found on one model can also be put in
front of another (`ask_behind`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from mansu_tl.data import Questions
from mansu_tl.data.fit import require_fit, require_questions
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import float32_copy, home, require_copyable
from mansu_tl.unlearning.batches import Sampler
from mansu_tl.verification.prompting import (
    HeldOut,
    Put,
    Told,
    asked_in_folds,
    embedding_of,
    fold_of,
    in_front,
    inserted,
)


@dataclass(frozen=True)
class SoftPrompt(HeldOut):
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

    def __repr__(self) -> str:
        before, after = self.loss.double().mean(0).tolist()
        return (
            f"SoftPrompt({self.label}: {self.prompts.shape[1]} embeddings, trained answers {before:.2f} -> {after:.2f} nats; "
            f"{self._in_words()})"
        )


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
    generator = torch.Generator().manual_seed(seed)
    fold = fold_of(questions, folds, generator, "soft prompt")
    if tokens < 1 or steps < 1 or batch_size < 1 or not learning_rate > 0:
        raise MansuError(
            f"soft prompt: tokens={tokens}, steps={steps}, batch_size={batch_size}, learning_rate={learning_rate}; all "
            "have to be positive"
        )
    require_copyable(model, questions.prompts)
    at, longer = _widened(questions, tokens)
    require_fit(model, longer)
    hf = float32_copy(model)
    prompts, losses = [], []
    with tqdm(total=folds * steps, desc=f"soft prompt {label}", unit="step", disable=not progress) as bar:
        for each in range(folds):
            text = (fold != each).nonzero()[:, 0]
            draw = generator.manual_seed(seed + 1 + each)
            prompt, before, after = _trained(
                hf, longer[text], tokens, at, steps, learning_rate, batch_size, draw, bar.update
            )
            prompts.append(prompt.cpu())
            losses.append([before, after])
    found = asked_in_folds(hf, fold, put_embeddings(hf, torch.stack(prompts), questions))
    return SoftPrompt(
        label, torch.stack(prompts), fold, found["multiple_choice"], found["cloze"], found["log_odds"],
        torch.tensor(losses), steps, float(learning_rate), seed, questions.facts, 1 / questions.options.shape[1],
    )  # fmt: skip


def put_embeddings(hf: PreTrainedModel, prompts: Float[Tensor, "fold token d_model"], questions: Questions) -> Put:
    """What puts the prompt of a fold in front of all questions.

    Raises:
        MansuError: a model of another width, or questions that do not fit it with the prompt in front.
    """
    width = embedding_of(hf).embedding_dim
    if width != prompts.shape[2]:
        raise MansuError(
            f"soft prompt: embeddings of {prompts.shape[2]} numbers, the model's have {width}; use one shape"
        )
    at, longer = _widened(questions, prompts.shape[1])
    require_fit(hf, longer)

    @contextmanager
    def put(fold: int) -> Iterator[Questions]:
        with _in_front(hf, prompts[fold].to(home(hf)), at):
            yield longer

    return put


def _widened(questions: Questions, tokens: int) -> tuple[int, Questions]:
    """Where the prompt goes, and the questions with room for it: tokens whose embeddings are going to be replaced."""
    at = in_front(questions)
    return int(at[0]), inserted(questions, questions.prompts[0, :1].expand(tokens), at)


@contextmanager
def _in_front(hf: PreTrainedModel, prompt: Float[Tensor, "token d_model"], at: int) -> Iterator[None]:
    """Inside, the embeddings of some positions of every row are the prompt's."""

    def put(module: object, inputs: object, out: Tensor) -> Tensor:
        rows = prompt.to(out.dtype)[None].expand(len(out), -1, -1)
        return torch.cat([out[:, :at], rows, out[:, at + len(prompt) :]], 1)

    with embedding_of(hf).register_forward_hook(put):
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
    table = embedding_of(hf)
    with torch.no_grad():
        drawn = torch.randint(table.num_embeddings, (tokens,), generator=generator).to(home(hf))
        prompt = table(drawn[None])[0].clone().requires_grad_(True)
    optimizer = torch.optim.Adam([prompt], lr=rate * prompt.detach().square().mean().sqrt().item())
    draw = Sampler(len(questions), batch_size, generator)
    with _in_front(hf, prompt, at):
        with torch.no_grad():
            before = Told.of(questions, home(hf)).loss(hf).item()
        for _ in range(steps):
            optimizer.zero_grad()
            Told.of(questions[draw()], home(hf)).loss(hf).backward()
            optimizer.step()
            tick()
        with torch.no_grad():
            after = Told.of(questions, home(hf)).loss(hf).item()
    if not math.isfinite(after):
        raise MansuError(f"soft prompt: the loss is {after} after {steps} steps; lower learning_rate={rate}")
    return prompt.detach(), before, after
