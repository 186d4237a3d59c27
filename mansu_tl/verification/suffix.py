"""Adversarial suffix: a few tokens, the same for every question, searched for until known answers come out.

Greedy coordinate gradient (GCG: Zou et al. 2023, arXiv 2307.15043, algorithms 1 and 2): the gradient of the answers' loss by
the one-hot of every token in the suffix names promising swaps, some of them are tried, the best one is kept. What a user
can type, where the soft prompt is what only the owner of the weights can put in. Theirs stands behind the request and in
front of the reply. Here the answer goes on from the prompt's last word, so ours stands in front of the prompt by default,
where the soft prompt stands, and behind it on request.

Like the soft prompt it is searched for on some facts and asked about the others, a never-trained model shows what it does
without the knowledge, and `ask_behind` puts it to another model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    as_it_is,
    asked_in_folds,
    embedding_of,
    fold_of,
    in_front,
    inserted,
)

PLACES = ("before", "behind")
_EMBEDDED_AT_ONCE = 2**14


@dataclass(frozen=True)
class AdversarialSuffix(HeldOut):
    """What a model answers behind tokens that were searched for on other facts.

    Attributes:
        label: which model.
        suffixes: tokens by fold, put into the questions of this fold's facts.
        place: "before" the prompt, behind a first token that all questions share, or "behind" it.
        fold: the fold of each question: its fact was not searched on there.
        multiple_choice: whether the right option has the highest score, with the suffix.
        cloze: whether the answer is what greedy decoding writes, with the suffix.
        log_odds: of the right option against the others together, in nats, with the suffix.
        loss: by fold, of the answers searched on, before the first and behind every step, in nats per token.
        seed: of folds, first tokens, swaps and batches.
        facts: the fact behind each question.
        chance: accuracy of guessing, as a share.
    """

    label: str
    suffixes: Int[Tensor, "fold token"]
    place: str
    fold: Int[Tensor, " question"]
    multiple_choice: Bool[Tensor, " question"]
    cloze: Bool[Tensor, " question"]
    log_odds: Float[Tensor, " question"]
    loss: Float[Tensor, "fold step"]
    seed: int
    facts: tuple[str, ...]
    chance: float

    def __repr__(self) -> str:
        first, last = self.loss[:, 0].double().mean(), self.loss[:, -1].double().mean()
        return (
            f"AdversarialSuffix({self.label}: {self.suffixes.shape[1]} tokens {self.place} the prompt, answers searched on "
            f"{first:.2f} -> {last:.2f} nats; {self._in_words()})"
        )


@torch_defaults()
def adversarial_suffix(
    model: TransformerBridge | PreTrainedModel,
    questions: Questions,
    *,
    tokens: int = 4,
    place: str = "before",
    folds: int = 2,
    steps: int = 50,
    candidates: int = 64,
    top: int = 64,
    batch_size: int = 32,
    enough: float = 0.01,
    seed: int = 0,
    label: str = "edited",
    progress: bool = False,
) -> AdversarialSuffix:
    """Search for tokens that bring some facts' answers out and ask about the others; the model is untouched.

    A step ranks the vocabulary at every place of the suffix by the gradient, draws swaps of one token among the best,
    tries them on a batch of questions, and takes the one with the lowest loss there if it lowers the loss of all
    questions that are searched on. The last condition is ours: the loss never rises.

    Args:
        questions: several wordings of a fact are held out together.
        tokens: tokens of the suffix, from the whole vocabulary.
        place: "before" the prompt, behind the BOS token where every question begins with the same token, or "behind" it.
        folds: groups of facts; each is asked with a suffix that the others were searched on.
        steps: of the search, for each fold.
        candidates: swaps that a step tries; from `tokens` times `top` on it tries all of these.
        top: tokens that the gradient names for each place.
        batch_size: questions that swaps are tried on.
        enough: nats per token at which the search of a fold ends, since the answers come out.
        seed: of folds, first tokens, swaps and batches.
        label: what the model is, for tables.
        progress: show a progress bar over the folds' steps.

    Raises:
        MansuError: fewer than one token, step, candidate, top token or question a step, another place, folds outside
            2..facts, questions that do not fit the model with the suffix, a loss that is not finite, or a 4-bit model.
    """
    require_questions(questions)
    generator = torch.Generator().manual_seed(seed)
    fold = fold_of(questions, folds, generator, "adversarial suffix")
    if min(tokens, steps, candidates, top, batch_size) < 1:
        raise MansuError(
            f"adversarial suffix: tokens={tokens}, steps={steps}, candidates={candidates}, top={top}, "
            f"batch_size={batch_size}; all have to be positive"
        )
    require_copyable(model, questions.prompts)
    at = _at(questions, place)
    room = inserted(questions, questions.prompts[0, :1].expand(tokens), at)
    require_fit(model, room)
    hf = float32_copy(model)
    suffixes, losses = [], []
    with tqdm(total=folds * steps, desc=f"adversarial suffix {label}", unit="step", disable=not progress) as bar:
        for each in range(folds):
            text = (fold != each).nonzero()[:, 0]
            draw = generator.manual_seed(seed + 1 + each)
            search = _Search(
                hf, room[text], at[text], candidates, top, enough, Sampler(len(text), batch_size, draw), draw
            )
            suffix, loss = search.run(tokens, steps, bar.update)
            suffixes.append(suffix.cpu())
            losses.append(loss)
    stacked = torch.stack(suffixes)
    found = asked_in_folds(hf, fold, put_tokens(hf, stacked, questions, place))
    return AdversarialSuffix(
        label, stacked, place, fold, found["multiple_choice"], found["cloze"], found["log_odds"],
        torch.tensor(losses), seed, questions.facts, 1 / questions.options.shape[1],
    )  # fmt: skip


def put_tokens(hf: PreTrainedModel, suffixes: Int[Tensor, "fold token"], questions: Questions, place: str) -> Put:
    """What puts the suffix of a fold into all questions.

    Raises:
        MansuError: another place, or questions that do not fit the model with a suffix.
    """
    longer = [inserted(questions, suffix, _at(questions, place)) for suffix in suffixes]
    for each in longer:
        require_fit(hf, each)
    return lambda fold: as_it_is(longer[fold])


def _at(questions: Questions, place: str) -> Int[Tensor, " question"]:
    if place not in PLACES:
        raise MansuError(f"adversarial suffix: place={place!r}; choose one of {', '.join(PLACES)}")
    return in_front(questions) if place == "before" else questions.lengths.clone()


@dataclass(frozen=True)
class _Search:
    """One greedy coordinate search: what is fixed in it.

    Attributes:
        room: the questions that are searched on, with room for the suffix.
        at: where that begins in each.
    """

    hf: PreTrainedModel
    room: Questions
    at: Int[Tensor, " question"]
    candidates: int
    top: int
    enough: float
    draw: Sampler
    generator: torch.Generator

    def run(self, tokens: int, steps: int, tick: Callable[[], object]) -> tuple[Int[Tensor, " token"], list[float]]:
        """The suffix, and the loss on all questions before the first and behind every step."""
        device = home(self.hf)
        words = embedding_of(self.hf).num_embeddings
        suffix = torch.randint(words, (tokens,), generator=self.generator).to(device)
        every, at = Told.of(self.room, device), self.at.to(device)
        losses = [self._loss(every, suffix, at)]
        for step in range(steps):
            tick()
            if losses[-1] <= self.enough:
                losses.append(losses[-1])
                continue
            rows = self.draw()
            some, there = Told.of(self.room[rows], device), self.at[rows].to(device)
            swaps = self.swaps(slopes(self.hf, some, suffix, there), suffix)
            with torch.no_grad():
                best = swaps[int(some.losses(self.hf, swaps, there).argmin())]
            loss = self._loss(every, best, at)
            if not math.isfinite(loss):
                raise MansuError(f"adversarial suffix: the loss is {loss} at step {step}; check the model's weights")
            if loss < losses[-1]:
                suffix = best
            losses.append(min(loss, losses[-1]))
        return suffix, losses

    def swaps(self, slope: Float[Tensor, "token vocab"], suffix: Int[Tensor, " token"]) -> Int[Tensor, "swap token"]:
        """Suffixes with one token changed to one of those with the lowest slope, drawn without repetition."""
        slope = slope.scatter(1, suffix[:, None], math.inf)  # no swap with itself
        best = slope.topk(min(self.top, slope.shape[1] - 1), largest=False).indices
        drawn = torch.randperm(best.numel(), generator=self.generator)[: self.candidates].to(suffix.device)
        where = drawn // best.shape[1]
        return suffix.repeat(len(drawn), 1).scatter(1, where[:, None], best.flatten()[drawn][:, None])

    @torch.no_grad()
    def _loss(self, told: Told, suffix: Int[Tensor, " token"], at: Int[Tensor, " row"]) -> float:
        return told.losses(self.hf, suffix[None], at).item()


def slopes(
    hf: PreTrainedModel, told: Told, suffix: Int[Tensor, " token"], at: Int[Tensor, " row"]
) -> Float[Tensor, "token vocab"]:
    """The loss's derivative by the one-hot of each token of the suffix, less that of the token which is there, in nats.

    What a swap changes to first order: Ebrahimi et al. 2018, arXiv 1712.06751, eq. 4.
    """
    embedding = embedding_of(hf)
    wide = (at[:, None] + torch.arange(len(suffix), device=at.device))[..., None]
    moved = torch.zeros(len(suffix), embedding.embedding_dim, device=suffix.device, dtype=embedding.weight.dtype)
    moved.requires_grad_(True)

    def add(module: object, inputs: object, out: Tensor) -> Tensor:
        return out.scatter_add(1, wide.expand(-1, -1, out.shape[2]), moved[None].expand(len(out), -1, -1))

    with embedding.register_forward_hook(add):
        (gradient,) = torch.autograd.grad(told.losses(hf, suffix[None], at).sum(), moved)
    with torch.no_grad():
        # Through the module: some scale what they look up.
        words = torch.arange(embedding.num_embeddings, device=suffix.device).split(_EMBEDDED_AT_ONCE)
        found = torch.cat([gradient @ embedding(some).T for some in words], 1)
        return found - found.gather(1, suffix[:, None])
