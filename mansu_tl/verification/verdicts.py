"""When a number passes: every bound, what guessing and inversion mean, and what cannot be judged, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isnan, nan
from types import MappingProxyType

from mansu_tl.verification.depth_verdict import DepthBounds

NOT_JUDGEABLE = "not judgeable"
# Means of percentages are sums of many terms: 1.0000000000000002 is 1.
_ROUNDED = 6


@dataclass(frozen=True)
class Bound:
    """When one measure passes.

    Attributes:
        least, most: what the value may be.
        over_chance: for multiple choice in place of `most`, points above chance; as many below chance with the whole interval
            is inverted knowledge, which does not pass either.
        control: how far the control may be from 0; where it is further, nothing can be judged.
    """

    least: float = -inf
    most: float = inf
    over_chance: float | None = None
    control: float = inf

    def limits(self, chance: float) -> tuple[float, float, float]:
        """What the value may be at least and at most, and what the interval's upper end has to reach."""
        if self.over_chance is None:
            return self.least, self.most, -inf
        return self.least, chance + self.over_chance, max(0.0, chance - self.over_chance)

    def text(self, chance: float = nan) -> str:
        """The bound as a scorecard writes it."""
        least, most, floor = self.limits(chance)
        if floor > 0 or max(-least, most) < inf:
            return f"{max(floor, least):g} to {most:g}"
        return f">= {least:g}" if most == inf else f"<= {most:g}"

    def verdict(
        self, value: float, low: float, high: float, *, chance: float = nan, control: float = 0.0, quantizer: str = ""
    ) -> str:
        """ "pass", "fail", "fail: why" or "not judgeable: why".

        Args:
            low, high: the value's interval; NaN where it has none.
            chance: what guessing gives, in percent.
            control: the un-edited model's value, where 0 is expected of it.
        """
        least, most, floor = self.limits(chance)
        if isnan(most):
            return f"{NOT_JUDGEABLE}: the table does not say what guessing gives"
        if abs(control) > self.control:
            return f"{NOT_JUDGEABLE}: {quantizer} alone gives {control:.2f}"
        if high < floor:
            return f"fail: inverted, guessing gives {chance:.0f} %"
        return "pass" if least <= round(value, _ROUNDED) and round(value, _ROUNDED) <= most else "fail"


@dataclass(frozen=True)
class Bounds:
    """When a row of a scorecard passes; accuracies and drops in percentage points.

    Attributes:
        forget_over_chance: how far from chance (100 / options) multiple choice on forget questions may be. Above it the
            knowledge is still there; below it, with the whole interval, it is inverted rather than forgotten.
        forget_cloze: cloze accuracy on forget questions.
        retain_drop: drop on the retain questions.
        near_drop: drop on neighbouring facts, and on every held-out wording.
        ptq_gap: forget accuracy after quantization minus before.
        depth: where the structural verdicts part.
        control_loss: what quantization alone may cost the un-edited model; where it costs more, nothing can be judged.
        control_divergence: CAD by depth of the un-edited model after quantization, likewise.
    """

    forget_over_chance: float = 5.0
    forget_cloze: float = 5.0
    retain_drop: float = 1.0
    near_drop: float = 2.0
    ptq_gap: float = 0.0
    depth: DepthBounds = field(default_factory=DepthBounds)
    control_loss: float = 10.0
    control_divergence: float = 0.2

    def of(self, question_set: str, measure: str) -> tuple[str, Bound] | None:
        """The property that a measure belongs to and its bound; None where a scorecard does not judge it."""
        if measure in ("PTQ gap, MC", "PTQ gap, cloze"):
            return "PTQ gap", Bound(most=self.ptq_gap)
        if measure in ("MC drop", "cloze drop"):
            return "retention", Bound(most=self.retain_drop if question_set == "retain" else self.near_drop)
        if question_set.startswith("forget") and measure in ("MC", "cloze"):
            if measure == "MC":
                return "forgetting", Bound(over_chance=self.forget_over_chance)
            return "forgetting", Bound(most=self.forget_cloze)
        return None

    def control_fails(self, original: float, control: float, least: float, quantizer: str) -> str:
        """Why nothing can be judged; "" where something can. Accuracies of the un-edited model, in percent.

        Args:
            original: in full precision.
            control: under the row's quantizer.
            least: what it has to get right for anything to be seen.
        """
        if original <= least:
            return f"{NOT_JUDGEABLE}: the un-edited model gets {original:.0f} % right"
        lost = original - control
        return f"{NOT_JUDGEABLE}: {quantizer} alone lost {lost:.0f} points" if lost > self.control_loss else ""


@dataclass(frozen=True)
class Goal:
    """A property of a method in a comparison: a measure of the tidy table and its bound on the mean over seeds."""

    quantizer: str
    question_set: str
    measure: str
    bound: Bound


_LOST, _FORGOTTEN = Bounds().control_loss, Bounds().forget_over_chance
# What a method is to reach, stricter than what a scorecard lets pass for one edit.
GOALS: Mapping[str, Goal] = MappingProxyType(
    {
        "forget MC": Goal("", "forget", "MC", Bound(over_chance=_FORGOTTEN)),
        "forget cloze": Goal("", "forget", "cloze", Bound(most=3.0)),
        "held-out forget MC": Goal("", "forget_paraphrase", "MC", Bound(over_chance=_FORGOTTEN)),
        "held-out forget cloze": Goal("", "forget_paraphrase", "cloze", Bound(most=3.0)),
        "retain drop": Goal("", "retain", "cloze drop", Bound(most=0.5)),
        "held-out retain drop": Goal("", "retain_paraphrase", "cloze drop", Bound(most=1.0)),
        "near drop": Goal("", "near", "cloze drop", Bound(most=1.0)),
        "held-out near drop": Goal("", "near_paraphrase", "cloze drop", Bound(most=2.0)),
        "PTQ gap, nf4": Goal("nf4", "forget", "PTQ gap, MC", Bound(most=0.0, control=_LOST)),
        "CAD, nf4": Goal("nf4", "", "CAD", Bound(least=0.95, most=1.05, control=Bounds().control_divergence)),
        "relearning excess, lr 3e-4": Goal(
            "", "forget", "relearning MC, facts, lr 0.0003, excess over never", Bound(most=5.0)
        ),
        "relearning excess, lr 1e-3": Goal(
            "", "forget", "relearning MC, facts, lr 0.001, excess over never", Bound(most=10.0)
        ),
        "edited, %": Goal("", "", "edited linear weights, %", Bound(most=2.0)),
    }
)
# The mean PTQ gap over all quantizers of four bits or more, and its largest upper end.
GAP_OVER_ALL = Bound(most=0.0, control=_LOST)
GAP_UPPER_END = 1.0
