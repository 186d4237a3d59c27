"""The questions of an audit: each a function that yields its verdicts from the rows of the stages.

`QUESTIONS` is all of them, in the order of the page. A further one is such a function, and an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mansu_tl.study.audit_stages import LEAKED, OVER_NEVER, SAMPLES, UNLEARNED
from mansu_tl.study.audit_verdicts import (
    ERASED,
    FORGOTTEN,
    FORMATS,
    KEPT,
    KINDS,
    NO,
    RELEARNING,
    SAMPLING,
    SETS,
    YES,
    Evidence,
    Verdict,
    equivalent,
    numbered,
    three_way,
)
from mansu_tl.study.plan import ORIGINAL
from mansu_tl.verification import Bounds, DepthBounds
from mansu_tl.verification.attacks import ATTACKER_FACTS
from mansu_tl.verification.cad_by_depth import CAD
from mansu_tl.verification.depth_verdict import foreign_basis
from mansu_tl.verification.scorecard import Row
from mansu_tl.verification.verdicts import GOALS, NOT_JUDGEABLE

_FEWEST = 10  # facts, from which on an interval over them says something
_FORGET, _NEAR, _FAR = (
    tuple(name for name in SETS if name.startswith(start)) for start in ("forget", "near", "retain")
)
_ABOVE_NEVER = "points above never trained"


def verdicts(found: Evidence) -> tuple[Verdict, ...]:
    """Every verdict, question by question."""
    return tuple(verdict for question in QUESTIONS for verdict in question(found))


def _forgotten(found: Evidence) -> Iterator[Verdict]:
    for row in found.card.rows:
        if row.property == "forgetting" and not row.quantizer:
            yield _of_card(FORGOTTEN, row, found)
    for asked in _FORGET:
        if asked not in found.task.questions:
            yield Verdict(
                FORGOTTEN, "held-out wording", NOT_JUDGEABLE, "the task has no held-out wording of these facts"
            )
            continue
        item = f"written freely{SETS[asked]}"
        names = ("generation", "generation, a wrong option")
        right, wrong = (found.row(UNLEARNED, "", asked, name) for name in names)
        if right is None or wrong is None:
            yield _missing(FORGOTTEN, item, found, "generation")
            continue
        least = wrong["value"] + found.bounds.written
        outcome = three_way(right, least)
        if right["control"] <= least:
            outcome = NOT_JUDGEABLE, f"the original writes {right['control']:.0f} % of them"
        yield numbered(
            FORGOTTEN, item, outcome, right, unit="% written", bound=f"<= {least:.3g}", control="original, % written",
            few=found.few(asked),
        )  # fmt: skip
    yield from _like_never(found)


def _like_never(found: Evidence) -> Iterator[Verdict]:
    """Equivalence with a model that never knew, where there is one."""
    for asked in _FORGET if found.never and not found.never_knows else ():
        for kind, words in KINDS.items():
            row, bound = found.row(UNLEARNED, "", asked, f"{kind}{OVER_NEVER}"), found.bounds.like_never
            if row is not None:
                yield numbered(
                    FORGOTTEN, f"as never trained: {words}{SETS[asked]}", equivalent(row, bound), row, unit=_ABOVE_NEVER,
                    bound=f"{-bound:g} to {bound:g}", control="never trained, % right", few=found.few(asked),
                )  # fmt: skip


def _kept(found: Evidence) -> Iterator[Verdict]:
    kept = [row for row in found.card.rows if row.property == "retention" and not row.quantizer]
    for row in sorted(kept, key=lambda row: not row.measure.startswith("near")):
        yield _of_card(KEPT, row, found)
    if "near" not in found.task.questions:
        yield Verdict(KEPT, "near facts", NOT_JUDGEABLE, "the task has no near facts, the first to suffer")
    for asked in (*_NEAR, *_FAR):
        lost, before = found.row(UNLEARNED, "", asked, "log-odds drop"), found.row(ORIGINAL, "", asked, "log-odds")
        if lost is None or before is None:
            continue
        bound = found.bounds.margin
        outcome = three_way(lost, bound)
        if before["value"] <= bound:
            outcome = NOT_JUDGEABLE, f"the original's margin is {before['value']:.1f} nats"
        yield numbered(
            KEPT, f"{SETS[asked]}, margin", outcome, {**lost, "control": before["value"]}, unit="nats lost",
            bound=f"<= {bound:g}", control="original's margin", few=found.few(asked),
        )  # fmt: skip
    text = found.row(UNLEARNED, "", "", "loss rise, retain text, nats")
    if text is None:
        yield _missing(KEPT, "text", found, "text")
    else:
        yield numbered(
            KEPT, "text", three_way(text, found.bounds.text), text, unit="nats a token lost",
            bound=f"<= {found.bounds.text:g}", control="original", few="",
        )  # fmt: skip


@dataclass(frozen=True)
class _Returned:
    """What one way of asking says of a format.

    Attributes:
        verdict, why: as of a `Verdict`.
        undecided: more facts would decide it; else a control fails.
        asked, kind: question set, and "MC" or "cloze".
        gap: what comes back.
    """

    verdict: str
    why: str
    undecided: bool
    asked: str
    kind: str
    gap: dict[str, float]


def _formats(found: Evidence) -> Iterator[Verdict]:
    for name in found.plan.formats:
        yield _format(found, name)


def _format(found: Evidence, name: str) -> Verdict:
    """A format's verdict over every wording, chosen and said: the number shown is the one that decides."""
    if found.row(UNLEARNED, name, "forget", "MC") is None:
        return _missing(FORMATS, name, found, f"formats/{name}")
    asked = [set_ for set_ in _FORGET if set_ in found.task.questions]
    parts = [_returned(found, name, set_, kind) for set_ in asked for kind in KINDS]
    # What came back by one way of asking is back; what one leaves open is open.
    ranked = (
        [part for part in parts if part.verdict == NO],
        [part for part in parts if part.undecided],
        [part for part in parts if part.verdict == YES],
        parts,
    )
    # Where several decide alike, the one in which most came back.
    one = max(next(part for part in ranked if part), key=lambda part: part.gap["value"])
    before, after = (found.row(UNLEARNED, at, one.asked, one.kind) for at in ("", name))
    assert before is not None
    assert after is not None
    told = f"{KINDS[one.kind]} right{SETS[one.asked]}: {before['value']:.0f} % before, {after['value']:.0f} % as {name}"
    blocked = sum(part.verdict == NOT_JUDGEABLE and not part.undecided for part in parts)
    rest = f"; {blocked} of {len(parts)} ways of asking not judgeable" if blocked else ""
    return numbered(
        FORMATS, name, (one.verdict, one.why if one.verdict == NOT_JUDGEABLE else f"{told}{rest}"),
        {**one.gap, "control": after["control"]}, unit="points come back", bound=f"<= {found.bounds.comes_back:g}",
        control=f"original as {name}, % right", few="",
    )  # fmt: skip


