"""The four properties at once: forgetting, retention, PTQ gap, structural erasure; each with its control and bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit
from mansu_tl.data import Questions, Task
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.files import load_tensors, save_tensors
from mansu_tl.metrics import Accuracy, accuracy
from mansu_tl.notebook import Result, Table, bars
from mansu_tl.quantization import quantize
from mansu_tl.verification.divergence import CircuitScores, circuit_divergence, circuit_scores
from mansu_tl.verification.intervals import interval_over_facts


@dataclass(frozen=True)
class Bounds:
    """When a row passes; accuracies and drops in percentage points.

    Attributes:
        forget_over_chance: multiple choice on forget questions, above chance.
        forget_cloze: cloze accuracy on forget questions.
        retain_drop: drop on the retain questions.
        near_drop: drop on neighbouring facts, and on every held-out wording.
        ptq_gap: forget accuracy after quantization minus before.
        divergence: lower end of the CAD interval after quantization.
    """

    forget_over_chance: float = 5.0
    forget_cloze: float = 5.0
    retain_drop: float = 1.0
    near_drop: float = 2.0
    ptq_gap: float = 0.0
    divergence: float = 0.8


@dataclass(frozen=True)
class Row:
    """One line of a scorecard; NaN where there is no interval, "" = full precision."""

    property: str
    measure: str
    quantizer: str
    value: float
    interval_low: float
    interval_high: float
    control: float
    control_name: str
    bound: str
    passed: bool


@dataclass(frozen=True)
class Scorecard(Result):
    """The rows, and whether all of them pass.

    Attributes:
        title: the method and the model.
        rows: forgetting, retention, PTQ gap, structural erasure, in this order.
    """

    title: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether every row is within its bound."""
        return all(row.passed for row in self.rows)

    def to_dataframe(self) -> pd.DataFrame:
        """One line a row."""
        return pd.DataFrame([row.__dict__ for row in self.rows])

    def value(self, measure: str, quantizer: str = "") -> float:
        """The value of one row.

        Raises:
            MansuError: there is no such row.
        """
        for row in self.rows:
            if row.measure == measure and row.quantizer == quantizer:
                return row.value
        names = sorted({row.measure for row in self.rows})
        raise MansuError(
            f"scorecard: no row {measure!r} under quantizer {quantizer!r}; measures are {', '.join(names)}"
        )

    def save(self, path: str | PathLike[str]) -> Path:
        """Write one file (safetensors with the rows as JSON in its header)."""
        facts: dict[str, Any] = {"title": self.title, "rows": [row.__dict__ for row in self.rows]}
        return save_tensors(path, "Scorecard", {"values": torch.tensor([row.value for row in self.rows])}, facts)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Scorecard:
        """Read what `save` wrote."""
        _, facts = load_tensors(path, "Scorecard")
        return cls(facts["title"], tuple(Row(**row) for row in facts["rows"]))

    def __repr__(self) -> str:
        return f"Scorecard({self.title}: {sum(row.passed for row in self.rows)} of {len(self.rows)} rows pass)"

    def _tables(self) -> Sequence[Table]:
        frame = self.to_dataframe()
        frame["passed"] = frame["passed"].map({True: "✓ pass", False: "✗ fail"})
        # A verdict hides no row.
        return (Table(frame, form="{:.2f}".format, rows=len(frame)),)


