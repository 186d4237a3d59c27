"""What is measured of an edited model, of its base and of a model that never learnt the facts, as tidy rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.quantization import quantizers, update_statistics
from mansu_tl.results.intervals import interval_over_facts
from mansu_tl.study.plan import NEVER, Plan
from mansu_tl.unlearning import Edit, floored
from mansu_tl.verification import (
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
        rows = list(_size(self._original.model, edit))
        frame = measure(self._original, edited, names, seed=seed)
        for name in names:
            if name in quantizers("grid"):
                rows += _codes(self._original.model, edited.model, name)
        if self._attacked:
            rows += self._relearning(edited.model, "")
            if floored(edit.method):
                rows += self._relearning(edited.under(names[0]), names[0])
            if further:
                rows += self._further(edited.model)
        rows.append(_plain("", "", "seconds, measuring", time.perf_counter() - started))
        return pd.concat([frame, _frame(rows)], ignore_index=True)

    def of_original(self, names: Sequence[str]) -> pd.DataFrame:
        """The un-edited base: what every number starts from, and what quantization alone does to it."""
        asked = (name for name in ("forget", "forget_paraphrase") if name in self._task.questions)
        rows = [_plain("", name, "MC, chance", self._task.questions[name].chance) for name in asked]
        frame = measure(self._original, self._original, names, against="")
        if self._attacked:
            rows += self._relearning(self._original.model, "")
        return pd.concat([_frame(rows), frame], ignore_index=True)

    def of_never(self) -> pd.DataFrame:
        """The model that never learnt the facts."""
        other = Subject(self._never(), self._task, self._original.circuit, steps=self._original.steps)
        rows: list[Measured] = []
        row: Any
        for kind, word in (("multiple_choice", "MC"), ("cloze", "cloze")) if self._attacked else ():
            for row in Relearning(self._reference).summary(kind).itertuples():
                name = f"relearning {word}, {row.kind}, lr {row.learning_rate:g}"
                over = (row.excess, row.excess_low, row.excess_high)
                rows += [
                    ("", "forget", f"{name}, excess over prior", *over, NAN),
                    _plain("", "forget", name, row.value),
                ]
        return pd.concat([measure(self._original, other, ()), _frame(rows)], ignore_index=True)

    @property
    def _attacked(self) -> bool:
        """Whether the plan has attacks, and a reference for them."""
        return bool(self._plan.attack_rates and self._plan.never)

    @cached_property
    def _reference(self) -> tuple[RelearningCurve, ...]:
        return self._curves(self._never(), NEVER)

    def _curves(self, model: TransformerBridge, label: str) -> tuple[RelearningCurve, ...]:
        """Relearning by an attacker who has few forget facts, or unrelated text."""
        plan, steps = self._plan, self._plan.attack_steps
        few = attack_splits(self._task, splits=plan.attack_splits, seed=plan.attack_seed)
        attacks = (*few, unrelated_attack(self._task))
        return compare_relearning(
            {label: model}, attacks, learning_rates=plan.attack_rates, steps=steps, ask_at=(0, steps)
        ).curves

    def _relearning(self, model: TransformerBridge, quantizer: str) -> Iterator[Measured]:
        row: Any
        table = Relearning((*self._curves(model, "edited"), *self._reference), NEVER)
        for kind, word in (("multiple_choice", "MC"), ("cloze", "cloze")):
            frame = table.summary(kind)
            for row in frame[frame["label"] == "edited"].itertuples():
                name = f"relearning {word}, {row.kind}, lr {row.learning_rate:g}"
                over = (row.over_reference, row.over_reference_low, row.over_reference_high)
                yield (quantizer, "forget", f"{name}, excess over never", *over, row.reference_excess)
                excess = (row.excess, row.excess_low, row.excess_high)
                yield (quantizer, "forget", f"{name}, excess over prior", *excess, NAN)
                yield _plain(quantizer, "forget", name, row.value)

    def _further(self, edited: TransformerBridge) -> Iterator[Measured]:
        row: Any
        task, never = self._task, self._never()
        near = task.questions.get("near")
        probes, control = (probe(each, task.questions["forget"], also_train=near) for each in (edited, never))
        for i, layer in enumerate(probes.layers):
            hits = 100 * probes.right[i].double()
            ends = interval_over_facts(hits, probes.facts)
            reference = 100 * control.right[i].double().mean().item()
            yield ("", "forget", f"probe MC at {layer}", hits.mean().item(), *ends, reference)
        depth = erasure_depth(self._original.model, edited, never, task.forget_pairs)
        yield ("", "", "erasure depth", depth.value, *depth.interval, 1.0)
        for row in damage(self._original.model, edited, {"retain": task.retain_text}).loss.itertuples():
            yield ("", "", f"loss rise, {row.text} text, nats", row.rise, row.rise_low, row.rise_high, 0.0)


def _size(model: TransformerBridge, edit: Edit) -> Iterator[Measured]:
    yield _plain("", "", "edited linear weights, %", 100 * edit.linear_share(model))
    for key in ("retain_increase_measured", "retain_increase_fisher", "retain_increase_bound"):
        if key in edit.facts:
            yield _plain("", "", f"{key.replace('_', ' ')}, nats", edit.facts[key])


def _codes(model: TransformerBridge, edited: TransformerBridge, name: str) -> Iterator[Measured]:
    total = update_statistics(model, edited, name).to_dataframe().iloc[-1]
    flipped = total.codes_changed + total.untouched_codes_changed
    yield _plain(name, "", "codes changed, % of all", 100 * flipped / total.weights)
    yield (name, "", "codes changed, % of edited", 100 * total.share, NAN, NAN, 100 * total.predicted_share)
    yield _plain(name, "", "bin width / update, median", total.median_ratio)
    yield _plain(name, "", "fidelity cos(dQ, d)", total.cosine)
    yield _plain(name, "", "projection <dQ, d> / <d, d>", total.projection)


def _plain(quantizer: str, question_set: str, name: str, value: float) -> Measured:
    """A number without an interval or a control."""
    return (quantizer, question_set, name, float(value), NAN, NAN, NAN)


def _frame(rows: Sequence[Measured]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(COLUMNS))