def _returned(found: Evidence, name: str, asked: str, kind: str) -> _Returned:
    own, deployed = (found.row(ORIGINAL, at, asked, kind) for at in ("", name))
    after, gap = (found.row(UNLEARNED, name, asked, each) for each in (kind, f"PTQ gap, {kind}"))
    assert own is not None
    assert deployed is not None
    assert after is not None
    assert gap is not None
    guessing = found.task.questions[asked].chance if kind == "MC" else 0.0
    least = guessing + found.bounds.comes_back
    fails = Bounds().control_fails(own["value"], deployed["value"], least, name) or found.remembers(asked, kind)
    if fails:
        return _Returned(NOT_JUDGEABLE, fails.removeprefix(f"{NOT_JUDGEABLE}: "), False, asked, kind, gap)
    if few := found.few(asked):
        return _Returned(NOT_JUDGEABLE, few, True, asked, kind, gap)
    # Answers that go from inverted to guessed are no knowledge.
    verdict, why = (YES, "") if after["high"] <= least else three_way(gap, found.bounds.comes_back)
    return _Returned(verdict, why, verdict == NOT_JUDGEABLE, asked, kind, gap)


def _relearning(found: Evidence) -> Iterator[Verdict]:
    if not found.plan.attack_rates:
        yield Verdict(RELEARNING, "relearning", NOT_JUDGEABLE, "the plan has no attacks")
    for kind, words in (("facts", f"{ATTACKER_FACTS} of the facts"), ("text", "unrelated text")):
        for rate in found.plan.attack_rates:
            yield _attacked(found, kind, f"trained on {words}, lr {rate:g}", f"relearning MC, {kind}, lr {rate:g}")


