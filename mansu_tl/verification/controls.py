"""The un-edited model as the control of every row of a scorecard: measured once, for as many edits as there are."""

from __future__ import annotations

from functools import cache

from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit
from mansu_tl.data import Task
from mansu_tl.quantization import quantize
from mansu_tl.runs.metrics import Accuracy, accuracy
from mansu_tl.verification.divergence import CircuitScores, circuit_scores


class Controls:
    """What the un-edited model says, in full precision ("") and under every quantizer; measured when first asked for.

    Args:
        model: the un-edited model; it must stay as it is.
        task: whose questions and forget pairs are asked.
        circuit: whose edges are scored.
        scores: its `circuit_scores` in full precision, to reuse them.
    """

    def __init__(
        self, model: TransformerBridge, task: Task, circuit: Circuit, scores: CircuitScores | None = None
    ) -> None:
        pairs = task.forget_pairs

        @cache
        def twin_answers(quantizer: str) -> dict[str, Accuracy]:
            return answers(under(model, task, quantizer), task)

        @cache
        def twin_scores(quantizer: str) -> CircuitScores:
            if not quantizer:
                return circuit_scores(model, circuit, pairs) if scores is None else scores
            return circuit_scores(under(model, task, quantizer), circuit, pairs, steps=twin_scores("").steps)

        self._answers, self._scores = twin_answers, twin_scores

    def answers(self, quantizer: str = "") -> dict[str, Accuracy]:
        """Its answers to every set of questions."""
        return self._answers(quantizer)

    def scores(self, quantizer: str = "") -> CircuitScores:
        """Its scores on the circuit's edges, all with the same steps."""
        return self._scores(quantizer)


def answers(model: TransformerBridge, task: Task) -> dict[str, Accuracy]:
    """A model's answers to every set of questions of a task."""
    return {name: accuracy(model, questions) for name, questions in task.questions.items()}


def under(model: TransformerBridge, task: Task, quantizer: str) -> TransformerBridge:
    """The model under a quantizer, calibrated on the retain text where it has to be; itself for ""."""
    return quantize(model, quantizer, task.retain_text) if quantizer else model
