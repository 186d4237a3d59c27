"""Erased, suppressed, damaged or intact: what CAD by depth comes to.

Our definition, in this order, at one layer (`CadByDepth.judged`: before the fact is read, at half depth at the earliest) and
each number by its 95 % interval over facts:

1. CAD lies above `gone`, and what is gone is specific: **erased**. If near facts fell alike, the model is **damaged**. If
   writers now speak against the answer, what is left may be hidden: **suppressed**.
2. CAD lies below `gone`: the knowledge stands. If its answers are given it is **intact**, else **suppressed**, whatever
   happens behind.
3. Anything else is **undecided**: an interval that reaches over a bound.
"""

from __future__ import annotations

from dataclasses import dataclass

Interval = tuple[float, float]
NAMES = ("erased", "suppressed", "damaged", "intact", "undecided")


@dataclass(frozen=True)
class DepthBounds:
    """Where the verdicts part.

    Attributes:
        gone: CAD from which on the knowledge counts as gone.
        specific: CAD on forget minus CAD on near pairs from which on that is about the forget facts.
        opposed: negative terms that the original did not have, as a share of its positive ones, that do not count yet.
        answered: share of the answers that the original chooses from which on they count as given.
    """

    gone: float = 0.5
    specific: float = 0.25
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
        cad: CAD there, on forget pairs.
        specificity: that minus CAD on near pairs.
        opposition: added opposition.
        answered: forget answers chosen, as a share of those that the original chooses.
    """
    here = f"CAD at {layer} {_shown(cad)}"
    near = f"{_shown(specificity)} above that of near facts"
    against = f"added opposition {_shown(opposition)}"
    if cad[0] >= bounds.gone:
        if specificity[1] < bounds.specific:
            return DepthVerdict("damaged", f"{here}, {near}")
        if opposition[0] > bounds.opposed:
            return DepthVerdict("suppressed", f"{here}, but {against}")
        if specificity[0] >= bounds.specific and opposition[1] <= bounds.opposed:
            return DepthVerdict("erased", f"{here}, {near}, {against}")
        return DepthVerdict("undecided", f"{here}, {near}, {against}")
    if cad[1] < bounds.gone:
        given = f"{100 * answered:.0f} % of its answers are given"
        return DepthVerdict("intact" if answered >= bounds.answered else "suppressed", f"{here}, {given}")
    return DepthVerdict("undecided", here)


def _shown(interval: Interval) -> str:
    return "{:.2f} to {:.2f}".format(*interval)