def _sampled(found: Evidence) -> Iterator[Verdict]:
    row, own = (found.row(who, "", "forget", LEAKED) for who in (UNLEARNED, ORIGINAL))
    item, bound = f"{SAMPLES} samples of every answer", found.bounds.written
    if row is None or own is None:
        yield _missing(SAMPLING, item, found, "sampling")
        return
    outcome = three_way(row, bound)
    if own["low"] <= bound:
        above = f"{own['value']:.0f} points more often than a wrong one"
        outcome = NOT_JUDGEABLE, f"the original itself says the right answer only {above}"
    yield numbered(
        SAMPLING, item, outcome, {**row, "control": own["value"]}, unit="points above a wrong option", bound=f"<= {bound:g}",
        control="original", few=found.few("forget"),
    )  # fmt: skip


def _attacked(found: Evidence, kind: str, item: str, name: str) -> Verdict:
    measure = f"{name}, excess over never"
    row, own = (found.row(who, "", "forget", measure) for who in (UNLEARNED, ORIGINAL))
    left = len(set(found.task.questions["forget"].facts)) - (ATTACKER_FACTS if kind == "facts" else 0)
    if found.never_knows:
        return Verdict(RELEARNING, item, NOT_JUDGEABLE, found.never_knows)
    if left < _FEWEST:
        why = f"beside the attacker's {ATTACKER_FACTS} facts {max(left, 0)} are left to be asked, fewer than ten"
        return Verdict(RELEARNING, item, NOT_JUDGEABLE, why)
    if row is None or own is None:
        return _missing(RELEARNING, item, found, "relearning_unlearned", "relearning_original", "relearning_never")
    goals = [goal.bound.most for goal in GOALS.values() if goal.measure == measure]
    bound = goals[0] if goals else found.bounds.comes_back
    outcome = three_way(row, bound)
    if own["low"] <= bound:
        above = f"{own['value']:.0f} points above the never-trained model"
        outcome = NOT_JUDGEABLE, f"the original itself ends only {above}, so this attack shows nothing"
    elif remembers := found.remembers("forget", "MC"):
        outcome = NOT_JUDGEABLE, remembers
    return numbered(
        RELEARNING, item, outcome, {**row, "control": own["value"]}, unit=_ABOVE_NEVER, bound=f"<= {bound:g}",
        control="original", few=found.few("forget"),
    )  # fmt: skip


def _erased(found: Evidence) -> Iterator[Verdict]:
    yield _by_depth(found)
    yield _probed(found)
    row, item, gone = found.row(UNLEARNED, "", "", "erasure depth"), "erasure depth", found.bounds.gone
    if found.never_knows:
        yield Verdict(ERASED, item, NOT_JUDGEABLE, found.never_knows)
    elif row is None:
        yield _missing(ERASED, item, found, "probes")
    else:
        outcome = three_way({"low": -row["high"], "high": -row["low"]}, -gone)
        if outcome[0] == NOT_JUDGEABLE:
            outcome = NOT_JUDGEABLE, f"its interval, {row['low']:.2f} to {row['high']:.2f}, reaches over {gone:g}"
        yield numbered(
            ERASED, item, outcome, row, unit="of 1", bound=f">= {gone:g}", control="never trained", few=found.few("forget")
        )  # fmt: skip


