"""What is measured of an edited model, of its base and of a model that never learnt the facts, as tidy rows.

Studies, comparisons and audits take their rows from here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Task
from mansu_tl.quantization import quantizers, update_statistics
from mansu_tl.results.intervals import interval_over_facts
from mansu_tl.study.plan import NEVER, Plan
from mansu_tl.unlearning import Edit, floored
from mansu_tl.verification import (
    Damage,
    ErasureDepth,
    Probes,
    Relearning,
    RelearningCurve,
    Subject,
    attack_splits,
    compare_relearning,
    damage,
    erasure_depth,
    probe,
    unrelated_attack,
)
from mansu_tl.verification.measurement import COLUMNS, NAN, Measured, measure

_WORDS = (("multiple_choice", "MC"), ("cloze", "cloze"))


@runtime_checkable
class Attacks(Protocol):
    """Which relearning attacks a plan has: learning rates, optimizer steps, draws of the facts, their seed."""

    @property
    def attack_rates(self) -> tuple[float, ...]:
        """Learning rates; () = no attack."""

    @property
    def attack_steps(self) -> int:
        """Optimizer steps."""

    @property
    def attack_splits(self) -> int:
        """Draws of the facts that the attacker has."""

    @property
    def attack_seed(self) -> int:
        """Of those draws."""


class Measurements:
    """The measurements of one base's cells; what they share is measured once.

    Args:
        plan: attacks and evidence.
        original: the un-edited base.
        never: gives the model that never learnt the facts.
    """

    def __init__(self, plan: Plan, original: Subject, never: Callable[[], TransformerBridge]) -> None:
        self._plan, self._original, self._never = plan, original, never
        self._task = original.task

    def of_edit(self, edited: Subject, edit: Edit, names: Sequence[str], seed: int, *, further: bool) -> pd.DataFrame:
        """Everything about one edit.

        Args:
            names: quantizers.
            seed: of the intervals over facts.
            further: also probes, depth and damage.
        """
        started = time.perf_counter()
        rows = list(size_rows(self._original.model, edit))
        frame = measure(self._original, edited, names, seed=seed)
        for name in names:
            if name in quantizers("grid"):
                rows += code_rows(self._original.model, edited.model, name)
        if self._attacked:
            rows += self._relearning(edited.model, "")
            if floored(edit.method):
                rows += self._relearning(edited.under(names[0]), names[0])
            if further:
                rows += self._further(edited.model)
        rows.append(plain_row("", "", "seconds, measuring", time.perf_counter() - started))
        return pd.concat([frame, _frame(rows)], ignore_index=True)

    def of_original(self, names: Sequence[str]) -> pd.DataFrame:
        """The un-edited base: what every number starts from, and what quantization alone does to it."""
        rows = list(chance_rows(self._task))
        frame = measure(self._original, self._original, names, against="")
        if self._attacked:
            rows += self._relearning(self._original.model, "")
        return pd.concat([_frame(rows), frame], ignore_index=True)

    def of_never(self) -> pd.DataFrame:
        """The model that never learnt the facts."""
        other = Subject(self._never(), self._task, self._original.circuit, steps=self._original.steps)
        rows = list(prior_rows(self._reference)) if self._attacked else []
        return pd.concat([measure(self._original, other, ()), _frame(rows)], ignore_index=True)

    @property
    def _attacked(self) -> bool:
        """Whether the plan has attacks, and a reference for them."""
        return bool(self._plan.attack_rates and self._plan.never)

    @cached_property
    def _reference(self) -> tuple[RelearningCurve, ...]:
        return attack_curves(self._never(), self._task, self._plan, NEVER)

    def _relearning(self, model: TransformerBridge, quantizer: str) -> Iterator[Measured]:
        return relearning_rows(attack_curves(model, self._task, self._plan), self._reference, quantizer)

    def _further(self, edited: TransformerBridge) -> Iterator[Measured]:
        original, never = self._original.model, self._never()
        yield from probe_rows(*(probes_of(each, self._task) for each in (edited, never)))
        yield from depth_rows(erasure_depth(original, edited, never, self._task.forget_pairs))
        yield from text_rows(damage(original, edited, {"retain": self._task.retain_text}))


def chance_rows(task: Task) -> Iterator[Measured]:
    """What guessing gives on the forget questions."""
    for name in ("forget", "forget_paraphrase"):
        if name in task.questions:
            yield plain_row("", name, "MC, chance", task.questions[name].chance)


def attack_curves(
    model: TransformerBridge, task: Task, plan: Attacks, label: str = "edited"
) -> tuple[RelearningCurve, ...]:
    """Relearning by an attacker who has few forget facts, or unrelated text; asked at the start and at the end."""
    few = attack_splits(task, splits=plan.attack_splits, seed=plan.attack_seed)
    attacks, steps = (*few, unrelated_attack(task)), plan.attack_steps
    return compare_relearning(
        {label: model}, attacks, learning_rates=plan.attack_rates, steps=steps, ask_at=(0, steps)
    ).curves


def relearning_rows(
    curves: Sequence[RelearningCurve], reference: Sequence[RelearningCurve], quantizer: str
) -> Iterator[Measured]:
    """The curves of the model called "edited", beside those of the never-trained one; without these, against its prior."""
    row: Any
    table = Relearning((*curves, *reference), NEVER if reference else "")
    for kind, word in _WORDS:
        frame = table.summary(kind)
        for row in frame[frame["label"] == "edited"].itertuples():
            name = f"relearning {word}, {row.kind}, lr {row.learning_rate:g}"
            if reference:
                over = (row.over_reference, row.over_reference_low, row.over_reference_high)
                yield (quantizer, "forget", f"{name}, excess over never", *over, row.reference_excess)
            excess = (row.excess, row.excess_low, row.excess_high)
            yield (quantizer, "forget", f"{name}, excess over prior", *excess, NAN)
            yield plain_row(quantizer, "forget", name, row.value)


def prior_rows(reference: Sequence[RelearningCurve]) -> Iterator[Measured]:
    """The never-trained model's own curves against its prior."""
    row: Any
    for kind, word in _WORDS:
        for row in Relearning(tuple(reference)).summary(kind).itertuples():
            name = f"relearning {word}, {row.kind}, lr {row.learning_rate:g}"
            over = (row.excess, row.excess_low, row.excess_high)
            yield ("", "forget", f"{name}, excess over prior", *over, NAN)
            yield plain_row("", "forget", name, row.value)


