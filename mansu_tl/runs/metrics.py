"""What is measured: one number per pair for attribution, and accuracy on multiple-choice questions.

A metric maps the logits at each pair's last real token to one number per pair; higher means that the model shows the
knowledge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import PromptPairs, Questions, Sequences
from mansu_tl.data.fit import require_fit, require_questions
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models.kinds import way_to_load
from mansu_tl.models.state import home, require_ready
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.passes import last_token_only, run

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


def metric_name(metric: Metric) -> str:
    """How the metric is called in results."""
    return getattr(metric, "__name__", type(metric).__name__)


def measured(metric: Metric, logits: Float[Tensor, "pair vocab"], pairs: PromptPairs) -> Float[Tensor, " pair"]:
    """The metric of each pair, checked."""
    name = metric_name(metric)
    values = metric(logits, pairs)
    if values.shape != (len(pairs),):
        raise MansuError(
            f"metric {name!r} gave shape {tuple(values.shape)} for {len(pairs)} pairs; return one number per pair"
        )
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).nonzero()[0])
        raise MansuError(f"metric {name!r} is {values[bad].item()} for pair {bad}; check the weights and the metric")
    if logits.requires_grad and not values.requires_grad:
        raise MansuError(f"metric {name!r} does not depend on the logits; compute it from its first argument")
    return values


def last_logits(
    model: TransformerBridge | torch.nn.Module,
    tokens: Int[Tensor, "row pos"],
    lengths: Int[Tensor, " row"],
    batch_size: int = 256,
) -> Float[Tensor, "row vocab"]:
    """Logits at the last real token of right-padded prompts, in fp32, on the model's device.

    Works on a bridge and on a plain HF model; only that token is unembedded. Padding lies to its right, so causal
    attention never sees it, whatever stands there.

    Raises:
        MansuError: no language model, a token that it has no embedding for, or a prompt longer than it has positions.
    """
    _require_language_model(model)
    rows = Sequences(tokens, lengths)
    require_fit(model, rows)
    parts = [_last_logits(model, rows[slice(i, i + batch_size)]) for i in range(0, len(rows), batch_size)]
    return torch.cat(parts)


@torch.no_grad()
def _last_logits(model: TransformerBridge | torch.nn.Module, rows: Sequences) -> Float[Tensor, "row vocab"]:
    """`last_logits` of one batch."""
    rows = rows.to(home(model))
    if isinstance(model, TransformerBridge):
        return run(model, rows.tokens, rows.lengths).float()
    plain: Any = model
    with last_token_only(plain, rows.lengths):
        logits = plain(rows.tokens, use_cache=False).logits
    return logits[:, 0].float().to(rows.tokens.device)


def _require_language_model(model: object) -> None:
    """Refuse what gives no logits: a hooked model, or any module with an output embedding, a PeftModel too, does."""
    if isinstance(model, TransformerBridge):
        return
    head = getattr(model, "get_output_embeddings", lambda: None)() if isinstance(model, torch.nn.Module) else None
    if head is None:
        raise MansuError(f"model: {way_to_load(model)}")


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

    Args:
        model: a hooked model, or a plain transformers one.

    Raises:
        MansuError: the set is empty or no question set, it does not fit the model, or the model's logits are not finite.

    Example:
        >>> model, task = mtl.load("pocket"), mtl.load_task("pocket")
        >>> mtl.accuracy(model, task.questions["forget"]).mc_percent
        100.0
    """
    _require_language_model(model)
    require_questions(questions)
    if len(questions) == 0:
        raise MansuError("accuracy: the question set is empty; pass at least one question")
    require_fit(model, questions)
    require_ready(model, questions.prompts)
    right, cloze, log_odds = [], [], []
    for start in range(0, len(questions), batch_size):
        batch = questions[slice(start, start + batch_size)]
        logits = _last_logits(model, Sequences(batch.prompts, batch.lengths))
        broken = (~torch.isfinite(logits).all(-1)).nonzero()
        if len(broken):
            bad = start + int(broken[0])
            raise MansuError(
                f"accuracy: logits of question {bad} ({questions.facts[bad]}) are not finite; check the weights"
            )
        choices = batch.choices.to(logits.device)
        options = logits.gather(1, choices)
        others = options[:, 1:]
        right.append((options[:, 0] > others.max(1).values).cpu())
        cloze.append((logits.argmax(1) == choices[:, 0]).cpu())
        log_odds.append((options[:, 0] - others.logsumexp(1)).cpu())
    return Accuracy(
        multiple_choice=torch.cat(right), cloze=torch.cat(cloze), log_odds=torch.cat(log_odds), facts=questions.facts
    )
