"""The four properties at once: forgetting, retention, PTQ gap, structural erasure; each with its control and bound."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit
from mansu_tl.data import Task
from mansu_tl.data.fit import require_task
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models.kinds import require_bridge
from mansu_tl.results.intervals import interval_over_facts
from mansu_tl.results.result import Result, Table, bars
from mansu_tl.runs.metrics import Accuracy
from mansu_tl.verification.controls import Controls, answers, under
from mansu_tl.verification.divergence import CircuitScores, circuit_divergence
from mansu_tl.verification.knowledge import few_facts, unknown_facts

_NOT_JUDGEABLE = "not judgeable"


@dataclass(frozen=True)
class Bounds:
    """When a row passes; accuracies and drops in percentage points.

    Attributes:
        forget_over_chance: how far from chance (100 / options) multiple choice on forget questions may be. Above it the
            knowledge is still there; below it, with the whole interval, it is inverted rather than forgotten.
        forget_cloze: cloze accuracy on forget questions.
        retain_drop: drop on the retain questions.
        near_drop: drop on neighbouring facts, and on every held-out wording.
        ptq_gap: forget accuracy after quantization minus before.
        divergence: lower end of the CAD interval after quantization.
        control_loss: what quantization alone may cost the un-edited model; where it costs more, nothing can be judged.
        control_divergence: CAD of the un-edited model after quantization, likewise.
    """

    forget_over_chance: float = 5.0
    forget_cloze: float = 5.0
    retain_drop: float = 1.0
    near_drop: float = 2.0
    ptq_gap: float = 0.0
    divergence: float = 0.8
    control_loss: float = 10.0
    control_divergence: float = 0.2


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
        return not self.note.startswith(_NOT_JUDGEABLE)

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
    controls: Controls | None = None,
    edited_scores: Mapping[str, CircuitScores] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Scorecard:
    """Measure an edited model against its original, in full precision and under every quantizer named.

    The control of every row is the un-edited model under the same quantizer. Where quantization alone breaks that model,
    or it knows nothing of a set to begin with, the row is not judgeable, and no pass. Intervals are 95 % bootstrap
    intervals over facts, so several wordings of one fact count once.

    Args:
        original_scores: the original's `circuit_scores` on the task's forget pairs, to reuse them.
        controls: what the original says, to reuse it for several edits; in place of `original_scores`.
        edited_scores: the edited model's `circuit_scores` by quantizer, to reuse them.
        seed: of the bootstrap.
        progress: show a bar over the quantizers; None = in notebooks.

    Example:
        >>> model, task = mtl.load("pocket"), mtl.load_task("pocket")
        >>> circuit = mtl.discover_circuit(model, task.forget_pairs)
        >>> edited = mtl.unlearn(model, task, "mansu", circuit=circuit).apply(model)
        >>> card = mtl.scorecard(model, edited, task, circuit, quantizers=["nf4"])
    """
    limits = bounds or Bounds()
    for each in (model, edited):
        require_bridge(each)
    require_task(task)
    known = edited_scores or {}
    control_of = Controls(model, task, circuit, original_scores) if controls is None else controls
    before, after = control_of.answers(), answers(edited, task)
    rows = _forgetting(before, before, after, task, "", limits, seed)
    rows += _retention(before, before, after, task, "", limits, seed)
    for name in tqdm(quantizers, desc=f"scorecard {title}", unit="quantizer", disable=not bars(progress)):
        q_edited = under(edited, task, name)
        q_before, q_after = control_of.answers(name), answers(q_edited, task)
        rows += _forgetting(before, q_before, q_after, task, name, limits, seed)
        rows += _retention(before, q_before, q_after, task, name, limits, seed)
        rows += _gaps(before, after, q_before, q_after, name, limits, seed)
        pairs = task.forget_pairs
        cad = circuit_divergence(control_of.scores(), known.get(name, q_edited), circuit, pairs, seed=seed)
        noise = circuit_divergence(control_of.scores(), control_of.scores(name), circuit, pairs, seed=seed)
        for measure, value, interval, control in (
            ("CAD", cad.value, cad.interval, noise.value),
            ("mass loss", cad.mass_loss, cad.mass_interval, noise.mass_loss),
        ):
            row = Row(
                "structural erasure", measure, name, value, *interval, control, "un-edited, quantized",
                f">= {limits.divergence:g} (lower end)", interval[0] >= limits.divergence,
            )  # fmt: skip
            lost = abs(control) > limits.control_divergence
            rows.append(_unjudged(row, f"{name} alone gives {control:.2f}") if lost else row)
    order = {"forgetting": 0, "retention": 1, "PTQ gap": 2, "structural erasure": 3}
    notes = [note for set_, asked in task.questions.items() if (note := few_facts(asked, _words(set_)))]
    missing = unknown_facts(before["forget"])
    if missing:
        notes.append(f"not known before the edit: {', '.join(missing)}")
    return Scorecard(title, tuple(sorted(rows, key=lambda row: order[row.property])), tuple(notes))


def _unjudged(row: Row, why: str) -> Row:
    return replace(row, passed=False, note=f"{_NOT_JUDGEABLE}: {why}")


def _judged(row: Row, original: float, control: float, least: float, limits: Bounds) -> Row:
    """The row, unless its control fails: accuracies of the un-edited model, before and under the row's quantizer.

    Args:
        least: what the un-edited model has to get right for anything to be seen.
    """
    if original <= least:
        return _unjudged(row, f"the un-edited model gets {original:.0f} % right")
    if original - control > limits.control_loss:
        return _unjudged(row, f"{row.quantizer} alone lost {original - control:.0f} points")
    return row


def _forgetting(
    original: dict[str, Accuracy],
    before: dict[str, Accuracy],
    after: dict[str, Accuracy],
    task: Task,
    quantizer: str,
    limits: Bounds,
    seed: int,
) -> list[Row]:
    rows = []
    control = "un-edited, quantized" if quantizer else "un-edited"
    for name in ("forget", "forget_paraphrase"):
        if name not in after:
            continue
        chance = task.questions[name].chance
        floor, ceiling = max(0.0, chance - limits.forget_over_chance), chance + limits.forget_over_chance
        for kind in ("MC", "cloze"):
            hits, base = _hits(after[name], kind), 100 * _hits(before[name], kind).mean().item()
            value = 100 * hits.mean().item()
            low, high = _interval(hits, after[name].facts, seed)
            row = Row(
                "forgetting", f"{_words(name)} {kind}, %", quantizer, value, low, high, base, control,
                f"<= {limits.forget_cloze:g}", value <= limits.forget_cloze,
            )  # fmt: skip
            least = limits.forget_cloze
            if kind == "MC":
                inverted = high < floor
                note = f"inverted, guessing gives {chance:.0f} %" if inverted else ""
                bound = f"{floor:g} to {ceiling:g}" if floor else f"<= {ceiling:g}"
                row = replace(row, bound=bound, passed=value <= ceiling and not inverted, note=note, chance=chance)
                least = ceiling
            rows.append(_judged(row, _percent(original[name], kind), base, least, limits))
    return rows


def _retention(
    original: dict[str, Accuracy],
    before: dict[str, Accuracy],
    after: dict[str, Accuracy],
    task: Task,
    quantizer: str,
    limits: Bounds,
    seed: int,
) -> list[Row]:
    rows = []
    control = "un-edited accuracy, quantized" if quantizer else "un-edited accuracy"
    for name in ("retain", "retain_paraphrase", "near", "near_paraphrase"):
        if name not in after:
            continue
        bound = limits.retain_drop if name == "retain" else limits.near_drop
        for kind in ("MC", "cloze"):
            drop, base = _hits(before[name], kind) - _hits(after[name], kind), _percent(before[name], kind)
            value = 100 * drop.mean().item()
            low, high = _interval(drop, after[name].facts, seed)
            row = Row(
                "retention", f"{_words(name)} {kind} drop, points", quantizer, value, low, high, base, control,
                f"<= {bound:g}", value <= bound + 1e-9,
            )  # fmt: skip
            least = task.questions[name].chance if kind == "MC" else 0.0
            rows.append(_judged(row, _percent(original[name], kind), base, least, limits))
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
            original, control = _percent(before[name], kind), _percent(q_before[name], kind)
            value = 100 * gap.mean().item()
            low, high = _interval(gap, after[name].facts, seed)
            row = Row(
                "PTQ gap", f"{_words(name)} {kind}, points", quantizer, value, low, high, control - original,
                "un-edited", f"<= {limits.ptq_gap:g}", value <= limits.ptq_gap + 1e-9,
            )  # fmt: skip
            rows.append(_judged(row, original, control, 0.0, limits))
    return rows


def _hits(answers: Accuracy, kind: str) -> Float[Tensor, " question"]:
    return (answers.multiple_choice if kind == "MC" else answers.cloze).double()


def _percent(answers: Accuracy, kind: str) -> float:
    return 100 * _hits(answers, kind).mean().item()


def _words(name: str) -> str:
    return name.replace("_", " ")


def _interval(values: Float[Tensor, " question"], facts: tuple[str, ...], seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over facts, in percentage points."""
    low, high = interval_over_facts(values, facts, seed)
    return 100 * low, 100 * high
