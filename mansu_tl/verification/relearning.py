"""Relearning: how fast does fine-tuning on a few forget facts bring the others back?

Fine-tuning in fp32 of a plain copy, all of it or by low-rank adapters, AdamW with a constant learning rate, the attack
after e.g. Lynch et al. 2024 (arXiv 2402.16835) and Deeb & Roger 2024 (arXiv 2410.08827): train on some facts, ask about the
others.

What comes back is measured against two things. The *prior*: fine-tuning on answers makes those answers likelier for
anything, so each question is also put to the same model about names that stand for nothing, in the same wording and
with the same options; excess = the question minus that mean (our definition). The *never-trained model* under the same
attack: what can be learnt from the attack alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from mansu_tl.data import Questions, Sequences
from mansu_tl.data.fit import require_fit
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import float32_copy, home, require_copyable
from mansu_tl.results.intervals import with_interval
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.metrics import accuracy, last_logits
from mansu_tl.runs.values import Values, predicted
from mansu_tl.unlearning.batches import Sampler
from mansu_tl.verification.adapters import Trained
from mansu_tl.verification.attacks import Attack

MEASURES = ("multiple_choice", "cloze", "log_odds")
_AS_IT_IS: Values = MappingProxyType({})
_MILESTONES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class RelearningCurve(Result):
    """What a model answers while it is fine-tuned.

    Attributes:
        label: which model.
        attack: what it was trained on.
        kind: "facts" or "text".
        learning_rate: of AdamW.
        seed: of the batches.
        steps: the steps at which it was asked.
        values: per measure (`MEASURES`), step and question: right by multiple choice (0 or 1), right by cloze (0 or
            1), log-odds of the right option in nats.
        prior: the same, averaged over the never-seen names in the question's wording; NaN where there are none.
        loss: the training loss before each of these steps, in nats; the mean over all the training text.
        facts: the fact behind each question.
    """

    label: str
    attack: str
    kind: str
    learning_rate: float
    seed: int
    steps: tuple[int, ...]
    values: Float[Tensor, "measure step question"]
    prior: Float[Tensor, "measure step question"]
    loss: Float[Tensor, " step"]
    facts: tuple[str, ...]

    @property
    def excess(self) -> Float[Tensor, "measure step question"]:
        """The values minus the model's own prior, question by question."""
        return self.values - self.prior

    def at(self, measure: str = "multiple_choice", step: int = -1, *, excess: bool = False) -> float:
        """A measure after one of `steps` (-1 = the last), in percent (log-odds in nats), `excess` = minus the prior.

        Raises:
            MansuError: no such measure, or a step at which it was not asked.
        """
        source = self.excess if excess else self.values
        return scale_of(measure) * source[measure_index(measure), self.index_of(step)].double().mean().item()

    def index_of(self, step: int) -> int:
        """The row of a step; -1 is the last.

        Raises:
            MansuError: a step at which it was not asked.
        """
        if step not in (-1, *self.steps):
            raise MansuError(f"relearning: {self.label!r} was not asked at step {step}; choose one of {self.steps}")
        return len(self.steps) - 1 if step == -1 else self.steps.index(step)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a step and measure: value, prior, excess, each in percent (log-odds in nats), and 95 % intervals
        over facts of value and excess."""
        same = {"label": self.label, "attack": self.attack, "learning_rate": self.learning_rate}
        rows = []
        for m, measure in enumerate(MEASURES):
            scale = scale_of(measure)
            for s, step in enumerate(self.steps):
                row = same | {"step": step, "measure": measure}
                row |= with_interval("value", self.values[m, s], self.facts, scale=scale, bounds="interval")
                row |= {"prior": scale * self.prior[m, s].double().mean().item()}
                row |= with_interval("excess", self.excess[m, s], self.facts, scale=scale)
                rows.append(row | {"loss": self.loss[s].item()})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return (
            f"RelearningCurve({self.label}, {self.attack}, lr {self.learning_rate:g}: MC {self.at(step=self.steps[0]):.1f}"
            f" -> {self.at():.1f} % in {self.steps[-1]} steps, over its prior {self.at(excess=True):+.1f}; cloze "
            f"{self.at('cloze'):.1f} %)"
        )

    def _tables(self) -> Sequence[Table]:
        frame = self.to_dataframe().drop(columns=["label", "attack", "learning_rate"])
        return (Table(frame, form="{:.2f}".format, rows=24),)


@torch_defaults()
def relearn(
    model: TransformerBridge | PreTrainedModel,
    attack: Attack,
    *,
    steps: int = 50,
    learning_rate: float = 3e-4,
    batch_size: int = 32,
    weight_decay: float = 0.01,
    rank: int = 0,
    ask_at: Sequence[int] | None = None,
    seed: int = 0,
    label: str = "edited",
    progress: bool = False,
) -> RelearningCurve:
    """Fine-tune a copy of the model on the attack's text and ask its questions along the way; the model is untouched.

    To attack the deployed form, pass its twin: `quantize(edited, "nf4")`.

    Args:
        steps: optimizer steps.
        learning_rate: constant, of AdamW over all that is trained, in fp32.
        batch_size: sequences a step; every sequence comes once a round.
        rank: of adapters on the linear layers (LoRA), which alone are trained and are named in the curve's `attack`; 0 =
            every parameter is.
        ask_at: steps at which to ask; 0, 1, 2, 5, 10, 20, 50, ... and the last where not given.
        seed: of the batches: the same seed gives the same curve.
        label: what the model is, for tables and figures.
        progress: show a progress bar.

    Raises:
        MansuError: fewer than one step, a rate or batch size that is not positive, a rank below 0, steps to ask at outside
            0..steps, an empty attack, a loss that is not finite, or a 4-bit model.
    """
    asked = _steps_to_ask(steps, ask_at)
    if not learning_rate > 0 or batch_size < 1:
        raise MansuError(
            f"relearning: learning_rate={learning_rate}, batch_size={batch_size}; both have to be positive"
        )
    if rank < 0:
        raise MansuError(f"relearning: rank={rank}; choose 1 or more for adapters, or 0 to train every parameter")
    if len(attack.text) == 0 or len(attack.questions) == 0:
        raise MansuError(
            f"attack {attack.name!r}: {len(attack.text)} sequences, {len(attack.questions)} questions; give some"
        )
    require_copyable(model, attack.text.tokens)
    require_fit(model, attack.text)
    hf = float32_copy(model)
    weights = Trained.of(hf, rank, seed)
    text, trained = attack.text.to(home(hf)), attack.trained.to(home(hf))
    optimizer = torch.optim.AdamW(weights.moving, lr=learning_rate, weight_decay=weight_decay)
    draw = Sampler(len(text), batch_size, torch.Generator().manual_seed(seed))
    values, priors, losses = [], [], []
    for step in tqdm(range(steps + 1), desc=f"relearning {label}", unit="step", disable=not progress):
        if step in asked:
            with weights.merged():
                losses.append(_mean_loss(hf, text, trained))
                if not math.isfinite(losses[-1]):
                    raise MansuError(
                        f"relearning: the loss is {losses[-1]} at step {step}; lower learning_rate={learning_rate}"
                    )
                answers = accuracy(hf, attack.questions)
                values.append(torch.stack([answers.multiple_choice.float(), answers.cloze.float(), answers.log_odds]))
                priors.append(_prior(hf, attack))
        if step < steps:
            optimizer.zero_grad()
            rows = draw()
            _loss(hf, text[rows], trained[rows], weights.values()).mean().backward()
            optimizer.step()
    name = f"{attack.name}, LoRA {rank}" if rank else attack.name
    return RelearningCurve(
        label, name, attack.kind, float(learning_rate), seed, asked, torch.stack(values, 1),
        torch.stack(priors, 1), torch.tensor(losses), attack.questions.facts,
    )  # fmt: skip


def measure_index(measure: str) -> int:
    """The row of a measure in a curve's tensors.

    Raises:
        MansuError: no such measure.
    """
    if measure not in MEASURES:
        raise MansuError(f"relearning: no measure {measure!r}; choose one of {', '.join(MEASURES)}")
    return MEASURES.index(measure)


def scale_of(measure: str) -> float:
    """What turns a measure's mean into what is shown: percent, and nats for log-odds."""
    return 1.0 if measure == "log_odds" else 100.0


