"""One edited model under every quantizer on every question set, as tidy rows: what scorecards and studies are made from.

Every row has the un-edited model under the same quantizer as its control.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit
from mansu_tl.data import Task
from mansu_tl.data.counterparts import counterparts, facts_first
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import parameters
from mansu_tl.quantization import quantize
from mansu_tl.results.intervals import interval_over_facts
from mansu_tl.runs.metrics import Accuracy, accuracy
from mansu_tl.verification.cad_by_depth import CadByDepth, DepthReader, NoEvidenceError
from mansu_tl.verification.divergence import CircuitScores, Divergence, circuit_divergence, circuit_scores

COLUMNS = ("quantizer", "question_set", "measure", "value", "low", "high", "control")
SETS = ("forget", "forget_paraphrase", "retain", "retain_paraphrase", "near", "near_paraphrase")
# Beside CAD by depth: the share of the forget answers that are still given, and the layer that is judged.
ANSWERED, JUDGED_LAYER = "answers given, share", "judged layer"
DEPTH_ROWS = 64  # forget and near prompts that are read by depth at most: facts first, then their further wordings
KINDS = ("MC", "cloze", "log-odds")
NAN = float("nan")
Measured = tuple[str, str, str, float, float, float, float]
T = TypeVar("T")


class Subject:
    """A model as it is ("") and under quantizers: what it answers and how its circuit scores, each measured once.

    A model that rests on a quantizer's grid is under it what it is, bit for bit, and is not measured again.

    Args:
        model: it must stay as it is.
        task: whose questions and forget pairs are asked.
        circuit: whose edges are scored; None where only answers are looked at.
        scores: its `circuit_scores` in full precision, to reuse them.
        steps: of EAP-IG; those of `scores` where they are given.
    """

    def __init__(
        self,
        model: TransformerBridge,
        task: Task,
        circuit: Circuit | None,
        *,
        scores: CircuitScores | None = None,
        steps: int = 5,
    ) -> None:
        self.model, self.task, self.circuit = model, task, circuit
        self.steps = steps if scores is None else scores.steps
        self._kept: dict[Any, Any] = {} if scores is None else {("scores", ""): scores}
        self._twin: tuple[str, TransformerBridge] = ("", model)
        self._rests_on: set[str] = {""}

    def under(self, quantizer: str) -> TransformerBridge:
        """The model under a quantizer, calibrated on the retain text where it has to be; the latest one is kept."""
        if quantizer not in self._rests_on and self._twin[0] != quantizer:
            twin = quantize(self.model, quantizer, self.task.retain_text)
            own = parameters(self.model)
            if all(torch.equal(value, own[name]) for name, value in parameters(twin).items()):
                self._rests_on.add(quantizer)
            else:
                self._twin = (quantizer, twin)
        return self.model if quantizer in self._rests_on else self._twin[1]

    def answers(self, quantizer: str = "") -> dict[str, Accuracy]:
        """Its answers to every set of questions that is reported."""
        asked = {name: self.task.questions[name] for name in SETS if name in self.task.questions}
        return self._once(
            "answers",
            quantizer,
            lambda model: {name: accuracy(model, questions) for name, questions in asked.items()},
        )

    def scores(self, quantizer: str = "") -> CircuitScores:
        """Its scores on the circuit's edges, all with the same steps."""
        pairs, circuit = self.task.forget_pairs, self._circuit()
        return self._once("scores", quantizer, lambda model: circuit_scores(model, circuit, pairs, steps=self.steps))

    def divergence(self, original: Subject, quantizer: str = "", *, label: str = "edited", seed: int = 0) -> Divergence:
        """CAD of this model under a quantizer against the original as it is."""
        key = "divergence", original, quantizer, seed
        if key not in self._kept:
            pair = original.scores(), self.scores(quantizer)
            self._kept[key] = circuit_divergence(*pair, self._circuit(), self.task.forget_pairs, seed=seed)
        return replace(self._kept[key], label=label)

    @cached_property
    def depth_reader(self) -> DepthReader | None:
        """Reads other models as this one does, on forget and near facts; None where no near fact can be set beside."""
        near = counterparts(self.task.questions["near"], DEPTH_ROWS) if "near" in self.task.questions else None
        pairs = self.task.forget_pairs
        if near is None:
            return None
        rows = sorted(facts_first(pairs.facts)[:DEPTH_ROWS])
        try:
            return DepthReader(self.model, pairs[rows], near, steps=self.steps)
        except NoEvidenceError:
            return None

    def depth(self, original: Subject, quantizer: str = "", *, label: str = "edited") -> CadByDepth | None:
        """CAD by depth of this model under a quantizer, as the original reads it; None where it has no near facts for it."""
        reader = original.depth_reader
        if reader is None:
            return None
        key = "depth", original, quantizer
        if key not in self._kept:
            same = quantizer and self.under(quantizer) is self.model
            self._kept[key] = self.depth(original) if same else reader.read(self.under(quantizer))
        return replace(self._kept[key], label=label)

    def _circuit(self) -> Circuit:
        if self.circuit is None:
            raise MansuError("circuit: none was given, so no edge can be scored; pass one")
        return self.circuit

    def _once(self, what: str, quantizer: str, make: Callable[[TransformerBridge], T]) -> T:
        """What is made of the model under a quantizer; of the model itself where it rests on that one's grid."""
        if (what, quantizer) not in self._kept:
            same = quantizer and self.under(quantizer) is self.model
            made = self._once(what, "", make) if same else make(self.under(quantizer))
            self._kept[what, quantizer] = made
        kept: T = self._kept[what, quantizer]
        return kept


