"""What an edit costs on retain text: loss, divergence from the original, and what Fisher information predicts of that."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from mansu_tl.data import Sequences
from mansu_tl.runs.metrics import kl_divergence
from mansu_tl.runs.values import Predicted, Values, predicted

# A model somewhere on the way from the original (0) to the edited one (1), or beyond.
At = Callable[[float], AbstractContextManager[Values]]

# Logits of one of the four models that are held at once: a quarter of a gibibyte.
_MOST_LOGITS = 2**26
# How far along the change, both ways, the slopes of the logits are taken; a float32 logit is good to 1e-6 of itself.
_STEP = 0.03


@dataclass(frozen=True)
class RetainCost:
    """What a change of the model costs on a text, in nats a token.

    Attributes:
        before, after: cross-entropy of the text.
        divergence: mean over tokens of KL(original || changed).
        predicted: what Fisher information predicts of that; None where it was not asked for.
    """

    before: float
    after: float
    divergence: float
    predicted: float | None


@torch.no_grad()
def retain_cost(model: PreTrainedModel, at: At, text: Sequences, *, predict: bool = False) -> RetainCost:
    """What a change of the model costs on a text, and what Fisher information predicts of it.

    Predicted is 1/2 d^T F d with F the Fisher information itself, of every label and every pair of weights. A change d moves
    the logits by J d to first order, and d^T F d is the variance of that under the model's own next-token distribution, so
    no matrix F is needed. It holds as far as the model is linear along d: where prediction and divergence differ much, Fisher
    information says nothing about this edit. Our definition.

    Args:
        at: the model at a multiple of the change: 0 = the original, 1 = the changed one.
        text: its real tokens but the first are predicted.
        predict: whether to predict too, in two passes more.
    """
    vocab = model.get_output_embeddings().weight.shape[0]
    rows = max(1, _MOST_LOGITS // (text.tokens.shape[1] * vocab))
    before = after = divergence = quadratic = 0.0
    count = int((text.lengths - 1).sum())

    def at_scale(scale: float, batch: Sequences) -> Predicted:
        with at(scale) as values:
            return predicted(model, values, batch)

    for some in text.lengths.argsort(stable=True).split(rows):
        batch = text[some].trimmed()
        original, changed = at_scale(0.0, batch), at_scale(1.0, batch)
        before += float(cross_entropy(original.logits, original.targets, reduction="sum"))
        after += float(cross_entropy(changed.logits, changed.targets, reduction="sum"))
        divergence += float(kl_divergence(changed.logits, original.logits).sum())
        if predict:
            slope = (at_scale(_STEP, batch).logits - at_scale(-_STEP, batch).logits) / (2 * _STEP)
            own = original.logits.softmax(-1)
            mean = (own * slope).sum(-1, keepdim=True)
            quadratic += 0.5 * float((own * (slope - mean).square()).sum())
    return RetainCost(before / count, after / count, divergence / count, quadratic / count if predict else None)


def within(order: int, budget: float, divergence: Callable[[int], float]) -> int:
    """The most weights, the first of a list of `order`, whose divergence stays inside a budget: found by halving, to one
    percent of the list. What is returned has been measured and is inside; 0 where not even the fewest are.

    Args:
        divergence: of the first so many.
    """
    if divergence(order) <= budget:
        return order
    fits, breaks = 0, order
    while breaks - fits > max(1, order // 100):
        middle = (fits + breaks) // 2
        if divergence(middle) <= budget:
            fits = middle
        else:
            breaks = middle
    return fits