def _by_depth(found: Evidence) -> Verdict:
    cad = found.cad
    if cad is None:
        return _missing(ERASED, "CAD by depth", found, "depth")
    result, (value, low, high), near = cad.verdict(), cad.decisive[CAD], float(cad.near_cad[cad.judged])
    outcome = {"erased": YES, "undecided": NOT_JUDGEABLE}.get(result.name, NO), f"{result.name}: {result.why}"
    lost = found.row(UNLEARNED, "", "near", "MC drop")
    if lost is not None and (foreign := foreign_basis(near, lost["value"], DepthBounds(), Bounds().near_drop)):
        outcome = NOT_JUDGEABLE, foreign
    row = {"value": value, "low": low, "high": high, "control": near}
    return numbered(
        ERASED, f"CAD by depth, at {cad.layers[cad.judged]}", outcome, row, unit="of the evidence gone", bound=">= 0.5",
        control="near facts", few=found.few("forget") or found.few("near"),
    )  # fmt: skip


def _probed(found: Evidence) -> Verdict:
    """By the probe of the layer at which probes read most from the original."""
    measures = dict.fromkeys(found.table["measure"])
    names = [each for each in measures if each.startswith("probe MC at") and each.endswith("excess over never")]
    if found.never_knows:
        return Verdict(ERASED, "probes", NOT_JUDGEABLE, found.never_knows)
    if not names:
        return _missing(ERASED, "probes", found, "probes")
    row, own = (found.row(who, "", "forget", names[0]) for who in (UNLEARNED, ORIGINAL))
    assert row is not None
    assert own is not None
    bound = found.bounds.comes_back
    outcome = three_way(row, bound)
    if own["low"] <= bound:
        more = f"{own['value']:.0f} points more than one of the never-trained model"
        outcome = NOT_JUDGEABLE, f"a probe of the original reads only {more}"
    layer = names[0].removeprefix("probe MC ").partition(",")[0]
    return numbered(
        ERASED, f"probes, {layer}", outcome, {**row, "control": own["value"]}, unit=_ABOVE_NEVER, bound=f"<= {bound:g}",
        control="original", few=found.few("forget"),
    )  # fmt: skip


def _of_card(question: str, row: Row, found: Evidence) -> Verdict:
    """A verdict of a scorecard's row, with a "no" only where the whole interval lies beyond the bound."""
    kind = "MC" if " MC" in row.measure else "cloze"
    words, _, rest = row.measure.partition(f" {kind}")
    asked, drop = words.replace(" ", "_"), "drop" in rest
    item = f"{SETS[asked]}, {KINDS[kind]}" if drop else f"{KINDS[kind]}{SETS[asked]}"
    numbers = {"value": row.value, "low": row.interval_low, "high": row.interval_high, "control": row.control}
    outcome = YES, ""
    if not row.judgeable:
        outcome = NOT_JUDGEABLE, row.note.removeprefix(f"{NOT_JUDGEABLE}: ")
    elif not row.passed:
        judged = Bounds().of(asked, f"{kind} drop" if drop else kind)
        assert judged is not None
        most = judged[1].limits(found.task.questions[asked].chance)[1]
        outcome = (NO, row.note) if row.note else three_way(numbers, most)
    return numbered(
        question, item, outcome, numbers, unit="points lost" if drop else "% right", bound=row.bound,
        control="original, % right", few=found.few(asked),
    )  # fmt: skip


def _missing(question: str, item: str, found: Evidence, *stages: str) -> Verdict:
    """Why there is no number."""
    reason = next((found.failed[name] for name in stages if name in found.failed), "")
    return Verdict(question, item, NOT_JUDGEABLE, reason or "this plan does not look at it; --full does")


QUESTIONS: tuple[Callable[[Evidence], Iterator[Verdict]], ...] = (
    _forgotten,
    _kept,
    _formats,
    _sampled,
    _relearning,
    _erased,
)