@torch_defaults()
def measure(
    original: Subject,
    edited: Subject,
    quantizers: Sequence[str],
    *,
    against: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """One model against the original, in full precision and under every quantizer.

    Accuracies and drops in percent and percentage points, log-odds in nats, with 95 % intervals over facts.

    Args:
        against: the quantizer of the original that answers are compared with; None = the row's own.
        seed: of the intervals.
        progress: show a bar over the quantizers.

    Returns:
        Columns quantizer ("" = full precision), question_set ("" = none), measure, value, low, high, control.
    """
    rows: list[Measured] = []
    for name in tqdm(("", *quantizers), desc="measure", unit="quantizer", disable=not progress):
        rows += answer_rows(original, edited, name, name if against is None else against, seed)
        rows += circuit_rows(original, edited, name, seed)
        rows += structure_rows(original, edited, name)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def answer_rows(original: Subject, edited: Subject, name: str, against: str, seed: int) -> Iterator[Measured]:
    """What a model answers under one quantizer; the arguments are those of `measure`."""
    for asked, after in edited.answers(name).items():
        for kind in KINDS:
            hits, control = percent(after, kind), percent(original.answers(against)[asked], kind)
            measures = [(kind, hits, control)]
            if not asked.startswith("forget"):
                measures.append((f"{kind} drop", control - hits, torch.zeros_like(hits)))
            elif name:
                gaps = [
                    percent(subject.answers(name)[asked], kind) - percent(subject.answers()[asked], kind)
                    for subject in (edited, original)
                ]
                measures.append((f"PTQ gap, {kind}", gaps[0], gaps[1]))
            for measure, values, reference in measures:
                ends = interval_over_facts(values, after.facts, seed)
                yield (name, asked, measure, values.mean().item(), *ends, reference.mean().item())


def structure_rows(original: Subject, edited: Subject, name: str) -> Iterator[Measured]:
    """What the structural verdict is made of."""
    found, noise = (subject.depth(original, name) for subject in (edited, original))
    if found is None or noise is None:
        return
    for measure, values in found.decisive.items():
        yield (name, "", measure, *values, noise.decisive[measure][0])
    yield (name, "", ANSWERED, found.answered, NAN, NAN, noise.answered)
    yield (name, "", JUDGED_LAYER, found.judged - 1.0, NAN, NAN, NAN)


def circuit_rows(original: Subject, edited: Subject, name: str, seed: int) -> Iterator[Measured]:
    """How far its circuit is from the original's under one quantizer."""
    cad, noise = (subject.divergence(original, name, seed=seed) for subject in (edited, original))
    yield (name, "", "CAD", cad.value, *cad.interval, noise.value)
    yield (name, "", "mass loss", cad.mass_loss, *cad.mass_interval, noise.mass_loss)


def percent(answers: Accuracy, kind: str) -> Float[Tensor, " question"]:
    """Every question's hit in percent, or its log-odds in nats."""
    if kind == "log-odds":
        return answers.log_odds.double()
    return 100 * (answers.multiple_choice if kind == "MC" else answers.cloze).double()