def _steps_to_ask(steps: int, ask_at: Sequence[int] | None) -> tuple[int, ...]:
    if steps < 1:
        raise MansuError(f"relearning: steps={steps}; train for at least one")
    if ask_at is None:
        return tuple(sorted({*(s for s in _MILESTONES if s < steps), steps}))
    wrong = [s for s in ask_at if not 0 <= s <= steps]
    if wrong or not ask_at:
        raise MansuError(f"relearning: ask_at={tuple(ask_at)}; choose steps in 0..{steps}")
    return tuple(sorted(set(ask_at)))


def _loss(
    hf: PreTrainedModel, batch: Sequences, trained: Int[Tensor, " sequence"], values: Values = _AS_IT_IS
) -> Float[Tensor, " token"]:
    """Cross-entropy of every token that is trained on, in nats."""
    found = predicted(hf, values, batch)
    counts = found.places >= (batch.lengths - 1 - trained)[found.rows]
    return torch.nn.functional.cross_entropy(found.logits[counts], found.targets[counts], reduction="none")


@torch.no_grad()
def _mean_loss(hf: PreTrainedModel, text: Sequences, trained: Int[Tensor, " sequence"], batch_size: int = 256) -> float:
    pieces = [slice(start, start + batch_size) for start in range(0, len(text), batch_size)]
    parts = [_loss(hf, text[piece], trained[piece]) for piece in pieces]
    return torch.cat(parts).double().mean().item()


