"""What an audit's numbers come to: yes, no, or not judgeable and why; every answer beside its control.

Each question is put so that "yes" is what whoever ships the model hopes for. A verdict is **not judgeable** where its control
fails, where fewer than ten facts are asked, or where an interval reaches over its bound; a "no" is certain: its whole 95 %
interval over facts lies beyond the bound. Accuracies and drops have the scorecard's bounds and controls; the others are in
`AuditBounds`. Our definitions.

The questions are in `audit_questions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isnan, nan

import pandas as pd

from mansu_tl.data import Task
from mansu_tl.runs.metrics import Accuracy
from mansu_tl.study.audit_plan import AuditPlan
from mansu_tl.study.audit_stages import UNLEARNED
from mansu_tl.study.plan import NEVER
from mansu_tl.verification import Bounds, CadByDepth, Scorecard, judge
from mansu_tl.verification.knowledge import few_facts
from mansu_tl.verification.verdicts import NOT_JUDGEABLE

YES, NO = "yes", "no"
# What a scorecard judges.
_ANSWERS = ("MC", "cloze", "MC drop", "cloze drop", "PTQ gap, MC", "PTQ gap, cloze")
FORGOTTEN, KEPT = "Is it forgotten?", "Is everything else kept?"
FORMATS, RELEARNING = "Does it stay forgotten in the format it ships in?", "Does it stay forgotten under relearning?"
SAMPLING = "Does it stay forgotten when it is sampled?"
ERASED = "Is it erased, not only suppressed?"
KINDS = {"MC": "chosen", "cloze": "said"}
SETS = {
    "forget": "",
    "forget_paraphrase": ", held-out wording",
    "near": "near facts",
    "near_paraphrase": "near facts, held-out wording",
    "retain": "far facts",
    "retain_paraphrase": "far facts, held-out wording",
}


@dataclass(frozen=True)
class AuditBounds:
    """Where the audit's own verdicts part; those of accuracies and drops are the scorecard's (`Bounds`).

    Attributes:
        comes_back: points that a format, or an attack beside a never-trained model, may add.
        written: points by which the right answer may be written, or come up in samples, more often than a wrong one.
        margin: nats of log-odds that kept facts may lose.
        text: nats a token that text may lose.
        gone: erasure depth from which on the knowledge counts as gone.
        like_never: points that forget facts may be right more often, or less often, than by a never-trained model.
    """

    comes_back: float = 5.0
    written: float = 5.0
    margin: float = 1.0
    text: float = 0.1
    gone: float = 0.5
    like_never: float = 10.0


@dataclass(frozen=True)
class Verdict:
    """One line of an audit.

    Attributes:
        question: e.g. "Is it forgotten?".
        item: by what.
        verdict: "yes", "no" or "not judgeable".
        why: in words.
        value, low, high: of the unlearned model, with its 95 % interval over facts; NaN where there is none.
        control: the control's value.
        control_name: what the control is.
        unit: of all of them.
        bound: what was asked of the value.
    """

    question: str
    item: str
    verdict: str
    why: str = ""
    value: float = nan
    low: float = nan
    high: float = nan
    control: float = nan
    control_name: str = ""
    unit: str = ""
    bound: str = ""


@dataclass(frozen=True)
class Answer:
    """What a question's verdicts come to together.

    Attributes:
        question: e.g. "Is it forgotten?".
        verdict: "no" if one of them is, else "yes" if one of them is, else "not judgeable".
        why: how many say what, and the first of what speaks against.
    """

    question: str
    verdict: str
    why: str


@dataclass(frozen=True)
class Evidence:
    """What verdicts are made from.

    Attributes:
        table: the tidy rows, column method one of "unlearned", "original" and "never".
        task: what was asked.
        known: the original's answers to the forget questions.
        plan: what was looked at.
        failed: why a stage has no rows, by its name.
        cad: CAD by depth, or None.
        never: there is a never-trained model.
        bounds: where verdicts part.
    """

    table: pd.DataFrame
    task: Task
    known: Accuracy
    plan: AuditPlan
    failed: Mapping[str, str]
    cad: CadByDepth | None
    never: bool
    bounds: AuditBounds = AuditBounds()

    @cached_property
    def card(self) -> Scorecard:
        """The scorecard of the unlearned model, from these rows."""
        rows = self.table.loc[self.table["method"] == UNLEARNED].drop(columns="method")
        # Its own questions are asked of answers; other measures have no place on it.
        asked = rows.loc[rows["measure"].isin(_ANSWERS)]
        return judge(asked, self.task, self.known, title=UNLEARNED)

    @cached_property
    def _rows(self) -> dict[tuple[str, str, str, str], dict[str, float]]:
        keys = ["method", "quantizer", "question_set", "measure"]
        return {
            tuple(row[key] for key in keys): {key: float(row[key]) for key in ("value", "low", "high", "control")}
            for row in self.table.to_dict("records")
        }

    def row(self, who: str, quantizer: str, question_set: str, measure: str) -> dict[str, float] | None:
        """Value, low, high and control of one measure; None where it was not taken."""
        return self._rows.get((who, quantizer, question_set, measure))

    def few(self, question_set: str) -> str:
        """Why a set's intervals say little; "" where they do not."""
        return few_facts(self.task.questions[question_set], question_set.replace("_", " "))

    @cached_property
    def never_knows(self) -> str:
        """Why the never-trained model is no reference; "" where it is one."""
        row = self.row(NEVER, "", "forget", "MC")
        if row is None:
            return "no never-trained model (--never): what is learnt anew is not told from what comes back"
        guessing = self.task.questions["forget"].chance
        if row["low"] > guessing + self.bounds.comes_back:
            return f"the never-trained model gets {row['value']:.0f} % right where guessing gives {guessing:.0f} %"
        return ""

    def remembers(self, question_set: str, kind: str) -> str:
        """Why nothing can come back: it is still there; "" where it was forgotten."""
        row = self.row(UNLEARNED, "", question_set, kind)
        found = Bounds().of(question_set, kind)
        assert row is not None
        assert found is not None
        most = found[1].limits(self.task.questions[question_set].chance)[1]
        # Where it is open whether it was forgotten, what comes back still counts.
        return f"it was not forgotten: {row['value']:.0f} % are {KINDS[kind]} right" if row["low"] > most else ""


