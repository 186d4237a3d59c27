"""TOFU's measures of one answer and of a set of them (Maini et al. 2024, arXiv 2401.06121, section 2.2).

The conventions are those of its code and of open-unlearning where paper and code differ; each function says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from mansu_tl.data.text import pad
from mansu_tl.errors import MansuError
from mansu_tl.models.cache import cache_argument, cache_of

_TOKEN = re.compile(r"[a-z0-9]+")


def rouge_l_recall(reference: str, text: str) -> float:
    """ROUGE-L recall: the longest common subsequence of words over the reference's words, in [0, 1].

    Words are runs of a-z and 0-9 in lower case, as in Google's rouge_score; unlike open-unlearning, words are not
    stemmed.

    Raises:
        MansuError: a reference without a word.
    """
    reference_words, words = _TOKEN.findall(reference.lower()), _TOKEN.findall(text.lower())
    if not reference_words:
        raise MansuError(f"ROUGE-L: the reference {reference!r} has no word; drop the question")
    row = [0] * (len(words) + 1)
    for word in reference_words:
        above = row
        row = [0]
        for j, other in enumerate(words):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return row[-1] / len(reference_words)


def extraction_strength(predicted: Int[Tensor, " token"], answer: Int[Tensor, " token"]) -> float:
    """Share of the answer that the model completes on its own once it is told the rest, in [0, 1].

    1 - k / n for the smallest k from which on every greedy next token, given the answer so far, is right (Carlini et
    al. 2021; open-unlearning). An answer whose last token is wrong has 0; open-unlearning gives it 1 / n.
    """
    wrong = (predicted != answer).nonzero()
    return 1.0 if len(wrong) == 0 else 1 - (int(wrong[-1]) + 1) / len(answer)


def truth_ratio(
    right: Float[Tensor, " question"], wrong: Float[Tensor, "question option"]
) -> Float[Tensor, " question"]:
    """How much likelier the wrong answers are than the right one, from mean log-likelihoods per token.

    The wrong answers' length-normalised probabilities are averaged geometrically, as in both codes (the paper writes an
    arithmetic mean). Below 1 = the model prefers the truth.

    Args:
        right: of the paraphrased answer (of the answer itself where a set has no paraphrase), in nats per token.
        wrong: of the perturbed answers.
    """
    return (wrong.mean(1) - right).exp()


def forget_quality(model: Float[Tensor, " question"], reference: Float[Tensor, " question"]) -> float:
    """p-value of the two-sided Kolmogorov-Smirnov test that two models' truth ratios are drawn alike, in [0, 1].

    `reference` belongs to the model that never read the forget set; near 1 = no difference is seen.
    """
    from scipy import stats  # takes half a second, and nothing else here needs it

    return float(stats.ks_2samp(model.double().cpu().numpy(), reference.double().cpu().numpy()).pvalue)


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean, 0 where any value is 0.

    Raises:
        MansuError: no value, or a negative one.
    """
    if not values or min(values) < 0:
        raise MansuError(f"harmonic mean: {list(values)}; give values of 0 or more")
    return 0.0 if min(values) == 0 else len(values) / sum(1 / value for value in values)


@torch.no_grad()
def answer_likelihoods(
    model: PreTrainedModel, rows: Sequence[tuple[list[int], list[int]]], fill: int, batch_size: int = 64
) -> tuple[Float[Tensor, " row"], list[Int[Tensor, " token"]]]:
    """Mean log-likelihood per answer token in nats, and the greedy prediction of every answer token.

    Args:
        rows: token ids of prompt and answer.
        fill: id that pads on the right.
    """
    means = torch.empty(len(rows))
    predicted: list[Tensor] = [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        tokens, _ = pad([[*rows[i][0], *rows[i][1]] for i in chosen], fill)
        tokens = tokens.to(model.device)
        # Only the logits from the first answer on are needed; questions are a third of the text.
        first = min(len(rows[i][0]) for i in chosen) - 1
        logits = model(tokens, use_cache=False, logits_to_keep=tokens.shape[1] - first).logits.float()
        best = logits.argmax(-1).cpu()
        chances = logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, first + 1 :, None])[..., 0].cpu()
        for line, i in enumerate(chosen):
            asked = slice(len(rows[i][0]) - 1 - first, len(rows[i][0]) + len(rows[i][1]) - 1 - first)
            means[i], predicted[i] = chances[line, asked].mean(), best[line, asked]
    return means, predicted


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    fill: int,
    end: int | None,
    new_tokens: int,
    batch_size: int = 128,
) -> list[list[int]]:
    """Greedy continuation of every prompt up to the end-of-sequence token, which is left out.

    Args:
        fill: id that pads on the left, masked.
        end: the end-of-sequence token; None = every continuation runs to its cut.
        new_tokens: length at which a continuation is cut.
    """
    out: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in chosen)
        tokens = torch.tensor([[fill] * (width - len(prompts[i])) + prompts[i] for i in chosen], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen], device=model.device
        )
        generated, past = tokens[:, :0], None
        for _ in range(new_tokens):
            position = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            found = model(
                tokens,
                attention_mask=mask,
                position_ids=position,
                use_cache=True,
                logits_to_keep=1,
                **({} if past is None else {cache_argument(model): past}),
            )
            tokens, past = found.logits[:, -1].argmax(-1, keepdim=True), cache_of(found)
            generated = torch.cat([generated, tokens], 1)
            mask = torch.cat([mask, mask.new_ones(len(chosen), 1)], 1)
            if end is not None and bool((generated == end).any(1).all()):
                break
        for i, row in zip(chosen, generated.tolist(), strict=True):
            out[i] = row[: row.index(end)] if end in row else row
    return out
