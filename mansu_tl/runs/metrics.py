"""What is measured: one number per pair for attribution, and accuracy on multiple-choice questions.

A metric maps logits to one number per pair; higher means that the model shows the knowledge. Where options are one token,
it is given the logits at each pair's last real token and the pairs. Where they have several, it is given the logits at all
positions that predict a token of an option, and a `Forced` that says which these are; from it `log_probs` makes the
options' teacher-forced log-probabilities. A metric with an attribute `options_read` is only given so many options, the
answer first, which saves the others' runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import PromptPairs, Questions, Sequences
from mansu_tl.data.fit import require_fit, require_questions
from mansu_tl.data.forced import Asked, Forced, forced
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models.kinds import way_to_load
from mansu_tl.models.limits import vocabulary_size
from mansu_tl.models.state import home, require_ready
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.passes import last_token_only, run

Metric = Callable[[Float[Tensor, "place vocab"], Any], Float[Tensor, " pair"]]
M = TypeVar("M", bound=Callable[..., Tensor])
# Logits of a question set that exist at one time.
_MOST_NUMBERS = 2**26


def reads(options: int | None) -> Callable[[M], M]:
    """Say of a metric how many options it reads, the answer first; None = all."""

    def mark(metric: M) -> M:
        metric.options_read = options  # type: ignore[attr-defined]
        return metric

    return mark


def options_read(metric: Metric) -> int | None:
    """How many options a metric reads, the answer first; None = all.

    Raises:
        MansuError: it does not take logits and pairs, as TransformerLens's metrics, which take logits alone.
    """
    _require_metric(metric)
    found: int | None = getattr(metric, "options_read", None)
    return found


def _require_metric(metric: Metric) -> None:
    """Refuse a metric that cannot be called with logits and pairs, before anything is run for it."""
    try:
        inspect.signature(metric).bind(None, None)
    except TypeError as problem:
        raise MansuError(
            f"metric {metric_name(metric)!r}: it is called with the logits behind each prompt [pair, vocab] and the pairs, "
            f"and returns one number per pair ({problem}); write it as f(logits, pairs), for example "
            "mtl.runs.logit_difference"
        ) from None
    except ValueError:
        # A callable written in C tells no signature; the call itself will show it.
        return


@reads(2)
def logit_difference(
    logits: Float[Tensor, "place vocab"], pairs: PromptPairs | Forced[PromptPairs]
) -> Float[Tensor, " pair"]:
    """Logit of the answer minus logit of the corrupt prompt's answer (option 1), in nats.

    Where options have several tokens, the difference of their teacher-forced log-probabilities, which for one token each is
    the same.
    """
    if isinstance(pairs, Forced):
        found = pairs.log_probs(logits)
        return found[:, 0] - found[:, 1]
    rows = torch.arange(len(pairs), device=logits.device)
    return logits[rows, pairs.answers] - logits[rows, pairs.distractors[:, 0]]


@reads(1)
def answer_log_prob(
    logits: Float[Tensor, "place vocab"], pairs: PromptPairs | Forced[PromptPairs]
) -> Float[Tensor, " pair"]:
    """Log-probability of the answer over the whole vocabulary, teacher-forced and summed over its tokens, in nats."""
    if isinstance(pairs, Forced):
        return pairs.log_probs(logits)[:, 0]
    return logits.log_softmax(-1).gather(1, pairs.answers[:, None])[:, 0]


def choice_log_odds(
    logits: Float[Tensor, "place vocab"], pairs: PromptPairs | Forced[PromptPairs]
) -> Float[Tensor, " pair"]:
    """Log-odds of the answer against all the distractors together, in nats; of several tokens, by the mean per token."""
    if isinstance(pairs, Forced):
        return log_odds(pairs.per_token(logits))
    return logits.gather(1, pairs.answers[:, None])[:, 0] - logits.gather(1, pairs.distractors).logsumexp(1)


def log_odds(scores: Float[Tensor, "pair option"]) -> Float[Tensor, " pair"]:
    """Log-odds of the first option against the others together."""
    return scores[:, 0] - scores[:, 1:].logsumexp(1)


def kl_divergence(logits: Float[Tensor, "row vocab"], reference: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
    """KL(reference || model) of the next-token distribution, in nats."""
    ref = reference.log_softmax(-1)
    return (ref.exp() * (ref - logits.log_softmax(-1))).sum(-1)


def metric_name(metric: Metric) -> str:
    """How the metric is called in results."""
    return getattr(metric, "__name__", type(metric).__name__)


def measured(
    metric: Metric, logits: Float[Tensor, "place vocab"], pairs: Forced[PromptPairs]
) -> Float[Tensor, " pair"]:
    """The metric of each pair, checked."""
    name = metric_name(metric)
    values = metric(logits, pairs.told)
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
    parts = [rows[slice(i, i + batch_size)].to(home(model)) for i in range(0, len(rows), batch_size)]
    return torch.cat([asked_logits(model, part.tokens, part.lengths) for part in parts])


@torch.no_grad()
def asked_logits(
    model: TransformerBridge | torch.nn.Module, tokens: Int[Tensor, "row pos"], asked: Asked
) -> Float[Tensor, "place vocab"]:
    """Logits of one batch at some positions, of rows' lengths the last ones, in fp32; the batch is where the model is."""
    if isinstance(model, TransformerBridge):
        return run(model, tokens, asked).float()
    plain: Any = model
    with last_token_only(plain, asked):
        logits = plain(tokens, use_cache=False).logits
    return logits[:, 0].float().to(tokens.device)


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
        multiple_choice: the right option has the highest log-probability of all options, by the mean per token (ties count
            as wrong).
        cloze: the right answer is what greedy decoding writes: each of its tokens is the most likely one of the whole
            vocabulary.
        log_odds: log-odds of the right option against the other options together, by the mean per token, in nats.
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
    right, cloze, odds = [], [], []
    size = _questions_at_once(model, questions, batch_size)
    for start in range(0, len(questions), size):
        batch = forced(questions[slice(start, start + size)].to(home(model)))
        logits = asked_logits(model, batch.clean, batch.places)
        broken = (~torch.isfinite(logits).all(-1)).nonzero()
        if len(broken):
            bad = start + int(batch.owner[batch.places.rows[broken[0]]])
            raise MansuError(
                f"accuracy: logits of question {bad} ({questions.facts[bad]}) are not finite; check the weights"
            )
        options = option_scores(batch, logits)
        right.append(first_is_best(options).cpu())
        cloze.append(batch.greedy(logits).cpu())
        odds.append(log_odds(options).cpu())
    return Accuracy(
        multiple_choice=torch.cat(right), cloze=torch.cat(cloze), log_odds=torch.cat(odds), facts=questions.facts
    )


def option_scores(asked: Forced[Any], logits: Float[Tensor, "place vocab"]) -> Float[Tensor, "row option"]:
    """What options are compared by: their logits where each is one token, else their mean log-probability per token."""
    if asked.targets is None:
        return logits.gather(1, asked.given.options[:, : asked.count, 0].to(logits.device))
    return asked.per_token(logits)


def first_is_best(scores: Float[Tensor, "row option"]) -> Bool[Tensor, " row"]:
    """Whether the first option has the highest score; ties count as no."""
    return scores[:, 0] > scores[:, 1:].max(1).values


def _questions_at_once(model: TransformerBridge | torch.nn.Module, questions: Questions, batch_size: int) -> int:
    """Questions in a batch, fewer than asked for where options of several tokens make each one many positions."""
    if questions.options.shape[2] == 1:
        return batch_size
    asked = int(questions.option_lengths.sum(1).max())
    vocabulary = vocabulary_size(model) or 1
    return max(1, min(batch_size, _MOST_NUMBERS // (asked * vocabulary)))