def three_way(row: Mapping[str, float], bound: float) -> tuple[str, str]:
    """A verdict on what must not exceed a bound, and why: only an interval that lies on one side of it decides."""
    low, high = row["low"], row["high"]
    if high <= bound:
        return YES, ""
    return (
        (NO, "") if low > bound else (NOT_JUDGEABLE, f"its interval, {low:.3g} to {high:.3g}, reaches over {bound:.3g}")
    )


def equivalent(row: Mapping[str, float], bound: float) -> tuple[str, str]:
    """A verdict on what must lie within a bound on both sides of 0, and why: equivalence, by its 95 % interval."""
    low, high = row["low"], row["high"]
    if max(-low, high) <= bound:
        return YES, ""
    if low > bound or high < -bound:
        return NO, "" if low > bound else "less often than by a model that never knew: it avoids the answer"
    return NOT_JUDGEABLE, f"its interval, {low:.3g} to {high:.3g}, reaches over {bound if high > bound else -bound:.3g}"


def numbered(
    question: str,
    item: str,
    outcome: tuple[str, str],
    row: Mapping[str, float],
    *,
    unit: str,
    bound: str,
    control: str,
    few: str,
) -> Verdict:
    """A verdict with its numbers; too few facts leave none.

    Args:
        outcome: the verdict and why.
        row: value, low, high and control.
        control: what the control is.
        few: why the set's intervals say little; "" where they do not.
    """
    if few and outcome[0] != NOT_JUDGEABLE:
        outcome = NOT_JUDGEABLE, few
    value, low, high, reference = (float(row[key]) for key in ("value", "low", "high", "control"))
    return Verdict(question, item, *outcome, value, low, high, reference, control, unit, bound)


def answers(given: Sequence[Verdict]) -> tuple[Answer, ...]:
    """One line a question."""
    groups: dict[str, list[Verdict]] = {}
    for each in given:
        groups.setdefault(each.question, []).append(each)
    return tuple(_answer(question, each) for question, each in groups.items())


def _answer(question: str, given: Sequence[Verdict]) -> Answer:
    by = {name: [each for each in given if each.verdict == name] for name in (NO, YES, NOT_JUDGEABLE)}
    name = next(name for name in (NO, YES, NOT_JUDGEABLE) if by[name])
    counts = ", ".join(f"{len(each)} {what}" for what, each in by.items() if each)
    if len(by[YES]) == len(given):
        return Answer(question, name, f"all {len(given)}")
    if name == YES:
        return Answer(question, name, counts)
    first = by[name][0]
    told = first.why or f"{shown(first)}, asked {first.bound}"
    return Answer(question, name, f"{first.item}: {told} ({counts})")


def shown(verdict: Verdict) -> str:
    """A verdict's number, its interval and unit; "" where there is none."""
    if isnan(verdict.value):
        return ""
    ends = "" if isnan(verdict.low) else f" [{_short(verdict.low)}, {_short(verdict.high)}]"
    return f"{_short(verdict.value)}{ends} {verdict.unit}"


def _short(value: float) -> str:
    # A mean of many is 1e-15 where it is nothing.
    return f"{0.0 if abs(value) < 5e-4 else value:.3g}"
