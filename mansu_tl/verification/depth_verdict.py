"""Erased, suppressed, damaged or intact: what CAD by depth comes to.

Our definition, in this order. Numbers are of one layer (`CadByDepth.judged`: before the fact is read, at half depth at the
earliest), of the facts that the model no longer answers, and are taken by their 95 % interval over facts:

1. Nearly all answers are given: **intact**.
2. CAD lies above `gone`, and that of near facts `own` below it: **erased**. If near facts fell alike, the model is
   **damaged**. If writers now speak against the answer, what is left may be hidden: **suppressed**.
3. CAD lies below `gone`: the knowledge stands and is not said, whatever happens behind: **suppressed**.
4. Anything else is **undecided**: an interval that reaches over a bound.
"""

from __future__ import annotations

from dataclasses import dataclass

Interval = tuple[float, float]
ERASED = "erased"


@dataclass(frozen=True)
class DepthBounds:
    """Where the verdicts part.

    Attributes:
        gone: CAD from which on the knowledge counts as gone.
        specific: CAD on forget minus CAD on near pairs below which near facts fell alike.
        own: the same difference from which on the facts themselves are gone. Between the two names may be overwritten before
            anything is looked up, which hits near ones in part.
        opposed: negative terms that the original did not have, as a share of its positive ones, that do not count yet.
        answered: share of the answers that the original chooses from which on they count as given.
    """

    gone: float = 0.5
    specific: float = 0.25
    own: float = 0.6
    opposed: float = 0.1
    answered: float = 0.75


@dataclass(frozen=True)
class DepthVerdict:
    """A verdict and the sentence behind it.

    Attributes:
        name: "erased", "suppressed", "damaged", "intact" or "undecided".
        why: the numbers that decided.
    """

    name: str
    why: str

    def __repr__(self) -> str:
        return f"{self.name}: {self.why}"


def depth_verdict(
    layer: str, cad: Interval, specificity: Interval, opposition: Interval, answered: float, bounds: DepthBounds
) -> DepthVerdict:
    """What the numbers come to.

    Args:
        layer: what the stream is called that is judged.
        cad: CAD there, on the forget pairs that are no longer answered.
        specificity: that minus CAD on near pairs.
        opposition: added opposition.
        answered: forget answers chosen, as a share of those that the original chooses.
    """
    if answered >= bounds.answered:
        return DepthVerdict("intact", f"{100 * answered:.0f} % of the answers are given")
    here = f"of the {100 * (1 - answered):.0f} % that it no longer answers, CAD at {layer} is {_shown(cad)}"
    near = f"{_shown(specificity)} above that of near facts"
    against = f"added opposition {_shown(opposition)}"
    every = f"{here}, {near}, {against}"
    if cad[0] >= bounds.gone:
        if specificity[1] < bounds.specific:
            return DepthVerdict("damaged", f"{here}, {near}")
        if opposition[0] > bounds.opposed:
            return DepthVerdict("suppressed", f"{here}, but {against}")
        if specificity[0] >= bounds.own and opposition[1] <= bounds.opposed:
            return DepthVerdict(ERASED, every)
    elif cad[1] < bounds.gone:
        return DepthVerdict("suppressed", here)
    return DepthVerdict("undecided", every)


def foreign_basis(near_cad: float, near_drop: float, bounds: DepthBounds, most: float) -> str:
    """Why a model cannot be read by depth; "" where it can.

    Args:
        near_cad: CAD on near pairs at the judged layer.
        near_drop: multiple-choice points that near questions lost.
        most: how many of them count as none.
    """
    if near_cad < bounds.gone or near_drop > most:
        return ""
    return (
        f"near facts are answered as before, and CAD is {near_cad:.2f} on them too; the model has another basis, which the "
        "original cannot read"
    )


def _shown(interval: Interval) -> str:
    return "{:.2f} to {:.2f}".format(*interval)
