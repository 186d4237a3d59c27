"""How far an edit moves the model on retain text: the divergence itself, and what Fisher information predicts of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from mansu_tl.data import Sequences
from mansu_tl.runs.values import Values, predicted

# A model somewhere on the way from the original (0) to the edited one (1), or beyond.
At = Callable[[float], AbstractContextManager[Values]]

# Logits of one of the four models that are held at once: a quarter of a gibibyte.
_MOST_LOGITS = 2**26
# How far along the change, both ways, the slopes of the logits are taken; a float32 logit is good to 1e-6 of itself.
_STEP = 0.03


@torch.no_grad()
def retain_divergence(
    model: PreTrainedModel, at: At, text: Sequences, *, predict: bool = False
) -> tuple[float, float | None]:
    """The divergence of a changed model from the original on a text, in nats a token, and what Fisher information predicts.

    Measured: the mean over tokens of KL(original || changed). Predicted: 1/2 d^T F d with F the Fisher information itself,
    of every label and every pair of weights. A change d moves the logits by J d to first order, and d^T F d is the
    variance of that under the model's own next-token distribution, so no matrix F is needed. It holds as far as the model is
    linear along d: where the two numbers differ much, Fisher information says nothing about this edit. Our definition.

    Args:
        at: the model at a multiple of the change: 0 = the original, 1 = the changed one.
        text: its real tokens but the first are predicted.
        predict: whether to predict too; None where not.
    """
    vocab = model.get_output_embeddings().weight.shape[0]
    rows = max(1, _MOST_LOGITS // (text.tokens.shape[1] * vocab))
    measured, quadratic, count = 0.0, 0.0, int((text.lengths - 1).sum())

    def logits(scale: float, batch: Sequences) -> Float[Tensor, "token vocab"]:
        with at(scale) as values:
            return predicted(model, values, batch).logits

    for some in text.lengths.argsort(stable=True).split(rows):
        batch = text[some].trimmed()
        before = logits(0.0, batch).log_softmax(-1)
        own = before.exp()
        measured += float((own * (before - logits(1.0, batch).log_softmax(-1))).sum())
        if predict:
            slope = (logits(_STEP, batch) - logits(-_STEP, batch)) / (2 * _STEP)
            mean = (own * slope).sum(-1, keepdim=True)
            quadratic += 0.5 * float((own * (slope - mean).square()).sum())
    return measured / count, quadratic / count if predict else None


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
