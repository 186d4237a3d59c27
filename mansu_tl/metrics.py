"""What is measured: one number per pair for attribution, and accuracy on multiple-choice questions.

A metric maps the logits at each pair's last real token to one number per pair; higher means that the model shows the
knowledge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import PromptPairs, Questions
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models.state import home, require_ready
from mansu_tl.notebook import Result, Table

__all__ = [
    "METRICS",
    "Accuracy",
    "Metric",
    "accuracy",
    "answer_log_prob",
    "choice_log_odds",
    "kl_divergence",
    "last_logits",
    "logit_difference",
]

Metric = Callable[[Float[Tensor, "pair vocab"], PromptPairs], Float[Tensor, " pair"]]


def logit_difference(logits: Float[Tensor, "pair vocab"], pairs: PromptPairs) -> Float[Tensor, " pair"]:
    """Logit of the answer minus logit of the corrupt prompt's answer (distractor column 0), in nats."""
    rows = torch.arange(len(pairs), device=logits.device)
    return logits[rows, pairs.answers] - logits[rows, pairs.distractors[:, 0]]


def answer_log_prob(logits: Float[Tensor, "pair vocab"], pairs: PromptPairs) -> Float[Tensor, " pair"]:
    """Log-probability of the answer over the whole vocabulary, in nats."""
    return logits.log_softmax(-1).gather(1, pairs.answers[:, None])[:, 0]


def choice_log_odds(logits: Float[Tensor, "pair vocab"], pairs: PromptPairs) -> Float[Tensor, " pair"]:
    """Log-odds of the answer against all the distractors together, in nats."""
    return logits.gather(1, pairs.answers[:, None])[:, 0] - logits.gather(1, pairs.distractors).logsumexp(1)


def kl_divergence(logits: Float[Tensor, "row vocab"], reference: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
    """KL(reference || model) of the next-token distribution, in nats."""
    ref = reference.log_softmax(-1)
    return (ref.exp() * (ref - logits.log_softmax(-1))).sum(-1)


METRICS: dict[str, Metric] = {
    "logit_difference": logit_difference,
    "answer_log_prob": answer_log_prob,
    "choice_log_odds": choice_log_odds,
}


@torch.no_grad()
def last_logits(
    model: TransformerBridge | torch.nn.Module,
    tokens: Int[Tensor, "row pos"],
    lengths: Int[Tensor, " row"],
    batch_size: int = 256,
) -> Float[Tensor, "row vocab"]:
    """Logits at the last real token of right-padded prompts, in fp32.

    Works on a bridge and on a plain HF model. Padding lies to the right of the last token, so causal attention never
    sees it.
    """
    out = []
    for start in range(0, tokens.shape[0], batch_size):
        chunk = tokens[start : start + batch_size]
        last = lengths[start : start + batch_size] - 1
        result = model(chunk)
        logits = result if isinstance(result, Tensor) else result.logits
        out.append(logits[torch.arange(chunk.shape[0], device=chunk.device), last.to(chunk.device)].float())
    return torch.cat(out)


@dataclass(frozen=True)
class Accuracy(Result):
    """How a model answers a question set, question by question.

    Attributes:
        multiple_choice: the right option has the highest logit of all options (ties count as wrong).
        cloze: the right answer is the most likely token of the whole vocabulary.
        log_odds: log-odds of the right option against the other options together, in nats.
        facts: the fact behind each question.
    """

    multiple_choice: Bool[Tensor, " question"]
    cloze: Bool[Tensor, " question"]
    log_odds: Float[Tensor, " question"]
    facts: tuple[str, ...]

    @property
    def mc_percent(self) -> float:
        """Multiple-choice accuracy, in percent."""
        return 100 * self.multiple_choice.double().mean().item()

    @property
    def cloze_percent(self) -> float:
        """Cloze accuracy, in percent."""
        return 100 * self.cloze.double().mean().item()

    def to_dataframe(self) -> pd.DataFrame:
        """One row a question: its fact, both verdicts, and the log-odds in nats."""
        return pd.DataFrame(
            {
                "fact": self.facts,
                "multiple_choice": self.multiple_choice.tolist(),
                "cloze": self.cloze.tolist(),
                "log_odds": self.log_odds.tolist(),
            }
        )

    def _tables(self) -> Sequence[Table]:
        frame = self.to_dataframe().sort_values("log_odds", kind="stable")
        return (Table(frame, "lowest log-odds first", "{:.2f}".format, rows=8),)

    def __repr__(self) -> str:
        return f"Accuracy({len(self.facts)} questions: MC {self.mc_percent:.1f} %, cloze {self.cloze_percent:.1f} %)"


@torch_defaults()
def accuracy(model: TransformerBridge | torch.nn.Module, questions: Questions, batch_size: int = 256) -> Accuracy:
    """Multiple-choice and cloze accuracy of a model on a question set, deterministic (no sampling).

    Raises:
        MansuError: the set is empty, or the model's logits are not finite.
    """
    if len(questions) == 0:
        raise MansuError("accuracy: the question set is empty; pass at least one question")
    device = home(model)
    require_ready(model, questions.prompts)
    logits = last_logits(model, questions.prompts.to(device), questions.lengths.to(device), batch_size).cpu()
    if not torch.isfinite(logits).all():
        bad = int((~torch.isfinite(logits).all(-1)).nonzero()[0])
        raise MansuError(
            f"accuracy: logits of question {bad} ({questions.facts[bad]}) are not finite; check the weights"
        )
    choices = questions.choices.cpu()
    options = logits.gather(1, choices)
    others = options[:, 1:]
    return Accuracy(
        multiple_choice=options[:, 0] > others.max(1).values,
        cloze=logits.argmax(1) == choices[:, 0],
        log_odds=options[:, 0] - others.logsumexp(1),
        facts=questions.facts,
    )


def __dir__() -> list[str]:
    return sorted(__all__)
