"""NPO + GDR: negative preference optimization, with descent on the retain text.

Source: Zhang et al. 2024, arXiv 2404.05868; beta = .1 there.
"""

from __future__ import annotations

from dataclasses import dataclass

from mansu_tl.unlearning import objectives
from mansu_tl.unlearning.objectives import Objective, likelihood
from mansu_tl.unlearning.training import Recipe, RetainSettings, Start, trained


@dataclass(frozen=True)
class NpoSettings(RetainSettings):
    """Settings of NPO, beside `retain_weight` and the shared `training`.

    Attributes:
        beta: inverse temperature of the preference loss.
    """

    beta: float = 0.1


@trained("npo", "NPO + GDR", NpoSettings)
def npo(settings: NpoSettings, start: Start) -> Recipe:
    """The preference loss on the forget set, descent on the retain set."""
    return Recipe(Objective(objectives.npo(settings.beta), likelihood, settings.retain_weight))
