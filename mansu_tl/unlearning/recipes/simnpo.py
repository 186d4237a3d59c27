"""SimNPO + GDR: NPO without a reference model, its reward normalised by length.

Source: Fan et al. 2024, arXiv 2410.07163; beta = 2.5, gamma = 0 and retain weight 1 are its TOFU settings.
"""

from __future__ import annotations

from dataclasses import dataclass

from mansu_tl.unlearning import objectives
from mansu_tl.unlearning.objectives import Objective, likelihood
from mansu_tl.unlearning.training import Recipe, RetainSettings, Start, trained


@dataclass(frozen=True)
class SimNpoSettings(RetainSettings):
    """Settings of SimNPO, beside `retain_weight` and the shared `training`.

    Attributes:
        beta: inverse temperature of the reward.
        gamma: reward margin.
    """

    beta: float = 2.5
    gamma: float = 0.0


@trained("simnpo", "SimNPO + GDR", SimNpoSettings)
def simnpo(settings: SimNpoSettings, start: Start) -> Recipe:
    """The reference-free preference loss on the forget set, descent on the retain set."""
    forget = objectives.simnpo(settings.beta, settings.gamma)
    return Recipe(Objective(forget, likelihood, settings.retain_weight))