@torch_defaults()
def scorecard(
    model: TransformerBridge,
    edited: TransformerBridge,
    task: Task,
    circuit: Circuit,
    *,
    quantizers: Sequence[str] = ("nf4",),
    bounds: Bounds | None = None,
    title: str = "edited",
    original_scores: CircuitScores | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Scorecard:
    """Measure an edited model against its original, in full precision and under every quantizer named.

    The control of every row is the un-edited model under the same quantizer. Intervals are 95 % bootstrap intervals
    over facts, so several wordings of one fact count once.

    Args:
        original_scores: the original's `circuit_scores` on the task's forget pairs, to reuse them.
        seed: of the bootstrap.
        progress: show a bar over the quantizers; None = in notebooks.
    """
    limits = bounds or Bounds()
    if original_scores is None:
        original_scores = circuit_scores(model, circuit, task.forget_pairs)
    before, after = _answers(model, task), _answers(edited, task)
    rows = _forgetting(before, after, task, "", limits, seed) + _retention(before, after, "", limits, seed)
    for name in tqdm(quantizers, desc=f"scorecard {title}", unit="quantizer", disable=not bars(progress)):
        q_model, q_edited = (quantize(each, name, task.retain_text) for each in (model, edited))
        q_before, q_after = _answers(q_model, task), _answers(q_edited, task)
        rows += _forgetting(q_before, q_after, task, name, limits, seed)
        rows += _retention(q_before, q_after, name, limits, seed)
        rows += _gaps(before, after, q_before, q_after, name, limits, seed)
        pairs = task.forget_pairs
        cad = circuit_divergence(original_scores, q_edited, circuit, pairs, seed=seed)
        noise = circuit_divergence(original_scores, q_model, circuit, pairs, seed=seed)
        row = Row(
            "structural erasure", "CAD", name, cad.value, *cad.interval, noise.value, "un-edited, quantized",
            f">= {limits.divergence:g} (lower end)", cad.interval[0] >= limits.divergence,
        )  # fmt: skip
        rows += [row, replace(row, measure="mass loss", value=cad.mass_loss, interval_low=cad.mass_interval[0],
                              interval_high=cad.mass_interval[1], control=noise.mass_loss,
                              passed=cad.mass_interval[0] >= limits.divergence)]  # fmt: skip
    order = {"forgetting": 0, "retention": 1, "PTQ gap": 2, "structural erasure": 3}
    return Scorecard(title, tuple(sorted(rows, key=lambda row: order[row.property])))


def _answers(model: TransformerBridge, task: Task) -> dict[str, Accuracy]:
    return {name: accuracy(model, questions) for name, questions in task.questions.items()}


def _forgetting(
    before: dict[str, Accuracy], after: dict[str, Accuracy], task: Task, quantizer: str, limits: Bounds, seed: int
) -> list[Row]:
    rows = []
    control = "un-edited, quantized" if quantizer else "un-edited"
    for name in ("forget", "forget_paraphrase"):
        if name not in after:
            continue
        ceiling = _chance(task.questions[name]) + limits.forget_over_chance
        for kind, bound in (("MC", ceiling), ("cloze", limits.forget_cloze)):
            hits, base = _hits(after[name], kind), _hits(before[name], kind)
            value = 100 * hits.mean().item()
            low, high = _interval(hits, after[name].facts, seed)
            rows.append(
                Row("forgetting", f"{_words(name)} {kind}, %", quantizer, value, low, high, 100 * base.mean().item(),
                    control, f"<= {bound:g}", value <= bound)
            )  # fmt: skip
    return rows


def _retention(
    before: dict[str, Accuracy], after: dict[str, Accuracy], quantizer: str, limits: Bounds, seed: int
) -> list[Row]:
    rows = []
    control = "un-edited accuracy, quantized" if quantizer else "un-edited accuracy"
    for name in ("retain", "retain_paraphrase", "near", "near_paraphrase"):
        if name not in after:
            continue
        bound = limits.retain_drop if name == "retain" else limits.near_drop
        for kind in ("MC", "cloze"):
            drop = _hits(before[name], kind) - _hits(after[name], kind)
            value = 100 * drop.mean().item()
            low, high = _interval(drop, after[name].facts, seed)
            rows.append(
                Row("retention", f"{_words(name)} {kind} drop, points", quantizer, value, low, high,
                    100 * _hits(before[name], kind).mean().item(), control, f"<= {bound:g}", value <= bound + 1e-9)
            )  # fmt: skip
    return rows


def _gaps(
    before: dict[str, Accuracy], after: dict[str, Accuracy], q_before: dict[str, Accuracy],
    q_after: dict[str, Accuracy], quantizer: str, limits: Bounds, seed: int,
) -> list[Row]:  # fmt: skip
    rows = []
    for name in ("forget", "forget_paraphrase"):
        if name not in after:
            continue
        for kind in ("MC", "cloze"):
            gap = _hits(q_after[name], kind) - _hits(after[name], kind)
            base = _hits(q_before[name], kind) - _hits(before[name], kind)
            value = 100 * gap.mean().item()
            low, high = _interval(gap, after[name].facts, seed)
            rows.append(
                Row("PTQ gap", f"{_words(name)} {kind}, points", quantizer, value, low, high,
                    100 * base.mean().item(), "un-edited", f"<= {limits.ptq_gap:g}", value <= limits.ptq_gap + 1e-9)
            )  # fmt: skip
    return rows


def _hits(answers: Accuracy, kind: str) -> Float[Tensor, " question"]:
    return (answers.multiple_choice if kind == "MC" else answers.cloze).double()


def _chance(questions: Questions) -> float:
    return 100 / questions.choices.shape[1]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _interval(values: Float[Tensor, " question"], facts: tuple[str, ...], seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over facts, in percentage points."""
    low, high = interval_over_facts(values, facts, seed)
    return 100 * low, 100 * high
