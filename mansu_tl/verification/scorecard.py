"""The four properties at once: forgetting, retention, PTQ gap, structural erasure; each with its control and bound."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit
from mansu_tl.data import Task
from mansu_tl.data.fit import require_task
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models.kinds import require_bridge
from mansu_tl.quantization import quantizer
from mansu_tl.results.result import Result, Table, bars
from mansu_tl.runs.metrics import Accuracy
from mansu_tl.verification.cad_by_depth import CAD, OPPOSITION, SPECIFICITY
from mansu_tl.verification.depth_verdict import ERASED, depth_verdict, foreign_basis
from mansu_tl.verification.divergence import CircuitScores
from mansu_tl.verification.knowledge import few_facts, unknown_facts
from mansu_tl.verification.measurement import ANSWERED, JUDGED_LAYER, Subject, measure
from mansu_tl.verification.verdicts import NOT_JUDGEABLE, Bounds

_ORDER = ("forgetting", "retention", "PTQ gap", "structural erasure")
_UNITS = {"forgetting": ", %", "retention": ", points", "PTQ gap": ", points"}


@dataclass(frozen=True)
class Row:
    """One line of a scorecard; NaN where there is no interval, "" = full precision.

    Attributes:
        note: why the row cannot be judged ("not judgeable: ..."; it is then no pass), or what its failure means.
        chance: what guessing gives, in percent, where the row is a multiple-choice accuracy.
    """

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
    note: str = ""
    chance: float | None = None

    @builtins.property
    def judgeable(self) -> bool:
        """Whether its control holds."""
        return not self.note.startswith(NOT_JUDGEABLE)

    @builtins.property
    def verdict(self) -> str:
        """ "pass", "fail", "fail: why", or "not judgeable: why"."""
        if not self.judgeable:
            return self.note
        return "pass" if self.passed else f"fail: {self.note}" if self.note else "fail"


@dataclass(frozen=True)
class Scorecard(Result):
    """The rows, and whether all of them pass.

    Attributes:
        title: the method and the model.
        rows: forgetting, retention, PTQ gap, structural erasure, in this order.
        notes: what a reader has to know beside them: sets of few facts, facts that were not known before the edit.
    """

    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every row is within its bound."""
        return all(row.passed for row in self.rows)

    def to_dataframe(self) -> pd.DataFrame:
        """One line a row."""
        return pd.DataFrame([row.__dict__ | {"verdict": row.verdict} for row in self.rows])

    @property
    def failing(self) -> tuple[str, ...]:
        """The rows that are judged and do not pass, one line each: what, its quantizer, value, bound and verdict."""
        return tuple(
            f"{row.measure}{f' ({row.quantizer})' if row.quantizer else ''} is {row.value:.3g}, asked {row.bound}"
            + ("" if row.verdict == "fail" else f"; {row.verdict.removeprefix('fail: ')}")
            for row in self.rows
            if row.judgeable and not row.passed
        )

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

    def __repr__(self) -> str:
        not_judged = sum(not row.judgeable for row in self.rows)
        rest = f", {not_judged} not judgeable" if not_judged else ""
        return f"Scorecard({self.title}: {sum(row.passed for row in self.rows)} of {len(self.rows)} rows pass{rest})"

    def _notes(self) -> Sequence[Sequence[str]]:
        return (self.notes,)

    def _tables(self) -> Sequence[Table]:
        frame = self.to_dataframe().drop(columns=["passed", "note", "chance"])
        mark = {"pass": "✓ ", "fail": "✗ "}
        frame["verdict"] = [mark.get(text.partition(":")[0], "– ") + text for text in frame["verdict"]]
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

    The control of every row is the un-edited model under the same quantizer. Where quantization alone breaks that model,
    or it knows nothing of a set to begin with, the row is not judgeable, and no pass. Structural erasure passes where CAD
    by depth calls the model erased (`depth_verdict`); another verdict is the reason why it fails. Intervals are 95 %
    bootstrap intervals over facts, so several wordings of one fact count once.

    Args:
        original_scores: the original's `circuit_scores` on the task's forget pairs, to reuse them.
        seed: of the bootstrap.
        progress: show a bar over the quantizers; None = in notebooks.

    Example:
        >>> model, task = mtl.load("pocket"), mtl.load_task("pocket")
        >>> circuit = mtl.discover_circuit(model, task.forget_pairs)
        >>> edited = mtl.unlearn(model, task, "mansu", circuit=circuit).apply(model)
        >>> card = mtl.scorecard(model, edited, task, circuit, quantizers=["nf4"])
    """
    for each in (model, edited):
        require_bridge(each)
    require_task(task)
    if isinstance(quantizers, str):
        raise MansuError(f"scorecard: quantizers={quantizers!r}; give a list, [{quantizers!r}]")
    for name in quantizers:
        quantizer(name)
    original = Subject(model, task, circuit, scores=original_scores)
    table = measure(
        original,
        Subject(edited, task, circuit, steps=original.steps),
        quantizers,
        seed=seed,
        progress=bars(progress),
    )
    return judge(table, task, original.answers()["forget"], title=title, bounds=bounds)


def judge(
    table: pd.DataFrame, task: Task, known: Accuracy, *, title: str = "edited", bounds: Bounds | None = None
) -> Scorecard:
    """The scorecard of what `measure` gave.

    Args:
        known: the original's answers to the forget questions.
    """
    limits = bounds or Bounds()
    right = {
        (name, asked, kind): control
        for name, asked, kind, control in table[["quantizer", "question_set", "measure", "control"]].itertuples(
            index=False
        )
    }
    rows = [row for line in table.to_dict("records") if (row := _row(line, task, limits, right)) is not None]
    rows += [_structure(part, str(name), limits) for name, part in table.groupby("quantizer", sort=False)]
    notes = [note for set_, asked in task.questions.items() if (note := few_facts(asked, _words(set_)))]
    if missing := unknown_facts(known):
        notes.append(f"not known before the edit: {', '.join(missing)}")
    return Scorecard(title, tuple(sorted(rows, key=lambda row: _ORDER.index(row.property))), tuple(notes))


def _row(
    line: Mapping[Any, Any], task: Task, limits: Bounds, right: Mapping[tuple[str, str, str], float]
) -> Row | None:
    """A judged row of the tidy table; None for a measure that a scorecard leaves out.

    Args:
        right: how the un-edited model answers, by quantizer, question set and kind, in percent.
    """
    quantizer, asked, measured = (line[key] for key in ("quantizer", "question_set", "measure"))
    found = limits.of(asked, measured)
    if found is None:
        return None
    property_, bound = found
    value, low, high, control = (line[key] for key in ("value", "low", "high", "control"))
    kind = "MC" if "MC" in measured else "cloze"
    guessing = task.questions[asked].chance if kind == "MC" else nan
    chance = guessing if property_ == "forgetting" and kind == "MC" else None
    text = bound.verdict(value, low, high, chance=guessing)
    name = "un-edited, quantized" if quantizer else "un-edited"
    least = {"forgetting": bound.limits(guessing)[1], "retention": guessing if kind == "MC" else 0.0, "PTQ gap": 0.0}
    before, deployed = right["", asked, kind], right[quantizer, asked, kind]
    text = limits.control_fails(before, deployed, least[property_], quantizer) or text
    if property_ == "retention":
        control, name = deployed, name.replace("un-edited", "un-edited accuracy")
    elif property_ == "PTQ gap":
        name = "un-edited"
    return Row(
        property_, f"{_words(asked)} {measured.removeprefix('PTQ gap, ')}{_UNITS[property_]}",
        quantizer, value, low, high, control, name,
        bound.text(guessing), text == "pass", text.removeprefix("fail").removeprefix(": ") if text != "pass" else "", chance,
    )  # fmt: skip


def _structure(table: pd.DataFrame, quantizer: str, limits: Bounds) -> Row:
    """The verdict of CAD by depth, from what was measured under one quantizer."""
    lines = {line["measure"]: line for line in table.to_dict("records") if not line["question_set"]}
    name = "un-edited, quantized" if quantizer else "un-edited"
    if CAD not in lines:
        note = (
            f"{NOT_JUDGEABLE}: no near question that the un-edited model knows has a counterpart, which is one of as many "
            "tokens with another answer"
        )
        return Row("structural erasure", CAD, quantizer, nan, nan, nan, nan, name, ERASED, False, note)
    value, low, high, control = (lines[CAD][key] for key in ("value", "low", "high", "control"))
    layer = f"L{lines[JUDGED_LAYER]['value']:.0f}"
    cad, specific, opposed = ((lines[key]["low"], lines[key]["high"]) for key in (CAD, SPECIFICITY, OPPOSITION))
    found = depth_verdict(layer, cad, specific, opposed, lines[ANSWERED]["value"], limits.depth)
    note = "" if found.name == ERASED else str(found)
    (dropped,) = table.loc[(table["question_set"] == "near") & (table["measure"] == "MC drop"), "value"]
    foreign = foreign_basis(value - lines[SPECIFICITY]["value"], dropped, limits.depth, limits.near_drop)
    if abs(control) > limits.control_divergence:
        note = f"{NOT_JUDGEABLE}: {quantizer} alone gives {control:.2f}"
    elif foreign:
        note = f"{NOT_JUDGEABLE}: {foreign}"
    measure = f"{CAD}, at {layer}"
    return Row("structural erasure", measure, quantizer, value, low, high, control, name, ERASED, not note, note)


def _words(name: str) -> str:
    return name.replace("_", " ")