def probes_of(model: TransformerBridge, task: Task, label: str = "edited") -> Probes:
    """Linear probes of every layer for the forget answers, also fitted on near facts."""
    return probe(model, task.questions["forget"], also_train=task.questions.get("near"), label=label)


def probe_rows(probes: Probes, control: Probes) -> Iterator[Measured]:
    """What probes read, with another model's as the control."""
    for i, layer in enumerate(probes.layers):
        hits = 100 * probes.right[i].double()
        ends = interval_over_facts(hits, probes.facts)
        reference = 100 * control.right[i].double().mean().item()
        yield ("", "forget", f"probe MC at {layer}", hits.mean().item(), *ends, reference)


def depth_rows(depth: ErasureDepth) -> Iterator[Measured]:
    """How deep the erasure goes."""
    yield ("", "", "erasure depth", depth.value, *depth.interval, 1.0)


def text_rows(found: Damage) -> Iterator[Measured]:
    """What the edit cost on text."""
    row: Any
    for row in found.loss.itertuples():
        yield ("", "", f"loss rise, {row.text} text, nats", row.rise, row.rise_low, row.rise_high, 0.0)


def size_rows(model: TransformerBridge, edit: Edit) -> Iterator[Measured]:
    """How much of the model was edited, and what the edit says that it cost."""
    yield plain_row("", "", "edited linear weights, %", 100 * edit.linear_share(model))
    for key in ("retain_increase_measured", "retain_divergence_measured", "retain_divergence_fisher"):
        if key in edit.facts:
            yield plain_row("", "", f"{key.replace('_', ' ')}, nats", edit.facts[key])


def code_rows(model: TransformerBridge, edited: TransformerBridge, name: str) -> Iterator[Measured]:
    """What the edit does to the codes of a grid."""
    total = update_statistics(model, edited, name).to_dataframe().iloc[-1]
    flipped = total.codes_changed + total.untouched_codes_changed
    yield plain_row(name, "", "codes changed, % of all", 100 * flipped / total.weights)
    yield (name, "", "codes changed, % of edited", 100 * total.share, NAN, NAN, 100 * total.predicted_share)
    yield plain_row(name, "", "bin width / update, median", total.median_ratio)
    yield plain_row(name, "", "fidelity cos(dQ, d)", total.cosine)
    yield plain_row(name, "", "projection <dQ, d> / <d, d>", total.projection)


def plain_row(quantizer: str, question_set: str, name: str, value: float) -> Measured:
    """A number without an interval or a control."""
    return (quantizer, question_set, name, float(value), NAN, NAN, NAN)


def _frame(rows: Sequence[Measured]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(COLUMNS))