def _prior(hf: PreTrainedModel, attack: Attack) -> Float[Tensor, "measure question"]:
    """How the model answers each question about names that stand for nothing."""
    questions, unseen = attack.questions, attack.unseen
    if len(unseen) == 0:
        return torch.full((len(MEASURES), len(questions)), float("nan"))
    if questions.options.shape[2] > 1:
        return _prior_of_texts(hf, attack)
    device = home(hf)
    logits = last_logits(hf, unseen.tokens.to(device), unseen.lengths.to(device)).cpu()
    best, means = logits.argmax(1), []
    for alike, choices in zip(attack.alike.cpu(), questions.choices.cpu(), strict=True):
        options = logits[alike][:, choices]
        right, others = options[:, 0], options[:, 1:]
        hits = [right > others.max(1).values, best[alike] == choices[0]]
        means.append(torch.stack([*(hit.float().mean() for hit in hits), (right - others.logsumexp(1)).mean()]))
    return torch.stack(means, 1)


def _prior_of_texts(hf: PreTrainedModel, attack: Attack) -> Float[Tensor, "measure question"]:
    """The same for options of several tokens: each question's, behind every prompt of its wording."""
    questions, unseen = attack.questions, attack.unseen
    of, prompts = attack.alike.cpu().nonzero(as_tuple=True)
    found = accuracy(
        hf,
        Questions(
            unseen.tokens.cpu()[prompts],
            unseen.lengths.cpu()[prompts],
            questions.options.cpu()[of],
            tuple(questions.facts[i] for i in of.tolist()),
        ),
    )
    values = torch.stack([found.multiple_choice.float(), found.cloze.float(), found.log_odds])
    counts = torch.bincount(of, minlength=len(questions))
    return torch.zeros(len(MEASURES), len(questions)).index_add(1, of, values) / counts
