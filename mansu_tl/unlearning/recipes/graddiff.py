"""GradDiff (GA + GDR): ascend on the forget answers, descend on the retain text.

Source: Liu et al. 2022, arXiv 2203.12817; as the baseline of TOFU, Maini et al. 2024, arXiv 2401.06121.
"""

from __future__ import annotations

from mansu_tl.unlearning.objectives import Objective, ascent, likelihood
from mansu_tl.unlearning.training import Recipe, RetainSettings, Start, trained


@trained("graddiff", "GradDiff", RetainSettings)
def graddiff(settings: RetainSettings, start: Start) -> Recipe:
    """Ascent on the forget set, descent on the retain set."""
    return Recipe(Objective(ascent, likelihood, settings.retain_weight))
